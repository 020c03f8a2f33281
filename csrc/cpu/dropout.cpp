// Dropout whose mask is made from its counter wherever it is needed, and stored nowhere.
#include "../common/dropout.h"

#include "../ffa.h"
#include "parallel.h"
#include "simd.h"

namespace ffa::FFA_ISA {
namespace {

// Where the mask's blocks lie: block b of these rows covers up to 32 elements of row b / per_row.
struct Rows {
  int64_t first_row, rows, columns;

  int64_t per_row() const { return (columns + 31) / 32; }
};

// Calls apply(first, count, halfwords) for runs of elements; halfwords[i] belongs to element first
// + i of these rows.
template <class Apply>
void for_each_run(const int64_t* state, Rows at, int threads, Apply apply) {
  constexpr int64_t kRunsPerTask = 8192 / (32 * kBlockLanes);
  const ChaChaStream stream = chacha_stream(state, 0);
  const int64_t per_row = at.per_row(), blocks = at.rows * per_row;
  const int64_t runs = (blocks + kBlockLanes - 1) / kBlockLanes;
  parallel_for(threads, (runs + kRunsPerTask - 1) / kRunsPerTask, [&](int64_t task) {
    const int64_t end = runs < (task + 1) * kRunsPerTask ? runs : (task + 1) * kRunsPerTask;
    for (int64_t run = task * kRunsPerTask; run < end; ++run) {
      const int64_t block = run * kBlockLanes;
      uint32_t rows[16 * kBlockLanes];
      chacha20_rows(stream, static_cast<uint32_t>(at.first_row * per_row + block), rows);
      uint16_t halfwords[32 * kBlockLanes];
      for (int i = 0; i < 16 * kBlockLanes; ++i) {
        halfwords[2 * i] = static_cast<uint16_t>(rows[i]);
        halfwords[2 * i + 1] = static_cast<uint16_t>(rows[i] >> 16);
      }
      const int64_t lanes = blocks - block < kBlockLanes ? blocks - block : kBlockLanes;
      if (at.columns % 32 == 0) {
        // Rows follow each other without a gap in the blocks.
        apply(32 * block, 32 * lanes, halfwords);
        continue;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = (block + lane) / per_row;
        const int64_t column = (block + lane) % per_row * 32;
        const int64_t left = at.columns - column;
        apply(row * at.columns + column, left < 32 ? left : 32, halfwords + 32 * lane);
      }
    }
  });
}

template <class T>
void write(const int64_t* state, DropoutRule rule, Rows rows, const T* x, T* out, int threads) {
  const T scale = static_cast<T>(rule.scale);
  for_each_run(state, rows, threads, [=](int64_t first, int64_t count, const uint16_t* halfwords) {
    for (int64_t i = 0; i < count; ++i) {
      const T value = x[first + i] * scale;
      out[first + i] = halfwords[i] >= rule.threshold ? value : T(0);
    }
  });
}

template <class T>
void add(const int64_t* state, DropoutRule rule, double scaling, Rows rows, const T* v, T* dx,
         int threads) {
  const T scale = static_cast<T>(rule.scale * scaling);
  for_each_run(state, rows, threads, [=](int64_t first, int64_t count, const uint16_t* halfwords) {
    for (int64_t i = 0; i < count; ++i) {
      const T value = v[first + i] * scale;
      dx[first + i] += halfwords[i] >= rule.threshold ? value : T(0);
    }
  });
}

int check(double p, Rows at) {
  if (!(p >= 0.0 && p <= 1.0)) return FFA_BAD_VALUE;
  if (at.first_row < 0 || at.rows < 0 || at.columns < 0) return FFA_BAD_SIZE;
  if (at.columns > 0 && at.first_row + at.rows > (int64_t{1} << 32) / at.per_row()) {
    return FFA_BAD_SIZE;
  }
  return FFA_OK;
}

}  // namespace

int dropout(const int64_t* dropout_state, double p, int64_t first_row, int64_t rows,
            int64_t columns, int dtype, const void* x, void* out, int threads) {
  const Rows at = {first_row, rows, columns};
  if (const int status = check(p, at)) return status;
  const DropoutRule rule = dropout_rule(p);
  if (dtype == FFA_F32) {
    write(dropout_state, rule, at, static_cast<const float*>(x), static_cast<float*>(out), threads);
  } else if (dtype == FFA_F64) {
    write(dropout_state, rule, at, static_cast<const double*>(x), static_cast<double*>(out),
          threads);
  } else {
    return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

int dropout_add(const int64_t* dropout_state, double p, double scaling, int64_t first_row,
                int64_t rows, int64_t columns, int dtype, const void* v, void* dx, int threads) {
  const Rows at = {first_row, rows, columns};
  if (const int status = check(p, at)) return status;
  const DropoutRule rule = dropout_rule(p);
  if (dtype == FFA_F32) {
    add(dropout_state, rule, scaling, at, static_cast<const float*>(v), static_cast<float*>(dx),
        threads);
  } else if (dtype == FFA_F64) {
    add(dropout_state, rule, scaling, at, static_cast<const double*>(v), static_cast<double*>(dx),
        threads);
  } else {
    return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
