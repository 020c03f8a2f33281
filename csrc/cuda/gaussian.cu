// Standard Gaussians from ChaCha20 words: one thread makes one block of eight.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/chacha20.h"
#include "../common/gaussian.h"
#include "launch.cuh"

namespace ffa::cuda {
namespace {

__device__ void round_to(double z, double& out) { out = z; }
__device__ void round_to(double z, float& out) { out = static_cast<float>(z); }
__device__ void round_to(double z, __half& out) { out = __double2half(z); }
__device__ void round_to(double z, __nv_bfloat16& out) { out = __double2bfloat16(z); }

template <class T>
__global__ void gaussian_kernel(const int64_t* rng_state, int64_t tensor_id, int64_t numel,
                                T* out) {
  const ChaChaStream stream = chacha_stream(rng_state, tensor_id);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       8 * block < numel; block += stride) {
    uint32_t x[16];
    chacha20_block(stream, static_cast<uint32_t>(block), x);
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t* w = x + 4 * pair;
      double z[2];
      box_muller(w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32,
                 z[0], z[1]);
      for (int j = 0; j < 2; ++j) {
        const int64_t e = 8 * block + 2 * pair + j;
        if (e < numel) round_to(z[j], out[e]);
      }
    }
  }
}

template <class T>
int launch(const int64_t* rng_state, int64_t tensor_id, int64_t numel, void* out,
           cudaStream_t stream) {
  gaussian_kernel<<<grid_for((numel + 7) / 8), kThreads, 0, stream>>>(rng_state, tensor_id, numel,
                                                                      static_cast<T*>(out));
  return launch_status();
}

}  // namespace
}  // namespace ffa::cuda

extern "C" int ffa_cuda_gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel,
                                 int dtype, void* out, void* stream) {
  using namespace ffa::cuda;
  if (numel < 0 || numel > int64_t{8} << 32) return FFA_BAD_SIZE;
  if (dtype < FFA_F32 || dtype > FFA_BF16) return FFA_BAD_DTYPE;
  if (numel == 0) return FFA_OK;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case FFA_F32:
      return launch<float>(rng_state, tensor_id, numel, out, s);
    case FFA_F64:
      return launch<double>(rng_state, tensor_id, numel, out, s);
    case FFA_F16:
      return launch<__half>(rng_state, tensor_id, numel, out, s);
    default:
      return launch<__nv_bfloat16>(rng_state, tensor_id, numel, out, s);
  }
}
