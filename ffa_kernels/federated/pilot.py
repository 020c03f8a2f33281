"""The small trial that comes first: a grid of settings, tried on stand-in records by default.

Every trial on a site's own records is a release. So it is made on synthetic or public ones, unless
the configuration says "own": then each trial is charged to the sites' ledgers as it stands, and
what is reported as epsilon is the ledgers' total.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated import data, driver, report
from ffa_kernels.federated.build import build, derive_A
from ffa_kernels.federated.config import Config, check_together
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.site import batch_size
from ffa_kernels.files import write_atomic
from ffa_kernels.privacy import epsilon, noise_multiplier_for
from ffa_kernels.privacy.ledger import read_account

# Where each knob of [pilot] lies in the configuration.
_KNOBS = {
    "method": "federation",
    "init": "model",
    "r": "model",
    "lr": "train",
    "max_grad_norm": "privacy",
    "target_epsilon": "privacy",
}
_Sites = Mapping[str, tuple[Records, Records]]


@dataclass(frozen=True)
class Trial:
    """One run: a value for each knob, and a seed."""

    knobs: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def key(self) -> str:
        """The same for the same trial, in any process."""
        text = json.dumps([self.knobs, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def trials(config: Config) -> list[Trial]:
    """All combinations of the configuration's [pilot], each with each seed."""
    values = []
    for knob, table in _KNOBS.items():
        own = getattr(getattr(config, table), knob)
        values.append([(knob, value) for value in getattr(config.pilot, knob) or (own,)])
    combined = itertools.product(*values)
    return [Trial(knobs, seed) for knobs in combined for seed in config.pilot.seeds]


