"""Every op as Triton kernels, one file an op, for CUDA from compute capability 8.0.

Under `TRITON_INTERPRET=1`, set before Triton is imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from ffa_kernels.backends.dispatch import TRITON_CAPABILITY, computed_in

_MATRIX_OPS = (
    *("linear", "linear_backward", "per_sample_grad", "per_sample_backward", "per_sample_clip"),
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether kernels run as NumPy on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; CUDA builds of torch bring it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def supports(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `op` runs here for tensors of these dtypes on this device."""
    if op not in globals():
        return False
    if device.type == "cuda":
        if _capability(device) < TRITON_CAPABILITY or interpreted():
            return False
    elif device.type != "cpu" or not interpreted():
        return False
    floating = computed_in(op, dtypes)
    if op in _MATRIX_OPS:
        return len(floating) == 1 and floating <= set(_DTYPES)
    return floating <= {*_DTYPES, torch.float64}


# Where each op's function lives. The package itself is imported only where Triton is wanted.
_HOMES = {
    "chacha20": "chacha20",
    "gaussian": "gaussian",
    "linear": "linear",
    "linear_backward": "linear",
    "per_sample_grad": "per_sample_grad",
    "per_sample_backward": "per_sample_grad",
    "per_sample_clip": "per_sample_grad",
    "clip_accumulate": "clip_accumulate",
    "private_update": "private_update",
    "private_step": "private_update",
}

if installed():
    for _op, _home in _HOMES.items():
        # Over the submodule of the same name, which the import has bound.
        globals()[_op] = getattr(importlib.import_module(f"{__name__}.{_home}"), _op)
