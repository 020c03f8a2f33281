"""Clipping, noise and Adam in one op, beside a copy of its bytes; and Opacus' step beside it."""

from __future__ import annotations

from typing import Any

import pytest
import roofline
import torch
from updates import COUNT, NUMEL, SHAPE, N, Step, copy_of

from ffa_kernels import ops

OP = "private_step"


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["without noise", "with noise"])
def bench_private_step(race: Any, backend: str, noise: float, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.private_step(N, NUMEL, s.size, s.size, 2)
    race(
        lambda i: ops.private_step(
            s.grads, s.stats, None, s.params, *s.update, squares=s.squares, **s.settings(noise)
        ),
        copy_of(work, device), work=work, backend=backend, shape=(N, COUNT, *SHAPE), cold=True,
        op=OP if noise else f"{OP}, no noise", against="copy of its bytes",
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
