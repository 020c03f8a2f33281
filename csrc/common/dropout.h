// The dropout mask: element e keeps its value iff half-word e % 32 of ChaCha20 block e // 32 >=
// thr.
#pragma once

#include "platform.h"

namespace ffa::FFA_ISA {

struct DropoutRule {
  uint32_t threshold;  // round(p 2^16), so p is honoured to 2^-17
  double scale;        // 1 / (1 - threshold 2^-16), 0 where everything is dropped
};

FFA_HD DropoutRule dropout_rule(double p) {
  DropoutRule rule;
  rule.threshold = static_cast<uint32_t>(rint(p * 65536.0));
  rule.scale = rule.threshold < 65536u ? 1.0 / (1.0 - rule.threshold / 65536.0) : 0.0;
  return rule;
}

}  // namespace ffa::FFA_ISA
