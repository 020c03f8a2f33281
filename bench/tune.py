"""Times every way and tile of the adapted linear on this GPU; writes the table that chooses them.

    python bench/tune.py [--op linear linear_backward] [--dtype bfloat16] [--dropout] [--write]

Candidates of a shape are timed in turns, so that a clock that drifts drifts for all of them, on
inputs that rotate through more memory than the L2 cache holds. Without --write nothing is kept.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ffa_kernels.backends.triton import choices

# (m, d_in, d_out, r)
SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 4096, 4096, 64),
    (2048, 1024, 1024, 16),
    (2048, 1024, 4096, 16),
    (2048, 4096, 1024, 16),
    (512, 768, 768, 8),
)
DTYPES = ("bfloat16", "float16", "float32")
OPS = ("linear", "linear_backward")
ROTATED_BYTES = 4  # times the L2 cache
DROPOUT_P = 0.05
SCALING = 2.0


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 where there is no GPU to measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--dropout", action="store_true", help="measure with a dropout mask")
    parser.add_argument("--repeats", type=int, default=50, help="timings of each candidate")
    parser.add_argument("--write", action="store_true", help="put the winners into choices.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA device, so there is nothing to measure", file=sys.stderr)
        return 2
    stamp = environment()
    found = []
    for op, dtype, shape in itertools.product(options.op, options.dtype, SHAPES):
        found.append(measure(op, dtype, shape, options.dropout, options.repeats, stamp))
    if options.write:
        write(found)
    return 0


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "cc": 10 * major + minor,
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def measure(
    op: str,
    dtype: str,
    shape: tuple[int, int, int, int],
    dropout: bool,
    repeats: int,
    stamp: dict[str, Any],
) -> dict[str, Any]:
    """The table's entry for one shape; prints a row for each candidate."""
    from ffa_kernels.backends.triton.linear import candidates

    m, d_in, d_out, r = shape
    asked = candidates(op, stamp["cc"], getattr(torch, dtype), m, d_in, d_out, r, dropout)
    calls, frozen = workload(op, getattr(torch, dtype), shape, dropout)

    def forced(choice: choices.Choice) -> Callable[[int], Any]:
        def run(turn: int) -> Any:
            with choices.force(*choice):
                return calls[turn % len(calls)]()

        return run

    runs = {"frozen": lambda turn: frozen[turn % len(frozen)]()}
    runs |= {name_of(choice): forced(choice) for choice in asked}
    times = interleaved(runs, repeats)
    floor = statistics.median(times["frozen"])
    print(f"\n{op} {dtype} m={m} d_in={d_in} d_out={d_out} r={r} dropout={dropout}")
    for name, values in times.items():
        middle = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        tflops = 2 * m * d_in * d_out / middle / 1e6
        print(
            f"  {name:<28} {middle:9.1f} us  (quartiles {low:.1f} to {high:.1f})  "
            f"{middle / floor:6.3f} of frozen  {tflops:7.1f} TFLOP/s"
        )
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    best = min(asked, key=lambda choice: medians[name_of(choice)])
    return {
        "op": op,
        "cc": stamp["cc"],
        "dtype": dtype,
        "shape_class": choices.shape_class(*shape),
        "dropout": dropout,
        "way": best.way,
        "config": None if best.config is None else best.config._asdict(),
        "figures": {"m": m, "d_in": d_in, "d_out": d_out, "r": r, "microseconds": medians},
        "environment": stamp,
    }


def name_of(choice: choices.Choice) -> str:
    if choice.config is None:
        return choice.way
    c = choice.config
    return f"{choice.way} {c.block_m}x{c.block_n}x{c.block_k}/{c.num_warps}/{c.num_stages}"


def workload(
    op: str, dtype: torch.dtype, shape: tuple[int, int, int, int], dropout: bool
) -> tuple[list[Callable[[], Any]], list[Callable[[], Any]]]:
    """Calls of the op and of the frozen product alone, each list over inputs that leave L2."""
    from ffa_kernels.backends import triton

    m, d_in, d_out, r = shape

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=dtype)

    weight, bias = draw(d_out, d_in) / d_in**0.5, draw(d_out)
    A, B = draw(r, d_in) / d_in**0.5, draw(d_out, r)
    state = torch.tensor([1, 2, 3, 4, 0], device="cuda") if dropout else None
    columns = d_in if op == "linear" else d_out
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = 1 + ROTATED_BYTES * cache // (m * columns * dtype.itemsize)
    inputs = [draw(m, columns) for _ in range(copies)]
    if op == "linear":
        rest = (weight, bias, A, B, None, None, state, None, SCALING, DROPOUT_P, False)
        return (
            [lambda x=x: triton.linear(x, *rest) for x in inputs],  # type: ignore[misc]
            [lambda x=x: F.linear(x, weight, bias) for x in inputs],  # type: ignore[misc]
        )
    u, B = draw(m, r), draw(d_out, r)
    return (
        [
            lambda g=g: triton.linear_backward(g, u, weight, A, B, state, SCALING, DROPOUT_P)  # type: ignore[misc]
            for g in inputs
        ],
        [lambda g=g: g @ weight for g in inputs],  # type: ignore[misc]
    )


def interleaved(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of each run, one timing of every run in a turn, after ten turns unmeasured.

    A launch that the host cannot keep ahead of is part of the time, as it is in training.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in runs}
    for turn in range(-10, repeats):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(turn % 1024)
            end.record()
            if turn >= 0:
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {n: [1000 * s.elapsed_time(e) for s, e in pairs] for n, pairs in events.items()}


def write(found: list[dict[str, Any]]) -> None:
    """The new entries in place of the old ones for the same question."""
    entries = json.loads(choices.TABLE.read_text(encoding="utf-8"))["entries"]
    merged = {choices.key_of(e): e for e in (*entries, *found)}
    ordered = [merged[key] for key in sorted(merged, key=str)]
    choices.TABLE.write_text(json.dumps({"entries": ordered}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(found)} entries written to {choices.TABLE}")


if __name__ == "__main__":
    sys.exit(main())
