// Standard Gaussians of a stream for a range of elements, kBlockLanes ChaCha20 blocks at a time.
#pragma once

#include "../common/gaussian.h"
#include "simd.h"

namespace ffa::FFA_ISA {

// out[lane][j] = z[j][lane].
template <class T>
inline void transpose(const T (*z)[kBlockLanes], T* out) {
  for (int lane = 0; lane < kBlockLanes; ++lane) {
    for (int j = 0; j < 8; ++j) out[lane * 8 + j] = z[j][lane];
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Halves are loaded to where they go: what crosses them in a register takes 3 to 8 times as long.
template <>
inline void transpose(const double (*z)[kBlockLanes], double* out) {
  for (int lane = 0; lane < kBlockLanes; lane += 2) {
    for (int j = 0; j < 8; j += 4) {
      const auto halves = [=](int k) {
        return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_load_pd(z[j + k] + lane)),
                                    _mm_load_pd(z[j + k + 2] + lane), 1);
      };
      const __m256d even = halves(0), odd = halves(1);
      _mm256_storeu_pd(out + lane * 8 + j, _mm256_unpacklo_pd(even, odd));
      _mm256_storeu_pd(out + lane * 8 + 8 + j, _mm256_unpackhi_pd(even, odd));
    }
  }
}
#endif

constexpr int kGaussiansPerPass = 8 * kBlockLanes;

// out: kGaussiansPerPass values of blocks first_block, first_block + 1, ...
template <class T>
inline void gaussian_pass(const ChaChaStream& stream, int64_t first_block, T* out) {
  alignas(64) uint32_t w[16][kBlockLanes];
  chacha20_lanes(stream, static_cast<uint32_t>(first_block), w);
  alignas(64) T z[8][kBlockLanes];
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t (*p)[kBlockLanes] = w + 4 * pair;
#pragma omp simd
    for (int lane = 0; lane < kBlockLanes; ++lane) {
      const uint64_t w0 = p[0][lane] | static_cast<uint64_t>(p[1][lane]) << 32;
      const uint64_t w1 = p[2][lane] | static_cast<uint64_t>(p[3][lane]) << 32;
      double z0, z1;
      box_muller(w0, w1, z0, z1);
      z[2 * pair][lane] = static_cast<T>(z0);
      z[2 * pair + 1][lane] = static_cast<T>(z1);
    }
  }
  transpose(z, out);
}

// out[i] = element first + i of the stream; `first` is a multiple of 8.
template <class T>
inline void gaussian_range(const ChaChaStream& stream, int64_t first, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kGaussiansPerPass <= count; i += kGaussiansPerPass) {
    gaussian_pass(stream, (first + i) / 8, out + i);
  }
  if (i < count) {
    T last[kGaussiansPerPass];
    gaussian_pass(stream, (first + i) / 8, last);
    memcpy(out + i, last, static_cast<size_t>(count - i) * sizeof(T));
  }
}

}  // namespace ffa::FFA_ISA
