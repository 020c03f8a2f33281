"""Gaussians made from ChaCha20's keystream, beside PyTorch's own."""

from __future__ import annotations

from typing import Any

import roofline
import torch

from ffa_kernels import ops

OP = "gaussian"
NUMEL = {"cuda": 1 << 26, "cpu": 1 << 20}


def bench_gaussian(race: Any, backend: str, device: Any) -> None:
    state, numel = torch.arange(5, device=device), NUMEL[device.type]
    race(
        lambda i: ops.gaussian(state, i, numel),
        lambda i: torch.randn(numel, device=device),
        op=OP,
        backend=backend,
        shape=(numel,),
        against="torch.randn of as many",
        work=roofline.gaussian(numel, 4),
        rounds=10,
    )
