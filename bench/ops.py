"""Every op at the shapes that matter, beside its floor: `python bench/ops.py [--json FILE]`.

Each row: median time with its spread, the ratio to the frozen layer's (or to the floor) in the
same run, interleaved with it, and the share of the roofline that bench/roofline.py draws.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import roofline

from ffa_kernels import __version__, ops
from ffa_kernels.backends.dispatch import backend_for

# (rows, d_out, d_in, r) of the layers, records of a batch, and the tensors of a private step.
SHAPES = {
    "cuda": [(8192, 4096, 4096, 16), (8192, 14336, 4096, 16), (8192, 4096, 14336, 16),
             (512, 768, 768, 8)],
    "cpu": [(512, 384, 384, 8), (512, 1536, 384, 8)],
}  # fmt: skip
RECORDS = {"cuda": 16, "cpu": 8}
STEP = {"cuda": (16, 64, (4096, 16)), "cpu": (8, 12, (384, 8))}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
DRAWN = {"cuda": 1 << 26, "cpu": 1 << 20}
LARGER_THAN_CACHE = {"cuda": 1 << 28, "cpu": 1 << 26}

Runs = dict[str, Callable[[int], object]]


def interleaved(runs: Runs, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, one after the other in every round; argument i picks its inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 3):
        for name, run in runs.items():
            seconds = roofline.timed(lambda run=run, i=i: run(i), device)  # type: ignore[misc]
            if i >= 3:
                times[name].append(seconds)
    return times


def copies(device: torch.device, size: int) -> int:
    """Input sets to go round, so that none is found in a cache."""
    return max(2, min(8, math.ceil(LARGER_THAN_CACHE[device.type] / size)))


def peft_layer(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.nn.Module:
    """PEFT's layer of the same weights, alpha = 2 r, as its users run it."""
    from peft import LoraConfig, get_peft_model

    (d_out, d_in), r = W.shape, A.shape[0]
    base = torch.nn.Linear(d_in, d_out, bias=False, device="meta")
    base.weight = torch.nn.Parameter(W, requires_grad=False)
    settings = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
    model: Any = get_peft_model(torch.nn.Sequential(base), settings)
    layer: torch.nn.Module = model.base_model.model[0]
    layer.lora_A["default"].weight = torch.nn.Parameter(A, requires_grad=False)
    layer.lora_B["default"].weight = torch.nn.Parameter(B, requires_grad=False)
    return layer.requires_grad_(False)


