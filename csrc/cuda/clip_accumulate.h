// The two parts of clipping that private_step needs as well: the factors, and the sum over records.
#pragma once

#include "../common/clip.h"
#include "tensors.h"

namespace ffa::FFA_ISA {

// A physical batch of records, as csrc/ffa.h describes the arguments of clip_accumulate.
struct Records {
  int64_t n_tensors, n;
  const int64_t* numels;
  const int* dtypes;
  const void* const* grad_samples;
  const double* const* squares;
  int64_t groups;
  const double* max_grad_norm;
  const uint8_t* keep;
  int64_t* stats;
  double* factors;
  double* scratch;

  double bound(int64_t k) const { return max_grad_norm[groups == 1 ? 0 : k]; }
  TensorEntry entry(int64_t k) const;
};

int check_records(const Records& records);
int launch_factors(const Records& records, void* stream);

// total[j] += the contributions of all n records to element first + j. Sum is int64_t, whose
// conversion truncates them to the grid, or double where there is no bound. `factors` are those of
// the tensor's group; a record whose factor is 0 is left out, never multiplied.
template <class Sum>
FFA_DEVICE void add_records(const TensorEntry& tensor, const double* factors, int64_t n,
                            int64_t first, Sum total[8]) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(tensor.grad_sample) % 16 == 0 && tensor.numel % 8 == 0;
  const double per_grid = isinf(tensor.bound) ? 1.0 : 1.0 / clip_grid(tensor.bound);
  const int left = tensor.numel - first < 8 ? static_cast<int>(tensor.numel - first) : 8;
  for (int64_t i = 0; i < n; ++i) {
    double v[8];
    load_eight(tensor.grad_dtype, tensor.grad_sample, i * tensor.numel + first, left, aligned, v);
    if (factors[i] == 0.0) continue;
    const double factor = factors[i] * per_grid;
    FFA_UNROLL for (int j = 0; j < 8; ++j) total[j] += static_cast<Sum>(factor * v[j]);
  }
}

}  // namespace ffa::FFA_ISA
