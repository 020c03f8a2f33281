"""Drop-in modules: FFALinear, convert() and merge()."""

from ffa_kernels.nn.conversion import convert, merge
from ffa_kernels.nn.linear import FFALinear
from ffa_kernels.nn.record_taps import packed

__all__ = ["FFALinear", "convert", "merge", "packed"]
