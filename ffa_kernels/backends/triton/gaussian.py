"""Standard Gaussians from ChaCha20 words, in fp64 (see csrc/common/gaussian.h).

    u1 = ((w0 >> 11) + 1) 2^-53 in (0, 1]      z0 = sqrt(-2 ln u1) cos(2 pi u2)
    u2 =  (w1 >> 11)      2^-53 in [0, 1)      z1 = sqrt(-2 ln u1) sin(2 pi u2)

The noise is rounded to a grid 2^-32 of the bound: fp32 would leave the grid's lower bits, and so
the sum's, in the clear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.triton import interpreted
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.chacha20 import chacha20_words
from ffa_kernels.backends.triton.launch import launch

# A block a thread. Under the interpreter a program costs the same for any number of blocks.
BLOCKS = 4096 if interpreted() else 128
WARPS = 4
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@jit
def log_positive(u):
    """ln u: u = 2^k m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh(f / (2 + f)), f = m - 1."""
    half_root = 0x3FE6A09E667F3BCD  # sqrt(1/2)
    bits = u.to(tl.int64, bitcast=True) + (0x3FF0000000000000 - half_root)
    k = ((bits >> 52) - 1023).to(tl.float64)
    m = ((bits & 0x000FFFFFFFFFFFFF) + half_root).to(tl.float64, bitcast=True)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = z * 0.14616449685043406 + 0.15331721600556042
    p = p * z + 0.18182889125261723
    p = p * z + 0.2222221113479508
    p = p * z + 0.28571428625975487
    p = p * z + 0.39999999999899505
    p = p * z + 0.666666666666667
    tail = s * z * p + k * 5.497923018708371e-14
    return k * 0.6931471805598903 + (2.0 * s + tail)


@jit
def sincos_turn(quarters, t):
    """cos and sin of 2 pi (quarters / 4 + t), |t| <= 1/8."""
    z = t * t
    p = z * 3.78643334956545 - 15.094054182079999
    p = p * z + 42.05868918088512
    p = p * z - 76.70585973562093
    p = p * z + 81.6052492760517
    p = p * z - 41.341702240399755
    s = t * (p * z + 6.283185307179586)
    p = z * -1.6990343940660637 + 7.903206911569678
    p = p * z - 26.426253275854723
    p = p * z + 60.24464135270201
    p = p * z - 85.4568172066438
    p = p * z + 64.93939402266824
    p = p * z - 19.739208802178716
    c = p * z + 1.0
    odd = (quarters & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quarters + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quarters & 2) == 2, -sine, sine)
    return cosine, sine


@jit
def box_muller(low0, high0, low1, high1):
    """Two standard Gaussians from two 64-bit words, each given as its halves."""
    w0 = (high0.to(tl.int64) << 21) | (low0.to(tl.int64) >> 11)
    w1 = (high1.to(tl.int64) << 21) | (low1.to(tl.int64) >> 11)
    u1 = (w0 + 1).to(tl.float64) * 1.1102230246251565e-16
    radius = tl.sqrt(-2.0 * log_positive(u1))
    # u2 = quarters / 4 + t: to the nearest quarter, in integers, so that t is exact.
    quarters = (w1 + (1 << 50)) >> 51
    t = (w1 - (quarters << 51)).to(tl.float64) * 1.1102230246251565e-16
    cosine, sine = sincos_turn(quarters, t)
    return radius * cosine, radius * sine


@jit
def gaussians(state_ptr, tensor_id, block):
    """The eight Gaussians of each ChaCha20 block.

    state_ptr: *i64 rng_state[5]; tensor_id: integer; block: int64 (NB,).
    Returns fp64 (NB, 8): column j is element 8 block + j.
    """
    w = chacha20_words(state_ptr, tensor_id, block)
    z0, z1 = box_muller(w[0], w[1], w[2], w[3])
    z2, z3 = box_muller(w[4], w[5], w[6], w[7])
    z4, z5 = box_muller(w[8], w[9], w[10], w[11])
    z6, z7 = box_muller(w[12], w[13], w[14], w[15])
    # `join` adds the last dimension: the pairs are joined from the index's highest bit down.
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.reshape(tl.join(even, odd), [block.shape[0], 8])


@jit(do_not_specialize=["tensor_id"])
def gaussian_kernel(state_ptr, out_ptr, tensor_id, numel, BLOCKS: tl.constexpr):
    """out[8 b + j] = Gaussian j of block b."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    z = gaussians(state_ptr, tensor_id, block)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        z = z.to(tl.float32)  # The interpreter rounds to bfloat16 from nothing else.
    element = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + element, z.to(out_ptr.dtype.element_ty), mask=element < numel)


def gaussian(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) standard Gaussians, rounded to `dtype`; see `ffa_kernels.ops.gaussian`."""
    out = torch.empty(numel, dtype=dtype, device=rng_state.device)
    if numel > 0:
        launch(
            *(gaussian_kernel, triton.cdiv(numel, 8 * BLOCKS)),
            tensors=(rng_state.contiguous(), out),
            integers=(tensor_id, numel),
            floats=(),
            constexprs=(BLOCKS,),
            num_warps=WARPS,
            num_stages=1,
        )
    return out


def builds(cc: int) -> list[Build]:
    """The kernel for each dtype."""
    return [
        Build(
            gaussian_kernel,
            {"state_ptr": "*i64", "out_ptr": f"*{name}", "tensor_id": "i32", "numel": "i32"},
            {"BLOCKS": BLOCKS},
            num_warps=WARPS,
            num_stages=1,
            tensor_cores=False,
            label=f"gaussian {name}",
            divisible=("state_ptr", "out_ptr", "numel"),
        )
        for name in TYPES.values()
    ]
