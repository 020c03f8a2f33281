// One logical step: the noise on the sums, the average, and the optimizer.
//
//   grad = (sums + round(sigma z / grid)) grid / L,  sigma = noise_multiplier sqrt(sum_k C_k^2)
//
// private_update takes the sums from memory and zeroes them; private_step makes them here from the
// records of the only physical batch, and they are in no memory at all. A block first makes its
// 2048 elements of grad, eight a thread, which is one ChaCha20 block of noise, then updates them
// side by side.
#include "../common/optimizer.h"
#include "clip_accumulate.h"
#include "noise.h"

namespace ffa::FFA_ISA {

constexpr int64_t kUpdated = 8 * kThreads;

// What holds for all tensors of a step.
struct Update {
  int64_t groups;
  const double* max_grad_norm;  // in host memory, as are the next and tensor_ids
  float* const* steps;
  const int64_t* numels;
  const int* dtypes;
  void* const* params;
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  int64_t* rng_state;
  const double* hyper;
  const int64_t* tensor_ids;
  double noise_multiplier, expected_batch_size;
  int optimizer, nesterov, maximize;
};

struct UpdateTensors {
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kFirstArch = kOldestArch, kEndArch = kNoArch;
  using Registers = Nothing;
  struct Shared {
    double grad[kUpdated];
    OptimizerScalars<float> scalars;
    OptimizerScalars<double> wide_scalars;
  };

  TensorTable table;
  bool in_memory;         // the sums; else they are made from records
  int64_t n;              // of the records, which may be none
  const double* factors;  // of the records
  bool flat;
  const int64_t* rng_state;
  const double* hyper;
  double sigma, expected_batch_size;
  int optimizer;
  bool nesterov, maximize;

  // The sum of element first + j in units of the grid, as it is before the noise.
  FFA_DEVICE void total_of(const TensorEntry& tensor, int64_t first, double total[8]) const {
    const int64_t left = tensor.numel - first;
    if (in_memory) {
      FFA_UNROLL for (int j = 0; j < 8; ++j) {
        total[j] = j >= left ? 0.0
                   : isinf(tensor.bound)
                       ? static_cast<const double*>(tensor.sum)[first + j]
                       : static_cast<double>(static_cast<const int64_t*>(tensor.sum)[first + j]);
      }
      return;
    }
    const double* of_group = factors + (flat ? 0 : tensor.index * n);
    if (isinf(tensor.bound)) {
      FFA_UNROLL for (int j = 0; j < 8; ++j) total[j] = 0.0;
      add_records(tensor, of_group, n, first, total);
    } else {
      int64_t integers[8] = {};
      add_records(tensor, of_group, n, first, integers);
      FFA_UNROLL for (int j = 0; j < 8; ++j) total[j] = static_cast<double>(integers[j]);
    }
  }

  FFA_DEVICE void make_grad(const TensorEntry& tensor, int64_t first, double grad[8]) const {
    double total[8];
    total_of(tensor, first, total);
    double grid = 1.0;
    if (!isinf(tensor.bound)) {
      grid = clip_grid(tensor.bound);
      if (sigma > 0.0) {
        double z[8];
        gaussian_block(chacha_stream(rng_state, tensor.tensor_id), first / 8, z);
        const double per_grid = sigma / grid;
        FFA_UNROLL for (int j = 0; j < 8; ++j) total[j] += round_half_even(per_grid * z[j]);
      }
    }
    FFA_UNROLL for (int j = 0; j < 8; ++j) { grad[j] = total[j] * grid / expected_batch_size; }
  }

