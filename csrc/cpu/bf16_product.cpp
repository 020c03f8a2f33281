// Products with a bf16 or int8 matrix by the processor's instructions for bf16, AMX tiles or
// vectors of pairs, in fp32 from end to end but for what is multiplied.
//
//   out = x right + scaling left term + bias
//
// x and right are rounded to bf16. Vectors multiply left and term in fp32. To tiles each number of
// scaling left and of term is the sum of two, which leaves 16 bits of it: their product is made of
// three, at ranks that a tile mostly has room for. kSegment numbers of the inner dimension are
// multiplied at a time.
#include "packed_product.h"
#include "transpose.h"

#if defined(FFA_PAIRS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffa::FFA_ISA {

#if defined(FFA_PAIRS)
namespace {

constexpr int64_t kSegment = 2048;

// Of left and term as they are packed for tiles.
inline int64_t term_blocks(const Problem& p) { return blocks_of(3 * p.term.depth); }
inline int64_t blocks(const Problem& p) { return blocks_of(p.right.depth) + term_blocks(p); }

// `depth` numbers of each row, as blocks of two tiles of 16 rows.
FFA_PAIRS void pack_x(const float* x, int64_t row, int64_t rows, int64_t depth, bf16* to) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t left = i < rows ? depth - k : 0;
      const float* from = x + i * row + k;
      const __m512 low = _mm512_maskz_loadu_ps(first(left), from);
      const __m512 high = _mm512_maskz_loadu_ps(first(left - 16), from + 16);
      _mm512_store_si512(to + k / kDepth * kBlock + i * kDepth, narrow(low, high));
    }
  }
}

// What 32 columns and 32 rows of right are multiplied with.
struct Scales {
  alignas(64) float rows[kDepth], columns[kColumns];
};

inline __m512 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// 16 and 32 numbers that lie side by side, times `scale`, rounded. bf16 ones have no scale.
FFA_PAIRS inline __m256i sixteen(const int8_t* p, __m512 scale) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(load(p), scale)));
}
inline __m256i sixteen(const bf16* p, __m512) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FFA_PAIRS inline __m512i thirty_two(const int8_t* p, __m512 low, __m512 high) {
  return narrow(_mm512_mul_ps(load(p), low), _mm512_mul_ps(load(p + 16), high));
}
inline __m512i thirty_two(const bf16* p, __m512, __m512) { return _mm512_loadu_si512(p); }

inline uint32_t bits(bf16 value, float) { return value; }
FFA_PAIRS inline uint32_t bits(int8_t value, float scale) {
  const __m512 all = _mm512_set1_ps(static_cast<float>(value) * scale);
  return static_cast<uint32_t>(_mm512_cvtsi512_si32(narrow(all, all))) & 0xffff;
}

// A block of 32 columns that lie side by side. The block below is asked for.
template <class T>
FFA_PAIRS void pair_rows(const T* from, int64_t row, const Scales& scales, bf16* to) {
  for (int64_t k = 0; k < kDepth; k += 2, from += 2 * row) {
    __builtin_prefetch(from + kDepth * row, 0, 3);
    __builtin_prefetch(from + (kDepth + 1) * row, 0, 3);
    const __m512 of_row = _mm512_set1_ps(scales.rows[k]);
    const __m512 of_next = _mm512_set1_ps(scales.rows[k + 1]);
    for (int64_t c = 0; c < kColumns; c += 16) {
      const __m512 of_columns = _mm512_load_ps(scales.columns + c);
      const __m256i low = sixteen(from + c, _mm512_mul_ps(of_row, of_columns));
      const __m256i high = sixteen(from + row + c, _mm512_mul_ps(of_next, of_columns));
      _mm512_store_si512(to + c / 16 * (kBlock / 2) + k * 16,
                         _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }
  }
}

// A tile of 16 columns whose elements lie side by side. Those of the block after the next are asked
// for: the processor sees no stream in so many at once.
template <class T>
FFA_PAIRS void transpose_columns(const T* from, int64_t column, const float* of_rows,
                                 const float* of_columns, bf16* to) {
  WordVector tile[16];
  const __m512 low = _mm512_load_ps(of_rows), high = _mm512_load_ps(of_rows + 16);
  for (int i = 0; i < 16; ++i, from += column) {
    const __m512 scale = _mm512_set1_ps(of_columns[i]);
    const __m512i words = thirty_two(from, _mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
    memcpy(tile + i, &words, sizeof(*tile));
    __builtin_prefetch(from + 2 * kDepth, 0, 3);
  }
  transpose(tile);
  memcpy(to, tile, sizeof(tile));
}

// Any block, with zeros beside it.
template <class T>
void pack_any(const Matrix& m, const T* from, int64_t depth, int64_t columns, const Scales& scales,
              bf16* to) {
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t k = 0; k < kDepth; ++k) {
      const bool there = k < depth && c < columns;
      to[c / 16 * (kBlock / 2) + k / 2 * kDepth + c % 16 * 2 + k % 2] =
          there ? bits(from[k * m.row + c * m.column], scales.rows[k] * scales.columns[c]) : 0;
    }
  }
}

