"""How a message stores values: "fp32", "bf16" or "int8".

What is coded was noised before: rounding is post-processing and costs no privacy. "int8" keeps one
fp32 scale for each index of a matrix' shorter side (each column of a B) and rounds at random, up
or down with the probabilities that keep the mean; vectors stay fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ffa_kernels.ops import chacha20
from ffa_kernels.privacy.keys import SecretStream

CODECS = ("fp32", "bf16", "int8")

_SCALE = ".scale"
_LARGEST = 127


def layout(codec: str, name: str, shape: torch.Size) -> dict[str, tuple[torch.dtype, list[int]]]:
    """What a message holds for the tensor `name`: dtype and shape by name."""
    if codec == "bf16":
        return {name: (torch.bfloat16, list(shape))}
    if codec == "int8" and len(shape) == 2:
        scale = (torch.float32, [shape[_kept(shape)]])
        return {name: (torch.int8, list(shape)), name + _SCALE: scale}
    return {name: (torch.float32, list(shape))}


def stored(codec: str, name: str, tensor: Tensor, stream: SecretStream) -> dict[str, Tensor]:
    """The values of `tensor`, fp32 on the CPU and finite, as `layout` says.

    Args:
        stream: of the random rounding; counts on.
    """
    if codec == "bf16":
        return {name: tensor.bfloat16()}
    if codec != "int8" or tensor.dim() != 2:
        return {name: tensor}
    kept = _kept(tensor.shape)
    scale = tensor.abs().amax(dim=1 - kept, keepdim=True) / _LARGEST
    # A column of zeros, or of numbers whose scale would be one, keeps zeros.
    steps = torch.where(scale > 0, tensor / scale, 0.0)
    low = steps.floor()
    up = _uniforms(tensor.numel(), stream).view(tensor.shape) < steps - low
    whole = (low + up).clamp(-_LARGEST, _LARGEST)
    return {name: whole.to(torch.int8), name + _SCALE: scale.flatten()}


def restored(codec: str, name: str, held: dict[str, Tensor]) -> Tensor:
    """The fp32 tensor that `held` stores, with memory of its own."""
    values = held[name]
    if codec == "int8" and values.dim() == 2:
        scale = held[name + _SCALE].unsqueeze(1 - _kept(values.shape))
        return values.float() * scale
    return values.to(torch.float32, copy=True)


def _kept(shape: torch.Size) -> int:
    """The dimension with a scale for each index: the shorter, the second of two alike."""
    return 0 if shape[0] < shape[1] else 1


def _uniforms(count: int, stream: SecretStream) -> Tensor:
    """(count,) fp32 in [0, 1), multiples of 2^-24."""
    words = chacha20(stream.state, 0, 0, max(1, math.ceil(count / 16)))
    stream.state[4] += 1
    return ((words.flatten()[:count].long() >> 8) & 0xFFFFFF).float() * 2.0**-24
