// One way to launch: threads of 256, a grid-stride loop in the kernel, a status back.
#pragma once

#include <cuda_runtime.h>

#include "../ffa.h"

namespace ffa::cuda {

constexpr int kThreads = 256;

inline unsigned grid_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

inline int launch_status() { return cudaGetLastError() == cudaSuccess ? FFA_OK : FFA_CUDA_ERROR; }

}  // namespace ffa::cuda
