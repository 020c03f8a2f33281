"""Noise and Adam for 64 tensors, with and without the noise, beside a copy of its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import roofline
from updates import COUNT, NUMEL, SHAPE, Step, copy_of

from ffa_kernels import ops

OP = "private_update"


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["without noise", "with noise"])
def bench_private_update(race: Any, backend: str, noise: float, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.private_update(NUMEL, s.size, 2)
    race(
        lambda i: ops.private_update(s.params, s.sums, *s.update, **s.settings(noise)),
        copy_of(work, device), work=work, backend=backend, shape=(COUNT, *SHAPE),
        op=OP if noise else f"{OP}, no noise",
        against="copy of its bytes", cold=True,
    )  # fmt: skip
