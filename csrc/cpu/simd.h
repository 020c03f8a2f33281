// SIMD vectors of the copy being compiled, and ChaCha20 blocks side by side in them.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/chacha20.h"

namespace ffa::FFA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef uint32_t WordVector __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
// Two vectors taken as one: each step of ChaCha20 waits for the one before, and does so for two at
// once. Their words fill the 32 registers of AVX-512; other sets have half as many.
struct BlockWords {
  WordVector half[2];
};

inline BlockWords operator+(BlockWords v, uint32_t word) {
  return {v.half[0] + word, v.half[1] + word};
}

inline BlockWords operator^(BlockWords v, BlockWords w) {
  return {v.half[0] ^ w.half[0], v.half[1] ^ w.half[1]};
}

inline BlockWords& operator+=(BlockWords& v, BlockWords w) {
  v.half[0] += w.half[0], v.half[1] += w.half[1];
  return v;
}

inline BlockWords& operator+=(BlockWords& v, uint32_t word) { return v = v + word; }

template <int N>
inline BlockWords rotate_left(BlockWords v) {
  return {rotate_left<N>(v.half[0]), rotate_left<N>(v.half[1])};
}
#else
typedef WordVector BlockWords;
#endif

constexpr int kBlockLanes = sizeof(BlockWords) / 4;

#if defined(__AVX2__) && !defined(__AVX512F__)
// AVX2 cannot rotate, and shifts on fewer ports than it moves bytes.
template <>
inline WordVector rotate_left<16>(WordVector v) {
  return (WordVector)_mm256_shuffle_epi8(
      (__m256i)v, _mm256_setr_epi32(0x01000302, 0x05040706, 0x09080b0a, 0x0d0c0f0e, 0x01000302,
                                    0x05040706, 0x09080b0a, 0x0d0c0f0e));
}

template <>
inline WordVector rotate_left<8>(WordVector v) {
  return (WordVector)_mm256_shuffle_epi8(
      (__m256i)v, _mm256_setr_epi32(0x02010003, 0x06050407, 0x0a09080b, 0x0e0d0c0f, 0x02010003,
                                    0x06050407, 0x0a09080b, 0x0e0d0c0f));
}
#endif

// Words of kBlockLanes consecutive blocks: words[j][lane] is word j of block first + lane.
FFA_HD void chacha20_lanes(const ChaChaStream& stream, uint32_t first,
                           uint32_t words[16][kBlockLanes]) {
  alignas(64) uint32_t numbers[kBlockLanes];
  for (int lane = 0; lane < kBlockLanes; ++lane) numbers[lane] = first + lane;
  BlockWords counter, made[16];
  memcpy(&counter, numbers, sizeof(counter));
  chacha20_block(stream, counter, made);
  memcpy(words, made, sizeof(made));
}

// The same, each block's 16 words together in memory order.
FFA_HD void chacha20_rows(const ChaChaStream& stream, uint32_t first, uint32_t* rows) {
  alignas(64) uint32_t words[16][kBlockLanes];
  chacha20_lanes(stream, first, words);
  for (int lane = 0; lane < kBlockLanes; ++lane) {
    for (int j = 0; j < 16; ++j) rows[lane * 16 + j] = words[j][lane];
  }
}

// fp64 sum of squares in one fixed order, whatever the instruction set or the number of threads.
template <class T>
inline double sum_squares_of_block(const T* v, int64_t count) {
  constexpr int kLanes = 16;
  double acc[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = v[i + lane];
      acc[lane] += value * value;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const double value = v[i];
    acc[lane] += value * value;
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) acc[lane] += acc[lane + half];
  }
  return acc[0];
}

// The squares of blocks of this many elements are summed by themselves, and the blocks in order: so
// few are added up in one number that its rounding stays far below the margin of `clip_factor`.
constexpr int64_t kNormBlock = 16384;

template <class T>
inline double sum_squares(const T* v, int64_t count) {
  double total = 0.0;
  for (int64_t at = 0; at < count; at += kNormBlock) {
    const int64_t left = count - at;
    total += sum_squares_of_block(v + at, left < kNormBlock ? left : kNormBlock);
  }
  return total;
}

}  // namespace ffa::FFA_ISA
