"""The CUDA kernels at the shapes where their tiles, panels, slices and tables end.

They run on a GPU, or on the CPU through a serial library (test_cuda.py builds one).
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ffa_kernels import ops
from ffa_kernels.backends import native
from ffa_kernels.backends.dispatch import use_backend

pytestmark = [
    pytest.mark.skipif(not native.available("cuda"), reason="no GPU and no serial CUDA library"),
    pytest.mark.parametrize("backend", ["cuda"], indirect=True),
]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
STATE = torch.tensor([5, -6, 7, -8, 9])


def check(value: Tensor, exact: Tensor, own: Tensor) -> None:
    """At most twice PyTorch's own error at this dtype, plus one ulp of the largest value."""
    assert value.shape == own.shape and value.dtype == own.dtype
    if own.numel() == 0:
        return
    largest = own.abs().max().item()
    ulp = torch.finfo(own.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    bound = 2 * (own.double() - exact).abs().max().item() + ulp
    assert (value.double() - exact).abs().max().item() <= bound


def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes).to(dtype)


def per_record(g: Tensor, h: Tensor, offsets: list[int], scale: float) -> Tensor:
    pieces = [g[start:end].t() @ h[start:end] for start, end in itertools.pairwise(offsets)]
    return torch.stack(pieces) * scale


# n, tokens, d_out, r. Panels are 512 columns wide (256 beyond rank 16, 128 in fp32), chunks have 64
# ranks (16 in fp32); tokens are cut into slices where records are few and long, never evenly here.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 77, 3),
    (4, 1, 1030, 16),
    (2, 40, 520, 8),
    (2, 17, 257, 17),
    (1, 33, 24, 256),
    (2, 19, 300, 70),
    (1, 701, 64, 8),
    (2, 301, 130, 5),
    (1, 531, 520, 33),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, tokens, d_out, r", SHAPES)
