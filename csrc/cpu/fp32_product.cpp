// Products in fp32 with a frozen matrix of any type, and a rank-r term in the same sums.
//
//   out = x right + scaling left term + bias
//
// A task has a few panels of kColumns columns of right and term, packed into its L2, and takes the
// rows of x past them, kRows at a time, as they lie in memory. Lanes are columns. An element of out
// is summed in one order, whatever the other rows are.
#include "buffer.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"
#include "transpose.h"

namespace ffa::FFA_ISA {
namespace {

typedef Simd<float> S;
typedef S::Vec Vec;
constexpr int W = S::W;

// With two vectors of columns and one of an element of x the sums fill the registers.
constexpr int kRows = kSums / 2;
constexpr int64_t kColumns = 2 * W;
constexpr int64_t kPacked = 512 << 10;
// Rows of right at a time, and how many are not parted.
constexpr int64_t kSegment = 960, kWhole = 1536;
// So many products are summed before they are added to the rest: the error of a long sum is that
// of its blocks and of their sum.
constexpr int64_t kBlock = 192;
// Bytes that are asked for ahead, of each column: the processor sees no stream in so many at once.
constexpr size_t kAhead = 128;
// Rows this many bytes apart lie in one set of L1, which holds fewer lines than a tile has rows.
constexpr int64_t kSameSet = 4096;

inline int64_t summed(const Problem& p) { return p.right.depth + p.term.depth; }

inline Vec load(const float* p) { return S::load(p); }
inline Vec load(const bf16* p) {
  typedef bf16 Halves __attribute__((vector_size(2 * W)));
  Halves halves;
  memcpy(&halves, p, sizeof(halves));
  return (Vec)(__builtin_convertvector(halves, WordVector) << 16);
}
inline Vec load(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(W)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
}

inline float number(float v) { return v; }
inline float number(int8_t v) { return v; }
inline float number(bf16 v) {
  const uint32_t word = static_cast<uint32_t>(v) << 16;
  float wide;
  memcpy(&wide, &word, sizeof(wide));
  return wide;
}

// A panel's columns times `factor`, and zeros beside them.
template <class T>
void pack(const Matrix& m, int64_t start, int64_t columns, float factor, float* to) {
  const T* from = static_cast<const T*>(m.data) + start * m.column;
  const bool whole = columns == kColumns;
  alignas(64) float of_columns[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) {
    const bool scaled = m.scale != nullptr && !m.scales_rows && c < columns;
    of_columns[c] = scaled ? m.scale[start + c] * factor : factor;
  }
  const float* of_rows = m.scales_rows ? m.scale : nullptr;
  int64_t k = 0;
  if (whole && m.column == 1) {
    for (; k < m.depth; ++k) {
      for (int v = 0; v < 2; ++v) {
        const Vec scale = S::load(of_columns + v * W) * (of_rows != nullptr ? of_rows[k] : 1.0f);
        S::store(to + k * kColumns + v * W, load(from + k * m.row + v * W) * scale);
      }
    }
  } else if (whole && m.row == 1) {
    for (; k + W <= m.depth; k += W) {
      for (int v = 0; v < 2; ++v) {
        const Vec scale = S::load(of_columns + v * W);
        Vec block[W];
        for (int i = 0; i < W; ++i) {
          const T* at = from + (v * W + i) * m.column + k;
          block[i] = load(at);
          __builtin_prefetch(at + kAhead / sizeof(T), 0, 0);
        }
        transpose(block);
        for (int i = 0; i < W; ++i) {
          const Vec row = block[i] * scale;
          S::store(to + (k + i) * kColumns + v * W,
                   of_rows != nullptr ? row * of_rows[k + i] : row);
        }
      }
    }
  }
  for (; k < m.depth; ++k) {
    const float of_row = of_rows != nullptr ? of_rows[k] : 1.0f;
    for (int64_t c = 0; c < kColumns; ++c) {
      const float scale = of_columns[c] * of_row;
      to[k * kColumns + c] = c < columns ? number(from[k * m.row + c * m.column]) * scale : 0.0f;
    }
  }
}

void pack_any(const Matrix& m, int64_t start, int64_t columns, float factor, float* to) {
  if (m.dtype == FFA_F32) return pack<float>(m, start, columns, factor, to);
  if (m.dtype == FFA_BF16) return pack<bf16>(m, start, columns, factor, to);
  pack<int8_t>(m, start, columns, factor, to);
}

// Where a tile's sums begin and go.
struct Place {
  const float* from;
  int64_t from_row;
  float* out;
  int64_t row;
};

// M rows of x and of left, one panel.
template <int M>
void run_tile(const Problem& p, const float* x, int64_t row, const float* left, const float* panel,
              const Place& at) {
  Vec total[M][2];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < 2; ++v) total[m][v] = S::load(at.from + m * at.from_row + v * W);
  }
  const int64_t depth = p.right.depth;
  for (int64_t k = 0; k == 0 || k < depth; k += kBlock) {
    const int64_t left_over = depth - k;
    Vec sum[M][2] = {};
    const int64_t count = left_over < kBlock ? left_over : kBlock;
    add_products<float, M, 2>(x + k, row, count, panel + k * kColumns, kColumns, sum);
    if (left_over <= kBlock) {
      const int64_t r = p.term.depth;
      add_products<float, M, 2>(left, r, r, panel + depth * kColumns, kColumns, sum);
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 2; ++v) total[m][v] += sum[m][v];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < 2; ++v) S::store(at.out + m * at.row + v * W, total[m][v]);
  }
}

