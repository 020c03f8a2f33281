"""Drop-in modules: FFALinear, convert(), merge(), and adapters in PEFT's files."""

from ffa_kernels.nn import opacus
from ffa_kernels.nn.adapter_files import load_adapter, save_adapter
from ffa_kernels.nn.conversion import convert, merge
from ffa_kernels.nn.linear import FFALinear
from ffa_kernels.nn.record_taps import packed
from ffa_kernels.nn.wrapped import FFAWrapped, FrozenBase

__all__ = [
    "FFALinear",
    "FFAWrapped",
    "FrozenBase",
    "convert",
    "load_adapter",
    "merge",
    "packed",
    "save_adapter",
]

opacus.register()
