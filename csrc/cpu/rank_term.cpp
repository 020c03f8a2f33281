// The rank-r half of the adapted layer, before BLAS adds its product with W or after that.
//
//   left = x A^T      out = bias + scaling left right^T, or added to what is there
//
// Tasks are blocks of rows. Each packs for itself what it needs of right, and reads A as it is
// given where ranks are few: what one core packed for the other would take longer on its way there
// than a small task does. Columns are the lanes of out; those of left are parts of its sums, one
// vector for each element, or, where ranks are many, ranks, of an A that is packed for all tasks. A
// row's bits do not depend on the others.
#include "../ffa.h"
#include "buffer.h"
#include "parallel.h"
#include "tiles.h"
#include "transpose.h"

namespace ffa::FFA_ISA {
namespace {

// So many products are summed in a lane before they are added to the rest: the error of a long sum
// is that of its blocks and of their sum.
constexpr int64_t kBlock = 48;
// Of a task: the rest of the rows is for whoever is free.
constexpr int64_t kMostRows = 128;
// Of right, packed at a time.
constexpr int64_t kColumns = 512;
// Lines of 64 bytes that are asked for ahead.
constexpr int64_t kAhead = 4;

template <class T>
struct Product {
  int64_t rows, depth, r;  // depth below 0: left is given
  const T *x, *A;
  T* left;
  RankTerm<T> term;
  int64_t column_stride;  // of right; 1: it is taken as it is
};

// Lane i is the sum of v[i]'s lanes.
template <int kStep = 1>
inline void sum_lanes(typename Simd<float>::Vec* v, float* sums) {
  constexpr int W = Simd<float>::W;
  constexpr auto lanes = std::make_index_sequence<W>();
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2 * kStep) {
    v[i] = interleave<kStep, false>(v[i], v[i + kStep], lanes) +
           interleave<kStep, true>(v[i], v[i + kStep], lanes);
  }
  if constexpr (2 * kStep < W) {
    sum_lanes<2 * kStep>(v, sums);
  } else {
    Simd<float>::store(sums, v[0]);
  }
}

inline void sum_lanes(typename Simd<double>::Vec* v, double* sums) {
  constexpr int W = Simd<double>::W;
  for (int i = 0; i < W; ++i) {
    double lanes[W];
    Simd<double>::store(lanes, v[i]);
    for (int half = W / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    sums[i] = lanes[0];
  }
}

// left[m][k] = or += sum over i of x[m][i] A[k][i]: M rows and K ranks make a vector of sums each,
// as many as a vector has lanes. Of those only `rows` and `ranks` are there and are written.
template <class T, int M, int K>
void dots(const Product<T>& p, int64_t row, int64_t rows, int64_t rank, int64_t ranks,
          int64_t first, int64_t count) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  constexpr int W = S::W;
  static_assert(M * K == W);
  const T *x[M], *A[K];
  for (int m = 0; m < M; ++m) x[m] = p.x + (row + (m < rows ? m : 0)) * p.depth + first;
  for (int k = 0; k < K; ++k) A[k] = p.A + (rank + (k < ranks ? k : 0)) * p.depth + first;
  // What is read next is asked for: the processor sees no stream in pieces of rows.
  const T* ahead[M];
  for (int m = 0; m < M; ++m) ahead[m] = m + M < rows ? x[m] + M * p.depth : x[m];
  Vec sum[W] = {};
  const auto add = [&](const auto& load, int64_t i) {
    Vec of_rank[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) of_rank[k] = load(A[k] + i);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec of_row = load(x[m] + i);
      __builtin_prefetch(ahead[m] + i, 0, 3);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) sum[m * K + k] += of_row * of_rank[k];
    }
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) add([](const T* from) { return S::load(from); }, i);
  if (i < count) {
    const size_t rest = static_cast<size_t>(count - i) * sizeof(T);
    add(
        [=](const T* from) {
          Vec v = {};
          memcpy(&v, from, rest);
          return v;
        },
        i);
  }
  T sums[W];
  sum_lanes(sum, sums);
  for (int m = 0; m < M && m < rows; ++m) {
    T* to = p.left + (row + m) * p.r + rank;
    for (int k = 0; k < K && k < ranks; ++k) {
      to[k] = first > 0 ? to[k] + sums[m * K + k] : sums[m * K + k];
    }
  }
}

