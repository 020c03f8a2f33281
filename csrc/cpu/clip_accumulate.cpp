// Clips each record's gradient to its bound and adds it to the batch's sum, in integers on a grid.
//
//   norm_i^2 = sum over the group of |G_i|^2            one pass, fp64
//   sums    += sum_i trunc(c_i G_i / grid)              one pass
//
// A record with factor 0 is skipped, never multiplied: 0 * NaN would be NaN.
#include "clip_accumulate.h"

#include "simd.h"

namespace ffa::FFA_ISA {
namespace {

int64_t blocks_of(int64_t numel) { return (numel + kNormBlock - 1) / kNormBlock; }

// One call's norm is the record's; the norms of several calls do not add up to it.
bool known(const Records& r, int64_t k, int64_t i) {
  return r.squares != nullptr && r.squares[k][r.n + i] == 1.0;
}

double sum_squares_of(const Records& r, int64_t k, int64_t first, int64_t count) {
  return r.dtypes[k] == FFA_F32
             ? sum_squares(static_cast<const float*>(r.grad_samples[k]) + first, count)
             : sum_squares(static_cast<const double*>(r.grad_samples[k]) + first, count);
}

// A norm's blocks are added up in order: the split over threads never shows in the bits.
struct NormBlock {
  int64_t tensor, first, count;
  double square;
};

// The squares of all blocks whose norm is not known, by tensor, record and place; null without
// memory.
NormBlock* measure(const Records& r, int threads) {
  int64_t tasks = 0;
  for (int64_t k = 0; k < r.n_tensors; ++k) {
    for (int64_t i = 0; i < r.n; ++i) tasks += known(r, k, i) ? 0 : blocks_of(r.numels[k]);
  }
  NormBlock* blocks =
      static_cast<NormBlock*>(malloc(static_cast<size_t>(tasks + 1) * sizeof(NormBlock)));
  if (blocks == nullptr || tasks == 0) return blocks;
  tasks = 0;
  for (int64_t k = 0; k < r.n_tensors; ++k) {
    for (int64_t i = 0; i < r.n; ++i) {
      for (int64_t at = 0; at < r.numels[k] && !known(r, k, i); at += kNormBlock) {
        const int64_t left = r.numels[k] - at;
        blocks[tasks++] = {k, i * r.numels[k] + at, left < kNormBlock ? left : kNormBlock, 0.0};
      }
    }
  }
  // Several blocks a task: a small tensor's block is too short to be worth a ticket.
  constexpr int64_t kBunch = 4;
  parallel_for(threads, (tasks + kBunch - 1) / kBunch, [=, &r](int64_t bunch) {
    for (int64_t t = bunch * kBunch; t < tasks && t < (bunch + 1) * kBunch; ++t) {
      NormBlock& block = blocks[t];
      block.square = sum_squares_of(r, block.tensor, block.first, block.count);
    }
  });
  return blocks;
}

}  // namespace

int check_records(const Records& r) {
  if (r.n_tensors < 0 || r.n < 0 || (r.groups != 1 && r.groups != r.n_tensors)) return FFA_BAD_SIZE;
  for (int64_t k = 0; k < r.groups; ++k) {
    if (!(r.max_grad_norm[k] > 0x1p-900)) return FFA_BAD_VALUE;
  }
  for (int64_t k = 0; k < r.n_tensors; ++k) {
    if (r.numels[k] < 0) return FFA_BAD_SIZE;
    if (r.dtypes[k] != FFA_F32 && r.dtypes[k] != FFA_F64) return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

int make_factors(const Records& r, int threads) {
  NormBlock* blocks = measure(r, threads);
  if (blocks == nullptr) return FFA_NO_MEMORY;
  for (int64_t f = 0; f < r.groups * r.n; ++f) r.factors[f] = 0.0;
  const NormBlock* block = blocks;
  for (int64_t k = 0; k < r.n_tensors; ++k) {
    double* norm_sq = r.factors + (r.groups == 1 ? 0 : k) * r.n;
    for (int64_t i = 0; i < r.n; ++i) {
      if (known(r, k, i)) {
        norm_sq[i] += r.squares[k][i];
        continue;
      }
      for (int64_t left = blocks_of(r.numels[k]); left > 0; --left) norm_sq[i] += block++->square;
    }
  }
  free(blocks);
  for (int64_t group = 0; group < r.groups; ++group) {
    for (int64_t i = 0; i < r.n; ++i) {
      double& factor = r.factors[group * r.n + i];
      factor = clip_factor(factor, r.max_grad_norm[group]);
      if (r.keep != nullptr && !r.keep[i]) {
        factor = 0.0;
        continue;
      }
      r.stats[0] += factor > 0.0 && factor < 1.0;
      r.stats[1] += factor == 0.0;
    }
  }
  return FFA_OK;
}

int clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels, const int* dtypes,
                    const void* const* grad_samples, const double* const* squares,
                    void* const* sums, int64_t groups, const double* max_grad_norm,
                    const uint8_t* keep, int64_t* stats, double* factors, int threads) {
  const Records records = {n_tensors,     n,    numels, dtypes, grad_samples, squares, groups,
                           max_grad_norm, keep, stats,  factors};
  if (const int status = check_records(records)) return status;
  if (const int status = make_factors(records, threads)) return status;
  return for_each_chunk(threads, n_tensors, numels, [&](int64_t k, int64_t first, int count) {
    if (isinf(records.bound(k))) {
      add_records(records, k, 0, n, first, count, static_cast<double*>(sums[k]) + first);
    } else {
      add_to_integers(records, k, first, count, static_cast<int64_t*>(sums[k]) + first);
    }
  });
}

}  // namespace ffa::FFA_ISA
