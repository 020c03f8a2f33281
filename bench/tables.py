"""What the benchmarks found, as tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[Row]


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the interquartile range as a part of it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    quartiles = statistics.quantiles(values, n=4)
    return median, (quartiles[2] - quartiles[0]) / median


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    """All tables, under what the figures depend on."""
    parts = [
        stamp(result),
        "Ratios are medians over rounds of two times taken one after the other, with the "
        "interquartile range in brackets.\n",
        steps(result["rows"]),
        operations(result["rows"]),
        growth(result["rows"]),
    ]
    return "\n".join(part for part in parts if part)


def stamp(result: dict[str, Any]) -> str:
    """What the figures depend on, in a line."""
    found = result["environment"]
    told = ", ".join(f"{k} {v}" for k, v in found["libraries"].items())
    commit = f", commit {found['commit']}" if found.get("commit") else ""
    return (
        f"{found['device']} ({found['instructions']}), {found['threads']} threads, torch "
        f"{found['torch']}, Python {found['python']}, {told}; {found['date']}{commit}.\n"
    )


def steps(rows: Rows) -> str:
    """Whole steps: a row a subject, a column a model; time, and memory that a step takes, over the
    floor's; and what the model holds, where a subject makes it smaller."""
    parts = (step_times(rows), step_memory(rows), model_memory(rows))
    return "\n".join(part for part in parts if part)


def step_times(rows: Rows) -> str:
    """Whole steps' times over the floor's."""
    return _steps(rows, "time / frozen model's own passes", _ratio)


def step_memory(rows: Rows) -> str:
    """Whole steps' peak memory over the floor's."""
    return _steps(rows, "peak memory of a step's tensors / the same", _memory)


def model_memory(rows: Rows) -> str:
    """Parameters and buffers over the frozen model's, of subjects that have fewer bytes of them."""
    smaller = {
        row["subject"] for row in rows if row.get("model_bytes", 1) < row.get("frozen_bytes", 1)
    }
    rows = [row for row in rows if row.get("subject") in smaller and "model_bytes" in row]
    return _steps(rows, "bytes of the model / the frozen model's", _resident)


