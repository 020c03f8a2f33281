"""What every adapted layer has in common: the forward, and what the engine asks of it.

An adapter is y = base(x) + s dropout(x) A^T B^T with base and A frozen. Where its frozen weight is
a matrix of floats, or of int8 with a scale for each row, one op makes all of it; where another
module makes the base product, that runs as it is and the op adds its term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ffa_kernels import ops
from ffa_kernels.backends import cpu
from ffa_kernels.nn.record_taps import RecordTaps, tapping

_NO_KEY = torch.zeros(4, dtype=torch.int64)
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(nn.Module):
    """Base of the adapted layers; each says where its tensors lie.

    `record_taps` is set by the privacy engine while B is trained privately.
    """

    record_taps: RecordTaps | None = None
    # 256 secret bits while training privately, on B's device and renewed there by the engine;
    # zeros and repeatable otherwise.
    _dropout_key: Tensor = _NO_KEY
    takes_packed_rows = True
    in_features: int
    out_features: int

    def frozen_A(self) -> Tensor:
        """A, (r, d_in)."""
        raise NotImplementedError

    def trained_B(self) -> nn.Parameter:
        """B, (d_out, r)."""
        raise NotImplementedError

    def frozen_weight(self) -> Tensor | None:
        """W, (d_out, d_in), or None where `base_forward` makes the base product."""
        raise NotImplementedError

    def frozen_scale(self) -> Tensor | None:
        """What a `frozen_weight` in int8 is multiplied with, (d_out, 1); None for one in floats."""
        return None

    def frozen_bias(self) -> Tensor | None:
        """b, (d_out,), beside a `frozen_weight`."""
        raise NotImplementedError

    def base_forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to the base product (n, ..., d_out), differentiable in x."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """W, (d_out, d_in), in a float type, made from whatever holds it."""
        weight = self.frozen_weight()
        assert weight is not None
        return weight

    def adapter_settings(self) -> tuple[int, float, bool]:
        """(r, alpha, whether s = alpha / sqrt(r))."""
        raise NotImplementedError

    def adapter_scaling(self) -> float:
        """s."""
        raise NotImplementedError

    def adapter_dropout(self) -> float:
        """The probability with which elements of the adapter's input are dropped in training."""
        raise NotImplementedError

    def inner_modules(self) -> Iterator[nn.Module]:
        """Modules inside this one that hold its A and B, and whose forward is never called."""
        return iter(())

    # Not `merged`: PEFT's layers have a property of that name.
    def merged_layer(self) -> nn.Module:
        """A plain layer with weight W + s B A and this layer's bias."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """W + s B A, (d_out, d_in), in fp64 and rounded once to W's dtype."""
        weight = self.base_weight()
        delta = self.trained_B().detach().double() @ self.frozen_A().double()
        return (weight.double() + self.adapter_scaling() * delta).to(weight.dtype)

    def _dropout_state(self, x: Tensor) -> Tensor | None:
        if self.adapter_dropout() == 0.0 or not self.training:
            return None
        # Drawn from PyTorch's generator, which gradient checkpointing restores: the same counter,
        # and so the same mask, when the forward is run again.
        counter = torch.randint(1 << 62, (1,), device=x.device)
        key = self._dropout_key
        if key.device != x.device:
            # Zeros are made there: a copy would wait for the device.
            key = counter.new_zeros(4) if key is _NO_KEY else key.to(x.device)
        return torch.cat([key, counter])

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As nn.Module has it. Opacus, which listens here, may have been imported last."""
        from ffa_kernels.nn import opacus

        opacus.register()
        return super().register_forward_hook(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The engine's key is secret: a pickle would write it to disk, a copy would share it.
        return {**self.__dict__, "_dropout_key": _NO_KEY}

    def adapted_forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out), in autocast's dtype where that is on, else x's.

        A and B are cast to that dtype, which may be narrower than theirs.
        """
        # The first question costs a fifth of the second.
        if not torch._C._is_any_autocast_enabled():
            return self._adapted(x, None)
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype not in _AUTOCAST_FROM:
            return self._adapted(x, None)
        dtype = torch.get_autocast_dtype(device)
        if self.frozen_weight() is None:
            return self._adapted(x, dtype)
        with torch.autocast(device, enabled=False):
            return self._adapted(x, dtype)

    def _adapted(self, x: Tensor, cast: torch.dtype | None) -> Tensor:
        dtype = cast or x.dtype
        taps = self.record_taps
        B: Tensor = self.trained_B()
        tap = norm_tap = cu_seqlens = None
        mean_loss, records = False, 0
        if tapping(self, taps) and B.requires_grad:
            assert taps is not None
            tap = taps.get("lora_B", x)
            norm_tap = taps.norm_taps.get("lora_B")
            rounded = tap.dtype != dtype and torch.promote_types(dtype, tap.dtype) != tap.dtype
            if norm_tap is not None and rounded:
                # G is rounded once more on its way into the tap, so that backward does not know
                # its norm there. Counted as two calls, the norm is taken from what is in the tap.
                norm_tap = norm_tap * 2
            cu_seqlens, mean_loss, records = taps.cu_seqlens, taps.mean_loss, taps.records
        weight, scale, A = self.frozen_weight(), self.frozen_scale(), self.frozen_A()
        bias = None if weight is None else self.frozen_bias()
        base = self.base_forward(x) if weight is None else None
        if weight is not None and bias is not None and (cast or weight.dtype != dtype):
            # Beside a smaller base x may have another dtype than the bias, as it may there alone.
            bias = bias.to(dtype)
        if cast is not None:
            # x may have that dtype already, from the layer before.
            x = x.to(dtype)
            # Frozen: cast anew each time, and kept until backward, as PyTorch keeps its own.
            weight = weight if weight is None or scale is not None else weight.to(dtype)
        A, B = A if A.dtype == dtype else A.to(dtype), B if B.dtype == dtype else B.to(dtype)
        if (
            # A graph that is compiled must not depend on the number of rows.
            not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and math.prod(x.shape[:-1]) < cpu.LEAST_ROWS
            and x.is_cpu
            and weight is not None
            and weight.dtype == dtype
        ):
            y = F.linear(x, weight, bias)
            return y.add_(F.linear(F.linear(x, A), B), alpha=self.adapter_scaling())
        y = ops.linear(
            x,
            weight,
            bias,
            A,
            B,
            tap=tap,
            norm_tap=norm_tap,
            dropout_state=self._dropout_state(x),
            cu_seqlens=cu_seqlens,
            scaling=self.adapter_scaling(),
            dropout_p=self.adapter_dropout(),
            mean_loss=mean_loss,
            records=records,
            weight_scale=scale,
        )
        return y if base is None else base + y.to(base.dtype)


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name of the layer, layer, name in it, parameter) of every parameter of `model`.

    The layer is the one whose forward uses the parameter: of A and B the adapter, also where they
    lie in modules inside it.
    """
    inner = {
        id(inside)
        for layer in model.modules()
        if isinstance(layer, Adapter)
        for inside in layer.inner_modules()
    }
    for name, layer in model.named_modules():
        if id(layer) in inner:
            continue
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, Adapter):
            own["lora_B"] = layer.trained_B()
        for local, parameter in own.items():
            yield name, layer, local, parameter
