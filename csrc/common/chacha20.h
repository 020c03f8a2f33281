// The ChaCha20 block function (RFC 8439, section 2.3) over any word type.
//
// W is uint32_t for one block (a CUDA thread, a scalar loop), or a SIMD vector of uint32 whose
// lanes are different blocks: the arithmetic is the same text.
#pragma once

#include "platform.h"

namespace ffa::FFA_ISA {

// Key and nonce of one random stream: everything of the input block but constants and counter.
struct ChaChaStream {
  uint32_t key[8];
  uint32_t nonce[3];
};

FFA_HD ChaChaStream chacha_stream(const int64_t* rng_state, int64_t tensor_id) {
  ChaChaStream stream;
  for (int i = 0; i < 4; ++i) {
    const uint64_t word = static_cast<uint64_t>(rng_state[i]);
    stream.key[2 * i] = static_cast<uint32_t>(word);
    stream.key[2 * i + 1] = static_cast<uint32_t>(word >> 32);
  }
  const uint64_t step = static_cast<uint64_t>(rng_state[4]);
  stream.nonce[0] = static_cast<uint32_t>(step);
  stream.nonce[1] = static_cast<uint32_t>(step >> 32);
  stream.nonce[2] = static_cast<uint32_t>(tensor_id);
  return stream;
}

template <int N, class W>
FFA_HD W rotate_left(W v) {
  return (v << N) | (v >> (32 - N));
}

template <class W>
FFA_HD void quarter_round(W& a, W& b, W& c, W& d) {
  a += b, d = rotate_left<16>(W(d ^ a));
  c += d, b = rotate_left<12>(W(b ^ c));
  a += b, d = rotate_left<8>(W(d ^ a));
  c += d, b = rotate_left<7>(W(b ^ c));
}

template <class W>
FFA_HD void chacha20_block(const ChaChaStream& stream, W counter, W x[16]) {
  const uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
  for (int i = 0; i < 4; ++i) x[i] = W{} + constants[i];
  for (int i = 0; i < 8; ++i) x[4 + i] = W{} + stream.key[i];
  x[12] = counter;
  for (int i = 0; i < 3; ++i) x[13 + i] = W{} + stream.nonce[i];
  for (int round = 0; round < 10; ++round) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 4; ++i) x[i] += constants[i];
  for (int i = 0; i < 8; ++i) x[4 + i] += stream.key[i];
  x[12] += counter;
  for (int i = 0; i < 3; ++i) x[13 + i] += stream.nonce[i];
}

}  // namespace ffa::FFA_ISA
