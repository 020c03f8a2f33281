// Products in fp32 with a frozen matrix in fp32, by AMX tiles, which multiply bf16.
//
//   out = x right + scaling left term + bias
//
// A number in fp32 is the sum of three in bf16, of 8 bits each: a = a1 + a2 + a3. Of the nine
// products that make a b six are taken, a1 b1, a1 b2, a2 b1, a2 b2, a1 b3 and a3 b1; what is left
// out is 2^-24 of |a b| or so at the most, as large as the rounding of one addition. The sums are
// in fp32, those of the small products first, so that they add little to the error. Tiles make
// sixteen times as many products as vectors do: six for one take less time.
//
// Tiles count as 0 what is below 2^-126, products too. Rows whose sums are not all finite are made
// anew by vectors: of an infinity tiles may make no number, and a part may be larger than the
// whole.
#include "packed_product.h"
#include "transpose.h"

namespace ffa::avx512 {
decltype(ffa_cpu_fp32_product) fp32_product;
}

namespace ffa::FFA_ISA {

#if defined(FFA_AMX)
namespace {

constexpr int kParts = 3;
// Rows of right at a time, and how many are not parted.
constexpr int64_t kSegment = 512, kWhole = 768;

// A problem and a byte for each row of its blocks, not 0 where a sum was not finite.
struct Noted : Problem {
  uint8_t* odd;
};

inline int64_t blocks(const Problem& p) {
  return blocks_of(p.right.depth) + blocks_of(p.term.depth);
}

// Two vectors of numbers, of which parts are taken one after another, each the upper half of its
// word.
struct Numbers {
  __m512 low, high;

  // The next part, to the nearest.
  inline Numbers take() {
    const Numbers part = {nearest(low), nearest(high)};
    low = _mm512_sub_ps(low, part.low);
    high = _mm512_sub_ps(high, part.high);
    return part;
  }

 private:
  static inline __m512 nearest(__m512 v) {
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-0x10000)));
  }
};

// Writes the three parts of `rest`, which is what is left of it after two, kBlock apart, each as
// `arrange` makes 32 halves of two vectors.
template <class Arrange>
inline void put_parts(Numbers rest, bf16* to, Arrange arrange) {
  _mm512_store_si512(to, arrange(rest.take()));
  _mm512_store_si512(to + kBlock, arrange(rest.take()));
  _mm512_store_si512(to + 2 * kBlock, arrange(rest));
}

// Those of the first vector, then those of the second.
inline __m512i in_a_row(Numbers part) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(part.low), _mm512_load_si512(kUpper),
                                   _mm512_castps_si512(part.high));
}

// Pairs of one of the first and one of the second.
inline __m512i in_pairs(Numbers part) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(part.low), 16),
                                 _mm512_castps_si512(part.high));
}

// `depth` numbers of each row times `scaling`, as blocks of kParts times two tiles of 16 rows.
void pack_numbers(const float* x, int64_t row, int64_t rows, int64_t depth, float scaling,
                  bf16* to) {
  const __m512 factor = _mm512_set1_ps(scaling);
  for (int64_t k = 0; k < depth; k += kDepth, to += kParts * kBlock) {
    const __mmask16 a = first(depth - k), b = first(depth - k - 16);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = x + i * row + k;
      const Numbers all = {_mm512_maskz_mul_ps(a, _mm512_maskz_loadu_ps(a, from), factor),
                           _mm512_maskz_mul_ps(b, _mm512_maskz_loadu_ps(b, from + 16), factor)};
      put_parts(all, to + i * kDepth, in_a_row);
    }
    for (int part = 0; part < kParts; ++part) {
      memset(to + part * kBlock + rows * kDepth, 0, (kRows - rows) * kDepth * sizeof(bf16));
    }
  }
}

// A block of 32 columns that lie side by side. The block below is asked for.
void pair_rows(const float* from, int64_t row, bool more, bf16* to) {
  for (int64_t k = 0; k < kDepth; k += 2, from += 2 * row) {
    for (int64_t c = 0; c < kColumns; c += 16) {
      if (more) {
        __builtin_prefetch(from + kDepth * row + c, 0, 3);
        __builtin_prefetch(from + (kDepth + 1) * row + c, 0, 3);
      }
      const Numbers all = {_mm512_loadu_ps(from + c), _mm512_loadu_ps(from + row + c)};
      put_parts(all, to + c / 16 * (kBlock / 2) + k * 16, in_pairs);
    }
  }
}

