"""Every op under `torch.compile(fullgraph=True)`: outputs and mutated inputs equal eager's."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.backends.dispatch import OPS

N, TOKENS, D_IN, D_OUT, R = 3, 4, 10, 7, 2
STATE = torch.tensor([3, -4, 5, -6, 7])


def draw(*sizes: int) -> Tensor:
    return torch.randn(
        *sizes, generator=torch.Generator().manual_seed(sum(sizes)), device="cpu"
    ).to(torch.get_default_device())


def layer() -> dict:
    return {
        "x": draw(N, TOKENS, D_IN),
        "weight": draw(D_OUT, D_IN),
        "bias": draw(D_OUT),
        "lora_A": draw(R, D_IN),
        "lora_B": draw(D_OUT, R),
    }


def gradients() -> dict:
    return {"g": draw(N, TOKENS, D_OUT), "h": draw(N, TOKENS, R), "lora_B": draw(D_OUT, R)}


def records() -> dict:
    return {
        "grad_samples": [draw(N, D_OUT, R), draw(N, 5)],
        "stats": torch.zeros(2).long(),
        "keep": None,
        "max_grad_norm": [0.5],
    }


def update() -> dict:
    params = [draw(D_OUT, R), draw(5)]
    return {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "steps": [torch.zeros(()) for _ in params],
        "rng_state": STATE.clone(),
        "hyper": torch.tensor([[0.1, 0.01, 0.9, 0.99, 1e-8]] * 2).double(),
        "tensor_ids": [0, 1],
        "max_grad_norm": [0.5],
        "noise_multiplier": 1.0,
        "expected_batch_size": 2.0,
        "optimizer": "adamw",
    }


def sums() -> list[Tensor]:
    return [torch.full((D_OUT, R), 1 << 30), torch.full((5,), 1 << 31)]


# What each op is called with; `linear_backward` is compiled as `linear`'s gradient.
CALLS = {
    "chacha20": lambda: {"rng_state": STATE, "tensor_id": 1, "first_block": 2, "n_blocks": 3},
    "gaussian": lambda: {"rng_state": STATE, "tensor_id": 1, "numel": 21},
    "linear": lambda: layer() | {"scaling": 0.5, "dropout_state": STATE, "dropout_p": 0.1},
    "per_sample_grad": lambda: gradients() | {"mean_loss": True},
    "per_sample_backward": lambda: (
        gradients() | {"weight": draw(D_OUT, D_IN), "lora_A": draw(R, D_IN), "mean_loss": True}
    ),
    "per_sample_clip": lambda: (
        gradients()
        | {"total": sums()[0], "stats": torch.zeros(2).long(), "keep": None, "max_grad_norm": 0.5}
    ),
    "clip_accumulate": lambda: records() | {"sums": sums()},
    "private_update": lambda: update() | {"sums": sums()},
    "private_step": lambda: records() | update(),
}


def test_no_op_is_left_out():
    assert {*CALLS, "linear_backward"} == set(OPS)


@pytest.mark.parametrize("op", CALLS)
def test_compiled_output_equals_eager(backend, op):
    torch._dynamo.reset()
    function, plain = getattr(ops, op), CALLS[op]()
    compiled = copy.deepcopy(plain)
    expected = function(**plain)
    made = torch.compile(function, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)
    for name, value in plain.items():
        if isinstance(value, Tensor | list) and name != "tensor_ids":
            torch.testing.assert_close(compiled[name], value, rtol=0, atol=0)


def test_compiled_gradients_of_linear_equal_eager(backend):
    torch._dynamo.reset()
    given = layer() | {"scaling": 0.5, "dropout_state": STATE, "dropout_p": 0.1, "mean_loss": True}
    x = given.pop("x")

    def gradients_of(call):
        inputs = x.clone().requires_grad_()
        tap = torch.zeros(()).expand(N, D_OUT, R).detach().requires_grad_()
        y = call(inputs, **given, tap=tap)
        return torch.autograd.grad((y * y).sum(), (inputs, tap))

    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(gradients_of(compiled), gradients_of(ops.linear), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_exported_layer_takes_any_number_of_rows():
    torch.manual_seed(0)
    model = ffa.convert(nn.Sequential(nn.Linear(64, 64)), r=4, target_modules=["0"]).eval()
    rows = torch.export.Dim("rows")
    made = torch.export.export(model, (torch.randn(3, 64),), dynamic_shapes=({0: rows},))
    x = torch.randn(700, 64)
    torch.testing.assert_close(made.module()(x), model(x), rtol=1e-4, atol=1e-4)
