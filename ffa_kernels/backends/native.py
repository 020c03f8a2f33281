"""Loads the compiled libraries of ``csrc`` with ctypes and says what there is and why not.

A library is loaded at its first use and after torch: its thread pool is the OpenMP runtime that
torch brought into the process (csrc/cpu/parallel.cpp). The C interface is csrc/ffa.h.
``FFA_CPU_LIBRARY`` and ``FFA_CUDA_LIBRARY`` name other files to load; ``FFA_CPU_ISA``, one of
CPU_ISAS, lowers the instruction set that is used.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffa_kernels.errors import NativeError

if TYPE_CHECKING:
    from torch import Tensor

ABI_VERSION = 9
# As in csrc/cpu/dispatch.cpp: each has what stands before it.
CPU_ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
DIRECTORY = Path(__file__).resolve().parent.parent / "_lib"

_POINTERS = POINTER(c_void_p)
_LONGS = POINTER(c_int64)
_INTS = POINTER(c_int)
_DOUBLES = POINTER(c_double)

_PRODUCT = (
    *(c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int, c_int64, c_int64),
    *(c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
    *(c_double, c_void_p, c_int),
)

# One row per launcher of csrc/ffa.h, arguments in its order; tensors are passed by address.
_CPU_LAUNCHERS: dict[str, tuple[Any, ...]] = {
    "chacha20": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int),
    "gaussian": (c_void_p, c_int64, c_int64, c_int, c_void_p, c_int),
    "dropout": (c_void_p, c_double, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int),
    "dropout_add": (
        *(c_void_p, c_double, c_double, c_int64, c_int64, c_int64),
        *(c_int, c_void_p, c_void_p, c_int),
    ),
    "rank_term": (
        *(c_int64, c_int64, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p),
        *(c_void_p, c_int64, c_int64, c_double, c_int, c_void_p, c_void_p, c_int),
    ),
    "per_sample_grad": (
        *(c_int64, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p),
        *(c_void_p, c_double, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "per_sample_backward": (
        *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p),
        *(c_void_p, c_void_p, c_double, c_double, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "bf16_product": _PRODUCT,
    "fp32_product": _PRODUCT,
    "clip_accumulate": (
        *(c_int64, c_int64, _LONGS, _INTS, _POINTERS, _POINTERS, _POINTERS),
        *(c_int64, _DOUBLES, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "private_update": (
        *(c_int64, _LONGS, _INTS, _POINTERS, _POINTERS, _POINTERS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, _LONGS, c_int64, _DOUBLES),
        *(c_double, c_double, c_int, c_int, c_int, c_int),
    ),
    "private_step": (
        *(c_int64, c_int64, _LONGS, _INTS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, c_void_p),
        *(_INTS, _POINTERS, _POINTERS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, _LONGS, c_int64, _DOUBLES),
        *(c_double, c_double, c_int, c_int, c_int, c_int),
    ),
}
_CUDA_LAUNCHERS: dict[str, tuple[Any, ...]] = {
    "chacha20": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "gaussian": (c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p),
    "dropout": (c_void_p, c_double, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p),
    "rank_term": (
        *(c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int64, c_int64),
        *(c_double, c_void_p, c_double, c_void_p, c_void_p),
    ),
    "per_sample_grad_scratch": (c_int64, c_int64, c_int64, c_int64, c_int, c_int, c_int, _LONGS),
    "per_sample_grad": (
        *(c_int64, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_double, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "clip_accumulate_scratch": (c_int64, c_int64, _LONGS, _LONGS),
    "clip_accumulate": (
        *(c_int64, c_int64, _LONGS, _INTS, _POINTERS, _POINTERS, _POINTERS),
        *(c_int64, _DOUBLES, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "private_update": (
        *(c_int64, _LONGS, _INTS, _POINTERS, _POINTERS, _POINTERS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, _LONGS, c_int64, _DOUBLES),
        *(c_double, c_double, c_int, c_int, c_int, c_void_p),
    ),
    "private_step": (
        *(c_int64, c_int64, _LONGS, _INTS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
        *(_INTS, _POINTERS, _POINTERS, _POINTERS, _POINTERS),
        *(c_void_p, c_void_p, _LONGS, c_int64, _DOUBLES),
        *(c_double, c_double, c_int, c_int, c_int, c_void_p),
    ),
    "check_device": (),
}


class Library:
    """A loaded library: ``call(op, *arguments)`` runs the launcher of `op` or raises."""

    def __init__(self, kind: str, handle: ctypes.CDLL) -> None:
        self.kind = kind
        self.handle = handle
        handle.ffa_status_string.restype = c_char_p
        handle.ffa_status_string.argtypes = (c_int,)
        self._launchers: dict[str, Any] = {}
        for op, types in {"cpu": _CPU_LAUNCHERS, "cuda": _CUDA_LAUNCHERS}[kind].items():
            launcher = getattr(handle, f"ffa_{kind}_{op}")
            launcher.restype = c_int
            launcher.argtypes = types
            self._launchers[op] = launcher

    def call(self, op: str, *arguments: Any) -> None:
        """Run the launcher of `op` with the arguments of csrc/ffa.h.

        Raises:
            NativeError: the launcher returned a status other than ``FFA_OK``.
        """
        status = self._launchers[op](*arguments)
        if status != 0:
            words = self.handle.ffa_status_string(status).decode()
            raise NativeError(f"ffa_{self.kind}_{op}: {words} (status {status})")


@functools.cache
def has_bf16_product() -> bool:
    """Whether the CPU library is there and its bf16_product runs on this machine."""
    return available("cpu") and bool(load("cpu").handle.ffa_cpu_has_bf16_product())


@functools.cache
def prefers_fp32_product() -> int:
    """Whether the CPU library is there and its product with an fp32 matrix is faster here than
    PyTorch's: 0 no, 1 yes, 2 a large one, by tiles."""
    return int(load("cpu").handle.ffa_cpu_prefers_fp32_product()) if available("cpu") else 0


