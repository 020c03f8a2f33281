"""The adapted layer beside the frozen one: forward, backward, and what both hold in memory."""

from __future__ import annotations

import math
from typing import Any

import measure
import roofline
import torch
import torch.nn.functional as F

from ffa_kernels import ops

OP = "linear"
# Input sets to go round, so that none is found in a cache.
SETS = 4
SCALING = 2.0


class Tensors:
    """Inputs and gradients of one layer, n = 16 records."""

    def __init__(
        self, layer: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        m, d_out, d_in, r = layer
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        torch.manual_seed(0)
        self.x = [torch.randn(16, m // 16, d_in, **like) for _ in range(SETS)]
        self.g = [torch.randn(16, m // 16, d_out, **like) for _ in range(SETS)]
        self.W = torch.randn(d_out, d_in, **like) / math.sqrt(d_in)
        self.A = torch.randn(r, d_in, **like) / math.sqrt(d_in)
        self.B = torch.randn(d_out, r, **like)
        self.size = self.W.element_size()

    def frozen(self, i: int) -> torch.Tensor:
        return F.linear(self.x[i % SETS], self.W)

    def frozen_backward(self, i: int) -> torch.Tensor:
        return self.g[i % SETS] @ self.W

    def adapted(self, x: torch.Tensor, **taps: Any) -> torch.Tensor:
        return ops.linear(x, self.W, None, self.A, self.B, scaling=SCALING, **taps)


def bench_forward(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    m, d_out, d_in, r = layer
    t = Tensors(layer, device, dtype)
    with torch.no_grad():
        race(
            lambda i: t.adapted(t.x[i % SETS]), t.frozen, repeats=4, op="linear", backend=backend,
            shape=layer, against="frozen forward",
            work=roofline.linear(m, d_out, d_in, r, t.size),
        )  # fmt: skip


def bench_forward_of_peft(race: Any, layer: Any, device: Any, dtype: Any) -> None:
    m, d_out, d_in, r = layer
    t = Tensors(layer, device, dtype)
    peft = peft_layer(t.W, t.A, t.B)
    with torch.no_grad():
        race(
            lambda i: peft(t.x[i % SETS]), t.frozen, repeats=4, op="PEFT's layer", backend="PEFT",
            shape=layer, against="frozen forward",
            work=roofline.linear(m, d_out, d_in, r, t.size),
        )  # fmt: skip


def bench_backward(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    m, d_out, d_in, r = layer
    t = Tensors(layer, device, dtype)
    op = torch.ops.ffa.linear_backward
    with torch.no_grad():
        race(
            lambda i: op(t.g[i % SETS], None, t.W, t.A, t.B, None, SCALING, 0.0),
            t.frozen_backward, repeats=4, op="linear_backward", backend=backend, shape=layer,
            against="frozen backward", work=roofline.linear_backward(m, d_out, d_in, r, t.size),
        )  # fmt: skip


def bench_whole(race: Any, layer: Any, backend: str, device: Any, dtype: Any) -> None:
    """Forward, gradient of the input and each record's gradient of B, through autograd."""
    m, d_out, d_in, r = layer
    t = Tensors(layer, device, dtype)
    leaves = [x.requires_grad_() for x in t.x]
    like: dict[str, Any] = {"device": device}
    tap = torch.zeros((), dtype=dtype, **like).expand(16, d_out, r).detach().requires_grad_()
    norm_tap = torch.zeros((), dtype=torch.float64, **like).expand(2, 16).detach().requires_grad_()

    def ours(i: int) -> object:
        y = t.adapted(leaves[i % SETS], tap=tap, norm_tap=norm_tap)
        return torch.autograd.grad(y, (leaves[i % SETS], tap, norm_tap), t.g[i % SETS])

    def frozen(i: int) -> object:
        return torch.autograd.grad(t.frozen(i), leaves[i % SETS], t.g[i % SETS])

    memory = {
        "peak_bytes": measure.peak_bytes(lambda: ours(0), device),
        "floor_peak_bytes": measure.peak_bytes(lambda: frozen(0), device),
    }
    work = roofline.linear(m, d_out, d_in, r, t.size)
    work += roofline.linear_backward(m, d_out, d_in, r, t.size)
    work += roofline.per_sample_grad(16, m // 16, d_out, r, t.size)
    race(
        ours, frozen, repeats=2, op="linear, with gradients", backend=backend, shape=layer,
        against="frozen forward and backward", work=work, **memory,
    )  # fmt: skip


def peft_layer(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.nn.Module:
    """PEFT's layer of the same weights, as its users run it."""
    from peft import LoraConfig, get_peft_model

    (d_out, d_in), r = W.shape, A.shape[0]
    base = torch.nn.Linear(d_in, d_out, bias=False, device="meta")
    base.weight = torch.nn.Parameter(W, requires_grad=False)
    settings = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["0"])
    model: Any = get_peft_model(torch.nn.Sequential(base), settings)
    layer: torch.nn.Module = model.base_model.model[0]
    layer.lora_A["default"].weight = torch.nn.Parameter(A, requires_grad=False)
    layer.lora_B["default"].weight = torch.nn.Parameter(B, requires_grad=False)
    return layer.requires_grad_(False)
