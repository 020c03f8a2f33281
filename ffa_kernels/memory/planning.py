"""Chooses how to train privately within a memory limit, from walks of the step itself.

Ways come in the order of the time that they cost: a smaller physical batch, a loss that never has
the logits whole, clipping per layer, gradient checkpointing, all that is frozen in bfloat16. Those
that change what is released (clipping per layer) or the numbers (bfloat16) are taken only where the
caller allows them, and only where none of the ways before them would do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.losses import (
    causal_lm_loss,
    chunked_causal_lm_loss,
    sequence_classification_loss,
)
from ffa_kernels.memory.allocator import give_freed_memory_back
from ffa_kernels.memory.walk import OPTIMIZERS, Loss, Walked, walk
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.product import is_linear

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
WAYS = ("checkpointing", "chunked_loss", "per_layer", "bfloat16")
# What they release is the same with them as without.
SAFE_WAYS = ("checkpointing", "chunked_loss")
# Of a causal model's logits before the loss; a chunked loss would leave it out.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale")


@dataclass(frozen=True)
class MemoryPlan:
    """Settings of a private training and the memory that they take at its peak, in bytes.

    `memory`, `peak` and `parts` count what comes on top of the process as it is after its imports
    (on a GPU: after its context). `parts` add up to `peak`.

    Attributes:
        memory: the limit that was asked for.
        peak: predicted; at most `memory` less the margin.
        parts: bytes at the moment of the peak, by what they are for.
        max_physical_batch_size: as in `make_private`.
        clipping: as in `make_private`.
        checkpointing: whether gradient checkpointing is on.
        chunked_loss: whether the loss is `chunked_causal_lm_loss`.
        frozen_dtype: "bfloat16", which all that is frozen is cast to, and activations with it; or
            None for what they are.
        batch_size, device, optimizer: as they were given.
    """

    memory: int
    peak: int
    parts: Mapping[str, int]
    max_physical_batch_size: int
    clipping: str
    checkpointing: bool
    chunked_loss: bool
    frozen_dtype: str | None
    batch_size: int
    device: str
    optimizer: str

    def __str__(self) -> str:
        rows = [(name, size) for name, size in self.parts.items() if size]
        lines = [f"{name:<24}{_mib(size):>12}" for name, size in rows]
        lines += [f"{'peak':<24}{_mib(self.peak):>12}", f"{'limit':<24}{_mib(self.memory):>12}", ""]
        pieces = math.ceil(self.batch_size / self.max_physical_batch_size)
        settings = {
            "max_physical_batch_size": f"{self.max_physical_batch_size} ({pieces} for a batch of "
            f"{self.batch_size})",
            "clipping": self.clipping,
            "gradient checkpointing": "on" if self.checkpointing else "off",
            "loss": "chunked_causal_lm_loss" if self.chunked_loss else "on whole logits",
            "frozen weights": self.frozen_dtype or "as they are",
            "optimizer": self.optimizer,
            "device": self.device
            + (": its allocator's blocks, not measured on one" if self.device == "cuda" else ""),
        }
        return "\n".join(lines + [f"{name:<24}{value}" for name, value in settings.items()])


@dataclass(frozen=True)
class Fitted:
    """A model that was prepared for a plan, and what to train it with.

    Attributes:
        plan: the plan.
        make_private: keyword arguments for `PrivacyEngine.make_private`.
        loss: (model, batch) to the loss, whose reduction over records is the mean.
    """

    plan: MemoryPlan
    make_private: dict[str, Any]
    loss: Loss


@dataclass(frozen=True)
class _Way:
    checkpointing: bool = False
    chunked: bool = False
    per_layer: bool = False
    bfloat16: bool = False


def parse_memory(memory: object, argument: str = "memory") -> int:
    """Bytes of `4GiB`, `500MB`, or an integer of them.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower())
    if isinstance(memory, str) and found and found[2] in _UNITS:
        size = float(found[1]) * _UNITS[found[2]]
        if 1 <= size < math.inf:
            return int(size)
    raise ConfigError(
        f"{argument} is {shown(memory)}; accepted: a positive number of bytes, or one with a unit "
        "such as 500MB, 4GiB"
    )


