"""The CPU's launch for the rank-r half of a linear layer, beside the same products in fp64."""

import pytest
import torch
from torch.testing import assert_close

from ffa_kernels.backends import native
from ffa_kernels.errors import NativeError

DTYPES = {torch.float32: 0, torch.float64: 1}

pytestmark = pytest.mark.skipif(not native.available("cpu"), reason="no compiled CPU library")


def rank_term(x, lora_A, left, right, scaling, out, threads=2, adds=True, bias=None):
    made = (None, -1, None) if x is None else (x.data_ptr(), x.shape[1], lora_A.data_ptr())
    native.load("cpu").call(
        *("rank_term", *out.shape, left.shape[1], DTYPES[out.dtype], *made, left.data_ptr()),
        *(right.data_ptr(), *right.stride(), scaling, adds),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), threads),
    )


def problem(rows, depth, columns, r, dtype):
    torch.manual_seed(rows + depth + columns + r)
    shapes = ((rows, depth), (r, depth), (columns, r), (rows, columns))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def close(found, wanted):
    tolerance = 2e-6 if found.dtype == torch.float32 else 1e-14
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert_close(found.double(), wanted, atol=tolerance * largest, rtol=0)


# Rows about a block of 32 or 128, depths about panels of 384, columns about whole vectors and
# panels of 512, ranks about whole vectors and what makes them the lanes.
SHAPES = [
    *((1, 1, 1, 1), (3, 7, 5, 2), (31, 191, 33, 8), (32, 192, 64, 16), (33, 193, 63, 15)),
    *((70, 400, 17, 20), (64, 10, 130, 3), (5, 16, 16, 40), (131, 769, 40, 9), (300, 33, 48, 4)),
    *((9, 40, 1100, 5), (6, 1100, 20, 12), (23, 70, 5, 50), (3, 0, 4, 20)),
    *((0, 4, 4, 2), (4, 0, 4, 2), (4, 4, 0, 2), (4, 4, 4, 0)),
]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_products_are_right_and_nothing_else_is_written(shape, dtype):
    rows, _, columns, r = shape
    x, A, B, y = problem(*shape, dtype)
    wanted_h = x.double() @ A.double().T
    wanted_y = y.double() + 0.75 * wanted_h @ B.double().T
    # A row before and after each.
    kept_h, kept_y = torch.full((rows + 2, r), 7.0, dtype=dtype), y.new_full((rows + 2, columns), 7)
    h, out = kept_h[1:-1], kept_y[1:-1]
    out.copy_(y)
    rank_term(x, A, h, B, 0.75, out)
    close(h, wanted_h)
    close(out, wanted_y)
    for kept in (kept_h, kept_y):
        assert (kept[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_term_alone_takes_either_layout(shape, dtype):
    rows, _, _, r = shape
    _, _, right, out = problem(*shape, dtype)
    left = torch.randn(rows, r, dtype=dtype)
    wanted = out.double() - 1.5 * left.double() @ right.double().T
    apart = torch.zeros(2 * len(right), 2 * r, dtype=dtype)[::2, ::2].copy_(right)
    for laid_out in (right, right.T.contiguous().T, apart):
        found = out.clone()
        rank_term(None, None, left, laid_out, -1.5, found)
        close(found, wanted)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_or_it_begins_with_the_bias_whatever_is_there(shape, dtype):
    rows, _, columns, r = shape
    x, A, B, y = problem(*shape, dtype)
    term = 0.75 * (x.double() @ A.double().T) @ B.double().T
    for bias in (None, torch.randn(columns, dtype=dtype)):
        h, out = torch.empty(rows, r, dtype=dtype), torch.full_like(y, float("nan"))
        rank_term(x, A, h, B, 0.75, out, adds=False, bias=bias)
        close(out, term if bias is None else term + bias.double())


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("r", [1, 3, 8, 16, 20, 40])
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_there_are(
    r, adds, dtype
):
    rows = 77
    x, A, B, y = problem(rows, 300, 203, r, dtype)
    bias = torch.randn(203, dtype=dtype)

    def made(picked, threads):
        h, out = torch.empty(len(picked), r, dtype=dtype), y[picked].clone()
        rank_term(x[picked].contiguous(), A, h, B, 2.0, out, threads, adds, bias)
        return h, out

    h, out = made(list(range(rows)), 1)
    for threads in (2, 3):
        assert all(map(torch.equal, made(list(range(rows)), threads), (h, out)))
    for picked in ([0], [5, 70, 3], list(range(40, 77)), [76] * 9):
        assert all(map(torch.equal, made(picked, 2), (h[picked], out[picked])))


def test_not_a_number_stays_in_its_row():
    x, A, B, y = problem(40, 200, 50, 8, torch.float32)
    x[7, 3] = float("nan")
    h = torch.empty(40, 8)
    rank_term(x, A, h, B, 1.0, y)
    others = [i for i in range(40) if i != 7]
    assert h[7].isnan().all() and y[7].isnan().all()
    assert h[others].isfinite().all() and y[others].isfinite().all()


def test_refusals():
    x, A, B, y = problem(4, 4, 4, 2, torch.float32)
    h = torch.empty(4, 2)
    call = native.load("cpu").call
    places = (x.data_ptr(), 4, A.data_ptr(), h.data_ptr(), B.data_ptr(), 2, 1, 1.0, 0, None,
              y.data_ptr(), 1)  # fmt: skip
    for sizes in ((-1, 4, 2, 0), (4, -1, 2, 0), (4, 4, -1, 0)):
        with pytest.raises(NativeError, match="size"):
            call("rank_term", *sizes, *places)
    with pytest.raises(NativeError, match="dtype"):
        call("rank_term", 4, 4, 2, 9, *places)