// The same for fewer rows than a tile has.
template <int M>
void run_rows(int64_t rows, const Problem& p, const float* x, int64_t row, const float* left,
              const float* panel, const Place& at) {
  if (rows == M) {
    run_tile<M>(p, x, row, left, panel, at);
  } else if constexpr (M > 1) {
    run_rows<M - 1>(rows, p, x, row, left, panel, at);
  }
}

// Rows from `first` on times the panels from column `start` on.
void run_panels(const Problem& p, int64_t first, int64_t rows, const float* x, int64_t row,
                int64_t start, int64_t panels, const float* packed) {
  const float* left = p.left + first * p.term.depth;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t column = start + i * kColumns;
    const int64_t columns = p.columns - column < kColumns ? p.columns - column : kColumns;
    const float* panel = packed + i * summed(p) * kColumns;
    float* out = p.out + first * p.columns + column;
    alignas(64) float bias[kColumns] = {};
    if (p.bias != nullptr) memcpy(bias, p.bias + column, static_cast<size_t>(columns) * 4);
    if (columns == kColumns) {
      const Place at = {p.add ? out : bias, p.add ? p.columns : 0, out, p.columns};
      run_rows<kRows>(rows, p, x, row, left, panel, at);
      continue;
    }
    alignas(64) float whole[kRows * kColumns] = {};
    for (int64_t m = 0; m < rows; ++m) {
      memcpy(whole + m * kColumns, p.add ? out + m * p.columns : bias,
             static_cast<size_t>(columns) * 4);
    }
    run_rows<kRows>(rows, p, x, row, left, panel, {whole, kColumns, whole, kColumns});
    for (int64_t m = 0; m < rows; ++m) {
      memcpy(out + m * p.columns, whole + m * kColumns, static_cast<size_t>(columns) * 4);
    }
  }
}

int run(const Problem& p, int threads) {
  const int64_t all = (p.columns + kColumns - 1) / kColumns, size = summed(p) * kColumns;
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  if (tiles == 0 || all == 0) return FFA_OK;
  const double work =
      2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns * (summed(p) + 1));
  if (threads < 1 || work < 1e6) threads = 1;
  // As many panels as kPacked bytes hold, in tasks of one size, as many for each thread.
  const int64_t room = kPacked / (4 * size + 1), fit = (room < 1 ? 1 : room) * threads;
  const int64_t turns = (all + fit - 1) / fit, even = (turns < 2 ? 2 : turns) * threads;
  const int64_t groups = all < even ? all : even;
  const int64_t wanted = (threads + groups - 1) / groups, parts = wanted < tiles ? wanted : tiles;
  const bool copies = p.depth * 4 % kSameSet == 0 && p.right.depth > 0 && p.rows > 1;
  const int64_t apart = p.right.depth + 64 / 4;
  int status = FFA_OK;
  parallel_for(threads, groups * parts, [&](int64_t task) {
    const int64_t begin = all * (task / parts) / groups, end = all * (task / parts + 1) / groups;
    const Buffer<float> packed((end - begin) * size), copied(copies ? kRows * apart : 0);
    if (!(packed.ok && copied.ok)) {
      __atomic_store_n(&status, FFA_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * kColumns;
      const int64_t columns = p.columns - column < kColumns ? p.columns - column : kColumns;
      float* panel = packed.data + (i - begin) * size;
      pack_any(p.right, column, columns, 1.0f, panel);
      pack_any(p.term, column, columns, p.scaling, panel + p.right.depth * kColumns);
    }
    const int64_t part = task % parts, last = tiles * (part + 1) / parts;
    for (int64_t t = tiles * part / parts; t < last; ++t) {
      const int64_t first = t * kRows, rows = p.rows - first < kRows ? p.rows - first : kRows;
      const float* x = p.x + first * p.depth;
      for (int64_t m = 0; copies && m < rows; ++m) {
        memcpy(copied.data + m * apart, x + m * p.depth, static_cast<size_t>(p.right.depth) * 4);
      }
      run_panels(p, first, rows, copies ? copied.data : x, copies ? apart : p.depth,
                 begin * kColumns, end - begin, packed.data);
    }
  });
  return status;
}

}  // namespace

int fp32_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                 const void* right, int right_dtype, int64_t right_row, int64_t right_column,
                 const void* scale, int scales_rows, const void* bias, const void* left,
                 const void* term, int64_t term_row, int64_t term_column, double scaling, void* out,
                 int threads) {
  if (rows < 0 || depth < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  if (right_dtype != FFA_F32 && right_dtype != FFA_BF16 && right_dtype != FFA_I8) {
    return FFA_BAD_DTYPE;
  }
  const Problem p =
      problem_of(rows, depth, columns, r, x, right, right_dtype, right_row, right_column, scale,
                 scales_rows, bias, left, term, term_row, term_column, scaling, out);
  return run_segments(p, kSegment, kWhole,
                      [&](const Problem& segment) { return run(segment, threads); });
}

}  // namespace ffa::FFA_ISA
