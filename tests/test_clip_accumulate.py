"""Clipping and summing: exact in any order, never above the bound, and deaf to bad records."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

INF = math.inf
# Triton's interpreter is slow: it gets fewer examples, in tests of its own.
COMPILED = ["reference", "cpu"]


def grid_of(bound: float) -> Fraction:
    """2^(floor(log2 C) - 32), exactly."""
    exponent = math.floor(math.log2(bound))
    while Fraction(2) ** exponent > Fraction(bound):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= Fraction(bound):
        exponent += 1
    return Fraction(2) ** (exponent - 32)


def bound_of(bounds: list[float], k: int) -> float:
    return bounds[0 if len(bounds) == 1 else k]


def empty_sums(grads: list[Tensor], bounds: list[float]) -> list[Tensor]:
    return [
        torch.zeros(g.shape[1:], dtype=torch.float64 if bound_of(bounds, k) == INF else torch.int64)
        for k, g in enumerate(grads)
    ]


def clip(grads, bounds, keep=None, sums=None, stats=None):
    """The sums, stats and factors after one call."""
    sums = empty_sums(grads, bounds) if sums is None else sums
    stats = torch.zeros(2, dtype=torch.int64) if stats is None else stats
    factors = ops.clip_accumulate(grads, sums, stats, keep, bounds)
    return sums, stats, factors


def draw(shapes, n, seed=0, dtype=torch.float32, scale=1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(n, *shape, generator=generator, dtype=torch.float64, device="cpu")).to(
            torch.get_default_device(), dtype
        )
        for shape in shapes
    ]


SHAPES = [(3,), (7, 5), (), (1, 1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "bounds", [[1.0], [0.7], [3.0, 0.1, 2.0, 5.5], [100.0]], ids=["1", "0.7", "layers", "100"]
)
def test_equals_the_formula(backend, bounds, dtype):
    check_formula(draw(SHAPES, 5, dtype=dtype), bounds)


def test_equals_the_formula_in_bf16_and_mixed_types(backend):
    a, b, c, d = draw(SHAPES, 5, dtype=torch.float64)
    check_formula([a.float(), b, c.float(), d], [0.7])
    if backend != "cpu":
        check_formula([a.bfloat16(), b.half(), c, d], [0.7])


def check_formula(grads: list[Tensor], bounds: list[float]) -> None:
    n = grads[0].shape[0]
    sums, stats, factors = clip(grads, bounds)
    assert factors.dtype == torch.float64 and factors.shape == (len(bounds), n)
    squares = torch.stack([g.double().square().reshape(n, -1).sum(dim=1) for g in grads])
    norms = squares.sum(dim=0, keepdim=True) if len(bounds) == 1 else squares
    expected = (torch.tensor(bounds, dtype=torch.float64)[:, None] / norms.sqrt()).clamp(max=1)
    torch.testing.assert_close(factors, expected, rtol=1e-11, atol=0)
    assert stats.tolist() == [int((factors < 1).sum()), 0]
    for k, (g, total) in enumerate(zip(grads, sums, strict=True)):
        grid = float(grid_of(bound_of(bounds, k)))
        factor = factors[0 if len(bounds) == 1 else k]
        truth = torch.einsum("n,n...->...", factor, g.double())
        # Each record loses less than one grid step, toward zero.
        assert ((total.double() * grid - truth).abs() <= n * grid * (1 + 1e-6)).all()


def test_terms_are_truncated_toward_zero(backend):
    grid = 2.0**-32
    values = torch.tensor([[1.75, -1.75, 0.999, -0.999, 2.0, -3.0]], dtype=torch.float64) * grid
    (total,), _, _ = clip([values], [1.0])
    assert total.tolist() == [1, -1, 0, 0, 2, -3]


@pytest.mark.parametrize("bound", [1.0, 0.9999999, 1.5, 1e-9, 1e9, 2.0**-500, 2.0**500])
def test_the_grid_follows_the_bound(backend, bound):
    (total,), _, factors = clip([torch.tensor([[bound / 2]], dtype=torch.float64)], [bound])
    assert factors.tolist() == [[1.0]]
    assert total.item() == Fraction(bound / 2) / grid_of(bound) // 1


BATCHES = given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 9),
    magnitudes=st.lists(st.integers(-12, 12), min_size=9, max_size=9),
    bounds=st.one_of(
        st.lists(st.floats(2.0**-30, 2.0**30), min_size=1, max_size=1),
        st.lists(st.floats(2.0**-30, 2.0**30), min_size=3, max_size=3),
    ),
    bad=st.sets(st.integers(0, 8), max_size=3),
    padding=st.sets(st.integers(0, 8), max_size=3),
    double=st.booleans(),
    data=st.data(),
)


@BATCHES
@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_order_and_split_never_show_in_the_bits(
    backend, seed, n, magnitudes, bounds, bad, padding, double, data
):
    check_order(seed, n, magnitudes, bounds, bad, padding, double, data)


@settings(max_examples=4)
@BATCHES
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_order_and_split_never_show_in_tritons_bits(
    backend, seed, n, magnitudes, bounds, bad, padding, double, data
):
    check_order(seed, n, magnitudes, bounds, bad, padding, double, data)


def check_order(seed, n, magnitudes, bounds, bad, padding, double, data):
    dtype = torch.float64 if double else torch.float32
    grads = draw([(4,), (3, 2), ()], n, seed, dtype)
    keep = torch.tensor([i not in padding for i in range(n)])
    for g in grads:
        for i in range(n):
            g[i] *= 10.0 ** magnitudes[i] * bounds[0]
            if i in bad:
                g[i] = data.draw(st.sampled_from([INF, -INF, math.nan]))
    sums, stats, factors = clip(grads, bounds, keep)

    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=3)) | {n})
    pieces, piece_stats = empty_sums(grads, bounds), torch.zeros(2, dtype=torch.int64)
    piece_factors, start = [], 0
    for end in cuts:
        chosen = order[start:end]
        _, _, f = clip(
            [g[chosen] for g in grads], bounds, keep[chosen], sums=pieces, stats=piece_stats
        )
        piece_factors.append(f)
        start = end
    for a, b in zip(sums, pieces, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(stats, piece_stats)
    assert torch.equal(torch.cat(piece_factors, dim=1), factors[:, order])

    # What is left out changes nothing: as if it had not been there.
    here = torch.tensor([i not in bad and i not in padding for i in range(n)])
    alone, alone_stats, alone_factors = clip([g[here] for g in grads], bounds)
    for a, b in zip(sums, alone, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(factors[:, here], alone_factors) and not factors[:, ~here].any()
    dropped = sum(i in bad and i not in padding for i in range(n)) * len(bounds)
    assert stats.tolist() == [alone_stats[0], dropped]


def exact_square(total: Tensor, bound: float) -> Fraction:
    return sum((x * x for x in total.flatten().tolist()), 0) * grid_of(bound) ** 2


RECORDS = given(
    seed=st.integers(0, 2**20),
    size=st.integers(1, 40),
    bound=st.floats(1e-150, 1e140),
    excess=st.one_of(st.sampled_from([1.0, 1 + 2**-52, 1 - 2**-53]), st.floats(0.5, 1e6)),
    equal=st.booleans(),
    double=st.booleans(),
)


@RECORDS
@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_no_record_contributes_more_than_the_bound(
    backend, seed, size, bound, excess, equal, double
):
    check_bound(seed, size, bound, excess, equal, double)


@settings(max_examples=8)
@RECORDS
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_no_record_contributes_more_than_the_bound_in_triton(
    backend, seed, size, bound, excess, equal, double
):
    check_bound(seed, size, bound, excess, equal, double)


def check_bound(seed, size, bound, excess, equal, double):
    dtype = torch.float64 if double else torch.float32
    if not double:
        bound = 2.0 ** (math.log2(bound) / 8)
    direction = (
        torch.ones(1, size).double() if equal else draw([(size,)], 1, seed, torch.float64)[0]
    )
    grad = (direction / direction.norm() * bound * excess).to(dtype)
    halves = [grad[:, : size // 2], grad[:, size // 2 :]]
    sums, _, factors = clip(halves, [bound])
    assert sum(exact_square(total, bound) for total in sums) <= Fraction(bound) ** 2
    if excess > 1.001:
        # And no less than it needs to: the whole bound is used, but for the grid.
        used = math.sqrt(sum(float(t.double().square().sum()) for t in sums))
        assert used * float(grid_of(bound)) > bound * (1 - 2**-29) and factors.item() < 1
    sums, _, _ = clip(halves, [bound, 2 * bound])
    assert exact_square(sums[0], bound) <= Fraction(bound) ** 2
    assert exact_square(sums[1], 2 * bound) <= Fraction(2 * bound) ** 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thread_count_never_shows_in_the_bits(dtype):
    # The second tensor is longer than the blocks in which norms are summed.
    grads = draw([(100,), (203, 170), (1025,)], 5, dtype=dtype)
    grads[1][3] = torch.nan
    results = []
    with use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(clip(grads, [1.3]))
    for sums, stats, factors in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(sums, results[0][0], strict=True))
        assert torch.equal(stats, results[0][1]) and torch.equal(factors, results[0][2])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bounds", [[1.3], [2.0, 0.01, 1e4]])
def test_backends_agree(bounds):
    grads = draw([(100,), (33, 170), (1025,)], 6)
    grads[0][2, 5] = -INF
    grads[2][5] *= 1e-20
    keep = torch.tensor([True, True, True, False, True, True])
    with use_backend("reference"):
        sums, stats, factors = clip(grads, bounds, keep)
    with use_backend("cpu"):
        others, other_stats, other_factors = clip(grads, bounds, keep)
    torch.testing.assert_close(other_factors, factors, rtol=1e-14, atol=0)
    assert torch.equal(stats, other_stats)
    # The norms' last bits may differ, and tip a record's term over one step of the grid.
    for a, b in zip(sums, others, strict=True):
        assert (a - b).abs().max() <= 6


@pytest.mark.parametrize("fill", [math.nan, INF, -INF])
@pytest.mark.parametrize("bounds", [[1.0], [1.0, 1.0], [INF], [INF, 1.0]])
def test_a_bad_record_is_dropped_and_counted_by_group(backend, bounds, fill):
    grads = draw([(4,), (2, 3)], 4, scale=0.1)
    grads[1][2, 0, 1] = fill
    sums, stats, factors = clip(grads, bounds)
    others = torch.tensor([0, 1, 3])
    expected, _, _ = clip([g[others] for g in grads], bounds)
    assert torch.equal(sums[1], expected[1])
    if len(bounds) == 1:
        assert torch.equal(sums[0], expected[0])
        assert factors[0].tolist()[2] == 0
    else:
        whole, _, _ = clip(grads[:1], bounds[:1])
        assert torch.equal(sums[0], whole[0])
        assert factors[:, 2].tolist() == [1, 0]
    assert stats.tolist() == [0, 1]


def test_padding_full_of_nan_changes_nothing_and_is_not_counted(backend):
    grads = draw([(4,), (2, 3)], 5)
    expected, expected_stats, _ = clip([g[:3] for g in grads], [0.5])
    for g in grads:
        g[3:] = torch.nan
    keep = torch.tensor([True, True, True, False, False])
    sums, stats, factors = clip(grads, [0.5], keep)
    assert all(torch.equal(a, b) for a, b in zip(sums, expected, strict=True))
    assert torch.equal(stats, expected_stats)
    assert not factors[:, 3:].any()
    sums, stats, _ = clip(grads, [INF], keep)
    for g, total in zip(grads, sums, strict=True):
        torch.testing.assert_close(total, g[:3].double().sum(dim=0), rtol=1e-15, atol=1e-15)
    assert stats.tolist() == [0, 0]
    _, stats, _ = clip(grads, [0.5], torch.zeros(5, dtype=torch.bool))
    assert stats.tolist() == [0, 0]


def test_an_infinite_bound_sums_without_clipping(backend):
    grads = draw(SHAPES, 6, scale=1e3)
    sums, stats, factors = clip(grads, [INF])
    assert (factors == 1).all() and stats.tolist() == [0, 0]
    for g, total in zip(grads, sums, strict=True):
        torch.testing.assert_close(total, g.double().sum(dim=0), rtol=1e-14, atol=1e-12)


def test_one_bound_may_be_a_number():
    grads = [torch.randn(4, 5), torch.randn(4, 2, 3)]
    wanted, stats, factors = clip(grads, [0.5])
    sums = empty_sums(grads, [0.5])
    found = ops.clip_accumulate(grads, sums, torch.zeros_like(stats), None, 0.5)
    assert torch.equal(found, factors)
    assert all(torch.equal(a, b) for a, b in zip(sums, wanted, strict=True))


def test_huge_gradients_are_clipped_to_the_bound(backend):
    grads = [torch.full((2, 4), 1e30), torch.full((2, 3), -1e30)]
    sums, stats, _ = clip(grads, [1.0])
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in sums)) * 2.0**-32
    assert norm == pytest.approx(2.0, rel=1e-9) and norm <= 2
    assert stats.tolist() == [2, 0]
    # The square of this norm is beyond fp64: dropped, as if it were infinite.
    (total,), stats, factors = clip([torch.full((1, 4), 1e200, dtype=torch.float64)], [1.0])
    assert not total.any() and factors.item() == 0 and stats.tolist() == [0, 1]


def test_tiny_gradients_pass_or_vanish_but_are_never_lifted(backend):
    for value in (1e-30, 1e-40, 1.4e-45, -1.4e-45):
        grads = [torch.full((3, 4), value)]
        (total,), stats, factors = clip(grads, [1.0])
        assert not total.any() and (factors == 1).all() and stats.tolist() == [0, 0]
    (total,), stats, _ = clip([torch.full((3, 4), 1e-30)], [1e-30])
    assert (total > 0).all() and stats.tolist() == [3, 0]
    norm = float(total.double().norm()) * float(grid_of(1e-30))
    assert norm == pytest.approx(3e-30, rel=1e-8) and norm <= 3e-30


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_more_records_than_fp64_adds_exactly(backend):
    n, value = (1 << 18) + 5, 2.0 - 2.0**-30
    grads = [
        torch.full((n, 1), value, dtype=torch.float64),
        torch.full((n,), -value, dtype=torch.float64),
    ]
    sums, _, factors = clip(grads, [math.nextafter(2.0, 0.0)] * 2)
    assert (factors == 1).all()
    assert [total.item() for total in sums] == [n * int(value * 2**32), n * int(-value * 2**32)]


def test_sums_and_stats_are_added_to(backend):
    grads = draw(SHAPES, 4)
    once, stats, _ = clip(grads, [0.5])
    twice, both, _ = clip(grads, [0.5], sums=[s.clone() for s in once], stats=stats.clone())
    assert stats[0] > 0
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
    assert torch.equal(both, 2 * stats)


def test_no_records_and_no_elements(backend):
    sums, stats, factors = clip([torch.zeros(0, 3), torch.zeros(0)], [1.0])
    assert factors.shape == (1, 0) and stats.tolist() == [0, 0]
    assert sums[0].tolist() == [0, 0, 0] and sums[1].item() == 0
    sums, _, factors = clip([torch.zeros(2, 0), torch.ones(2, 1)], [0.5])
    assert factors.shape == (1, 2) and sums[1].item() > 0


def test_inputs_need_not_be_contiguous(backend):
    (grad,) = draw([(6, 5)], 4)
    expected, _, _ = clip([grad], [0.5], torch.tensor([True, False, True, True]))
    strided = grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    keep = torch.tensor([[True, False, True, True]] * 2).t().contiguous()[:, 1]
    stats = torch.zeros(2, 2, dtype=torch.int64)[:, 1]
    sums, _, _ = clip([strided], [0.5], keep, stats=stats)
    assert torch.equal(sums[0], expected[0])
    assert stats[0] > 0


def valid():
    return {
        "grad_samples": [torch.zeros(4, 3), torch.zeros(4, 2)],
        "sums": [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)],
        "stats": torch.zeros(2, dtype=torch.int64),
        "keep": None,
        "max_grad_norm": [1.0],
    }


LONG = torch.int64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_samples": [], "sums": []}, "no tensors given"),
        ({"sums": [torch.zeros(3, dtype=LONG)]}, "1 sums for 2 tensors"),
        ({"max_grad_norm": [1.0, 1.0, 1.0]}, r"max_grad_norm is \[1.0, 1.0, 1.0\]; accepted"),
        ({"max_grad_norm": []}, r"max_grad_norm is \[\]; accepted"),
        ({"max_grad_norm": [0.0]}, r"max_grad_norm is \[0.0\]; accepted"),
        ({"max_grad_norm": [-1.0]}, r"max_grad_norm is \[-1.0\]; accepted"),
        ({"max_grad_norm": [math.nan]}, r"max_grad_norm is \[nan\]; accepted"),
        ({"max_grad_norm": [1e-200]}, r"max_grad_norm is \[1e-200\]; accepted"),
        ({"max_grad_norm": [1e200]}, r"max_grad_norm is \[1e\+200\]; accepted"),
        ({"max_grad_norm": [INF]}, r"sums\[0\] is torch.int64 .* torch.float64 for its bound"),
        ({"max_grad_norm": [1.0, INF]}, r"sums\[1\] is torch.int64 .* torch.float64"),
        ({"sums": [torch.zeros(3, dtype=LONG), torch.zeros(2)]}, r"sums\[1\] is torch.float32"),
        ({"sums": [torch.zeros(6, dtype=LONG)[::2], torch.zeros(2, dtype=LONG)]}, "contiguous"),
        ({"grad_samples": [torch.zeros(4, 3), torch.zeros(3, 2)]}, r"grad_samples\[1\] is .*3, 2"),
        ({"grad_samples": [torch.zeros(4, 3), torch.zeros(4, 3)]}, r"grad_samples\[1\] is .*4, 3"),
        ({"grad_samples": [torch.zeros(4, 3, dtype=LONG), torch.zeros(4, 2)]}, "a float type"),
        ({"keep": torch.ones(4)}, r"accepted: None or bool \(4,\)"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, r"accepted: None or bool \(4,\)"),
        ({"stats": torch.zeros(2)}, r"stats is torch.float32 \(2,\)"),
        ({"stats": torch.zeros(3, dtype=LONG)}, r"stats is torch.int64 \(3,\)"),
        ({"stats": torch.zeros(2, dtype=LONG, device="meta")}, "stats is on meta; accepted"),
    ],
)
def test_errors_name_the_argument_and_leave_the_sums(backend, change, message):
    arguments = valid() | change
    before = [s.clone() for s in arguments["sums"]]
    with pytest.raises(ConfigError, match=message):
        ops.clip_accumulate(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments["sums"], strict=True))


@pytest.mark.parametrize("bounds", [[0.5], [0.5, 2.0], [INF]])
def test_opcheck(backend, bounds):
    grads = draw([(3,), (2, 2)], 4)
    stats = torch.zeros(2, dtype=torch.int64)
    keep = torch.tensor([True, True, False, True])
    squares = [torch.stack([g.double().flatten(1).square().sum(1), torch.ones(4)]) for g in grads]
    arguments = (grads, squares, empty_sums(grads, bounds), stats, keep, bounds)
    torch.library.opcheck(torch.ops.ffa.clip_accumulate.default, arguments)


def test_what_lies_at_one_address_twice_is_refused():
    """It would be counted on once for two, and only be found out after the sum has grown."""
    arguments = ([torch.ones(1, 2)], [torch.zeros(2, dtype=torch.int64)])
    stats = torch.zeros(1, dtype=torch.int64).expand(2)
    with pytest.raises(ConfigError, match=r"stats is .*accepted: .*of its own elements"):
        ops.clip_accumulate(*arguments, stats, None, 1.0)
    assert not arguments[1][0].any()


@pytest.mark.parametrize("bound", ["1", torch.tensor(1.0), None])
def test_a_bound_that_is_no_number_is_named(bound):
    with pytest.raises((ConfigError, TypeError), match=r"max_grad_norm|0-d"):
        ops.clip_accumulate(
            *([torch.ones(1, 2)], [torch.zeros(2, dtype=torch.int64)]),
            *(torch.zeros(2, dtype=torch.int64), None, bound),
        )


def test_a_bound_of_numpys_is_a_number():
    total = torch.zeros(2, dtype=torch.int64)
    ops.clip_accumulate(
        [torch.ones(1, 2)], [total], torch.zeros(2, dtype=torch.int64), None, np.float32(1.0)
    )
    assert total.all()


@pytest.mark.usefixtures("one_thread")
def test_known_norms_of_many_ranks_are_not_too_small():
    """Numbers that are alike round alike, and a long sum's rounding would outgrow the margin."""
    value, r = 3534837.0, 16384
    _, G, squares = ops.per_sample_grad(torch.ones(1, 1, 192), torch.full((1, 1, r), value), None)
    exact = int(value) ** 2 * G.numel()
    assert (value == G).all() and abs(Fraction(squares[0, 0].item()) / exact - 1) < 2**-41