// A tile of 16 columns whose elements lie side by side. Those of the block after the next are asked
// for: the processor sees no stream in so many at once.
void transpose_columns(const float* from, int64_t column, bf16* to) {
  typedef float Vec __attribute__((vector_size(64)));
  for (int64_t k = 0; k < kDepth; k += 16, to += kBlock / 4) {
    Vec rows[16];
    for (int i = 0; i < 16; ++i) {
      const float* at = from + i * column + k;
      rows[i] = (Vec)_mm512_loadu_ps(at);
      __builtin_prefetch(at + 2 * kDepth, 0, 3);
    }
    transpose(rows);
    for (int i = 0; i < 16; i += 2) {
      put_parts({(__m512)rows[i], (__m512)rows[i + 1]}, to + i * 16, in_pairs);
    }
  }
}

// Any block of `depth` rows and `columns` columns, with zeros beside it.
void pack_any(const Matrix& m, const float* from, int64_t depth, int64_t columns, bf16* to) {
  alignas(64) float block[kDepth * kColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = from + k * m.row;
    float* at = block + k * kColumns;
    if (m.column == 1) {
      memcpy(at, row, static_cast<size_t>(columns) * sizeof(float));
    } else {
      for (int64_t c = 0; c < columns; ++c) at[c] = row[c * m.column];
    }
  }
  pair_rows(block, kColumns, false, to);
}

// Columns of right or term as blocks of kParts times two tiles of 16 columns, each of which has
// rows of pairs.
void pack_matrix(const Matrix& m, int64_t start, int64_t columns, bf16* to) {
  const float* from = static_cast<const float*>(m.data) + start * m.column;
  for (int64_t k = 0; k < m.depth; k += kDepth, to += kParts * kBlock) {
    const int64_t depth = fewer(m.depth - k, kDepth);
    const float* at = from + k * m.row;
    if (depth < kDepth || columns < kColumns || (m.row != 1 && m.column != 1)) {
      pack_any(m, at, depth, columns, to);
    } else if (m.column == 1) {
      pair_rows(at, m.row, true, to);
    } else {
      transpose_columns(at, m.column, to);
      transpose_columns(at + 16 * m.column, m.column, to + kBlock / 2);
    }
  }
}

struct Tiles : TileSums {
  static constexpr int64_t kPacked = 1536 << 10, kPart = 512 << 10;

  static int64_t size(const Noted& p) { return blocks(p) * kParts * kBlock; }

  static void pack_rows(const Noted& p, int64_t row, int64_t rows, bf16* to) {
    pack_numbers(p.x + row * p.depth, p.depth, rows, p.right.depth, 1.0f, to);
    to += blocks_of(p.right.depth) * kParts * kBlock;
    const int64_t r = p.term.depth;
    if (r > 0) pack_numbers(p.left + row * r, r, rows, r, p.scaling, to);
  }

  static void pack_columns(const Noted& p, int64_t column, int64_t columns, bf16* to) {
    pack_matrix(p.right, column, columns, to);
    to += blocks_of(p.right.depth) * kParts * kBlock;
    pack_matrix(p.term, column, columns, to);
  }

  FFA_AMX static void multiply(const Noted& p, int64_t row, int64_t, const bf16* rows,
                               const bf16* columns, const Sums& at) {
    // The error of a long sum is that of its segments and of their sum; the bias is added last.
    alignas(64) float apart[kRows * kColumns];
    const int64_t all = blocks(p);
    clear();
    for (int64_t k = 0; k < all; ++k) {
      fetch(at, k);
      const bf16* a = rows + k * kParts * kBlock;
      const bf16* b = columns + k * kParts * kBlock;
      take_rows(a + 2 * kBlock);
      take_columns(b);
      add();
      take_rows(a + kBlock);
      add();
      take_columns(b + kBlock);
      add();
      take_rows(a);
      add();
      take_columns(b + 2 * kBlock);
      add();
    }
    for (int64_t k = 0; k < all; ++k) {
      take_rows(rows + k * kParts * kBlock);
      take_columns(columns + k * kParts * kBlock);
      add();
    }
    store({nullptr, 0, apart, kColumns});
    add_rows(at, apart, p.odd + row);
  }

