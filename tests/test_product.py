"""The CPU library's products with a frozen matrix, fp32 beside fp32 and bf16, against fp64."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import ffa_kernels as ffa
from ffa_kernels import losses
from ffa_kernels.backends import compose, cpu, native
from ffa_kernels.errors import NativeError
from ffa_kernels.nn import product
from ffa_kernels.nn.product import FrozenFp32Linear, multiply_faster
from ffa_kernels.ops.base_product import base_product

needs_bf16 = pytest.mark.skipif(
    not native.has_bf16_product(), reason="no CPU library, or no bf16 on this machine"
)
needs_library = pytest.mark.skipif(not native.available("cpu"), reason="no CPU library")
BASES = [
    pytest.param(torch.float32, marks=needs_library),
    pytest.param(torch.bfloat16, marks=needs_bf16),
]

# (rows, d_in, d_out, r): within a tile and beyond, odd, several groups of panels for few rows and
# for many, segments and blocks of a sum, rows whose copies lie in one set of the cache.
SIZES = [
    (1, 1, 1, 1),
    (5, 123, 123, 3),
    (33, 7, 45, 0),
    (64, 64, 96, 32),
    (70, 2051, 33, 33),
    (40, 600, 3300, 16),
    (1060, 2000, 1030, 3),
    (12, 193, 64, 5),
    (27, 1024, 70, 8),
    (13, 4096, 40, 0),
    (3, 0, 5, 2),
    (3, 0, 5, 0),
    (0, 8, 5, 2),
    (4, 8, 0, 2),
]


@pytest.fixture
def own(monkeypatch):
    """The library's product for fp32, which it has on every processor."""
    if not native.available("cpu"):
        pytest.skip("no CPU library")
    monkeypatch.setattr(compose, "FUSES_FP32", True)
    monkeypatch.setattr(compose, "BY_TILES", False)


def make(rows, d_in, d_out, r, base, transposed=False):
    torch.manual_seed(0)
    weight = torch.randn(d_out, d_in).to(base)
    if transposed:
        weight = weight.t().contiguous().t()
    left, term = torch.randn(rows, r), torch.randn(r, d_out)
    term = term.t().contiguous().t() if transposed else term
    return torch.randn(rows, d_in), weight, torch.randn(d_out), left, term


def exact(x, weight, bias, left, term, scaling):
    """In fp64, from x as the product rounds it to the base's type."""
    left, term = left.double() * scaling, term.double()
    return x.to(weight.dtype).double() @ weight.double().t() + left @ term + bias.double()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_exact_but_for_what_it_rounds(sizes, transposed, base):
    tensors = make(*sizes, base, transposed)
    found, wanted = cpu.product(*tensors, 1.5), exact(*tensors, 1.5)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # A sum of d_in + r products, each as large as 10 or so, in fp32; to tiles of bf16, each factor
    # of the term has 16 bits at least.
    splits = base == torch.bfloat16 and compose.BY_TILES
    terms, of_term = sizes[1] + sizes[3] + 1, 2.0**-15 if splits else 0.0
    bound = 2e-6 * math.sqrt(terms) * 4 + of_term * 1.5 * tensors[3].abs() @ tensors[4].abs()
    assert ((found - wanted).abs() <= bound).all()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("r", [1, 8, 16, 21])
def test_the_term_is_as_good_as_in_fp32_beside_any_base(r, base):
    """What is trained is in it: an update of B may be a small part of B."""
    *_, left, term = make(50, 8, 70, r, torch.float32)
    x, weight = torch.zeros(50, 8), torch.zeros(70, 8, dtype=base)
    found = cpu.product(x, weight, None, left, term, 0.7).double()
    wanted = 0.7 * left.double() @ term.double()
    tolerance = 2.0**-16 if compose.BY_TILES else 2.0**-21
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("base", BASES)
def test_without_bias_and_term_and_from_strides_of_any_kind(base):
    x, weight, bias, *_ = make(6, 40, 24, 0, base)
    wide, apart = torch.randn(6, 80), torch.randn(48, 80).to(base)[::2, ::2]
    for rows, W in [(x, weight), (wide[:, ::2], weight), (x, apart), (x.view(2, 3, 40), weight)]:
        found = cpu.product(rows, W, None)
        wanted = rows.to(base).double() @ W.double().t()
        assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    biases = torch.stack([bias, bias]).t()[:, 0]
    assert torch.equal(cpu.product(x, weight, biases), cpu.product(x, weight, bias))
    assert cpu.product(x[0], weight, bias).shape == (24,)


