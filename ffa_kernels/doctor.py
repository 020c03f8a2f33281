"""What works on this machine, what does not, why, and what the lack of it costs."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ffa_kernels import __version__
from ffa_kernels.backends import native
from ffa_kernels.backends.dispatch import OPS, TRITON_CAPABILITY, chosen
from ffa_kernels.errors import ConfigError

_COSTS = {
    "cpu": "the reference backend serves CPU tensors: the same results, more slowly",
    "cuda": "without Triton, or before compute capability 8.0, CUDA tensors are served by the "
    "reference backend: the same results, more slowly",
    "triton": "no Triton kernels: the CUDA library serves GPUs; nothing on a CPU needs them",
    "openmp": "compiled CPU kernels run on one thread",
    "transformers": "`federate` needs it for its models: pip install 'ffa-kernels[demo]'",
    "peft": "`federate` needs it for method = \"lora\": pip install 'ffa-kernels[demo]'",
    "matplotlib": "`federate` writes no report.png: pip install 'ffa-kernels[demo]'",
    "opacus": "no accounting, so no PrivacyEngine: pip install opacus",
}
_PACKAGES = ("opacus", "transformers", "peft", "safetensors", "matplotlib", "numpy")
_TRITON_TIMEOUT = 60.0  # seconds; its first import may compile


def examine() -> dict[str, Any]:
    """Everything `doctor` knows, ready for JSON.

    Returns:
        python, ffa_kernels, torch, packages (None where missing), backends (each with available
        and reason), threads, openmp, cpu, gpu, chosen: which backend serves which ops on a device
        and dtype, and why; and missing: part -> what its lack costs.
    """
    compiled = native.describe()
    backends: dict[str, dict[str, Any]] = {
        "reference": {"available": True, "reason": ""},
        **compiled,
        "triton": _triton(),
    }
    packages = {name: version(name) for name in _PACKAGES}
    lacking = [name for name, backend in backends.items() if not backend["available"]]
    if compiled["cpu"]["available"] and not compiled["cpu"].get("openmp"):
        lacking.append("openmp")
    lacking += [name for name, found in packages.items() if found is None]
    return {
        "python": platform.python_version(),
        "ffa_kernels": __version__,
        "torch": torch.__version__,
        "packages": packages,
        "backends": backends,
        "threads": torch.get_num_threads(),
        "openmp": openmp_runtimes(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "isa": compiled["cpu"].get("isa"),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": [
            {
                "name": torch.cuda.get_device_name(i),
                "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
                "bytes": torch.cuda.get_device_properties(i).total_memory,
            }
            for i in range(torch.cuda.device_count())
        ],
        "chosen": _chosen(),
        "missing": {part: _COSTS[part] for part in lacking if part in _COSTS},
    }


def describe(findings: dict[str, Any]) -> str:
    """`findings` for a person to read."""
    cpu = findings["cpu"]
    lines = [
        f"ffa-kernels {findings['ffa_kernels']}, Python {findings['python']}, "
        f"torch {findings['torch']}",
        f"cpu: {cpu['model']}, {cpu['cores']} cores, {findings['threads']} threads; "
        f"kernels for {cpu['isa'] or '-'}, torch for {cpu['torch_isa']}",
        f"OpenMP runtimes in the process: {', '.join(findings['openmp']) or 'none'}",
    ]
    lines += [
        f"gpu: {gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['bytes'] / 2**30:.0f} GiB"
        for gpu in findings["gpu"]
    ] or ["gpu: none that torch can use"]
    for name, backend in findings["backends"].items():
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        lines.append(f"backend {name}: {state}")
    lines += [
        f"{choice['device']} {choice['dtype']}: {choice['backend']} ({choice['why']}) for "
        + (", ".join(choice["ops"]) if len(choice["ops"]) < len(OPS) else "every op")
        for choice in findings["chosen"]
    ]
    found = [f"{name} {number or 'missing'}" for name, number in findings["packages"].items()]
    lines.append("packages: " + ", ".join(found))
    lines += [f"without {part}: {cost}" for part, cost in findings["missing"].items()]
    return "\n".join(lines)


def _chosen() -> list[dict[str, Any]]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    choices: list[dict[str, Any]] = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            of_backend: dict[tuple[str, str], list[str]] = {}
            for op in OPS:
                try:
                    choice = chosen(op, device, dtype)
                except ConfigError as error:
                    choice = ("none", str(error))
                of_backend.setdefault(choice, []).append(op)
            choices += [
                {
                    "device": str(device),
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": name,
                    "why": why,
                    "ops": served,
                }
                for (name, why), served in of_backend.items()
            ]
    return choices


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; two of them are one too many."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split()) > 5}
    names = (Path(path).name for path in paths)
    return sorted(name for name in names if re.match(r"lib(gomp|iomp5|omp)[-.]", name))


_NUMBERS = {"family": "cpu family", "model": "model"}


def cpu_model() -> str:
    """The processor's name, with its family and model, for a name may say little; or its
    architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # Of the first processor.
    told = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines[::-1])}
    if "model name" not in told:
        return platform.machine()
    numbers = ", ".join(f"{k} {told[key]}" for k, key in _NUMBERS.items() if key in told)
    return f"{told['model name']}, {numbers}" if numbers else told["model name"]


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _triton() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {"available": False, "reason": "not installed"}
    # In a process of its own: a broken Triton may take the interpreter with it.
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import triton; print(triton.__version__)"],
            capture_output=True,
            text=True,
            timeout=_TRITON_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"available": False, "reason": f"its import failed: {error}"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"available": False, "reason": f"its import failed: {last}"}
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    served = any(capability >= TRITON_CAPABILITY for capability in gpus)
    reason = "" if served else "installed, but no GPU of compute capability 8.0 or later is here"
    return {"available": served, "version": done.stdout.strip(), "reason": reason}
