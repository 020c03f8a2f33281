"""The input's gradient and each record's from one op, beside the two ops that it stands for."""

import math

import pytest
import torch
from torch.testing import assert_close

from ffa_kernels import ops
from ffa_kernels.backends import compose, native
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

MULTIPLIES = True
# Leading sizes (n, ...), d_out, d_in, r: about panels of 192 columns, blocks of 32 rows and whole
# vectors; few records of many columns are cut by panels, many are not.
UGLY = [
    *(((5, 1), 77, 40, 1), ((5,), 77, 33, 3), ((5, 7), 77, 1, 8), ((5, 130), 33, 50, 64)),
    *(((1, 17), 1, 1, 1), ((3, 2, 9), 257, 64, 7), ((2, 33), 769, 31, 13), ((1, 70), 400, 16, 16)),
    *(((16, 35), 385, 72, 8), ((0, 4), 5, 6, 2), ((3, 0), 5, 6, 2), ((3, 4), 5, 0, 2)),
    *(((3, 4), 0, 6, 2), ((3, 4), 5, 6, 0), ((2, 4), 400, 6, 0)),
]
# Where it is composed of the two, some sizes will do.
FEW = [UGLY[2], UGLY[5], UGLY[11]]


def inputs(leading, d_out, d_in, r, dtype):
    torch.manual_seed(d_out + d_in + r)
    sizes = ((*leading, d_out), (*leading, r), (d_out, d_in), (r, d_in), (d_out, r))
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def in_two(g, h, weight, lora_A, lora_B, cu_seqlens=None, scaling=1.0, mean_loss=False):
    settings = {"scaling": scaling, "mean_loss": mean_loss}
    u, G, squares = ops.per_sample_grad(g, h, lora_B, cu_seqlens, **settings)
    fixed = (weight, lora_A, lora_B, None, scaling, 0.0)
    return torch.ops.ffa.linear_backward(g, u, *fixed), G, squares


def served(backend, dtype):
    """`dtype`, or a 16-bit type where the backend has no fp64."""
    return torch.float16 if backend in ("triton", "cuda") and dtype == torch.float64 else dtype


def check_against_the_two_ops(case, dtype, mean_loss):
    given = inputs(*case, dtype)
    settings = {"scaling": 0.7, "mean_loss": mean_loss}
    found, wanted = ops.per_sample_backward(*given, **settings), in_two(*given, **settings)
    for a, b in zip(found, wanted, strict=True):
        assert a.is_contiguous()
        assert_close(a, b, rtol=0, atol=0)


def check_against_formulas(case):
    leading, d_out, _, r = case
    given = inputs(*case, torch.float32)
    dx, G, squares = ops.per_sample_backward(*given, scaling=0.7)
    g, h, W, A, B = (t.double() for t in given)
    n, tokens = leading[0], math.prod(leading[1:])
    wanted_G = 0.7 * g.reshape(n, tokens, d_out).transpose(1, 2) @ h.reshape(n, tokens, r)
    for found, wanted in ((dx, g @ W + 0.7 * g @ B @ A), (G, wanted_G)):
        assert found.shape == wanted.shape and found.dtype == torch.float32
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        assert_close(found.double(), wanted, rtol=0, atol=4e-6 * largest)
    assert_close(squares[0], G.double().square().sum((1, 2)), rtol=4e-6, atol=0)
    assert (squares[1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_equals_the_two_ops_and_the_formulas(backend, case, dtype):
    check_against_the_two_ops(case, served(backend, dtype), mean_loss=True)
    check_against_formulas(case)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", UGLY, ids=str)
def test_one_launch_on_the_cpu_equals_the_two_ops_and_the_formulas(case):
    with use_backend("cpu"):
        for dtype in (torch.float32, torch.float64):
            for mean_loss in (False, True):
                check_against_the_two_ops(case, dtype, mean_loss)
        check_against_formulas(case)


@pytest.mark.parametrize("offsets", [[0, 5, 5, 40, 70], [3, 4, 60], [0, 70], [70, 70], [9]])
@pytest.mark.parametrize("d_out", [40, 400])
def test_rows_of_packed_records_and_of_none_have_dx(backend, offsets, d_out):
    given = inputs((70,), d_out, 33, 5, torch.float32)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    found = ops.per_sample_backward(*given, cu_seqlens, scaling=0.7)
    wanted = in_two(*given, cu_seqlens, scaling=0.7)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert found[1].shape == (len(offsets) - 1, d_out, 5)
    g, _, W, A, B = (t.double() for t in given)
    dx = g @ W + 0.7 * g @ B @ A
    assert_close(found[0].double(), dx, rtol=0, atol=4e-6 * float(dx.abs().max()))


def test_inputs_need_not_be_contiguous(backend):
    given = inputs((4, 9), 70, 45, 6, torch.float32)
    laid_out = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in given]
    assert not any(t.is_contiguous() for t in laid_out)
    for a, b in zip(
        ops.per_sample_backward(*laid_out), ops.per_sample_backward(*given), strict=True
    ):
        assert_close(a, b)
    # As a sum's backward gives it: one element, expanded.
    given[0] = torch.ones(()).expand(4, 9, 70)
    dense = [given[0].contiguous(), *given[1:]]
    for a, b in zip(ops.per_sample_backward(*given), ops.per_sample_backward(*dense), strict=True):
        assert_close(a, b)


def test_a_record_that_is_no_number_stays_alone(backend):
    given = inputs((5, 11), 400, 33, 5, torch.float32)
    clean = ops.per_sample_backward(*given)
    given[0][3] = torch.nan
    dx, G, squares = ops.per_sample_backward(*given)
    others = [0, 1, 2, 4]
    assert_close(dx[others], clean[0][others], rtol=0, atol=0)
    assert_close(G[others], clean[1][others], rtol=0, atol=0)
    assert_close(squares[:, others], clean[2][:, others], rtol=0, atol=0)
    assert dx[3].isnan().all() and G[3].isnan().all() and squares[0, 3].isnan()


@pytest.mark.parametrize("n", [1, 2, 9])
def test_thread_count_never_shows_in_the_bits(n, own_product):
    given = inputs((n, 70), 1031, 300, 9, torch.float32)
    if not own_product:
        # How BLAS cuts its product is its own affair: there is none.
        given[2].zero_()
    results = []
    with use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.per_sample_backward(*given, scaling=0.7))
    assert results[0][0].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_backward_beside_a_tap_passes_over_dx_once_on_the_cpu(own_product, monkeypatch):
    launched, real = [], native.Library.call

    def noted(self, op, *arguments):
        launched.append(op)
        real(self, op, *arguments)

    # So wide that merging W + s B A does not pay.
    _, _, W, A, B = inputs((3, 4), 128, 128, 2, torch.float32)
    x, tap = torch.randn(3, 4, 128, requires_grad=True), torch.zeros(3, 128, 2, requires_grad=True)
    with use_backend("cpu"):
        y = ops.linear(x, W, None, A, B, tap=tap, records=1)
        monkeypatch.setattr(native.Library, "call", noted)
        y.sum().backward()
    # Beside PyTorch's product one launch adds to dx; our own has the term in its sums.
    wanted = ["per_sample_grad", "fp32_product"] if own_product else ["per_sample_backward"]
    assert launched == wanted and x.grad.any() and tap.grad.any()