// A panel's columns as blocks of two tiles of 16 columns, each of which has rows of pairs.
template <class T>
void pack_columns(const Matrix& m, int64_t start, int64_t columns, bf16* to) {
  const T* from = static_cast<const T*>(m.data) + start * m.column;
  Scales scales;
  for (int64_t i = 0; i < kColumns; ++i) {
    const bool scaled = m.scale != nullptr && !m.scales_rows && i < columns;
    scales.rows[i] = 1.0f;
    scales.columns[i] = scaled ? m.scale[start + i] : 1.0f;
  }
  for (int64_t k = 0; k < blocks_of(m.depth); ++k, to += kBlock) {
    const int64_t first = k * kDepth, depth = m.depth - first;
    const T* at = from + first * m.row;
    for (int64_t i = 0; m.scale != nullptr && m.scales_rows && i < kDepth; ++i) {
      scales.rows[i] = i < depth ? m.scale[first + i] : 1.0f;
    }
    if (depth < kDepth || columns < kColumns || (m.row != 1 && m.column != 1)) {
      pack_any(m, at, depth, columns, scales, to);
    } else if (m.column == 1) {
      pair_rows(at, m.row, scales, to);
    } else {
      transpose_columns(at, m.column, scales.rows, scales.columns, to);
      transpose_columns(at + 16 * m.column, m.column, scales.rows, scales.columns + 16,
                        to + kBlock / 2);
    }
  }
}

// Numbers as they are rounded, and what is then left of them. Of one that is not finite, nothing
// is, and `finite` is 0 as well: it is multiplied once, and no infinity with 0.
struct Split {
  bf16 rounded[16], finite[16], rest[16];
};

FFA_PAIRS inline Split split(__m512 v) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(wide, wide), wide, _CMP_ORD_Q);
  const __m512 rest = _mm512_maskz_sub_ps(finite, v, wide);
  Split made;
  memcpy(made.rounded, &rounded, sizeof(rounded));
  const __m256i once = _mm256_maskz_mov_epi16(finite, rounded);
  memcpy(made.finite, &once, sizeof(once));
  const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
  memcpy(made.rest, &low, sizeof(low));
  return made;
}

// Rows of scaling left: rounded, once more for the rests of term, and their own rests.
FFA_PAIRS void pack_left(const Problem& p, int64_t row, int64_t rows, bf16* to) {
  const int64_t r = p.term.depth;
  memset(to, 0, static_cast<size_t>(term_blocks(p) * kBlock) * sizeof(bf16));
  for (int64_t i = 0; i < rows; ++i) {
    const auto put = [=](int64_t k, const bf16* v, int64_t count) {
      bf16* at = to + k / kDepth * kBlock + i * kDepth + k % kDepth;
      if (count == 16 && k % kDepth <= 16) {
        memcpy(at, v, 16 * sizeof(bf16));
      } else if (count == 8 && k % kDepth <= 24) {
        memcpy(at, v, 8 * sizeof(bf16));
      } else {
        for (int64_t j = 0; j < count; ++j) {
          to[(k + j) / kDepth * kBlock + i * kDepth + (k + j) % kDepth] = v[j];
        }
      }
    };
    for (int64_t k = 0; k < r; k += 16) {
      const int64_t count = r - k < 16 ? r - k : 16;
      const __m512 v = _mm512_maskz_loadu_ps(first(count), p.left + (row + i) * r + k);
      const Split of = split(_mm512_maskz_mul_ps(first(count), v, _mm512_set1_ps(p.scaling)));
      put(k, of.rounded, count);
      put(r + k, of.finite, count);
      put(2 * r + k, of.rest, count);
    }
  }
}