def _steps(rows: Rows, told: str, cell: Callable[[Row], str]) -> str:
    rows = [row for row in rows if row["op"] == "step"]
    if not rows:
        return ""
    models = list(dict.fromkeys(row["model"] for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    found = {(row["subject"], row["model"]): row for row in rows}
    first = {row["model"]: row for row in rows}
    heads = [f"{m}, r = {first[m]['r']}, {first[m]['n']} x {first[m]['length']}" for m in models]
    body = [[s, *(cell(found[s, m]) if (s, m) in found else "" for m in models)] for s in subjects]
    return table((told, *heads), body)


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_spread']:.0%})"


def _memory(row: Row) -> str:
    return f"{row['peak_bytes'] / row['floor_peak_bytes']:.3f}"


def _resident(row: Row) -> str:
    return f"{row['model_bytes'] / row['frozen_bytes']:.3f}"


def operations(rows: Rows) -> str:
    """Single ops: time, what it stands beside, bytes and operations, and the share of the rate that
    a copy and a large product reach: above 100% where what is moved stays in a cache."""
    rows = [row for row in rows if row["op"] not in ("step", "growth")]
    if not rows:
        return ""
    lines = []
    for row in sorted(rows, key=lambda row: (row["op"], row["shape"], row["backend"])):
        seconds, modelled = row["seconds"], "bytes" in row
        memory = ""
        if "peak_bytes" in row:
            memory = f"{row['peak_bytes'] / row['floor_peak_bytes']:.2f}"
        lines.append((
            row["op"], row["backend"], " x ".join(map(str, row["shape"])),
            f"{seconds * 1e3:.3f}", f"{row['ratio']:.3f} ({row['ratio_spread']:.0%})",
            row["against"], memory,
            f"{row['bytes'] / seconds / 1e9:.1f}" if modelled else "",
            f"{row['flops'] / seconds / 1e9:.1f}" if modelled else "",
            f"{row['of_ceiling']:.0%}" if modelled else "",
        ))  # fmt: skip
    head = ("op", "backend", "shape", "ms", "ratio", "to", "memory ratio", "GB/s", "GFLOP/s",
            "of model")  # fmt: skip
    return table(head, lines)


def line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, R^2) of the least-squares line a + b x."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    over = sum((x - mean_x) * (y - mean_y) for x, y in points)
    b = over / sum((x - mean_x) ** 2 for x, _ in points)
    a = mean_y - b * mean_x
    left = sum((y - a - b * x) ** 2 for x, y in points)
    whole = sum((y - mean_y) ** 2 for _, y in points)
    return a, b, 1.0 - left / whole if whole else 1.0


def sweeps(rows: Rows) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By (subject, knob): (value, milliseconds that a step takes over the floor's)."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["op"] == "growth":
            over = 1e3 * row["seconds"] * (1.0 - 1.0 / row["ratio"])
            found.setdefault((row["subject"], row["knob"]), []).append((row["value"], over))
    return {key: sorted(points) for key, points in found.items()}


def growth(rows: Rows) -> str:
    """What a step takes over the floor's time, against each size, and the line through it."""
    lines = []
    for (subject, knob), points in sweeps(rows).items():
        a, b, fit = line(points)
        cells = ", ".join(f"{x:g}: {y:.1f}" for x, y in points)
        lines.append((subject, knob, cells, f"{a:.2f} + {b:.4f} {knob}", f"{fit:.3f}"))
    head = ("subject", "size", "ms over the floor", "line", "R²")
    return table(head, lines) if lines else ""


def plots(result: dict[str, Any], out: Path) -> None:
    """steps.png, memory.png, roofline.png and growth.png, as far as there is something in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    steps_found = [row for row in rows if row["op"] == "step"]
    for name, value, label in (
        ("steps", lambda row: row["ratio"], "time / frozen model's own passes"),
        ("memory", lambda row: row["peak_bytes"] / row["floor_peak_bytes"], "peak memory / same"),
    ):
        if steps_found:
            figure = _bars(plt, steps_found, value, label)
            figure.savefig(out / f"{name}.png", dpi=120)
            plt.close(figure)
    modelled = [row for row in rows if "bytes" in row]
    if modelled:
        figure = _roofline(plt, modelled)
        figure.savefig(out / "roofline.png", dpi=120)
        plt.close(figure)
    lines = sweeps(rows)
    if lines:
        figure = _growth(plt, lines)
        figure.savefig(out / "growth.png", dpi=120)
        plt.close(figure)


def _bars(plt: Any, rows: Rows, value: Any, label: str) -> Any:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model][::-1]
        colours = ["tab:blue" if "ffa" in row["subject"] else "tab:gray" for row in own]
        axis.barh([row["subject"] for row in own], [value(row) for row in own], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(model, fontsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return figure


def _roofline(plt: Any, rows: Rows) -> Any:
    figure, axis = plt.subplots(figsize=(6, 4))
    bandwidth, rate = rows[0]["ceilings"]
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        across = [row["flops"] / row["bytes"] for row in own]
        axis.scatter(across, [row["flops"] / row["seconds"] for row in own], s=14, label=op)
    edges = [min(row["flops"] / row["bytes"] for row in rows) / 2, 4 * rate / bandwidth]
    edges = sorted([*edges, rate / bandwidth])
    axis.plot(edges, [min(rate, bandwidth * x) for x in edges], color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="operations / s")
    axis.legend(fontsize=6)
    figure.tight_layout()
    return figure


def _growth(plt: Any, lines: dict[tuple[str, str], list[tuple[float, float]]]) -> Any:
    knobs = list(dict.fromkeys(knob for _, knob in lines))
    figure, axes = plt.subplots(1, len(knobs), figsize=(3.5 * len(knobs), 3), squeeze=False)
    for axis, knob in zip(axes[0], knobs, strict=True):
        for (subject, of), points in lines.items():
            if of == knob:
                axis.plot(*zip(*points, strict=True), marker="o", label=subject)
        axis.set_xlabel(knob)
        axis.set_ylabel("ms over the floor", fontsize=8)
        axis.legend(fontsize=6)
    figure.tight_layout()
    return figure