// The same for rows `begin` to `end` - 1, and K ranks at most: no more than there are, rounded up
// to a power of 2.
template <class T, int K>
void dots_of_rows(const Product<T>& p, int64_t begin, int64_t end, int64_t rank, int64_t ranks,
                  int64_t first, int64_t count) {
  if constexpr (K > 1) {
    if (ranks <= K / 2) return dots_of_rows<T, K / 2>(p, begin, end, rank, ranks, first, count);
  }
  constexpr int M = Simd<T>::W / K;
  for (int64_t row = begin; row < end; row += M) {
    dots<T, M, K>(p, row, end - row, rank, ranks, first, count);
  }
}

// The rows of left from `begin` to `end` - 1. A panel of A lies in L1 meanwhile.
template <class T>
void project(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::W, K = W / 2;
  constexpr int64_t kDepth = kBlock * W < 384 ? kBlock * W : 384;
  // Once at least: a sum of nothing is 0.
  for (int64_t first = 0; first == 0 || first < p.depth; first += kDepth) {
    const int64_t count = p.depth - first < kDepth ? p.depth - first : kDepth;
    for (int64_t rank = 0; rank < p.r; rank += K) {
      const int64_t ranks = p.r - rank < K ? p.r - rank : K;
      dots_of_rows<T, K>(p, begin, end, rank, ranks, first, count);
    }
  }
}

// Whether ranks are the lanes instead, of A packed as (depth, ranks): x is read once for two
// vectors of ranks then, and not once for each panel of A. A choice by the number of rows would
// make their bits depend on it.
template <class T>
inline bool many_ranks(int64_t r) {
  return r > Simd<T>::W / 2;
}

template <class T>
void pack_ranks(const Product<T>& p, int64_t ranks, T* to) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    using S = Simd<T>;
    constexpr int W = S::W;
    for (; i + W <= p.depth; i += W) {
      for (int64_t first = 0; first < ranks; first += W) {
        typename S::Vec block[W] = {};
        for (int k = 0; k < W && first + k < p.r; ++k) {
          block[k] = S::load(p.A + (first + k) * p.depth + i);
        }
        transpose(block);
        for (int of = 0; of < W; ++of) S::store(to + (i + of) * ranks + first, block[of]);
      }
    }
  }
  for (; i < p.depth; ++i) {
    for (int64_t k = 0; k < ranks; ++k) to[i * ranks + k] = k < p.r ? p.A[k * p.depth + i] : T(0);
  }
}

// M rows of left and V vectors of ranks, with A_t (depth, ranks) from the first of these.
template <class T, int M, int V>
void lanes_of_ranks(const Product<T>& p, int64_t row, const T* A_t, int64_t ranks, int64_t rank) {
  using S = Simd<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* x = p.x + row * p.depth;
  typename S::Vec total[M][V] = {};
  for (int64_t block = 0; block < p.depth; block += kBlock) {
    const int64_t last = p.depth - block < kBlock ? p.depth : block + kBlock;
    typename S::Vec sum[M][V] = {};
    for (int64_t line = block; line < last; line += kLine) {
      // What is read next, of these rows or the M after them: the processor sees no stream in so
      // many at once.
      const int64_t next = line + kAhead * kLine;
      const T* ahead = x + next + (next < p.depth ? 0 : (M - 1) * p.depth);
      for (int m = 0; m < M; ++m) __builtin_prefetch(ahead + m * p.depth, 0, 3);
      const int64_t count = last - line < kLine ? last - line : kLine;
      add_products<T, M, V>(x + line, p.depth, count, A_t + line * ranks, ranks, sum);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) total[m][v] += sum[m][v];
    }
  }
  const int64_t count = p.r - rank < V * S::W ? p.r - rank : V * S::W;
  for (int m = 0; m < M; ++m) {
    memcpy(p.left + (row + m) * p.r + rank, total[m], static_cast<size_t>(count) * sizeof(T));
  }
}

// The rows of left from `begin` to `end` - 1, M at a time and then fewer.
template <class T, int M, int V>
void rows_of_ranks(const Product<T>& p, int64_t begin, int64_t end, const T* A_t, int64_t ranks,
                   int64_t rank) {
  for (; begin + M <= end; begin += M) lanes_of_ranks<T, M, V>(p, begin, A_t, ranks, rank);
  if constexpr (M > 1) {
    constexpr int kFewer = M > 8 ? 8 : M > 4 ? 4 : M > 2 ? 2 : 1;
    if (begin < end) rows_of_ranks<T, kFewer, V>(p, begin, end, A_t, ranks, rank);
  }
}

template <class T>
void project_many(const Product<T>& p, int64_t begin, int64_t end, const T* A_t, int64_t ranks) {
  constexpr int W = Simd<T>::W, kOne = kSums / 2, kTwo = kSums / 4;
  int64_t rank = 0;
  for (; rank + W < ranks; rank += 2 * W) {
    rows_of_ranks<T, kTwo, 2>(p, begin, end, A_t + rank, ranks, rank);
  }
  if (rank < ranks) rows_of_ranks<T, kOne, 1>(p, begin, end, A_t + rank, ranks, rank);
}

