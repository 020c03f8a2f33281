// Square matrices of 32-bit elements in SIMD vectors, transposed.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "simd.h"

namespace ffa::FFA_ISA {

// Of each pair of lanes kStep apart the first or the second, from a and from b in turns.
template <int kStep, bool kHigh, class Vec, size_t... kLane>
inline Vec interleave(Vec a, Vec b, std::index_sequence<kLane...>) {
  constexpr int W = sizeof...(kLane);
#define FFA_LANE ((kLane & kStep) != 0 ? W : 0) + ((kLane & ~kStep) | (kHigh ? kStep : 0))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FFA_LANE)...);
#else
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Lanes{static_cast<int32_t>(FFA_LANE)...});
#endif
#undef FFA_LANE
}

// As many vectors as each has lanes: pairs of lanes, then pairs of pairs.
template <int kStep = 1, class Vec>
inline void transpose(Vec* v) {
  constexpr int W = kVectorBytes / 4;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & kStep) != 0) continue;
    const Vec a = v[i], b = v[i + kStep];
    v[i] = interleave<kStep, false>(a, b, std::make_index_sequence<W>());
    v[i + kStep] = interleave<kStep, true>(a, b, std::make_index_sequence<W>());
  }
  if constexpr (2 * kStep < W) transpose<2 * kStep>(v);
}

}  // namespace ffa::FFA_ISA
