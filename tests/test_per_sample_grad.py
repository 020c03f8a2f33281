"""G, u and the squared norms against fp64 formulas, at shapes that fit no tile."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ffa_kernels import ops
from ffa_kernels.errors import ConfigError

# Leading sizes (n, ...), d_out, r.
UGLY = [
    ((5, 1), 77, 1),
    ((5,), 77, 3),
    ((5, 7), 77, 8),
    ((5, 130), 33, 64),
    ((1, 17), 1, 1),
    ((3, 2, 9), 257, 7),
    ((2, 33), 769, 13),
    ((0, 4), 5, 2),
    ((3, 0), 5, 2),
]


def inputs(leading, d_out, r, dtype):
    generator = torch.Generator().manual_seed(hash((leading, d_out, r)) % 2**31)
    return [
        torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu").to(
            torch.get_default_device(), dtype
        )
        for sizes in ((*leading, d_out), (*leading, r), (d_out, r))
    ]


def served(backend, dtype):
    """`dtype`, or a 16-bit type where the backend has no fp64."""
    gpu = backend in ("triton", "cuda")
    return torch.float16 if gpu and dtype == torch.float64 else dtype


def formulas(g: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """u and G in the inputs' own precision, by PyTorch."""
    n, tokens = g.shape[0], math.prod(g.shape[1:-1])
    rows_g, rows_h = g.reshape(n, tokens, g.shape[-1]), h.reshape(n, tokens, h.shape[-1])
    return g @ B, torch.einsum("ntd,ntr->ndr", rows_g, rows_h) * scale


def errors(values: list[Tensor], g: Tensor, h: Tensor, B: Tensor, scale: float) -> list[float]:
    """The largest distance of u and of G from the formulas in extended precision."""
    n, tokens = g.shape[0], math.prod(g.shape[1:-1])
    exact_g, exact_h, exact_B = (t.double().cpu().numpy().astype(np.longdouble) for t in (g, h, B))
    rows_g = exact_g.reshape(n, tokens, g.shape[-1]).swapaxes(1, 2)
    exact = [exact_g @ exact_B, rows_g @ exact_h.reshape(n, tokens, h.shape[-1]) * scale]
    return [
        float(np.abs(value.double().cpu().numpy() - truth).max(initial=0))
        for value, truth in zip(values, exact, strict=True)
    ]


def check(leading, d_out, r, dtype, mean_loss=False):
    g, h, B = inputs(leading, d_out, r, dtype)
    scale = 0.25 * (leading[0] if mean_loss else 1)
    u, G, squares = ops.per_sample_grad(g, h, B, scaling=0.25, mean_loss=mean_loss)
    assert u.shape == (*leading, r) and G.shape == (leading[0], d_out, r)
    assert u.dtype == G.dtype == dtype
    own = formulas(g, h, B, scale)
    theirs = errors(own, g, h, B, scale)
    alone = ops.per_sample_grad(g, h, None, scaling=0.25, mean_loss=mean_loss)
    for made in (G, alone[1]):
        mine = errors([u, made], g, h, B, scale)
        for error, of_pytorch, value in zip(mine, theirs, own, strict=True):
            largest = value.abs().max().item() if value.numel() else 0.0
            ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0
            assert error <= 2 * of_pytorch + ulp
    assert squares.shape == (2, leading[0]) and (squares[1] == 1).all()
    assert squares.dtype == torch.float64
    # Of the G that was returned, not of the exact one.
    of_stored = G.double().square().sum(dim=(1, 2))
    torch.testing.assert_close(squares[0], of_stored, rtol=4e-6, atol=0)
    assert alone[0].shape == (0,)
    # Tiles, and so the order of a sum, may depend on whether u is wanted.
    of_stored = alone[1].double().square().sum(dim=(1, 2))
    torch.testing.assert_close(alone[2][0], of_stored, rtol=4e-6, atol=0)


