// One logical step: add the noise to the integer sums, average, and run the optimizer.
//
//   grad = (sums + round(sigma z / grid)) grid / L,  sigma = noise_multiplier sqrt(sum_k C_k^2)
//
// private_update takes the sums from memory and zeroes them; private_step makes them here from the
// records of the only physical batch, a chunk at a time, and they are in no memory at all.
#include <stdlib.h>

#include "../common/division.h"
#include "../common/optimizer.h"
#include "../ffa.h"
#include "chunks.h"
#include "clip_accumulate.h"
#include "gaussian_fill.h"

namespace ffa::FFA_ISA {
namespace {

// What holds for all tensors of a step, as csrc/ffa.h describes the arguments of private_update.
struct Update {
  int64_t n_tensors;
  const int64_t* numels;
  const int* dtypes;
  void* const* params;
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  float* const* steps;
  int64_t* rng_state;
  const double* hyper;
  const int64_t* tensor_ids;
  int64_t groups;
  const double* max_grad_norm;
  double noise_multiplier, expected_batch_size;
  int optimizer, nesterov, maximize;

  double bound(int64_t k) const { return max_grad_norm[groups == 1 ? 0 : k]; }
};

struct Tensor {
  void *param, *exp_avg, *exp_avg_sq;
  bool bounded;
  double grid;  // 1 where there is no bound, and no noise either
  ChaChaStream stream;
  OptimizerScalars<float> scalars;
  OptimizerScalars<double> wide_scalars;
  int dtype;
};

struct Step {
  double sigma, expected_batch_size;
  bool moderate;  // the sums are far from the ends of fp64, and so are they over the batch size
  int optimizer;
  bool nesterov, maximize;
};

// An int64 rounded to fp64. Without AVX-512 there is no instruction for several of them: there the
// two halves are placed in the mantissas of 2^84, its sign bit flipped, and 2^52.
FFA_HD double to_real(int64_t v) {
#if defined(__AVX512DQ__) || defined(__aarch64__)
  return static_cast<double>(v);
#else
  const uint64_t bits = static_cast<uint64_t>(v);
  const double high = bit_cast<double>((bits >> 32) ^ 0x4530000080000000u);
  const double low = bit_cast<double>((bits & 0xffffffffu) | 0x4330000000000000u);
  return (high - (0x1p84 + 0x1p63 + 0x1p52)) + low;
#endif
}

// total: the sum of a chunk in units of the grid. Below 2^53 it and the noise are integers in fp64
// and their sum is exact.
template <class T>
void make_grad(const Tensor& t, const Step& step, int64_t first, int count, double* total,
               T* grad) {
  if (step.sigma > 0.0) {
    alignas(64) double z[kChunk];
    gaussian_range(t.stream, first, count, z);
    const double per_grid = step.sigma / t.grid;
    for (int i = 0; i < count; ++i) total[i] += round_half_even(per_grid * z[i]);
  }
  const double grid = t.grid, batch_size = step.expected_batch_size;
  if (t.bounded && step.moderate) {
    const Divisor<double> divisor(batch_size);
    for (int i = 0; i < count; ++i) grad[i] = static_cast<T>(divisor.divide(total[i] * grid));
  } else {
    for (int i = 0; i < count; ++i) grad[i] = static_cast<T>(total[i] * grid / batch_size);
  }
}

template <class T>
void update_chunk(const Tensor& t, const OptimizerScalars<T>& s, const Step& step, int64_t first,
                  int count, double* total) {
  alignas(64) T grad[kChunk];
  make_grad(t, step, first, count, total, grad);
  T* __restrict param = static_cast<T*>(t.param) + first;
  if (step.optimizer == FFA_NONE) {
    memcpy(param, grad, static_cast<size_t>(count) * sizeof(T));
    return;
  }
  if (step.maximize) {
    for (int i = 0; i < count; ++i) grad[i] = -grad[i];
  }
  if (step.optimizer == FFA_SGD && t.exp_avg == nullptr) {
    for (int i = 0; i < count; ++i) param[i] = sgd_update(param[i], grad[i], s);
    return;
  }
  T* __restrict exp_avg = static_cast<T*>(t.exp_avg) + first;
  if (step.optimizer == FFA_SGD) {
    for (int i = 0; i < count; ++i) {
      param[i] = sgd_momentum_update(param[i], grad[i], exp_avg[i], s, step.nesterov);
    }
    return;
  }
  T* __restrict exp_avg_sq = static_cast<T*>(t.exp_avg_sq) + first;
  const bool decoupled = step.optimizer == FFA_ADAMW;
  for (int i = 0; i < count; ++i) {
    param[i] = adam_update(param[i], grad[i], exp_avg[i], exp_avg_sq[i], s, decoupled);
  }
}

int check_update(const Update& u) {
  if (u.n_tensors < 0 || (u.groups != 1 && u.groups != u.n_tensors)) return FFA_BAD_SIZE;
  if (u.optimizer < FFA_NONE || u.optimizer > FFA_ADAMW) return FFA_BAD_VALUE;
  const bool adam = u.optimizer == FFA_ADAM || u.optimizer == FFA_ADAMW;
  if (adam && (u.exp_avgs == nullptr || u.exp_avg_sqs == nullptr)) return FFA_BAD_VALUE;
  if (u.optimizer != FFA_NONE && u.steps == nullptr) return FFA_BAD_VALUE;
  bool bounded = true;
  for (int64_t k = 0; k < u.groups; ++k) {
    if (!(u.max_grad_norm[k] > 0x1p-900)) return FFA_BAD_VALUE;
    bounded = bounded && !isinf(u.max_grad_norm[k]);
  }
  if (!(u.noise_multiplier >= 0.0) || (u.noise_multiplier > 0.0 && !bounded) ||
      !(u.expected_batch_size > 0.0)) {
    return FFA_BAD_VALUE;
  }
  for (int64_t k = 0; k < u.n_tensors; ++k) {
    if (u.numels[k] < 0 || u.numels[k] > int64_t{8} << 32) return FFA_BAD_SIZE;
    if (u.dtypes[k] != FFA_F32 && u.dtypes[k] != FFA_F64) return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

// `total_of(k, first, count, total)` writes the sums of a chunk of tensor k in units of its grid.
template <class Source>
int run_update(const Update& u, Source total_of, int threads) {
  Tensor* tensors =
      static_cast<Tensor*>(malloc(static_cast<size_t>(u.n_tensors + 1) * sizeof(Tensor)));
  if (tensors == nullptr) return FFA_NO_MEMORY;
  for (int64_t k = 0; k < u.n_tensors; ++k) {
    Tensor& t = tensors[k];
    t.param = u.params[k];
    t.exp_avg = u.exp_avgs != nullptr ? u.exp_avgs[k] : nullptr;
    t.exp_avg_sq = u.exp_avg_sqs != nullptr ? u.exp_avg_sqs[k] : nullptr;
    t.bounded = !isinf(u.bound(k));
    t.grid = t.bounded ? clip_grid(u.bound(k)) : 1.0;
    t.stream = chacha_stream(u.rng_state, u.tensor_ids[k]);
    t.dtype = u.dtypes[k];
    if (u.optimizer == FFA_NONE) continue;
    // Powers take longer than to see that they are those of the tensor before.
    const double* hyper = u.hyper + 5 * k;
    if (k > 0 && *u.steps[k] == *u.steps[k - 1] &&
        memcmp(hyper, hyper - 5, 5 * sizeof(*hyper)) == 0) {
      t.scalars = tensors[k - 1].scalars;
      t.wide_scalars = tensors[k - 1].wide_scalars;
    } else {
      t.scalars = optimizer_scalars<float>(hyper, *u.steps[k]);
      t.wide_scalars = optimizer_scalars<double>(hyper, *u.steps[k]);
    }
  }
  double bound_sq = 0.0;
  for (int64_t k = 0; k < u.groups; ++k) bound_sq += u.max_grad_norm[k] * u.max_grad_norm[k];
  const double sigma = u.noise_multiplier > 0.0 ? u.noise_multiplier * sqrt(bound_sq) : 0.0;
  const double L = u.expected_batch_size;
  const bool moderate = sigma < 0x1p700 && L > 0x1p-200 && L < 0x1p200;
  const Step step = {sigma, L, moderate, u.optimizer, u.nesterov != 0, u.maximize != 0};
  const int status =
      for_each_chunk(threads, u.n_tensors, u.numels, [&](int64_t k, int64_t first, int count) {
        const Tensor& t = tensors[k];
        alignas(64) double total[kChunk];
        total_of(k, first, count, total);
        if (t.dtype == FFA_F32) {
          update_chunk<float>(t, t.scalars, step, first, count, total);
        } else {
          update_chunk<double>(t, t.wide_scalars, step, first, count, total);
        }
      });
  free(tensors);
  if (status != FFA_OK) return status;
  for (int64_t k = 0; k < u.n_tensors && u.steps != nullptr; ++k) *u.steps[k] += 1.0f;
  u.rng_state[4] = static_cast<int64_t>(static_cast<uint64_t>(u.rng_state[4]) + 1);
  return FFA_OK;
}

}  // namespace

int private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes, void* const* params,
                   void* const* sums, void* const* exp_avgs, void* const* exp_avg_sqs,
                   float* const* steps, int64_t* rng_state, const double* hyper,
                   const int64_t* tensor_ids, int64_t groups, const double* max_grad_norm,
                   double noise_multiplier, double expected_batch_size, int optimizer, int nesterov,
                   int maximize, int threads) {
  const Update update = {
      n_tensors, numels,   dtypes,     params, exp_avgs,      exp_avg_sqs,      steps,
      rng_state, hyper,    tensor_ids, groups, max_grad_norm, noise_multiplier, expected_batch_size,
      optimizer, nesterov, maximize};
  if (const int status = check_update(update)) return status;
  const auto total_of = [&](int64_t k, int64_t first, int count, double* total) {
    const size_t bytes = static_cast<size_t>(count) * 8;
    if (isinf(update.bound(k))) {
      double* sum = static_cast<double*>(sums[k]) + first;
      memcpy(total, sum, bytes);
      memset(sum, 0, bytes);
    } else {
      int64_t* sum = static_cast<int64_t*>(sums[k]) + first;
      for (int i = 0; i < count; ++i) total[i] = to_real(sum[i]);
      memset(sum, 0, bytes);
    }
  };
  return run_update(update, total_of, threads);
}

int private_step(int64_t n_tensors, int64_t n, const int64_t* numels, const int* grad_dtypes,
                 const void* const* grad_samples, const double* const* squares, const uint8_t* keep,
                 int64_t* stats, double* factors, const int* dtypes, void* const* params,
                 void* const* exp_avgs, void* const* exp_avg_sqs, float* const* steps,
                 int64_t* rng_state, const double* hyper, const int64_t* tensor_ids, int64_t groups,
                 const double* max_grad_norm, double noise_multiplier, double expected_batch_size,
                 int optimizer, int nesterov, int maximize, int threads) {
  const Update update = {
      n_tensors, numels,   dtypes,     params, exp_avgs,      exp_avg_sqs,      steps,
      rng_state, hyper,    tensor_ids, groups, max_grad_norm, noise_multiplier, expected_batch_size,
      optimizer, nesterov, maximize};
  const Records records = {n_tensors,     n,    numels, grad_dtypes, grad_samples, squares, groups,
                           max_grad_norm, keep, stats,  factors};
  if (const int status = check_update(update)) return status;
  if (const int status = check_records(records)) return status;
  if (const int status = make_factors(records, threads)) return status;
  const auto total_of = [&](int64_t k, int64_t first, int count, double* total) {
    if (n <= kExactRecords || isinf(records.bound(k))) {
      memset(total, 0, static_cast<size_t>(count) * sizeof(*total));
      add_records(records, k, 0, n, first, count, total);
    } else {
      int64_t sum[kChunk] = {};
      add_to_integers(records, k, first, count, sum);
      for (int i = 0; i < count; ++i) total[i] = to_real(sum[i]);
    }
  };
  return run_update(update, total_of, threads);
}

}  // namespace ffa::FFA_ISA
