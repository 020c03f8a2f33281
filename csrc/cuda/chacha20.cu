// ChaCha20 blocks (RFC 8439) as uint32 words: one thread makes one block.
#include "../common/chacha20.h"
#include "launch.cuh"

namespace ffa::cuda {
namespace {

__global__ void chacha20_kernel(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                                int64_t n_blocks, uint4* out) {
  const ChaChaStream stream = chacha_stream(rng_state, tensor_id);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_blocks;
       i += stride) {
    uint32_t x[16];
    chacha20_block(stream, static_cast<uint32_t>(first_block + i), x);
    for (int j = 0; j < 4; ++j) {
      out[4 * i + j] = make_uint4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
    }
  }
}

}  // namespace
}  // namespace ffa::cuda

// out is aligned to 16 bytes.
extern "C" int ffa_cuda_chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                                 int64_t n_blocks, uint32_t* out, void* stream) {
  if (n_blocks < 0 || first_block < 0 || first_block + n_blocks > int64_t{1} << 32) {
    return FFA_BAD_SIZE;
  }
  if (n_blocks == 0) return FFA_OK;
  ffa::cuda::chacha20_kernel<<<ffa::cuda::grid_for(n_blocks), ffa::cuda::kThreads, 0,
                               static_cast<cudaStream_t>(stream)>>>(
      rng_state, tensor_id, first_block, n_blocks, reinterpret_cast<uint4*>(out));
  return ffa::cuda::launch_status();
}
