"""private_step is clip_accumulate and private_update in one op: the same bits, and no waiting."""

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

STATE = torch.tensor([7, -8, 9, -10, 11])
SHAPES = [(3,), (4, 16), ()]
N = 5
HYPER = [0.1, 0.01, 0.9, 0.8, 1e-3]
OPTIMIZERS = ["none", "sgd", "momentum", "nesterov", "adam", "adamw"]


def records(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(N, *shape, generator=generator, device="cpu").to(
            torch.get_default_device(), dtype
        )
        for shape in SHAPES
    ]


def squares_of(grads, calls=1.0):
    return [
        torch.stack([g.double().reshape(N, -1).square().sum(1), torch.full((N,), calls).double()])
        for g in grads
    ]


def start(optimizer, bounds, dtype=torch.float32, seed=1):
    """What private_step takes after the records, as its keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [
            torch.randn(shape, generator=generator, device="cpu")
            .abs()
            .to(torch.get_default_device(), dtype)
            for shape in SHAPES
        ]

    adaptive = optimizer in ("adam", "adamw")
    return {
        "stats": torch.tensor([3, 4]),
        "params": draw(),
        "exp_avgs": draw() if adaptive or optimizer in ("momentum", "nesterov") else [],
        "exp_avg_sqs": draw() if adaptive else [],
        "steps": [] if optimizer == "none" else [torch.full((), 2.0) for _ in SHAPES],
        "rng_state": STATE.clone(),
        "hyper": torch.tensor([HYPER] * len(SHAPES), dtype=torch.float64),
        "tensor_ids": [4, 0, 2**32 - 1],
        "max_grad_norm": bounds,
        "noise_multiplier": 0.0 if math.inf in bounds else 1.1,
        "expected_batch_size": 3.7,
        "optimizer": "sgd" if optimizer in ("momentum", "nesterov") else optimizer,
        "nesterov": optimizer == "nesterov",
        "maximize": optimizer == "sgd",
    }


def tensors_of(arguments):
    found = [arguments["stats"], arguments["rng_state"]]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        found += arguments[name]
    return found


def in_turn(grads, keep, squares, arguments):
    """The two ops that private_step stands for."""
    arguments = dict(arguments)
    stats, bounds = arguments.pop("stats"), arguments["max_grad_norm"]
    sums = [
        torch.zeros(shape, dtype=torch.float64 if bound == math.inf else torch.int64)
        for shape, bound in zip(SHAPES, bounds * (len(SHAPES) // len(bounds)), strict=True)
    ]
    factors = ops.clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)
    params = arguments.pop("params")
    lists = [arguments.pop(name) for name in ("exp_avgs", "exp_avg_sqs", "steps")]
    state, hyper = arguments.pop("rng_state"), arguments.pop("hyper")
    ops.private_update(params, sums, *lists, state, hyper, **arguments)
    return factors


def in_one(grads, keep, squares, arguments):
    arguments = dict(arguments)
    return ops.private_step(grads, arguments.pop("stats"), keep, squares=squares, **arguments)


def check_same_bits(grads, keep, squares, optimizer, bounds, dtype=torch.float32):
    one, two = start(optimizer, bounds, dtype), start(optimizer, bounds, dtype)
    before = [t.clone() for t in one["params"]]
    factors = in_one(grads, keep, squares, one)
    assert torch.equal(factors, in_turn(grads, keep, squares, two))
    for a, b in zip(tensors_of(one), tensors_of(two), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert all((a != b).any() for a, b in zip(one["params"], before, strict=True))
    return one


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_two_ops_bit_for_bit(backend, optimizer):
    grads = records()
    grads[1][3, 0, 0] = math.nan
    keep = torch.tensor([True, False, True, True, True])
    one = check_same_bits(grads, keep, [], optimizer, [0.7])
    assert one["stats"].tolist() == [3 + 3, 4 + 1]
    assert one["rng_state"].tolist() == [*STATE.tolist()[:4], STATE[4].item() + 1]
    assert all(step.item() == 3 for step in one["steps"])


@pytest.mark.parametrize("bounds", [[100.0], [0.5, 2.0, 0.1], [math.inf], [math.inf, 0.5, 1.0]])
def test_equals_the_two_ops_for_each_kind_of_bound(backend, bounds):
    check_same_bits(records(), None, [], "sgd", bounds)


def test_one_bound_may_be_a_number(backend):
    grads = records()
    listed, number, in_two = (start("adam", [0.7]) for _ in range(3))
    number["max_grad_norm"] = 0.7
    assert torch.equal(in_one(grads, None, [], number), in_one(grads, None, [], listed))
    stats, params = in_two.pop("stats"), in_two.pop("params")
    sums = [torch.zeros(shape, dtype=torch.int64) for shape in SHAPES]
    ops.clip_accumulate(grads, sums, stats, None, 0.7)
    in_two["max_grad_norm"] = 0.7
    lists = [in_two.pop(name) for name in ("exp_avgs", "exp_avg_sqs", "steps")]
    ops.private_update(params, sums, *lists, in_two.pop("rng_state"), in_two.pop("hyper"), **in_two)
    for a, b, c in zip(number["params"], listed["params"], params, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("grad", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("param", [torch.float32, torch.float64])
def test_types_may_differ(backend, grad, param):
    if backend == "cpu" and grad.itemsize == 2:
        pytest.skip("the cpu backend serves float32 and float64")
    check_same_bits(records(dtype=grad), None, [], "adam", [0.7], param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits(backend, dtype):
    if backend == "cpu":
        pytest.skip("the cpu backend serves float32 and float64")
    check_same_bits(records(dtype=dtype), None, [], "sgd", [0.7], dtype)


def test_a_known_norm_stands_for_one_call_only(backend):
    grads = records()
    true = in_one(grads, None, [], start("none", [0.7]))
    assert torch.allclose(in_one(grads, None, squares_of(grads), start("none", [0.7])), true)
    # Two calls with parallel gradients: their squares sum to half of the sum's square.
    halves = [t * torch.tensor([[0.5], [1.0]]).double() for t in squares_of(grads, calls=2.0)]
    assert torch.equal(in_one(grads, None, halves, start("none", [0.7])), true)
    # After one call it is taken at its word, so that G need not be read.
    quarters = [t * torch.tensor([[4.0], [1.0]]).double() for t in squares_of(grads)]
    torch.testing.assert_close(
        in_one(grads, None, quarters, start("none", [0.7])), true / 2, rtol=1e-12, atol=0
    )
    # Record by record, and tensor by tensor.
    mixed = squares_of(grads)
    for t in mixed:
        t[1, 1:3], t[0, 1:3] = 2.0, 0.0
    torch.testing.assert_close(
        in_one(grads, None, mixed, start("none", [0.7])), true, rtol=1e-12, atol=0
    )
    check_same_bits(grads, None, mixed, "sgd", [0.7])


def test_an_empty_batch_is_noise_alone(backend):
    arguments = start("none", [0.7])
    factors = in_one([g[:0] for g in records()], None, [], arguments)
    assert factors.shape == (1, 0) and arguments["stats"].tolist() == [3, 4]
    for param, index in zip(arguments["params"], arguments["tensor_ids"], strict=True):
        z = ops.gaussian(STATE, index, param.numel(), torch.float64).view(param.shape)
        expected = (z * (1.1 * 0.7 / 3.7)).float()
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-8)


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU waits for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1]
        assert not name.startswith(("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam"])
@pytest.mark.parametrize("bounds", [[0.7], [0.5, 2.0, 0.1]])
def test_nothing_waits_for_the_device(optimizer, bounds, monkeypatch):
    pytest.importorskip("triton")
    from ffa_kernels.backends import triton

    # A kernel under the interpreter reads values on the host: it is left out.
    launched = []
    for name in ("clip_accumulate", "private_update"):
        # Not an attribute of the package: the op of that name is.
        module = sys.modules[f"ffa_kernels.backends.triton.{name}"]
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    grads, a = records(), start(optimizer, bounds)
    keep = torch.tensor([True] * N)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("tolist waits"))
    with NoWaiting():
        triton.private_step(grads, squares_of(grads), a.pop("stats"), keep, *a.values())
    # One launch of each kernel for what is aligned, one for what is not.
    assert len(launched) == 4 and len({id(kernel) for kernel in launched}) == 2


def test_the_table_of_a_step_that_broke_off_is_used_no_more(monkeypatch):
    tables = pytest.importorskip("ffa_kernels.backends.triton.tables")
    broken, other = (tables.Plan(torch.zeros(4), 0, ()) for _ in range(2))
    monkeypatch.setattr(tables, "_plans", {"broken": broken, "other": other})
    with pytest.raises(KeyboardInterrupt), tables.whole(broken):
        raise KeyboardInterrupt
    with tables.whole(other):
        pass
    assert tables._plans == {"other": other}


def call_with(**changes):
    arguments = {"grad_samples": records(), "keep": None, **start("adam", [0.7]), **changes}
    return ops.private_step(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_samples": [torch.zeros(N, 2), *records()[1:]]}, r"grad_samples\[0\] is .*\(5, 2\)"),
        ({"grad_samples": records()[1:]}, "2 grad_samples for 3 tensors; accepted: one each"),
        ({"grad_samples": []}, "0 grad_samples for 3 tensors"),
        ({"squares": [torch.zeros(2, N).double()]}, "squares are"),
        ({"squares": [torch.zeros(2, N)] * 3}, r"squares are .* accepted: none, or 3 of fp64"),
        ({"keep": torch.ones(N)}, r"accepted: None or bool \(5,\)"),
        ({"stats": torch.zeros(2)}, r"stats is torch.float32 \(2,\)"),
        ({"max_grad_norm": [1.0, 1.0]}, r"max_grad_norm is \[1.0, 1.0\]; accepted"),
        ({"max_grad_norm": [math.inf]}, "noise needs a finite max_grad_norm"),
        ({"optimizer": "rmsprop"}, "optimizer is 'rmsprop'; accepted: none, sgd, adam, adamw"),
        ({"exp_avgs": []}, "0 exp_avgs for adam; accepted: 3"),
        ({"steps": []}, "0 steps for adam; accepted: 3"),
        ({"tensor_ids": [1, 1, 2]}, r"tensor_ids are \[1, 1, 2\]; accepted: 3 different ones"),
        ({"rng_state": STATE[:4]}, r"rng_state is torch.int64 \(4,\)"),
        ({"expected_batch_size": 0.0}, "expected_batch_size is 0.0; accepted"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0; accepted"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ConfigError, match=rf"private_step: .*{message}"):
        call_with(**change)


def test_a_tensor_on_another_device_is_refused_by_its_name():
    there = {"grad_samples": records(), "squares": squares_of(records()), "keep": torch.ones(N) > 0}
    there |= start("adam", [0.7])
    names = ("stats", "keep", "rng_state", "hyper")
    for name in (*names, "grad_samples", "squares", "exp_avgs", "exp_avg_sqs", "steps", "params"):
        alone = name in names
        moved = [] if alone else [*there[name][:-1], there[name][-1].to("meta")]
        place = name if alone else rf"{name}\[2\]"
        with pytest.raises(ConfigError, match=f"private_step: {place} is on meta; accepted: "):
            ops.private_step(**there | {name: there[name].to("meta") if alone else moved})


@pytest.mark.parametrize("optimizer", ["none", "sgd", "adam"])
def test_opcheck(backend, optimizer):
    grads, arguments = records(), start(optimizer, [0.7])
    stats = arguments.pop("stats")
    torch.library.opcheck(
        torch.ops.ffa.private_step.default,
        (grads, squares_of(grads), stats, None, *arguments.values()),
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("bounds", [[0.7], [0.5, 2.0, 0.1], [math.inf, 0.5, 1.0]])
@pytest.mark.parametrize("grad, param", [("float32", "float32"), ("float64", "float32")])
def test_sizes_around_a_chunk_on_any_number_of_threads(n, bounds, grad, param, monkeypatch):
    """The CPU adds four records at a time, to a chunk of 1024 elements."""
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "SHAPES", [(1023,), (5, 205, 2), (2048,)])
    monkeypatch.setattr(module, "N", n)
    grads = records(dtype=getattr(torch, grad))
    keep = torch.ones(n, dtype=torch.bool)
    if n > 2:
        grads[1][n - 2, 3, 7, 1] = math.nan
        keep[0] = False
    steps = []
    with use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            known = squares_of(grads) if threads == 2 else []
            steps.append(check_same_bits(grads, keep, known, "adam", bounds, getattr(torch, param)))
    for other in steps[2:]:
        for a, b in zip(tensors_of(steps[0]), tensors_of(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("compiled")
def test_more_records_than_fp64_can_add_on_the_cpu(monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "SHAPES", [(1,), (), (2,)])
    monkeypatch.setattr(module, "N", (1 << 18) + 3)
    with use_backend("cpu"):
        check_same_bits(records(dtype=torch.float64), None, [], "none", [1.999, 1.5, 0.7])


class Watched(TorchDispatchMode):
    """Sees what the dispatcher is given: an op must then go by way of it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
def test_all_that_is_written_counts_a_version(watched):
    def versions(call, tensors):
        before = [t._version for t in tensors]
        if watched:
            with Watched():
                call()
        else:
            call()
        assert all(t._version > v for t, v in zip(tensors, before, strict=True))

    grads, one, two = records(), start("adam", [0.7]), start("adam", [0.7])
    one["params"] = [torch.nn.Parameter(p) for p in one["params"]]
    two["params"] = [torch.nn.Parameter(p) for p in two["params"]]
    versions(lambda: in_one(grads, None, [], one), tensors_of(one))
    sums = [torch.zeros(shape, dtype=torch.int64) for shape in SHAPES]
    stats = two.pop("stats")
    versions(lambda: ops.clip_accumulate(grads, sums, stats, None, [0.7]), [*sums, stats])
    written = [t for t in tensors_of({"stats": stats, **two}) if t is not stats] + sums
    lists = [two.pop(name) for name in ("params", "exp_avgs", "exp_avg_sqs", "steps")]
    state, hyper = two.pop("rng_state"), two.pop("hyper")
    versions(lambda: ops.private_update(lists[0], sums, *lists[1:], state, hyper, **two), written)
