"""What each op must do at least: bytes through memory, operations, and so the time of its floor.

A floor is the longer of bytes over the measured copy bandwidth and operations over the measured
rate of a matrix product, both taken in the same run on the same machine (`ceilings`). Each input
is counted as read once and each output as written once, whatever the caches may save.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffa_kernels.backends import cpu

COPY_BYTES = 1 << 28
MATRIX = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds at `bandwidth` bytes and `rate` operations a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def frozen_linear(rows: int, d_out: int, d_in: int, size: int) -> Work:
    """y = x W^T: what the adapted layer is measured against. `size` is bytes an element."""
    return Work(size * (rows * (d_in + d_out) + d_out * d_in), 2 * rows * d_out * d_in)


def linear(rows: int, d_out: int, d_in: int, r: int, size: int) -> Work:
    """The frozen linear, A and B read, h written, and two rank-r products."""
    extra = Work(size * (r * (d_in + d_out) + rows * r), 2 * rows * r * (d_in + d_out))
    return frozen_linear(rows, d_out, d_in, size) + extra


def linear_backward(rows: int, d_out: int, d_in: int, r: int, size: int) -> Work:
    """dx = g W + s u A: as the frozen layer's, with u and A read and one rank-r product."""
    extra = Work(size * (rows * r + r * d_in), 2 * rows * r * d_in)
    return frozen_linear(rows, d_in, d_out, size) + extra


def per_sample_grad(n: int, tokens: int, d_out: int, r: int, size: int) -> Work:
    """g, h and B read once; u, G and the norms written once; two rank-r products."""
    rows = n * tokens
    moved = rows * d_out + 2 * rows * r + d_out * r + n * d_out * r
    return Work(size * moved + 8 * n, 4 * rows * d_out * r)


def per_sample_backward(n: int, tokens: int, d_out: int, d_in: int, r: int, size: int) -> Work:
    """As the frozen layer's backward, with h, A and B read, G and the norms written, and three
    rank-r products; u is in no memory."""
    rows = n * tokens
    extra = Work(
        size * (rows * r + r * (d_in + d_out) + n * d_out * r) + 8 * n,
        2 * rows * r * (d_in + 2 * d_out),
    )
    return frozen_linear(rows, d_in, d_out, size) + extra


def per_sample_clip(n: int, tokens: int, d_out: int, r: int, size: int) -> Work:
    """g, h and B read once, u written, the 64-bit sum read and written, no G; as many products."""
    rows = n * tokens
    moved = size * (rows * d_out + 2 * rows * r + d_out * r)
    return Work(moved + 16 * d_out * r, 4 * rows * d_out * r + 4 * n * d_out * r)


def clip_accumulate(n: int, numel: int, size: int, norms_known: bool) -> Work:
    """G read once, or twice where its norms are not known; the 64-bit sums read and written."""
    reads = n * numel * (1 if norms_known else 2)
    return Work(size * reads + 16 * numel, n * numel * (2 if norms_known else 4))


# Against the matrix product's rate these count for little: a step that is far from its roofline is
# bound by them. Integer operations of a ChaCha20 block over its eight Gaussians, and those of a
# Box-Muller pair over its two.
CHACHA20_OPERATIONS = 960
NOISE_OPERATIONS = CHACHA20_OPERATIONS // 8 + 70 // 2


def chacha20(n_blocks: int) -> Work:
    """Sixteen words a block written; there is nothing to read."""
    return Work(64 * n_blocks, CHACHA20_OPERATIONS * n_blocks)


def gaussian(numel: int, size: int) -> Work:
    """Each value written once; their words are in no memory."""
    return Work(size * numel, NOISE_OPERATIONS * numel)


def private_update(numel: int, size: int, moments: int) -> Work:
    """The 64-bit sums read and zeroed; parameter and moments read and written; noise drawn."""
    return Work(numel * (16 + 2 * size * (1 + moments)), numel * (NOISE_OPERATIONS + 12))


def private_step(n: int, numel: int, grad_size: int, size: int, moments: int) -> Work:
    """G read once, its norms known; parameter and moments read and written; no sums."""
    moved = n * grad_size + 2 * size * (1 + moments)
    return Work(numel * moved, numel * (2 * n + NOISE_OPERATIONS + 12))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, on the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> tuple[float, float]:
    """Bytes a second of a large copy (read plus write) and operations a second of a product."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copies, products = [], []
    # Whichever is the faster here, PyTorch's or this library's; rows as tokens of one record.
    own = device.type == "cpu" and cpu.has_product(a.unsqueeze(0), b)
    for i in range(repeats + 3):
        copy = timed(lambda: target.copy_(source), device)
        product = timed(lambda: cpu.product(a, b, None) if own else a @ b, device)
        if i >= 3:
            copies.append(copy)
            products.append(product)
    return (
        2 * COPY_BYTES / statistics.median(copies),
        2 * side**3 / statistics.median(products),
    )
