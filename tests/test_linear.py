"""The adapted linear layer: gradients, rounding, what it saves, its dropout mask, compilation."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.backends import compose
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.backends.triton import choices
from ffa_kernels.backends.triton.choices import Choice, Config
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.record_taps import RecordTaps

MULTIPLIES = True
STATE = torch.tensor([101, -202, 303, -404, 2**40 + 5])
# fp64, or more elements than the interpreter has time for.
NOT_IN_TRITON = pytest.mark.parametrize(
    "backend", ["reference", "cpu", "cpu, own product"], indirect=True
)
IN_TRITON = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@dataclass
class Case:
    """One call's inputs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 0.75

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def op(self, x: Tensor | None = None, lora_B: Tensor | None = None, **options) -> Tensor:
        return ops.linear(
            self.x if x is None else x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B if lora_B is None else lora_B,
            scaling=self.scaling,
            **options,
        )


def make(shape=(4, 6), d_in=13, d_out=11, r=3, bias=True, dtype=torch.float64, seed=0) -> Case:
    def draw(*sizes: int) -> Tensor:
        t = torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu")
        return t.to(torch.get_default_device(), dtype)

    generator = torch.Generator().manual_seed(seed)
    return Case(
        draw(*shape, d_in),
        draw(d_out, d_in) / math.sqrt(d_in),
        draw(d_out) if bias else None,
        draw(r, d_in) / math.sqrt(d_in),
        draw(d_out, r),
    )


def mask_of(x: Tensor, p: float) -> Tensor:
    """The dropout factor of each element of x, from the documented layout of the keystream."""
    threshold = round(65536 * p)
    columns = x.shape[-1]
    rows, blocks_a_row = math.prod(x.shape[:-1]), -(-columns // 32)
    words = ops.chacha20(STATE, 0, 0, rows * blocks_a_row)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=-1)
    keep = (halves.view(rows, 32 * blocks_a_row)[:, :columns] >= threshold).double()
    return (keep / (1 - threshold / 65536)).to(x.dtype).view(x.shape)


def stock(case: Case, x=None, lora_B=None, tap=None, mask=None) -> Tensor:
    """The same layer in PyTorch's own operators, differentiable in x, B and tap."""
    x = case.x if x is None else x
    B = case.lora_B if lora_B is None else lora_B
    h = (x if mask is None else x * mask) @ case.lora_A.t()
    y = F.linear(x, case.weight, case.bias)
    if tap is None:
        return y + case.scaling * (h @ B.t())
    rows = h.reshape(h.shape[0], math.prod(h.shape[1:-1]), h.shape[-1])
    adapter = torch.bmm(rows, (B + tap).transpose(1, 2)).view(y.shape)
    return y + case.scaling * adapter


def ulp_of_largest(t: Tensor, dtype: torch.dtype) -> float:
    largest = t.abs().max().item() if t.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 1, 2)], ids=["2-D", "3-D", "4-D"])
def test_gradcheck_of_x_and_B(backend, shape, bias, p):
    case = make(shape, d_in=5, d_out=3, r=2, bias=bias)
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}
    x, B = case.x.requires_grad_(), case.lora_B.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, B: case.op(x, B, **options), (x, B))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 4)])
def test_without_a_weight_there_is_the_adapters_term_alone(backend, shape, p):
    case = make(shape, d_in=40, d_out=21, r=3, bias=False, dtype=torch.float32)
    options = {"dropout_state": STATE, "dropout_p": p, "mean_loss": True}
    c, made = torch.randn(*shape, 21), []
    for weight in (None, torch.zeros(21, 40)):
        x = case.x.clone().requires_grad_()
        tap = torch.zeros(shape[0], 21, 3, requires_grad=True)
        y = replace(case, weight=weight).op(x, tap=tap, **options)
        (y * c).sum().backward()
        made.append((y, x.grad, tap.grad))
    torch.testing.assert_close(*made)


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("mean_loss", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (3, 2, 4)])
def test_tap_receives_the_gradient_of_each_record(backend, shape, mean_loss, p):
    case = make(shape, d_in=40, d_out=77, r=8)
    n = shape[0]
    mask = mask_of(case.x, p) if p else None
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}
    c = torch.randn(*shape, 77, dtype=torch.float64)

    x, tap = case.x.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    tap = tap.expand(n, 77, 8).detach().requires_grad_()
    B = case.lora_B.clone().requires_grad_()
    y = case.op(x, B, tap=tap, mean_loss=mean_loss, **options)
    (y * c).sum().backward()

    x_stock = case.x.clone().requires_grad_()
    tap_stock = torch.zeros(n, 77, 8, dtype=torch.float64, requires_grad=True)
    y_stock = stock(case, x_stock, tap=tap_stock, mask=mask)
    (y_stock * c).sum().backward()

    factor = n if mean_loss else 1
    torch.testing.assert_close(y, y_stock)
    torch.testing.assert_close(x.grad, x_stock.grad)
    torch.testing.assert_close(tap.grad, factor * tap_stock.grad)
    assert B.grad is None

    g = c.reshape(n, math.prod(shape[1:]), 77)
    dropped = case.x if mask is None else case.x * mask
    h = (dropped @ case.lora_A.t()).reshape(n, math.prod(shape[1:]), 8)
    formula = torch.einsum("ntd,ntr->ndr", g, h) * case.scaling * factor
    torch.testing.assert_close(tap.grad, formula)