def plan(
    model: nn.Module,
    *,
    memory: int | str,
    batch_size: int = 32,
    tokens: int = 128,
    example: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    device: str = "cpu",
    optimizer: str = "adamw",
    clipping: str = "flat",
    allow: Sequence[str] = SAFE_WAYS,
    margin: float = 0.1,
) -> MemoryPlan:
    """Settings with which the private training of `model` fits into `memory`.

    The step is walked without computing anything: the model may be on the meta device, and is
    left as it is.

    Args:
        model: a converted model; in training form, with all that is trained requiring a gradient.
        memory: bytes, or a string such as "4GiB" or "500MB"; on top of the process as it is after
            its imports, and with the model's weights counted in.
        batch_size: records in a draw, as the data loader has it.
        tokens: the longest record, for an `example` that is made here.
        example: a batch, one record or more, as the model gets it with its "labels"; None for one
            that follows from the model's config.
        loss: (model, batch) to a scalar; None for this library's loss for causal language models
            or sequence classifiers, on the model's `.logits`.
        device: "cpu" or "cuda".
        optimizer: "sgd", "momentum", "adam" or "adamw".
        clipping: "flat" or "per_layer", as in `make_private`.
        allow: what may be used beside a smaller physical batch: "checkpointing" and
            "chunked_loss", which cost time alone; "per_layer", which is another mechanism, and
            "bfloat16", frozen tensors and activations of other numbers.
        margin: the share of `memory` that is left free, for what no walk can know.

    Raises:
        ConfigError: an argument that is not accepted, or a limit that nothing allowed can keep;
            it says what the least is.
    """
    limit = parse_memory(memory)
    _check(model, batch_size, tokens, device, optimizer, clipping, allow, margin)
    example = dict(example) if example is not None else example_of(model, tokens)
    chunked = "chunked_loss" in allow and loss is None and _head(model) is not None
    room = int(limit * (1 - margin))
    least: tuple[int, _Way] | None = None
    for way in _ways(model, allow, clipping, chunked):
        run = _walker(model, example, loss, device, optimizer, way)
        found = _largest(run, batch_size, room)
        if isinstance(found, Walked):
            if least is None or found.peak < least[0]:
                least = (found.peak, way)
            continue
        n, walked = found
        return MemoryPlan(
            memory=limit,
            peak=walked.peak,
            parts=walked.parts,
            max_physical_batch_size=n,
            clipping="per_layer" if way.per_layer else "flat",
            checkpointing=way.checkpointing,
            chunked_loss=way.chunked,
            frozen_dtype="bfloat16" if way.bfloat16 else None,
            batch_size=batch_size,
            device=device,
            optimizer=optimizer,
        )
    assert least is not None
    needed = math.ceil(least[0] / (1 - margin) / 2**20)
    used = ", ".join(allow) or "nothing"
    raise ConfigError(
        f"memory is {memory!r}, which is too little; accepted: {needed}MiB or more, the least that "
        f"one record at a time takes where {used} is allowed (allow= takes {', '.join(WAYS)})"
    )


def fit_to_memory(model: nn.Module, *, memory: int | str, **options: Any) -> Fitted:
    """Makes the plan, and prepares `model` for it: call it before the optimizer is made.

    Gradient checkpointing is switched on and frozen tensors are cast where the plan says so. On a
    CPU, this process' C library is told to give freed memory back, without which it may hold half
    as much again. Give `.make_private` to `PrivacyEngine.make_private` and train with `.loss`.

    Args:
        model, memory, options: as in `plan`.

    Raises:
        ConfigError: see `plan`; or a model whose logits are more than its head's product, where
            a chunked loss was chosen. The model is then unchanged.
    """
    made = plan(model, memory=memory, **options)
    loss: Loss | None = options.get("loss")
    if made.chunked_loss:
        _check_head(model)
    if loss is None:
        loss = loss_of(made.chunked_loss)
    if made.frozen_dtype is not None:
        dtype = getattr(torch, made.frozen_dtype)
        for p in model.parameters():
            if not p.requires_grad and p.is_floating_point():
                p.data = p.data.to(dtype)
    if made.checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        # The reentrant kind needs an input that requires a gradient; the first layers have none.
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if made.device == "cpu":
        give_freed_memory_back()
    arguments = {
        "max_physical_batch_size": made.max_physical_batch_size,
        "clipping": made.clipping,
        "loss_reduction": "mean",
        # A draw that exceeds the batch size is cut evenly: padded, it would take twice the time.
        "pad_physical_batches": False,
    }
    return Fitted(made, arguments, loss)


