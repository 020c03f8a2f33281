"""ChaCha20's keystream beside PyTorch's own generator."""

from __future__ import annotations

from typing import Any

import roofline
import torch

from ffa_kernels import ops

OP = "chacha20"
NUMEL = {"cuda": 1 << 26, "cpu": 1 << 20}


def bench_chacha20(race: Any, backend: str, device: Any) -> None:
    state, numel = torch.arange(5, device=device), NUMEL[device.type]
    race(
        lambda i: ops.chacha20(state, i, 0, numel // 8),
        lambda i: torch.randn(numel, device=device),
        op=OP,
        backend=backend,
        shape=(numel,),
        against="torch.randn of as many",
        work=roofline.chacha20(numel // 8),
        rounds=10,
    )