  // In fp32, and in fp64 for parameters that are.
  template <class Real>
  FFA_DEVICE void update(const TensorEntry& tensor, int64_t e, Real grad,
                         const OptimizerScalars<Real>& s) const {
    const int dtype = tensor.param_dtype;
    if (optimizer == FFA_NONE) {
      store_as(dtype, tensor.param, e, grad);
      return;
    }
    if (maximize) grad = -grad;
    Real param = load_as<Real>(dtype, tensor.param, e);
    if (optimizer == FFA_SGD && tensor.exp_avg == nullptr) {
      param = sgd_update(param, grad, s);
    } else {
      Real exp_avg = load_as<Real>(dtype, tensor.exp_avg, e);
      if (optimizer == FFA_SGD) {
        param = sgd_momentum_update(param, grad, exp_avg, s, nesterov);
      } else {
        Real exp_avg_sq = load_as<Real>(dtype, tensor.exp_avg_sq, e);
        param = adam_update(param, grad, exp_avg, exp_avg_sq, s, optimizer == FFA_ADAMW);
        store_as(dtype, tensor.exp_avg_sq, e, exp_avg_sq);
      }
      store_as(dtype, tensor.exp_avg, e, exp_avg);
    }
    store_as(dtype, tensor.param, e, param);
  }

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const TensorEntry& tensor = table.of_block(index);
    const int64_t first = (index - tensor.first_block) * kUpdated;
    block.each([&](int thread, auto&) {
      if (thread == 0 && optimizer != FFA_NONE) {
        const double* h = hyper + 5 * tensor.index;
        shared.scalars = optimizer_scalars<float>(h, *tensor.step);
        shared.wide_scalars = optimizer_scalars<double>(h, *tensor.step);
      }
      if (first + 8 * thread < tensor.numel) {
        make_grad(tensor, first + 8 * thread, shared.grad + 8 * thread);
      }
    });
    block.sync();
    block.each([&](int thread, auto&) {
      const int64_t left = tensor.numel - first, count = left < kUpdated ? left : kUpdated;
      for (int64_t i = thread; i < count; i += kThreads) {
        if (tensor.param_dtype == FFA_F64) {
          update<double>(tensor, first + i, shared.grad[i], shared.wide_scalars);
        } else {
          const float grad = static_cast<float>(shared.grad[i]);
          update<float>(tensor, first + i, grad, shared.scalars);
        }
        // A zero integer and a zero double have the same bits.
        if (in_memory) static_cast<int64_t*>(tensor.sum)[first + i] = 0;
      }
    });
  }
};

// After the blocks that read them: the steps taken, and the step of the random stream.
struct CountStep : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;
  static constexpr int kSteps = kTableBytes / 8;

  int count;
  int64_t* rng_state;  // null: another launch counts it
  float* steps[kSteps];

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t, Shared&) const {
    block.each([&](int thread, auto&) {
      for (int i = thread; i < count; i += kThreads) *steps[i] += 1.0f;
      if (thread == 0 && rng_state != nullptr) {
        rng_state[4] = static_cast<int64_t>(static_cast<uint64_t>(rng_state[4]) + 1);
      }
    });
  }
};

