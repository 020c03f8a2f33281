"""dx = g W + s u A and G_i = s g_i^T h_i: each kernel beside the frozen layer's own dx = g W."""

from __future__ import annotations

import math
from typing import Any

import roofline
import torch

from ffa_kernels import ops

OP = "per_sample_backward"
SETS = 4


def bench_per_sample_backward(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    m, d_out, d_in, r = layer
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    g = [torch.randn(16, m // 16, d_out, **like) for _ in range(SETS)]
    h = [torch.randn(16, m // 16, r, **like) for _ in range(SETS)]
    W = torch.randn(d_out, d_in, **like) / math.sqrt(d_in)
    A, B = torch.randn(r, d_in, **like), torch.randn(d_out, r, **like)

    with torch.no_grad():
        race(
            lambda i: ops.per_sample_backward(g[i % SETS], h[i % SETS], W, A, B, scaling=2.0),
            lambda i: g[i % SETS] @ W, repeats=4, op=OP, backend=backend,
            shape=layer, against="frozen backward",
            work=roofline.per_sample_backward(16, m // 16, d_out, d_in, r, W.element_size()),
        )  # fmt: skip
