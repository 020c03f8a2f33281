"""The command line: `ffa-kernels doctor | federate | pilot | plan | ledger | audit | bench`.

A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ffa_kernels.errors import FFAError, LedgerError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (the process' own by default); returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return int(arguments.command(arguments))
    except FFAError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; try: pip install 'ffa-kernels[demo]'")
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("ffa-kernels: stopped; what was released stays in the ledgers", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffa-kernels", description="Private federated fine-tuning with FFA-LoRA."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="say what works on this machine, and what not")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(command=_doctor)
    federate = commands.add_parser("federate", help="run a federation on this machine")
    federate.add_argument("config", type=Path, metavar="CONFIG.toml")
    federate.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    federate.add_argument("--engine", choices=("local", "flower"), default="local",
                          help="in this process, or in Flower's simulation")  # fmt: skip
    federate.add_argument("--resume", action="store_true",
                          help="go on with the run that was begun in DIR")  # fmt: skip
    federate.set_defaults(command=_federate)
    pilot = commands.add_parser("pilot", help="small trials of settings, on stand-in records")
    pilot.add_argument("config", type=Path, metavar="CONFIG.toml")
    pilot.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="for the results; trials that it holds are not made again")  # fmt: skip
    pilot.set_defaults(command=_pilot)
    plan = commands.add_parser("plan", help="settings with which a model's training fits a limit")
    plan.add_argument("model", type=Path, metavar="MODEL",
                      help="a folder with config.json, or a model type with sizes: "
                      "llama:hidden_size=512,num_hidden_layers=4")  # fmt: skip
    plan.add_argument("--memory", required=True, metavar="SIZE", help="such as 4GiB or 500MB")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    plan.add_argument("--batch-size", type=int, default=32, metavar="N", help="records in a draw")
    plan.add_argument("--tokens", type=int, default=128, metavar="T", help="of the longest record")
    plan.add_argument("--rank", type=int, default=8, metavar="R", help="of the adapters")
    plan.add_argument("--target-modules", nargs="+", metavar="NAME", help="default: the linear "
                      "layers of all blocks")  # fmt: skip
    plan.add_argument("--optimizer", choices=("sgd", "momentum", "adam", "adamw"), default="adamw")
    plan.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                      help="of the weights as they will be loaded")  # fmt: skip
    plan.add_argument("--allow", nargs="*", metavar="WAY",
                      default=["checkpointing", "chunked_loss"],
                      help="of checkpointing, chunked_loss, per_layer, bfloat16")  # fmt: skip
    plan.set_defaults(command=_plan)
    ledger = commands.add_parser("ledger", help="what was ever released of a site's records")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="the account, in words or as JSON")
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--delta", type=float, help="default: what the ledger is bound to")
    show.add_argument("--accountant", choices=("prv", "rdp"))
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(command=_ledger_show)
    verify = actions.add_parser("verify", help="check every line; exit code 2 if one is damaged")
    verify.add_argument("file", type=Path, metavar="FILE")
    verify.add_argument("--extends", metavar="CHECKSUM", help="an earlier answer of this command: "
                        "the file must go on from there")  # fmt: skip
    verify.set_defaults(command=_ledger_verify)
    audit = commands.add_parser("audit", help="what a private run loses for sure, beside its claim")
    audit.add_argument("--epsilon", type=float, default=3.0, metavar="E", help="of the whole run")
    audit.add_argument("--delta", type=float, default=1e-6, metavar="D")
    audit.add_argument("--steps", type=int, default=1, metavar="T")
    audit.add_argument("--sample-rate", type=float, default=1.0, metavar="Q",
                       help="of Poisson sampling")  # fmt: skip
    audit.add_argument("--canaries", type=int, metavar="M",
                       help="default: 131072, or 16384 with per_layer")  # fmt: skip
    audit.add_argument("--clipping", choices=("flat", "per_layer"), default="flat")
    audit.add_argument("--device", default="cpu", help="such as cpu or cuda")
    audit.add_argument("--confidence", type=float, default=0.999, metavar="P", help="of each bound")
    audit.add_argument("--json", action="store_true", help="as JSON")
    audit.set_defaults(command=_audit)
    bench = commands.add_parser("bench", help="time and memory beside the frozen model and peers")
    bench.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="for bench.json, bench.md and the plots")  # fmt: skip
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    bench.add_argument("--suite", choices=("quick", "full"), default="quick")
    bench.set_defaults(command=_bench)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from ffa_kernels import doctor

    findings = doctor.examine()
    print(json.dumps(findings, indent=1) if arguments.json else doctor.describe(findings))
    return 0


def _federate(arguments: argparse.Namespace) -> int:
    # Its notes on a new head and its own progress bars would tear ours apart.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console

    from ffa_kernels.federated import config, driver

    settings = config.load(arguments.config)
    console = Console()
    if arguments.engine == "flower":
        from ffa_kernels.federated import flower

        result = flower.run_simulation(settings, arguments.out, console, arguments.resume)
    else:
        result = driver.run(settings, arguments.out, console, arguments.resume)
    console.print(
        f"accuracy {result['accuracy']:.4f} "
        f"({result['accuracy_without_adapters']:.4f} without adapters, "
        f"{result['baseline_accuracy']:.4f} majority class); "
        f"report in {arguments.out / 'report.md'}",
        highlight=False,
        markup=False,
    )
    return 0


def _pilot(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console

    from ffa_kernels.federated import config, pilot

    result = pilot.run(config.load(arguments.config), arguments.out, Console())
    best = result["recommended"]
    chosen = ", ".join(f"{knob} {value}" for knob, value in best["knobs"].items())
    print(f"accuracy {best['accuracy']:.4f} with {chosen}; table in {arguments.out / 'pilot.md'}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ffa_kernels.memory.folder import from_folder
    from ffa_kernels.memory.planning import parse_memory, plan

    memory = parse_memory(arguments.memory, "--memory")
    model = from_folder(arguments.model, arguments.rank, arguments.target_modules, arguments.dtype)
    made = plan(
        model,
        memory=memory,
        batch_size=arguments.batch_size,
        tokens=arguments.tokens,
        device=arguments.device,
        optimizer=arguments.optimizer,
        allow=arguments.allow,
    )
    print(made)
    return 0


def _ledger_show(arguments: argparse.Namespace) -> int:
    from ffa_kernels.privacy.ledger import read_account

    account = read_account(arguments.file)
    delta = account.bound.get("delta") if arguments.delta is None else arguments.delta
    accountant = arguments.accountant or account.bound.get("accountant", "prv")
    spent = None if delta is None else account.epsilon(delta, accountant)
    if arguments.json:
        charges = [dict(zip(("noise_multiplier", "sample_rate", "steps"), entry, strict=True))
                   for entry in account.history]  # fmt: skip
        print(json.dumps({
            "epsilon": spent if spent is None or math.isfinite(spent) else "inf",
            "delta": delta, "accountant": accountant, "steps": account.steps,
            "private": account.private, "bound": account.bound, "charges": charges,
        }, indent=1))  # fmt: skip
        return 0
    print(f"{account.steps} steps")
    for noise, rate, steps in account.history:
        print(f"  {steps} of noise multiplier {noise:.6g} at sample rate {rate:.6g}")
    if not account.private:
        print("not private: some steps' noise was seeded")
    if spent is None:
        print("bound to no delta: --delta says at which epsilon is wanted")
    else:
        print(f"epsilon {spent:.6g} at delta {delta:g}, by {accountant}")
    return 0


def _ledger_verify(arguments: argparse.Namespace) -> int:
    from ffa_kernels.privacy.ledger import read_account

    account = read_account(arguments.file)
    if not account.checksums:
        raise LedgerError(f"ledger {arguments.file}: holds no whole line")
    if arguments.extends is not None:
        account.check_extends(arguments.extends, arguments.file)
    print(f"whole: {account.steps} steps; last checksum {account.checksums[-1]}")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from ffa_kernels.privacy.auditing import audit

    report = audit(
        target_epsilon=arguments.epsilon,
        target_delta=arguments.delta,
        steps=arguments.steps,
        sample_rate=arguments.sample_rate,
        canaries=arguments.canaries,
        clipping=arguments.clipping,
        device=arguments.device,
        confidence=arguments.confidence,
    )
    print(json.dumps(report.as_dict(), indent=1) if arguments.json else report)
    return int(report.violated)


def _bench(arguments: argparse.Namespace) -> int:
    import subprocess

    root = Path(__file__).resolve().parents[1]
    script = root / "bench" / "run.py"
    if not script.is_file() or not (root / "csrc").is_dir():
        raise FFAError(
            "bench: the benchmarks are not part of an installed package; clone the repository, "
            "install it with `pip install -e '.[bench]'`, and run the command again"
        )
    command = [sys.executable, str(script), "--out", str(arguments.out), "--suite", arguments.suite]
    if arguments.device is not None:
        command += ["--device", arguments.device]
    return subprocess.run(command).returncode


def _fail(message: str) -> int:
    print(f"ffa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
