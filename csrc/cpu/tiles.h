// Products with a rank-r side, summed in registers: tall ones with few columns, whose lanes are
// ranks, and the rank-r term of a wide one, whose lanes are columns.
#pragma once

#include <stdint.h>
#include <string.h>

#include "simd.h"

namespace ffa::FFA_ISA {

// A block of g that suits L1 and the tiles below.
constexpr int64_t kTokens = 32;
constexpr int64_t kPanel = 192;
// Vectors of sums in a tile: with those of ranks and of g they fill the registers.
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;
// Rows of a tile that lie far apart, with one vector of ranks and with two: each row has a register
// for its address.
constexpr int kApart[2] = {8, kVectorBytes == 64 ? 8 : 6};

template <class T, int kBytes = kVectorBytes>
struct Simd {
  static constexpr int W = kBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kBytes)));

  static FFA_HD Vec load(const T* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static FFA_HD void store(T* p, Vec v) { memcpy(p, &v, sizeof(v)); }
};

// out[m][k] = or += sum over i of g[m][i] right[i][k], for M rows m and V vectors of ranks k. Rows
// of g are `row` apart and its summed elements `step`; right and out have `ranks` columns. What
// stands at `ahead` as g does here, and is read next, is asked for meanwhile: the processor sees no
// stream in rows so far apart. Null for nothing, and nothing is read from it.
template <class T, int kBytes, int M, int V>
FFA_HD void tile(const T* g, int64_t row, int64_t step, int64_t count, const T* right,
                 int64_t ranks, bool add, const T* ahead, T* out) {
  using S = Simd<T, kBytes>;
  typename S::Vec sum[M][V] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (ahead != nullptr) {
      for (int m = 0; m < M; m += 64 / sizeof(T)) __builtin_prefetch(ahead + m + i * step, 0, 3);
    }
    typename S::Vec of_ranks[V];
    for (int v = 0; v < V; ++v) of_ranks[v] = S::load(right + i * ranks + v * S::W);
    // Asked for: GCC unrolls 16 turns of its own accord, and in a loop the sums lie in memory.
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      // Less zero, which the compiler leaves out; plus zero would change -0, and so stay.
      const typename S::Vec element = g[m * row + i * step] - typename S::Vec{};
      for (int v = 0; v < V; ++v) sum[m][v] += element * of_ranks[v];
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      T* at = out + m * ranks + v * S::W;
      S::store(at, add ? S::load(at) + sum[m][v] : sum[m][v]);
    }
  }
}

// The same for `rows` rows, as many as a tile has or fewer at a time.
template <class T, int kBytes, int M, int V>
FFA_HD void tiles(int64_t rows, const T* g, int64_t row, int64_t step, int64_t count,
                  const T* right, int64_t ranks, bool add, const T* ahead, T* out) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    tile<T, kBytes, M, V>(g + m * row, row, step, count, right, ranks, add,
                          ahead == nullptr ? nullptr : ahead + m, out + m * ranks);
  }
  if constexpr (M > 1) {
    if (m < rows) {
      tiles<T, kBytes, (M > 3 ? M / 2 : 1), V>(rows - m, g + m * row, row, step, count, right,
                                               ranks, add, nullptr, out + m * ranks);
    }
  }
}

// The same for all ranks, in vectors of kBytes. kAdjacent: `row` is 1.
template <class T, int kBytes, bool kAdjacent>
FFA_HD void product(int64_t rows, const T* g, int64_t row, int64_t step, int64_t count,
                    const T* right, int64_t ranks, bool add, const T* ahead, T* out) {
  constexpr int W = Simd<T, kBytes>::W;
  constexpr int kOne = kAdjacent ? kSums : kApart[0], kTwo = kAdjacent ? kSums / 2 : kApart[1];
  if (kAdjacent) row = 1;
  int64_t k = 0;
  for (; k + 2 * W <= ranks; k += 2 * W) {
    tiles<T, kBytes, kTwo, 2>(rows, g, row, step, count, right + k, ranks, add, ahead, out + k);
    ahead = nullptr;
  }
  if (k < ranks)
    tiles<T, kBytes, kOne, 1>(rows, g, row, step, count, right + k, ranks, add, ahead, out + k);
}

