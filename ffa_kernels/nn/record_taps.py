"""Where the gradients of single records leave the graph.

A trained tensor of a private layer gets a *tap* in each batch: a leaf of shape (n, *shape),
zeros expanded from one element, that enters the layer's op as an input and whose gradient is
the tensor's gradient for each record. No module hook, no side effect in backward: it works the
same under `torch.compile` and both kinds of gradient checkpointing, and repeated calls add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import PrivacyError


class RecordTaps:
    """The taps of one layer, set by the privacy engine for each physical batch.

    Copies and pickles are empty: they belong to no engine, and train nothing.
    """

    __slots__ = (
        "cu_seqlens",
        "layer",
        "mean_loss",
        "narrowed",
        "norm_taps",
        "packed",
        "records",
        "taps",
        "used",
    )

    def __init__(self, layer: str, mean_loss: bool, records: int = 1) -> None:
        self.layer = layer
        self.mean_loss = mean_loss
        # Of a physical batch, as expected: the same for all.
        self.records = records
        self.taps: dict[str, Tensor] = {}
        # Beside a tap: what its op knows of the norms, and how often it was called.
        self.norm_taps: dict[str, Tensor] = {}
        self.cu_seqlens: Tensor | None = None
        # Whether the batch's rows came packed.
        self.packed = False
        # Whether a forward of the batch has come by, as far as it is not compiled.
        self.used = False
        # Whether one of them was under autocast.
        self.narrowed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordTaps:
        return RecordTaps(self.layer, self.mean_loss, self.records)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordTaps, (self.layer, self.mean_loss, self.records)

    def get(self, name: str, x: Tensor) -> Tensor:
        """The tap of the layer's tensor `name`, for an input x whose first dimension is n.

        Raises:
            PrivacyError: no batch is under way, or x's first dimension is not the record and
                `packed` does not say which rows are whose.
        """
        tap = self.taps.get(name)
        if not torch.compiler.is_compiling():
            self.used = True
            if torch._C._is_any_autocast_enabled():
                self.narrowed = torch.is_autocast_enabled(x.device.type)
        if tap is None:
            raise PrivacyError(
                f"layer {self.layer!r} is trained privately, but no batch is under way: iterate "
                "the loader that make_private returned, or call model.eval() or torch.no_grad() "
                "for a forward that trains nothing"
            )
        if self.cu_seqlens is None and self.packed:
            raise PrivacyError(
                f"layer {self.layer!r} had packed rows in this batch and is called outside the "
                "`packed` block now; accepted: every forward of the batch inside it, and backward "
                "too where checkpoints are recomputed"
            )
        if self.cu_seqlens is not None:
            if self.cu_seqlens.shape[0] != tap.shape[0] + 1:
                raise PrivacyError(
                    f"layer {self.layer!r}: cu_seqlens has {self.cu_seqlens.shape[0]} numbers; "
                    f"accepted: {tap.shape[0] + 1}, for the batch has {tap.shape[0]} records"
                )
            return tap
        # Of an embedding's indices one may be all there is of a record.
        if x.dim() < (2 if x.is_floating_point() else 1) or x.shape[0] != tap.shape[0]:
            raise PrivacyError(
                f"layer {self.layer!r} was given {tuple(x.shape)}, but the batch has "
                f"{tap.shape[0]} records: its first dimension must be the record (a model that "
                "flattens records and tokens into one would be clipped by token)"
            )
        return tap


def tapping(layer: torch.nn.Module, taps: RecordTaps | None) -> bool:
    """Whether a forward of `layer` now is one that trains privately."""
    return taps is not None and layer.training and torch.is_grad_enabled()


@contextmanager
def packed(model: nn.Module, cu_seqlens: Tensor) -> Iterator[None]:
    """Forwards inside take packed rows: record i is rows cu_seqlens[i] to cu_seqlens[i + 1] - 1.

    The record stays the unit of clipping. That the records do not see each other (attention over
    packed rows, say) is the model's part. Backward belongs inside as well where activations are
    checkpointed: it runs forwards again.

    Args:
        model: as given to `make_private`.
        cu_seqlens: int32 (n + 1,) for the n records of the batch.

    Raises:
        PrivacyError: a trained layer that is no adapter and knows no packed rows.
    """
    holders = [
        (name, layer, taps)
        for name, layer in model.named_modules()
        if isinstance(taps := getattr(layer, "record_taps", None), RecordTaps)
    ]
    for name, layer, _ in holders:
        if not getattr(layer, "takes_packed_rows", False):
            raise PrivacyError(
                f"layer {name!r} ({type(layer).__name__}) is trained and takes no packed rows; "
                "accepted: an adapted layer, or freeze it"
            )
    for _, _, taps in holders:
        # A checkpoint's first forward, without gradients, asks for no tap.
        taps.cu_seqlens, taps.packed = cu_seqlens, True
    try:
        yield
    finally:
        for _, _, taps in holders:
            taps.cu_seqlens = None