inline int check_update(const Update& u, int64_t n_tensors) {
  if (n_tensors < 0 || (u.groups != 1 && u.groups != n_tensors)) return FFA_BAD_SIZE;
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
  for (int64_t k = 0; k < n_tensors; ++k) {
    if (u.numels[k] < 0 || u.numels[k] > int64_t{8} << 32) return FFA_BAD_SIZE;
    if (!is_dtype(u.dtypes[k])) return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

// `source(k)` has the entry of tensor k as far as its sum goes; `records` is null where that is in
// memory.
template <class Source>
int launch_update(const Update& u, int64_t n_tensors, const Records* records, Source source,
                  void* stream) {
  UpdateTensors update = {};
  update.in_memory = records == nullptr;
  update.n = records != nullptr ? records->n : 0;
  update.factors = records != nullptr ? records->factors : nullptr;
  update.flat = u.groups == 1;
  update.rng_state = u.rng_state;
  update.hyper = u.hyper;
  double bound_sq = 0.0;
  for (int64_t k = 0; k < u.groups; ++k) bound_sq += u.max_grad_norm[k] * u.max_grad_norm[k];
  update.sigma = u.noise_multiplier > 0.0 ? u.noise_multiplier * sqrt(bound_sq) : 0.0;
  update.expected_batch_size = u.expected_batch_size;
  update.optimizer = u.optimizer;
  update.nesterov = u.nesterov != 0;
  update.maximize = u.maximize != 0;
  const int status = for_each_table(
      n_tensors, kUpdated,
      [&](int64_t k) {
        TensorEntry tensor = source(k);
        tensor.numel = u.numels[k];
        tensor.bound = u.max_grad_norm[u.groups == 1 ? 0 : k];
        tensor.param = u.params[k];
        tensor.param_dtype = static_cast<int16_t>(u.dtypes[k]);
        tensor.exp_avg = u.exp_avgs != nullptr ? u.exp_avgs[k] : nullptr;
        tensor.exp_avg_sq = u.exp_avg_sqs != nullptr ? u.exp_avg_sqs[k] : nullptr;
        tensor.step = u.steps != nullptr ? u.steps[k] : nullptr;
        tensor.tensor_id = static_cast<uint32_t>(u.tensor_ids[k]);
        return tensor;
      },
      [&](const TensorTable& table) {
        update.table = table;
        return launch(update, table.blocks, stream);
      });
  if (status != FFA_OK) return status;
  int64_t counted = 0;
  do {
    CountStep count = {};
    count.rng_state = counted == 0 ? u.rng_state : nullptr;
    for (; u.steps != nullptr && counted < n_tensors && count.count < CountStep::kSteps;
         ++counted) {
      count.steps[count.count++] = u.steps[counted];
    }
    if (const int failed = launch(count, 1, stream)) return failed;
  } while (u.steps != nullptr && counted < n_tensors);
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes,
                                       void* const* params, void* const* sums,
                                       void* const* exp_avgs, void* const* exp_avg_sqs,
                                       float* const* steps, int64_t* rng_state, const double* hyper,
                                       const int64_t* tensor_ids, int64_t groups,
                                       const double* max_grad_norm, double noise_multiplier,
                                       double expected_batch_size, int optimizer, int nesterov,
                                       int maximize, void* stream) {
  using namespace ffa::FFA_ISA;
  const Update update = {groups,
                         max_grad_norm,
                         steps,
                         numels,
                         dtypes,
                         params,
                         exp_avgs,
                         exp_avg_sqs,
                         rng_state,
                         hyper,
                         tensor_ids,
                         noise_multiplier,
                         expected_batch_size,
                         optimizer,
                         nesterov,
                         maximize};
  if (const int status = check_update(update, n_tensors)) return status;
  const auto source = [&](int64_t k) {
    TensorEntry tensor = {};
    tensor.sum = sums[k];
    return tensor;
  };
  return launch_update(update, n_tensors, nullptr, source, stream);
}

extern "C" int ffa_cuda_private_step(
    int64_t n_tensors, int64_t n, const int64_t* numels, const int* grad_dtypes,
    const void* const* grad_samples, const double* const* squares, const uint8_t* keep,
    int64_t* stats, double* factors, void* scratch, const int* dtypes, void* const* params,
    void* const* exp_avgs, void* const* exp_avg_sqs, float* const* steps, int64_t* rng_state,
    const double* hyper, const int64_t* tensor_ids, int64_t groups, const double* max_grad_norm,
    double noise_multiplier, double expected_batch_size, int optimizer, int nesterov, int maximize,
    void* stream) {
  using namespace ffa::FFA_ISA;
  const Update update = {groups,
                         max_grad_norm,
                         steps,
                         numels,
                         dtypes,
                         params,
                         exp_avgs,
                         exp_avg_sqs,
                         rng_state,
                         hyper,
                         tensor_ids,
                         noise_multiplier,
                         expected_batch_size,
                         optimizer,
                         nesterov,
                         maximize};
  const Records records = {n_tensors,    n,       numels,  grad_dtypes,
                           grad_samples, squares, groups,  max_grad_norm,
                           keep,         stats,   factors, static_cast<double*>(scratch)};
  if (const int status = check_update(update, n_tensors)) return status;
  if (const int status = check_records(records)) return status;
  if (const int status = launch_factors(records, stream)) return status;
  const auto source = [&](int64_t k) { return records.entry(k); };
  return launch_update(update, n_tensors, &records, source, stream);
}
