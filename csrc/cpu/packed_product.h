// Products whose factors are packed as the processor's instructions for bf16 take them: AMX tiles,
// or vectors of pairs.
//
// Blocks of kRows rows of x and left are multiplied with panels of kColumns columns of right and
// term. Where rows are fewer, all of them are packed first, and a task takes as many panels as
// kPart bytes hold past them; otherwise as many panels as kPacked bytes hold, and a task takes
// blocks of rows past them. An element of out is summed in one order, whatever the other rows are.
//
// A format says how factors are packed and multiplied:
//
//   kPart, kPacked                       bytes, as above
//   size(p)                              bf16 numbers of a packed block, and of a panel
//   pack_rows(p, row, rows, to)          a block
//   pack_columns(p, column, columns, to) a panel
//   begin(), end()                       called by a thread before it multiplies, and after
//   multiply(p, row, rows, block, panel, at)  see Sums; `rows` from `row` on
#pragma once

#include "buffer.h"
#include "parallel.h"
#include "product.h"
#include "simd.h"

#if defined(__AVX512F__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
// The build of what includes this has all of AVX-512 that the library asks for; these are looked
// for at run time.
#define FFA_PAIRS __attribute__((target("avx512bf16")))
#define FFA_AMX __attribute__((target("avx512bf16,amx-tile,amx-bf16")))
#include <immintrin.h>

namespace ffa::FFA_ISA {
namespace {

constexpr int64_t kRows = 32, kColumns = 32, kDepth = 32;
// Elements of two tiles: kDepth of 32 rows of x, or of 32 columns of right.
constexpr int64_t kBlock = 1024;

inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

FFA_PAIRS inline __m512i narrow(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}

// 32 x 32 of out, from a block of rows and a panel, added to what has rows `step` apart.
struct Sums {
  const float* from;
  int64_t step;
  float* out;
  int64_t row;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A constant, which lies in memory whole: GCC takes ldtilecfg to read eight bytes, and would not
// store the rest of a local.
constexpr TileConfig kTileConfig;
static_assert(sizeof(kTileConfig) == 64, "what ldtilecfg reads");

// Sums in tiles 0 to 3, of rows 0 and 16 and of columns 0 and 16.
struct TileSums {
  FFA_AMX static void begin() { _tile_loadconfig(&kTileConfig); }

  FFA_AMX static inline void load(const Sums& at) {
    // To GCC a tile's load reads no memory: what was stored must lie there before the first.
    __asm__ volatile("" ::: "memory");
    _tile_loadd(0, at.from, at.step * 4);
    _tile_loadd(1, at.from + 16, at.step * 4);
    _tile_loadd(2, at.from + 16 * at.step, at.step * 4);
    _tile_loadd(3, at.from + 16 * at.step + 16, at.step * 4);
  }

  FFA_AMX static inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Rows of out are fetched while the tiles work: the stores at the end need not wait for them.
  static inline void fetch(const Sums& at, int64_t turn) {
    for (int64_t m = 4 * turn; m < 4 * turn + 4 && m < kRows; ++m) {
      __builtin_prefetch(at.out + m * at.row, 1, 3);
      __builtin_prefetch(at.out + m * at.row + 16, 1, 3);
    }
  }

  FFA_AMX static inline void store(const Sums& at) {
    _tile_stored(0, at.out, at.row * 4);
    _tile_stored(1, at.out + 16, at.row * 4);
    _tile_stored(2, at.out + 16 * at.row, at.row * 4);
    _tile_stored(3, at.out + 16 * at.row + 16, at.row * 4);
  }

