"""Compile the kernels with plain g++ and nvcc: no torch, no pip, no network, standard library only.

``python csrc/build.py`` builds in place (``make lib``); ``setup.py`` calls :func:`build` for wheels
and editable installs. ``build.json`` beside the libraries records what was built, with which
compiler and flags, or why not. A compiler that is missing or fails never raises here: the reference
and Triton backends serve without these libraries, and ``ffa-kernels doctor`` reports the reason.

Environment: ``CXX`` and ``NVCC`` name the compilers (an empty ``NVCC=`` skips CUDA),
``FFA_CUDA_ARCHS`` lists compute capabilities, such as ``"75 86"``, and ``FFA_BUILD_JOBS`` is the
number of compiles run at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent
IN_PLACE = CSRC.parent / "ffa_kernels" / "_lib"

# What ptxas said of every kernel, for resources.py; it lies beside the library.
RESOURCES = "libffa_cuda.ptxas.txt"

OPS = (
    *("chacha20", "gaussian", "dropout", "rank_term", "fp32_product", "per_sample_grad"),
    *("clip_accumulate", "private_update"),
)
# No OpenMP runtime is linked: the library uses the one torch has loaded (csrc/cpu/parallel.cpp).
# Contraction is off so that the copies of an op agree to the bit; CONTRACTED_OPS are the matrix
# products, where fma is worth more. GCC, tuned for some processors, would leave it out of a sum
# that is alone in its loop: a row left over would be rounded otherwise than in a tile of rows.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
]
CONTRACTED_OPS = {"rank_term", "fp32_product", "per_sample_grad"}
_CONTRACT, _GCC_CONTRACT = "-ffp-contract=fast", "--param=avoid-fma-max-bits=0"
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": _AVX2,
    "avx512": (*_AVX2, *_AVX512),
}
# Every arch that a bar names, and those of systems on a chip, which run no other's code. What an
# arch newer than nvcc knows runs is the PTX of the last one here.
CUDA_ARCHS = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"),
    *("-Xptxas", "-v", "-Xfatbin", "-compress-all", "-DFFA_ISA=cuda"),
]


SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
SANITIZED = ("-O1", "-g1", SANITIZERS, "-fno-sanitize-recover=all")
# The CUDA kernels as a program of the CPU, one thread of a block after another (cuda/block.h).
SERIAL_FLAGS = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-DFFA_ISA=serial", *SANITIZED),
]


class CompileError(Exception):
    """A compiler's own words about a file it refused."""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()
        raise CompileError(f"{shlex.join(command)} exited {done.returncode}: {words[-4000:]}")
    return done.stdout + done.stderr


def _find(variable: str, candidates: tuple[str, ...]) -> list[str] | None:
    """The compiler named by an environment variable, else the first candidate that exists."""
    if variable in os.environ:
        try:
            words = shlex.split(os.environ[variable])
        except ValueError as error:
            raise CompileError(f"{variable} is {os.environ[variable]!r}: {error}") from error
        return words if words and shutil.which(words[0]) else None
    return next(([found] for name in candidates if (found := shutil.which(name))), None)


def _version(compiler: list[str]) -> str:
    lines = [line for line in _run([*compiler, "--version"]).splitlines() if line.strip()]
    if not lines:
        raise CompileError(f"{shlex.join(compiler)} --version says nothing: no compiler")
    release = next((line for line in lines if "release" in line), lines[0])
    return release.strip()


def _contraction(compiler: list[str]) -> list[str]:
    gcc = "Free Software Foundation" in _run([*compiler, "--version"])
    release = _run([*compiler, "-dumpversion"]).strip().partition(".")[0]
    knows = gcc and release.isdigit() and int(release) >= 9
    return [_CONTRACT, _GCC_CONTRACT] if knows else [_CONTRACT]


def _number(variable: str, word: str) -> int:
    digits = re.sub(r"\D", "", word)
    if not digits:
        raise CompileError(f"{variable} has {word!r}; accepted: whole numbers")
    return int(digits)


def _compile_all(commands: list[list[str]]) -> list[str]:
    jobs = _number("FFA_BUILD_JOBS", os.environ.get("FFA_BUILD_JOBS", str(os.cpu_count() or 1)))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(_run, commands))


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _build_cpu(
    compiler: list[str], work: Path, target: Path, more: tuple[str, ...] = ()
) -> list[str]:
    flags = [*CXX_FLAGS, *(["-DFFA_X86_COPIES"] if _x86() else []), *more]
    objects: list[str] = []
    commands: list[list[str]] = []
    contraction = _contraction(compiler)

    def add(source: str, copy: str, extra: list[str]) -> None:
        objects.append(str(work / f"{source}.{copy}.o"))
        path = str(CSRC / "cpu" / f"{source}.cpp")
        commands.append([*compiler, *flags, *extra, "-c", path, "-o", objects[-1]])

    for isa in ISA_FLAGS if _x86() else ("baseline",):
        for op in OPS:
            contract = contraction if op in CONTRACTED_OPS else []
            add(op, isa, [*contract, *ISA_FLAGS[isa], f"-DFFA_ISA={isa}"])
    # Their one copy looks for bf16 instructions itself.
    flags_of_avx512 = ISA_FLAGS["avx512" if _x86() else "baseline"]
    for op in ("bf16_product", "fp32_tiles"):
        add(op, "avx512bf16", [*flags_of_avx512, "-DFFA_ISA=avx512bf16"])
    add("dispatch", "shared", [])
    add("parallel", "shared", [])
    _compile_all(commands)
    libraries = ["-ldl", "-lm"] if sys.platform.startswith("linux") else ["-lm"]
    _run([*compiler, "-shared", *more, *objects, "-o", str(target), *libraries])
    return flags


