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

// So many products of a projection are summed before they are added to the rest: the error of a
// long sum is that of its blocks and of their sum.
constexpr int64_t kBlock = 48;

template <class T>
struct Product {
  int64_t rows, depth, r, ranks;  // depth below 0: left is given
  const T* x;
  const T* A_t;  // (depth, ranks), zeros beside r
  T* left;
  RankTerm<T> term;
};

// The rows of left from `first` on, by way of `padded`, (rows, ranks).
template <class T>
void project(const Product<T>& p, int64_t first, int64_t rows, T* padded) {
  // Once at least: a sum of nothing is 0.
  for (int64_t k = 0; k == 0 || k < p.depth; k += kBlock) {
    const int64_t depth = p.depth - k < kBlock ? p.depth - k : kBlock;
    product<T, false>(rows, p.x + first * p.depth + k, p.depth, int64_t{1}, depth,
                      p.A_t + k * p.ranks, p.ranks, k > 0, nullptr, padded);
  }
  strip(padded, rows, p.r, p.ranks, p.left + first * p.r);
}

template <class T>
int run(Product<T> p, const T* A, int64_t column_stride, int threads) {
  constexpr int W = Simd<T>::W;
  p.ranks = (p.r + W - 1) / W * W;
  const int64_t columns = p.term.columns;
  const bool packs = column_stride != 1;
  const Buffer<T> A_t(p.depth > 0 ? p.depth * p.ranks : 0), right(packs ? p.r * columns : 0);
  if (!(A_t.ok && right.ok)) return FFA_NO_MEMORY;
  for (int64_t i = 0; i < p.depth; ++i) {
    for (int64_t k = 0; k < p.ranks; ++k) {
      A_t.data[i * p.ranks + k] = k < p.r ? A[k * p.depth + i] : T(0);
    }
  }
  p.A_t = A_t.data;
  if (packs) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t k = 0; k < p.r; ++k) {
        right.data[k * columns + c] = p.term.right[c * column_stride + k * p.term.right_row];
      }
    }
    p.term.right = right.data;
    p.term.right_row = columns;
  }
  const double work = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.r) *
                      static_cast<double>(columns + (p.depth > 0 ? p.depth : 0));
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
    add_term(p.term, first, first + rows);
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
    p.r = r;
    p.x = static_cast<const T*>(x);
    p.left = static_cast<T*>(left);
    p.term = {columns,
              r,
              p.left,
              r,
              static_cast<const T*>(right),
              rank_stride,
              static_cast<T>(scaling),
              static_cast<T*>(out)};
    return run(p, static_cast<const T*>(lora_A), column_stride, threads);
  };
  if (dtype == FFA_F32) return of(0.0f);
  if (dtype == FFA_F64) return of(0.0);
  return FFA_BAD_DTYPE;
}

}  // namespace ffa::FFA_ISA
