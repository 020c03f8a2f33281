// Eight standard Gaussians from one ChaCha20 block, as many as a thread makes at a time.
#pragma once

#include "../common/chacha20.h"
#include "../common/gaussian.h"

namespace ffa::FFA_ISA {

// z[j] is element 8 block + j of the stream.
FFA_HD void gaussian_block(const ChaChaStream& stream, int64_t block, double z[8]) {
  uint32_t words[16];
  chacha20_block(stream, static_cast<uint32_t>(block), words);
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t* w = words + 4 * pair;
    box_muller(w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32,
               z[2 * pair], z[2 * pair + 1]);
  }
}

}  // namespace ffa::FFA_ISA
