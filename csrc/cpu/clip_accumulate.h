// The two parts of clipping that private_step needs as well: the factors, and the sum over records.
#pragma once

#include "../common/clip.h"
#include "../ffa.h"
#include "chunks.h"

namespace ffa::FFA_ISA {

// A physical batch of records, as csrc/ffa.h describes the arguments of clip_accumulate.
struct Records {
  int64_t n_tensors, n;
  const int64_t* numels;
  const int* dtypes;
  const void* const* grad_samples;
  const double* const* squares;
  int64_t groups;
  const double* max_grad_norm;
  const uint8_t* keep;
  int64_t* stats;
  double* factors;

  double bound(int64_t k) const { return max_grad_norm[groups == 1 ? 0 : k]; }
  const double* factors_of(int64_t k) const { return factors + (groups == 1 ? 0 : k) * n; }
};

int check_records(const Records& records);
int make_factors(const Records& records, int threads);

// Truncated contributions are below 2^33 in magnitude: this many are exact in an fp64 sum, and
// to_integer takes it.
constexpr int64_t kExactRecords = 1 << 18;

// An integer of magnitude up to 2^51: beside 1.5 2^52 the last bit of an fp64 number counts ones.
FFA_HD int64_t to_integer(double v) {
  const double shift = 0x1.8p52;
  return static_cast<int64_t>(bit_cast<uint64_t>(v + shift) - bit_cast<uint64_t>(shift));
}

// total[e] += c_j v_j[e] in the order of the records, where there is no bound; with one, of what is
// left of each term after truncation. Each total is loaded and stored once for all kRows. What
// stands `ahead` of each row is read next and asked for meanwhile: to the processor every row is a
// new stream. Nothing is read from it.
template <int kRows, bool kTruncated, class T>
void add_rows(const T* const* rows, const double* factors, int count, int64_t ahead,
              double* __restrict total) {
  constexpr int kLine = 64 / sizeof(T);
  const T* v[kRows];
  double factor[kRows];
  for (int j = 0; j < kRows; ++j) v[j] = rows[j], factor[j] = factors[j];
  const auto add = [&](int e) {
    double sum = total[e];
    for (int j = 0; j < kRows; ++j) {
      const double value = v[j][e];
      sum += kTruncated ? truncate_toward_zero(factor[j] * value) : value;
    }
    total[e] = sum;
  };
  int e = 0;
  for (; e + kLine <= count; e += kLine) {
    for (int j = 0; j < kRows; ++j) __builtin_prefetch(v[j] + ahead + e, 0, 3);
    for (int i = 0; i < kLine; ++i) add(e + i);
  }
  for (; e < count; ++e) add(e);
}

// total[e] += element first + e of `n` records from sample on, each with its own factor.
template <bool kTruncated, class T>
void add_records(const T* sample, int64_t numel, int64_t n, const double* factors, double per_grid,
                 int count, double* total) {
  constexpr int kTogether = 4;
  const T* rows[kTogether];
  double scaled[kTogether];
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (factors[i] == 0.0) continue;
    rows[found] = sample + i * numel;
    scaled[found] = factors[i] * per_grid;
    if (++found == kTogether) {
      // The next records, or after the last ones the first ones of the next chunk.
      const int64_t ahead = i + kTogether < n ? kTogether * numel : kChunk - (rows[0] - sample);
      add_rows<kTogether, kTruncated>(rows, scaled, count, ahead, total);
      found = 0;
    }
  }
  if (found == 3) add_rows<3, kTruncated>(rows, scaled, count, 0, total);
  if (found == 2) add_rows<2, kTruncated>(rows, scaled, count, 0, total);
  if (found == 1) add_rows<1, kTruncated>(rows, scaled, count, 0, total);
}

// total[e] += element first + e of the records begin .. end of tensor k: clipped and in units of
// its grid, or as they are where it has no bound.
inline void add_records(const Records& r, int64_t k, int64_t begin, int64_t end, int64_t first,
                        int count, double* total) {
  const double bound = r.bound(k);
  const int64_t at = begin * r.numels[k] + first;
  const auto add = [&](const auto* samples) {
    const double* factors = r.factors_of(k) + begin;
    if (isinf(bound)) {
      add_records<false>(samples + at, r.numels[k], end - begin, factors, 1.0, count, total);
    } else {
      const double per_grid = 1.0 / clip_grid(bound);
      add_records<true>(samples + at, r.numels[k], end - begin, factors, per_grid, count, total);
    }
  };
  if (r.dtypes[k] == FFA_F32) {
    add(static_cast<const float*>(r.grad_samples[k]));
  } else {
    add(static_cast<const double*>(r.grad_samples[k]));
  }
}

// sum[e] += the same of all records, in integers.
inline void add_to_integers(const Records& r, int64_t k, int64_t first, int count, int64_t* sum) {
  for (int64_t begin = 0; begin < r.n; begin += kExactRecords) {
    const int64_t end = r.n - begin < kExactRecords ? r.n : begin + kExactRecords;
    alignas(64) double exact[kChunk] = {};
    add_records(r, k, begin, end, first, count, exact);
    for (int e = 0; e < count; ++e) sum[e] += to_integer(exact[e]);
  }
}

}  // namespace ffa::FFA_ISA
