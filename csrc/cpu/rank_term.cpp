// The rank-r half of the adapted layer, beside a product with W that BLAS has made.
//
//   left = x A^T      out += scaling left right^T
//
// A block of rows of x makes its rows of left, ranks being lanes, and these add to its rows of out,
// columns being lanes, while both lie in L2. A row's bits do not depend on the other rows.
#include "../ffa.h"
#include "buffer.h"
#include "parallel.h"
#include "tiles.h"

namespace ffa::FFA_ISA {
namespace {

template <class T>
struct Product {
  int64_t rows, depth, columns, r, ranks;  // depth below 0: left is given
  const T* x;
  const T* A_t;    // (depth, ranks), zeros beside r
  const T* right;  // (r, columns), rows `right_row` apart
  int64_t right_row;
  T *left, *out;
  T scaling;
};

// The rows of left from `first` on, by way of `padded`, (rows, ranks).
template <class T>
void project(const Product<T>& p, int64_t first, int64_t rows, T* padded) {
  // Once at least: a sum of nothing is 0.
  for (int64_t panel = 0; panel == 0 || panel < p.depth; panel += kPanel) {
    const int64_t depth = p.depth - panel < kPanel ? p.depth - panel : kPanel;
    product<T, false>(rows, p.x + first * p.depth + panel, p.depth, int64_t{1}, depth,
                      p.A_t + panel * p.ranks, p.ranks, panel > 0, nullptr, padded);
  }
  strip(padded, rows, p.r, p.ranks, p.left + first * p.r);
}

// M rows of out and V vectors of its columns.
template <class T, int M, int V>
FFA_HD void add_tile(const Product<T>& p, int64_t row, int64_t column) {
  using S = Simd<T>;
  typename S::Vec sum[M][V] = {};
  const T* left = p.left + row * p.r;
  const T* right = p.right + column;
  for (int64_t k = 0; k < p.r; ++k) {
    typename S::Vec of_columns[V];
    for (int v = 0; v < V; ++v) of_columns[v] = S::load(right + k * p.right_row + v * S::W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      // Less zero, as in `tile`.
      const typename S::Vec element = left[m * p.r + k] - typename S::Vec{};
      for (int v = 0; v < V; ++v) sum[m][v] += element * of_columns[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      T* at = p.out + (row + m) * p.columns + column + v * S::W;
      S::store(at, S::load(at) + p.scaling * sum[m][v]);
    }
  }
}

// M rows of out.
template <class T, int M>
void add_rows(const Product<T>& p, int64_t row) {
  constexpr int W = Simd<T>::W;
  int64_t column = 0;
  for (; column + 2 * W <= p.columns; column += 2 * W) add_tile<T, M, 2>(p, row, column);
  for (; column + W <= p.columns; column += W) add_tile<T, M, 1>(p, row, column);
  for (; column < p.columns; ++column) {
    for (int m = 0; m < M; ++m) {
      T sum = 0;
      for (int64_t k = 0; k < p.r; ++k) {
        sum += p.left[(row + m) * p.r + k] * p.right[k * p.right_row + column];
      }
      p.out[(row + m) * p.columns + column] += p.scaling * sum;
    }
  }
}

template <class T>
int run(Product<T> p, const T* A, int64_t column_stride, int64_t rank_stride, int threads) {
  constexpr int W = Simd<T>::W;
  constexpr int kRows = 4;
  p.ranks = (p.r + W - 1) / W * W;
  const bool packs = column_stride != 1;
  const Buffer<T> A_t(p.depth > 0 ? p.depth * p.ranks : 0), right(packs ? p.r * p.columns : 0);
  if (!(A_t.ok && right.ok)) return FFA_NO_MEMORY;
  for (int64_t i = 0; i < p.depth; ++i) {
    for (int64_t k = 0; k < p.ranks; ++k) {
      A_t.data[i * p.ranks + k] = k < p.r ? A[k * p.depth + i] : T(0);
    }
  }
  p.A_t = A_t.data;
  p.right_row = rank_stride;
  if (packs) {
    for (int64_t c = 0; c < p.columns; ++c) {
      for (int64_t k = 0; k < p.r; ++k) {
        right.data[k * p.columns + c] = p.right[c * column_stride + k * rank_stride];
      }
    }
    p.right = right.data;
    p.right_row = p.columns;
  }
  const double work = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.r) *
                      static_cast<double>(p.columns + (p.depth > 0 ? p.depth : 0));
  int status = FFA_OK;
  parallel_for(work < 1e6 ? 1 : threads, (p.rows + kTokens - 1) / kTokens, [&](int64_t task) {
    const int64_t first = task * kTokens;
    const int64_t rows = p.rows - first < kTokens ? p.rows - first : kTokens;
    if (p.depth >= 0 && p.r > 0) {
      const Buffer<T> padded(rows * p.ranks);
      if (!padded.ok) {
        __atomic_store_n(&status, FFA_NO_MEMORY, __ATOMIC_RELAXED);
        return;
      }
      project(p, first, rows, padded.data);
    }
    int64_t row = first;
    for (; row + kRows <= first + rows; row += kRows) add_rows<T, kRows>(p, row);
    for (; row < first + rows; ++row) add_rows<T, 1>(p, row);
  });
  return status;
}

}  // namespace

int rank_term(int64_t rows, int64_t columns, int64_t r, int dtype, const void* x, int64_t depth,
              const void* lora_A, void* left, const void* right, int64_t column_stride,
              int64_t rank_stride, double scaling, void* out, int threads) {
  if (rows < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    Product<T> p = {};
    p.rows = rows;
    p.depth = depth;
    p.columns = columns;
    p.r = r;
    p.x = static_cast<const T*>(x);
    p.right = static_cast<const T*>(right);
    p.left = static_cast<T*>(left);
    p.out = static_cast<T*>(out);
    p.scaling = static_cast<T>(scaling);
    return run(p, static_cast<const T*>(lora_A), column_stride, rank_stride, threads);
  };
  if (dtype == FFA_F32) return of(0.0f);
  if (dtype == FFA_F64) return of(0.0);
  return FFA_BAD_DTYPE;
}

}  // namespace ffa::FFA_ISA