@pytest.mark.parametrize("base", BASES)
def test_a_row_is_the_same_in_any_batch_and_on_any_number_of_threads(base):
    x, weight, bias, left, term = make(75, 300, 130, 5, base)
    before, made = torch.get_num_threads(), []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        made.append(cpu.product(x, weight, bias, left, term, 2.0))
    torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made[1:])
    for row in (0, 11, 12, 31, 32, 74):
        alone = cpu.product(x[row : row + 1], weight, bias, left[row : row + 1], term, 2.0)
        assert torch.equal(alone, made[0][row : row + 1])


@needs_library
def test_so_it_is_where_rows_are_copied_and_sums_parted():
    x, weight, bias, left, term = make(30, 2048, 70, 5, torch.float32)
    whole = cpu.product(x, weight, bias, left, term, 2.0)
    for row in (0, 12, 29):
        alone = cpu.product(x[row : row + 1], weight, bias, left[row : row + 1], term, 2.0)
        assert torch.equal(alone, whole[row : row + 1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad, base):
    x, weight, bias, left, term = make(40, 50, 60, 4, base)
    wanted = cpu.product(x, weight, bias, left, term)
    x[7, 3] = bad
    found = cpu.product(x, weight, bias, left, term)
    assert not found[7].isfinite().any()
    others = torch.arange(40) != 7
    assert torch.equal(found[others], wanted[others])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_scaling_that_is_not_finite_makes_no_nan_of_a_number(r, base):
    x, weight, bias, *_ = make(2, 3, 4, 0, base)
    made = cpu.product(x, weight, bias, torch.ones(2, r), torch.ones(r, 4), math.inf)
    assert (made == math.inf).all()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("d_in", [384, 1536, 6000])
def test_it_is_as_near_as_pytorchs_product(base, d_in):
    x, weight, bias, *_ = make(64, d_in, 200, 0, base)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    own, theirs = (
        (product(x, weight, bias).double() - wanted).norm()
        for product in (cpu.product, compose.plain_product)
    )
    assert own < 1.1 * theirs


@needs_library
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("r", [0, 3])
def test_infinities_and_the_largest_numbers_are_as_in_fp32(r, transposed):
    """Tiles would make no number of an infinity, and an infinity of a number that rounds to one."""
    x, weight, bias, left, term = make(70, 90, 100, r, torch.float32, transposed)
    weight[:, :2] = weight[:, :2].abs() * 1e-3 + 1e-6
    x[7, 0], x[40, 1], x[69, 0] = math.inf, torch.finfo(torch.float32).max, -math.inf
    x[41, 0], x[41, 1] = math.inf, -math.inf
    if r:
        left[33, 0], term[0, 4] = math.inf, 0.0

    def check():
        found = cpu.product(x, weight, bias, left, term, 0.5)
        wanted = F.linear(x.double(), weight.double(), bias.double())
        wanted += 0.5 * left.double() @ term.double()
        assert_close(found, wanted.float(), equal_nan=True, rtol=2e-5, atol=2e-5)

    check()
    weight[50, 5] = -math.inf
    check()


@needs_library
def test_products_that_overflow_do_so_as_in_fp32():
    """A part of one may be an infinity, or two of opposite signs, where the whole is not."""
    x, weight = torch.zeros(40, 64), torch.zeros(50, 64)
    x[3, 0], weight[:, 0] = 1.99609374, 1.7e38
    x[20:, 1:], weight[:, 1:] = torch.rand(20, 63) * 1e30, torch.rand(50, 63) * 1e30
    assert_close(cpu.product(x, weight, None), F.linear(x, weight))


@needs_library
@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("d_in", [384, 2048])
def test_a_bias_costs_no_accuracy(d_in, size):
    x, weight, bias, *_ = make(64, d_in, 200, 0, torch.float32)
    bias *= size
    wanted = F.linear(x.double(), weight.double(), bias.double())
    own, theirs = ((f(x, weight, bias) - wanted).norm() for f in (cpu.product, F.linear))
    assert own < 1.1 * theirs


@needs_library
def test_numbers_too_small_for_bf16_add_less_than_the_least_one():
    x, weight = torch.full((40, 33), 1e-39), torch.ones(50, 33)
    assert cpu.product(x, weight, None).sub(33e-39).abs().max() <= 33 * 2.0**-126


@pytest.mark.parametrize("isa", ["avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("base", [*BASES, pytest.param(torch.int8, marks=needs_library)])
def test_guard_pages_beside_every_operand_are_not_touched(base, isa):
    name = str(base).removeprefix("torch.")
    command = [sys.executable, str(Path(__file__).with_name("guarded_child.py")), name]
    environment = os.environ | {"FFA_CPU_ISA": isa}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and int(done.stdout) > 100, (done.returncode, done.stderr[-2000:])


@pytest.fixture
def no_bf16(monkeypatch):
    """A processor without instructions for bf16."""
    monkeypatch.setattr(native, "has_bf16_product", lambda: False)
    monkeypatch.setattr(compose, "WIDENS_BF16", True)


def in_int8(weight, of_columns):
    """W in int8 and its scales, of its rows or of its columns."""
    shape = (1, weight.shape[1]) if of_columns else (len(weight), 1)
    return (weight * 40).clamp(-127, 127).to(torch.int8), torch.rand(shape) + 0.1


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("of_columns", [False, True])
def test_int8_is_multiplied_as_its_floats_are_in_bf16(of_columns, sizes, transposed):
    x, weight, bias, left, term = make(*sizes, torch.float32)
    stored, scale = in_int8(weight, of_columns)
    rounded = (stored * scale).bfloat16()
    if transposed:
        stored, rounded = (W.t().contiguous().t() for W in (stored, rounded))
    found = cpu.product(x, stored, bias, left, term, 1.5, scale=scale)
    assert torch.equal(found, cpu.product(x, rounded, bias, left, term, 1.5))


@needs_library
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["bf16", "int8", "int8, scales of d_in"])
def test_a_narrower_matrix_is_multiplied_as_its_floats_are(kind, sizes, transposed, no_bf16):
    x, weight, bias, left, term = make(*sizes, torch.float32)
    scale, stored = None, weight.bfloat16()
    if kind != "bf16":
        stored, scale = in_int8(weight, kind != "int8")
    floats = stored.float() if scale is None else stored * scale
    if transposed:
        stored, floats = (W.t().contiguous().t() for W in (stored, floats))
    # By vectors, as beside any scale.
    ones = torch.ones(len(floats), 1)
    found = cpu.product(x, stored, bias, left, term, 1.5, scale=scale)
    assert torch.equal(found, cpu.product(x, floats, bias, left, term, 1.5, scale=ones))
    own = cpu.product(x, floats, bias, scale=ones)
    assert torch.equal(compose.base_product(x, stored, bias, scale), own)
    theirs = compose.plain_product(x, stored, bias, scale) + 1.5 * left @ term
    wanted = exact(x, floats.double(), bias, left, term, 1.5)
    size = exact(*(t.double().abs() for t in (x, floats, bias, left, term)), 1.5)
    for result in (found, theirs):
        assert ((result - wanted).abs() <= 1e-6 * size).all()


@needs_bf16
def test_a_scale_beside_bf16_is_refused():
    with pytest.raises(NativeError, match="bf16_product"):
        cpu.product(torch.ones(1, 2), torch.ones(3, 2).bfloat16(), None, scale=torch.ones(3, 1))


@needs_library
def test_the_configuration_of_tiles_lies_in_the_library_whole():
    """Where a compiler makes it at run time, GCC leaves most of it out. A machine without tiles
    does not notice."""
    library = native._path("cpu").read_bytes()
    if b"\xc4\xe2\x78\x49" not in library:
        pytest.skip("no ldtilecfg in it")
    palette, row_bytes, rows = bytes([1] + [0] * 15), bytes([64, 0] * 8), bytes([16] * 8)
    assert palette + row_bytes + bytes(16) + rows + bytes(8) in library


@pytest.mark.parametrize(
    "pairs, told, faster",
    [
        (False, {"cpu_name": "AMD", "amx_bf16": False}, False),
        (True, {"cpu_name": "AMD", "amx_bf16": False}, True),
        (True, {"cpu_name": "Intel Xeon", "amx_bf16": True}, True),
        (True, {"cpu_name": "Intel Xeon", "amx_bf16": False}, False),
        (True, {}, True),
    ],
)
def test_bf16_is_multiplied_as_floats_where_that_is_faster(pairs, told, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert compose.bf16_is_faster() == faster


@needs_library
@pytest.mark.parametrize("base_dtype", ["bf16", "int8"])
def test_a_smaller_base_is_multiplied_as_it_is_stored(base_dtype, no_bf16, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))
    ffa.convert(model, 4, target_modules=["0"], base_dtype=base_dtype)
    x = torch.randn(5, 64, requires_grad=True)

    # The adapter's term is taken into its layer's product.
    monkeypatch.setattr(model[0].base_layer, "forward", None)

    def passes():
        y = model(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, model[0].lora_B))

    own = passes()
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    for found, wanted in zip(own, passes(), strict=True):
        assert_close(found, wanted)
    monkeypatch.undo()
    monkeypatch.setattr(native, "has_bf16_product", lambda: False)
    monkeypatch.setattr(compose, "WIDENS_BF16", True)
    monkeypatch.setattr(compose, "plain_product", None)
    for found, wanted in zip(own, passes(), strict=True):
        assert torch.equal(found, wanted)


@needs_bf16
def test_base_product_takes_it_for_fp32_beside_bf16(monkeypatch):
    x, weight, bias, *_ = make(4, 16, 8, 0, torch.bfloat16)
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    assert torch.equal(compose.base_product(x, weight, bias), cpu.product(x, weight, bias))
    monkeypatch.setattr(native, "has_bf16_product", lambda: False)
    assert torch.equal(
        compose.base_product(x, weight, bias), compose.plain_product(x, weight, bias)
    )


def test_base_product_takes_it_for_fp32_where_it_is_faster(own, monkeypatch):
    x, weight, bias, *_ = make(4, 300, 8, 0, torch.float32)
    assert torch.equal(compose.base_product(x, weight, bias), cpu.product(x, weight, bias))
    monkeypatch.setattr(cpu, "product", None)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        made = compose.base_product(x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert made.dtype == dtype
    # A gradient is PyTorch's affair.
    assert compose.base_product(x.requires_grad_(), weight, bias).requires_grad
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    assert compose.base_product(x.detach(), weight, bias).dtype == torch.float32


@pytest.mark.parametrize("refused", ["x", "bias", "weight"])
def test_what_pytorch_refuses_no_launcher_sees(own, refused):
    x, weight, bias = torch.randn(4, 300), torch.randn(300, 300), torch.randn(300)
    layer = nn.Linear(300, 300).requires_grad_(False)
    multiply_faster([layer])
    if refused == "x":
        x = x[:, :299]
    elif refused == "bias":
        layer.bias.data = bias = bias[:100]
    else:
        layer.weight.data = weight = weight[:, :299]
    for call in (lambda: layer(x), lambda: compose.base_product(x, weight, bias)):
        with pytest.raises(RuntimeError):
            call()


@needs_library
def test_by_tiles_it_takes_what_is_large(monkeypatch):
    monkeypatch.setattr(compose, "FUSES_FP32", True)
    monkeypatch.setattr(compose, "BY_TILES", True)
    weight = torch.zeros(384, 384)
    for n in (1, 4, 16):
        # However many records there are: the other product rounds otherwise.
        assert cpu.has_product(torch.zeros(n, 128, 384), weight)
        assert cpu.has_product(torch.zeros(n, 4, 32, 384), weight)
        assert not cpu.has_product(torch.zeros(n, 32, 384), weight)
        assert not cpu.has_product(torch.zeros(128 * n, 384), weight)
    assert cpu.has_product(torch.zeros(1, 32, 2048), torch.zeros(2048, 2048))
    monkeypatch.setattr(compose, "BY_TILES", False)
    assert cpu.has_product(torch.zeros(4, 384), weight)
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    assert not cpu.has_product(torch.zeros(16, 128, 384), weight)


@needs_library
def test_by_tiles_a_record_is_rounded_alike_in_any_batch(monkeypatch):
    monkeypatch.setattr(compose, "FUSES_FP32", True)
    monkeypatch.setattr(compose, "BY_TILES", True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300))
    ffa.convert(model, 4, target_modules=["0"])
    model[0].lora_B.data.normal_()
    x, found = torch.randn(9, 200, 300), []
    for n in (1, 4, 9):
        rows = x[:n].clone().requires_grad_()
        y = model(rows)
        found.append((y[0], torch.autograd.grad(y.square().sum(), rows)[0][0]))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(dx, found[0][1])


def a_faster_layer(bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(256, 320, bias=bias).requires_grad_(False)
    faster = copy.deepcopy(plain)
    multiply_faster([faster])
    assert type(faster) is FrozenFp32Linear and isinstance(faster, nn.Linear)
    return plain, faster


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 4), (2, 1, 3)])
def test_a_faster_layer_gives_what_the_plain_one_does(own, bias, leading):
    plain, faster = a_faster_layer(bias)
    for wants_gradient in (False, True):
        x = torch.randn(*leading, 256, requires_grad=wants_gradient)
        y = faster(x)
        assert_close(y, plain(x))
        assert y.requires_grad == wants_gradient
        if wants_gradient:
            g = torch.randn_like(y)
            (own_dx,), (dx,) = (torch.autograd.grad(layer(x), x, g) for layer in (faster, plain))
            assert_close(own_dx, dx)
    with torch.no_grad():
        assert not faster(x).requires_grad


