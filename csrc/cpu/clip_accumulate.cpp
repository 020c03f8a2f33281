// Clips each record's gradient to its bound and adds it to the batch's sum, in integers on a grid.
//
//   norm_i^2 = sum over the group of |G_i|^2            one pass, fp64
//   sums    += sum_i trunc(c_i G_i / grid)              one pass
//
// A record with factor 0 is skipped, never multiplied: 0 * NaN would be NaN.
#include <stdlib.h>

#include "../common/clip.h"
#include "../ffa.h"
#include "parallel.h"
#include "simd.h"

namespace ffa::FFA_ISA {
namespace {

// Norms are summed in blocks of this many elements and the blocks in order, so that the split over
// threads never shows in the bits.
constexpr int64_t kNormBlock = 16384;
constexpr int64_t kSumChunk = 1024;
// Truncated contributions are below 2^33 in magnitude: this many are exact in an fp64 sum.
constexpr int64_t kExactRecords = 1 << 19;

int64_t blocks_of(int64_t numel) { return (numel + kNormBlock - 1) / kNormBlock; }

struct Sample {
  const void* data;
  int dtype;
  int64_t numel;
};

double sum_squares_of(const Sample& s, int64_t first, int64_t count) {
  return s.dtype == FFA_F32 ? sum_squares(static_cast<const float*>(s.data) + first, count)
                            : sum_squares(static_cast<const double*>(s.data) + first, count);
}

template <class T>
void add_truncated(const T* v, double factor, int count, double* acc) {
  for (int e = 0; e < count; ++e) acc[e] += truncate_toward_zero(factor * v[e]);
}

template <class T>
void add_plain(const T* v, int count, double* sum) {
  for (int e = 0; e < count; ++e) sum[e] += v[e];
}

void flush(double* acc, int count, int64_t* sum) {
  for (int e = 0; e < count; ++e) sum[e] += static_cast<int64_t>(acc[e]);
  for (int e = 0; e < count; ++e) acc[e] = 0.0;
}

template <class T>
void add_chunk(const T* samples, int64_t numel, int64_t n, const double* factors, double bound,
               int64_t first, int count, void* sum) {
  if (isinf(bound)) {
    for (int64_t i = 0; i < n; ++i) {
      if (factors[i] == 0.0) continue;
      add_plain(samples + i * numel + first, count, static_cast<double*>(sum) + first);
    }
    return;
  }
  const double per_grid = 1.0 / clip_grid(bound);
  alignas(64) double acc[kSumChunk] = {};
  for (int64_t i = 0; i < n; ++i) {
    if (factors[i] != 0.0) {
      add_truncated(samples + i * numel + first, factors[i] * per_grid, count, acc);
    }
    if ((i + 1) % kExactRecords == 0) flush(acc, count, static_cast<int64_t*>(sum) + first);
  }
  flush(acc, count, static_cast<int64_t*>(sum) + first);
}

}  // namespace

int clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels, const int* dtypes,
                    const void* const* grad_samples, const double* const* squares,
                    void* const* sums, int64_t groups, const double* max_grad_norm,
                    const uint8_t* keep, int64_t* stats, double* factors, int threads) {
  if (n_tensors < 0 || n < 0 || (groups != 1 && groups != n_tensors)) return FFA_BAD_SIZE;
  for (int64_t k = 0; k < groups; ++k) {
    if (!(max_grad_norm[k] > 0x1p-900)) return FFA_BAD_VALUE;
  }
  int64_t norm_tasks = 0, sum_tasks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    if (numels[k] < 0) return FFA_BAD_SIZE;
    if (dtypes[k] != FFA_F32 && dtypes[k] != FFA_F64) return FFA_BAD_DTYPE;
    norm_tasks += n * (blocks_of(numels[k]) + 1);
    sum_tasks += (numels[k] + kSumChunk - 1) / kSumChunk;
  }

  struct Task {
    int64_t tensor, record, first, count;
  };
  const int64_t most = norm_tasks > sum_tasks ? norm_tasks : sum_tasks;
  Task* tasks = static_cast<Task*>(malloc(static_cast<size_t>(most + 1) * sizeof(Task)));
  double* partial =
      static_cast<double*>(malloc(static_cast<size_t>(norm_tasks + 1) * sizeof(double)));
  if (tasks == nullptr || partial == nullptr) {
    free(tasks);
    free(partial);
    return FFA_NO_MEMORY;
  }

  norm_tasks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      // One call's norm is the record's; the norms of several calls do not add up to it.
      if (squares != nullptr && squares[k][n + i] == 1.0) {
        tasks[norm_tasks++] = {k, i, -1, 0};
        continue;
      }
      for (int64_t first = 0; first < numels[k]; first += kNormBlock) {
        const int64_t left = numels[k] - first;
        tasks[norm_tasks++] = {k, i, first, left < kNormBlock ? left : kNormBlock};
      }
    }
  }
  // Several blocks a task: a small tensor's block is too short to be worth a ticket.
  constexpr int64_t kBunch = 4;
  parallel_for(threads, (norm_tasks + kBunch - 1) / kBunch, [=](int64_t bunch) {
    for (int64_t t = bunch * kBunch; t < norm_tasks && t < (bunch + 1) * kBunch; ++t) {
      const Task& task = tasks[t];
      if (task.first < 0) {
        partial[t] = squares[task.tensor][task.record];
        continue;
      }
      const Sample sample = {grad_samples[task.tensor], dtypes[task.tensor], numels[task.tensor]};
      partial[t] = sum_squares_of(sample, task.record * sample.numel + task.first, task.count);
    }
  });

  for (int64_t f = 0; f < groups * n; ++f) factors[f] = 0.0;
  for (int64_t t = 0; t < norm_tasks; ++t) {
    factors[(groups == 1 ? 0 : tasks[t].tensor) * n + tasks[t].record] += partial[t];
  }
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t i = 0; i < n; ++i) {
      double& factor = factors[group * n + i];
      factor = clip_factor(factor, max_grad_norm[group]);
      if (keep != nullptr && !keep[i]) {
        factor = 0.0;
        continue;
      }
      stats[0] += factor > 0.0 && factor < 1.0;
      stats[1] += factor == 0.0;
    }
  }

  int64_t at = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    for (int64_t first = 0; first < numels[k]; first += kSumChunk) {
      const int64_t left = numels[k] - first;
      tasks[at++] = {k, 0, first, left < kSumChunk ? left : kSumChunk};
    }
  }
  parallel_for(threads, sum_tasks, [=](int64_t t) {
    const Task& task = tasks[t];
    const int64_t k = task.tensor, group = groups == 1 ? 0 : k;
    const double* factor = factors + group * n;
    const double bound = max_grad_norm[group];
    const int count = static_cast<int>(task.count);
    if (dtypes[k] == FFA_F32) {
      add_chunk(static_cast<const float*>(grad_samples[k]), numels[k], n, factor, bound, task.first,
                count, sums[k]);
    } else {
      add_chunk(static_cast<const double*>(grad_samples[k]), numels[k], n, factor, bound,
                task.first, count, sums[k]);
    }
  });
  free(tasks);
  free(partial);
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
