// The integer grid of a clipping bound, the clip factor of a record, and two roundings to integers.
//
// grid = 2^(floor(log2 C) - 32). Contributions are truncated toward zero to the grid, so that a
// record's norm can only shrink, and summed as integers, so that a sum has the same bits in any
// order.
#pragma once

#include "platform.h"

namespace ffa::FFA_ISA {

FFA_HD double clip_grid(double max_grad_norm) {
  int exponent;
  frexp(max_grad_norm, &exponent);  // C = m 2^exponent with m in [1/2, 1)
  return ldexp(1.0, exponent - 1 - 32);
}

// 1 within the bound, C / norm beyond it, 0 for a norm that is not finite. The margin covers the
// rounding of norm and product, which could otherwise leave a record a few ulp above C.
FFA_HD double clip_factor(double norm_sq, double max_grad_norm) {
  if (!(norm_sq <= 1.7976931348623157e308)) return 0.0;
  const double norm = sqrt(norm_sq) * (1.0 + 0x1p-40);
  return norm <= max_grad_norm ? 1.0 : max_grad_norm / norm;
}

// Plain SSE2 has no instruction for it but the conversion, exact below 2^63.
FFA_HD double truncate_toward_zero(double v) {
#if defined(__CUDA_ARCH__) || defined(__SSE4_1__) || !defined(__x86_64__)
  return __builtin_trunc(v);
#else
  return static_cast<double>(static_cast<int64_t>(v));
#endif
}

// Nearest integer, ties to even. Plain SSE2 rounds by adding and taking away 2^52, from which on
// there are integers only.
FFA_HD double round_half_even(double v) {
#if defined(__CUDA_ARCH__) || defined(__SSE4_1__) || !defined(__x86_64__)
  return __builtin_rint(v);
#else
  const double magnitude = __builtin_fabs(v);
  const double rounded = (magnitude + 0x1p52) - 0x1p52;
  return magnitude < 0x1p52 ? __builtin_copysign(rounded, v) : v;
#endif
}

}  // namespace ffa::FFA_ISA