def layer_rows(
    device: torch.device,
    repeats: int,
    peaks: tuple[float, float],
    shape: tuple[int, int, int, int],
) -> list[Any]:
    """Forward, gradient for each record, and backward of one layer, beside the frozen layer's."""
    dtype, n = DTYPE[device.type], RECORDS[device.type]
    size = torch.empty(0, dtype=dtype).element_size()
    m, d_out, d_in, r = shape
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    sets = copies(device, size * m * (d_in + d_out))
    x = [torch.randn(n, m // n, d_in, **like) for _ in range(sets)]
    g = [torch.randn(n, m // n, d_out, **like) for _ in range(sets)]
    W = torch.randn(d_out, d_in, **like) / math.sqrt(d_in)
    A, B = torch.randn(r, d_in, **like) / math.sqrt(d_in), torch.randn(d_out, r, **like)
    h = [t @ A.t() for t in x]
    u = [t @ B for t in g]
    total = torch.zeros(d_out, r, dtype=torch.int64, device=device)
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    op = torch.ops.ffa
    peft = peft_layer(W, A, B)
    runs: Runs = {
        "frozen forward": lambda i: F.linear(x[i % sets], W),
        "peft forward": lambda i: peft(x[i % sets]),
        "linear": lambda i: op.linear(
            x[i % sets], W, None, A, B, None, None, None, None, 2.0, 0.0, False
        ),
        "frozen backward": lambda i: g[i % sets] @ W,
        "linear_backward": lambda i: op.linear_backward(
            g[i % sets], u[i % sets], W, A, None, 2.0, 0.0
        ),
        "per_sample_grad": lambda i: ops.per_sample_grad(g[i % sets], h[i % sets], B, scaling=2.0),
        "per_sample_clip": lambda i: ops.per_sample_clip(
            g[i % sets], h[i % sets], B, total, stats, None, 1.0, scaling=2.0
        ),
    }
    work = {
        "frozen forward": roofline.frozen_linear(m, d_out, d_in, size),
        "linear": roofline.linear(m, d_out, d_in, r, size),
        "peft forward": roofline.linear(m, d_out, d_in, r, size),
        "frozen backward": roofline.frozen_linear(m, d_in, d_out, size),
        "linear_backward": roofline.linear_backward(m, d_out, d_in, r, size),
        "per_sample_grad": roofline.per_sample_grad(n, m // n, d_out, r, size),
        "per_sample_clip": roofline.per_sample_clip(n, m // n, d_out, r, size),
    }
    against = {"linear": "frozen forward", "peft forward": "frozen forward"}
    against |= {"linear_backward": "frozen backward"}
    times = interleaved(runs, device, repeats)
    return [
        row(name, shape, seconds, times.get(against.get(name, "")), work[name], peaks)
        for name, seconds in times.items()
    ]


def step_rows(device: torch.device, repeats: int, peaks: tuple[float, float]) -> list[Any]:
    """The private step of a whole model's adapters, in one op and in two."""
    n, count, shape = STEP[device.type]
    dtype = DTYPE[device.type]
    size, numel = torch.empty(0, dtype=dtype).element_size(), count * math.prod(shape)
    sets = copies(device, size * n * numel)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    grads = [[torch.randn(n, *shape, **like) for _ in range(count)] for _ in range(sets)]
    squares = [
        [torch.stack([g.double().square().sum((1, 2)), torch.ones(n, device=device)]) for g in of]
        for of in grads
    ]
    params = [torch.randn(*shape, **like) for _ in range(count)]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    sums = [torch.zeros(*shape, dtype=torch.int64, device=device) for _ in range(count)]
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    counts = [torch.zeros((), device=device) for _ in range(count)]
    state = torch.arange(5, device=device)
    hyper = torch.tensor([[1e-3, 0.0, 0.9, 0.999, 1e-8]] * count, dtype=torch.float64).to(device)
    settings: dict[str, Any] = {
        "tensor_ids": list(range(count)),
        "max_grad_norm": [1.0],
        "noise_multiplier": 1.0,
        "expected_batch_size": float(n),
        "optimizer": "adam",
    }
    update = (params, moments[0], moments[1], counts, state, hyper)
    runs: Runs = {
        "private_step": lambda i: ops.private_step(
            grads[i % sets], stats, None, *update, squares=squares[i % sets], **settings
        ),
        "clip_accumulate": lambda i: ops.clip_accumulate(
            grads[i % sets], sums, stats, None, [1.0], squares=squares[i % sets]
        ),
        "private_update": lambda i: ops.private_update(params, sums, *update[1:], **settings),
    }
    work = {
        "private_step": roofline.private_step(n, numel, size, size, 2),
        "clip_accumulate": roofline.clip_accumulate(n, numel, size, True),
        "private_update": roofline.private_update(numel, size, 2),
    }
    return [
        row(name, (n, count, *shape), seconds, None, work[name], peaks)
        for name, seconds in interleaved(runs, device, repeats).items()
    ]


def random_rows(device: torch.device, repeats: int, peaks: tuple[float, float]) -> list[Any]:
    """The keystream, and the Gaussians made from it, as tensors of their own."""
    state, numel = torch.arange(5, device=device), DRAWN[device.type]
    runs: Runs = {
        "chacha20": lambda i: ops.chacha20(state, i, 0, numel // 8),
        "gaussian": lambda i: ops.gaussian(state, i, numel),
    }
    work = {"chacha20": roofline.chacha20(numel // 8), "gaussian": roofline.gaussian(numel, 4)}
    return [
        row(name, (numel,), seconds, None, work[name], peaks)
        for name, seconds in interleaved(runs, device, repeats).items()
    ]


def summary(name: str, shape: tuple[int, ...], seconds: list[float]) -> dict[str, Any]:
    """Median, and the interquartile range as a part of it."""
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "op": name,
        "shape": list(shape),
        "seconds": median,
        "spread": (quartiles[2] - quartiles[0]) / median,
    }


def row(
    name: str,
    shape: tuple[int, ...],
    seconds: list[float],
    base: list[float] | None,
    work: roofline.Work,
    peaks: tuple[float, float],
) -> dict[str, Any]:
    """One line of the table, in plain numbers."""
    found = summary(name, shape, seconds)
    median = found["seconds"]
    return found | {
        "ratio_to_frozen": None if base is None else median / statistics.median(base),
        "gigabytes_per_second": work.bytes / median / 1e9,
        "teraflops": work.flops / median / 1e12,
        "of_roofline": work.floor(*peaks) / median,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "ffa_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": {
            op: backend_for(op, device, (DTYPE[device.type],))
            for op in ("linear", "per_sample_grad", "private_step")
        },
    }


def main() -> int:
    """Measures and prints; writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    chosen = parser.parse_args()
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    peaks = roofline.ceilings(device, DTYPE[device.type])
    stamp = environment(device)
    print(json.dumps(stamp))
    print(f"measured ceilings: {peaks[0] / 1e9:.0f} GB/s copied, {peaks[1] / 1e12:.2f} TFLOP/s")
    parts: list[Callable[[], list[Any]]] = [
        lambda: random_rows(device, chosen.repeats, peaks),
        lambda: step_rows(device, chosen.repeats, peaks),
    ]
    for shape in SHAPES[device.type]:
        parts.append(lambda shape=shape: layer_rows(device, chosen.repeats, peaks, shape))  # type: ignore[misc]
    rows, failed = [], False
    for part in parts:
        # What one of them cannot measure costs its own rows alone.
        try:
            rows += part()
        except Exception:
            traceback.print_exc()
            failed = True
    print(f"{'op':<16} {'shape':<26} {'ms':>8} {'spread':>7} {'/frozen':>8} {'GB/s':>7} "
          f"{'TFLOP/s':>8} {'roofline':>8}")  # fmt: skip
    for r in rows:
        ratio = "" if r["ratio_to_frozen"] is None else f"{r['ratio_to_frozen']:.3f}"
        print(
            f"{r['op']:<16} {'x'.join(map(str, r['shape'])):<26} {r['seconds'] * 1e3:>8.3f} "
            f"{r['spread']:>6.0%} {ratio:>8} {r['gigabytes_per_second']:>7.0f} "
            f"{r['teraflops']:>8.2f} {r['of_roofline']:>7.0%}"
        )
    if chosen.json:
        result = {"environment": stamp, "ceilings": peaks, "rows": rows}
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
