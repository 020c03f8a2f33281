"""Losses whose gradient for one record depends on no other record of the batch.

Clipping bounds what a record can change only if the record's gradient is its own. A loss divided
by a count taken from the batch (its tokens, its labels that are not ignored) breaks that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ffa_kernels.errors import ConfigError

_REDUCTIONS = ("mean", "sum", "none")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    per_record: str = "mean",
    divisor: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Next-token cross-entropy of each record by itself, then combined over records.

    Record i's own loss is, over the positions t whose label is not ignored,

        l_i = mean_t or (1 / divisor) sum_t  of  -log softmax(logits[i, t])[labels[i, t + 1]]

    `ForCausalLMLoss` of transformers divides by the number of such positions in the whole batch:
    there a longer record shrinks every other record's gradient. With "mean" and as many predicted
    tokens in each record, the two are equal.

    Args:
        logits: (n, T, vocabulary), floating point; reckoned in at least fp32.
        labels: int64 (n, T), the tokens themselves: they are shifted here, as in transformers.
        per_record: "mean", over the record's own tokens, or "sum", over `divisor`.
        divisor: with "sum", a fixed number: never one that is counted from a batch.
        reduction: over records: "mean", "sum", or "none". It is `loss_reduction` of `make_private`.
        ignore_index: the label of positions that are not predicted (padding, a prompt).

    Returns:
        A scalar, or (n,) with reduction "none". A record of which nothing is predicted has loss 0.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    _check_reduction(reduction)
    if per_record not in ("mean", "sum"):
        raise ConfigError(f"per_record is {per_record!r}; accepted: mean, sum")
    if isinstance(divisor, Tensor) or not 0 < divisor < float("inf"):
        raise ConfigError(f"divisor is {divisor!r}; accepted: a fixed positive number")
    if per_record == "mean" and divisor != 1.0:
        raise ConfigError(f'divisor is {divisor!r}; accepted: with per_record="sum" only')
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ConfigError(
            f"logits are {logits.dtype} {tuple(logits.shape)}; accepted: floating point "
            "(records, tokens, vocabulary)"
        )
    if labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; accepted: torch.int64 "
            f"{tuple(logits.shape[:2])}, a label for each token of the logits"
        )
    # The labels move and the logits stay: a slice of the logits would be copied to be flattened.
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].to(logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    losses = flat.view(targets.shape).sum(dim=1)
    if per_record == "mean":
        losses = losses / (targets != ignore_index).sum(dim=1).clamp(min=1)
    else:
        losses = losses / divisor
    return _reduced(losses, reduction)


def sequence_classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    problem_type: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of a sequence classifier, as transformers', for each record by itself.

    Args:
        logits: (n, classes).
        labels: int64 (n,) for one class each; floating (n, classes) for several classes or, with
            "regression", for values, (n,) too where there is one.
        problem_type: "regression" (mean squared error), "single_label_classification"
            (cross-entropy) or "multi_label_classification" (binary cross-entropy, mean over
            classes); None tells them apart as transformers does.
        reduction: over records: "mean", "sum" or "none".

    Returns:
        A scalar, or (n,) with reduction "none".

    Raises:
        ConfigError: an argument that is not accepted.
    """
    _check_reduction(reduction)
    if problem_type is not None and problem_type not in _PROBLEM_TYPES:
        raise ConfigError(
            f"problem_type is {problem_type!r}; accepted: None, {', '.join(_PROBLEM_TYPES)}"
        )
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ConfigError(
            f"logits are {logits.dtype} {tuple(logits.shape)}; accepted: floating point "
            "(records, classes)"
        )
    records, classes = logits.shape
    if problem_type is None:
        single = not labels.is_floating_point()
        problem_type = _PROBLEM_TYPES[0 if classes == 1 else 1 if single else 2]
    labels, logits = labels.to(logits.device), logits.float()
    one_class = problem_type == "single_label_classification"
    accepted = [(records,), (records, 1)] if one_class or classes == 1 else [(records, classes)]
    if tuple(labels.shape) not in accepted or (one_class and labels.dtype != torch.int64):
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; accepted for {problem_type} with "
            f"logits {tuple(logits.shape)}: {'torch.int64 ' if one_class else ''}"
            f"{' or '.join(map(str, accepted))}"
        )
    if one_class:
        losses = F.cross_entropy(logits, labels.view(records), reduction="none")
    else:
        measure = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
        losses = measure(logits, labels.view_as(logits).float(), reduction="none").mean(dim=1)
    return _reduced(losses, reduction)


def _check_reduction(reduction: object) -> None:
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; accepted: {', '.join(_REDUCTIONS)}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
