"""Runs a whole federation in one process: data, model, sites, server, evaluation, report."""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated import data, report, wire
from ffa_kernels.federated.config import Config
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.files import write_atomic
from ffa_kernels.federated.models import adapt, build_classifier
from ffa_kernels.federated.server import Server
from ffa_kernels.federated.site import Site, check_records, load_trained, tokenize

_EVAL_BATCH = 64


def run(config: Config, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Run the federation and write its report, its final tensors and each site's files into `out`.

    Args:
        config: a checked configuration.
        out: made if missing. A ledger that is there already goes on counting.
        console: where progress is shown; nowhere by default.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: data, model and configuration do not fit together; nothing has been trained then.
        PrivacyError: a site's budget is spent, or a privacy rule was about to be broken.
    """
    began = time.monotonic()
    console = console or Console(quiet=True)
    records = load_records(config)
    names = sorted(records)
    per_round = config.federation.sites_per_round or len(names)
    if max(per_round, config.federation.min_updates) > len(names):
        raise ConfigError(
            f"[federation] sites_per_round, min_updates: got {per_round} and "
            f"{config.federation.min_updates} for {len(names)} sites; accepted: up to {len(names)}"
        )
    model, tokenizer = build(config)
    run_id = secrets.token_hex(8)
    out.mkdir(parents=True, exist_ok=True)
    sites = {
        name: Site(
            *(name, records[name][0], model, tokenizer, config, run_id),
            folder=out / "sites" / name,
        )
        for name in names
    }
    tests = {name: records[name][1] for name in names}
    samples = {name: _sample(config, name, test) for name, test in tests.items()}
    server = Server(
        wire.trained_tensors(model), wire.fingerprint(model), run_id, config.federation.min_updates
    )
    up = {name: wire.Size() for name in names}
    down = {name: wire.Size() for name in names}
    rounds: list[dict[str, Any]] = []
    console.print(f"{config.federation.name}: {_plan(config, sites)}", highlight=False)
    with _progress(config, per_round, console) as (step, note):
        for round_ in range(1, config.federation.rounds + 1):
            round_began = time.monotonic()
            asked = _draw(config, round_, names, per_round)
            sent = {name: wire.Size() for name in names}
            got = {name: wire.Size() for name in names}
            updates = []
            for name in asked:
                note(f"round {round_}, {name}")
                message = server.message(round_, name)
                sent[name] = wire.measure(message)
                update = sites[name].run_round(round_, message, step)
                got[name] = wire.measure(update)
                updates.append((name, update))
            outcome = server.aggregate(round_, asked, updates)
            note(f"round {round_}, evaluation")
            load_trained(model, server.tensors)
            right = {name: count_correct(model, tokenizer, samples[name], config) for name in names}
            for name in names:
                up[name], down[name] = up[name] + got[name], down[name] + sent[name]
            entry = {
                "round": round_,
                "accuracy": sum(right.values()) / sum(map(len, samples.values())),
                "averaged": outcome.averaged,
                "refused": [{"site": site, "reason": why} for site, why in outcome.refused],
                "seconds": time.monotonic() - round_began,
                "sites": {
                    name: {
                        "accuracy": right[name] / len(samples[name]),
                        "update_norm": outcome.norms.get(name),
                        "epsilon": _finite(sites[name].epsilon()),
                        "bytes_up": got[name].total,
                        "bytes_down": sent[name].total,
                    }
                    for name in names
                },
            }
            rounds.append(entry)
            console.print(_line(entry), highlight=False)
        note("final evaluation")
        right = {name: count_correct(model, tokenizer, tests[name], config) for name in names}
        bare = 0
        with adapters_off(model):
            for test in tests.values():
                bare += count_correct(model, tokenizer, test, config)
    tested = sum(map(len, tests.values()))
    total_up, total_down = sum(up.values(), wire.Size()), sum(down.values(), wire.Size())
    result = {
        "method": config.federation.method,
        "accuracy": sum(right.values()) / tested,
        "accuracy_without_adapters": bare / tested,
        "baseline_accuracy": data.majority_accuracy(data.pool(tests)),
        "epsilon": _finite(max(site.epsilon() for site in sites.values())),
        "delta": config.privacy.target_delta,
        "seconds": time.monotonic() - began,
        "bytes_up": total_up.total,
        "bytes_down": total_down.total,
        "adapter_bytes_up": total_up.adapter,
        "head_bytes_up": total_up.head,
        "header_bytes_up": total_up.header,
        "rounds": rounds,
        "sites": {
            name: {
                "accuracy": right[name] / len(tests[name]),
                "baseline_accuracy": data.majority_accuracy(tests[name]),
                "epsilon": _finite(site.epsilon()),
                "noise_multiplier": site.noise_multiplier,
                "sample_rate": site.sample_rate,
                "train_records": site.records,
                "test_records": len(tests[name]),
                "bytes_up": up[name].total,
                "bytes_down": down[name].total,
            }
            for name, site in sites.items()
        },
        "adapter_norms": {
            name: float(tensor.double().norm())
            for name, tensor in server.tensors.items()
            if _is_b(name)
        },
        "environment": report.environment(),
    }
    write_atomic(out / "trained.safetensors", server.message(config.federation.rounds, "any"))
    report.write(out, config.federation.name, result)
    return result


def load_records(config: Config) -> dict[str, tuple[Records, Records]]:
    """(training, held-out) records of every site, checked against the configuration.

    Raises:
        ConfigError: unreadable records, a label out of range, a site with too few records.
    """
    source, seed = config.data, config.federation.seed
    held_out: dict[str, Records] = {}
    if source.path is not None:
        records = data.load_demo(source.path)
    else:
        records = {site.name: data.load_file(site.train) for site in config.sites}
        held_out = {site.name: data.load_file(site.test) for site in config.sites if site.test}
    if source.sites is not None:
        pooled = data.pool(records)
        if source.dirichlet_alpha is None:
            records = data.split_iid(pooled, source.sites, seed)
        else:
            records = data.split_dirichlet(pooled, source.sites, source.dirichlet_alpha, seed)
    result = {}
    for name, all_of_it in data.split_natural(records).items():
        train, test = all_of_it, held_out.get(name)
        if test is None:
            train, test = data.train_test_split(all_of_it, source.test_fraction, seed)
        _check_labels(name, train, test, config.model.classes)
        check_records(name, len(train), config)
        result[name] = (train, test)
    return result


def build(config: Config) -> tuple[nn.Module, Any]:
    """(adapted model, its tokenizer), the same in every process with the same configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.federation.seed)
        model, tokenizer = build_classifier(config.model)
        adapt(model, config)
    # LoRA dropout of method "lora" draws from torch's generator; a public start would tie every
    # record's mask to how many were drawn before it.
    torch.seed()
    return model, tokenizer


