"""The grid on which clipped gradients are summed in integers, as `csrc/common/clip.h` has it.

A clipped contribution is truncated toward zero to a multiple of the grid, so its norm does not
grow, and integers add to the same bits in any order: the sum's sensitivity is at most C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Bits between the clipping bound and the grid: 2^33 * records must stay inside int64, and the
# Gaussian that is rounded to the grid must be much finer than it (53 bits against 32).
GRID_BITS = 32

# fp64 sums of squares and the root err by parts in 2^53; a margin far above that, and far below
# what training could notice, keeps the clipped norm at or under C.
NORM_MARGIN = 1.0 + 2.0**-40


def grid_size(max_grad_norm: float) -> float:
    """The grid for the finite, positive bound C: 2^(floor(log2 C) - 32)."""
    return math.ldexp(1.0, math.frexp(max_grad_norm)[1] - 1 - GRID_BITS)


def known_squares(n: int, device: torch.device) -> Tensor:
    """`squares` of one call, fp64 (2, n): room for the squared norms, over ones."""
    return torch.ones((2, n), dtype=torch.float64, device=device)


def zero_sums(params: Sequence[Tensor], max_grad_norm: Sequence[float]) -> list[Tensor]:
    """Fresh sums for `clip_accumulate`: integers on the grid, fp64 where a bound is infinite."""
    bounds = max_grad_norm if len(max_grad_norm) > 1 else [max_grad_norm[0]] * len(params)
    return [
        torch.zeros(
            param.shape,
            dtype=torch.float64 if math.isinf(bound) else torch.int64,
            device=param.device,
        )
        for param, bound in zip(params, bounds, strict=True)
    ]