def _cuda_archs(compiler: list[str]) -> list[int]:
    """The archs named by FFA_CUDA_ARCHS, or those of CUDA_ARCHS that this nvcc knows."""
    if os.environ.get("FFA_CUDA_ARCHS"):
        named = os.environ["FFA_CUDA_ARCHS"].split()
        return sorted(_number("FFA_CUDA_ARCHS", arch) for arch in named)
    known = re.findall(r"compute_(\d+)", _run([*compiler, "--list-gpu-arch"]))
    return [arch for arch in CUDA_ARCHS if str(arch) in known]


def _build_cuda(compiler: list[str], work: Path, target: Path) -> list[str]:
    archs = _cuda_archs(compiler)
    if not archs:
        raise CompileError(f"this nvcc knows none of the archs {CUDA_ARCHS}")
    flags = list(CUDA_FLAGS)
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    flags += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    objects, commands = [], []
    # The longest compile first, so that it does not end alone.
    sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    for source in sources:
        objects.append(str(work / f"{source.stem}.cuda.o"))
        commands.append([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
    said = _compile_all(commands)
    _run([*compiler, *flags, "-shared", *objects, "-o", str(target)])
    target.with_name(RESOURCES).write_text("".join(said))
    return flags


def _build_serial(compiler: list[str], work: Path, target: Path) -> None:
    objects, commands = [], []
    for source in sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size):
        objects.append(str(work / f"{source.stem}.o"))
        commands.append([*compiler, *SERIAL_FLAGS, "-c", str(source), "-o", objects[-1]])
    _compile_all(commands)
    _run([*compiler, "-shared", SANITIZERS, *objects, "-o", str(target)])


def build_for_tests(kind: str, out: Path) -> Path:
    """Compile the kernels of `kind` under sanitizers into a library in `out`, if it is not there.

    Those of "cpu" as they are, but with fewer optimisations; those of "cuda" for the CPU. A process
    that loads the library needs the sanitizer's runtime first: LD_PRELOAD libasan.so.

    Raises:
        CompileError: no C++ compiler, or its words about a file that it refused.
    """
    compiler = _find("CXX", ("g++", "c++", "clang++"))
    if compiler is None:
        raise CompileError("no C++ compiler found")
    out.mkdir(parents=True, exist_ok=True)
    target, record = out / f"libffa_{kind}_sanitized.so", out / f"{kind}.txt"
    digest = _sources_digest(kind)
    # Two workers of a test run ask at once: one compiles.
    with (out / f"{kind}.lock").open("w") as lock, tempfile.TemporaryDirectory() as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and record.exists() and record.read_text() == digest:
            return target
        fresh = target.with_suffix(".tmp")
        if kind == "cpu":
            _build_cpu(compiler, Path(work), fresh, SANITIZED)
        else:
            _build_serial(compiler, Path(work), fresh)
        fresh.replace(target)
        record.write_text(digest)
    return target


def _sources_digest(kind: str) -> str:
    digest = hashlib.sha256()
    shared = [CSRC / "ffa.h", Path(__file__), *sorted(CSRC.glob("common/*"))]
    for path in [*shared, *sorted(CSRC.glob(f"{kind}/*"))]:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build_one(kind: str, target: Path, old: dict[str, Any]) -> dict[str, Any]:
    """Build one library unless `old` describes the same sources, compiler and wishes."""
    build, variable, candidates = {
        "cpu": (_build_cpu, "CXX", ("g++", "c++", "clang++")),
        "cuda": (_build_cuda, "NVCC", ("nvcc", "/usr/local/cuda/bin/nvcc")),
    }[kind]
    entry: dict[str, Any] = {"built": False, "compiler": None, "flags": [], "reason": ""}
    try:
        compiler = _find(variable, candidates)
        if compiler is None:
            wish = f"{variable}={os.environ[variable]!r}" if variable in os.environ else ""
            raise CompileError(f"no compiler found ({wish or candidates[0]})")
        entry["compiler"] = f"{shlex.join(compiler)} ({_version(compiler)})"
        wishes = [_sources_digest(kind), entry["compiler"], os.environ.get("FFA_CUDA_ARCHS", "")]
        entry["digest"] = hashlib.sha256("\0".join(wishes).encode()).hexdigest()
        if target.exists() and old.get("built") and old.get("digest") == entry["digest"]:
            return old
        with tempfile.TemporaryDirectory() as work:
            # A process may have the old library mapped: replace the file, never write into it.
            fresh = target.with_suffix(".tmp")
            entry["flags"] = build(compiler, Path(work), fresh)
            fresh.replace(target)
    # OSError: what was named for a compiler may leave nothing behind.
    except (CompileError, OSError) as error:
        target.unlink(missing_ok=True)
        return entry | {"reason": str(error)}
    return entry | {"built": True}


def build(out: Path = IN_PLACE) -> dict[str, Any]:
    """Build what can be built into `out` and return the contents of its ``build.json``."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "build.json"
    try:
        old = json.loads(record.read_text())
    except (OSError, ValueError):
        old = {}
    report = {
        kind: _build_one(kind, out / f"libffa_{kind}.so", old.get(kind, {}))
        for kind in ("cpu", "cuda")
    }
    record.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    for kind, entry in build().items():
        state = "built" if entry["built"] else f"not built: {entry['reason']}"
        print(f"{kind}: {state} {entry['compiler'] or ''}".rstrip())
