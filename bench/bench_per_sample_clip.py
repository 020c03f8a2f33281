"""Clipped sum of one layer's gradients, beside the two ops that it stands for."""

from __future__ import annotations

from typing import Any

import roofline
import torch

from ffa_kernels import ops

OP = "per_sample_clip"
SETS = 4


def bench_per_sample_clip(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    m, d_out, _, r = layer
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    g = [torch.randn(16, m // 16, d_out, **like) for _ in range(SETS)]
    h = [torch.randn(16, m // 16, r, **like) for _ in range(SETS)]
    B = torch.randn(d_out, r, **like)
    total = torch.zeros(d_out, r, dtype=torch.int64, device=device)
    stats = torch.zeros(2, dtype=torch.int64, device=device)

    def in_two(i: int) -> object:
        _, G, _ = ops.per_sample_grad(g[i % SETS], h[i % SETS], B, scaling=2.0)
        return ops.clip_accumulate([G], [total], stats, None, [1.0])

    with torch.no_grad():
        race(
            lambda i: ops.per_sample_clip(
                g[i % SETS], h[i % SETS], B, total, stats, None, 1.0, scaling=2.0
            ),
            in_two, repeats=4, op=OP, backend=backend, shape=layer,
            against="per_sample_grad, then clip_accumulate",
            work=roofline.per_sample_clip(16, m // 16, d_out, r, B.element_size()),
        )  # fmt: skip
