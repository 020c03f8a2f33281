"""The frozen A: the same bits on every machine, and the distribution that its recipe promises."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ffa_kernels import ops
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.init import _orthonormal_rows, frozen_A, pissa_A

LAYER = "encoder.layer.0.attention.self.query"
# sha256 of the fp32 bytes. A change here breaks every federation whose sites run two versions.
COMMITTED = {
    ("kaiming", 8, 384): "2648ee9dd2345a91621b3d57391bfef454c42fa296896f479ae16a5231be6bc5",
    ("kaiming", 5, 123): "1bea26908f9631b1dd1bcbd590395eea36e4be665395fbfe020e7768935d3cd2",
    ("gaussian", 8, 384): "66fe5d5a3b02e9a60fc9496f91b5214374363c72ebacc5a9e23254bb63774264",
    ("gaussian", 5, 123): "109f9a643d8c5534fb8b475010c194c20ef2b91306b06b481ec80d66ecd3ea00",
    ("orthogonal", 8, 384): "550efa934824cf8f976f58457afc64853c310018205692487c34f9c1e6ab7323",
    ("orthogonal", 5, 123): "f8c0947f6284461c3338c77c88a86eaa537d625a4523b21619a7f5eef7b0e3f2",
}
RECIPES = ("kaiming", "gaussian", "orthogonal")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method, r, d_in", COMMITTED)
def test_bits_are_the_committed_ones(backend, method, r, d_in, threads):
    torch.set_num_threads(threads)
    A = frozen_A(method, 42, LAYER, r, d_in)
    assert A.shape == (r, d_in) and A.dtype == torch.float32 and A.is_contiguous()
    digest = hashlib.sha256(A.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == COMMITTED[method, r, d_in]


def test_torchs_generator_has_no_part_in_it():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = frozen_A("gaussian", 0, LAYER, 4, 32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(frozen_A("gaussian", 0, LAYER, 4, 32), first)


def recipe_words(method: str, seed: int, layer: str, rows: int, d_in: int) -> np.ndarray:
    """The 64-bit words of each row, from the recipe as it is documented."""
    text = f"ffa_kernels frozen A, version 1\0{method}\0{seed}\0{layer}".encode()
    key = np.frombuffer(hashlib.sha256(text).digest(), dtype="<i8").astype(np.int64)
    state = torch.from_numpy(np.append(key, np.int64(0)))
    blocks = -(-d_in // 8)
    words = ops.chacha20(state, 0, 0, rows * blocks).numpy().astype("<i4")
    return words.reshape(-1).view("<u8").reshape(rows, blocks * 8)


@pytest.mark.parametrize("r, d_in", [(3, 64), (5, 123), (1, 1)])
def test_values_follow_the_formulas(r, d_in):
    uniform = (recipe_words("kaiming", 9, LAYER, r, d_in) >> np.uint64(11)) * 2.0**-53
    expected = ((2 * uniform - 1) / math.sqrt(d_in))[:, :d_in]
    np.testing.assert_array_equal(frozen_A("kaiming", 9, LAYER, r, d_in), np.float32(expected))

    uniform = (recipe_words("gaussian", 9, LAYER, r, d_in) >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:, 0::2] + 2.0**-53))
    turn = 2 * np.pi * uniform[:, 1::2]
    pairs = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1)
    expected = pairs.reshape(r, -1)[:, :d_in] / r
    A = frozen_A("gaussian", 9, LAYER, r, d_in)
    np.testing.assert_allclose(A, expected, rtol=1e-7, atol=1e-15)


def test_orthogonal_rows_span_what_gaussian_rows_would():
    r, d_in = 6, 50
    uniform = (recipe_words("orthogonal", 3, LAYER, r, d_in) >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:, 0::2] + 2.0**-53))
    turn = 2 * np.pi * uniform[:, 1::2]
    rows = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1)
    rows = rows.reshape(r, -1)[:, :d_in]
    q, upper = np.linalg.qr(rows.T)
    # QR leaves each direction's sign open; Gram-Schmidt keeps that of the row.
    expected = (q * np.sign(np.diag(upper))).T
    np.testing.assert_allclose(frozen_A("orthogonal", 3, LAYER, r, d_in), expected, atol=1e-7)


@pytest.mark.parametrize("r, d_in", [(1, 1), (8, 384), (64, 64), (31, 77)])
def test_orthogonal_rows_are_orthonormal(r, d_in):
    A = frozen_A("orthogonal", 0, LAYER, r, d_in).double()
    # Each entry was rounded to fp32.
    assert (A @ A.t() - torch.eye(r).double()).abs().max() < 2**-23


def test_nearly_parallel_rows_are_made_orthonormal_too():
    # One pass of Gram-Schmidt leaves 2e-10 here.
    rows = np.ones((4, 9)) + 1e-9 * np.eye(4, 9)
    q = _orthonormal_rows(rows)
    assert np.abs(q @ q.T - np.eye(4)).max() < 1e-15


@pytest.mark.parametrize("method", RECIPES)
def test_rows_do_not_depend_on_the_rank(method):
    full = frozen_A(method, 7, LAYER, 12, 45)
    for r in (1, 3, 8):
        scale = 12 / r if method == "gaussian" else 1
        A = frozen_A(method, 7, LAYER, r, 45)
        if method == "gaussian":
            torch.testing.assert_close(A, full[:r] * scale, rtol=3e-7, atol=0)
        else:
            assert torch.equal(A, full[:r])


@pytest.mark.parametrize("method", RECIPES)
def test_method_seed_and_layer_each_choose_another_A(method):
    base = frozen_A(method, 7, LAYER, 4, 40)
    others = [
        frozen_A(method, 8, LAYER, 4, 40),
        frozen_A(method, -7, LAYER, 4, 40),
        frozen_A(method, 7, LAYER + "2", 4, 40),
        frozen_A(method, 7, "", 4, 40),
    ]
    others += [frozen_A(m, 7, LAYER, 4, 40) for m in RECIPES if m != method]
    assert torch.equal(frozen_A(method, 7, LAYER, 4, 40), base)
    assert not any((base == other).any() for other in others)


def test_distributions():
    n = 200 * 1000
    bound = 1 / math.sqrt(1000)
    uniform = frozen_A("kaiming", 1, LAYER, 200, 1000).flatten().numpy()
    assert np.abs(uniform).max() <= bound
    assert stats.kstest(uniform, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    normal = frozen_A("gaussian", 1, LAYER, 200, 1000).flatten().numpy() * 200
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert abs(normal.std() - 1) < 5 / math.sqrt(2 * n)
    rows = frozen_A("orthogonal", 1, LAYER, 8, 5000)
    # A random direction's coordinates are nearly Gaussian, with variance 1 / d.
    assert stats.kstest(rows.flatten().numpy() * math.sqrt(5000), "norm").pvalue > 1e-3


@pytest.mark.parametrize("shape, r", [((40, 30), 5), ((20, 50), 20), ((7, 7), 1)])
def test_pissa_rows_span_the_leading_right_singular_vectors(shape, r):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    A = pissa_A(W, r).double()
    assert A.shape == (r, shape[1])
    assert (A @ A.t() - torch.eye(r).double()).abs().max() < 2**-22
    V = torch.linalg.svd(W.double(), full_matrices=False).Vh[:r]
    torch.testing.assert_close(A.t() @ A, V.t() @ V, rtol=0, atol=1e-6)
    assert (A.gather(1, A.abs().argmax(dim=1, keepdim=True)) > 0).all()
    # The best approximation of W in r directions.
    residual = (W.double() - W.double() @ A.t() @ A).norm()
    singular = torch.linalg.svdvals(W.double())
    assert residual.item() == pytest.approx(singular[r:].norm().item(), abs=1e-5)


def test_pissa_takes_narrow_weights_and_leaves_them_alone():
    W = torch.randn(12, 9).bfloat16()
    before = W.clone()
    assert pissa_A(W, 3).dtype == torch.float32
    assert torch.equal(W, before)


def test_errors_name_what_is_wrong():
    with pytest.raises(ConfigError, match="'xavier' is no recipe; accepted: kaiming, gaussian"):
        frozen_A("xavier", 0, LAYER, 2, 8)
    with pytest.raises(ConfigError, match="9 orthonormal rows do not fit in 8 dimensions"):
        frozen_A("orthogonal", 0, LAYER, 9, 8)
    with pytest.raises(ConfigError, match=r"4 singular vectors for a weight of \(4, 8\).* r = 5"):
        pissa_A(torch.randn(4, 8), 5)
