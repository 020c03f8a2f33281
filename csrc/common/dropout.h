// The dropout mask of rows of K elements: element k of row m keeps its value iff half-word k % 32
// of ChaCha20 block m ceil(K / 32) + k // 32 >= threshold. Each row begins a block, so that a tile
// of rows and columns makes whole blocks.
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
