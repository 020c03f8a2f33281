"""ChaCha20 blocks (RFC 8439, section 2.3): a tensor of counters to sixteen tensors of words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.triton import interpreted
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.launch import launch

# A block a thread. Under the interpreter a program costs the same for any number of blocks.
BLOCKS = 4096 if interpreted() else 128
WARPS = 4


@jit
def quarter_round(a, b, c, d):
    # Sums are meant to wrap. Rotations are spelled out, for the interpreter's sake: a call costs it
    # more than they do.
    a = tl.add(a, b, sanitize_overflow=False)
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = tl.add(c, d, sanitize_overflow=False)
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = tl.add(a, b, sanitize_overflow=False)
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = tl.add(c, d, sanitize_overflow=False)
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@jit
def key_word(state_ptr, i: tl.constexpr):
    """Little-endian 32-bit word i of rng_state: the key's eight, then the step's two."""
    word = tl.load(state_ptr + i // 2).to(tl.uint64, bitcast=True)
    return (word >> (32 * (i % 2))).to(tl.uint32)


@jit
def chacha20_words(state_ptr, tensor_id, counter):
    """The block function for each counter under rng_state's key and step.

    state_ptr: *i64 rng_state[5]; tensor_id: integer in [0, 2^32); counter: integers of any shape,
    modulo 2^32. Returns sixteen uint32 tensors of counter's shape.
    """
    i12 = counter.to(tl.uint32)
    zero = i12 ^ i12
    i0, i1, i2, i3 = zero | 0x61707865, zero | 0x3320646E, zero | 0x79622D32, zero | 0x6B206574
    i4, i5 = zero | key_word(state_ptr, 0), zero | key_word(state_ptr, 1)
    i6, i7 = zero | key_word(state_ptr, 2), zero | key_word(state_ptr, 3)
    i8, i9 = zero | key_word(state_ptr, 4), zero | key_word(state_ptr, 5)
    i10, i11 = zero | key_word(state_ptr, 6), zero | key_word(state_ptr, 7)
    i13, i14 = zero | key_word(state_ptr, 8), zero | key_word(state_ptr, 9)
    i15 = (zero | tensor_id).to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = i0, i1, i2, i3, i4, i5, i6, i7
    x8, x9, x10, x11, x12, x13, x14, x15 = i8, i9, i10, i11, i12, i13, i14, i15
    for _ in range(10):
        x0, x4, x8, x12 = quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = quarter_round(x3, x4, x9, x14)
    return (
        tl.add(x0, i0, sanitize_overflow=False),
        tl.add(x1, i1, sanitize_overflow=False),
        tl.add(x2, i2, sanitize_overflow=False),
        tl.add(x3, i3, sanitize_overflow=False),
        tl.add(x4, i4, sanitize_overflow=False),
        tl.add(x5, i5, sanitize_overflow=False),
        tl.add(x6, i6, sanitize_overflow=False),
        tl.add(x7, i7, sanitize_overflow=False),
        tl.add(x8, i8, sanitize_overflow=False),
        tl.add(x9, i9, sanitize_overflow=False),
        tl.add(x10, i10, sanitize_overflow=False),
        tl.add(x11, i11, sanitize_overflow=False),
        tl.add(x12, i12, sanitize_overflow=False),
        tl.add(x13, i13, sanitize_overflow=False),
        tl.add(x14, i14, sanitize_overflow=False),
        tl.add(x15, i15, sanitize_overflow=False),
    )


@jit(do_not_specialize=["tensor_id", "first_block"])
def chacha20_kernel(state_ptr, out_ptr, tensor_id, first_block, n_blocks, BLOCKS: tl.constexpr):
    """out (n_blocks, 16): the words of blocks first_block, first_block + 1, ..."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    words = chacha20_words(state_ptr, tensor_id, first_block + block)
    for j in tl.static_range(16):
        word = words[j].to(tl.int32, bitcast=True)
        tl.store(out_ptr + block * 16 + j, word, mask=block < n_blocks)


def chacha20(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """int32 (n_blocks, 16): the bit patterns of the words; see `ffa_kernels.ops.chacha20`."""
    out = torch.empty((n_blocks, 16), dtype=torch.int32, device=rng_state.device)
    if n_blocks > 0:
        launch(
            *(chacha20_kernel, triton.cdiv(n_blocks, BLOCKS)),
            tensors=(rng_state.contiguous(), out),
            integers=(tensor_id, first_block, n_blocks),
            floats=(),
            constexprs=(BLOCKS,),
            num_warps=WARPS,
            num_stages=1,
        )
    return out


def builds(cc: int) -> list[Build]:
    """The one kernel."""
    integers = {"tensor_id": "i32", "first_block": "i32", "n_blocks": "i32"}
    return [
        Build(
            chacha20_kernel,
            {"state_ptr": "*i64", "out_ptr": "*i32", **integers},
            {"BLOCKS": BLOCKS},
            num_warps=WARPS,
            num_stages=1,
            tensor_cores=False,
            label="chacha20",
            divisible=("state_ptr", "out_ptr", "n_blocks"),
        )
    ]
