"""What ends a private step, over 64 tensors of 1024 x 8 and 16 records, for the ops that do it.

Their floor is a copy of as many bytes as the op must move. All find the caches swept, as an update
does that follows a forward and a backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import roofline
import torch

N, COUNT, SHAPE = 16, 64, (1024, 8)
NUMEL = COUNT * math.prod(SHAPE)


class Step:
    """The state of an Adam step; the sums are filled again by each clip_accumulate."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        torch.manual_seed(0)
        self.grads = [torch.randn(N, *SHAPE, **like) for _ in range(COUNT)]
        self.squares = [
            torch.stack([g.double().square().sum((1, 2)), torch.ones(N, device=device)])
            for g in self.grads
        ]
        self.params = [torch.randn(*SHAPE, **like) for _ in range(COUNT)]
        moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        counts = [torch.zeros((), device=device) for _ in range(COUNT)]
        state = torch.arange(5, device=device)
        hyper = torch.tensor([[1e-3, 0.0, 0.9, 0.999, 1e-8]] * COUNT, dtype=torch.float64)
        self.update = (*moments, counts, state, hyper.to(device))
        self.sums = [torch.zeros(*SHAPE, dtype=torch.int64, device=device) for _ in range(COUNT)]
        self.stats = torch.zeros(2, dtype=torch.int64, device=device)
        self.size = self.params[0].element_size()

    def settings(self, noise: float) -> dict[str, Any]:
        return {
            "tensor_ids": list(range(COUNT)),
            "max_grad_norm": [1.0],
            "noise_multiplier": noise,
            "expected_batch_size": float(N),
            "optimizer": "adam",
        }


def copy_of(work: roofline.Work, device: torch.device) -> Any:
    """A copy that reads and writes as many bytes together."""
    # Not of zeros: all their pages may be one.
    source = torch.ones(work.bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)
