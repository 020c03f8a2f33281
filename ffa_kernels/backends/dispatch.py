"""Chooses the backend that serves an op, from the device and dtypes of its tensors.

`FFA_BACKEND=name`, set before the first op, forces one backend for a process; `use_backend(name)`
does for a block of code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ffa_kernels.errors import ConfigError

OPS = (
    "chacha20",
    "gaussian",
    "linear",
    "linear_backward",
    "per_sample_grad",
    "per_sample_backward",
    "per_sample_clip",
    "clip_accumulate",
    "private_update",
    "private_step",
)
# In order of preference; the last one serves every device and dtype. On a GPU by reasoning alone:
# no card has measured the one against the other yet.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
# Before it, `tl.dot` compiles to scalar code.
TRITON_CAPABILITY = (8, 0)
BACKENDS = ("reference", "cpu", "triton", "cuda")

_chosen: dict[tuple[object, ...], Callable[..., Any]] = {}
_forced: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(f"{source}: {name!r} is no backend; accepted: {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or `FFA_BACKEND`, if any."""
    if _forced is not None:
        return _forced
    name = os.environ.get("FFA_BACKEND")
    return _checked(name, "FFA_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces the backend `name` for every op called inside the block, in every thread.

    Raises:
        ConfigError: `name` is no backend.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend")
    _chosen.clear()
    try:
        yield
    finally:
        _forced = previous
        _chosen.clear()


def computed_in(op: str, dtypes: tuple[torch.dtype, ...]) -> set[torch.dtype]:
    """The floating dtypes that a kernel of `op` computes in, of those of its tensors."""
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if op in ("linear", "linear_backward") and torch.float32 in floating:
        # A base in bf16 beside it is multiplied as `compose.plain_product` says.
        floating.discard(torch.bfloat16)
    return floating


def backend_for(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The name of the backend that serves `op` for tensors of these dtypes on this device.

    Raises:
        ConfigError: the forced backend does not serve them.
    """
    forced = forced_backend()
    names = (forced,) if forced else CANDIDATES.get(device.type, ("reference",))
    if forced in CANDIDATES["cuda"][:-1] and device.type == "cpu" and torch.cuda.is_available():
        # Meant for what lies on the GPU: keys, draws and A are made on the CPU beside it.
        names = (forced, *CANDIDATES["cpu"])
    for name in names:
        if importlib.import_module(f"ffa_kernels.backends.{name}").supports(op, device, *dtypes):
            return name
    raise ConfigError(
        f"backend {forced!r} is forced, but does not serve {op} for {', '.join(map(str, dtypes))} "
        f"on {device}; accepted: another backend of {', '.join(BACKENDS)}"
    )


def chosen(op: str, device: torch.device, *dtypes: torch.dtype) -> tuple[str, str]:
    """The backend that serves `op`, and why it does, for `doctor`."""
    name = backend_for(op, device, dtypes)
    if forced_backend() == name:
        return name, "forced"
    candidates = CANDIDATES.get(device.type, ("reference",))
    passed = candidates[: candidates.index(name)]
    if not passed:
        return name, "preferred"
    return name, f"{' and '.join(passed)} {'do' if len(passed) > 1 else 'does'} not serve it"


def kernel(op: str, *tensors: torch.Tensor) -> Callable[..., Any]:
    """The function that computes `op` for `tensors`: same name and arguments as the op."""
    device = tensors[0].device
    key = (op, device, *[t.dtype for t in tensors])
    function = _chosen.get(key)
    if function is None:
        name = backend_for(op, device, tuple(t.dtype for t in tensors))
        function = getattr(importlib.import_module(f"ffa_kernels.backends.{name}"), op)
        _chosen[key] = function
    return function
