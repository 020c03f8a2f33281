"""A frozen layer's product as an op, for compilers alone: they can not see into the CPU library.

Values alone: its derivative is `ffa_kernels.nn.product`'s affair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffa_kernels.backends import compose
from ffa_kernels.errors import UnsupportedError
from ffa_kernels.ops._library import LIBRARY


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return compose.base_product(x, weight, bias, scale)


def _without_derivative(x: Tensor, *others: Any) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UnsupportedError(
            "base_product: no derivative; accepted: ffa_kernels.nn.product.Product, which has one"
        )
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = torch.ops.ffa.base_product.default(x, *others)
        return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.define(
    "base_product(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("base_product", _implementation, "CompositeExplicitAutograd")
LIBRARY.impl("base_product", _without_derivative, "Autograd")
torch.library.register_fake("ffa::base_product", _fake, lib=LIBRARY)


def base_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x W^T + b in x's dtype, where the graph that is compiled gets it as one op.

    Args:
        x: (..., d_in).
        weight: W, (d_out, d_in), of x's dtype or a narrower one; int8 with a scale.
        bias: (d_out,) of x's dtype, or None.
        scale: what W is multiplied with, (d_out, 1) or (1, d_in).
    """
    y: Tensor = torch.ops.ffa.base_product.default(x, weight, bias, scale)
    return y
