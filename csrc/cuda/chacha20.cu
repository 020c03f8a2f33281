// ChaCha20 blocks (RFC 8439) as uint32 words: a thread makes a block.
#include "../common/chacha20.h"
#include "launch.h"

namespace ffa::FFA_ISA {

struct ChaCha20 : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;

  const int64_t* rng_state;
  int64_t tensor_id, first_block, n_blocks;
  uint32_t* out;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared&) const {
    block.each([&](int thread, auto&) {
      const int64_t i = index * kThreads + thread;
      if (i >= n_blocks) return;
      uint32_t words[16];
      chacha20_block(chacha_stream(rng_state, tensor_id), static_cast<uint32_t>(first_block + i),
                     words);
      for (int j = 0; j < 16; ++j) out[16 * i + j] = words[j];
    });
  }
};

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                                 int64_t n_blocks, uint32_t* out, void* stream) {
  using namespace ffa::FFA_ISA;
  if (n_blocks < 0 || first_block < 0 || first_block > (int64_t{1} << 32) - n_blocks) {
    return FFA_BAD_SIZE;
  }
  return launch(ChaCha20{{}, rng_state, tensor_id, first_block, n_blocks, out},
                ceil_div(n_blocks, kThreads), stream);
}
