"""Each record clipped and added to the sums of 64 tensors, beside a copy of its bytes."""

from __future__ import annotations

from typing import Any

import roofline
from updates import COUNT, NUMEL, SHAPE, N, Step, copy_of

from ffa_kernels import ops

OP = "clip_accumulate"


def bench_clip_accumulate(race: Any, backend: str, device: Any, dtype: Any) -> None:
    s = Step(device, dtype)
    work = roofline.clip_accumulate(N, NUMEL, s.size, True)
    race(
        lambda i: ops.clip_accumulate(s.grads, s.sums, s.stats, None, [1.0], squares=s.squares),
        copy_of(work, device), work=work, op=OP, backend=backend,
        shape=(N, COUNT, *SHAPE), against="copy of its bytes", cold=True,
    )  # fmt: skip
