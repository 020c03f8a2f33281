// Many tensors in one launch: a table of them, passed by value.
//
// A table in the kernel's arguments is copied by the launch itself, so that nothing is sent to the
// device before it and a CUDA graph keeps the table. More tensors than one table holds take more
// launches.
#pragma once

#include "launch.h"

namespace ffa::FFA_ISA {

struct TensorEntry {
  const void* grad_sample;  // (n, numel)
  const double* squares;    // (2, n) or null: squared norms, and how many calls they are the sum of
  void* sum;
  void *param, *exp_avg, *exp_avg_sq;
  float* step;
  int64_t numel;
  double bound;
  uint32_t tensor_id;
  int32_t first_block;  // of the blocks in this launch, the first that is this tensor's
  int32_t index;        // among all tensors
  int16_t grad_dtype, param_dtype;
};

constexpr int kTableTensors = kTableBytes / sizeof(TensorEntry);

struct TensorTable {
  TensorEntry tensors[kTableTensors];
  int32_t count, blocks;

  FFA_DEVICE const TensorEntry& of_block(int64_t block) const {
    int low = 0, high = count - 1;  // the last tensor whose first block is at most `block`
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tensors[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return tensors[low];
  }
};

// Cuts each tensor into blocks of so many elements and calls use(table) for as many tables as it
// takes; `entry(k)` describes tensor k. Stops at a status that is not FFA_OK.
template <class Entry, class Use>
int for_each_table(int64_t n_tensors, int64_t elements_a_block, Entry entry, Use use) {
  for (int64_t first = 0; first < n_tensors; first += kTableTensors) {
    TensorTable table = {};
    for (int64_t k = first; k < n_tensors && k < first + kTableTensors; ++k) {
      TensorEntry& tensor = table.tensors[table.count++];
      tensor = entry(k);
      tensor.index = static_cast<int32_t>(k);
      tensor.first_block = table.blocks;
      const int64_t blocks = table.blocks + ceil_div(tensor.numel, elements_a_block);
      if (blocks > 0x7fffffff) return FFA_BAD_SIZE;
      table.blocks = static_cast<int32_t>(blocks);
    }
    if (const int status = use(table)) return status;
  }
  return FFA_OK;
}

// Elements e to e + 7 of data; of these `left` exist, and the others are zero.
FFA_DEVICE void load_eight(int dtype, const void* data, int64_t e, int left, bool aligned,
                           double v[8]) {
  if (dtype == FFA_F32) {
    const float* from = static_cast<const float*>(data) + e;
    const Run<float, 4> low = load_run<4>(from, left, aligned);
    const Run<float, 4> high = load_run<4>(from + 4, left - 4, aligned);
    FFA_UNROLL for (int j = 0; j < 4; ++j) {
      v[j] = get(low, j);
      v[4 + j] = get(high, j);
    }
  } else if (dtype == FFA_F16) {
    const Run<Half, 8> run = load_run<8>(static_cast<const Half*>(data) + e, left, aligned);
    FFA_UNROLL for (int j = 0; j < 8; ++j) v[j] = widen(get(run, j));
  } else if (dtype == FFA_BF16) {
    const Run<Bfloat16, 8> run = load_run<8>(static_cast<const Bfloat16*>(data) + e, left, aligned);
    FFA_UNROLL for (int j = 0; j < 8; ++j) v[j] = widen(get(run, j));
  } else {
    FFA_UNROLL for (int j = 0; j < 8; ++j) {
      v[j] = j < left ? static_cast<const double*>(data)[e + j] : 0.0;
    }
  }
}

}  // namespace ffa::FFA_ISA
