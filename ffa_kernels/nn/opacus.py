"""Our layers under Opacus' own PrivacyEngine: how they give gradients and norms to its hooks.

PEFT's layers taken over need nothing here: where hooks sit on the modules inside, PEFT's forward
calls those (`ffa_kernels.nn.peft`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn.adapter import Adapter


def register() -> None:
    """Tells Opacus of FFALinear and FFAWrapped, if it is imported; may be called again."""
    opacus: Any = sys.modules.get("opacus.grad_sample")
    # Not while Opacus itself is being imported.
    if opacus is None or not hasattr(opacus, "GradSampleModuleFastGradientClipping"):
        return
    from ffa_kernels.nn.linear import FFALinear
    from ffa_kernels.nn.wrapped import FFAWrapped

    for kind in (FFALinear, FFAWrapped):
        if opacus.GradSampleModule.GRAD_SAMPLERS.get(kind) is not grad_samples:
            opacus.register_grad_sampler(kind)(grad_samples)
            opacus.register_norm_sampler(kind)(grad_norms)


def grad_samples(
    layer: Adapter, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """B's gradient for each record, (n, d_out, r), as a grad sampler of Opacus.

    Args:
        layer: whose forward was called with x = activations[0], (n, ..., d_in).
        backprops: dL/dy (n, ..., d_out) of the records' own losses.

    Raises:
        PrivacyError: LoRA dropout, whose masks Opacus' hooks do not see.
    """
    return _sampled(layer, activations, backprops, 1)


def grad_norms(
    layer: Adapter, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """The norms of those gradients, (n,), as a norm sampler of Opacus' ghost clipping.

    From the gradients, which cost less than products of all pairs of tokens (B is thin).
    """
    squares = _sampled(layer, activations, backprops, 2)
    return {B: of_each[0].sqrt().to(backprops.dtype) for B, of_each in squares.items()}


def _sampled(
    layer: Adapter, activations: list[Tensor], g: Tensor, which: int
) -> dict[nn.Parameter, Tensor]:
    if layer.adapter_dropout() > 0:
        raise PrivacyError(
            f"{type(layer).__name__} has dropout {layer.adapter_dropout():g}, whose mask Opacus' "
            "hooks do not see; accepted: dropout=0, or the PrivacyEngine of ffa_kernels"
        )
    B = layer.trained_B()
    if not B.requires_grad:
        return {}
    h = activations[0].to(g.dtype) @ layer.frozen_A().to(g.dtype).t()
    made = torch.ops.ffa.per_sample_grad(
        g.contiguous(), h, None, None, layer.adapter_scaling(), False
    )
    return {B: made[which]}
