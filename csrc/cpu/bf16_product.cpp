// Products with a bf16 matrix on AMX tiles, in fp32 from end to end but for what is multiplied.
//
//   out = x right + left term + bias
//
// A task rounds kRows rows of x and left to bf16, tile after tile, and multiplies them with panels
// of kColumns columns of right and term, packed: as many panels as kPacked bytes hold, and kSegment
// numbers of the inner dimension at a time. An element of out is summed in one order, whatever the
// other rows are.
#include "../ffa.h"
#include "buffer.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FFA_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffa::FFA_ISA {

#if defined(FFA_AMX)
namespace {

constexpr int64_t kRows = 32, kColumns = 32, kDepth = 32;
constexpr int64_t kPacked = 2 << 20, kSegment = 2048;
// Elements of a block of two tiles: of 32 rows of x, or of 32 columns of right.
constexpr int64_t kBlock = 1024;

typedef uint16_t bf16;

struct Matrix {
  const void* data;
  int64_t depth, row, column;  // of right or term: its rows, and steps between rows and columns

  int64_t blocks() const { return (depth + kDepth - 1) / kDepth; }
};

// out += x right + scaling left term, for a segment of x and right; or with the bias for out.
struct Problem {
  int64_t rows, columns, depth;  // `depth` lies between rows of x
  const float *x, *left, *bias;
  Matrix right, term;
  float scaling;
  bool add;
  float* out;

  int64_t blocks() const { return right.blocks() + term.blocks(); }
};

FFA_AMX inline __m512i narrow(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

FFA_AMX inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}

// `depth` numbers of each row, times `scaling`, as blocks of two tiles of 16 rows.
FFA_AMX void pack_rows(const float* x, int64_t row, int64_t rows, int64_t depth, float scaling,
                       bf16* to) {
  const __m512 scale = _mm512_set1_ps(scaling);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t left = i < rows ? depth - k : 0;
      const float* from = x + i * row + k;
      const __m512 low = _mm512_maskz_loadu_ps(first(left), from);
      const __m512 high = _mm512_maskz_loadu_ps(first(left - 16), from + 16);
      _mm512_store_si512(to + k / kDepth * kBlock + i * kDepth,
                         narrow(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
    }
  }
}

FFA_AMX inline uint32_t bits(bf16 value) { return value; }
FFA_AMX inline uint32_t bits(float value) {
  const __m512 all = _mm512_set1_ps(value);
  return static_cast<uint32_t>(_mm512_cvtsi512_si32(narrow(all, all))) & 0xffff;
}

// Rows k and k + 1 of 16 columns in pairs; both are there.
FFA_AMX inline __m512i pairs(const bf16* at, int64_t row, int64_t column) {
  if (column == 1) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + row));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i columns = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(column)));
  return _mm512_i32gather_epi32(columns, at, 2);
}

