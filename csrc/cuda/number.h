// fp16 and bf16 as storage: two bytes, widened to fp32 for arithmetic and rounded to nearest, ties
// to even, on the way back. Host and device give the same bits.
#pragma once

#include "../common/platform.h"
#include "../ffa.h"

namespace ffa::FFA_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

constexpr int kOldestArch = 75, kNoArch = 10000;

// The first arch whose tensor cores multiply the type; none do fp32 in full precision.
template <class T>
constexpr int kFirstTensorArch = kNoArch;
template <>
constexpr int kFirstTensorArch<Half> = 75;
template <>
constexpr int kFirstTensorArch<Bfloat16> = 80;

FFA_HD float widen(float v) { return v; }

FFA_HD float widen(Bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

FFA_HD float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
#else
  // The product shifts the exponent's bias and makes subnormals normal, without rounding.
  const uint32_t magnitude = v.bits & 0x7fffu, sign = (v.bits & 0x8000u) << 16;
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const float value =
      magnitude < 0x7c00u ? finite : bit_cast<float>(0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}

FFA_HD void narrow(float v, float& out) { out = v; }

FFA_HD void narrow(float v, Bfloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  out.bits = static_cast<uint16_t>((v == v ? rounded : bits | 0x400000u) >> 16);
}

FFA_HD void narrow(float v, Half& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000u;
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {
    half = magnitude == magnitude ? 0x7c00u : 0x7e00u;
  } else if (magnitude < 0x1p-14f) {
    // Adding 1/2 leaves ten bits below 2^-14, rounded as the addition rounds.
    half = bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t m = bit_cast<uint32_t>(magnitude);
    half = (m + 0xfffu + (m >> 13 & 1u) - (112u << 23)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | sign);
#endif
}

// Through fp32, as torch rounds fp64 to a 16-bit type.
template <class T>
FFA_HD void narrow(double v, T& out) {
  narrow(static_cast<float>(v), out);
}

FFA_HD bool is_dtype(int dtype) { return dtype >= FFA_F32 && dtype <= FFA_BF16; }

// Where tensors of several dtypes share a launch, the dtype is a value: data[e] and data[e] = v in
// arithmetic of Real.
template <class Real>
FFA_HD Real load_as(int dtype, const void* data, int64_t e) {
  switch (dtype) {
    case FFA_F16:
      return widen(static_cast<const Half*>(data)[e]);
    case FFA_BF16:
      return widen(static_cast<const Bfloat16*>(data)[e]);
    case FFA_F64:
      return static_cast<Real>(static_cast<const double*>(data)[e]);
    default:
      return static_cast<const float*>(data)[e];
  }
}

template <class Real>
FFA_HD void store_as(int dtype, void* data, int64_t e, Real v) {
  switch (dtype) {
    case FFA_F16:
      return narrow(v, static_cast<Half*>(data)[e]);
    case FFA_BF16:
      return narrow(v, static_cast<Bfloat16*>(data)[e]);
    case FFA_F64:
      static_cast<double*>(data)[e] = v;
      return;
    default:
      static_cast<float*>(data)[e] = static_cast<float>(v);
  }
}

// kCount neighbours in a row as words, moved at once where they are aligned to their size together.
template <class T, int kCount>
struct [[gnu::may_alias]] alignas(sizeof(T) * kCount) Run {
  uint32_t words[sizeof(T) * kCount / 4];
};

template <int kCount>
FFA_HD float get(const Run<float, kCount>& run, int i) {
  return bit_cast<float>(run.words[i]);
}

template <class T, int kCount>
FFA_HD T get(const Run<T, kCount>& run, int i) {
  return T{static_cast<uint16_t>(run.words[i / 2] >> 16 * (i % 2))};
}

template <int kCount>
FFA_HD void set(Run<float, kCount>& run, int i, float v) {
  run.words[i] = bit_cast<uint32_t>(v);
}

// Into a run of zeros.
template <class T, int kCount>
FFA_HD void set(Run<T, kCount>& run, int i, T v) {
  run.words[i / 2] |= static_cast<uint32_t>(v.bits) << 16 * (i % 2);
}

// p[0], p[1], ...: of these `left` exist, and the others are zero.
template <int kCount, class T>
FFA_HD Run<T, kCount> load_run(const T* p, int left, bool aligned) {
  if (aligned && left >= kCount) return *reinterpret_cast<const Run<T, kCount>*>(p);
  Run<T, kCount> run = {};
  for (int i = 0; i < kCount; ++i) {
    if (i < left) set(run, i, p[i]);
  }
  return run;
}

template <class T, int kCount>
FFA_HD void store_run(const Run<T, kCount>& run, T* p, int left, bool aligned) {
  if (aligned && left >= kCount) {
    *reinterpret_cast<Run<T, kCount>*>(p) = run;
    return;
  }
  for (int i = 0; i < kCount; ++i) {
    if (i < left) p[i] = get(run, i);
  }
}

// Whether every row of a matrix may be moved in such runs.
template <int kCount, class T>
bool rows_aligned(const T* matrix, int64_t columns) {
  return reinterpret_cast<uintptr_t>(matrix) % (sizeof(T) * kCount) == 0 && columns % kCount == 0;
}

// Two 16-bit numbers in one register, the first in its lower half.
template <class T>
FFA_HD uint32_t pair(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace ffa::FFA_ISA