# A ctypes array made of an `array` takes a third of the time that its own constructor takes.
def pointers(tensors: Sequence[Tensor]) -> Any:
    """The addresses of `tensors`, as a launcher takes a list of them."""
    addresses = array("Q", [t.data_ptr() for t in tensors])
    return (c_void_p * len(addresses)).from_buffer(addresses)


def longs(values: Sequence[int]) -> Any:
    """`values` as a C array of int64."""
    return (c_int64 * len(values)).from_buffer(array("q", values))


def ints(values: Sequence[int]) -> Any:
    """`values` as a C array of int."""
    return (c_int * len(values)).from_buffer(array("i", values))


def doubles(values: Sequence[float]) -> Any:
    """`values` as a C array of double."""
    return (c_double * len(values)).from_buffer(array("d", values))


class InPlace:
    """Contiguous stand-ins for tensors that a launcher writes to, copied back by `finish`."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        used = [tensor.contiguous() for tensor in tensors]
        self._copies += [(t, copy) for t, copy in zip(tensors, used, strict=True) if t is not copy]
        return used

    def finish(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)


def _build_record(kind: str) -> dict[str, Any]:
    try:
        record = json.loads((DIRECTORY / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    entry = record.get(kind)
    return entry if isinstance(entry, dict) else {}


def _path(kind: str) -> Path:
    return Path(os.environ.get(f"FFA_{kind.upper()}_LIBRARY") or DIRECTORY / f"libffa_{kind}.so")


@functools.cache
def _open(kind: str) -> Library | str:
    """The library, or the reason why there is none."""
    path, isa = _path(kind), os.environ.get("FFA_CPU_ISA")
    if kind == "cpu" and isa is not None and isa not in CPU_ISAS:
        return f"FFA_CPU_ISA is {isa!r}; accepted: {', '.join(CPU_ISAS)}"
    if not path.exists():
        if os.environ.get(variable := f"FFA_{kind.upper()}_LIBRARY"):
            return f"{variable} names {path}, which does not exist"
        reason = _build_record(kind).get("reason")
        return str(reason or "never built: run `make lib`, or reinstall with a compiler on PATH")
    import torch  # noqa: F401  (its OpenMP runtime has to be in the process first)

    try:
        handle = ctypes.CDLL(str(path))
        abi = int(handle.ffa_abi_version())
        if abi != ABI_VERSION:
            return f"it has ABI {abi}, this package speaks ABI {ABI_VERSION}: run `make lib`"
        return Library(kind, handle)
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load: {error}"


def load(kind: str) -> Library:
    """The library of `kind` ("cpu" or "cuda"), loaded once per process.

    Raises:
        NativeError: it is missing or does not fit; the message says why.
    """
    library = _open(kind)
    if isinstance(library, str):
        raise NativeError(f"the compiled {kind} library is not available: {library}")
    return library


def available(kind: str) -> bool:
    """Whether the library of `kind` is there and, for "cuda", sees a device."""
    library = _open(kind)
    if isinstance(library, str):
        return False
    return kind != "cuda" or bool(library.handle.ffa_cuda_device_count() > 0)


def describe() -> dict[str, dict[str, Any]]:
    """What was built, by which compiler, whether it runs here, and if not, why.

    Returns:
        For "cpu" and "cuda": ``available`` (bool), ``isa`` (instruction set in use or compiled
        archs), ``abi`` (int), ``path``, ``reason`` (empty when available), ``compiler``, and for
        "cpu" ``openmp``: whether torch's OpenMP runtime was found and threads are used.
    """
    result: dict[str, dict[str, Any]] = {}
    for kind in ("cpu", "cuda"):
        record = _build_record(kind)
        entry: dict[str, Any] = {
            "available": available(kind),
            "isa": None,
            "abi": None,
            "path": None,
            "reason": "",
            "compiler": record.get("compiler"),
        }
        library = _open(kind)
        if isinstance(library, str):
            entry["reason"] = library
        else:
            entry["abi"] = int(library.handle.ffa_abi_version())
            entry["path"] = str(_path(kind))
            if kind == "cpu":
                library.handle.ffa_cpu_isa.restype = c_char_p
                entry["isa"] = library.handle.ffa_cpu_isa().decode()
                entry["openmp"] = bool(library.handle.ffa_cpu_has_openmp())
            else:
                flags = " ".join(record.get("flags", []))
                codes = [word.split("code=")[1] for word in flags.split() if "code=" in word]
                entry["isa"] = " ".join(codes) or None
                if not entry["available"]:
                    entry["reason"] = "built, but no CUDA device or driver on this machine"
                else:
                    try:
                        library.call("check_device")
                    except NativeError as error:
                        entry["available"], entry["reason"] = False, str(error)
        result[kind] = entry
    return result
