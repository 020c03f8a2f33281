// The dropout mask by words: one ChaCha20 block decides 32 neighbouring columns of a row.
#pragma once

#include "../common/chacha20.h"
#include "../common/dropout.h"
#include "../ffa.h"

namespace ffa::FFA_ISA {

struct Mask {
  const int64_t* state;  // null: nothing is dropped
  uint32_t threshold;
  int64_t words_a_row;  // ceil(columns / 32)
};

// Bit c is set iff column 32 word + c of the row is kept.
FFA_HD uint32_t mask_word(const Mask& mask, int64_t row, int64_t word) {
  uint32_t x[16];
  const int64_t counter = row * mask.words_a_row + word;
  chacha20_block(chacha_stream(mask.state, 0), static_cast<uint32_t>(counter), x);
  uint32_t kept = 0;
  for (int j = 0; j < 16; ++j) {
    kept |= static_cast<uint32_t>((x[j] & 0xffffu) >= mask.threshold) << 2 * j;
    kept |= static_cast<uint32_t>((x[j] >> 16) >= mask.threshold) << (2 * j + 1);
  }
  return kept;
}

// The mask of rows first_row, first_row + 1, ... of a matrix with so many columns.
inline int make_mask(const int64_t* state, double p, int64_t first_row, int64_t rows,
                     int64_t columns, Mask* mask) {
  if (!(p >= 0.0 && p <= 1.0)) return FFA_BAD_VALUE;
  if (first_row < 0 || rows < 0 || columns < 0) return FFA_BAD_SIZE;
  *mask = {state, dropout_rule(p).threshold, (columns + 31) / 32};
  if (columns > 0 && first_row + rows > (int64_t{1} << 32) / mask->words_a_row) {
    return FFA_BAD_SIZE;
  }
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