@NOT_IN_TRITON
def test_calls_that_share_a_tap_add_up(backend):
    case = make((3, 4))
    tap = torch.zeros(3, 11, 3, dtype=torch.float64, requires_grad=True)
    (case.op(tap=tap).sum() + 2 * case.op(2 * case.x, tap=tap).sum()).backward()
    alone = torch.zeros(3, 11, 3, dtype=torch.float64, requires_grad=True)
    case.op(tap=alone).sum().backward()
    torch.testing.assert_close(tap.grad, 5 * alone.grad)


@NOT_IN_TRITON
def test_gradients_only_where_they_are_wanted(backend):
    case = make((3, 4))
    for name in ("weight", "bias", "lora_A"):
        getattr(case, name).requires_grad_()
    x = case.x.clone().requires_grad_()
    case.op(x).sum().backward()
    assert x.grad is not None
    assert case.weight.grad is None and case.bias.grad is None and case.lora_A.grad is None
    B = case.lora_B.clone().requires_grad_()
    case.op(lora_B=B).sum().backward()
    expected = stock(case, lora_B=(C := case.lora_B.clone().requires_grad_()))
    expected.sum().backward()
    torch.testing.assert_close(B.grad, C.grad)


@NOT_IN_TRITON
@pytest.mark.parametrize("private", [False, True])
def test_frozen_tensors_get_no_gradient_where_nothing_else_asks_for_one(backend, private):
    case = make((3, 4))
    for name in ("weight", "bias", "lora_A", *(["lora_B"] if private else [])):
        getattr(case, name).requires_grad_()
    tap = torch.zeros(3, *case.lora_B.shape) if private else None
    assert not case.op(case.x, tap=tap).requires_grad


def test_an_output_that_nobody_differentiated_gives_no_tap_a_gradient(backend):
    """Zeros would tell the guard that a record's gradient has reached B."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    case = make(dtype=torch.float32)
    tap = torch.zeros(len(case.x), *case.lora_B.shape, requires_grad=True)
    Nothing.apply(case.op(case.x.requires_grad_(), tap=tap)).sum().backward()
    assert tap.grad is None and case.x.grad is None


@NOT_IN_TRITON
@pytest.mark.parametrize("merges", [False, True])
def test_a_graph_of_the_backward_has_no_way_to_B_beside_a_tap(backend, merges):
    """Else a second backward would give B a gradient that is summed over records."""
    n = 40 if merges else 2
    case = make((n, 6))
    x, B = case.x.requires_grad_(), case.lora_B.requires_grad_()
    tap = torch.zeros(n, *B.shape, dtype=B.dtype, requires_grad=True)
    y = case.op(x, lora_B=B, tap=tap)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert B.grad is tap.grad is None


def test_inside_autocast_it_computes_in_the_dtype_of_its_inputs(backend):
    case = make(dtype=torch.float32)
    tap = torch.zeros(len(case.x), *case.lora_B.shape, requires_grad=True)
    x, results = case.x.requires_grad_(), []
    for enabled in (False, True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            y = case.op(x, tap=tap)
            results.append((y, *torch.autograd.grad(y.sum(), (x, tap))))
    for plain, inside in zip(*results, strict=True):
        assert inside.dtype == torch.float32 and torch.equal(plain, inside)


@NOT_IN_TRITON
def test_dual_numbers_are_refused(backend):
    case = make()
    with torch.no_grad(), forward_ad.dual_level():
        case.op(case.x)
        for name in ("x", "weight", "lora_B"):
            dual = forward_ad.make_dual(getattr(case, name), getattr(case, name))
            with pytest.raises(NotImplementedError, match="linear: no derivative in forward mode"):
                replace(case, **{name: dual}).op()


UGLY = [
    ((5, 1), 33, 77, 1),
    ((5, 7), 33, 77, 3),
    ((5, 130), 64, 77, 64),
    ((5,), 129, 1, 8),
    ((1, 40), 1, 600, 5),
    ((2, 3, 5), 65, 257, 7),
]


ROUNDING_DRAWS = 8


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, d_in, d_out, r", UGLY)
def test_fp32_error_is_within_twice_pytorchs_own(backend, shape, d_in, d_out, r, bias, p):
    check_rounding(lambda seed: make(shape, d_in, d_out, r, bias, seed=seed), torch.float32, p)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("shape, d_in, d_out, r", UGLY)
def test_bf16_error_is_within_twice_pytorchs_own(shape, d_in, d_out, r, p):
    check_rounding(lambda seed: make(shape, d_in, d_out, r, seed=seed), torch.bfloat16, p)


def check_rounding(draw: Callable[[int], Case], dtype: torch.dtype, p: float) -> None:
    """y, dx, dB and G against fp64 on the same rounded inputs: the mean of the largest errors of
    several draws, as in a single one of five rows PyTorch's own may be tiny by luck."""
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}

    def results(case: Case, c: Tensor, run) -> list[Tensor]:
        n, (d_out, r) = case.x.shape[0], case.lora_B.shape
        x, B = case.x.clone().requires_grad_(), case.lora_B.clone().requires_grad_()
        y = run(case, x, B, None)
        dx, dB = torch.autograd.grad((y * c.to(y.dtype)).sum(), (x, B))
        x, tap = case.x.clone().requires_grad_(), case.x.new_zeros(n, d_out, r).requires_grad_()
        tapped_y = run(case, x, case.lora_B, tap)
        tapped_dx, G = torch.autograd.grad((tapped_y * c.to(y.dtype)).sum(), (x, tap))
        return [y.detach(), dx, dB, tapped_y.detach(), tapped_dx, G]

    def by_op(case, x, B, tap):
        return case.op(x, B, tap=tap, **options)

    def by_pytorch(case, x, B, tap):
        return stock(case, x, B, tap, mask_of(x, p) if p else None)

    names = ("y", "dx", "dB", "y with tap", "dx with tap", "G")
    error, allowed = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for seed in range(ROUNDING_DRAWS):
        case = draw(seed).to(dtype)
        torch.manual_seed(seed + 1)
        c = torch.randn(*case.x.shape[:-1], len(case.lora_B)).to(dtype)
        exact = results(case.to(torch.float64), c, by_pytorch)
        own, ours = results(case, c, by_pytorch), results(case, c, by_op)
        for name, truth, theirs, mine in zip(names, exact, own, ours, strict=True):
            assert mine.dtype == dtype and mine.shape == truth.shape
            twice = 2 * (theirs.double() - truth).abs().max().item() + ulp_of_largest(truth, dtype)
            error[name] += (mine.double() - truth).abs().max().item() / ROUNDING_DRAWS
            allowed[name] += twice / ROUNDING_DRAWS
    for name in names:
        assert error[name] <= allowed[name], f"{name}: {error[name]} against {allowed[name]}"


