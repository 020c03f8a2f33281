"""A whole private step beside its floor: `python bench/step.py [--model NAME] [--json FILE]`.

The floor is what no method can avoid: the frozen model's forward and its gradient as far as the
embeddings. Beside it PEFT's ordinary step on the same layers, B alone trained, nothing private.
Every round runs each once; weights are random, records are random tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import ops

import ffa_kernels as ffa

Batch = tuple[Tensor, ...]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Sizes of a LlamaConfig, then n, T and r.
MODELS: dict[str, tuple[dict[str, int], int, int, int]] = {
    "llama-1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        8, 512, 16,
    ),
    "llama-small": (
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192},
        8, 256, 16,
    ),
}  # fmt: skip
DEFAULT = {"cuda": "llama-1b", "cpu": "llama-small"}


def causal_model(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean over records of each record's own mean: no record's gradient knows another."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def floor_step(model: nn.Module) -> Callable[[Tensor], object]:
    embed = model.get_input_embeddings()  # type: ignore[operator]

    def run(tokens: Tensor) -> object:
        inputs = embed(tokens).detach().requires_grad_()
        return torch.autograd.grad(loss_of(model(inputs_embeds=inputs).logits, tokens), inputs)

    return run


def peft_step(model: nn.Module, r: int) -> Callable[[Tensor], object]:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS))
    trained = []
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora_B" in name)
        trained += [p] if p.requires_grad else []
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def run(tokens: Tensor) -> object:
        loss_of(adapted(input_ids=tokens).logits, tokens).backward()
        optimizer.step()
        return optimizer.zero_grad()

    return run


def private_step(model: nn.Module, r: int, records: Tensor, n: int) -> Callable[[Tensor], object]:
    ffa.convert(model, r=r, alpha=2 * r, target_modules=TARGETS)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    # Without Poisson sampling every batch has n records, as the others' have.
    model, optimizer, loader = ffa.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(records), batch_size=n),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )

    def batches() -> Iterator[Batch]:
        while True:
            yield from loader

    endless = batches()

    def run(_: Tensor) -> object:
        (tokens,) = next(endless)
        tokens = tokens.to(next(model.parameters()).device)
        loss_of(model(input_ids=tokens).logits, tokens).backward()
        optimizer.step()
        return optimizer.zero_grad()

    return run


def main() -> int:
    """Measures and prints; writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--model", choices=MODELS, default=None)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    chosen = parser.parse_args()
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = chosen.model or DEFAULT[device.type]
    sizes, n, length, r = MODELS[name]
    dtype = ops.DTYPE[device.type]
    records = torch.randint(sizes["vocab_size"], (8 * n, length))
    frozen = causal_model(sizes, device, dtype)
    # One set of weights: the adapted models have them in common.
    shared = {id(t): t for t in (*frozen.parameters(), *frozen.buffers())}
    others = [copy.deepcopy(frozen, dict(shared)) for _ in range(2)]
    steps = {
        "floor": floor_step(frozen),
        "peft, B alone": peft_step(others[0], r),
        "private": private_step(others[1], r, records, n),
    }
    tokens = records[:n].to(device)
    runs: ops.Runs = {
        key: (lambda i, step=step: step(tokens))  # type: ignore[misc]
        for key, step in steps.items()
    }
    rows = []
    for key, seconds in ops.interleaved(runs, device, chosen.repeats).items():
        rows.append(ops.summary(key, (n, length, r), seconds))
    floor = rows[0]["seconds"]
    print(f"{name} n={n} T={length} r={r} {dtype} on {ops.environment(device)['device']}")
    for row in rows:
        row["ratio_to_floor"] = row["seconds"] / floor
        print(f"{row['op']:<16}{row['seconds'] * 1e3:>10.2f} ms  spread {row['spread']:>4.0%}  "
              f"{row['ratio_to_floor']:.3f} of the floor")  # fmt: skip
    if chosen.json:
        result = {"environment": ops.environment(device), "model": name, "rows": rows}
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
