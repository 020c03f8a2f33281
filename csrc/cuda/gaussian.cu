// Standard Gaussians from ChaCha20 words: a thread makes a block of eight.
#include "launch.h"
#include "noise.h"

namespace ffa::FFA_ISA {

struct Gaussian : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;

  const int64_t* rng_state;
  int64_t tensor_id, numel;
  int dtype;
  void* out;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared&) const {
    block.each([&](int thread, auto&) {
      const int64_t first = 8 * (index * kThreads + thread);
      if (first >= numel) return;
      double z[8];
      gaussian_block(chacha_stream(rng_state, tensor_id), first / 8, z);
      for (int j = 0; j < 8 && first + j < numel; ++j) {
        store_as(dtype, out, first + j, z[j]);
      }
    });
  }
};

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel,
                                 int dtype, void* out, void* stream) {
  using namespace ffa::FFA_ISA;
  if (numel < 0 || numel > int64_t{8} << 32) return FFA_BAD_SIZE;
  if (!is_dtype(dtype)) return FFA_BAD_DTYPE;
  return launch(Gaussian{{}, rng_state, tensor_id, numel, dtype, out},
                ceil_div(numel, 8 * kThreads), stream);
}