def test_and_it_is_the_librarys_product_that_makes_it(own, monkeypatch):
    _, faster = a_faster_layer()
    launched, real = [], native.Library.call

    def noted(self, op, *arguments):
        launched.append(op)
        real(self, op, *arguments)

    monkeypatch.setattr(native.Library, "call", noted)
    x = torch.randn(5, 256, requires_grad=True)
    faster(x).sum().backward()
    assert launched == ["fp32_product"] * 2
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    faster(x).sum().backward()
    assert launched == ["fp32_product"] * 2


@pytest.mark.parametrize("leading", [(40,), (5, 8)])
@pytest.mark.parametrize("base_dtype", [None, "bf16", "int8"])
def test_an_activation_may_work_in_place(base_dtype, leading, own_product):
    """What a custom function gives out as a view may not be changed: no layer gives out one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    ffa.convert(model, 4, target_modules=["0"], base_dtype=base_dtype)
    x, found = torch.randn(*leading, 256, requires_grad=True), []
    for in_place in (False, True):
        model[1].inplace = model[3].inplace = in_place
        model(x).sum().backward()
        found.append((x.grad, model[0].lora_B.grad))
        x.grad = model[0].lora_B.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Odd(torch.Tensor):
    """A tensor whose values are elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            return value.inner if isinstance(value, Odd) else value

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        made = func(*args, **kwargs)
        return Odd(made) if func is torch.ops.aten.detach.default else made