@torch.no_grad()
def count_correct(model: nn.Module, tokenizer: Any, records: Records, config: Config) -> int:
    """How many of `records` the model labels right."""
    model.eval()
    device = next(model.parameters()).device
    # Texts of like length together: less padding.
    order = sorted(range(len(records)), key=lambda i: len(records.texts[i]))
    right = 0
    for start in range(0, len(order), _EVAL_BATCH):
        batch = records.take(order[start : start + _EVAL_BATCH])
        inputs = tokenize(tokenizer, batch.texts, config)
        logits: Tensor = model(**{k: v.to(device) for k, v in inputs.items()}).logits
        right += int((logits.argmax(dim=-1).cpu() == torch.tensor(batch.labels)).sum())
    return right


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model with every trained lora_B at zero; they come back afterwards."""
    held = {name: p for name, p in wire.trained_tensors(model).items() if _is_b(name)}
    values = {name: p.detach().clone() for name, p in held.items()}
    with torch.no_grad():
        for parameter in held.values():
            parameter.zero_()
        try:
            yield
        finally:
            for name, parameter in held.items():
                parameter.copy_(values[name])


def _is_b(name: str) -> bool:
    return "lora_B" in name.split(".")


def _check_labels(name: str, train: Records, test: Records, classes: int) -> None:
    if not len(test):
        raise ConfigError(f"site {name!r}: got no held-out record; accepted: at least one")
    for labels in (train.labels, test.labels):
        if labels and max(labels) >= classes:
            raise ConfigError(
                f"site {name!r}: got label {max(labels)}; accepted: 0 to {classes - 1} "
                f"([model] classes = {classes})"
            )


def _sample(config: Config, name: str, test: Records) -> Records:
    rng = random.Random(f"evaluation {config.federation.seed} {name}")
    count = min(config.federation.eval_records_per_site, len(test))
    return test.take(rng.sample(range(len(test)), count))


def _draw(config: Config, round_: int, names: list[str], count: int) -> list[str]:
    rng = random.Random(f"sites {config.federation.seed} {round_}")
    return sorted(rng.sample(names, count))


def _finite(value: float) -> float | None:
    """JSON knows no infinity: None is "no bound"."""
    return value if math.isfinite(value) else None


def _plan(config: Config, sites: Mapping[str, Site]) -> str:
    federation = config.federation
    noise = ", ".join(f"{name} {site.noise_multiplier:.3f}" for name, site in sites.items())
    return (
        f"{len(sites)} sites, {federation.rounds} rounds of {federation.local_steps} steps, "
        f"method {federation.method}; noise multipliers for epsilon "
        f"{config.privacy.target_epsilon:g}: {noise}"
    )


def _line(entry: dict[str, Any]) -> str:
    epsilons = [site["epsilon"] for site in entry["sites"].values()]
    spent = "no bound" if None in epsilons else f"{max(epsilons):.3f}"
    return (
        f"round {entry['round']}: accuracy {entry['accuracy']:.3f}, epsilon {spent}, "
        f"{sum(site['bytes_up'] for site in entry['sites'].values()) / 1000:.1f} kB up, "
        f"{entry['seconds']:.1f} s" + "".join(f", refused {r['site']}" for r in entry["refused"])
    )


@contextmanager
def _progress(config: Config, per_round: int, console: Console) -> Iterator[tuple[Any, Any]]:
    """(advance by a step, show a note)."""
    federation = config.federation
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("steps"), TimeElapsedColumn()),
    )
    with Progress(*columns, console=console) as progress:
        total = federation.rounds * per_round * federation.local_steps
        task = progress.add_task("starting", total=total)
        yield (
            lambda: progress.advance(task),
            lambda text: progress.update(task, description=text),
        )
