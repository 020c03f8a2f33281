// The rank-r half of the adapted layer, before BLAS adds its product with W or after that.
//
//   left = x A^T      out = bias + scaling left right^T, or added to what is there
//
// Tasks are blocks of rows, and read x, A and right as they are given: what one core packed for the
// other would take longer on its way there than a task does. Columns are the lanes of out; those of
// left are parts of its sums, one vector for each element. A row's bits do not depend on the
// others.
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
constexpr int64_t kMostRows = 128;

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
  Vec sum[W] = {};
  const auto add = [&](const auto& load, int64_t i) {
    Vec of_rank[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) of_rank[k] = load(A[k] + i);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec of_row = load(x[m] + i);
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

template <class T, int K>
void dots(const Product<T>& p, int64_t begin, int64_t end, int64_t rank, int64_t ranks) {
  constexpr int W = Simd<T>::W;
  if constexpr (K > 1) {
    if (ranks <= K / 2) return dots<T, K / 2>(p, begin, end, rank, ranks);
  }
  constexpr int64_t kDepth = kBlock * W;
  for (int64_t row = begin; row < end; row += W / K) {
    // Once at least: a sum of nothing is 0.
    for (int64_t first = 0; first == 0 || first < p.depth; first += kDepth) {
      const int64_t count = p.depth - first < kDepth ? p.depth - first : kDepth;
      dots<T, W / K, K>(p, row, end - row, rank, ranks, first, count);
    }
  }
}

// The rows of left from `begin` to `end` - 1.
template <class T>
void project(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::W;
  for (int64_t rank = 0; rank < p.r; rank += W) {
    dots<T, W>(p, begin, end, rank, p.r - rank < W ? p.r - rank : W);
  }
}

// right as (r, columns).
template <class T>
void pack(const Product<T>& p, T* to) {
  using S = Simd<T>;
  constexpr int W = S::W;
  const int64_t columns = p.term.columns;
  const T* from = p.term.right;
  int64_t column = 0;
  if constexpr (sizeof(T) == 4) {
    for (; p.term.right_row == 1 && column + W <= columns; column += W) {
      for (int64_t k = 0; k < p.r; k += W) {
        const int64_t ranks = p.r - k < W ? p.r - k : W;
        typename S::Vec block[W] = {};
        const T* at = from + column * p.column_stride + k;
        if (ranks == W) {
          for (int c = 0; c < W; ++c) block[c] = S::load(at + c * p.column_stride);
        } else if (ranks == W / 2) {
          for (int c = 0; c < W; ++c)
            memcpy(&block[c], at + c * p.column_stride, W / 2 * sizeof(T));
        } else {
          const size_t bytes = static_cast<size_t>(ranks) * sizeof(T);
          for (int c = 0; c < W; ++c) memcpy(&block[c], at + c * p.column_stride, bytes);
        }
        transpose(block);
        for (int64_t of = 0; of < ranks; ++of)
          S::store(to + (k + of) * columns + column, block[of]);
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
  const int64_t columns = p.term.columns;
  const bool projects = p.depth >= 0 && p.r > 0, packs = p.column_stride != 1 && columns > 0;
  const double work = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.r) *
                      static_cast<double>(columns + (p.depth > 0 ? p.depth : 0));
  if (work < 1e6) threads = 1;
  // Each task packs for itself: few and long ones, of whole tiles.
  const int64_t of_each = threads > 1 ? (p.rows + threads - 1) / threads : p.rows;
  int64_t block = (of_each + 3) / 4 * 4;
  block = block < kTokens ? kTokens : block > kMostRows ? kMostRows : block;
  int status = FFA_OK;
  parallel_for(threads, (p.rows + block - 1) / block, [&](int64_t task) {
    const int64_t begin = task * block, end = begin + block < p.rows ? begin + block : p.rows;
    const Buffer<T> packed(packs ? p.r * columns : 0);
    if (!packed.ok) {
      __atomic_store_n(&status, FFA_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    if (projects) project(p, begin, end);
    RankTerm<T> term = p.term;
    if (packs) {
      pack(p, packed.data);
      term.right = packed.data;
      term.right_row = columns;
    }
    write_term(term, begin, end);
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
              static_cast<T*>(out)};
    return run(p, threads);
  };
  if (dtype == FFA_F32) return of(0.0f);
  if (dtype == FFA_F64) return of(0.0);
  return FFA_BAD_DTYPE;
}

}  // namespace ffa::FFA_ISA