def test_what_has_no_values_at_its_address_gets_pytorchs_product(own):
    plain, faster = a_faster_layer()
    x = torch.randn(40, 256)
    inputs = [
        Odd(x),
        torch._neg_view(x),
        torch._efficientzerotensor((40, 256)),
        x.to_sparse(),
        torch.randn(40, 256, dtype=torch.complex64).conj().imag,
    ]
    for odd in inputs:
        assert_close(faster(odd), plain(odd))
    for layer in (plain, faster):
        layer.weight = nn.Parameter(Odd(layer.weight.data), requires_grad=False)
    assert_close(faster(x), plain(x))
    for layer in (plain, faster):
        layer.weight = nn.Parameter(layer.weight.inner, requires_grad=False)
        layer.bias = nn.Parameter(torch._neg_view(layer.bias.data), requires_grad=False)
    assert_close(faster(x), plain(x))


def test_gradients_in_batches_and_their_tangents(own):
    plain, faster = a_faster_layer()
    x = torch.randn(4, 256, requires_grad=True)
    many, v = torch.randn(3, 4, 320), torch.randn(4, 320)
    found = []
    for layer in (faster, plain):
        (together,) = torch.autograd.grad(layer(x), x, many, is_grads_batched=True)
        y = layer(x)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), v))
            found.append((together, forward_ad.unpack_dual(dx).tangent))
    assert_close(*found)


