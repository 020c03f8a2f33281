// Two 64-bit random words to two standard Gaussians (Box and Muller 1958) in fp64.
//
//   u1 = ((w0 >> 11) + 1) 2^-53 in (0, 1]      z0 = sqrt(-2 ln u1) cos(2 pi u2)
//   u2 =  (w1 >> 11)      2^-53 in [0, 1)      z1 = sqrt(-2 ln u1) sin(2 pi u2)
//
// log and sincos are polynomials in plain arithmetic without branches: a compiler turns a loop over
// these functions into SIMD code, which a libm call would prevent, and host and device agree. The
// coefficients interpolate at Chebyshev nodes; relative error of each polynomial < 3e-17.
#pragma once

#include "platform.h"

namespace ffa::FFA_ISA {

// Exact double of an integer below 2^53. Baseline x86 and AVX2 have no 64-bit conversion: there the
// two halves are placed in the mantissas of 2^84 and 2^52.
FFA_HD double to_double(uint64_t v) {
#if defined(__CUDA_ARCH__) || defined(__AVX512DQ__) || defined(__aarch64__)
  return static_cast<double>(static_cast<int64_t>(v));
#else
  const double high = bit_cast<double>((v >> 32) | 0x4530000000000000u) - 0x1p84;
  const double low = bit_cast<double>((v & 0xffffffffu) | 0x4330000000000000u) - 0x1p52;
  return high + low;
#endif
}

// ln u for a positive normal u: u = 2^k m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh(s).
FFA_HD double log_positive(double u) {
  const uint64_t half_root = 0x3fe6a09e667f3bcdu;  // sqrt(1/2)
  const uint64_t bits = bit_cast<uint64_t>(u) + (0x3ff0000000000000u - half_root);
  const double k = bit_cast<double>((bits >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
  const double m = bit_cast<double>((bits & 0x000fffffffffffffu) + half_root);
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double p = 0.14616449685043406;
  p = multiply_add(p, z, 0.15331721600556042);
  p = multiply_add(p, z, 0.18182889125261723);
  p = multiply_add(p, z, 0.2222221113479508);
  p = multiply_add(p, z, 0.28571428625975487);
  p = multiply_add(p, z, 0.39999999999899505);
  p = multiply_add(p, z, 0.666666666666667);
  // ln 2 in two parts: k times the first has no rounding error.
  const double tail = multiply_add(s * z, p, k * 5.497923018708371e-14);
  return multiply_add(k, 0.6931471805598903, 2.0 * s + tail);
}

// cos and sin of 2 pi u for u in [0, 1): u = q/4 + t exactly, |t| <= 1/8.
FFA_HD void sincos_turn(double u, double& cosine, double& sine) {
  const double shift = 0x1.8p52;
  const double shifted = 4.0 * u + shift;
  const uint64_t q = bit_cast<uint64_t>(shifted);
  const double t = u - 0.25 * (shifted - shift);
  const double z = t * t;
  double p = 3.78643334956545;
  p = multiply_add(p, z, -15.094054182079999);
  p = multiply_add(p, z, 42.05868918088512);
  p = multiply_add(p, z, -76.70585973562093);
  p = multiply_add(p, z, 81.6052492760517);
  p = multiply_add(p, z, -41.341702240399755);
  const double s = t * multiply_add(p, z, 6.283185307179586);
  p = -1.6990343940660637;
  p = multiply_add(p, z, 7.903206911569678);
  p = multiply_add(p, z, -26.426253275854723);
  p = multiply_add(p, z, 60.24464135270201);
  p = multiply_add(p, z, -85.4568172066438);
  p = multiply_add(p, z, 64.93939402266824);
  p = multiply_add(p, z, -19.739208802178716);
  const double c = multiply_add(p, z, 1.0);
  const bool odd = q & 1;
  const uint64_t cos_sign = ((q + 1) & 2) << 62;
  const uint64_t sin_sign = (q & 2) << 62;
  cosine = bit_cast<double>(bit_cast<uint64_t>(odd ? s : c) ^ cos_sign);
  sine = bit_cast<double>(bit_cast<uint64_t>(odd ? c : s) ^ sin_sign);
}

FFA_HD void box_muller(uint64_t w0, uint64_t w1, double& z0, double& z1) {
  const double u1 = to_double((w0 >> 11) + 1) * 0x1p-53;
  const double u2 = to_double(w1 >> 11) * 0x1p-53;
  const double radius = sqrt(-2.0 * log_positive(u1));
  double cosine, sine;
  sincos_turn(u2, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace ffa::FFA_ISA
