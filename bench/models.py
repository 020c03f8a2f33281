"""The models whose private steps are measured, and their records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

QV_ROBERTA, QV_LLAMA = ("query", "value"), ("q_proj", "v_proj")
ALL_ROBERTA = ("query", "key", "value", "attention.output.dense", "intermediate.dense",
               "output.dense")  # fmt: skip
ALL_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setting:
    """A model with its adapters and its batch.

    Attributes:
        build: gives the frozen model, in training mode and without dropout.
        causal: whether it predicts tokens; else it labels records.
        n, length, r: records of a batch, tokens of each, rank.
        layers: endings of the names of the adapted layers.
        embedding: where the floor's gradient ends, by name.
    """

    name: str
    build: Callable[[], nn.Module]
    causal: bool
    n: int
    length: int
    r: int
    layers: tuple[str, ...]
    embedding: str

    def targets(self, model: nn.Module) -> list[str]:
        """The adapted layers' whole names: no head and no pooler is one of them."""
        return [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
            and "layer" in name
            and any(name.endswith(f".{ending}") for ending in self.layers)
        ]

    def records(self, batches: int = 256) -> tuple[Tensor, Tensor]:
        """(tokens (N, T), labels (N,)) of so many batches, random: more than are timed, for at an
        epoch's end this library reads every frozen weight again."""
        torch.manual_seed(1)
        count = batches * self.n
        return torch.randint(5, 8000, (count, self.length)), torch.randint(2, (count,))

    def logits(self, model: nn.Module, tokens: Tensor | None, **inputs: Tensor) -> Tensor:
        if tokens is not None:
            inputs["input_ids"] = tokens
        output: Tensor = model(**inputs).logits
        return output

    def flat(self, logits: Tensor, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of single predictions, a record's side by side."""
        if not self.causal:
            return logits, labels
        return logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def loss(self, logits: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean over records of each record's own mean: no record's gradient knows another."""
        return nn.functional.cross_entropy(*self.flat(logits, tokens, labels))


def sharing(model: nn.Module) -> nn.Module:
    """A copy that has the weights in common with `model`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))


def _still(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.requires_grad_(False).train()


@cache
def roberta(width: int, layers: int, heads: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, vocab_size=8192, max_position_embeddings=2100, num_labels=2,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return _still(RobertaForSequenceClassification(config))


@cache
def llama(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocabulary,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return _still(LlamaForCausalLM(config))


@cache
def minilm() -> nn.Module:
    from ffa_kernels.federated.models import build_minilm_classifier

    return _still(build_minilm_classifier(2)[0])


@cache
def smollm2() -> nn.Module:
    import smollm2 as example

    return _still(example.load_model()[0])


ROBERTA_EMBEDDING = "roberta.embeddings.word_embeddings"
SMALL_ROBERTA = (384, 6, 12)
SMALL_LLAMA = (512, 1408, 4, 8, 8, 8192)
CPU = [
    Setting("RoBERTa-like 384 x 6, q/v", lambda: roberta(*SMALL_ROBERTA), False, 16, 128, 8,
            QV_ROBERTA, ROBERTA_EMBEDDING),
    Setting("RoBERTa-like 384 x 6, all", lambda: roberta(*SMALL_ROBERTA), False, 16, 128, 16,
            ALL_ROBERTA, ROBERTA_EMBEDDING),
    Setting("Llama-like 512 x 4, q/v", lambda: llama(*SMALL_LLAMA), True, 8, 256, 8, QV_LLAMA,
            "model.embed_tokens"),
    Setting("Llama-like 512 x 4, all", lambda: llama(*SMALL_LLAMA), True, 8, 256, 16, ALL_LLAMA,
            "model.embed_tokens"),
    Setting("MiniLM-L6, q/v, small", minilm, False, 4, 32, 8, QV_ROBERTA,
            "encoder.embeddings.word_embeddings"),
    Setting("SmolLM2-135M, q/v", smollm2, True, 4, 64, 8, QV_LLAMA, "model.embed_tokens"),
]  # fmt: skip
GPU = [
    Setting("RoBERTa-large, all", lambda: roberta(1024, 24, 16), False, 32, 128, 16, ALL_ROBERTA,
            ROBERTA_EMBEDDING),
    Setting("Llama 1B, all", lambda: llama(2048, 8192, 16, 32, 8, 128256), True, 8, 512, 16,
            ALL_LLAMA, "model.embed_tokens"),
]  # fmt: skip
# What the quick suite has: on the slower of the processors here it is to end in five minutes.
QUICK = {"RoBERTa-like 384 x 6, all", "MiniLM-L6, q/v, small"}


def settings(device: torch.device, suite: str) -> list[Setting]:
    if device.type == "cuda":
        return GPU
    return [s for s in CPU if suite == "full" or s.name in QUICK]
