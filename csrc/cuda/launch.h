// One way to launch a program (block.h), and what a launcher asks about the current device.
#pragma once

#include "../ffa.h"
#include "block.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace ffa::FFA_ISA {

// What every driver takes as a kernel's arguments, and the size of a table that leaves room for the
// others.
constexpr int kMostArgumentBytes = 4096, kTableBytes = 3840;

// Columns and ranks are counted in 32 bits, rows in 64.
constexpr int64_t kMostColumns = int64_t{1} << 30;

struct Device {
  int multiprocessors;
  int capability;  // 75, 80, ...
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)

// No local linkage: the kernel's name is what the table of resources shows.
template <class Program>
__global__ void __launch_bounds__(kThreads, Program::kBlocksPerMultiprocessor)
    run(const __grid_constant__ Program program) {
#if defined(__CUDA_ARCH__)
  constexpr int arch = __CUDA_ARCH__ / 10;
  if constexpr (Program::kFirstArch <= arch && arch < Program::kEndArch) {
    __shared__ typename Program::Shared shared;
    Block<typename Program::Registers> block;
    program(block, static_cast<int64_t>(blockIdx.x), shared);
  }
#endif
}

inline int cuda_status(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return FFA_OK;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return FFA_WRONG_ARCH;
    default:
      return FFA_CUDA_ERROR;
  }
}

template <class Program>
int launch(const Program& program, int64_t blocks, void* stream) {
  static_assert(sizeof(Program) <= kMostArgumentBytes, "too many arguments for older drivers");
  if (blocks < 0 || blocks > 0x7fffffff) return FFA_BAD_SIZE;
  if (blocks == 0) return FFA_OK;
  run<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(program);
  return cuda_status(cudaGetLastError());
}

inline int current_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  device->capability = 10 * major + minor;
  return cuda_status(error);
}

inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // A missing driver must not be taken for a failure of the next launch.
    cudaGetLastError();
    return 0;
  }
  return count;
}

// Whether the library has code of `Program` for the current device.
template <class Program>
int check_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, run<Program>);
  cudaGetLastError();
  return cuda_status(error);
}

#else

// FFA_SERIAL_GRID: "forward" or "reversed", the order of threads and blocks; FFA_SERIAL_ARCH: the
// compute capability to behave as, 80 unless told.
template <class Program>
int launch(const Program& program, int64_t blocks, void*) {
  if (blocks < 0 || blocks > 0x7fffffff) return FFA_BAD_SIZE;
  const char* order = getenv("FFA_SERIAL_GRID");
  const bool reversed = order != nullptr && strcmp(order, "reversed") == 0;
  thread_local Turns turns(kThreads);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto shared = std::make_unique<typename Program::Shared>();
    memset(static_cast<void*>(shared.get()), 0xff, sizeof(*shared));
    const int64_t index = reversed ? blocks - 1 - i : i;
    turns.run(reversed, [&](int thread) {
      Block<typename Program::Registers> block(turns, thread);
      program(block, index, *shared);
    });
  }
  return FFA_OK;
}

inline int current_device(Device* device) {
  const char* arch = getenv("FFA_SERIAL_ARCH");
  *device = {4, arch != nullptr ? atoi(arch) : 80};
  return FFA_OK;
}

inline int device_count() { return 1; }

template <class Program>
int check_device() {
  return FFA_OK;
}

#endif

// What most programs are content with. A program is compiled for archs from kFirstArch to before
// kEndArch, and empty on others.
struct EveryArch {
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int kFirstArch = kOldestArch, kEndArch = kNoArch;
};

struct Nothing {};

// body(a zero of the dtype's type), for the types of activations and parameters.
template <class Body>
int with_type(int dtype, Body body) {
  switch (dtype) {
    case FFA_F32:
      return body(0.0f);
    case FFA_F16:
      return body(Half{});
    case FFA_BF16:
      return body(Bfloat16{});
    default:
      return FFA_BAD_DTYPE;
  }
}

}  // namespace ffa::FFA_ISA