@needs_library
@pytest.mark.parametrize("sizes", [(1, 64), (64, 1), (1, 1)])
def test_an_int8_base_of_one_row_or_column(sizes):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 2))
    ffa.convert(layer, 1, target_modules=["1"], base_dtype="int8")
    frozen = layer[0]
    x = torch.randn(5, sizes[0], requires_grad=True)
    W, g = frozen.dequantized(), torch.randn(5, sizes[1])
    near = {"rtol": 1e-2, "atol": 2e-2} if native.has_bf16_product() else {}
    assert_close(frozen(x), F.linear(x, W, frozen.bias), **near)
    assert_close(torch.autograd.grad(frozen(x), x, g)[0], g @ W, **near)


@needs_library
def test_scales_that_do_not_fit_are_refused_as_pytorch_does():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    ffa.convert(model, 1, target_modules=["1"], base_dtype="int8")
    model[0].scale.data = model[0].scale.data[:4]
    with pytest.raises(RuntimeError):
        model[0](torch.randn(2, 8))


def test_few_rows_are_pytorchs_in_evaluation_alone(own, monkeypatch):
    _, faster = a_faster_layer()
    made = []
    monkeypatch.setattr(cpu, "product", lambda x, *_, **__: made.append(len(x)) or x)
    with torch.no_grad():
        for training, rows, ours in ((True, 1, True), (False, 3, False), (False, 4, True)):
            faster.train(training)(torch.randn(rows, 256))
            assert made == [rows] * ours
            made.clear()


