"""Noise and optimizer: PyTorch's formulas, noise exact on its grid, and nothing drawn twice."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

STATE = torch.tensor([7, -8, 9, -10, 2**32 - 1])
SHAPES = [(5, 3), (7,), (), (2, 600)]
LONG = torch.int64


def grid_of(bound: float) -> float:
    return 2.0 ** (math.frexp(bound)[1] - 1 - 32)


def draw_sums(seed: int, bounds: list[float]) -> list[Tensor]:
    """Sums of about the size that a handful of clipped records leave."""
    generator = torch.Generator().manual_seed(seed)
    sums = [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if bounds[0 if len(bounds) == 1 else k] == math.inf
        else torch.randint(-(2**34), 2**34, shape, generator=generator, device="cpu")
        for k, shape in enumerate(SHAPES)
    ]
    return [total.to(torch.get_default_device()) for total in sums]


def release(sums: list[Tensor], dtype=torch.float64, state=None, **options) -> list[Tensor]:
    """The noised gradients that optimizer "none" returns."""
    # Not a default value: a test on a GPU has a constant of its own.
    state = STATE if state is None else state
    params = [torch.full(s.shape, math.nan, dtype=dtype) for s in sums]
    settings = {
        "tensor_ids": list(range(len(sums))),
        "max_grad_norm": [1.0],
        "noise_multiplier": 0.0,
        "expected_batch_size": 1.0,
    } | options
    hyper = torch.full((len(sums), 5), math.nan, dtype=torch.float64)
    ops.private_update(params, sums, [], [], [], state.clone(), hyper, optimizer="none", **settings)
    return params


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.4}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd maximize": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.1},
    ),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam decay": (
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "adam maximize": (torch.optim.Adam, {"lr": 0.01, "maximize": True, "weight_decay": 0.2}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "adamw maximize": (
        torch.optim.AdamW,
        {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.5, "maximize": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_steps_equal_pytorchs_optimizer(backend, name, dtype):
    check_against_pytorch(name, dtype)


def test_narrow_parameters_and_mixed_ones_equal_pytorchs_optimizer(backend):
    check_against_pytorch("adamw", [torch.float32, torch.float64, torch.float32, torch.float64])
    if backend == "reference":
        check_against_pytorch("momentum", torch.bfloat16)


def check_against_pytorch(name: str, dtype) -> None:
    make, options = OPTIMIZERS[name]
    bounds, batch = [0.8, 2.0, 3.0, 0.3], 12.5
    dtypes = dtype if isinstance(dtype, list) else [dtype] * len(SHAPES)
    generator = torch.Generator().manual_seed(3)
    starts = [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            torch.get_default_device(), d
        )
        for shape, d in zip(SHAPES, dtypes, strict=True)
    ]
    theirs = [p.clone().requires_grad_() for p in starts]
    # A learning rate for each tensor: parameter groups.
    rates = [options["lr"] * (k + 1) for k in range(len(SHAPES))]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(theirs, rates, strict=True)]
    optimizer = make(groups, **options)

    ours = [torch.nn.Parameter(p.clone()) for p in starts]
    buffers = [torch.zeros_like(p) for p in starts]
    squares = [torch.zeros_like(p) for p in starts]
    steps = [torch.zeros(()) for _ in starts]
    kind = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}[make.__name__]
    defaults = optimizer.defaults
    if kind == "sgd":
        firsts, columns = buffers, (defaults["momentum"], defaults["dampening"], 0.0)
        squares = []
        if defaults["momentum"] == 0:
            firsts = []
    else:
        firsts, columns = buffers, (*defaults["betas"], defaults["eps"])
    decay = defaults["weight_decay"]
    hyper = torch.tensor([[lr, decay, *columns] for lr in rates], dtype=torch.float64)
    state = STATE.clone()

    for step in range(5):
        sums = draw_sums(step, bounds)
        for p, total, bound in zip(theirs, sums, bounds, strict=True):
            p.grad = (total.double() * grid_of(bound) / batch).to(p.dtype)
        optimizer.step()
        version = ours[0]._version
        ops.private_update(
            ours,
            sums,
            firsts,
            squares,
            steps,
            state,
            hyper,
            tensor_ids=[4, 5, 6, 7],
            max_grad_norm=bounds,
            noise_multiplier=0.0,
            expected_batch_size=batch,
            optimizer=kind,
            nesterov=options.get("nesterov", False),
            maximize=options.get("maximize", False),
        )
        assert ours[0]._version > version
        assert not any(s.any() for s in sums)
        assert all(s.item() == step + 1 for s in steps)
        assert state.tolist() == [*STATE.tolist()[:4], STATE[4].item() + step + 1]
        for p, q in zip(ours, theirs, strict=True):
            # A few operations of one rounding each, over at most five steps.
            rtol = 20 * torch.finfo(p.dtype).eps
            torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
    for p, start in zip(ours, starts, strict=True):
        assert (p != start).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["none", "sgd", "adamw"])
def test_16_bit_parameters_err_at_most_twice_as_pytorchs(backend, optimizer, dtype):
    """One step, measured against the same step in fp64."""
    if backend == "cpu":
        pytest.skip("the CPU backend leaves 16-bit parameters to the reference")
    size, hyper = 700, torch.tensor([[0.05, 0.1, 0.9, 0.99, 1e-6]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    here = torch.get_default_device()
    start, first = (
        torch.randn(size, generator=generator, device="cpu").to(here, dtype) for _ in range(2)
    )
    total = torch.randint(-(2**34), 2**34, (size,), generator=generator, device="cpu").to(here)
    gradient = total.double() * grid_of(1.0) / 3.0

    def ours(dtype):
        params, buffers = [start.to(dtype, copy=True)], [first.to(dtype, copy=True)]
        squares = [first.to(dtype).square()] if optimizer == "adamw" else []
        counts = [] if optimizer == "none" else [torch.tensor(2.0)]
        ops.private_update(
            *(params, [total.clone()], [] if optimizer == "none" else buffers, squares, counts),
            *(STATE.clone(), hyper),
            tensor_ids=[0],
            max_grad_norm=[1.0],
            noise_multiplier=0.0,
            expected_batch_size=3.0,
            optimizer=optimizer,
        )
        return params[0].double()

    def theirs(dtype):
        param, grad = start.to(dtype, copy=True).requires_grad_(), gradient.to(dtype)
        if optimizer == "none":
            return grad.double()
        lr, decay, beta1, beta2, eps = hyper[0].tolist()
        if optimizer == "sgd":
            made = torch.optim.SGD(
                [param], lr, momentum=beta1, dampening=beta2, weight_decay=decay, foreach=False
            )
            made.state[param] = {"momentum_buffer": first.to(dtype, copy=True)}
        else:
            made = torch.optim.AdamW(
                [param], lr, (beta1, beta2), eps, weight_decay=decay, foreach=False
            )
            moments = {
                "exp_avg": first.to(dtype, copy=True),
                "exp_avg_sq": first.to(dtype).square(),
            }
            made.state[param] = {"step": torch.tensor(2.0), **moments}
        param.grad = grad
        made.step()
        return param.detach().double()

    exact = theirs(torch.float64)
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(exact.abs().max().item()))
    own = (theirs(dtype) - exact).abs().max()
    assert (ours(dtype) - exact).abs().max() <= 2 * own + ulp


@pytest.mark.parametrize("bounds", [[1.0], [0.7], [0.5, 3.0, 1e-3, 40.0]])
@pytest.mark.parametrize("sigma", [0.0, 1.1, 30.0])
def test_the_release_is_the_sum_plus_gaussian_noise_rounded_to_the_grid(backend, sigma, bounds):
    sums = draw_sums(1, bounds)
    before = [s.clone() for s in sums]
    ids = [9, 2**32 - 1, 0, 77]
    released = release(
        sums,
        tensor_ids=ids,
        max_grad_norm=bounds,
        noise_multiplier=sigma,
        expected_batch_size=16.0,
    )
    std = sigma * math.sqrt(sum(c * c for c in bounds))
    for k, (total, value) in enumerate(zip(before, released, strict=True)):
        grid = grid_of(bounds[0 if len(bounds) == 1 else k])
        z = ops.gaussian(STATE, ids[k], total.numel(), torch.float64).view(total.shape)
        expected = total.double() + torch.round(z * (std / grid))
        # A power of two divides: both sides are exact.
        assert torch.equal(value * 16.0 / grid, expected)
    assert not any(s.any() for s in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_divided_in_fp64_and_rounded_once(backend, dtype):
    sums = draw_sums(2, [0.7])
    before = [s.clone() for s in sums]
    released = release(sums, dtype, max_grad_norm=[0.7], expected_batch_size=3.7)
    for total, value in zip(before, released, strict=True):
        # On the CPU, for a GPU's division by a number is a product with its inverse.
        expected = (total.cpu().double() * grid_of(0.7) / 3.7).to(dtype)
        assert torch.equal(value.cpu(), expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bound", [1.0, 0.7, 1e-100, 1e100])
@pytest.mark.parametrize(
    "size",
    [1.0, 3.0, 127.3, 1 / 3, math.nextafter(2.0, 0.0), math.nextafter(1.0, 2.0), 1e-200, 1e280],
)
def test_the_cpus_division_is_a_division(bound, size):
    """It goes by way of an inverse where that has the same bits, and has them elsewhere too."""
    generator = torch.Generator().manual_seed(5)
    total = torch.randint(-(2**62), 2**62, (5003,), generator=generator)
    total >>= torch.randint(0, 62, total.shape, generator=generator)
    expected = total.double() * grid_of(bound) / size
    with use_backend("cpu"):
        (value,) = release([total], max_grad_norm=[bound], expected_batch_size=size)
    assert torch.equal(value, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_on_the_cpu_has_the_bits_of_its_formula(dtype):
    lr, decay, beta1, beta2, eps = 0.1, 0.01, 0.9, 0.999, 1e-8
    generator = torch.Generator().manual_seed(6)
    total = torch.randint(-(2**33), 2**33, (5003,), generator=generator)
    total[:100] = 0
    param, first, second = torch.randn(3, 5003, generator=generator, dtype=dtype).unbind()
    second = 10 ** (10 * second).clamp(-40, 38)
    second[:5] = torch.tensor([0.0, math.inf, math.nan, 1e-45, 3e38])
    param[0] = first[0] = 0.0

    def number(value):
        return torch.tensor(value, dtype=dtype)

    grad = (total.double() * 2.0**-32 / 3.7).to(dtype) + number(decay) * param
    exp_avg = first + number(1 - beta1) * (grad - first)
    exp_avg_sq = number(beta2) * second + number(1 - beta2) * (grad * grad)
    # PyTorch's root is off by an ulp now and then.
    exact = torch.from_numpy(np.sqrt(exp_avg_sq.numpy()))
    root = exact / number(math.sqrt(1 - beta2**3.0))
    expected = param - number(lr / (1 - beta1**3.0)) * (exp_avg / (root + number(eps)))
    hyper = torch.tensor([[lr, decay, beta1, beta2, eps]], dtype=torch.float64)
    with use_backend("cpu"):
        ops.private_update(
            [param], [total], [first], [second], [torch.tensor(2.0)], STATE.clone(), hyper,
            tensor_ids=[0], max_grad_norm=[1.0], noise_multiplier=0.0, expected_batch_size=3.7,
            optimizer="adam",
        )  # fmt: skip
    for found, wanted in ((first, exp_avg), (second, exp_avg_sq), (param, expected)):
        assert torch.equal(found.nan_to_num(7.0, 8.0), wanted.nan_to_num(7.0, 8.0))


def test_an_infinite_bound_releases_the_plain_mean(backend):
    sums = draw_sums(2, [math.inf])
    before = [s.clone() for s in sums]
    released = release(sums, max_grad_norm=[math.inf], expected_batch_size=3.7)
    for total, value in zip(before, released, strict=True):
        assert torch.equal(value.cpu(), total.cpu() / 3.7)
    assert not any(s.any() for s in sums)


@pytest.mark.parametrize("bounds, total", [([2.0], 2.0), ([0.3, 0.4, 1.2], 1.3)])
def test_noise_has_the_stated_deviation_and_is_independent(backend, bounds, total):
    # The interpreter takes a second for a thousand; the bounds below grow as it shrinks.
    n = 8_000 if backend == "triton" and not torch.cuda.is_available() else 40_000
    steps = []
    for step in (0, 1):
        state = STATE.clone()
        state[4] += step
        sums = [torch.zeros(n, dtype=LONG) for _ in range(3)]
        steps += release(
            sums,
            state=state,
            max_grad_norm=bounds,
            noise_multiplier=1.5,
            expected_batch_size=8.0,
        )
    for i, z in enumerate(steps):
        assert abs(z.std().item() / (1.5 * total / 8) - 1) < 5 / math.sqrt(2 * n)
        for other in steps[:i]:
            correlation = (z * other).mean() / (z.std() * other.std())
            assert abs(correlation.item()) < 5 / math.sqrt(n)


def test_noise_is_fresh_at_every_call(backend):
    state = STATE.clone()
    hyper = torch.zeros(1, 5, dtype=torch.float64)
    seen = set()
    for call in range(4):
        param = torch.zeros(3)
        total = torch.zeros(3, dtype=LONG)
        ops.private_update(
            [param],
            [total],
            [],
            [],
            [],
            state,
            hyper,
            tensor_ids=[0],
            max_grad_norm=[1.0],
            noise_multiplier=1.0,
            expected_batch_size=1.0,
            optimizer="none",
        )
        assert state.tolist() == [*STATE.tolist()[:4], STATE[4].item() + call + 1]
        seen.add(tuple(param.tolist()))
    assert len(seen) == 4


def test_noise_far_above_its_grid_lies_on_it(backend):
    # The other bound lifts the first tensor's noise to 2^52 of its own steps, where fp64 still has
    # halves.
    sums = [torch.zeros(400, dtype=LONG), torch.zeros(1, dtype=LONG)]
    release_of_first = release(sums, max_grad_norm=[1e-3, 40.0], noise_multiplier=30.0)[0]
    steps = release_of_first / grid_of(1e-3)
    assert ((steps.abs() > 2.0**51) & (steps.abs() < 2.0**52)).sum() > 50
    assert torch.equal(steps, steps.round())


def test_bounds_far_apart_do_not_overflow_the_grid(backend):
    sums = [torch.zeros(4000, dtype=LONG), torch.zeros(4000, dtype=LONG)]
    released = release(sums, max_grad_norm=[1e6, 1e-9], noise_multiplier=1.0)
    for value in released:
        assert abs(value.std().item() / 1e6 - 1) < 5 / math.sqrt(2 * 4000)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
def test_backends_agree_to_a_step_of_the_grid(threads):
    torch.set_num_threads(threads)
    released = {}
    for name in ("reference", "cpu"):
        with use_backend(name):
            released[name] = release(draw_sums(4, [1.0]), noise_multiplier=1.0)
    for a, b in zip(*released.values(), strict=True):
        assert (a - b).abs().max() <= 2.0**-32


def valid():
    count = 2
    return {
        "params": [torch.zeros(3), torch.zeros(2, 2)],
        "sums": [torch.zeros(3, dtype=LONG), torch.zeros(2, 2, dtype=LONG)],
        "exp_avgs": [torch.zeros(3), torch.zeros(2, 2)],
        "exp_avg_sqs": [torch.zeros(3), torch.zeros(2, 2)],
        "steps": [torch.zeros(()) for _ in range(count)],
        "rng_state": STATE.clone(),
        "hyper": torch.zeros(count, 5, dtype=torch.float64),
        "tensor_ids": [0, 1],
        "max_grad_norm": [1.0],
        "noise_multiplier": 1.0,
        "expected_batch_size": 4.0,
        "optimizer": "adam",
    }


FLOAT_SUMS = [torch.zeros(3).double(), torch.zeros(2, 2).double()]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer": "rmsprop"}, "optimizer is 'rmsprop'; accepted: none, sgd, adam, adamw"),
        ({"exp_avgs": []}, "0 exp_avgs for adam; accepted: 2"),
        ({"exp_avg_sqs": []}, "0 exp_avg_sqs for adam; accepted: 2"),
        ({"optimizer": "sgd"}, "2 exp_avg_sqs for sgd; accepted: 0"),
        ({"optimizer": "none", "exp_avg_sqs": []}, "2 steps for none; accepted: 0"),
        ({"steps": [torch.zeros(())]}, "1 steps for adam; accepted: 2"),
        ({"steps": [torch.zeros((), dtype=LONG)] * 2}, r"steps\[0\] is torch.int64 \(\)"),
        ({"steps": [torch.zeros(2)] * 2}, r"steps\[0\] is torch.float32 \(2,\)"),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(2)]}, r"exp_avgs\[1\] is torch.float32 \(2,\)"),
        ({"exp_avgs": [torch.zeros(3).double(), torch.zeros(2, 2)]}, r"exp_avgs\[0\] is torch.fl"),
        ({"exp_avg_sqs": [torch.zeros(3), torch.zeros(1, 4)]}, r"exp_avg_sqs\[1\] is .*\(1, 4\)"),
        ({"params": [torch.zeros(3), torch.zeros(4)]}, r"params\[1\] is torch.float32 \(4,\)"),
        ({"params": [torch.zeros(3), torch.zeros(2, 4)[:, ::2]]}, r"params\[1\].* contiguous"),
        ({"params": [torch.zeros(3), torch.zeros(2, 2, dtype=LONG)]}, r"params\[1\] is torch.int"),
        ({"sums": [torch.zeros(3, dtype=LONG)]}, "1 sums for 2 tensors"),
        ({"sums": FLOAT_SUMS}, r"sums\[0\] is torch.float64"),
        ({"tensor_ids": [0]}, r"tensor_ids are \[0\]; accepted: 2 different ones"),
        ({"tensor_ids": [3, 3]}, r"tensor_ids are \[3, 3\]; accepted: 2 different ones"),
        # 2^32 would wrap to the stream of 0.
        ({"tensor_ids": [0, 2**32]}, r"tensor_ids are \[0, 4294967296\]; accepted"),
        ({"tensor_ids": [0, -1]}, r"tensor_ids are \[0, -1\]; accepted"),
        ({"hyper": torch.zeros(2, 4).double()}, r"hyper is torch.float64 \(2, 4\)"),
        ({"hyper": torch.zeros(2, 5)}, r"hyper is torch.float32 \(2, 5\)"),
        ({"rng_state": STATE[:4]}, r"rng_state is torch.int64 \(4,\)"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0; accepted"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan; accepted"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf; accepted"),
        ({"max_grad_norm": [math.inf], "sums": FLOAT_SUMS}, "noise needs a finite max_grad_norm"),
        ({"max_grad_norm": [-1.0]}, r"max_grad_norm is \[-1.0\]; accepted"),
        ({"max_grad_norm": [1.0] * 3}, r"max_grad_norm is \[1.0, 1.0, 1.0\]; accepted"),
        ({"expected_batch_size": 0.0}, "expected_batch_size is 0.0; accepted"),
        ({"expected_batch_size": math.nan}, "expected_batch_size is nan; accepted"),
        ({"expected_batch_size": math.inf}, "expected_batch_size is inf; accepted"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(backend, change, message):
    arguments = valid() | change
    tensors = [*arguments["params"], *arguments["sums"], *arguments["steps"]]
    tensors += [*arguments["exp_avgs"], *arguments["exp_avg_sqs"], arguments["rng_state"]]
    before = [t.clone() for t in tensors]
    with pytest.raises(ConfigError, match=message):
        ops.private_update(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("optimizer", ["none", "sgd", "adam"])
def test_opcheck(backend, optimizer):
    arguments = valid() | {"optimizer": optimizer, "nesterov": False, "maximize": False}
    if optimizer != "adam":
        arguments["exp_avg_sqs"] = []
    if optimizer == "none":
        arguments["exp_avgs"], arguments["steps"] = [], []
    torch.library.opcheck(torch.ops.ffa.private_update.default, tuple(arguments.values()))
