"""Losses whose gradient for one record depends on no other record of the batch.

Clipping bounds what a record can change only if the record's gradient is its own. A loss divided
by a count taken from the batch (its tokens, its labels that are not ignored) breaks that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffa_kernels.backends.compose import base_product
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
    _check_causal(per_record, divisor, reduction)
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ConfigError(
            f"logits are {logits.dtype} {tuple(logits.shape)}; accepted: floating point "
            "(records, tokens, vocabulary)"
        )
    _check_labels(labels, logits, "logits")
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


def chunked_causal_lm_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk_elements: int = 1 << 22,
    per_record: str = "mean",
    divisor: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """`causal_lm_loss(hidden W^T + b, labels)` that never holds the logits of a whole batch.

    Logits are made, used for the loss and for dL/dhidden, and dropped, a chunk of tokens at a
    time: both are ready when forward is over, and no product is made twice. What is kept for
    backward has the size of `hidden`, where the logits and what cross-entropy keeps of them are
    vocabulary / d as large. A private model that is called by its parts for this is not probed by
    itself: `PrivacyEngine.check_loss` does it.

    Args:
        hidden: (n, T, d), what the head is given.
        head_weight: (vocabulary, d) of hidden's dtype, frozen: the input embedding's own weight,
            say, where the two are tied.
        labels: int64 (n, T), the tokens themselves, as `causal_lm_loss` has them.
        head_bias: (vocabulary,), frozen, or None.
        chunk_elements: logits to hold at a time, as many tokens' as fit and at least one token's.
        per_record, divisor, reduction, ignore_index: as in `causal_lm_loss`.

    Returns:
        A scalar, or (n,) with reduction "none".

    Raises:
        ConfigError: an argument that is not accepted, a head that is trained among them: its
            gradient for each record would be lost here.
    """
    _check_causal(per_record, divisor, reduction)
    if not isinstance(chunk_elements, int) or chunk_elements < 1:
        raise ConfigError(
            f"chunk_elements is {chunk_elements!r}; accepted: an integer of 1 or more"
        )
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ConfigError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}; accepted: floating point "
            "(records, tokens, width)"
        )
    _check_labels(labels, hidden, "hidden states")
    width = hidden.shape[-1]
    if head_weight.dim() != 2 or head_weight.shape[1] != width or head_weight.dtype != hidden.dtype:
        raise ConfigError(
            f"head_weight is {head_weight.dtype} {tuple(head_weight.shape)}; accepted: "
            f"{hidden.dtype} (vocabulary, {width}), as hidden has it"
        )
    vocabulary = head_weight.shape[0]
    if head_bias is not None and (
        tuple(head_bias.shape) != (vocabulary,) or head_bias.dtype != hidden.dtype
    ):
        raise ConfigError(
            f"head_bias is {head_bias.dtype} {tuple(head_bias.shape)}; accepted: None or "
            f"{hidden.dtype} ({vocabulary},)"
        )
    for name, tensor in (("head_weight", head_weight), ("head_bias", head_bias)):
        if tensor is not None and tensor.requires_grad:
            raise ConfigError(
                f"{name} is trained; accepted: a frozen head, or causal_lm_loss, whose logits lead "
                "back to the head"
            )
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].to(hidden.device)
    predicted = targets != ignore_index
    if per_record == "mean":
        scale = 1.0 / predicted.sum(dim=1).clamp(min=1).double()
    else:
        scale = hidden.new_full((len(targets),), 1.0 / divisor, dtype=torch.float64)
    losses: Any = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, head_bias, targets, predicted, scale, chunk_elements
    )
    return _reduced(losses, reduction)


class _ChunkedLoss(torch.autograd.Function):
    """(n,) losses l_i = scale_i sum_t of the predicted tokens, and dl_i/dhidden beside them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        predicted: Tensor,
        scale: Tensor,
        chunk_elements: int,
    ) -> Tensor:
        rows = hidden.reshape(math.prod(hidden.shape[:2]), hidden.shape[2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # A label that is not predicted may be no index at all.
        index = targets.masked_fill(~predicted, 0).reshape(-1, 1)
        factor = (predicted * scale.unsqueeze(1)).reshape(-1, 1).to(wide)
        losses = rows.new_empty((len(rows), 1), dtype=wide)
        grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        step = max(1, chunk_elements // weight.shape[0])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = base_product(rows[part], weight, bias).to(wide)
            # In place all along: logsumexp would make a second chunk of its own.
            logits.sub_(logits.amax(dim=1, keepdim=True))
            chosen = logits.gather(1, index[part])
            total = logits.exp_().sum(dim=1, keepdim=True)
            losses[part] = total.log() - chosen
            if grad is not None:
                # softmax - onehot, in the place of the logits.
                logits.div_(total).scatter_add_(1, index[part], -torch.ones_like(total))
                grad[part] = base_product(logits.mul_(factor[part]).to(rows.dtype), weight.t())
            del logits
        if grad is not None:
            ctx.save_for_backward(grad.view(hidden.shape))
        # Selected, for the loss of a token that is not predicted may be no number.
        kept = torch.where(predicted, losses.view(targets.shape), losses.new_zeros(()))
        return kept.sum(dim=1) * scale.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype).view(-1, 1, 1), *(None,) * 6


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


def _check_causal(per_record: object, divisor: object, reduction: object) -> None:
    _check_reduction(reduction)
    if per_record not in ("mean", "sum"):
        raise ConfigError(f"per_record is {per_record!r}; accepted: mean, sum")
    if not isinstance(divisor, (int, float)) or not 0 < divisor < float("inf"):
        raise ConfigError(f"divisor is {divisor!r}; accepted: a fixed positive number")
    if per_record == "mean" and divisor != 1.0:
        raise ConfigError(f'divisor is {divisor!r}; accepted: with per_record="sum" only')


def _check_labels(labels: Tensor, of: Tensor, what: str) -> None:
    if labels.shape != of.shape[:2] or labels.dtype != torch.int64:
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; accepted: torch.int64 "
            f"{tuple(of.shape[:2])}, a label for each token of the {what}"
        )


def _check_reduction(reduction: object) -> None:
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; accepted: {', '.join(_REDUCTIONS)}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
