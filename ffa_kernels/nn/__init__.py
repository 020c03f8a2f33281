"""Drop-in modules: FFALinear, convert() and merge()."""

from ffa_kernels.nn.conversion import convert, merge
from ffa_kernels.nn.linear import FFALinear

__all__ = ["FFALinear", "convert", "merge"]
