"""Time, memory and surroundings of a measurement."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ffa_kernels import __version__
from ffa_kernels.backends import dispatch, native
from ffa_kernels.doctor import cpu_model, version

LIBRARIES = ("opacus", "peft", "transformers", "triton", "fastDP", "dp-lora")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call that waits for its device."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` holds at once beyond what is there when it begins.

    Bytes of tensors as PyTorch's allocator counts them, on a CPU by the profiler's account of each
    allocation; what csrc's kernels take for themselves (about 2 MiB, and under 1 MiB a thread) is
    not in it.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
        run()
    held = peak = 0
    result = account.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted(result.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that serve an op here, the one that is preferred first."""
    import importlib

    candidates = dispatch.CANDIDATES.get(device.type, ("reference",))
    return [
        name
        for name in candidates
        if importlib.import_module(f"ffa_kernels.backends.{name}").supports(op, device, dtype)
    ]


def _found(library: str) -> str | None:
    """Its version, or that it lies on the path as its repository has it."""
    there = find_spec(library.replace("-", "_")) is not None
    return version(library) or ("its main branch" if there else None)


def _commit() -> str | None:
    """Of the checkout, with a + where files of it have been changed since."""
    if which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    return done.stdout.strip() or None


def resident_bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers, one that is shared counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; neither host name nor path."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "ffa_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "instructions": native.describe()["cpu"]["isa"],
        "threads": torch.get_num_threads(),
        "libraries": {name: found for name in LIBRARIES if (found := _found(name)) is not None},
    }