@pytest.mark.usefixtures("compiled")
def test_a_base_product_of_another_dtype_is_refused(monkeypatch):
    """As where somebody has put a narrower one in PyTorch's place."""
    real = torch.matmul
    monkeypatch.setattr(compose, "FUSES_FP32", False)
    monkeypatch.setattr(torch, "matmul", lambda a, b: real(a, b).bfloat16())
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"came out as .*bfloat"):
        ops.per_sample_backward(*inputs((3, 4), 5, 6, 2, torch.float32))


def test_errors_name_the_argument(backend):
    g, h, W, A, B = (torch.zeros(s) for s in ((3, 5), (3, 2), (5, 4), (2, 4), (5, 2)))
    for given, message in [
        ((g[:2], h, W, A, B), r"g is torch.float32 \(2, 5\), h is torch.float32 \(3, 2\)"),
        ((g, h, W, A, B.t()), r"lora_B is torch.float32 \(2, 5\); accepted: .*\(5, 2\)"),
        ((g, h, W, A[:1], B), r"lora_A is torch.float32 \(1, 4\); accepted: .* \(2, d_in\)"),
        ((g, h, W, A.double(), B), r"lora_A is torch.float64 \(2, 4\); accepted: torch.float32"),
        ((g, h, W.t(), A, B), r"weight is torch.float32 \(4, 5\); accepted: .*\(5, 4\)"),
        ((g, h, W.bfloat16(), A, B), r"weight is torch.bfloat16 .*accepted: torch.float32"),
        ((g, h, W.to("meta"), A, B), r"weight is on meta; accepted: .*, as g"),
        ((g, h, W, A.to("meta"), B), r"lora_A is on meta; accepted: .*, as g"),
        ((g, h, W, A, B, torch.tensor([0, 9]).int()), r"cu_seqlens is \[0, 9\]"),
    ]:
        if given[0].is_cuda and len(given) == 6:
            continue  # the kernels clamp what is not read
        with pytest.raises(ConfigError, match=f"per_sample_backward: {message}"):
            ops.per_sample_backward(*given)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    given = inputs((3, 4), 5, 6, 2, torch.float32)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32) if packed else None
    torch.library.opcheck(torch.ops.ffa.per_sample_backward.default, (*given, offsets, 0.5, True))


@pytest.mark.usefixtures("one_thread")
def test_a_lazily_negated_A_is_read_by_its_values():
    torch.manual_seed(0)
    g, h, W = torch.randn(2, 3, 16), torch.randn(2, 3, 4), torch.randn(16, 8)
    A, B = torch.randn(4, 8), torch.randn(16, 4)
    negated = torch.complex(torch.zeros_like(A), -A).conj().imag
    assert negated.is_neg() and torch.equal(negated, A)
    # The dispatcher, which a call without gradients goes around, would make it plain.
    with torch.no_grad():
        dx, _, _ = ops.per_sample_backward(g, h, W, negated, B)
    torch.testing.assert_close(dx, g @ W + (g @ B) @ A, rtol=1e-5, atol=1e-5)