// sum[m] += x[m] right, for M rows of x that lie `row` apart and V vectors of right's columns,
// whose `depth` rows lie `right_row` apart.
template <class T, int M, int V>
FFA_HD void add_products(const T* x, int64_t row, int64_t depth, const T* right, int64_t right_row,
                         typename Simd<T>::Vec (*sum)[V]) {
  using S = Simd<T>;
  for (int64_t k = 0; k < depth; ++k) {
    typename S::Vec of_columns[V];
    for (int v = 0; v < V; ++v) of_columns[v] = S::load(right + k * right_row + v * S::W);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      // Less zero, as in `tile`.
      const typename S::Vec element = x[m * row + k] - typename S::Vec{};
      for (int v = 0; v < V; ++v) sum[m][v] += element * of_columns[v];
    }
  }
}

// out (rows, columns) += scaling left right, or = bias + that, for left (rows, r), right (r,
// columns) and out, whose rows lie `left_row`, `right_row` and `out_row` apart; bias (columns,), or
// null for none. Columns are lanes.
template <class T>
struct RankTerm {
  int64_t columns, r;
  const T* left;
  int64_t left_row;
  const T* right;
  int64_t right_row;
  T scaling;
  bool adds;
  const T* bias;
  T* out;
  int64_t out_row;
};

// M rows of out and V vectors of its columns.
template <class T, int M, int V>
FFA_HD void term_tile(const RankTerm<T>& p, int64_t row, int64_t column) {
  using S = Simd<T>;
  typename S::Vec sum[M][V] = {};
  const T* left = p.left + row * p.left_row;
  const T* right = p.right + column;
  add_products<T, M, V>(left, p.left_row, p.r, right, p.right_row, sum);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      T* at = p.out + (row + m) * p.out_row + column + v * S::W;
      const T* to = p.adds ? at : p.bias != nullptr ? p.bias + column + v * S::W : nullptr;
      const typename S::Vec made = p.scaling * sum[m][v];
      S::store(at, to != nullptr ? S::load(to) + made : made);
    }
  }
}

// M rows of out.
template <class T, int M>
void term_rows(const RankTerm<T>& p, int64_t row) {
  constexpr int W = Simd<T>::W;
  int64_t column = 0;
  for (; column + 2 * W <= p.columns; column += 2 * W) term_tile<T, M, 2>(p, row, column);
  for (; column + W <= p.columns; column += W) term_tile<T, M, 1>(p, row, column);
  for (; column < p.columns; ++column) {
    for (int m = 0; m < M; ++m) {
      T sum = 0;
      for (int64_t k = 0; k < p.r; ++k) {
        sum += p.left[(row + m) * p.left_row + k] * p.right[k * p.right_row + column];
      }
      T* at = p.out + (row + m) * p.out_row + column;
      const T* to = p.adds ? at : p.bias != nullptr ? p.bias + column : nullptr;
      *at = to != nullptr ? *to + p.scaling * sum : p.scaling * sum;
    }
  }
}

// Rows from `begin` to `end` - 1. A row has the same bits wherever it stands.
template <class T>
void write_term(const RankTerm<T>& p, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) term_rows<T, kRows>(p, row);
  for (; row < end; ++row) term_rows<T, 1>(p, row);
}

// rows x r to rows x ranks, zeros beside them; and back.
template <class T>
void pad(const T* from, int64_t rows, int64_t r, int64_t ranks, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < ranks; ++k) to[i * ranks + k] = k < r ? from[i * r + k] : T(0);
  }
}

template <class T>
void strip(const T* from, int64_t rows, int64_t r, int64_t ranks, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    memcpy(to + i * r, from + i * ranks, static_cast<size_t>(r) * sizeof(T));
}

}  // namespace ffa::FFA_ISA
