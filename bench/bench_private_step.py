"""What ends a private step, over 64 tensors of 1024 x 8 and 16 records, beside Opacus' own.

clip_accumulate, private_update (with and without noise) and private_step, which is both; the floor
is a copy of as many bytes as the op must move. All find the caches swept, as an update does that
follows a forward and a backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import roofline
import torch

from ffa_kernels import ops

OP = "private_step"
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


def bench_clip_accumulate(race: Any, backend: str, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.clip_accumulate(N, NUMEL, s.size, True)
    race(
        lambda i: ops.clip_accumulate(s.grads, s.sums, s.stats, None, [1.0], squares=s.squares),
        copy_of(work, device), work=work, op="clip_accumulate", backend=backend,
        shape=(N, COUNT, *SHAPE), against="copy of its bytes", cold=True,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["without noise", "with noise"])
def bench_private_update(race: Any, backend: str, noise: float, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.private_update(NUMEL, s.size, 2)
    race(
        lambda i: ops.private_update(s.params, s.sums, *s.update, **s.settings(noise)),
        copy_of(work, device), work=work, backend=backend, shape=(COUNT, *SHAPE),
        op="private_update" if noise else "private_update, no noise",
        against="copy of its bytes", cold=True,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["without noise", "with noise"])
def bench_private_step(race: Any, backend: str, noise: float, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.private_step(N, NUMEL, s.size, s.size, 2)
    race(
        lambda i: ops.private_step(
            s.grads, s.stats, None, s.params, *s.update, squares=s.squares, **s.settings(noise)
        ),
        copy_of(work, device), work=work, backend=backend, shape=(N, COUNT, *SHAPE), cold=True,
        op="private_step" if noise else "private_step, no noise", against="copy of its bytes",
    )  # fmt: skip


def bench_opacus(race: Any, device: Any, dtype: Any) -> None:
    """DPOptimizer.step on the same gradients, its noise from PyTorch's generator; floor: ours, with
    the records' norms made here too, as Opacus does, and not in the backward."""
    opacus = pytest.importorskip("opacus.optimizers")
    s = Step(device, dtype)
    params = [torch.nn.Parameter(p.clone()) for p in s.params]
    optimizer = opacus.DPOptimizer(
        torch.optim.Adam(params, lr=1e-3),
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=N,
    )  # fmt: skip

    def step(i: int) -> None:
        optimizer.zero_grad()
        for p, g in zip(params, s.grads, strict=True):
            # A new object, for Opacus marks what it has used.
            p.grad_sample = g.detach()  # type: ignore[attr-defined]
        optimizer.step()

    race(
        step,
        lambda i: ops.private_step(
            s.grads, s.stats, None, s.params, *s.update, **s.settings(1.0)
        ),
        op="Opacus' DPOptimizer.step", backend="Opacus", shape=(N, COUNT, *SHAPE),
        against="private_step, which makes norms too", cold=True,
    )  # fmt: skip