TILES = Config(16, 32, 32, 4, 2)  # more than one of them in each direction
WAY_CASES = [
    ((5, 1), 48, 77, 3, True, 0.3),
    ((18,), 33, 50, 1, False, 0.0),
    ((2, 3), 65, 40, 40, True, 0.0),
    ((6,), 16, 33, 256, True, 0.0),
    ((3,), 16, 20, 300, True, 0.3),
]


def by_ways(case: Case, p: float, g: Tensor, u: Tensor) -> list[Tensor]:
    """y, h and dx by the chosen backend."""
    state = STATE if p else None
    y, h = torch.ops.ffa.linear(
        *(case.x, case.weight, case.bias, case.lora_A, case.lora_B, None, None, state, None),
        *(case.scaling, p, False),
    )
    dx = torch.ops.ffa.linear_backward(
        *(g, u, case.weight, case.lora_A, case.lora_B, state, case.scaling, p)
    )
    return [y, h, dx]


def check_ways(case: Case, dtype: torch.dtype, p: float) -> None:
    """y, h and dx by Triton against the reference in fp64, with its error in `dtype` as measure."""
    case = case.to(dtype)
    torch.manual_seed(2)
    leading, (d_out, r) = case.x.shape[:-1], case.lora_B.shape
    g, u = torch.randn(*leading, d_out).to(dtype), torch.randn(*leading, r).to(dtype)
    ours = by_ways(case, p, g, u)
    with use_backend("reference"):
        own = by_ways(case, p, g, u)
        exact = by_ways(case.to(torch.float64), p, g.double(), u.double())
    for name, truth, theirs, mine in zip(("y", "h", "dx"), exact, own, ours, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape and mine.is_contiguous()
        own_error = (theirs.double() - truth).abs().amax() if truth.numel() else 0
        error = (mine.double() - truth).abs().amax() if truth.numel() else 0
        allowed = 2 * own_error + ulp_of_largest(truth, dtype)
        assert error <= allowed, f"{name}: {error} against {allowed}"


@IN_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", choices.WAYS)
@pytest.mark.parametrize("shape, d_in, d_out, r, bias, p", WAY_CASES)
def test_each_way_is_within_twice_pytorchs_own_error(
    backend, shape, d_in, d_out, r, bias, p, way, dtype
):
    with choices.force(way, TILES):
        check_ways(make(shape, d_in, d_out, r, bias), dtype, p)


@IN_TRITON
@pytest.mark.parametrize("op", ["linear", "linear_backward"])
def test_every_candidate_computes_the_same(backend, op):
    from ffa_kernels.backends.triton.linear import candidates

    case = make((5, 1), 48, 77, 3, True)
    for choice in candidates(op, 86, torch.float16, 5, 48, 77, 3, False):
        with choices.force(*choice):
            check_ways(case, torch.float16, 0.0)


@IN_TRITON
@pytest.mark.parametrize("way", choices.WAYS)
def test_ways_take_any_strides(backend, way):
    case = make((3, 3, 2), d_in=36, d_out=40, r=4, dtype=torch.float32)
    shuffled = replace(
        case,
        x=case.x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        weight=case.weight.t().contiguous().t(),
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        lora_A=case.lora_A.t().contiguous().t(),
        lora_B=case.lora_B.t().contiguous().t(),
    )
    spaced = replace(case, x=torch.cat([case.x, case.x], dim=-1)[..., :36])
    with choices.force(way, TILES):
        for given in (shuffled, spaced):
            check_ways(given, torch.float32, 0.3)


@IN_TRITON
@pytest.mark.parametrize("way", choices.WAYS)
@pytest.mark.parametrize("p", [0.05, 1 - 1e-9])
def test_ways_drop_what_is_documented(backend, way, p):
    x = torch.randn(7, 41)
    A, none = torch.eye(41), torch.zeros(41, 41)
    with choices.force(way, TILES):
        forward = torch.ops.ffa.linear(
            *(x, none, None, A, A, None, None, STATE, None, 1.0, p, False)
        )[0]
        backward = torch.ops.ffa.linear_backward(x, x, none, A, A, STATE, 1.0, p)
    expected = x * mask_of(x, p) if p < 1 - 2**-17 else torch.zeros(7, 41)
    torch.testing.assert_close(forward, expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(backward, expected, rtol=3e-7, atol=0)


@IN_TRITON
@pytest.mark.parametrize("way", choices.WAYS)
@pytest.mark.parametrize("shape, d_in", [((0,), 13), ((0, 2, 3), 13), ((2, 3), 0)])
def test_ways_of_nothing(backend, way, shape, d_in):
    with choices.force(way):
        if d_in:
            check_ways(make(shape, d_in=d_in), torch.float32, 0.05)
        else:
            x, W, A = torch.zeros(*shape, 0), torch.zeros(11, 0), torch.zeros(3, 0)
            b, B = torch.randn(11), torch.randn(11, 3)
            y, h = torch.ops.ffa.linear(*(x, W, b, A, B, None, None, STATE, None, 1.0, 0.05, False))
            assert torch.equal(y, b.expand(2, 3, 11)) and torch.equal(h, torch.zeros(2, 3, 3))


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch knows one name only"
)
def test_tf32_may_be_asked_for_by_either_name():
    precision = pytest.importorskip("ffa_kernels.backends.triton.dot").precision
    assert precision(torch.float32) == precision(torch.bfloat16) == "ieee"
    asked = torch.backends.cuda.matmul
    try:
        asked.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
        asked.allow_tf32 = False
        asked.fp32_precision = "tf32"
        assert precision(torch.float32) == "tf32"
    finally:
        asked.fp32_precision = "ieee"
    assert precision(torch.float32) == "ieee"


@IN_TRITON
@pytest.mark.parametrize("way", choices.WAYS)
def test_ways_do_not_overflow_h_times_scaling_in_fp16(backend, way):
    case = replace(make((4,), 16, 20, 2, False), scaling=64.0)
    case = replace(case, x=case.x * 2000, lora_B=case.lora_B * 1e-3)
    with choices.force(way, TILES):
        check_ways(case, torch.float16, 0.0)


@IN_TRITON
@pytest.mark.parametrize("way", choices.WAYS)
@pytest.mark.parametrize("scaling", [0.0, 1e-42])
def test_ways_divide_by_no_scaling_that_is_next_to_nothing(backend, way, scaling):
    with choices.force(way, TILES):
        check_ways(replace(make((4,), 16, 20, 2), scaling=scaling), torch.float32, 0.0)


def test_measured_choices_name_tiles_that_are_compiled():
    candidates = pytest.importorskip("ffa_kernels.backends.triton.linear").candidates
    for entry in json.loads(choices.TABLE.read_text())["entries"]:
        op, cc, dtype, _, dropout = choices.key_of(entry)
        config = None if entry["config"] is None else Config(**entry["config"])
        shape = [entry["figures"][name] for name in ("m", "d_in", "d_out", "r")]
        assert Choice(entry["way"], config) in candidates(
            op, cc, getattr(torch, dtype), *shape, dropout
        )
        assert choices.choose(op, cc, dtype, *shape, dropout) == Choice(entry["way"], config)


def test_unmeasured_choice_is_the_default_and_force_undoes_itself():
    asked = ("linear", 80, "bfloat16", 1, 1, 1, 1, False)
    assert choices.choose(*asked) == choices.DEFAULT
    with choices.force("split"):
        assert choices.choose(*asked) == Choice("split")
    assert choices.choose(*asked) == choices.DEFAULT
    with (
        pytest.raises(ConfigError, match="way is 'best'; accepted: addmm, stacked, split, fused"),
        choices.force("best"),
    ):
        pass


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 2, 3)])
def test_an_empty_batch(backend, shape, p, tapped):
    case = make(shape, r=2, dtype=torch.float32)
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}
    x, B = case.x.requires_grad_(), case.lora_B.requires_grad_()
    tap = torch.zeros(0, 11, 2, requires_grad=True) if tapped else None
    y = case.op(x, B, tap=tap, **options)
    assert y.shape == (*shape, 11)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if tapped:
        assert tap.grad.shape == (0, 11, 2)
    else:
        assert torch.equal(B.grad, torch.zeros(11, 2))


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_inputs_need_not_be_contiguous(backend, p):
    case = make((3, 5, 4), d_in=36, d_out=10, r=4)
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}
    strided = replace(
        case,
        weight=case.weight.t().contiguous().t(),
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        lora_A=case.lora_A.t().contiguous().t(),
        lora_B=case.lora_B.t().contiguous().t(),
    )
    c = torch.randn(3, 5, 4, 10, dtype=torch.float64)
    grads = []
    layouts = (
        lambda t: t.clone(),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    )
    for given, layout in ((case, layouts[0]), (strided, layouts[1])):
        x = layout(case.x).detach().requires_grad_()
        tap = torch.zeros(3, 10, 4, dtype=torch.float64, requires_grad=True)
        y = given.op(x, tap=tap, **options)
        y.backward(layout(c))
        B = given.lora_B.detach().requires_grad_()
        given.op(layout(case.x), B, **options).backward(layout(c))
        grads.append((y, x.grad, tap.grad, B.grad))
    assert not x.is_contiguous()
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_h_is_all_that_is_saved(backend, dropout, private):
    dtype = torch.float32
    n, T, d_in, d_out, r = 6, 31, 96, 80, 4
    layer = ffa.FFALinear(d_in, d_out, r, dropout=dropout, dtype=dtype)
    if private:
        give_tap(layer, n, dtype)
    parameters = {p.data_ptr() for p in layer.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(n, T, d_in, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    activations = [t for t in saved.values() if t.data_ptr() not in parameters]
    counters = [t for t in activations if t.dtype == torch.int64]
    assert [tuple(t.shape) for t in counters] == ([(5,)] if dropout else [])
    floats = [t for t in activations if t.dtype != torch.int64]
    assert [tuple(t.shape) for t in floats] == [(n, T, r)]
    assert sum(t.untyped_storage().nbytes() for t in floats) == n * T * r * dtype.itemsize
    y.sum().backward()
    assert x.grad is not None


def give_tap(layer: ffa.FFALinear, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tap in the layer, as the privacy engine places it."""
    layer.record_taps = RecordTaps("layer", mean_loss=True)
    zeros = torch.zeros((), dtype=dtype).expand(n, layer.out_features, layer.r)
    layer.record_taps.taps["lora_B"] = tap = zeros.detach().requires_grad_()
    return tap


def drop_ones(rows: int, columns: int, p: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """The mask's factors as forward and as backward apply them."""
    x = torch.ones(rows, columns, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(columns, dtype=torch.float64)
    weight = torch.zeros(columns, columns, dtype=torch.float64)
    y = ops.linear(x, weight, None, eye, eye, dropout_state=state, dropout_p=p)
    y.sum().backward()
    return y.detach(), x.grad


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1e-6, 1 - 1e-9])
def test_mask_is_the_documented_one_in_forward_and_backward(backend, p):
    forward, backward = drop_ones(37, 41, p, STATE)
    assert torch.equal(forward, backward)
    if p < 1 - 2**-17:
        torch.testing.assert_close(forward, mask_of(forward, p), rtol=1e-15, atol=0)
    else:
        assert torch.equal(forward, torch.zeros(37, 41, dtype=torch.float64))


@NOT_IN_TRITON
def test_mask_of_many_rows_does_not_depend_on_how_the_work_is_cut(backend):
    # More than one chunk of the CPU backend, each side of the cut at an odd number of elements.
    forward, backward = drop_ones(9001, 19, 0.25, STATE)
    assert torch.equal(forward, backward)
    torch.set_num_threads(2)
    assert torch.equal(drop_ones(9001, 19, 0.25, STATE)[0], forward)
    torch.testing.assert_close(forward, mask_of(forward, 0.25), rtol=1e-15, atol=0)


@NOT_IN_TRITON
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_mask_keeps_the_right_fraction_without_bias(backend, p):
    forward, _ = drop_ones(4000, 50, p, STATE)
    count = forward.numel()
    dropped = (forward == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / count)
    assert abs(forward.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / count)


def test_module_dropout_changes_by_call_and_repeats_under_a_seed(backend):
    layer, other = (ffa.FFALinear(64, 32, r=4, dropout=0.3) for _ in range(2))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    other.load_state_dict(layer.state_dict())
    other._dropout_key = torch.tensor([1, 2, 3, 4])
    torch.manual_seed(3)
    assert not torch.equal(other(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.merged_layer()(x), rtol=1e-5, atol=1e-5)


def test_without_dropout_the_generator_is_left_alone():
    layer = ffa.FFALinear(8, 8, r=2)
    before = torch.get_rng_state()
    layer(torch.randn(2, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(backend, use_reentrant, private):
    layers = [ffa.FFALinear(24, 24, r=3, dropout=0.05, layer=str(i)) for i in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)

    def block(x: Tensor) -> Tensor:
        return layers[1](torch.tanh(layers[0](x)))

    def gradients(run) -> list[Tensor]:
        taps = [give_tap(layer, 4) for layer in layers] if private else []
        wanted = taps or [layer.lora_B for layer in layers]
        for t in wanted:
            t.grad = None
        torch.manual_seed(11)
        x = torch.randn(4, 5, 24, requires_grad=True)
        run(x).square().sum().backward()
        return [x.grad, *(t.grad for t in wanted)]

    plain = gradients(block)
    again = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    layers[0].dropout = layers[1].dropout = 0.0
    assert not torch.equal(gradients(block)[0], plain[0])


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("tapped", [False, True])
def test_compiled_equals_eager(tapped, p, compiler):
    torch._dynamo.reset()
    case = make((4, 6), dtype=torch.float32)
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}

    def f(x: Tensor, B: Tensor, tap: Tensor | None) -> Tensor:
        return torch.tanh(case.op(torch.sin(x), B, tap=tap, mean_loss=True, **options))

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        x, B = case.x.clone().requires_grad_(), case.lora_B.clone().requires_grad_()
        tap = torch.zeros(()).expand(4, 11, 3).detach().requires_grad_() if tapped else None
        y = run(x, B, tap)
        y.square().sum().backward()
        results.append((y, x.grad, tap.grad if tapped else B.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("private", [False, True])
def test_compiled_module_equals_eager_with_dropout(private):
    torch._dynamo.reset()
    layer = ffa.FFALinear(16, 12, r=3, dropout=0.2)
    torch.nn.init.normal_(layer.lora_B)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        tap = give_tap(layer, 4) if private else None
        layer.lora_B.grad = None
        torch.manual_seed(5)
        x = torch.randn(4, 6, 16, requires_grad=True)
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, tap.grad if private else layer.lora_B.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "shape, bias, tapped, p",
    [
        ((4,), True, False, 0.0),
        ((4, 3), False, True, 0.0),
        ((4, 3), True, False, 0.05),
        ((2, 3, 2), True, True, 0.05),
    ],
)
@pytest.mark.parametrize("kind", [None, "int8"])
def test_opcheck(backend, shape, bias, tapped, p, kind):
    case = make(shape, bias=bias, dtype=torch.float32)
    base = {}
    if kind:
        case.weight, base["weight_scale"], _ = smaller(case.weight, kind)
    tap = torch.zeros(shape[0], 11, 3, requires_grad=True) if tapped else None
    norm_tap = torch.zeros(2, shape[0], dtype=torch.float64, requires_grad=True) if tapped else None
    torch.library.opcheck(
        torch.ops.ffa.linear.default,
        (
            case.x.requires_grad_(),
            case.weight,
            case.bias,
            case.lora_A,
            case.lora_B.requires_grad_(not tapped),
            tap,
            norm_tap,
            STATE if p else None,
            None,
            case.scaling,
            p,
            tapped,
        ),
        base,
    )


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_opcheck_of_backward(backend, p, kind):
    case = make((4, 3), dtype=torch.float32)
    base = {}
    if kind:
        case.weight, base["weight_scale"], _ = smaller(case.weight, kind)
    g, u = torch.randn(4, 3, 11), torch.randn(4, 3, 3)
    arguments = (g, u, case.weight, case.lora_A, case.lora_B, STATE if p else None, 0.5, p)
    torch.library.opcheck(torch.ops.ffa.linear_backward.default, arguments, base)


BYTES, SCALE = torch.ones(11, 13, dtype=torch.int8), torch.ones(11, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": torch.zeros(13).double()},
            r"x is torch.float64 \(13,\); accepted: a float type, \(n, ..., 13\)",
        ),
        (
            {"x": torch.zeros(4, 12).double()},
            r"x is torch.float64 \(4, 12\); accepted: a float type, \(n, ..., 13\)",
        ),
        ({"x": torch.zeros(4, 13)}, "weight is torch.float64; accepted: torch.float32"),
        ({"weight": torch.zeros(13).double()}, r"weight is torch.float64 \(13,\); accepted"),
        ({"bias": torch.zeros(1).double()}, r"bias is .*; accepted: None or \(11,\)"),
        ({"bias": torch.zeros(11)}, "bias is torch.float32; accepted: torch.float64"),
        ({"lora_A": torch.zeros(()).double()}, r"lora_A is \(\) and lora_B \(11, 3\)"),
        ({"lora_A": torch.zeros(3, 12).double()}, r"lora_A is \(3, 12\) and lora_B \(11, 3\)"),
        ({"lora_B": torch.zeros(3, 11).double()}, r"lora_A is \(3, 13\) and lora_B \(3, 11\)"),
        (
            {"tap": torch.zeros(3, 11, 3).double()},
            r"tap is .*\(3, 11, 3\); accepted: .*\(4, 11, 3\)",
        ),
        ({"tap": torch.zeros(4, 11, 3).long()}, "tap is torch.int64 .*accepted: a float type"),
        ({"weight": None}, "without a weight, .*accepted: .*None"),
        ({"weight": BYTES}, r"weight is torch.int8 .*accepted: .*int8 beside a weight_scale"),
        ({"weight_scale": SCALE}, r"weight_scale is .*accepted: None, or .*beside an int8 weight"),
        ({"weight": None, "bias": None, "weight_scale": SCALE}, "weight_scale is .*an int8 weight"),
        ({"weight": BYTES, "weight_scale": SCALE[:1]}, r"weight_scale is .*\(1, 1\); .*\(11, 1\)"),
        ({"weight": BYTES, "weight_scale": SCALE.int()}, "weight_scale is torch.int32 "),
        ({"weight": BYTES.int(), "weight_scale": SCALE}, r"weight_scale is .*an int8 weight"),
        ({"dropout_state": STATE[:4]}, r"dropout_state is torch.int64 \(4,\); accepted"),
        ({"dropout_state": STATE, "dropout_p": 1.0}, "dropout_p is 1.0; accepted: 0 <= p < 1"),
        ({"dropout_state": STATE, "dropout_p": -0.1}, "dropout_p is -0.1; accepted"),
    ],
)
def test_errors_name_the_argument(change, message):
    case = make()
    fields = ("x", "weight", "bias", "lora_A", "lora_B")
    arguments = {name: getattr(case, name) for name in fields} | change
    with pytest.raises(ConfigError, match=message):
        ops.linear(**arguments)


@NOT_IN_TRITON
@pytest.mark.parametrize(
    "name", ["weight", "bias", "lora_A", "lora_B", "dropout_state", "weight_scale"]
)
def test_a_tensor_on_another_device_is_refused_by_its_name(backend, name):
    case = make()
    fields = ("x", "weight", "bias", "lora_A", "lora_B")
    given = {field: getattr(case, field) for field in fields}
    given |= {"dropout_state": STATE, "dropout_p": 0.5}
    if name == "weight_scale":
        given |= {"weight": BYTES, "weight_scale": SCALE}
    with pytest.raises(ConfigError, match=f"linear: {name} is on meta; accepted: .*, as x"):
        ops.linear(**given | {name: given[name].to("meta")})


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda t: t.to("meta")])
@pytest.mark.parametrize(
    "kept", ["h", "weight", "lora_A", "lora_B", "dropout_state", "weight_scale"]
)
def test_what_hooks_give_back_as_something_else_is_refused(compiled, kept, change):
    """The kernels take addresses: what lies there must be what was kept."""
    # Few rows: nothing is merged, and each tensor's address is taken.
    case = make((2, 6), dtype=torch.float32)
    options = {}
    if kept == "weight_scale":
        change = torch.Tensor.int if change is torch.Tensor.half else change
        case.weight, options["weight_scale"], _ = smaller(case.weight, "int8")
    elif kept == "dropout_state":
        options = {"dropout_state": STATE, "dropout_p": 0.5}
    # None is not packed: the last two are each the fifth of what is.
    place = ["h", "weight", "lora_A", "lora_B", kept].index(kept)
    given = []

    def unpack(t):
        given.append(t)
        return change(t) if len(given) == place + 1 else t

    tap = torch.zeros(len(case.x), *case.lora_B.shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = case.op(case.x.requires_grad_(), tap=tap, **options)
    with pytest.raises((ConfigError, RuntimeError), match=r"accepted|dtype|device"):
        y.sum().backward()


def test_a_gradient_that_a_gradient_was_asked_of_is_refused_where_g_is_constant():
    case = make(dtype=torch.float32)
    x, B = case.x.requires_grad_(), case.lora_B.requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(case.op(x, B).sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_layer_keeps_its_adapter(backend, grad):
    layer = ffa.nn.FFALinear(8, 5, r=2)
    torch.nn.init.normal_(layer.lora_B)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, torch.randn(3, 8))
        x = torch.randn(4, 8)
        torch.testing.assert_close(traced(x), layer(x))


def smaller(weight: Tensor, kind: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """A base in bf16 or int8, its scale, and the floats that it stands for, in fp64."""
    if kind == "bf16":
        return weight.bfloat16(), None, weight.bfloat16().double()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return stored, scale, stored.double() * scale


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_base_in_fewer_bits_beside_fp32(backend, kind, p):
    case = make(shape=(3, 4), d_in=40, d_out=24, dtype=torch.float32)
    case.weight, scale, exact_W = smaller(case.weight, kind)
    x, tap = case.x.requires_grad_(), torch.zeros(3, 24, 3, requires_grad=True)
    options = {"dropout_state": STATE, "dropout_p": p} if p else {}
    y = case.op(x, tap=tap, weight_scale=scale, **options)
    g = torch.randn_like(y)
    dx, G = torch.autograd.grad(y, (x, tap), g)
    exact = replace(case.to(torch.float64), weight=exact_W)
    wide, exact_tap = exact.x.detach().requires_grad_(), tap.detach().double().requires_grad_()
    exact_y = stock(exact, wide, tap=exact_tap, mask=mask_of(wide, p) if p else None)
    exact_dx, exact_G = torch.autograd.grad(exact_y, (wide, exact_tap), g.double())
    assert y.dtype == dx.dtype == torch.float32
    # x and g are rounded to bf16 where the product is made in it: 2^-9 of each number.
    for found, wanted in ((y, exact_y), (dx, exact_dx), (G, exact_G)):
        assert (found - wanted).abs().max() <= 2.0**-6 * wanted.abs().max()
    # Nothing of a record's gradient is made in fewer bits than fp32.
    torch.testing.assert_close(G.double(), exact_G, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64])
def test_an_int8_base_beside_activations_of_any_dtype(dtype, scale_dtype):
    case = make(dtype=dtype)
    stored, scale, exact_W = smaller(make().weight, "int8")
    y = replace(case, weight=stored).op(weight_scale=scale.to(scale_dtype))
    wanted = stock(replace(case, weight=exact_W).to(torch.float64))
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)


@NOT_IN_TRITON
@pytest.mark.parametrize("name", ["x", "bias", "lora_A", "lora_B", "g"])
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("odd", ["negated", "zeros without memory"])
def test_a_tensor_without_its_values_at_its_address(backend, odd, based, name):
    case = make((3, 4), d_in=13, d_out=11, dtype=torch.float32, bias=based)
    case.weight = case.weight if based else None
    if name == "bias" and not based:
        pytest.skip("no bias without a weight")
    make_odd = (
        torch._neg_view if odd == "negated" else lambda t: torch._efficientzerotensor(t.shape)
    )
    g = torch.randn(3, 4, 11)
    results = []
    for plain in (False, True):
        given = replace(case)
        of_backward = g
        replaced = make_odd(g if name == "g" else getattr(case, name))
        replaced = replaced.clone().resolve_neg() if plain else replaced
        if name == "g":
            of_backward = replaced
        else:
            setattr(given, name, replaced)
        with torch.no_grad():
            y = given.op()
            u = of_backward @ given.lora_B
            arguments = (of_backward, u, given.weight, given.lora_A, given.lora_B, None, 0.5, 0.0)
            dx = torch.ops.ffa.linear_backward(*arguments)
            _, G, squares = ops.per_sample_grad(of_backward, torch.ones(3, 4, 3), given.lora_B)
        results.append((y, dx, G, squares))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("one_thread")
def test_dropout_rounds_a_record_as_it_does_among_others():
    """Where the last chunk of masked rows is one row, PyTorch's product rounds it otherwise."""
    torch.manual_seed(0)
    x, state = torch.randn(4, 43, 1024), torch.arange(5)
    W, A, B = torch.randn(64, 1024), torch.randn(8, 1024), torch.randn(64, 8)
    seen = []
    for n in (3, 4):
        tap = torch.zeros(n, 64, 8, requires_grad=True)
        part = x[:n].clone().requires_grad_()
        y = ops.linear(part, W, None, A, B, tap=tap, dropout_state=state, dropout_p=0.1, records=8)
        y.backward(torch.ones_like(y))
        seen.append((y[2].detach(), tap.grad[2], part.grad[2]))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def test_a_scale_of_fewer_bits_does_not_round_the_product():
    x, W = torch.randn(4, 1, 33), torch.randint(-128, 128, (40, 33), dtype=torch.int8)
    scale = torch.full((40, 1), 1000.0, dtype=torch.float16)
    y = ops.linear(x, W, None, torch.zeros(2, 33), torch.zeros(40, 2), weight_scale=scale)
    expected = (x.double() @ (1000.0 * W.double()).t()).float()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_few_rows_are_right_and_in_training_no_others_decide_them(rows, training):
    """In evaluation they do not repay the packing of W; in training, B frozen too, each row has the
    bits that it has among others."""
    torch.manual_seed(0)
    layer = ffa.FFALinear(300, 260, r=4, alpha=2.0).train(training).requires_grad_(False)
    layer.lora_B.normal_()
    x = torch.randn(8, 300)
    wide = layer.merged_weight().double()
    with torch.set_grad_enabled(training):
        y, all_rows = layer(x[:rows]), layer(x)
    expected = (x.double() @ wide.t() + layer.bias.double()).float()
    torch.testing.assert_close(y, expected[:rows], rtol=1e-4, atol=1e-4)
    if training and compose.takes_fp32(x, layer.weight):
        assert torch.equal(y, all_rows[:rows])