// Columns of term: rounded, their rests, and once more for the rests of left.
FFA_PAIRS void pack_term(const Problem& p, int64_t start, int64_t columns, bf16* to) {
  const Matrix& m = p.term;
  memset(to, 0, static_cast<size_t>(term_blocks(p) * kBlock) * sizeof(bf16));
  for (int64_t k = 0; k < m.depth; ++k) {
    const float* from = static_cast<const float*>(m.data) + k * m.row + start * m.column;
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t here = columns - c < 16 ? columns - c : 16;
      float values[16] = {};
      if (m.column == 1) {
        _mm512_storeu_ps(values, _mm512_maskz_loadu_ps(first(here), from + c));
      } else {
        for (int64_t j = 0; j < here; ++j) values[j] = from[(c + j) * m.column];
      }
      const Split of = split(_mm512_loadu_ps(values));
      const auto put = [=](int64_t at, const bf16* v) {
        bf16* block = to + at / kDepth * kBlock + c / 16 * (kBlock / 2);
        for (int64_t j = 0; j < here; ++j) {
          block[at % kDepth / 2 * kDepth + j * 2 + at % 2] = v[j];
        }
      };
      put(k, of.rounded);
      put(m.depth + k, of.rest);
      put(2 * m.depth + k, of.finite);
    }
  }
}

void pack_right(const Matrix& m, int64_t start, int64_t columns, bf16* to) {
  if (m.dtype == FFA_BF16) return pack_columns<bf16>(m, start, columns, to);
  pack_columns<int8_t>(m, start, columns, to);
}

// How both units have x and right.
struct Rounded {
  static constexpr int64_t kPacked = 2 << 20, kPart = 512 << 10;

  // Where left and term lie behind them.
  static int64_t behind(const Problem& p) { return blocks_of(p.right.depth) * kBlock; }

  static void pack_rows(const Problem& p, int64_t row, int64_t rows, bf16* to) {
    pack_x(p.x + row * p.depth, p.depth, rows, p.right.depth, to);
  }

  static void pack_columns(const Problem& p, int64_t column, int64_t columns, bf16* to) {
    pack_right(p.right, column, columns, to);
  }
};

struct Tiles : Rounded, TileSums {
  static int64_t size(const Problem& p) { return blocks(p) * kBlock; }

  static void pack_rows(const Problem& p, int64_t row, int64_t rows, bf16* to) {
    Rounded::pack_rows(p, row, rows, to);
    if (p.term.depth > 0) pack_left(p, row, rows, to + behind(p));
  }

  static void pack_columns(const Problem& p, int64_t column, int64_t columns, bf16* to) {
    Rounded::pack_columns(p, column, columns, to);
    if (p.term.depth > 0) pack_term(p, column, columns, to + behind(p));
  }

