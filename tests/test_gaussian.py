"""The noise: its distribution, its tail, its streams, and how near two backends are."""

import math

import pytest
import torch
from scipy import stats

from ffa_kernels import ops
from ffa_kernels.backends import reference
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

STATE = torch.tensor([11, -22, 33, -44, 55])


def check_is_standard_normal(draws: torch.Tensor) -> None:
    """Five-sigma bounds on the moments; the KS distance at the 0.1% level."""
    n, z = draws.numel(), draws.double()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / n)
    square = z * z
    assert abs((square * z).mean().item()) < 5 * math.sqrt(15 / n)
    assert abs((square * square).mean().item() - 3) < 5 * math.sqrt(96 / n)
    # scipy's kstest computes the same distance in five times the time.
    cdf = torch.special.ndtr(draws.sort().values.double())
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - rank[:-1]).max(), (rank[1:] - cdf).max()).item()
    assert distance < stats.kstwobign.isf(0.001) / math.sqrt(n)


@pytest.mark.usefixtures("compiled")
def test_ten_million_draws_are_standard_normal():
    with use_backend("cpu"):
        check_is_standard_normal(ops.gaussian(STATE, 1, 10_000_000))


@pytest.mark.full
def test_ten_million_draws_of_the_reference_are_standard_normal():
    with use_backend("reference"):
        check_is_standard_normal(ops.gaussian(STATE, 1, 10_000_000))


def test_draws_are_standard_normal(backend):
    check_is_standard_normal(ops.gaussian(STATE, 2, 300_000))


def test_neighbours_are_uncorrelated(backend):
    z = ops.gaussian(STATE, 3, 400_000, torch.float64)
    for lag in (1, 2, 3, 4, 8, 16, 64):
        for f in (lambda v: v, lambda v: v * v - 1):
            a, b = f(z[:-lag]), f(z[lag:])
            correlation = (a * b).mean() / (a.std() * b.std())
            assert abs(correlation.item()) < 5 / math.sqrt(len(a)), lag


def crafted(monkeypatch, words64):
    """The reference's Gaussians of these eight 64-bit words."""
    halves = [(w >> shift) & 0xFFFFFFFF for w in words64 for shift in (0, 32)]
    block = torch.tensor([halves], dtype=torch.int64)
    monkeypatch.setattr(reference, "_words", lambda *_: block)
    return reference.gaussian(STATE, 0, 8, torch.float64)


def test_formula_reaches_beyond_8_5_sigma_and_never_gives_infinity(monkeypatch):
    # u1 = 2^-53, u2 = 0 | u1 = 2^-53, u2 = 1/4 | u1 = 1, u2 = 0 | u1 = 1/2, u2 = 1/2
    quarter, half, full = 1 << 62, 1 << 63, 2**64 - 1
    low_bits = (1 << 11) - 1
    words = [low_bits, 0, 0, quarter, full, 0, half - 1, half]
    z = crafted(monkeypatch, words)
    tail = math.sqrt(2 * 53 * math.log(2))
    assert tail > 8.5
    expected = [tail, 0, 0, tail, 0, 0, -math.sqrt(2 * math.log(2)), 0]
    assert z.tolist() == pytest.approx(expected, abs=2e-15)


def words_of(state, tensor_id, numel):
    """The Gaussians by Python's own arithmetic, from the op's keystream."""
    raw = ops.chacha20(state, tensor_id, 0, -(-numel // 8)).flatten().tolist()
    unsigned = [w & 0xFFFFFFFF for w in raw]
    words = [unsigned[i] | unsigned[i + 1] << 32 for i in range(0, len(unsigned), 2)]
    z = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) * 2.0**-53))
        turn = 2 * math.pi * ((second >> 11) * 2.0**-53)
        z += [radius * math.cos(turn), radius * math.sin(turn)]
    return torch.tensor(z[:numel], dtype=torch.float64)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000])
def test_layout_is_the_documented_one(backend, numel):
    z = ops.gaussian(STATE, 2**32 - 1, numel, torch.float64)
    assert z.dtype == torch.float64 and z.shape == (numel,)
    torch.testing.assert_close(z, words_of(STATE, 2**32 - 1, numel), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(dtype, threads):
    torch.set_num_threads(threads)
    with use_backend("reference"):
        expected = ops.gaussian(STATE, 7, 200_003, dtype)
    with use_backend("cpu"):
        z = ops.gaussian(STATE, 7, 200_003, dtype)
    assert (z - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_triton_gives_the_values_of_the_cpu(dtype):
    pytest.importorskip("triton")
    with use_backend("cpu"):
        expected = ops.gaussian(STATE, 7, 40_003, torch.float64)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend("triton"):
        z = ops.gaussian(STATE.to(here), 7, 40_003, dtype).cpu()
    # Half an ulp of the rounding; a whole one under the interpreter, which truncates to bfloat16.
    narrow = torch.finfo(dtype)
    ulp = narrow.eps * expected.abs().clamp(min=narrow.tiny)
    assert ((z.double() - expected).abs() <= 1e-13 + ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_the_fp64_values_rounded(dtype):
    exact = ops.gaussian(STATE, 7, 4096, torch.float64)
    assert torch.equal(ops.gaussian(STATE, 7, 4096, dtype), exact.to(dtype))


def test_a_longer_draw_begins_with_the_shorter_one(backend):
    long = ops.gaussian(STATE, 0, 20_000)
    for numel in (1, 8, 100, 8191, 8192, 8193):
        assert torch.equal(ops.gaussian(STATE, 0, numel), long[:numel])


def test_other_tensor_step_or_key_is_another_stream(backend):
    n = 50_000
    other_step, other_key = STATE.clone(), STATE.clone()
    other_step[4] += 1
    other_key[0] ^= 1
    z = [
        ops.gaussian(state, tensor_id, n, torch.float64)
        for state, tensor_id in ((STATE, 0), (STATE, 1), (other_step, 0), (other_key, 0))
    ]
    assert torch.equal(z[0], ops.gaussian(STATE, 0, n, torch.float64))
    for i in range(4):
        for j in range(i):
            assert not (z[i] == z[j]).any()
            assert abs((z[i] * z[j]).mean().item()) < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rng_state": torch.zeros(5)}, r"rng_state is torch.float32 \(5,\)"),
        ({"tensor_id": -1}, "tensor_id is -1; accepted"),
        ({"tensor_id": 2**32}, "tensor_id is 4294967296; accepted"),
        ({"numel": -1}, "numel is -1; accepted"),
        ({"numel": 2**35 + 1}, "numel is 34359738369; accepted"),
        ({"dtype": torch.int32}, "dtype is torch.int32; accepted: a float type"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"rng_state": STATE, "tensor_id": 0, "numel": 4, "dtype": torch.float32}
    with pytest.raises(ConfigError, match=message):
        ops.gaussian(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(backend, dtype):
    torch.library.opcheck(torch.ops.ffa.gaussian.default, (STATE, 1, 13, dtype))
