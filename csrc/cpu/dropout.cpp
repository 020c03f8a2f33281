// Dropout whose mask is made from its counter wherever it is needed, and stored nowhere.
#include "../common/dropout.h"

#include "../ffa.h"
#include "parallel.h"
#include "simd.h"

namespace ffa::FFA_ISA {
namespace {

// Calls apply(first, count, halfwords) for runs of elements; halfwords[i] belongs to element first
// + i.
template <class Apply>
void for_each_run(const int64_t* state, int64_t offset, int64_t numel, int threads, Apply apply) {
  constexpr int64_t kRun = 32 * kBlockLanes;
  constexpr int64_t kRunsPerTask = 8192 / kRun;
  const ChaChaStream stream = chacha_stream(state, 0);
  const int64_t runs = (numel + kRun - 1) / kRun;
  parallel_for(threads, (runs + kRunsPerTask - 1) / kRunsPerTask, [&](int64_t task) {
    const int64_t end = runs < (task + 1) * kRunsPerTask ? runs : (task + 1) * kRunsPerTask;
    for (int64_t run = task * kRunsPerTask; run < end; ++run) {
      const int64_t first = run * kRun;
      uint32_t rows[16 * kBlockLanes];
      chacha20_rows(stream, static_cast<uint32_t>((offset + first) / 32), rows);
      uint16_t halfwords[kRun];
      for (int i = 0; i < 16 * kBlockLanes; ++i) {
        halfwords[2 * i] = static_cast<uint16_t>(rows[i]);
        halfwords[2 * i + 1] = static_cast<uint16_t>(rows[i] >> 16);
      }
      apply(first, numel - first < kRun ? numel - first : kRun, halfwords);
    }
  });
}

template <class T>
void write(const int64_t* state, DropoutRule rule, int64_t offset, int64_t numel, const T* x,
           T* out, int threads) {
  const T scale = static_cast<T>(rule.scale);
  for_each_run(state, offset, numel, threads,
               [=](int64_t first, int64_t count, const uint16_t* halfwords) {
                 for (int64_t i = 0; i < count; ++i) {
                   const T value = x[first + i] * scale;
                   out[first + i] = halfwords[i] >= rule.threshold ? value : T(0);
                 }
               });
}

template <class T>
void add(const int64_t* state, DropoutRule rule, double scaling, int64_t offset, int64_t numel,
         const T* v, T* dx, int threads) {
  const T scale = static_cast<T>(rule.scale * scaling);
  for_each_run(state, offset, numel, threads,
               [=](int64_t first, int64_t count, const uint16_t* halfwords) {
                 for (int64_t i = 0; i < count; ++i) {
                   const T value = v[first + i] * scale;
                   dx[first + i] += halfwords[i] >= rule.threshold ? value : T(0);
                 }
               });
}

int check(double p, int64_t offset, int64_t numel) {
  if (!(p >= 0.0 && p <= 1.0)) return FFA_BAD_VALUE;
  if (numel < 0 || offset < 0 || offset % 32 != 0 || offset + numel > int64_t{32} << 32) {
    return FFA_BAD_SIZE;
  }
  return FFA_OK;
}

}  // namespace

int dropout(const int64_t* dropout_state, double p, int64_t offset, int64_t numel, int dtype,
            const void* x, void* out, int threads) {
  if (const int status = check(p, offset, numel)) return status;
  const DropoutRule rule = dropout_rule(p);
  if (dtype == FFA_F32) {
    write(dropout_state, rule, offset, numel, static_cast<const float*>(x),
          static_cast<float*>(out), threads);
  } else if (dtype == FFA_F64) {
    write(dropout_state, rule, offset, numel, static_cast<const double*>(x),
          static_cast<double*>(out), threads);
  } else {
    return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

int dropout_add(const int64_t* dropout_state, double p, double scaling, int64_t offset,
                int64_t numel, int dtype, const void* v, void* dx, int threads) {
  if (const int status = check(p, offset, numel)) return status;
  const DropoutRule rule = dropout_rule(p);
  if (dtype == FFA_F32) {
    add(dropout_state, rule, scaling, offset, numel, static_cast<const float*>(v),
        static_cast<float*>(dx), threads);
  } else if (dtype == FFA_F64) {
    add(dropout_state, rule, scaling, offset, numel, static_cast<const double*>(v),
        static_cast<double*>(dx), threads);
  } else {
    return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