def test_what_asks_for_more_than_values_gets_pytorchs_product(own):
    """Derivatives of derivatives, in forward mode and of functions; casts, graphs and traces."""
    plain, faster = a_faster_layer()
    x, v = torch.randn(3, 256), torch.randn(3, 256)

    def of_a_gradient(layer):
        inputs = x.clone().requires_grad_()
        dx = torch.autograd.grad(layer(inputs).tanh().sum(), inputs, create_graph=True)[0]
        return torch.autograd.grad(dx.square().sum(), inputs)[0]

    def in_forward_mode(layer):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent

    def in_bf16(layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.clone().requires_grad_())
        assert y.dtype == torch.bfloat16
        return y.float()

    def checkpointed(layer):
        inputs = x.clone().requires_grad_()
        checkpoint(layer, inputs, use_reentrant=False).square().sum().backward()
        return inputs.grad

    def kept_elsewhere(layer):
        inputs = x.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            y = layer(inputs)
        y.square().sum().backward()
        return inputs.grad

    def without_gradients(layer):
        with torch.inference_mode():
            return layer(x).clone()

    ways = [
        *(of_a_gradient, in_forward_mode, in_bf16, checkpointed, kept_elsewhere),
        without_gradients,
        lambda layer: torch.func.vmap(layer)(x),
        lambda layer: torch.func.grad(lambda x: layer(x).tanh().sum())(x),
        lambda layer: torch.func.vmap(torch.func.grad(lambda x: layer(x).tanh().sum()))(x),
        lambda layer: torch.func.jvp(layer, (x,), (v,))[1],
        lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
        lambda layer: torch.jit.trace(layer, (x,))(x),
        lambda layer: torch.export.export(layer, (x,)).module()(x),
    ]
    for way in ways:
        assert_close(way(faster), way(plain), msg=getattr(way, "__name__", None))


def test_a_faster_layer_that_is_trained_after_all_is_trained(own):
    plain, faster = a_faster_layer()
    x = torch.randn(4, 256)
    for layer in (plain, faster):
        layer.weight.requires_grad_(True)
        layer(x).square().sum().backward()
    assert_close(faster.weight.grad, plain.weight.grad)


def test_a_faster_layer_is_saved_copied_and_pickled(own):
    plain, faster = a_faster_layer()
    x = torch.randn(2, 256)
    assert faster.state_dict().keys() == plain.state_dict().keys()
    file = io.BytesIO()
    torch.save(faster, file)
    file.seek(0)
    others = (copy.deepcopy(faster), pickle.loads(pickle.dumps(faster)),
              torch.load(file, weights_only=False))  # fmt: skip
    for other in others:
        assert type(other) is FrozenFp32Linear and torch.equal(other(x), faster(x))
    assert_close(faster.double()(x.double()), plain.double()(x.double()))


