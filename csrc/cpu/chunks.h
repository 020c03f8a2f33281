// One parallel loop over all tensors of a step, in chunks of one size: a model of many small
// adapters costs one launch.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "../ffa.h"
#include "parallel.h"

namespace ffa::FFA_ISA {

constexpr int64_t kChunk = 1024;

// Calls body(tensor, first, count) for elements first .. first + count of each tensor, count being
// kChunk but for the last ones. Returns FFA_OK or FFA_NO_MEMORY.
template <class Body>
int for_each_chunk(int threads, int64_t n_tensors, const int64_t* numels, Body body) {
  int64_t* first_task =
      static_cast<int64_t*>(malloc(static_cast<size_t>(n_tensors + 1) * sizeof(int64_t)));
  if (first_task == nullptr) return FFA_NO_MEMORY;
  int64_t tasks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    first_task[k] = tasks;
    tasks += (numels[k] + kChunk - 1) / kChunk;
  }
  parallel_for(threads, tasks, [&](int64_t task) {
    int64_t low = 0, high = n_tensors - 1;  // the last tensor whose first task is <= task
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_task[middle] <= task) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int64_t first = (task - first_task[low]) * kChunk, left = numels[low] - first;
    body(low, first, static_cast<int>(left < kChunk ? left : kChunk));
  });
  free(first_task);
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
