"""Trained layers that are not adapters (a head, a norm, an embedding), made to record.

The engine sets such a layer's class to its recording subclass: the object, its parameters and
its names stay. Its forward computes with detached parameters; an identity on the output then
turns dL/dy and the layer's input into the gradient of each record. `nn.Linear` uses this
library's op, the others Opacus' grad samplers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffa_kernels.nn.product import FrozenFp32Linear
from ffa_kernels.nn.record_taps import RecordTaps, tapping


class _Record(torch.autograd.Function):
    """The identity on y, whose backward gives each tap its gradient from (dL/dy, x)."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Recorded, names: tuple[str, ...], x: Tensor, y: Tensor, *taps: Tensor
    ) -> Tensor:
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(x)
        # The identity without a copy, and no view to autograd: what follows may work in place,
        # and no layer here keeps its own output for backward.
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        (x,) = ctx.saved_tensors
        if x.is_floating_point() and x.dtype != g.dtype:
            # As autocast has cast it in the forward, to the dtype that y came out in.
            x = x.to(g.dtype)
        if torch.is_autocast_enabled(g.device.type):
            # backward() called inside it, whose casts are the forward's affair.
            with torch.autocast(g.device.type, enabled=False):
                per_record = ctx.layer.grad_samples(x, g)
        else:
            per_record = ctx.layer.grad_samples(x, g)
        return None, None, None, g, *(per_record[name] for name in ctx.names)


class _Recorded(nn.Module):
    """What the recording subclasses share; `_plain` is the class whose forward they run."""

    _plain: type[nn.Module]
    record_taps: RecordTaps | None = None

    def grad_samples(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """The gradient of each trained parameter for each record, (n, *shape) by name."""
        from opacus.grad_sample import GradSampleModule

        sampler = GradSampleModule.GRAD_SAMPLERS[self._plain]
        named = dict(self.named_parameters(recurse=False))
        # Opacus' convolution sampler asks for the exact type.
        plain: Any = object.__new__(self._plain)
        object.__setattr__(plain, "__dict__", self.__dict__)
        # Contiguous: its convolutions reckon with strides of their own.
        result: dict[Any, Tensor] = sampler(plain, [x.contiguous()], g.contiguous())
        by_id = {id(parameter): grad for parameter, grad in result.items()}
        taps = self.record_taps
        factor = x.shape[0] if taps is not None and taps.mean_loss else 1
        return {name: by_id[id(p)] * factor for name, p in named.items() if id(p) in by_id}

    # PyTorch's layers name it so.
    def _forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        taps = self.record_taps
        if not tapping(self, taps):
            return self._plain.forward(self, input, *args, **kwargs)
        assert taps is not None
        names = tuple(n for n, p in self.named_parameters(recurse=False) if p.requires_grad)
        leaves = [taps.get(name, input) for name in names]
        y = self._frozen_forward(input, *args, **kwargs)
        record: Any = _Record.apply
        return record(self, names, input.detach(), y, *leaves)

    # Each layer type has its own signature; all take their input first.
    forward: Any = _forward

    def _frozen_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The plain forward, with parameters that take no gradient."""
        held: Any = self._parameters
        detached: Any = {n: None if p is None else p.detach() for n, p in held.items()}
        self._parameters = detached
        try:
            y: Tensor = self._plain.forward(self, x, *args, **kwargs)
        finally:
            self._parameters = held
        return y


class RecordedLinear(_Recorded, nn.Linear):
    """A trained nn.Linear: G_i = g_i^T x_i for the weight, sum_t g_i for the bias."""

    _plain = nn.Linear

    def _frozen_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, self.weight.detach(), None if self.bias is None else self.bias.detach())

    def grad_samples(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        taps = self.record_taps
        mean_loss = taps is not None and taps.mean_loss
        result = {}
        if self.weight.requires_grad:
            result["weight"] = torch.ops.ffa.per_sample_grad(g, x, None, None, 1.0, mean_loss)[1]
        if self.bias is not None and self.bias.requires_grad:
            summed = g.reshape(g.shape[0], g.shape[1:-1].numel(), g.shape[-1]).sum(dim=1)
            result["bias"] = summed * g.shape[0] if mean_loss else summed
        return result


class RecordedEmbedding(_Recorded, nn.Embedding):
    """A trained nn.Embedding."""

    _plain = nn.Embedding

    def grad_samples(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        result = super().grad_samples(x, g)
        if self.padding_idx is not None and "weight" in result:
            # As in PyTorch's own backward, and unlike in Opacus'.
            result["weight"][:, self.padding_idx] = 0
        return result


class RecordedLayerNorm(_Recorded, nn.LayerNorm):
    """A trained nn.LayerNorm: G_i = sum_t g_i x^_i for the weight, sum_t g_i for the bias."""

    _plain = nn.LayerNorm

    def grad_samples(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        taps = self.record_taps
        factor = x.shape[0] if taps is not None and taps.mean_loss else 1
        between = x.shape[1 : x.dim() - len(self.normalized_shape)].numel()
        shape = (x.shape[0], between, *self.normalized_shape)
        terms: dict[str, Tensor] = {}
        if self.weight is not None and self.weight.requires_grad:
            terms["weight"] = g * F.layer_norm(x, self.normalized_shape, eps=self.eps)
        if self.bias is not None and self.bias.requires_grad:
            terms["bias"] = g
        return {name: t.reshape(shape).sum(dim=1) * factor for name, t in terms.items()}


class RecordedRMSNorm(_Recorded, nn.RMSNorm):
    """A trained nn.RMSNorm."""

    _plain = nn.RMSNorm


class RecordedGroupNorm(_Recorded, nn.GroupNorm):
    """A trained nn.GroupNorm."""

    _plain = nn.GroupNorm


class RecordedConv1d(_Recorded, nn.Conv1d):
    """A trained nn.Conv1d."""

    _plain = nn.Conv1d


class RecordedConv2d(_Recorded, nn.Conv2d):
    """A trained nn.Conv2d."""

    _plain = nn.Conv2d


RECORDED: dict[type[nn.Module], type[_Recorded]] = {
    cls._plain: cls
    for cls in (
        RecordedLinear,
        RecordedEmbedding,
        RecordedLayerNorm,
        RecordedRMSNorm,
        RecordedGroupNorm,
        RecordedConv1d,
        RecordedConv2d,
    )
}
# Trained after all.
RECORDED[FrozenFp32Linear] = RecordedLinear


def plain_again(layer: nn.Module) -> None:
    """Gives a recording layer its plain class back; any other layer is left as it is."""
    if isinstance(layer, _Recorded):
        plain: Any = layer._plain
        layer.__class__ = plain
        vars(layer).pop("record_taps", None)


def is_recorded(layer: nn.Module) -> bool:
    """Whether `layer` already records."""
    return isinstance(layer, _Recorded)