// A panel's columns as blocks of two tiles of 16 columns, each of which has rows of pairs.
template <class T>
FFA_AMX void pack_columns(const Matrix& m, int64_t start, int64_t columns, bf16* to) {
  const T* from = static_cast<const T*>(m.data) + start * m.column;
  for (int64_t c = 0; c < kColumns; c += 16) {
    for (int64_t k = 0; k < m.blocks() * kDepth; k += 2) {
      bf16* tile_row = to + k / kDepth * kBlock + c / 16 * (kBlock / 2) + k % kDepth * 16;
      const T* at = from + k * m.row + c * m.column;
      if constexpr (sizeof(T) == sizeof(bf16)) {
        if (c + 16 <= columns && k + 2 <= m.depth &&
            (m.column == 1 || (m.row == 1 && m.column < INT32_MAX / 16))) {
          _mm512_store_si512(tile_row, pairs(at, m.row, m.column));
          continue;
        }
      }
      for (int64_t i = 0; i < 16; ++i, at += m.column) {
        const bool there = c + i < columns;
        tile_row[2 * i] = there && k < m.depth ? bits(*at) : 0;
        tile_row[2 * i + 1] = there && k + 1 < m.depth ? bits(at[m.row]) : 0;
      }
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 x 32 of out, from `blocks` blocks of rows and of columns, added to what has rows `step` apart.
FFA_AMX void multiply(const bf16* rows, const bf16* columns, int64_t blocks, const float* to,
                      int64_t step, float* out, int64_t row) {
  _tile_loadd(0, to, step * 4);
  _tile_loadd(1, to + 16, step * 4);
  _tile_loadd(2, to + 16 * step, step * 4);
  _tile_loadd(3, to + 16 * step + 16, step * 4);
  for (int64_t k = 0; k < blocks; ++k) {
    _tile_loadd(4, rows + k * kBlock, 64);
    _tile_loadd(6, columns + k * kBlock, 64);
    _tile_loadd(7, columns + k * kBlock + kBlock / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + k * kBlock + kBlock / 2, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, row * 4);
  _tile_stored(1, out + 16, row * 4);
  _tile_stored(2, out + 16 * row, row * 4);
  _tile_stored(3, out + 16 * row + 16, row * 4);
}

FFA_AMX void run_rows(const Problem& p, int64_t row, int64_t column, int64_t panels,
                      const bf16* packed, const float* bias, bf16* block) {
  const int64_t rows = p.rows - row < kRows ? p.rows - row : kRows;
  pack_rows(p.x + row * p.depth, p.depth, rows, p.right.depth, 1.0f, block);
  pack_rows(p.left + row * p.term.depth, p.term.depth, rows, p.term.depth, p.scaling,
            block + p.right.blocks() * kBlock);
  for (int64_t i = 0; i < panels; ++i, column += kColumns) {
    const int64_t columns = p.columns - column < kColumns ? p.columns - column : kColumns;
    const bf16* panel = packed + i * p.blocks() * kBlock;
    float* out = p.out + row * p.columns + column;
    // Every row of the bias' tiles is the same.
    const float* to = p.add ? out : bias + i * kColumns;
    if (rows == kRows && columns == kColumns) {
      multiply(block, panel, p.blocks(), to, p.add ? p.columns : 0, out, p.columns);
      continue;
    }
    alignas(64) float whole[kRows * kColumns] = {};
    for (int64_t m = 0; p.add && m < rows; ++m) {
      memcpy(whole + m * kColumns, out + m * p.columns, static_cast<size_t>(columns) * 4);
    }
    multiply(block, panel, p.blocks(), p.add ? whole : to, p.add ? kColumns : 0, whole, kColumns);
    for (int64_t m = 0; m < rows; ++m) {
      memcpy(out + m * p.columns, whole + m * kColumns, static_cast<size_t>(columns) * 4);
    }
  }
}

int run(const Problem& p, int threads) {
  const int64_t all = (p.columns + kColumns - 1) / kColumns;
  const int64_t tasks = (p.rows + kRows - 1) / kRows;
  const int64_t size = p.blocks() * kBlock;
  if (tasks == 0 || all == 0) return FFA_OK;
  const int64_t fit = kPacked / (2 * size + 1);
  const int64_t groups = fit < 1 ? all : (all + fit - 1) / fit;
  const int64_t group = (all + groups - 1) / groups;
  const int64_t slots = threads < 1 ? 1 : threads < tasks ? threads : tasks;
  const Buffer<bf16> packed(group * size), blocks(slots * size);
  const Buffer<float> bias(group * kColumns);
  if (!(packed.ok && blocks.ok && bias.ok)) return FFA_NO_MEMORY;
  for (int64_t start = 0; start < all; start += group) {
    const int64_t panels = all - start < group ? all - start : group;
    parallel_for(threads, panels, [&](int64_t i) {
      const int64_t column = (start + i) * kColumns;
      const int64_t columns = p.columns - column < kColumns ? p.columns - column : kColumns;
      bf16* panel = packed.data + i * size;
      pack_columns<bf16>(p.right, column, columns, panel);
      pack_columns<float>(p.term, column, columns, panel + p.right.blocks() * kBlock);
      for (int64_t c = 0; c < kColumns; ++c) {
        bias.data[i * kColumns + c] = p.bias != nullptr && c < columns ? p.bias[column + c] : 0.0f;
      }
    });
    int64_t next = 0;
    parallel_for(threads, slots, [&](int64_t slot) FFA_AMX {
      const TileConfig config;
      _tile_loadconfig(&config);
      for (int64_t t; (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
        run_rows(p, t * kRows, start * kColumns, panels, packed.data, bias.data,
                 blocks.data + slot * size);
      }
      _tile_release();
    });
  }
  return FFA_OK;
}

// Whether there are tiles, and the kernel gives them to this process.
bool detect() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (b >> 16 & 1) && (b >> 30 & 1);
  if (!amx || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

int has_bf16_product() {
  static const bool found = detect();
  return found;
}

int bf16_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                 const void* right, int64_t right_row, int64_t right_column, const void* bias,
                 const void* left, const void* term, int64_t term_row, int64_t term_column,
                 double scaling, void* out, int threads) {
  if (rows < 0 || depth < 0 || columns < 0 || r < 0) return FFA_BAD_SIZE;
  if (!has_bf16_product()) return FFA_WRONG_ARCH;
  Problem p = {};
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.bias = static_cast<const float*>(bias);
  p.left = static_cast<const float*>(left);
  p.scaling = static_cast<float>(scaling);
  p.out = static_cast<float*>(out);
  int64_t start = 0;
  do {
    const int64_t end = depth - start > kSegment ? start + kSegment : depth;
    p.x = static_cast<const float*>(x) + start;
    p.right = {static_cast<const bf16*>(right) + start * right_row, end - start, right_row,
               right_column};
    p.term = {term, end == depth ? r : 0, term_row, term_column};
    if (const int status = run(p, threads)) return status;
    p.add = true;
    start = end;
  } while (start < depth);
  return FFA_OK;
}
#else
int has_bf16_product() { return 0; }

int bf16_product(int64_t, int64_t, int64_t, int64_t, const void*, const void*, int64_t, int64_t,
                 const void*, const void*, const void*, int64_t, int64_t, double, void*, int) {
  return FFA_WRONG_ARCH;
}
#endif

}  // namespace ffa::FFA_ISA