def run(config: Config, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Makes the trials that `out` does not hold yet, and writes what all of them say.

    Args:
        config: with its [pilot].
        out: made if missing: trials.jsonl (a line a trial), pilot.md, pilot.png, pilot.json and
            recommended.toml, the configuration to go on with.
        console: where progress is shown; nowhere by default.

    Returns:
        The content of pilot.json.

    Raises:
        ConfigError: as `driver.run`, of any trial; none has been made then.
        PrivacyError: with records "own", a site whose budget is spent.
    """
    console = console or Console(quiet=True)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "trials.jsonl"
    done = _read(log, _identity(config))
    wanted = trials(config)
    _check([_settled(config, trial) for trial in wanted if trial.key not in done])
    for number, trial in enumerate(wanted, start=1):
        if trial.key in done:
            continue
        console.print(f"trial {number} of {len(wanted)}: {_spell(trial)}", highlight=False)
        row = _attempt(config, trial, out / "trials" / trial.key)
        with log.open("a", encoding="utf-8") as file:
            # On a line of its own, whatever a stopped process left.
            file.write("\n" + json.dumps({"of": _identity(config), "key": trial.key, **row}))
        done[trial.key] = row
    rows = [done[trial.key] for trial in wanted]
    result = _summary(config, rows)
    write_atomic(out / "pilot.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(out / "pilot.md", markdown(config, result).encode())
    write_atomic(out / "recommended.toml", _toml(config, result["recommended"]).encode())
    try:
        image = picture(result)
    except ModuleNotFoundError:
        console.print("pilot.png is not written: matplotlib is not installed")
    else:
        write_atomic(out / "pilot.png", image)
    return result


def _identity(config: Config) -> str:
    """Of all that a trial depends on and its key does not name."""
    plain = asdict(config)
    for key in ("seeds", *_KNOBS):
        del plain["pilot"][key]
    text = json.dumps(plain, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(log: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Trials that are done, by key; those of another configuration are left aside."""
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
            if row["of"] == identity:
                found[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            # A process was stopped while it wrote: the trial is made again.
            continue
    return found


def _check(settled: Sequence[Config]) -> None:
    """Raises ConfigError for what would fail in a later trial only."""
    models = {}
    for config in settled:
        check_together(config)
        models[config.federation.method, config.model.init, config.model.r] = config
    for config in models.values():
        model, _ = build(config)
        if config.sends_A:
            derive_A(model)


def _settled(config: Config, trial: Trial) -> Config:
    """The configuration with a trial's values."""
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for knob, value in trial.knobs:
        changes[_KNOBS[knob]][knob] = value
    federation = {"seed": trial.seed, "rounds": config.pilot.rounds or config.federation.rounds}
    changes["federation"] |= federation
    if changes["model"]["init"] != "pissa" and changes["federation"]["method"] != "ffa":
        # PEFT's LoRA has its own; the knob does not apply.
        changes["model"].pop("init")
    tables = {name: replace(getattr(config, name), **new) for name, new in changes.items()}
    return replace(config, **tables)


def _attempt(config: Config, trial: Trial, folder: Path) -> dict[str, Any]:
    settled = _settled(config, trial)
    records: _Sites | None = None
    if config.pilot.records == "own":
        settled = _beside_what_was_spent(settled)
    else:
        records = _stand_in(config, trial.seed)
        federation = settled.federation
        # Other sites than the configuration's; each trial begins with an account of its own.
        settled = replace(
            settled,
            sites=(),
            federation=replace(
                federation,
                weights="equal",
                sites_per_round=None,
                min_updates=min(federation.min_updates, len(records)),
            ),
            privacy=replace(settled.privacy, new_ledger=True),
        )
    result = driver.run(settled, folder, records=records)
    return {
        "knobs": dict(trial.knobs),
        "seed": trial.seed,
        "accuracy": result["accuracy"],
        "baseline_accuracy": result["baseline_accuracy"],
        "epsilon": result["epsilon"],
        "bytes_up": result["bytes_up"],
        "adapter_bytes_up": result["adapter_bytes_up"],
        "seconds": result["seconds"],
    }


def _stand_in(config: Config, seed: int) -> _Sites:
    pilot, classes = config.pilot, config.model.classes
    wanted = pilot.sites * pilot.records_per_site
    if pilot.path is None:
        pooled = data.synthetic(wanted, classes, config.federation.seed)
    else:
        pooled = data.load_file(pilot.path)
        if len(pooled) < wanted:
            raise ConfigError(
                f"[pilot] path: got {len(pooled)} records; accepted: {wanted} or more, "
                "sites x records_per_site"
            )
        pooled = pooled.take(range(wanted))
    dealt = data.split_iid(pooled, pilot.sites, seed)
    fraction = config.data.test_fraction
    return {name: data.train_test_split(each, fraction, seed) for name, each in dealt.items()}


def _beside_what_was_spent(config: Config) -> Config:
    """The trial at its own noise, whatever was released before: its target is the new total."""
    privacy, federation = config.privacy, config.federation
    if math.isinf(privacy.target_epsilon):
        return config
    total = privacy.target_epsilon
    records = driver.load_records(config)
    for site in config.sites:
        count = len(records[site.name][0])
        rate = batch_size(config.train, count) / count
        steps = federation.rounds * federation.local_steps
        settings = (privacy.target_delta, rate, steps, privacy.accountant)
        noise = noise_multiplier_for(privacy.target_epsilon, *settings)
        ledger = Path(str(site.ledger))
        history = read_account(ledger).history if ledger.exists() else []
        more = [*history, (noise, rate, steps)]
        total = max(total, epsilon(more, privacy.target_delta, privacy.accountant))
    return replace(config, privacy=replace(privacy, target_epsilon=total * (1 + 1e-6)))


def _summary(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[json.dumps(row["knobs"])].append(row)
    settings = []
    for text, of_group in groups.items():
        accuracies = [row["accuracy"] for row in of_group]
        settings.append(
            {
                "knobs": json.loads(text),
                "runs": len(of_group),
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "epsilon": max((r["epsilon"] for r in of_group), key=lambda e: e or math.inf),
                "bytes_up": statistics.mean(row["bytes_up"] for row in of_group),
                "seconds": statistics.mean(row["seconds"] for row in of_group),
            }
        )
    target = config.privacy.target_epsilon
    fitting = [s for s in settings if s["knobs"]["target_epsilon"] <= target] or settings
    best = max(fitting, key=lambda s: (s["accuracy"], -s["bytes_up"]))
    return {
        "records": config.pilot.records,
        "baseline_accuracy": statistics.mean(row["baseline_accuracy"] for row in rows),
        "settings": sorted(settings, key=lambda s: -s["accuracy"]),
        "sensitivity": _sensitivity(settings),
        "recommended": best,
        "environment": report.environment(),
    }


def _sensitivity(settings: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each knob that was varied, each value's best and mean accuracy over all the others."""
    found = {}
    for knob in _KNOBS:
        values: dict[Any, list[float]] = defaultdict(list)
        for setting in settings:
            values[setting["knobs"][knob]].append(setting["accuracy"])
        if len(values) > 1:
            found[knob] = [
                {"value": value, "mean": statistics.mean(each), "best": max(each)}
                for value, each in values.items()
            ]
    return found


def markdown(config: Config, result: dict[str, Any]) -> str:
    """The trials as a text with tables."""
    best = result["recommended"]
    rows = [
        (
            *(str(s["knobs"][knob]) for knob in _KNOBS),
            f"{s['accuracy']:.4f} ± {s['spread']:.4f}",
            str(s["runs"]),
            "no bound" if s["epsilon"] is None else f"{s['epsilon']:.3f}",
            f"{s['bytes_up']:,.0f}",
            f"{s['seconds']:.1f}",
        )
        for s in result["settings"]
    ]
    about = {
        "synthetic": "Synthetic sentences: nothing was released of anyone's records.",
        "file": "Records of a public file: nothing was released of the sites'.",
        "own": "The sites' own records: epsilon is the total of their ledgers, which these trials "
        "have charged.",
    }[result["records"]]
    parts = [
        f"# Pilot: {config.federation.name}",
        about,
        f"Always the majority class: {result['baseline_accuracy']:.4f}.",
        report.table(
            (*_KNOBS, "accuracy", "runs", "epsilon", "bytes up", "seconds"),
            rows,
        ),
        "## To go on with",
        ", ".join(f"{knob} {value}" for knob, value in best["knobs"].items())
        + f": accuracy {best['accuracy']:.4f} ± {best['spread']:.4f}. It is the best of the trials "
        "within the configuration's target_epsilon; differences below the spread mean nothing. "
        "recommended.toml has these values.",
    ]
    for knob, values in result["sensitivity"].items():
        lines = [(str(v["value"]), f"{v['mean']:.4f}", f"{v['best']:.4f}") for v in values]
        parts += [f"## {knob}", report.table((knob, "mean accuracy", "best"), lines)]
    return "\n\n".join(parts) + "\n"


def picture(result: dict[str, Any]) -> bytes:
    """A PNG: accuracy against epsilon, against bytes, and for each knob that was varied."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    knobs = list(result["sensitivity"])
    figure = Figure(figsize=(4 * (2 + len(knobs)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 + len(knobs), squeeze=False)[0]
    for method in sorted({s["knobs"]["method"] for s in result["settings"]}):
        of_method = [s for s in result["settings"] if s["knobs"]["method"] == method]
        private = [s for s in of_method if s["epsilon"] is not None]
        for ax, key, some in ((axes[0], "epsilon", private), (axes[1], "bytes_up", of_method)):
            ax.errorbar(
                [s[key] for s in some],
                [s["accuracy"] for s in some],
                [s["spread"] for s in some],
                fmt="o",
                label=method,
            )
    axes[0].set(title="accuracy", xlabel="epsilon")
    axes[1].set(title="accuracy", xlabel="bytes up")
    for ax, knob in zip(axes[2:], knobs, strict=True):
        values = result["sensitivity"][knob]
        names = [str(v["value"]) for v in values]
        ax.plot(names, [v["best"] for v in values], "o-", label="best of the others")
        ax.plot(names, [v["mean"] for v in values], "o:", label="mean over the others")
        ax.set(title="accuracy", xlabel=knob)
    for ax in axes:
        ax.axhline(result["baseline_accuracy"], color="grey", ls=":")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _toml(config: Config, best: dict[str, Any]) -> str:
    """The configuration with the best trial's values, all keys written out."""
    import tomli_w

    document: dict[str, Any] = {}
    for table in fields(config):
        if table.name not in ("sites", "pilot"):
            document[table.name] = dict(asdict(getattr(config, table.name)))
    for knob, table_name in _KNOBS.items():
        document[table_name][knob] = best["knobs"][knob]
    if config.sites:
        document["site"] = [asdict(site) for site in config.sites]
    return tomli_w.dumps(_without_none(document))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _spell(trial: Trial) -> str:
    return ", ".join(f"{knob} {value}" for knob, value in trial.knobs) + f", seed {trial.seed}"