@pytest.mark.parametrize("mean_loss", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading, d_out, r", UGLY)
def test_equals_the_formulas(backend, leading, d_out, r, dtype, mean_loss):
    check(leading, d_out, r, served(backend, dtype), mean_loss)


@pytest.mark.parametrize("leading, d_out, r", UGLY)
def test_equals_the_formulas_in_bf16(backend, leading, d_out, r):
    if backend == "cpu":
        pytest.skip("the CPU backend leaves 16-bit matrices to the reference")
    check(leading, d_out, r, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_need_not_be_contiguous(backend, dtype):
    dtype = served(backend, dtype)
    g, h, B = inputs((4, 9), 70, 6, dtype)
    expected = ops.per_sample_grad(g, h, B)
    strided = ops.per_sample_grad(
        g.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        h.transpose(0, 1).contiguous().transpose(0, 1),
        B.t().contiguous().t(),
    )
    for a, b in zip(strided, expected, strict=True):
        torch.testing.assert_close(a, b)
    ones = torch.ones((), dtype=dtype).expand(4, 9, 70)
    torch.testing.assert_close(
        ops.per_sample_grad(ones, h, B), ops.per_sample_grad(ones.contiguous(), h, B)
    )


def test_a_record_does_not_depend_on_the_others(backend):
    g, h, B = inputs((5, 11), 77, 5, torch.float32)
    g[3] = torch.nan
    u, G, squares = ops.per_sample_grad(g, h, B, scaling=0.5)
    for i in (0, 1, 2, 4):
        alone = ops.per_sample_grad(g[i : i + 1], h[i : i + 1], B, scaling=0.5)
        mine = (u[i : i + 1], G[i : i + 1], squares[:, i : i + 1])
        torch.testing.assert_close(mine, alone)
    assert G[3].isnan().all() and squares[0, 3].isnan() and (squares[1] == 1).all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("n", [1, 2, 9])
def test_thread_count_never_shows_in_the_bits(n):
    g, h, B = inputs((n, 70), 1031, 9, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.per_sample_grad(g, h, B, scaling=0.7, mean_loss=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "g, h, B, message",
    [
        ((3, 4, 5), (3, 3, 2), None, r"g is torch.float32 \(3, 4, 5\), h is torch.float32"),
        ((5,), (2,), None, r"accepted: \(n, ..., d_out\) and \(n, ..., r\)"),
        ((3, 5), (3, 2), (2, 5), r"lora_B is torch.float32 \(2, 5\); accepted: .*\(5, 2\)"),
    ],
)
def test_shape_errors_name_the_argument(backend, g, h, B, message):
    with pytest.raises(ConfigError, match=message):
        ops.per_sample_grad(torch.zeros(g), torch.zeros(h), None if B is None else torch.zeros(B))


def test_dtype_errors_name_the_argument(backend):
    g, h, B = torch.zeros(3, 5), torch.zeros(3, 2), torch.zeros(5, 2)
    with pytest.raises(ConfigError, match=r"h is torch.float64"):
        ops.per_sample_grad(g, h.double(), B)
    with pytest.raises(ConfigError, match=r"lora_B is torch.float64"):
        ops.per_sample_grad(g, h, B.double())
    with pytest.raises(ConfigError, match=r"g is torch.int32.*float type"):
        ops.per_sample_grad(g.int(), h.int(), B.int())


def test_device_errors_name_the_argument(backend):
    g, h, B = torch.zeros(3, 5), torch.zeros(3, 2), torch.zeros(5, 2)
    with pytest.raises(ConfigError, match=r"h is on meta; accepted: .*, as g"):
        ops.per_sample_grad(g, h.to("meta"), B)
    with pytest.raises(ConfigError, match=r"lora_B is on meta; accepted: .*, as g"):
        ops.per_sample_grad(g, h, B.to("meta"))


@pytest.mark.parametrize("with_B", [True, False])
def test_opcheck(backend, with_B):
    g, h, B = inputs((3, 4), 5, 2, torch.float32)
    arguments = (g, h, B if with_B else None, None, 0.5, True)
    torch.library.opcheck(torch.ops.ffa.per_sample_grad.default, arguments)
