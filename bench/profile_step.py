"""Where the time of one private step goes: `python bench/profile_step.py --out FILE.json`.

The floor and this library's step run in turns on one thread under PyTorch's profiler, whose self
times are added up by operator; what no operator accounts for is Python and the profiler itself.
While it looks on, every op goes through PyTorch's dispatcher, which a step goes around otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import models
import subjects
import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 20
KINDS = {
    "products of the frozen layers": ("aten::addmm", "aten::mm", "aten::bmm", "aten::matmul",
                                      "aten::linear"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "this library's ops": ("ffa::", "_Linear"),
    "noise, clipping, optimizer": ("ffa::private_step", "ffa::clip", "ffa::private_update"),
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
    found["Python, and what no operator accounts for"] = 1e3 * wall / STEPS - sum(found.values())
    return found


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
        "floor": subjects.floor(setting, models.sharing(model), device),
        subjects.OURS: subjects.make(subjects.OURS, setting, models.sharing(model), device),
    }
    for step in steps.values():
        step(0)
    result: dict[str, Any] = {
        "environment": measure.environment(device),
        "model": setting.name,
        "milliseconds": {name: profiled(step) for name, step in steps.items()},
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["milliseconds"], indent=1))


if __name__ == "__main__":
    main()
