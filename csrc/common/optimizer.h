// Optimizer updates of one element in parameter precision, as torch.optim.SGD, Adam and AdamW.
//
// Scalars that depend on the step are folded in fp64 once per tensor (`optimizer_scalars`), as
// torch does in Python, then rounded to the parameter's precision.
#pragma once

#include "division.h"

namespace ffa::FFA_ISA {

template <class T>
struct OptimizerScalars {
  T lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  T step_size;         // Adam: lr / (1 - beta1^t)
  T root_correction2;  // Adam: sqrt(1 - beta2^t)
  T decay;             // AdamW: 1 - lr weight_decay
  bool first_step;     // SGD: the momentum buffer does not exist yet
};

// hyper: lr, weight_decay, beta1 | momentum, beta2 | dampening, eps; `step` counts the steps done.
template <class T>
FFA_HD OptimizerScalars<T> optimizer_scalars(const double* hyper, double step) {
  const double lr = hyper[0], weight_decay = hyper[1], beta1 = hyper[2], beta2 = hyper[3];
  OptimizerScalars<T> s;
  s.lr = T(lr);
  s.weight_decay = T(weight_decay);
  s.beta1 = T(beta1);
  s.one_minus_beta1 = T(1.0 - beta1);
  s.beta2 = T(beta2);
  s.one_minus_beta2 = T(1.0 - beta2);
  s.eps = T(hyper[4]);
  s.step_size = T(lr / (1.0 - pow(beta1, step + 1.0)));
  s.root_correction2 = T(sqrt(1.0 - pow(beta2, step + 1.0)));
  s.decay = T(1.0 - lr * weight_decay);
  s.first_step = step == 0.0;
  return s;
}

// SGD: beta1 is the momentum, one_minus_beta2 is 1 - dampening.
template <class T>
FFA_HD T sgd_update(T param, T grad, const OptimizerScalars<T>& s) {
  grad = grad + s.weight_decay * param;
  return param - s.lr * grad;
}

template <class T>
FFA_HD T sgd_momentum_update(T param, T grad, T& buffer, const OptimizerScalars<T>& s,
                             bool nesterov) {
  grad = grad + s.weight_decay * param;
  buffer = s.first_step ? grad : s.beta1 * buffer + s.one_minus_beta2 * grad;
  return param - s.lr * (nesterov ? grad + s.beta1 * buffer : buffer);
}

template <class T>
FFA_HD T adam_update(T param, T grad, T& exp_avg, T& exp_avg_sq, const OptimizerScalars<T>& s,
                     bool decoupled) {
  if (decoupled) {
    param = param * s.decay;
  } else {
    grad = grad + s.weight_decay * param;
  }
  exp_avg = exp_avg + s.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (grad * grad);
  const T root = sizeof(T) == 4 ? T(sqrtf(float(exp_avg_sq))) : T(sqrt(double(exp_avg_sq)));
  // The correction is 0 or above 2^-27, the root of a number 0 or far above the least one.
  const Divisor<T> correction(s.root_correction2);
  return param - s.step_size * (exp_avg / (correction.divide(root) + s.eps));
}

}  // namespace ffa::FFA_ISA
