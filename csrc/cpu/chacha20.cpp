// ChaCha20 blocks (RFC 8439) as uint32 words.
#include "../common/chacha20.h"

#include "../ffa.h"
#include "parallel.h"
#include "simd.h"

namespace ffa::FFA_ISA {

int chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block, int64_t n_blocks,
             uint32_t* out, int threads) {
  if (n_blocks < 0 || first_block < 0 || first_block + n_blocks > int64_t{1} << 32) {
    return FFA_BAD_SIZE;
  }
  constexpr int64_t kChunk = 1024;
  const ChaChaStream stream = chacha_stream(rng_state, tensor_id);
  parallel_for(threads, (n_blocks + kChunk - 1) / kChunk, [=](int64_t task) {
    const int64_t end = n_blocks < (task + 1) * kChunk ? n_blocks : (task + 1) * kChunk;
    for (int64_t block = task * kChunk; block < end; block += kBlockLanes) {
      const uint32_t counter = static_cast<uint32_t>(first_block + block);
      if (block + kBlockLanes <= end) {
        chacha20_rows(stream, counter, out + 16 * block);
      } else {
        uint32_t rows[16 * kBlockLanes];
        chacha20_rows(stream, counter, rows);
        memcpy(out + 16 * block, rows, static_cast<size_t>(end - block) * 64);
      }
    }
  });
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
