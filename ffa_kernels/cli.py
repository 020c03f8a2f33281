"""The command line: `ffa-kernels doctor`, `ffa-kernels federate` and `ffa-kernels plan`.

A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ffa_kernels.errors import FFAError


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
    federate = commands.add_parser("federate", help="run a federation in this process")
    federate.add_argument("config", type=Path, metavar="CONFIG.toml")
    federate.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    federate.set_defaults(command=_federate)
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
    result = driver.run(settings, arguments.out, console)
    console.print(
        f"accuracy {result['accuracy']:.4f} "
        f"({result['accuracy_without_adapters']:.4f} without adapters, "
        f"{result['baseline_accuracy']:.4f} majority class); "
        f"report in {arguments.out / 'report.md'}",
        highlight=False,
    )
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


def _fail(message: str) -> int:
    print(f"ffa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
