"""Launches a kernel without the argument analysis that Triton repeats at every call.

Triton's own launch costs several times a small kernel's run. Here it happens once for each
specialisation of a kernel; later calls go to the compiled kernel that it returned.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ffa_kernels.backends.triton import interpreted

_compiled: dict[tuple[Any, ...], Any] = {}
_INT32_MAX = 2**31 - 1


@functools.cache
def card(device: torch.device) -> tuple[int, int]:
    """(compute capability as 10 major + minor, number of SMs); of a CPU, some card's."""
    if device.type != "cuda":
        return 80, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    floats: tuple[float, ...],
    constexprs: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> None:
    """Runs `kernel` on `grid` programs, on the current stream of the first tensor's device.

    The kernel's parameters are tensors, integers, floats and constexprs, in that order.
    `max_registers` a thread: told of a bound, ptxas stays within it; of itself it may spill to
    have more warps.
    """
    first = tensors[0]
    assert first is not None
    arguments = (*tensors, *integers, *floats, *constexprs)
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
        "maxnreg": max_registers,
    }
    if interpreted():
        kernel[(grid,)](*arguments, **options)
        return
    device = first.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(
                *(kernel, grid, tensors, integers, floats, constexprs),
                *(num_warps, num_stages, max_registers),
            )
        return
    # All that Triton specialises on: types, absence, multiples of 16, the number 1, 64-bit sizes.
    key = (
        id(kernel),
        device,
        *(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors),
        *((i == 1, i % 16 == 0, i > _INT32_MAX) for i in integers),
        *constexprs,
        num_warps,
        num_stages,
        max_registers,
    )
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(grid,)](*arguments, **options)
    else:
        compiled[grid, 1, 1](*arguments)