def _check(
    model: object,
    batch_size: object,
    tokens: object,
    device: object,
    optimizer: object,
    clipping: object,
    allow: object,
    margin: object,
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}; accepted: torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model trains nothing; accepted: a model after convert()")
    for name, value in (("batch_size", batch_size), ("tokens", tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; accepted: an integer of 1 or more")
    for name, value, accepted in (
        ("device", device, ("cpu", "cuda")),
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ("clipping", clipping, ("flat", "per_layer")),
    ):
        if value not in accepted:
            raise ConfigError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if isinstance(allow, str) or not isinstance(allow, Sequence) or not set(allow) <= set(WAYS):
        raise ConfigError(f"allow is {allow!r}; accepted: a list of {', '.join(WAYS)}")
    if not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ConfigError(f"margin is {margin!r}; accepted: 0 <= margin < 1")


def _ways(model: nn.Module, allow: Sequence[str], clipping: str, chunked: bool) -> Iterator[_Way]:
    """All that is allowed, in the order in which it is to be preferred."""
    checkpoints = [False]
    if "checkpointing" in allow and getattr(model, "supports_gradient_checkpointing", False):
        checkpoints.append(True)
    layered = [clipping == "per_layer"]
    if "per_layer" in allow and clipping == "flat":
        layered.append(True)
    narrow = [False]
    if "bfloat16" in allow and _castable(model):
        narrow.append(True)
    for bfloat16 in narrow:
        for checkpointing in checkpoints:
            for per_layer in layered:
                for chunks in (False, True) if chunked else (False,):
                    yield _Way(checkpointing, chunks, per_layer, bfloat16)


def _castable(model: nn.Module) -> bool:
    """Whether the frozen tensors can be narrowed: what is trained beside adapters cannot follow."""
    own = {id(m.trained_B()) for m in model.modules() if isinstance(m, Adapter)}
    return all(id(p) in own for p in model.parameters() if p.requires_grad)


def _largest(
    run: Callable[[int], Walked], batch_size: int, room: int
) -> tuple[int, Walked] | Walked:
    """The largest physical batch that fits and its walk, or the walk of one record if none does."""
    low, best = 1, run(1)
    if best.peak > room:
        return best
    high, walked = batch_size, run(batch_size)
    if walked.peak <= room:
        return batch_size, walked
    above = walked.peak
    # The peak is the largest of several affine functions of n, so convex: what a chord says is
    # never too little, and each chord comes closer.
    while high - low > 1:
        share = (room - best.peak) / (above - best.peak)
        n = min(max(low + int(share * (high - low)), low + 1), high - 1)
        walked = run(n)
        if walked.peak > room:
            high, above = n, walked.peak
            continue
        gained, low, best = n - low, n, walked
        if gained * 20 < low:
            break
    pieces = math.ceil(batch_size / low)
    even = math.ceil(batch_size / pieces)
    return (low, best) if even == low else (even, run(even))


def _walker(
    model: nn.Module,
    example: Mapping[str, Tensor],
    loss: Loss | None,
    device: str,
    optimizer: str,
    way: _Way,
) -> Callable[[int], Walked]:
    head = _head(model)
    loss = loss or loss_of(way.chunked)

    def run(n: int) -> Walked:
        return walk(
            model,
            example,
            n,
            loss,
            device=device,
            per_layer=way.per_layer,
            optimizer=optimizer,
            checkpointing=way.checkpointing,
            dtype=torch.bfloat16 if way.bfloat16 else None,
            vocabulary=None if head is None else head.shape[0],
        )

    return run


def _head(model: Any) -> Tensor | None:
    """The frozen weight (vocabulary, d) of a causal language model's head, if it has a plain one.

    None too where the model changes the logits that the head makes.
    """
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return None
    if not _is_causal(model):
        return None
    head = model.get_output_embeddings()
    if not is_linear(head) or any(p.requires_grad for p in head.parameters()):
        return None
    weight: Tensor = head.weight
    return weight


def _is_causal(model: nn.Module) -> bool:
    # GPT-2's class has another name than its kind.
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def loss_of(chunked: bool) -> Loss:
    """This library's losses on what a transformers model makes of a batch."""

    def whole(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        if _is_causal(model):
            return causal_lm_loss(logits, batch["labels"])
        if logits.dim() != 2:
            # Of tokens, say: to shift their labels would train something else.
            raise ConfigError(
                f"loss is None, and the logits of {type(model).__name__} are "
                f"{tuple(logits.shape)}; accepted: a causal language model, logits (records, "
                "classes), or a loss"
            )
        return sequence_classification_loss(logits, batch["labels"])

    def in_chunks(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        hidden = model.base_model(**inputs, use_cache=False)[0]
        head = model.get_output_embeddings()
        return chunked_causal_lm_loss(hidden, head.weight, batch["labels"], head_bias=head.bias)

    return in_chunks if chunked else whole


def _check_head(model: Any) -> None:
    """Raises ConfigError unless the logits are the head's product with the last hidden state."""
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(2, device=device).view(1, 2)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
            same = model.get_output_embeddings()(hidden)
    finally:
        model.train(was_training)
    if not torch.allclose(logits.float(), same.float(), rtol=1e-3, atol=1e-5):
        raise ConfigError(
            "model: its logits are more than its head's product with the last hidden state, which "
            "a chunked loss cannot know; accepted: allow= without chunked_loss"
        )


def example_of(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """A batch of one record, of the shapes that the model's config asks for; no values in it.

    Raises:
        ConfigError: the config does not say what the model takes.
    """
    config: Any = getattr(model, "config", None)
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if size is not None and channels is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.empty(1, channels, height, width, device="meta")
        return {"pixel_values": pixels, "labels": _integers(1)}
    if getattr(config, "vocab_size", None) is None:
        raise ConfigError(
            f"example is None, and {type(model).__name__} has no config that says what it takes; "
            "accepted: a batch as the model gets it, with its labels"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens > longest:
        raise ConfigError(f"tokens is {tokens}; accepted: at most {longest}, the model's positions")
    causal = _is_causal(model)
    return {
        "input_ids": _integers(1, tokens),
        "attention_mask": _integers(1, tokens),
        "labels": _integers(1, tokens) if causal else _integers(1),
    }


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
