"""A run's report: report.json for programs, report.md and report.png for people."""

from __future__ import annotations

import io
import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from ffa_kernels.doctor import cpu_model, version
from ffa_kernels.files import write_atomic

_log = logging.getLogger(__name__)
_LIBRARIES = ("ffa-kernels", "opacus", "transformers", "peft", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """What the run ran on; neither host name nor path."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": {name: found for name in _LIBRARIES if (found := version(name)) is not None},
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
    }


def write(out: Path, name: str, result: dict[str, Any]) -> None:
    """Write report.json, report.md and report.png into `out`, each of them whole or not at all.

    Without matplotlib there is no report.png, and a warning says so.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomic(out / "report.json", text.encode())
    write_atomic(out / "report.md", markdown(name, result).encode())
    try:
        image = picture(name, result)
    except ModuleNotFoundError as error:
        _log.warning("report.png is not written: %s is not installed", error.name)
    else:
        write_atomic(out / "report.png", image)


def markdown(name: str, result: dict[str, Any]) -> str:
    """The report as text with tables."""
    facts = [
        ("method", result["method"]),
        ("accuracy, held-out, pooled", _share(result["accuracy"])),
        ("the same with every B at zero", _share(result["accuracy_without_adapters"])),
        ("always the majority class", _share(result["baseline_accuracy"])),
        ("epsilon, largest of any site", _epsilon(result["epsilon"])),
        ("delta", f"{result['delta']:g}"),
        ("rounds", len(result["rounds"])),
        ("seconds", f"{result['seconds']:.1f}"),
        ("bytes up", f"{result['bytes_up']:,}"),
        ("of these adapters", f"{result['adapter_bytes_up']:,}"),
        ("of these saved modules", f"{result['head_bytes_up']:,}"),
        ("of these headers", f"{result['header_bytes_up']:,}"),
        ("bytes down", f"{result['bytes_down']:,}"),
        ("of these A, which is sent once", f"{result['frozen_bytes_down']:,}"),
    ]
    sites = [
        (
            *(site, entry["train_records"], entry["test_records"], _share(entry["accuracy"])),
            *(_share(entry["baseline_accuracy"]), _epsilon(entry["epsilon"])),
            *(f"{entry['noise_multiplier']:.3f}", f"{entry['bytes_up']:,}"),
            f"{entry['frozen_bytes_down']:,}",
        )
        for site, entry in result["sites"].items()
    ]
    rounds = [
        (
            *(entry["round"], site, _share(of_site["accuracy"]), _norm(of_site["update_norm"])),
            *(_epsilon(of_site["epsilon"]), f"{of_site['bytes_up']:,}"),
            f"{of_site['bytes_down']:,}",
        )
        for entry in result["rounds"]
        for site, of_site in entry["sites"].items()
    ]
    missing = [
        f"- round {entry['round']}: {what['site']} {how}: {what['reason']}"
        for entry in result["rounds"]
        for how in ("refused", "absent")
        for what in entry[how]
    ]
    env = result["environment"]
    parts = [
        f"# {name}",
        table(("", ""), facts),
        "## Sites",
        table(
            (
                *("site", "train", "test", "accuracy", "majority", "epsilon", "noise", "bytes up"),
                "A, bytes down",
            ),
            sites,
        ),
        "## Rounds",
        "Accuracy of the averaged model on a part of the held-out records.",
        table(
            ("round", "site", "accuracy", "update norm", "epsilon", "bytes up", "bytes down"),
            rounds,
        ),
        *(["## Updates that were refused or did not come", "\n".join(missing)] if missing else []),
        "Epsilon covers a site's training records. Accuracies are computed on held-out records, "
        "which it does not cover.",
        f"Python {env['python']}, torch {env['torch']}, {env['threads']} threads, {env['cpu']}.",
    ]
    return "\n\n".join(parts) + "\n"


def picture(name: str, result: dict[str, Any]) -> bytes:
    """A PNG with accuracy, epsilon and bytes against rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rounds = result["rounds"]
    x = [entry["round"] for entry in rounds]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, epsilon, traffic = figure.subplots(1, 3)
    for site in result["sites"]:
        of_site = [entry["sites"][site] for entry in rounds]
        # What begins with "_" has no place in a legend.
        label = f" {site}" if site.startswith("_") else site
        accuracy.plot(x, [s["accuracy"] for s in of_site], marker=".", lw=1, label=label)
        if all(s["epsilon"] is not None for s in of_site):
            epsilon.plot(x, [s["epsilon"] for s in of_site], marker=".", lw=1, label=label)
    accuracy.plot(x, [entry["accuracy"] for entry in rounds], "k", marker="o", label="pooled")
    accuracy.axhline(result["baseline_accuracy"], color="grey", ls=":", label="majority class")
    accuracy.set(title="accuracy, held-out sample", xlabel="round")
    epsilon.set(title=f"epsilon spent at delta {result['delta']:g}", xlabel="round", ylim=(0, None))
    for key, label, style in (("bytes_up", "up", "-"), ("bytes_down", "down", "--")):
        per_round = [sum(s[key] for s in entry["sites"].values()) for entry in rounds]
        total = [sum(per_round[: i + 1]) / 1e6 for i in range(len(per_round))]
        traffic.plot(x, total, style, marker=".", label=label)
    traffic.set(title="megabytes sent, all sites", xlabel="round", ylim=(0, None))
    for axes in (accuracy, epsilon, traffic):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    figure.suptitle(f"{name}, method {result['method']}", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _share(value: float) -> str:
    return f"{value:.4f}"


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.4f}"


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