  FFA_AMX static void multiply(const Problem& p, int64_t, int64_t, const bf16* rows,
                               const bf16* columns, const Sums& at) {
    load(at);
    for (int64_t k = 0; k < blocks(p); ++k) {
      fetch(at, k);
      _tile_loadd(4, rows + k * kBlock, 64);
      _tile_loadd(6, columns + k * kBlock, 64);
      _tile_loadd(7, columns + k * kBlock + kBlock / 2, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, rows + k * kBlock + kBlock / 2, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    store(at);
  }
};

// Left or term of a packed block or panel, to vectors.
inline float* floats(bf16* p) { return reinterpret_cast<float*>(p); }
inline const float* floats(const bf16* p) { return reinterpret_cast<const float*>(p); }

struct Vectors : Rounded {
  // 24 sums of two vectors of columns: enough to hide how long each addition takes.
  static constexpr int kAtOnce = 12;

  static int64_t size(const Problem& p) { return behind(p) + blocks_of(2 * p.term.depth) * kBlock; }

  static void begin() {}

  static void pack_rows(const Problem& p, int64_t row, int64_t rows, bf16* to) {
    Rounded::pack_rows(p, row, rows, to);
    const float* from = p.left + row * p.term.depth;
    const float scaling = p.scaling;
    float* left = floats(to + behind(p));
    for (int64_t i = 0; i < rows * p.term.depth; ++i) left[i] = scaling * from[i];
  }

  static void pack_columns(const Problem& p, int64_t column, int64_t columns, bf16* to) {
    Rounded::pack_columns(p, column, columns, to);
    const Matrix& m = p.term;
    if (m.depth == 0) return;
    const float* from = static_cast<const float*>(m.data) + column * m.column;
    float* term = floats(to + behind(p));
    for (int64_t k = 0; k < m.depth; ++k) {
      for (int64_t c = 0; c < kColumns; ++c) {
        term[k * kColumns + c] = c < columns ? from[k * m.row + c * m.column] : 0.0f;
      }
    }
  }

  static void multiply(const Problem& p, int64_t, int64_t count, const bf16* rows,
                       const bf16* columns, const Sums& at) {
    for (int64_t m = 0; m < count; m += kAtOnce) {
      const Sums here = {at.from + m * at.step, at.step, at.out + m * at.row, at.row};
      const float* left = floats(rows + behind(p)) + m * p.term.depth;
      some<kAtOnce>(count - m, p, rows + m * kDepth, left, columns, here);
    }
  }

  static void end() {}

 private:
  template <int M>
  FFA_PAIRS static void some(int64_t count, const Problem& p, const bf16* rows, const float* left,
                             const bf16* columns, const Sums& at) {
    if (count < M) {
      if constexpr (M > 1) some<M - 1>(count, p, rows, left, columns, at);
      return;
    }
    __m512 sum[M][2];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 2; ++v) sum[m][v] = _mm512_loadu_ps(at.from + m * at.step + 16 * v);
    }
    // Asked for before the sums are made: the stores at the end need not wait for them.
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 2; ++v) __builtin_prefetch(at.out + m * at.row + 16 * v, 1, 3);
    }
    add_term<M>(p.term.depth, left, floats(columns + behind(p)), sum);
    // An odd number at the end has a zero beside it.
    add<M>((p.right.depth + 1) / 2, rows, columns, sum);
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(at.out + m * at.row + 16 * v, sum[m][v]);
    }
  }

  template <int M>
  FFA_PAIRS static inline void add_term(int64_t depth, const float* left, const float* term,
                                        __m512 (*sum)[2]) {
    for (int64_t k = 0; k < depth; ++k) {
      const __m512 low = _mm512_load_ps(term + k * kColumns);
      const __m512 high = _mm512_load_ps(term + k * kColumns + 16);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512 element = _mm512_set1_ps(left[m * depth + k]);
        sum[m][0] = _mm512_fmadd_ps(element, low, sum[m][0]);
        sum[m][1] = _mm512_fmadd_ps(element, high, sum[m][1]);
      }
    }
  }

  template <int M>
  FFA_PAIRS static inline void add(int64_t pairs, const bf16* rows, const bf16* columns,
                                   __m512 (*sum)[2]) {
    for (; pairs > 0; pairs -= kDepth / 2, rows += kBlock, columns += kBlock) {
      const int64_t here = pairs < kDepth / 2 ? pairs : kDepth / 2;
      for (int64_t k = 0; k < here; ++k) {
        const __m512bh low = (__m512bh)_mm512_load_si512(columns + k * kDepth);
        const __m512bh high = (__m512bh)_mm512_load_si512(columns + k * kDepth + kBlock / 2);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          int32_t pair;
          memcpy(&pair, rows + m * kDepth + 2 * k, sizeof(pair));
          const __m512bh element = (__m512bh)_mm512_set1_epi32(pair);
          sum[m][0] = _mm512_dpbf16_ps(sum[m][0], element, low);
          sum[m][1] = _mm512_dpbf16_ps(sum[m][1], element, high);
        }
      }
    }
  }
};

}  // namespace

// 2 for tiles, where the kernel of the system gives them to this process as well, 1 for vectors
// alone, or 0.
int bf16_unit() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;
  return amx && syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 2 : 1;
}

int bf16_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                 const void* right, int right_dtype, int64_t right_row, int64_t right_column,
                 const void* scale, int scales_rows, const void* bias, const void* left,
                 const void* term, int64_t term_row, int64_t term_column, double scaling, void* out,
                 int threads, bool tiles) {
  if (rows < 0 || depth < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  if (right_dtype != FFA_I8 && (right_dtype != FFA_BF16 || scale != nullptr)) return FFA_BAD_DTYPE;
  if (threads < 1) threads = 1;
  const Problem p =
      problem_of(rows, depth, columns, r, x, right, right_dtype, right_row, right_column, scale,
                 scales_rows, bias, left, term, term_row, term_column, scaling, out);
  return run_segments(p, kSegment, kSegment, [&](const Problem& segment) {
    return tiles ? run_packed<Tiles>(segment, threads) : run_packed<Vectors>(segment, threads);
  });
}
#else
int bf16_unit() { return 0; }

int bf16_product(int64_t, int64_t, int64_t, int64_t, const void*, const void*, int, int64_t,
                 int64_t, const void*, int, const void*, const void*, const void*, int64_t, int64_t,
                 double, void*, int, bool) {
  return FFA_WRONG_ARCH;
}
#endif

}  // namespace ffa::FFA_ISA
