"""The clipped sum without G: the bits of `per_sample_grad` and `clip_accumulate` in turn."""

import math

import pytest
import torch
from torch import Tensor

from ffa_kernels import ops
from ffa_kernels.errors import ConfigError

# Leading sizes (n, ...), d_out, r, C.
CASES = [
    ((5, 1), 77, 1, 0.7),
    ((5,), 77, 3, 1e4),
    ((5, 7), 77, 8, math.inf),
    ((3, 2, 9), 257, 7, 0.7),
    ((2, 33), 130, 40, 30.0),
    ((2, 3), 70, 130, 0.7),
    ((0, 4), 5, 2, 0.7),
    ((3, 0), 5, 2, math.inf),
]


def inputs(leading, d_out, r, dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(d_out)
    return [
        torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu").to(
            torch.get_default_device(), dtype
        )
        for sizes in ((*leading, d_out), (*leading, r), (d_out, r))
    ]


def served(backend, dtype):
    """`dtype`, or a 16-bit type where the backend has no fp64."""
    return torch.bfloat16 if backend in ("triton", "cuda") and dtype == torch.float64 else dtype


def check(g, h, B, C, keep=None, offsets=None):
    """u, factors, sum and counts equal those of the two ops in turn, bit for bit."""
    settings = {"scaling": 0.25, "mean_loss": True}
    zeros = torch.float64 if math.isinf(C) else torch.int64
    totals = [torch.full(B.shape, 3, dtype=zeros) for _ in range(2)]
    stats = [torch.tensor([10, 20]) for _ in range(2)]
    u, G, known = ops.per_sample_grad(g, h, B, offsets, **settings)
    expected = ops.clip_accumulate([G], [totals[0]], stats[0], keep, [C], squares=[known])
    made = ops.per_sample_clip(
        g, h, B, totals[1], stats[1], keep, C, cu_seqlens=offsets, **settings
    )
    torch.testing.assert_close(made[0], u, rtol=0, atol=0, equal_nan=True)
    # Tiles, and so the order of a sum of squares, may depend on whether G is stored.
    torch.testing.assert_close(made[1], expected, rtol=1e-14, atol=0)
    off = (totals[1] - totals[0]).abs().max().item() if B.numel() else 0
    assert off <= (1e-12 * totals[0].abs().max().item() if math.isinf(C) else known.shape[1])
    assert torch.equal(*stats)
    alone = torch.zeros_like(totals[0])
    none, factors = ops.per_sample_clip(
        g, h, None, alone, stats[1], keep, C, cu_seqlens=offsets, **settings
    )
    assert none.shape == (0,)
    torch.testing.assert_close(factors, made[1], rtol=1e-14, atol=0)
    return totals[1], made[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading, d_out, r, C", CASES)
def test_equals_the_two_ops_in_turn(backend, leading, d_out, r, C, dtype):
    g, h, B = inputs(leading, d_out, r, served(backend, dtype))
    total, factors = check(g, h, B, C)
    if 0 not in leading:
        assert total.any() and (factors < 1).any() == (C < 1e4)


def test_a_bad_record_and_padding_are_left_out_by_selection(backend):
    g, h, B = inputs((6, 4), 70, 5, torch.float32)
    keep = torch.tensor([True, False, True, True, True, True])
    clean, _ = check(g, h, B, 0.5, keep & (torch.arange(6) != 3))
    g[3, 2, 1], g[1] = torch.nan, torch.inf
    dirty, factors = check(g, h, B, 0.5, keep)
    assert torch.equal(dirty, clean)
    assert factors[0, 1] == factors[0, 3] == 0


@pytest.mark.parametrize(
    "offsets, C", [([1, 4, 6, 6, 12], 0.7), ([0, 14], math.inf), ([5], 0.7), ([5], math.inf)]
)
def test_packed_records(backend, offsets, C):
    g, h, B = inputs((14,), 77, 3, torch.float32)
    check(g, h, B, C, offsets=torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"h": torch.zeros(2, 4, 3)}, r"h is torch.float32 \(2, 4, 3\)"),
        ({"lora_B": torch.zeros(6, 3)}, r"lora_B is torch.float32 \(6, 3\); accepted: .*\(6, 2\)"),
        ({"total": torch.zeros(6, 3).long()}, r"total is \(6, 3\); accepted: \(6, 2\)"),
        ({"total": torch.zeros(6, 2)}, r"sums\[0\] is torch.float32 .*accepted: .*torch.int64"),
        ({"stats": torch.zeros(3).long()}, r"stats is torch.int64 \(3,\); accepted: int64 \(2,\)"),
        ({"stats": torch.zeros(4).long()[::2]}, r"stats has strides \(2,\); accepted: contiguous"),
        ({"keep": torch.ones(3)}, r"keep is \(torch.float32, \(3,\)\); accepted: .* bool \(2,\)"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is \[0.0\]; accepted"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "g": torch.zeros(2, 3, 6),
        "h": torch.zeros(2, 3, 2),
        "lora_B": torch.zeros(6, 2),
        "total": torch.zeros(6, 2).long(),
        "stats": torch.zeros(2).long(),
        "keep": None,
        "max_grad_norm": 1.0,
    }
    with pytest.raises(ConfigError, match=f"per_sample_clip: .*{message}"):
        ops.per_sample_clip(**(arguments | change))


@pytest.mark.parametrize("with_B", [True, False])
def test_opcheck(backend, with_B):
    g, h, B = inputs((3, 4), 7, 2, torch.float32)
    total, stats = torch.zeros(7, 2).long(), torch.zeros(2).long()
    torch.library.opcheck(
        torch.ops.ffa.per_sample_clip.default,
        (g, h, B if with_B else None, None, total, stats, None, 0.5, True, 1.0),
    )
