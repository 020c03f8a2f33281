"""The CPU kernel for fp32 rows beside a bf16 matrix, against fp64 products of what it rounds."""

import math

import pytest
import torch
from torch.nn import functional as F

from ffa_kernels.backends import compose, cpu, native

pytestmark = pytest.mark.skipif(
    not native.has_bf16_product(), reason="no CPU library, or no AMX tiles on this machine"
)

# (rows, d_in, d_out, r): within a tile and beyond, odd, several groups of panels, two segments.
SIZES = [
    (1, 1, 1, 1),
    (5, 123, 123, 3),
    (33, 7, 45, 0),
    (64, 64, 96, 32),
    (70, 2051, 33, 33),
    (40, 600, 3300, 16),
    (3, 0, 5, 2),
    (0, 8, 5, 2),
]


def make(rows, d_in, d_out, r, transposed=False):
    torch.manual_seed(0)
    weight = torch.randn(d_out, d_in).bfloat16()
    if transposed:
        weight = weight.t().contiguous().t()
    left, term = torch.randn(rows, r), torch.randn(r, d_out)
    term = term.t().contiguous().t() if transposed else term
    return torch.randn(rows, d_in), weight, torch.randn(d_out), left, term


def exact(x, weight, bias, left, term, scaling):
    rounded = x.bfloat16().double() @ weight.double().t()
    return rounded + (left * scaling).bfloat16().double() @ term.bfloat16().double() + bias.double()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_exact_but_for_what_it_rounds(sizes, transposed):
    tensors = make(*sizes, transposed)
    found, wanted = cpu.bf16_product(*tensors, 1.5), exact(*tensors, 1.5)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # A sum of d_in + r products, each as large as 10 or so, in fp32.
    terms = sizes[1] + sizes[3] + 1
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6 * math.sqrt(terms) * 4)


def test_without_bias_and_term_and_from_strides_of_any_kind():
    x, weight, bias, *_ = make(6, 40, 24, 0)
    wide, apart = torch.randn(6, 80), torch.randn(48, 80).bfloat16()[::2, ::2]
    for rows, W in [(x, weight), (wide[:, ::2], weight), (x, apart), (x.view(2, 3, 40), weight)]:
        found = cpu.bf16_product(rows, W, None)
        wanted = rows.bfloat16().double() @ W.double().t()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    biases = torch.stack([bias, bias]).t()[:, 0]
    assert torch.equal(cpu.bf16_product(x, weight, biases), cpu.bf16_product(x, weight, bias))


def test_a_row_is_the_same_in_any_batch_and_on_any_number_of_threads():
    x, weight, bias, left, term = make(75, 300, 130, 5)
    before, made = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(cpu.bf16_product(x, weight, bias, left, term, 2.0))
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    for row in (0, 31, 32, 74):
        alone = cpu.bf16_product(x[row : row + 1], weight, bias, left[row : row + 1], term, 2.0)
        assert torch.equal(alone, made[0][row : row + 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, weight, bias, left, term = make(40, 50, 60, 4)
    wanted = cpu.bf16_product(x, weight, bias, left, term)
    x[7, 3] = bad
    found = cpu.bf16_product(x, weight, bias, left, term)
    assert not found[7].isfinite().any()
    others = torch.arange(40) != 7
    assert torch.equal(found[others], wanted[others])


def test_it_is_nearer_than_pytorchs_product():
    x, weight, bias, *_ = make(64, 384, 200, 0)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    own, theirs = (
        (product(x, weight, bias).double() - wanted).norm()
        for product in (cpu.bf16_product, compose.plain_product)
    )
    assert own < theirs


def test_base_product_takes_it_for_fp32_beside_bf16_alone(monkeypatch):
    x, weight, bias, *_ = make(4, 16, 8, 0)
    assert torch.equal(compose.base_product(x, weight, bias), cpu.bf16_product(x, weight, bias))
    monkeypatch.setattr(cpu, "bf16_product", None)
    assert compose.base_product(x, weight.float(), bias).dtype == torch.float32
    assert compose.base_product(x.bfloat16(), weight, bias.bfloat16()).dtype == torch.bfloat16
    assert compose.base_product(x.half(), weight, bias.half()).dtype == torch.float16
    monkeypatch.setattr(native, "has_bf16_product", lambda: False)
    assert torch.equal(
        compose.base_product(x, weight, bias), compose.plain_product(x, weight, bias)
    )