// `columns` columns of right from `start` on, as (r, columns).
template <class T>
void pack(const Product<T>& p, int64_t start, int64_t columns, T* to) {
  using S = Simd<T>;
  constexpr int W = S::W;
  const T* from = p.term.right + start * p.column_stride;
  int64_t column = 0;
  if constexpr (sizeof(T) == 4) {
    for (; p.term.right_row == 1 && column + W <= columns; column += W) {
      for (int64_t k = 0; k < p.r; k += W) {
        const int64_t ranks = p.r - k < W ? p.r - k : W;
        const size_t bytes = static_cast<size_t>(ranks) * sizeof(T);
        typename S::Vec block[W] = {};
        const T* at = from + column * p.column_stride + k;
        for (int c = 0; c < W; ++c, at += p.column_stride) {
          if (ranks == W / 2) {
            memcpy(&block[c], at, sizeof(block[c]) / 2);
          } else {
            memcpy(&block[c], at, bytes);
          }
        }
        transpose(block);
        for (int64_t of = 0; of < ranks; ++of) {
          S::store(to + (k + of) * columns + column, block[of]);
        }
      }
    }
  }
  for (; column < columns; ++column) {
    for (int64_t k = 0; k < p.r; ++k) {
      to[k * columns + column] = from[column * p.column_stride + k * p.term.right_row];
    }
  }
}

template <class T>
int run(const Product<T>& p, int threads) {
  const bool projects = p.depth >= 0 && p.r > 0, packs = p.column_stride != 1 && p.r > 0;
  const int64_t all = p.term.columns, panel = packs && all > kColumns ? kColumns : all;
  const double work = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.r) *
                      static_cast<double>(all + (p.depth > 0 ? p.depth : 0));
  if (work < 1e6) threads = 1;
  // Long tasks, of whole tiles.
  const int64_t of_each = threads > 1 ? (p.rows + threads - 1) / threads : p.rows;
  int64_t block = (of_each + 3) / 4 * 4;
  block = block < kTokens ? kTokens : block > kMostRows ? kMostRows : block;
  constexpr int W = Simd<T>::W;
  const bool many = projects && many_ranks<T>(p.r);
  const int64_t ranks = many ? (p.r + W - 1) / W * W : 0;
  const Buffer<T> A_t(ranks * p.depth);
  if (!A_t.ok) return FFA_NO_MEMORY;
  if (many) pack_ranks(p, ranks, A_t.data);
  int status = FFA_OK;
  parallel_for(threads, (p.rows + block - 1) / block, [&](int64_t task) {
    const int64_t begin = task * block, end = begin + block < p.rows ? begin + block : p.rows;
    const Buffer<T> packed(packs ? p.r * panel : 0);
    if (!packed.ok) {
      __atomic_store_n(&status, FFA_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    if (many) {
      project_many(p, begin, end, A_t.data, ranks);
    } else if (projects) {
      project(p, begin, end);
    }
    if (!packs) return write_term(p.term, begin, end);
    for (int64_t start = 0; start < all; start += panel) {
      RankTerm<T> term = p.term;
      term.columns = all - start < panel ? all - start : panel;
      pack(p, start, term.columns, packed.data);
      term.right = packed.data;
      term.right_row = term.columns;
      if (term.bias != nullptr) term.bias += start;
      term.out += start;
      write_term(term, begin, end);
    }
  });
  return status;
}

}  // namespace

int rank_term(int64_t rows, int64_t columns, int64_t r, int dtype, const void* x, int64_t depth,
              const void* lora_A, void* left, const void* right, int64_t column_stride,
              int64_t rank_stride, double scaling, int adds, const void* bias, void* out,
              int threads) {
  if (rows < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    Product<T> p = {};
    p.rows = rows;
    p.depth = depth;
    p.r = r;
    p.x = static_cast<const T*>(x);
    p.A = static_cast<const T*>(lora_A);
    p.column_stride = column_stride;
    p.left = static_cast<T*>(left);
    p.term = {columns,
              r,
              p.left,
              r,
              static_cast<const T*>(right),
              rank_stride,
              static_cast<T>(scaling),
              adds != 0,
              static_cast<const T*>(bias),
              static_cast<T*>(out),
              columns};
    return run(p, threads);
  };
  if (dtype == FFA_F32) return of(0.0f);
  if (dtype == FFA_F64) return of(0.0);
  return FFA_BAD_DTYPE;
}

}  // namespace ffa::FFA_ISA