def test_convert_and_merge(own):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 8)),
        nn.Linear(256, 256, bias=False, dtype=torch.float64),
    )
    heard = []
    model[2].register_forward_hook(lambda *_: heard.append(1))
    objects = list(model)
    x = torch.randn(3, 256)
    wanted = model[:4](x)
    ffa.convert(model, 4, target_modules=["0"], modules_to_save=["4"])
    kinds = ["FFALinear", "Tanh", "FrozenFp32Linear", "Linear", "Linear"]
    assert [type(layer).__name__ for layer in model] == kinds
    assert list(model)[1:] == objects[1:] and len(heard) == 1
    assert_close(model[:4](x), wanted)
    assert len(heard) == 2
    # A second adapter's layer may be one that was made faster.
    ffa.merge(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, *[nn.Linear] * 3]
    multiply_faster([model[2].requires_grad_(False)])
    ffa.convert(model, 4, target_modules=["2"])
    assert type(model[2]).__name__ == "FFALinear"
    assert_close(model[:4](x), wanted)


def test_convert_makes_nothing_faster_where_pytorch_is_as_fast(monkeypatch):
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    ffa.convert(model, 4, target_modules=["0"])
    assert type(model[1]) is nn.Linear


def test_a_head_that_was_frozen_and_made_faster_records_once_it_is_trained(own):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    ffa.convert(model, 4, target_modules=["0"])
    assert type(model[1]) is FrozenFp32Linear
    model[1].requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    data = torch.utils.data.TensorDataset(torch.randn(6, 256))
    model, optimizer, loader = ffa.PrivacyEngine(seed=1).make_private(
        module=model, optimizer=torch.optim.SGD(trained, lr=0.1), noise_multiplier=1.0,
        data_loader=torch.utils.data.DataLoader(data, batch_size=6), max_grad_norm=1.0,
        poisson_sampling=False,
    )  # fmt: skip
    for (x,) in loader:
        model(x).square().sum(dim=1).mean().backward()
        assert [p.grad_sample.shape for p in trained] == [(6, *p.shape) for p in trained]
        optimizer.step()


def test_the_chunked_loss_takes_it_for_a_frozen_head(own_product):
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 5, 160, requires_grad=True), torch.randn(700, 160)
    labels = torch.randint(700, (3, 5))
    found = losses.chunked_causal_lm_loss(hidden, head, labels, chunk_elements=2100)
    wanted = losses.causal_lm_loss(hidden @ head.t(), labels)
    assert_close(found, wanted)
    assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (found, wanted)))


@pytest.fixture(params=[None, "bf16", "int8"])
def compiled_model(request, own, monkeypatch):
    """A converted model whose first layer alone is adapted."""
    monkeypatch.setattr(product, "_MULTIPLIED", {torch.float32, torch.bfloat16, torch.int8})
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 320), nn.Linear(320, 240))
    return ffa.convert(model, 4, target_modules=["0"], base_dtype=request.param)


def graphs_of(model, *inputs):
    """The operators of the forward and of the backward that are compiled."""
    found = []

    def noted(graph, _):
        found.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=noted), fullgraph=True)
    return compiled(*inputs), found


