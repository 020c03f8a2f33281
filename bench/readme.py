"""Writes the README's results from bench/results: `python bench/readme.py [--check]`.

What stands between `<!-- results: NAME -->` and `<!-- end -->` is made of committed files alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tables
from tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
_PART = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo() -> str:
    """`make demo`, and the probe beside it."""
    run, probe = _read("demo.json"), _read("probe.json")
    minutes, seconds = divmod(round(run["seconds"]), 60)
    spread = f"{probe['accuracy_mean']:.3f} ± {probe['accuracy_stdev']:.3f}"
    return table(
        ("`make demo`", "accuracy", "every B at zero", "majority class", "epsilon", "sent up",
         "wall time"),
        [
            (
                "FFA-LoRA, r = 32, last two value projections, and head",
                f"{run['accuracy']:.3f}",
                f"{run['accuracy_without_adapters']:.3f}",
                f"{run['baseline_accuracy']:.3f}",
                f"{run['epsilon']:.3f}",
                f"{run['bytes_up'] / 1e6:.2f} MB",
                f"{minutes} min {seconds} s",
            ),
            (
                f"private linear probe, {probe['settings']['repeats']} repeats",
                *(spread, "", "", f"{probe['epsilon']:.3f}", "", ""),
            ),
        ],
    )  # fmt: skip


_WAYS = {
    "ours": "this library",
    "ours, checkpointed": "this library, activations checkpointed",
    "opacus, A frozen": "PEFT and Opacus' hooks, A frozen",
    "opacus, A trained": "PEFT and Opacus' hooks, A trained as in plain LoRA",
}


def smollm2() -> str:
    """Steps of SmolLM2, this library's and Opacus'."""
    rows = [row for row in _read("smollm2.json")["rows"] if row["steps"] == 5]
    return table(
        ("SmolLM2-135M", "s a step", "peak memory above the loaded model"),
        [
            (
                _WAYS[row["way"]],
                f"{row['seconds_a_step']:.2f}",
                f"{row['above_baseline_mib']:,.0f} MiB",
            )
            for row in rows
        ],
    )


def bench() -> str:
    """Whole steps beside the frozen model and the peers; growth; the update beside Opacus'."""
    found = _read("bench.json")
    rows = found["rows"]
    parts = (tables.stamp(found), tables.steps(rows), tables.growth(rows), _updates(rows))
    return "\n".join(part for part in parts if part)


def zen5() -> str:
    """Of another processor with bf16 instructions, older than some kernels."""
    return _short("bench-zen5.json")


def avx2() -> str:
    """The same on a processor without AVX-512: private steps, and PEFT's."""
    found = _read("bench-avx2.json")
    rows = found["rows"]
    return "\n".join((tables.stamp(found), tables.step_times(rows), _updates(rows)))


def amx() -> str:
    """Of a processor with AMX: steps alone."""
    found = _read("bench-amx.json")
    return "\n".join((tables.stamp(found), tables.step_times(found["rows"])))


_SHORT = ("ffa_kernels, private", "PEFT, B alone (not private)", "Opacus, hooks",
          "ffa_kernels, private, bf16 base", "ffa_kernels, private, int8 base",
          "Opacus, hooks, bf16 autocast")  # fmt: skip


def _short(name: str) -> str:
    found = _read(name)
    rows = [row for row in found["rows"] if row.get("subject") in _SHORT]
    return "\n".join((tables.stamp(found), tables.step_times(rows)))


def _updates(rows: tables.Rows) -> str:
    return table(
        ("64 tensors of 1024 x 8, 16 records", "ms", "ratio", "to"),
        [
            (
                f"{row['op']}, {row['backend']}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['ratio']:.2f}",
                row["against"],
            )
            for row in rows
            if row["op"] in UPDATES and row["backend"] != "reference"
        ],
    )


UPDATES = ("clip_accumulate", "private_update, no noise", "private_update",
           "private_step, no noise", "private_step", "Opacus' DPOptimizer.step")  # fmt: skip


def profile() -> str:
    """Where a step's time goes."""
    found = _read("profile.json")
    columns = found["milliseconds"]
    kinds = {kind for spent in columns.values() for kind in spent}
    rows = [
        (kind, *(f"{spent.get(kind, 0.0):.1f}" for spent in columns.values()))
        for kind in sorted(kinds, key=lambda k: -sum(of.get(k, 0.0) for of in columns.values()))
    ]
    rows.append(("all", *(f"{sum(spent.values()):.1f}" for spent in columns.values())))
    made = table((f"{found['model']}, one thread, ms a step", *columns), rows)
    return "\n".join((tables.stamp(found), made))


def study() -> str:
    """FFA-LoRA against LoRA; the words of a cell are the study's own."""
    spec = importlib.util.spec_from_file_location("study", ROOT / "bench" / "study" / "run.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return str(module.tables(module.Log(RESULTS / "study" / "runs.jsonl")))


PARTS: dict[str, Callable[[], str]] = {
    "bench": bench,
    "zen5": zen5,
    "amx": amx,
    "avx2": avx2,
    "profile": profile,
    "demo": demo,
    "smollm2": smollm2,
    "study": study,
}


def written(text: str) -> str:
    """The README with its results as the files have them."""
    return _PART.sub(lambda part: part[1] + "\n" + PARTS[part[2]]() + "\n" + part[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = written(old)
    if arguments.check:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
