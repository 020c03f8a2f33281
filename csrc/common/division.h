// Many numbers divided by one, with the bits that divisions have, in a fraction of their time.
#pragma once

#include "platform.h"

namespace ffa::FFA_ISA {

// With y = 1 / d rounded, a Newton step makes the quotient x y faithful and a second rounds it
// correctly, as long as nothing on the way over- or underflows (Markstein 1990; Handbook of
// Floating-Point Arithmetic, section 5.3). Without fma, or on a GPU, it is the division.
template <class T>
struct Divisor {
  T value, inverse;

  FFA_HD explicit Divisor(T value) : value(value), inverse(T(1) / value) {}

  // x / value, for x and quotient that are +0, not finite, or far from the ends of the exponents.
  FFA_HD T divide(T x) const {
#if !defined(__CUDA_ARCH__) && (defined(__FMA__) || defined(__aarch64__))
    T quotient = x * inverse;
    for (int step = 0; step < 2; ++step) {
      quotient = multiply_add(multiply_add(-quotient, value, x), inverse, quotient);
    }
    // Infinity less infinity on the way: the quotient is the product then.
    return quotient == quotient ? quotient : x * inverse;
#else
    return x / value;
#endif
  }
};

}  // namespace ffa::FFA_ISA
