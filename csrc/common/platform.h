// What host and device compilers must agree on: qualifiers, the namespace of a copy, bit casts.
//
// Each CPU file is compiled once per instruction set. Everything lives in `ffa::FFA_ISA`, so that
// the linker can never merge an inline function of one copy into another and run, say, AVX-512 code
// on a machine without it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef FFA_ISA
#define FFA_ISA baseline
#endif

#if defined(__CUDACC__)
#define FFA_HD __host__ __device__ __forceinline__
#else
#define FFA_HD inline __attribute__((always_inline))
#endif

namespace ffa::FFA_ISA {

template <class To, class From>
FFA_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// a * b + c, in one rounding only where the hardware has it: a libm fma would be far slower than
// the second rounding is harmful.
template <class T>
FFA_HD T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(T) == sizeof(float)) return __builtin_fmaf(a, b, c);
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace ffa::FFA_ISA