def test_a_compiled_model_has_the_librarys_product(compiled_model):
    x = torch.randn(3, 5, 256, requires_grad=True)
    y, graphs = graphs_of(compiled_model, x)
    wanted = compiled_model(x)
    assert torch.equal(y, wanted)
    asked = (x, compiled_model[0].lora_B)
    found, theirs = (torch.autograd.grad(made.sum(), asked) for made in (y, wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    assert [graph.count("ffa.base_product.default") for graph in graphs] == [2, 2]


@pytest.mark.parametrize("tokens, ops", [(20, 0), (400, 1)])
def test_where_tiles_multiply_a_compiled_layer_is_an_op_if_large(own, tokens, ops, monkeypatch):
    monkeypatch.setattr(compose, "BY_TILES", True)
    monkeypatch.setattr(product, "_MULTIPLIED", {torch.float32})
    torch._dynamo.reset()
    plain, faster = a_faster_layer()
    x = torch.randn(5, tokens, 256, requires_grad=True)
    y, graphs = graphs_of(faster, x)
    assert_close(y, plain(x))
    assert_close(*(torch.autograd.grad(made.sum(), x) for made in (y, plain(x))))
    assert [graph.count("ffa.base_product.default") for graph in graphs] == [ops, ops]


@pytest.mark.parametrize("by_tiles", [False, True])
def test_so_it_is_for_rows_that_are_known_when_it_runs(own, by_tiles, monkeypatch):
    monkeypatch.setattr(compose, "BY_TILES", by_tiles)
    monkeypatch.setattr(product, "_MULTIPLIED", {torch.float32})
    torch._dynamo.reset()
    plain, faster = a_faster_layer()
    x = torch.randn(2000, 256)
    compiled = torch.compile(lambda x: faster(x[x[:, 0] > 0]), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_close(compiled(x), plain(x[x[:, 0] > 0]))


def test_transforms_that_are_compiled_lose_no_derivative(compiled_model):
    """They get PyTorch's operators: the op has none."""
    layers, x, v = compiled_model[2:], torch.randn(3, 256), torch.randn(3, 256)

    def in_forward_mode(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layers(forward_ad.make_dual(x, v))).tangent

    # Of what is affine.
    wanted = layers(x + v) - layers(x)
    for along_v in (lambda x: torch.func.jvp(layers, (x,), (v,))[1], in_forward_mode):
        torch._dynamo.reset()
        found = torch.compile(along_v, backend="aot_eager")(x)
        assert (found - wanted).norm() < 3e-2 * wanted.norm()
    for gradient in (
        lambda x: torch.func.vjp(layers, x)[1](wanted)[0],
        torch.func.grad(lambda x: (layers(x) * wanted).sum()),
    ):
        torch._dynamo.reset()
        found = torch.compile(gradient, backend="aot_eager")(x)
        assert_close((found * v).sum(), wanted.square().sum(), rtol=3e-2, atol=0.0)


def test_a_graph_that_is_exported_has_pytorchs_operators(compiled_model):
    x = torch.randn(3, 256)
    exported = torch.export.export(nn.Sequential(*list(compiled_model)[1:]), (x,))
    assert not any("ffa" in str(node.target) for node in exported.graph.nodes)
    assert_close(exported.module()(x), compiled_model[1:](x), rtol=2e-2, atol=2e-2)


def test_a_compiled_layer_casts_and_trains_as_nn_linear_does(own, monkeypatch):
    monkeypatch.setattr(product, "_MULTIPLIED", {torch.float32})
    plain, faster = a_faster_layer()
    x = torch.randn(4, 256)
    torch._dynamo.reset()
    compiled = torch.compile(faster, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), plain(x))
    for layer in (plain, faster):
        layer.weight.requires_grad_(True)
    compiled(x).sum().backward()
    plain(x).sum().backward()
    assert_close(faster.weight.grad, plain.weight.grad)


def test_the_op_for_compilers_gives_no_wrong_derivative():
    with pytest.raises(NotImplementedError, match="base_product: no derivative"):
        base_product(torch.randn(2, 3, requires_grad=True), torch.randn(4, 3))


def test_the_op_for_compilers_keeps_its_contract():
    x, weight, bias, *_ = make(4, 16, 8, 0, torch.float32)
    stored, scale = in_int8(weight, False)
    for given in ((x, weight, bias, None), (x.view(2, 2, 16), stored, None, scale)):
        torch.library.opcheck(torch.ops.ffa.base_product.default, given)


_FAULTS = """
import mmap, resource, torch
from ffa_kernels.backends import cpu

def faults_of(make):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, made

def touched():
    pages = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, 64 << 20, 4096):
        pages[at] = 1
    return pages

torch.set_num_threads(1)
x, w, scale = torch.randn(64, 8), (10 * torch.randn(1 << 18, 8)).to({dtype}), {scale}
cpu.product(x, w[:512], None, scale=scale)
given, _ = faults_of(touched)
faults, y = faults_of(lambda: cpu.product(x, w, None, scale=scale))
assert y.untyped_storage().nbytes() == 64 << 20
print(given, faults)
"""


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_large_output_faults_once_for_many_pages(dtype):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to all who ask for none, or to nobody")
    scale = "torch.ones(1, 8)" if dtype == torch.int8 else "None"
    code = _FAULTS.format(dtype=dtype, scale=scale)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given, faults = map(int, run.stdout.split())
    if given > 1024:
        pytest.skip("this system has no huge pages left")
    # 16384 pages of 4 KiB; some are faulted in for what is packed, and beside huge ones.
    assert faults < 4096
