"""FFALinear: a linear layer with a frozen weight, a frozen A and a trained B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels import ops
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.init import INITS, frozen_A, pissa_A
from ffa_kernels.nn.record_taps import RecordTaps, tapping


def check_adapter(r: object, alpha: object, dropout: object, init: object) -> None:
    """Raises ConfigError unless these are an adapter's possible settings."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r is {r!r}; accepted: an integer of 1 or more, the rank")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ConfigError(f"alpha is {alpha!r}; accepted: a positive number")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout!r}; accepted: 0 <= dropout < 1")
    if init not in INITS:
        raise ConfigError(f"init is {init!r}; accepted: {', '.join(INITS)}")


class FFALinear(nn.Module):
    """y = x W^T + b + (alpha / r) dropout(x) A^T B^T, of which only B is trained.

    Parameters: `weight` (d_out, d_in), `bias` (d_out,) or None and `lora_A` (r, d_in), frozen;
    `lora_B` (d_out, r), zero at the start. FFA-LoRA, arXiv 2403.12313.

    Args:
        in_features: d_in; `out_features`: d_out.
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        bias: whether there is a (frozen) bias.
        init: how A is made: "orthogonal", "kaiming", "gaussian", or "pissa" (from W's SVD).
        seed: A's public seed.
        layer: the name that, with the seed, decides A.
        dropout: LoRA dropout probability, on the adapter's input in training.
        device, dtype: of the parameters.

    Raises:
        ConfigError: an argument that is not accepted.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        *,
        bias: bool = True,
        init: str = "orthogonal",
        seed: int = 0,
        layer: str = "",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, dropout, init)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._adopt(linear, r, alpha, init, seed, layer, dropout)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 16.0,
        *,
        init: str = "orthogonal",
        seed: int = 0,
        layer: str = "",
        dropout: float = 0.0,
    ) -> FFALinear:
        """Adapts `linear`: its weight and bias are taken over, not copied, and frozen.

        Raises:
            ConfigError: `linear` is no nn.Linear, or an argument is not accepted.
        """
        check_adapter(r, alpha, dropout, init)
        if not isinstance(linear, nn.Linear):
            raise ConfigError(f"linear is {type(linear).__name__}; accepted: torch.nn.Linear")
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)
        adapted._adopt(linear, r, alpha, init, seed, layer, dropout)
        adapted.train(linear.training)
        return adapted

    def _adopt(
        self,
        linear: nn.Linear,
        r: int,
        alpha: float,
        init: str,
        seed: int,
        layer: str,
        dropout: float,
    ) -> None:
        weight = linear.weight
        if init == "pissa":
            A = pissa_A(weight, r)
        else:
            A = frozen_A(init, seed, layer, r, linear.in_features)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.alpha, self.scaling = r, float(alpha), alpha / r
        self.init, self.dropout = init, float(dropout)
        self.record_taps: RecordTaps | None = None
        # 256 secret bits from the engine while training privately; zeros and repeatable otherwise.
        self._dropout_key = torch.zeros(4, dtype=torch.int64)
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.lora_A = nn.Parameter(A.to(**like), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))

    def _dropout_state(self, x: Tensor) -> Tensor | None:
        if self.dropout == 0.0 or not self.training:
            return None
        # Drawn from PyTorch's generator, which gradient checkpointing restores: the same counter,
        # and so the same mask, when the forward is run again.
        counter = torch.randint(1 << 62, (1,), device=x.device)
        return torch.cat([self._dropout_key.to(x.device), counter])

    def __getstate__(self) -> dict[str, Any]:
        # The engine's key is secret: a pickle would write it to disk, a copy would share it.
        return {**self.__dict__, "_dropout_key": torch.zeros(4, dtype=torch.int64)}

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out)."""
        taps = self.record_taps
        tap = norm_tap = lora_B = cu_seqlens = None
        if tapping(self, taps) and self.lora_B.requires_grad:
            assert taps is not None
            tap = taps.get("lora_B", x)
            norm_tap = taps.norm_taps.get("lora_B")
            cu_seqlens = taps.cu_seqlens
            lora_B = self.lora_B.detach()
        return ops.linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B if lora_B is None else lora_B,
            tap=tap,
            norm_tap=norm_tap,
            dropout_state=self._dropout_state(x),
            cu_seqlens=cu_seqlens,
            scaling=self.scaling,
            dropout_p=self.dropout,
            mean_loss=tap is not None and taps is not None and taps.mean_loss,
        )

    def merged(self) -> nn.Linear:
        """A plain nn.Linear with weight W + s B A (in fp64, rounded once) and this bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        delta = self.scaling * (self.lora_B.detach().double() @ self.lora_A.double())
        weight = (self.weight.double() + delta).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha:g}, init={self.init}, dropout={self.dropout:g}"
        )
