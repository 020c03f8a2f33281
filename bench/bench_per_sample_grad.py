"""u = g B and G_i = s g_i^T h_i: each kernel beside PyTorch's two products."""

from __future__ import annotations

from typing import Any

import roofline
import torch

from ffa_kernels import ops

OP = "per_sample_grad"
SETS = 4


def bench_per_sample_grad(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    m, d_out, _, r = layer
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    g = [torch.randn(16, m // 16, d_out, **like) for _ in range(SETS)]
    h = [torch.randn(16, m // 16, r, **like) for _ in range(SETS)]
    B = torch.randn(d_out, r, **like)

    def products(i: int) -> object:
        return g[i % SETS] @ B, torch.bmm(g[i % SETS].transpose(1, 2), h[i % SETS])

    with torch.no_grad():
        race(
            lambda i: ops.per_sample_grad(g[i % SETS], h[i % SETS], B, scaling=2.0),
            products, repeats=8, op=OP, backend=backend, shape=layer,
            against="two products",
            work=roofline.per_sample_grad(16, m // 16, d_out, r, B.element_size()),
        )  # fmt: skip