  FFA_AMX static void end() { _tile_release(); }
};

// Packed panels that lie side by side, and their bias.
struct Panels {
  int64_t first, count;
  bf16* data;
  float* bias;
};

template <class Format, class P>
void pack_block(const P& p, int64_t t, bf16* to) {
  Format::pack_rows(p, t * kRows, fewer(p.rows - t * kRows, kRows), to);
}

// Panel `i` of `panels`.
template <class Format, class P>
void pack_panel(const P& p, const Panels& panels, int64_t i) {
  const int64_t column = (panels.first + i) * kColumns;
  const int64_t columns = fewer(p.columns - column, kColumns);
  Format::pack_columns(p, column, columns, panels.data + i * Format::size(p));
  for (int64_t c = 0; c < kColumns; ++c) {
    const bool there = p.bias != nullptr && c < columns;
    panels.bias[i * kColumns + c] = there ? p.bias[column + c] : 0.0f;
  }
}

// Block `t` of the rows, packed, times some panels.
template <class Format, class P>
void multiply(const P& p, int64_t t, const bf16* block, const Panels& panels) {
  const int64_t row = t * kRows, rows = fewer(p.rows - row, kRows);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t column = (panels.first + i) * kColumns;
    const int64_t columns = fewer(p.columns - column, kColumns);
    const bf16* panel = panels.data + i * Format::size(p);
    float* out = p.out + row * p.columns + column;
    // Every row of the bias' tiles is the same.
    const float* from = p.add ? out : panels.bias + i * kColumns;
    if (rows == kRows && columns == kColumns) {
      Format::multiply(p, row, rows, block, panel, {from, p.add ? p.columns : 0, out, p.columns});
      continue;
    }
    alignas(64) float whole[kRows * kColumns] = {};
    for (int64_t m = 0; p.add && m < rows; ++m) {
      memcpy(whole + m * kColumns, out + m * p.columns, static_cast<size_t>(columns) * 4);
    }
    Format::multiply(p, row, rows, block, panel,
                     {p.add ? whole : from, p.add ? kColumns : 0, whole, kColumns});
    for (int64_t m = 0; m < rows; ++m) {
      memcpy(out + m * p.columns, whole + m * kColumns, static_cast<size_t>(columns) * 4);
    }
  }
}

// Calls task(slot, i) for each i below `tasks` with the unit ready; no two at once have one slot.
template <class Format, class Task>
void for_each(int64_t slots, int64_t tasks, Task task) {
  int64_t next = 0;
  parallel_for(static_cast<int>(slots), slots, [&](int64_t slot) {
    Format::begin();
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) task(slot, i);
    Format::end();
  });
}

// All rows packed first. Tasks have as many panels, each thread as many tasks.
template <class Format, class P>
int run_panels(const P& p, int64_t tiles, int64_t all, int threads) {
  const int64_t size = Format::size(p);
  const int64_t room = Format::kPart / (2 * size + 1), fit = (room < 1 ? 1 : room) * threads;
  const int64_t turns = (all + fit - 1) / fit;
  const int64_t tasks = fewer((turns < 2 ? 2 : turns) * threads, all);
  const int64_t group = (all + tasks - 1) / tasks, slots = fewer(threads, tasks);
  const Buffer<bf16> rows(tiles * size), columns(slots * group * size);
  const Buffer<float> bias(slots * group * kColumns);
  if (!(rows.ok && columns.ok && bias.ok)) return FFA_NO_MEMORY;
  parallel_for(threads, tiles, [&](int64_t t) { pack_block<Format>(p, t, rows.data + t * size); });
  for_each<Format>(slots, tasks, [&](int64_t slot, int64_t task) {
    const int64_t begin = all * task / tasks, end = all * (task + 1) / tasks;
    const Panels panels = {begin, end - begin, columns.data + slot * group * size,
                           bias.data + slot * group * kColumns};
    for (int64_t i = 0; i < panels.count; ++i) pack_panel<Format>(p, panels, i);
    for (int64_t t = 0; t < tiles; ++t) multiply<Format>(p, t, rows.data + t * size, panels);
  });
  return FFA_OK;
}

// Panels packed first, a group at a time.
template <class Format, class P>
int run_rows(const P& p, int64_t tiles, int64_t all, int threads) {
  const int64_t size = Format::size(p);
  const int64_t fit = Format::kPacked / (2 * size + 1);
  const int64_t groups = fit < 1 ? all : (all + fit - 1) / fit;
  const int64_t group = (all + groups - 1) / groups;
  // Where threads are many, each task has a part of the panels.
  const int64_t parts = fewer((2 * int64_t{threads} + tiles - 1) / tiles, group);
  const int64_t tasks = tiles * parts, slots = fewer(threads, tasks);
  const Buffer<bf16> columns(group * size), rows(slots * size);
  const Buffer<float> bias(group * kColumns);
  if (!(columns.ok && rows.ok && bias.ok)) return FFA_NO_MEMORY;
  for (int64_t start = 0; start < all; start += group) {
    const Panels panels = {start, fewer(all - start, group), columns.data, bias.data};
    parallel_for(threads, panels.count, [&](int64_t i) { pack_panel<Format>(p, panels, i); });
    for_each<Format>(slots, tasks, [&](int64_t slot, int64_t task) {
      const int64_t t = task / parts, part = task % parts;
      const int64_t begin = panels.count * part / parts, end = panels.count * (part + 1) / parts;
      bf16* block = rows.data + slot * size;
      pack_block<Format>(p, t, block);
      multiply<Format>(
          p, t, block,
          {start + begin, end - begin, panels.data + begin * size, panels.bias + begin * kColumns});
    });
  }
  return FFA_OK;
}

template <class Format, class P>
int run_packed(const P& p, int threads) {
  const int64_t tiles = (p.rows + kRows - 1) / kRows,
                panels = (p.columns + kColumns - 1) / kColumns;
  if (tiles == 0 || panels == 0) return FFA_OK;
  // What is fewer is packed once.
  const bool few = tiles <= panels && 2 * tiles * Format::size(p) <= Format::kPacked;
  return few ? run_panels<Format>(p, tiles, panels, threads)
             : run_rows<Format>(p, tiles, panels, threads);
}

}  // namespace
}  // namespace ffa::FFA_ISA
#endif