 private:
  static inline void add_rows(const Sums& at, const float* apart, uint8_t* odd) {
    // To GCC a tile's store writes no memory.
    __asm__ volatile("" ::: "memory");
    for (int64_t m = 0; m < kRows; ++m) {
      const float* from = at.from + m * at.step;
      float* out = at.out + m * at.row;
      const __m512 low = _mm512_add_ps(_mm512_loadu_ps(from), _mm512_load_ps(apart));
      const __m512 high = _mm512_add_ps(_mm512_loadu_ps(from + 16), _mm512_load_ps(apart + 16));
      apart += kColumns;
      _mm512_storeu_ps(out, low);
      _mm512_storeu_ps(out + 16, high);
      // Of what is finite, and of nothing else, the difference from itself is a number.
      const __m512 none = _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high));
      // Threads may find the same.
      if (_mm512_cmp_ps_mask(none, none, _CMP_UNORD_Q))
        __atomic_store_n(odd + m, 1, __ATOMIC_RELAXED);
    }
  }

  FFA_AMX static inline void take_rows(const bf16* a) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kBlock / 2, 64);
  }

  FFA_AMX static inline void take_columns(const bf16* b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kBlock / 2, 64);
  }

  FFA_AMX static inline void add() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// Rows of `width` numbers that are odd, one after another; the number of them is the result, also
// where `to` is null.
int64_t take_odd(const uint8_t* odd, int64_t rows, const float* from, int64_t width, float* to) {
  int64_t found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (!odd[i]) continue;
    if (to != nullptr) {
      memcpy(to + found * width, from + i * width, static_cast<size_t>(width) * sizeof(float));
    }
    ++found;
  }
  return found;
}

}  // namespace

// As ffa_cpu_fp32_product, for right in F32 without a scale.
int fp32_tiles(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
               const void* right, int64_t right_row, int64_t right_column, const void* bias,
               const void* left, const void* term, int64_t term_row, int64_t term_column,
               double scaling, void* out, int threads) {
  if (rows < 0 || depth < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  if (threads < 1) threads = 1;
  const auto by_vectors = [=](int64_t some, const void* x, const void* left, void* out) {
    return ffa::avx512::fp32_product(some, depth, columns, r, x, right, FFA_F32, right_row,
                                     right_column, nullptr, 0, bias, left, term, term_row,
                                     term_column, scaling, out, threads);
  };
  const int64_t room = (rows + kRows - 1) / kRows * kRows;
  const Buffer<uint8_t> odd(room);
  if (!odd.ok) return FFA_NO_MEMORY;
  if (room > 0) memset(odd.data, 0, static_cast<size_t>(room));
  const Problem whole =
      problem_of(rows, depth, columns, r, x, right, FFA_F32, right_row, right_column, nullptr, 0,
                 bias, left, term, term_row, term_column, scaling, out);
  const int status = run_segments(whole, kSegment, kWhole, [&](const Problem& segment) {
    return run_packed<Tiles>(Noted{segment, odd.data}, threads);
  });
  if (status) return status;
  const int64_t found = take_odd(odd.data, rows, nullptr, 0, nullptr);
  if (found == 0) return FFA_OK;
  if (found == rows) return by_vectors(rows, x, left, out);
  const Buffer<float> some_x(found * depth), some_left(found * r), some_out(found * columns);
  if (!(some_x.ok && some_left.ok && some_out.ok)) return FFA_NO_MEMORY;
  take_odd(odd.data, rows, whole.x, depth, some_x.data);
  take_odd(odd.data, rows, whole.left, r, some_left.data);
  if (const int again = by_vectors(found, some_x.data, some_left.data, some_out.data)) return again;
  const float* from = some_out.data;
  for (int64_t i = 0; i < rows; ++i) {
    if (!odd.data[i] || columns == 0) continue;
    memcpy(whole.out + i * columns, from, static_cast<size_t>(columns) * sizeof(float));
    from += columns;
  }
  return FFA_OK;
}
#else
int fp32_tiles(int64_t, int64_t, int64_t, int64_t, const void*, const void*, int64_t, int64_t,
               const void*, const void*, const void*, int64_t, int64_t, double, void*, int) {
  return FFA_WRONG_ARCH;
}
#endif

}  // namespace ffa::FFA_ISA
