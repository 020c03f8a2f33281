"""Products whose every operand ends, or begins, at a page that may not be touched.

A program of its own, `python tests/guarded_child.py bfloat16`: a step too far ends it. So reads by
masked vector instructions are seen, which no sanitizer sees.
"""

import ctypes
import mmap
import sys

import torch

from ffa_kernels.backends import cpu, native

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# (rows, d_in, d_out, r): below, at and beyond a tile, a panel, a vector, and a segment; rows fewer
# than columns, and more.
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 15, 2),
    (5, 17, 31, 3),
    (12, 33, 33, 0),
    (32, 32, 32, 32),
    (33, 64, 65, 33),
    (45, 95, 100, 8),
    (13, 2051, 40, 5),
    (64, 100, 3000, 16),
    (100, 95, 40, 8),
]


class Guarded:
    """A tensor's copy between two pages without access, against one of them."""

    def __init__(self, values: torch.Tensor, at_end: bool) -> None:
        values = values.contiguous()
        size = values.numel() * values.element_size()
        inner = -(-size // PAGE) * PAGE
        self._pages = mmap.mmap(-1, inner + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        for guard in (start, start + PAGE + inner):
            if _libc.mprotect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = start + PAGE + (inner - size if at_end else 0)
        self._like, self._size = values, size
        ctypes.memmove(self.address, values.data_ptr(), size)

    def read(self) -> torch.Tensor:
        ctypes.memmove(self._like.data_ptr(), self.address, self._size)
        return self._like


def check(sizes, base, transposed, at_end, threads) -> None:
    rows, d_in, d_out, r = sizes
    x, bias, left = torch.randn(rows, d_in), torch.randn(d_out), torch.randn(rows, r)
    right, term = torch.randn(d_in, d_out), torch.randn(r, d_out)
    right = (right * 40).clamp(-127, 127).to(base) if base == torch.int8 else right.to(base)
    scale = torch.rand(d_out) + 0.1 if base == torch.int8 else torch.ones(d_out)
    stored, terms = (m.t() if transposed else m for m in (right, term))
    steps = (1, d_in) if transposed else (d_out, 1)
    term_steps = (1, r) if transposed else (d_out, 1)

    def place(values: torch.Tensor) -> Guarded:
        return Guarded(values, at_end)

    operands = [place(m) for m in (x, stored, bias, left, terms)]
    scales, out = place(scale), place(torch.full((rows, d_out), torch.nan))
    x_at, right_at, bias_at, left_at, term_at = (operand.address for operand in operands)
    last = (bias_at, left_at, term_at, *term_steps, 1.5, out.address, threads)
    call = native.load("cpu").call
    code, at = cpu._FACTORS[base], scales.address if base == torch.int8 else None
    rounds = base != torch.float32 and native.has_bf16_product()
    op, narrow = ("bf16_product", torch.bfloat16) if rounds else ("fp32_product", torch.float32)
    call(op, rows, d_in, d_out, r, x_at, right_at, code, *steps, at, 0, *last)
    x, right, left = x.to(narrow), (right * scale).to(narrow), 1.5 * left
    factors = [(x.double(), right.double()), (left.double(), term.double())]
    wanted = sum(a @ b for a, b in factors) + bias
    most, of_term = (sum(a.abs() @ b.abs() for a, b in some) for some in (factors, factors[1:]))
    most = most + bias.abs() + (8 * of_term if rounds else 0)
    error = (out.read() - wanted).abs()
    assert (error <= 2e-6 * most + 1e-6).all(), (sizes, base, transposed, at_end, threads)


def main(base: torch.dtype) -> None:
    done = 0
    for sizes in SIZES:
        for transposed in (False, True):
            for at_end in (False, True):
                # 0: as 1.
                for threads in (0, 1, 3):
                    check(sizes, base, transposed, at_end, threads)
                    done += 1
    print(done)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
