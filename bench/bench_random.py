"""ChaCha20's keystream and the Gaussians made from it, beside PyTorch's own generator."""

from __future__ import annotations

from typing import Any

import pytest
import roofline
import torch

from ffa_kernels import ops

OP = "gaussian"
NUMEL = {"cuda": 1 << 26, "cpu": 1 << 20}


@pytest.mark.parametrize("op", ["chacha20", "gaussian"])
def bench_random(race: Any, op: str, backend: str, device: Any) -> None:
    state, numel = torch.arange(5, device=device), NUMEL[device.type]
    blocks = numel // 8
    runs = {
        "chacha20": lambda i: ops.chacha20(state, i, 0, blocks),
        "gaussian": lambda i: ops.gaussian(state, i, numel),
    }
    work = {"chacha20": roofline.chacha20(blocks), "gaussian": roofline.gaussian(numel, 4)}
    race(
        runs[op], lambda i: torch.randn(numel, device=device), work=work[op], op=op,
        backend=backend, shape=(numel,), against="torch.randn of as many", rounds=10,
    )  # fmt: skip
