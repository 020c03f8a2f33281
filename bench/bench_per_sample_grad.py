"""u = g B and G_i = s g_i^T h_i: each kernel beside PyTorch's two products."""

from __future__ import annotations

from typing import Any

import measure
import pytest
import roofline
import torch

from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend

SETS = 4


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "reference"])
def bench_per_sample_grad(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    if backend not in measure.backends("per_sample_grad", device, dtype):
        pytest.skip("not on this device")
    m, d_out, _, r = layer
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    g = [torch.randn(16, m // 16, d_out, **like) for _ in range(SETS)]
    h = [torch.randn(16, m // 16, r, **like) for _ in range(SETS)]
    B = torch.randn(d_out, r, **like)

    def products(i: int) -> object:
        return g[i % SETS] @ B, torch.bmm(g[i % SETS].transpose(1, 2), h[i % SETS])

    with use_backend(backend), torch.no_grad():
        race(
            lambda i: ops.per_sample_grad(g[i % SETS], h[i % SETS], B, scaling=2.0),
            products, repeats=8, op="per_sample_grad", backend=backend, shape=layer,
            against="two products",
            work=roofline.per_sample_grad(16, m // 16, d_out, r, B.element_size()),
        )  # fmt: skip
