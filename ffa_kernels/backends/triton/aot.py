"""Kernels compiled ahead of time, without a GPU: do they fit each card, and spill nothing?

    python -m ffa_kernels.backends.triton [--cc 80 90] [--match linear]

prints a row for each kernel, configuration and compute capability, and exits 1 where a bar is
broken: no byte spilled, shared memory within the card's, tensor cores used where there is a dot,
no kernel left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ffa_kernels.backends.triton as package
from ffa_kernels.backends.triton import interpreted
from ffa_kernels.errors import ConfigError

# `triton.jit` without its untyped decorator.
jit: Callable[..., Any] = triton.jit

# Bytes of shared memory that one block may ask for (CUDA programming guide, compute capabilities).
SHARED_LIMITS = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}
# Columns of tensor memory of an SM (compute capability 10.x).
_TENSOR_MEMORY = 512
_TENSOR_CORES = re.compile(r"\b(?:[A-Z]MMA|[A-Z]GMMA|UTC[A-Z]*MMA)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Build:
    """One kernel as it would be launched.

    Attributes:
        kernel: the jitted function.
        signature: Triton's type of each argument that is not constexpr, by name.
        constexprs: value of each constexpr argument, by name; also None for a tensor not given.
        num_warps, num_stages: launch options.
        tensor_cores: it multiplies 16-bit matrices.
        label: for the table.
        divisible: names of arguments that a launch would find to be multiples of 16.
        max_registers: as of `launch`.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    label: str
    divisible: tuple[str, ...] = ()
    max_registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a build takes: registers of a thread, bytes that it spills, shared bytes of a block,
    columns of tensor memory, and how many instructions run on tensor cores (counted in the machine
    code of a build that should have them)."""

    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    tensor_core_instructions: int

    def faults(self, build: Build, cc: int) -> list[str]:
        """The bars that are broken, in words."""
        faults = []
        if self.spilled:
            faults.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMITS[cc]:
            faults.append(f"needs {self.shared} bytes of shared memory of {SHARED_LIMITS[cc]}")
        if self.tensor_memory > _TENSOR_MEMORY:
            faults.append(f"needs {self.tensor_memory} columns of tensor memory")
        if build.tensor_cores and not self.tensor_core_instructions:
            faults.append("uses no tensor cores")
        return faults


def compile_build(build: Build, cc: int) -> Resources:
    """Compiles `build` for compute capability `cc` and reads its resources off the machine code.

    Raises:
        ConfigError: the interpreter is on, so nothing could be compiled.
    """
    if interpreted():
        raise ConfigError("TRITON_INTERPRET is 1; accepted: unset, as what is run is not compiled")
    names: list[str] = build.kernel.arg_names
    signature = {n: "constexpr" if n in build.constexprs else build.signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in build.divisible}
    compiled = triton.compile(
        ASTSource(build.kernel, signature, build.constexprs, attributes),
        target=GPUTarget("cuda", cc, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": True,
            "maxnreg": build.max_registers,
        },
    )
    with tempfile.TemporaryDirectory() as work:
        cubin = Path(work) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = subprocess.run(
            # Disassembly takes longer than all else that a cached build does.
            [
                *(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)),
                *(("-sass",) if build.tensor_cores else ()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        ).stdout
    usage = _USAGE.search(listing)
    assert usage is not None, listing[:400]
    return Resources(
        registers=int(usage[1]),
        # Nothing but spills is kept on a Triton kernel's stack.
        spilled=int(usage[2]),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        tensor_core_instructions=len(_TENSOR_CORES.findall(listing)),
    )


@functools.cache
def modules() -> list[ModuleType]:
    """The package's modules that have kernels to build."""
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__"]
    found = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [module for module in found if hasattr(module, "builds")]


@functools.cache
def all_builds(cc: int) -> list[Build]:
    """Every kernel and configuration that may be launched on compute capability `cc`."""
    return [build for module in modules() for build in module.builds(cc)]


def left_out(cc: int) -> list[str]:
    """Kernels that are in no build for compute capability `cc`."""
    built = {build.kernel.__name__ for build in all_builds(cc)}
    here = {name for module in modules() for name in vars(module) if name.endswith("_kernel")}
    return sorted(here - built)


def _row(job: tuple[int, int]) -> tuple[str, bool]:
    cc, i = job
    build = all_builds(cc)[i]
    start = f"{cc:>4} {build.label:<58}"
    try:
        used = compile_build(build, cc)
    except Exception as error:
        # The table goes on: one broken build says little about the others.
        return f"{start} does not compile: {error!r}", False
    faults = used.faults(build, cc)
    figures = (
        f"{used.registers:>5} {used.spilled:>7} {used.shared:>7} {used.tensor_core_instructions:>5}"
    )
    return f"{start}{figures}  {'; '.join(faults) or 'ok'}", not faults


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 when every bar holds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package.__name__}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--cc", type=int, nargs="+", choices=SHARED_LIMITS, default=[*SHARED_LIMITS]
    )
    parser.add_argument("--match", default="", help="only builds whose label contains this")
    parser.add_argument("--every", type=int, default=1, help="only each such-and-such build")
    parser.add_argument("--processes", type=int, default=None, help="default: one a processor")
    chosen = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is 1; accepted: unset, as what is run is not compiled")
    jobs = [
        (cc, i)
        for cc in chosen.cc
        for i, build in enumerate(all_builds(cc))
        if chosen.match in build.label and i % chosen.every == 0
    ]
    header = f"{'cc':>4} {'kernel':<58}{'regs':>5} {'spilled':>7} {'shared':>7} {'mma':>5}"
    print(header, flush=True)
    broken = 0
    with ProcessPoolExecutor(chosen.processes) as pool:
        for row, good in pool.map(_row, jobs):
            print(row, flush=True)
            broken += not good
    missing = {name for cc in chosen.cc for name in left_out(cc)}
    print(f"{len(jobs)} builds, {broken} broken; left out: {', '.join(sorted(missing)) or 'none'}")
    return 1 if broken or missing else 0
