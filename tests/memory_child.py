"""Private trainings whose memory is measured or limited, each in a process of its own.

`python memory_child.py measure MODEL` prints the peak of resident memory above what the process
has after its imports and a small training; `limit MODEL BYTES planned|unplanned` trains with
RLIMIT_DATA at so many bytes above that. Run with `ENVIRONMENT`.
"""

import gc
import json
import os
import resource
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import ffa_kernels as ffa
from ffa_kernels import memory
from ffa_kernels.federated.models import build_minilm_classifier
from ffa_kernels.memory.allocator import give_freed_memory_back
from ffa_kernels.memory.planning import loss_of

# One thread: two that spin on busy cores take several times as long, for the same memory.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 8}  # fmt: skip
LLAMA_SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
               "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}  # fmt: skip
# (class, its config, modules to adapt, modules to train whole, records, tokens)
MODELS = {
    # Of the package's own weights.
    "minilm": ("", {}, ["query", "key", "value"], ["classifier"], 32, 128),
    "bert": ("BertForSequenceClassification", BERT_SIZES, ["query", "key", "value", "dense"],
             [], 32, 128),
    "roberta": ("RobertaForSequenceClassification",
                {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
                 "num_attention_heads": 6, "max_position_embeddings": 514},
                ["query", "value"], ["classifier"], 16, 128),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 16384},
             ["c_attn"], [], 8, 128),
    "llama": ("LlamaForCausalLM", LLAMA_SIZES, LLAMA, [], 8, 128),
    "qwen2": ("Qwen2ForCausalLM",
              {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
               "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16384,
               "tie_word_embeddings": True}, LLAMA, [], 8, 128),
    "vit": ("ViTForImageClassification",
            {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
             "num_attention_heads": 6}, ["q_proj", "v_proj"], ["classifier"], 16, 0),
}  # fmt: skip


def build(name, **smaller):
    """The converted model; `smaller` replaces values of its config."""
    import transformers

    cls, sizes, targets, saved, _, _ = MODELS[name]
    if name == "minilm":
        model, _ = build_minilm_classifier(2)
        model.config = model.encoder.config
    else:
        made = getattr(transformers, cls)
        model = made(made.config_class(**{**sizes, **smaller}))
    return ffa.convert(model, r=8, target_modules=targets, modules_to_save=saved, init="kaiming")


class Records(Dataset):
    """Random records as the model takes them; of text, every other one is padded by half."""

    def __init__(self, model, tokens):
        self.model, self.tokens = type(model).__name__, tokens
        self.vocabulary = getattr(model.config, "vocab_size", 0)

    def __len__(self):
        return 256

    def __getitem__(self, i):
        if "Image" in self.model:
            return {"pixel_values": torch.randn(3, 224, 224), "labels": torch.tensor(i % 2)}
        ids = torch.randint(2, self.vocabulary, (self.tokens,))
        mask = torch.ones(self.tokens, dtype=torch.int64)
        mask[self.tokens // (1 + i % 2) :] = 0
        causal = self.model.endswith(("ForCausalLM", "LMHeadModel"))
        labels = ids.masked_fill(mask == 0, -100) if causal else torch.tensor(i % 2)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model, n, tokens, loss, steps=2, **options):
    """Private steps on batches of n records; without Poisson sampling all have that size."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = DataLoader(Records(model, tokens), batch_size=n)
    model.train()
    model, optimizer, loader = ffa.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0,
        max_grad_norm=1.0, poisson_sampling=False, **options,
    )  # fmt: skip
    for batch in loader:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.private_step.steps == steps:
            return


def warm_up(name):
    """What stays for good: code, and buffers that the matrix library keeps for products."""
    small = {"num_hidden_layers": 1, "n_layer": 1}
    model = build(name, **{k: v for k, v in small.items() if k in MODELS[name][1]})
    train(model, 2, 16, loss_of(False))
    square = torch.randn(1024, 1024)
    (square @ square).sum()
    del model, square
    gc.collect()


def status(key):
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(name, **options):
    """The peak of two steps, above what was there before the model."""
    n, tokens = MODELS[name][4:]
    give_freed_memory_back()
    warm_up(name)
    before = status("VmRSS")
    # Linux forgets the old peak.
    Path("/proc/self/clear_refs").write_text("5")
    train(build(name), n, tokens, loss_of(False), **options)
    return status("VmHWM") - before


def limited(name, limit, planned):
    """Trains below the limit, or fails by it."""
    n, tokens = MODELS[name][4:]
    warm_up(name)
    if planned:
        # What a walk imports is no part of the training.
        memory.plan(build(name, num_hidden_layers=1), memory="8GiB", batch_size=1, tokens=16)
        gc.collect()
    room = status("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    model = build(name)
    if not planned:
        train(model, n, tokens, loss_of(False))
        return {}
    fitted = memory.fit_to_memory(model, memory=limit, batch_size=n, tokens=tokens)
    train(model, n, tokens, fitted.loss, **fitted.make_private)
    return {**fitted.make_private, "checkpointing": fitted.plan.checkpointing,
            "chunked_loss": fitted.plan.chunked_loss, "peak": fitted.plan.peak}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1] == "measure":
        print(json.dumps(measure(sys.argv[2], clipping=(sys.argv[3:] or ["flat"])[0])))
    else:
        print(json.dumps(limited(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "planned")))