def test_per_sample_grad_at_every_edge(backend, n, tokens, d_out, r, dtype):
    torch.manual_seed(d_out)
    g, h = random(n, tokens, d_out, dtype=dtype), random(n, tokens, r, dtype=dtype)
    B = random(d_out, r, dtype=dtype)
    u, G, squares = ops.per_sample_grad(g, h, B, scaling=0.25, mean_loss=True)
    scale, wide = 0.25 * n, [t.double() for t in (g, h, B)]
    check(u, wide[0] @ wide[2], g @ B)
    exact = torch.einsum("ntd,ntr->ndr", wide[0], wide[1]) * scale
    check(G, exact, torch.einsum("ntd,ntr->ndr", g, h) * scale)
    of_stored = G.double().square().sum(dim=(1, 2))
    expected = torch.stack([of_stored, torch.ones(n, dtype=torch.float64)])
    torch.testing.assert_close(squares, expected, rtol=1e-13, atol=0)
    alone = ops.per_sample_grad(g, h, None, scaling=0.25, mean_loss=True)
    assert torch.equal(alone[1], G) and torch.equal(alone[2], squares)
    again = ops.per_sample_grad(g, h, B, scaling=0.25, mean_loss=True)
    assert all(torch.equal(a, b) for a, b in zip(again, (u, G, squares), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "total, offsets",
    [
        (50, [0, 7, 7, 40, 50]),
        (50, [3, 20, 21, 44]),
        (1303, [0, 601, 1303]),
        (20, [5]),
        (0, [0, 0, 0]),
    ],
)
def test_segments_at_every_edge(backend, total, offsets, dtype):
    torch.manual_seed(total)
    d_out, r = 140, 6
    g, h, B = (random(*s, dtype=dtype) for s in ((total, d_out), (total, r), (d_out, r)))
    u, G, squares = ops.per_sample_grad(
        g, h, B, torch.tensor(offsets, dtype=torch.int32), scaling=0.5
    )
    wide = [t.double() for t in (g, h, B)]
    check(u, wide[0] @ wide[2], g @ B)
    assert G.shape == (len(offsets) - 1, d_out, r)
    if len(offsets) > 1:
        check(G, per_record(*wide[:2], offsets, 0.5), per_record(g, h, offsets, 0.5))
    torch.testing.assert_close(squares[0], G.double().square().sum(dim=(1, 2)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_offset_reads_outside(backend, dtype):
    """Whatever cu_seqlens holds; the op itself refuses such values where it can see them."""
    from ffa_kernels.backends import cuda

    g, h, B = random(20, 40, dtype=dtype), random(20, 4, dtype=dtype), random(40, 4, dtype=dtype)
    for offsets in ([-5, 7, 2**31 - 1], [30, 10, 40], [12, 3, 19], [-(2**31), -1, -1]):
        u, G, _ = cuda.per_sample_grad(
            g, h, B, torch.tensor(offsets, dtype=torch.int32), 1.0, False
        )
        clamped = [min(max(o, 0), 20) for o in offsets]
        check(u, g.double() @ B.double(), g @ B)
        own = per_record(g, h, clamped, 1.0)
        check(G, per_record(g.double(), h.double(), clamped, 1.0), own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_stays_in_its_record(backend, dtype):
    g, h = random(3, 21, 530, dtype=dtype), random(3, 21, 9, dtype=dtype)
    B = random(530, 9, dtype=dtype)
    expected = ops.per_sample_grad(g, h, B)
    g[1, 20], h[1, 3] = torch.nan, torch.inf
    u, G, squares = ops.per_sample_grad(g, h, B)
    for i in (0, 2):
        for mine, before in zip((u, G, squares.t()), (*expected[:2], expected[2].t()), strict=True):
            assert torch.equal(mine[i], before[i])
    assert not squares[0, 1].isfinite()


# rows, d_in, d_out, r. Tiles are 32 rows by 256 columns, 64 by 128 in fp32.
LINEAR_SHAPES = [
    (1, 1, 1, 1),
    (33, 40, 257, 3),
    (70, 130, 264, 16),
    (5, 600, 77, 9),
    (130, 24, 32, 70),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, d_in, d_out, r", LINEAR_SHAPES)
def test_the_rank_term_at_every_edge(backend, rows, d_in, d_out, r, dtype, p, monkeypatch):
    # x is masked in several pieces.
    monkeypatch.setattr("ffa_kernels.backends.cuda._DROPOUT_CHUNK", 1 << 12)
    torch.manual_seed(rows)
    x, W = random(rows, d_in, dtype=dtype), random(d_out, d_in, dtype=dtype)
    b, A, B = (
        random(d_out, dtype=dtype),
        random(r, d_in, dtype=dtype),
        random(d_out, r, dtype=dtype),
    )
    state = STATE if p else None
    settings = (state, None, 0.5, p, False)
    y, h = torch.ops.ffa.linear(x, W, b, A, B, None, None, *settings)
    g, u = random(rows, d_out, dtype=dtype), random(rows, r, dtype=dtype)
    dx = torch.ops.ffa.linear_backward(g, u, W, A, B, state, 0.5, p)
    with use_backend("reference"):
        wide = [t.double() for t in (x, W, b, A, B)]
        exact_y, exact_h = torch.ops.ffa.linear(*wide, None, None, *settings)
        own_y, own_h = torch.ops.ffa.linear(x, W, b, A, B, None, None, *settings)
        backward = (g, u, W, A, B)
        exact_dx = torch.ops.ffa.linear_backward(*(t.double() for t in backward), state, 0.5, p)
        own_dx = torch.ops.ffa.linear_backward(*backward, state, 0.5, p)
    check(y, exact_y, own_y)
    check(h, exact_h, own_h)
    check(dx, exact_dx, own_dx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_elements_are_left_as_they_were(backend, dtype):
    """By selection: NaN times the mask's 0 would be NaN."""
    g, W = random(9, 5, dtype=dtype), random(5, 70, dtype=dtype)
    u, A = torch.full((9, 2), torch.nan, dtype=dtype), random(2, 70, dtype=dtype)
    B = random(5, 2, dtype=dtype)
    dx = torch.ops.ffa.linear_backward(g, u, W, A, B, STATE, 1.0, 0.5)
    assert torch.equal(dx[~dx.isnan()], (g @ W)[~dx.isnan()])
    assert 0.3 < dx.isnan().double().mean() < 0.7


def many_tensors(count: int, n: int) -> dict[str, list[Tensor]]:
    """More than one table holds, of every dtype, some of them empty or longer than a block."""
    torch.manual_seed(count)
    dtypes = [*DTYPES, torch.float64]
    sizes = [(0,), (1,), (7, 3), (64, 8), (2049,), (8, 8)]
    chosen = [(sizes[k % len(sizes)], dtypes[k % len(dtypes)]) for k in range(count)]
    return {
        "grad_samples": [torch.randn(n, *size).to(dtype) for size, dtype in chosen],
        "params": [torch.randn(*size).to(dtype) for size, dtype in chosen],
    }


def copied(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("layers", [False, True])
def test_more_tensors_than_a_table_holds(backend, layers, known):
    count, n = 100, 4
    tensors = many_tensors(count, n)
    grads = tensors["grad_samples"]
    grads[30][2] = torch.nan
    bounds = [0.5 + k / count for k in range(count)] if layers else [6.0]
    keep = torch.tensor([True, True, True, False])
    squares = []
    if known:
        of_records = [g.double().square().flatten(1).sum(dim=1) for g in grads]
        # Records 1 and 3 were seen twice: their norm is that of G.
        calls = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)
        squares = [torch.stack([s * calls**3, calls]) for s in of_records]

    def clipped() -> tuple[Tensor, list[Tensor], Tensor]:
        sums = [torch.full(p.shape, 3, dtype=torch.int64) for p in tensors["params"]]
        stats = torch.zeros(2, dtype=torch.int64)
        factors = ops.clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)
        return factors, sums, stats

    factors, sums, stats = clipped()
    with use_backend("reference"):
        expected, expected_sums, expected_stats = clipped()
    assert torch.equal(stats, expected_stats)
    torch.testing.assert_close(factors, expected, rtol=1e-14, atol=0)
    for mine, theirs in zip(sums, expected_sums, strict=True):
        assert (mine - theirs).abs().sum() <= (0 if layers else 4 * mine.numel())


@pytest.mark.parametrize("optimizer", ["none", "sgd", "adam"])
@pytest.mark.parametrize("layers", [False, True])
def test_a_step_in_one_equals_a_step_in_two(backend, layers, optimizer):
    count, n = 100, 3
    tensors = many_tensors(count, n)
    bounds = [1.0 + k for k in range(count)] if layers else [2.0]
    hyper = torch.tensor([[0.1, 0.01, 0.9, 0.99, 1e-8]] * count, dtype=torch.float64)
    settings = {
        "tensor_ids": list(range(7, 7 + count)),
        "max_grad_norm": bounds,
        "noise_multiplier": 1.0,
        "expected_batch_size": 2.5,
        "optimizer": optimizer,
    }

    def state() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        params = copied(tensors["params"])
        zeros = [torch.zeros_like(p) for p in params]
        moments = (zeros, copied(zeros)) if optimizer == "adam" else ([], [])
        steps = [] if optimizer == "none" else [torch.tensor(float(k % 3)) for k in range(count)]
        return params, *moments, steps, STATE.clone()

    once, twice = state(), state()
    stats = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    factors = ops.private_step(tensors["grad_samples"], stats[0], None, *once, hyper, **settings)
    sums = [torch.zeros(p.shape, dtype=torch.int64) for p in tensors["params"]]
    expected = ops.clip_accumulate(tensors["grad_samples"], sums, stats[1], None, bounds)
    ops.private_update(twice[0], sums, *twice[1:], hyper, **settings)
    assert torch.equal(factors, expected) and torch.equal(*stats)
    assert not any(total.any() for total in sums)
    assert once[4][4] == twice[4][4] == 10
    for mine, theirs in zip(once[:4], twice[:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [s.item() for s in once[3]] == (
        [] if optimizer == "none" else [k % 3 + 1 for k in range(count)]
    )


@pytest.mark.parametrize("count, noise_multiplier", [(60, 1.5), (500, 0.0)])
def test_every_tensor_is_updated_by_its_own_numbers(backend, count, noise_multiplier):
    """Of more than a table holds, or than a launch counts the steps of; in fp64, to see any."""
    torch.manual_seed(0)
    sizes = [1 + k % 3 for k in range(count)]
    values = [torch.randn(size, dtype=torch.float64) for size in sizes]
    sums = [torch.randint(-(2**40), 2**40, (size,)) for size in sizes]
    hyper = torch.tensor([1e-1, 1e-2, 0.5, 0.5, 1e-8]).double() * torch.rand(count, 5).double()

    def updated() -> tuple[list[Tensor], ...]:
        params, totals = copied(values), copied(sums)
        moments = [v.abs() for v in values], [v * v for v in values]
        steps = [torch.tensor(float(k % 7)) for k in range(count)]
        state = STATE.clone()
        ops.private_update(
            *(params, totals, *moments, steps, state, hyper),
            tensor_ids=list(range(3, 3 + count)),
            max_grad_norm=[1.0 + k / 8 for k in range(count)],
            noise_multiplier=noise_multiplier,
            expected_batch_size=4.0,
            optimizer="adam",
        )
        assert not any(total.any() for total in totals) and state[4] == STATE[4] + 1
        return params, *moments, steps

    mine = updated()
    with use_backend("reference"):
        expected = updated()
    for tensors, others in zip(mine, expected, strict=True):
        torch.testing.assert_close(
            torch.cat([t.flatten() for t in tensors]),
            torch.cat([t.flatten() for t in others]),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_and_blocks_changes_no_bit(backend, dtype, monkeypatch):
    from ffa_kernels.backends import cuda

    if not cuda._serial():
        pytest.skip("a GPU has an order of its own")
    torch.manual_seed(0)
    g, h, B = (random(*s, dtype=dtype) for s in ((1, 260, 520), (1, 260, 5), (520, 5)))
    x, W, A = (random(*s, dtype=dtype) for s in ((70, 40), (300, 40), (9, 40)))
    tensors = many_tensors(20, 3)
    hyper = torch.tensor([[0.1, 0.01, 0.9, 0.99, 1e-8]] * 20, dtype=torch.float64)

    def everything() -> list[Tensor]:
        out = [*ops.per_sample_grad(g, h, B), ops.chacha20(STATE, 1, 0, 300)]
        out.append(ops.gaussian(STATE, 1, 5000, dtype))
        right = random(300, 9, dtype=dtype)
        settings = (STATE, None, 0.5, 0.3, False)
        out += torch.ops.ffa.linear(x, W, None, A, right, None, None, *settings)
        out.append(torch.ops.ffa.linear_backward(out[-2], out[-1], W, A, right, STATE, 0.5, 0.3))
        params, stats = copied(tensors["params"]), torch.zeros(2, dtype=torch.int64)
        steps = [torch.zeros(()) for _ in params]
        factors = ops.private_step(
            *(tensors["grad_samples"], stats, None, params, [], [], steps, STATE.clone(), hyper),
            tensor_ids=list(range(20)),
            max_grad_norm=[2.0],
            noise_multiplier=1.0,
            expected_batch_size=2.5,
            optimizer="sgd",
        )
        return [*out, *params, factors, stats]

    results = []
    for order in ("forward", "reversed"):
        monkeypatch.setenv("FFA_SERIAL_GRID", order)
        torch.manual_seed(1)
        results.append(everything())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_words_and_clip_factors_have_the_bits_of_the_cpu(backend):
    if not native.available("cpu"):
        pytest.skip("no compiled CPU library")
    from ffa_kernels.backends import cpu

    words = ops.chacha20(STATE, 3, (1 << 32) - 700, 700)
    assert torch.equal(words.cpu(), cpu.chacha20(STATE.cpu(), 3, (1 << 32) - 700, 700))
    torch.manual_seed(0)
    n = 2000
    norms_sq = torch.cat(
        [torch.rand(n - 6, dtype=torch.float64) * 10 ** torch.linspace(-9, 9, n - 6)]
    )
    edges = [0.0, torch.inf, torch.nan, 1.7e308, 5e-324, 1.0]
    norms_sq = torch.cat([norms_sq, torch.tensor(edges, dtype=torch.float64)])
    squares = torch.stack([norms_sq, torch.ones(n, dtype=torch.float64)])
    grads = torch.zeros(n, 1)

    def factors(backend_module, device):
        sums, stats = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        arguments = ([grads], [squares], [sums], stats)
        moved = [
            [t.to(device) for t in a] if isinstance(a, list) else a.to(device) for a in arguments
        ]
        return backend_module.clip_accumulate(*moved, None, [1.0]).cpu()

    from ffa_kernels.backends import cuda

    assert torch.equal(factors(cuda, grads.device), factors(cpu, "cpu"))


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_convert_as_torch_does(backend, dtype):
    """Every bit pattern, read and written by a dropout that drops nothing; NaN stays NaN."""
    from ffa_kernels.backends import cuda

    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty_like(patterns)
    cuda._launch(
        *("dropout", out.device, STATE.data_ptr(), 0.0, 0, 256, 256, cuda._DTYPES[dtype]),
        *(patterns.data_ptr(), out.data_ptr()),
    )
    number = ~patterns.isnan()
    assert torch.equal(out[number].view(torch.int16), patterns[number].view(torch.int16))
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_rounds_to_halves_as_torch_does(backend, dtype):
    """Written by an optimizer that is none: params = sums / L with no bound."""
    from ffa_kernels.backends import cuda

    torch.manual_seed(0)
    info = torch.finfo(dtype)
    scale = 2.0 ** torch.randint(-30, 20, (20000,))
    values = torch.cat([torch.randn(20000) * scale, torch.tensor([0.0, -0.0, info.max, info.tiny])])
    middle = torch.arange(1, 2000, dtype=torch.float64) * info.smallest_normal * info.eps / 2
    values = torch.cat([values.double(), middle, -middle, torch.tensor([65519.9, 65520.0, 1e39])])
    values = values.float()
    param = torch.empty(len(values), dtype=dtype)
    cuda.private_update(
        *([param], [values.double()], [], [], [], STATE.clone(), torch.zeros(1, 5).double()),
        *([0], [math.inf], 0.0, 1.0, "none", False, False),
    )
    assert torch.equal(param.view(torch.int16), values.to(dtype).view(torch.int16))
