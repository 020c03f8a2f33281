"""Writes the results in README.md and bench/results/README.md: `python bench/readme.py [--check]`.

What stands between `<!-- results: NAME -->` and `<!-- end -->` is made of committed files alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tables
from tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
_PART = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo() -> str:
    """`make demo`, and the probe beside it."""
    run, probe = _read("demo.json"), _read("linear_probe.json")
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
    "ours, chunked loss": "this library, loss in chunks",
    "ours, checkpointed": "this library, activations checkpointed",
    "ours, bf16 base": "this library, bf16 base",
    "ours, bf16 base, chunked loss": "this library, bf16 base and loss in chunks",
    "opacus, A frozen": "PEFT and Opacus' hooks, A frozen",
    "opacus, A trained": "PEFT and Opacus' hooks, A trained as in plain LoRA",
}


# In the first steps of a turn this library probes batches for records that know each other.
_PROBING = 2


def smollm2() -> str:
    """What a fine-tune of SmolLM2 comes to; steps of it, this library's and Opacus'."""
    found = _read("smollm2.json")
    settings, (run, *turns) = found["settings"], found["rows"]
    before, after = run["held_out_loss"]
    told = (
        f"{len(run['seconds'])} private steps of {settings['expected_batch_size']} expected "
        f"sentences: held-out loss {before:.3f} to {after:.3f} nats a token, epsilon "
        f"{run['epsilon']:.2f} at delta {settings['delta']:g}, {sum(run['seconds']):.0f} s.\n"
    )
    lines = []
    for way, name in _WAYS.items():
        own = [row for row in turns if row["way"] == way]
        steps = [
            step
            for row in own
            for step in list(zip(row["seconds"], row["sentences"], strict=True))[_PROBING:]
        ]
        times = [1e3 * seconds / sentences for seconds, sentences in steps]
        median, spread = tables.median_and_spread(times)
        memory = sorted(row["above_baseline_mib"] for row in own)
        held = f"{memory[0]:,.0f} to {memory[-1]:,.0f} MiB"
        lines.append((name, f"{median:.0f} ({spread:.0%})", held))
    head = ("SmolLM2-135M", "ms a sentence", "peak memory above the model in fp32")
    return "\n".join((tables.stamp(found), told, table(head, lines)))


PRIVATE, PEFT_B = "ffa_kernels, private", "PEFT, B alone (not private)"
BF16, INT8 = f"{PRIVATE}, bf16 base", f"{PRIVATE}, int8 base"
PRIVATE_PEERS = ("Opacus, hooks", "Opacus, functorch", "Opacus, ghost", "fastDP", "dp-lora")
IN_BRIEF = (PRIVATE, BF16, INT8, "floor, this library's products (not private)", PEFT_B,
            "PEFT, A and B (not private)", *PRIVATE_PEERS,
            "Opacus, hooks, bf16 autocast")  # fmt: skip
MEMORY_IN_BRIEF = (PRIVATE, PEFT_B, *PRIVATE_PEERS, f"{PRIVATE}, dropout 0.05",
                   "PEFT, B alone, dropout 0.05 (not private)")  # fmt: skip
BENCH = "bench.json"
PROCESSORS = {
    BENCH: "Zen 4 (AVX-512, bf16)",
    "bench-amx.json": "Xeon (AMX)",
    "bench-zen5.json": "Zen 5 (AVX-512, bf16)",
    "bench-avx2.json": "Zen 1 (AVX2)",
}


def steps() -> str:
    """The times that are asked for first."""
    found = _read(BENCH)
    return "\n".join((tables.stamp(found), tables.step_times(_of(found, IN_BRIEF))))


def memory() -> str:
    """Memory of the same steps."""
    found = _read(BENCH)
    parts = tables.step_memory(_of(found, MEMORY_IN_BRIEF)), tables.model_memory(found["rows"])
    return "\n".join(parts)


def processors() -> str:
    """The private step on each processor, and the best that peers do there."""
    models = tuple(dict.fromkeys(row["model"] for row in _of(_read(BENCH), (PRIVATE,))))
    lines = []
    for name, processor in PROCESSORS.items():
        found = _read(name)
        where = f"{processor}, {found['environment']['date']}"
        for told, subjects in (
            ("private", (PRIVATE,)),
            ("private, bf16 base", (BF16,)),
            ("the best private peer", PRIVATE_PEERS),
            ("PEFT, B alone (not private)", (PEFT_B,)),
        ):
            best = _least(_of(found, subjects))
            if best:
                lines.append((where, told, *(f"{best[model]:.3f}" for model in models)))
    return table(("processor", "time / frozen model's own passes", *models), lines)


def _of(found: Any, subjects: Iterable[str]) -> tables.Rows:
    """Their rows, in their order."""
    return [row for s in subjects for row in found["rows"] if row.get("subject") == s
            and row["op"] == "step"]  # fmt: skip


def _least(rows: tables.Rows) -> dict[str, float]:
    """Of each model, the least ratio."""
    found: dict[str, float] = {}
    for row in rows:
        found[row["model"]] = min(row["ratio"], found.get(row["model"], row["ratio"]))
    return found


def bench() -> str:
    """Whole steps beside the frozen model and all peers, and how their cost grows."""
    found = _read(BENCH)
    parts = (tables.stamp(found), tables.steps(found["rows"]), tables.growth(found["rows"]))
    return "\n".join(part for part in parts if part)


def updates() -> str:
    """What ends a step, beside a copy and Opacus'."""
    return _updates(_read(BENCH)["rows"])


def _step_times(name: str) -> str:
    found = _read(name)
    return "\n".join((tables.stamp(found), tables.step_times(found["rows"])))


def amx() -> str:
    """Of a processor with AMX: steps alone."""
    return _step_times("bench-amx.json")


def zen5() -> str:
    """Of another processor with bf16 instructions, older than some kernels."""
    return _step_times("bench-zen5.json")


def avx2() -> str:
    """Of a processor without AVX-512, and its updates."""
    return "\n".join((_step_times("bench-avx2.json"), _updates(_read("bench-avx2.json")["rows"])))


def _updates(rows: tables.Rows) -> str:
    return table(
        ("64 tensors of 1024 x 8, 16 records", "ms", "ratio", "to"),
        [
            (
                f"{row['op']}, {row['backend']}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['ratio']:.2f} ({row['ratio_spread']:.0%})",
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
    "steps": steps,
    "processors": processors,
    "memory": memory,
    "updates": updates,
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
    """A page with its results as the files have them."""
    return _PART.sub(lambda part: part[1] + "\n" + PARTS[part[2]]() + "\n" + part[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    arguments = parser.parse_args()
    differs = False
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = written(old)
        differs = differs or new != old
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
    return int(arguments.check and differs)


if __name__ == "__main__":
    sys.exit(main())
