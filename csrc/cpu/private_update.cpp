// One logical step: add the noise to the integer sums, average, and run the optimizer.
//
//   grad = (sums + round(sigma z / grid)) grid / L,  sigma = noise_multiplier sqrt(sum_k C_k^2)
//
// Every tensor is cut into chunks of one size and all chunks share one parallel loop, so that a
// model of many small adapters costs one launch.
#include <stdlib.h>

#include "../common/clip.h"
#include "../common/optimizer.h"
#include "../ffa.h"
#include "gaussian_fill.h"
#include "parallel.h"

namespace ffa::FFA_ISA {
namespace {

constexpr int64_t kChunk = 1024;

struct Tensor {
  void *param, *sum, *exp_avg, *exp_avg_sq;
  int64_t numel, first_task;
  double bound, step;
  const double* hyper;
  ChaChaStream stream;
  int dtype;
};

struct Step {
  double sigma, expected_batch_size;
  int optimizer;
  bool nesterov, maximize;
};

// grad[i] of elements first .. first + count, and zeroes their sums.
template <class T>
void make_grad(const Tensor& t, const Step& step, int64_t first, int count, T* grad) {
  if (isinf(t.bound)) {
    double* sum = static_cast<double*>(t.sum) + first;
    for (int i = 0; i < count; ++i) grad[i] = static_cast<T>(sum[i] / step.expected_batch_size);
    memset(sum, 0, static_cast<size_t>(count) * sizeof(double));
    return;
  }
  const double grid = clip_grid(t.bound);
  int64_t* sum = static_cast<int64_t*>(t.sum) + first;
  alignas(64) double total[kChunk];
  if (step.sigma > 0.0) {
    // Below 2^53 all of these are integers in fp64 and their sum is exact.
    alignas(64) double z[kChunk];
    gaussian_range(t.stream, first, count, z);
    const double per_grid = step.sigma / grid;
    for (int i = 0; i < count; ++i) {
      total[i] = static_cast<double>(sum[i]) + round_half_even(per_grid * z[i]);
    }
  } else {
    for (int i = 0; i < count; ++i) total[i] = static_cast<double>(sum[i]);
  }
  for (int i = 0; i < count; ++i) {
    grad[i] = static_cast<T>(total[i] * grid / step.expected_batch_size);
  }
  memset(sum, 0, static_cast<size_t>(count) * sizeof(int64_t));
}

template <class T>
void update_chunk(const Tensor& t, const Step& step, int64_t first, int count) {
  alignas(64) T grad[kChunk];
  make_grad(t, step, first, count, grad);
  T* param = static_cast<T*>(t.param) + first;
  if (step.optimizer == FFA_NONE) {
    memcpy(param, grad, static_cast<size_t>(count) * sizeof(T));
    return;
  }
  const OptimizerScalars<T> s = optimizer_scalars<T>(t.hyper, t.step);
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

}  // namespace

int private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes, void* const* params,
                   void* const* sums, void* const* exp_avgs, void* const* exp_avg_sqs,
                   float* const* steps, int64_t* rng_state, const double* hyper,
                   const int64_t* tensor_ids, int64_t groups, const double* max_grad_norm,
                   double noise_multiplier, double expected_batch_size, int optimizer, int nesterov,
                   int maximize, int threads) {
  if (n_tensors < 0 || (groups != 1 && groups != n_tensors)) return FFA_BAD_SIZE;
  if (optimizer < FFA_NONE || optimizer > FFA_ADAMW) return FFA_BAD_VALUE;
  const bool adam = optimizer == FFA_ADAM || optimizer == FFA_ADAMW;
  if (adam && (exp_avgs == nullptr || exp_avg_sqs == nullptr)) return FFA_BAD_VALUE;
  double bound_sq = 0.0;
  for (int64_t k = 0; k < groups; ++k) {
    if (!(max_grad_norm[k] > 0x1p-900)) return FFA_BAD_VALUE;
    bound_sq += max_grad_norm[k] * max_grad_norm[k];
  }
  if (!(noise_multiplier >= 0.0) || (noise_multiplier > 0.0 && isinf(bound_sq)) ||
      !(expected_batch_size > 0.0)) {
    return FFA_BAD_VALUE;
  }
  for (int64_t k = 0; k < n_tensors; ++k) {
    if (numels[k] < 0 || numels[k] > int64_t{8} << 32) return FFA_BAD_SIZE;
    if (dtypes[k] != FFA_F32 && dtypes[k] != FFA_F64) return FFA_BAD_DTYPE;
  }
  Tensor* tensors =
      static_cast<Tensor*>(malloc(static_cast<size_t>(n_tensors + 1) * sizeof(Tensor)));
  if (tensors == nullptr) return FFA_NO_MEMORY;

  int64_t tasks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    Tensor& t = tensors[k];
    t.param = params[k];
    t.sum = sums[k];
    t.exp_avg = exp_avgs != nullptr ? exp_avgs[k] : nullptr;
    t.exp_avg_sq = exp_avg_sqs != nullptr ? exp_avg_sqs[k] : nullptr;
    t.numel = numels[k];
    t.first_task = tasks;
    t.bound = max_grad_norm[groups == 1 ? 0 : k];
    t.step = steps != nullptr ? static_cast<double>(*steps[k]) : 0.0;
    t.hyper = hyper + 5 * k;
    t.stream = chacha_stream(rng_state, tensor_ids[k]);
    t.dtype = dtypes[k];
    tasks += (numels[k] + kChunk - 1) / kChunk;
  }
  const Step step = {noise_multiplier > 0.0 ? noise_multiplier * sqrt(bound_sq) : 0.0,
                     expected_batch_size, optimizer, nesterov != 0, maximize != 0};
  parallel_for(threads, tasks, [=](int64_t task) {
    int64_t low = 0, high = n_tensors - 1;  // the last tensor whose first task is <= task
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (tensors[middle].first_task <= task) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const Tensor& t = tensors[low];
    const int64_t first = (task - t.first_task) * kChunk;
    const int count = static_cast<int>(t.numel - first < kChunk ? t.numel - first : kChunk);
    if (t.dtype == FFA_F32) {
      update_chunk<float>(t, step, first, count);
    } else {
      update_chunk<double>(t, step, first, count);
    }
  });
  free(tensors);
  for (int64_t k = 0; k < n_tensors && steps != nullptr; ++k) *steps[k] += 1.0f;
  rng_state[4] = static_cast<int64_t>(static_cast<uint64_t>(rng_state[4]) + 1);
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
