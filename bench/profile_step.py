"""Where the time of one private step goes: `python bench/profile_step.py --out FILE.json`.

The floor and this library's steps run in turns on one thread under PyTorch's profiler, whose self
times are added up by operator; what no operator accounts for is Python and the profiler itself.
While it looks on, every op goes through PyTorch's dispatcher, which a step goes around otherwise.
Where one op makes the gradients of the records and the input's as well, it counts with the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import models
import subjects
import torch
from torch.profiler import ProfilerActivity, profile

TURNS, STEPS = 5, 4
PYTHON = "Python, and what no operator accounts for"
SUBJECTS = (subjects.FLOOR, subjects.OURS, "ffa_kernels, private, bf16 base")
KINDS = {
    "frozen layers, and what adapters add to them": (
        "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::linear", "Product",
        "ffa::linear", "ffa::base_product", "ffa::dropout", "_Linear", "ffa::per_sample_backward"),
    "gradients of the records": ("ffa::per_sample_grad", "ffa::per_sample_clip"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "noise, clipping, optimizer": ("ffa::private_step", "ffa::clip", "ffa::private_update"),
    PYTHON: ("autograd::engine", "torch::autograd"),
}  # fmt: skip


def kind(operator: str) -> str:
    """The longest prefix of KINDS wins."""
    found = max(
        ((len(p), name) for name, prefixes in KINDS.items() for p in prefixes
         if operator.startswith(p)),
        default=(0, "norms, activations, copies and others"),
    )  # fmt: skip
    return found[1]


def profiled(step: Callable[[int], object]) -> dict[str, float]:
    """Milliseconds of one step, by kind."""
    wall = 0.0
    with profile(activities=[ProfilerActivity.CPU]) as account:
        for i in range(STEPS):
            wall += measure.seconds(lambda i=i: step(i))  # type: ignore[misc]
    found: dict[str, float] = {}
    for event in account.key_averages():
        name = kind(event.key)
        found[name] = found.get(name, 0.0) + event.self_cpu_time_total / 1e3 / STEPS
    rest = 1e3 * wall / STEPS - sum(found.values())
    found[PYTHON] = found.get(PYTHON, 0.0) + rest
    return found


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    """Of each kind over the turns."""
    kinds = {name for turn in turns for name in turn}
    return {name: statistics.median(turn.get(name, 0.0) for turn in turns) for name in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="RoBERTa-like 384 x 6, all",
                        choices=[s.name for s in models.CPU])  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    setting = next(s for s in models.CPU if s.name == chosen.model)
    model = setting.build()
    steps = {
        name: subjects.floor(setting, models.sharing(model), device)
        if name == subjects.FLOOR
        else subjects.make(name, setting, models.sharing(model), device)
        for name in SUBJECTS
    }
    for step in steps.values():
        step(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            found[name].append(profiled(step))
    result: dict[str, Any] = {
        "environment": measure.environment(device),
        "model": setting.name,
        "milliseconds": {name: medians(turns) for name, turns in found.items()},
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["milliseconds"], indent=1))


if __name__ == "__main__":
    main()
