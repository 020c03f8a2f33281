"""One private step walked with tensors that have shapes and no memory, each allocation counted.

The model's own forward, autograd's own backward and the engine's order of events run on fake
tensors; a dispatch mode sees every storage made and given back. Nothing is computed, so a walk
needs neither the weights nor the memory that it predicts.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffa_kernels.backends import cpu, reference
from ffa_kernels.backends.compose import by_way_of_u, plain_backward, plain_product
from ffa_kernels.backends.dispatch import backend_for
from ffa_kernels.backends.grid import zero_sums
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.privacy.engine import attach_taps
from ffa_kernels.privacy.step import Trained

PARTS = (
    "weights",
    "optimizer",
    "kept sums",
    "inputs",
    "activations",
    "per-sample gradients",
    "logits",
    "transients",
)
# Moments for each trained element.
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Walked:
    """Bytes at the moment of the step that has the most: all of them, and of each part."""

    peak: int
    parts: dict[str, int]


@dataclass
class _Storage:
    """One storage: what it is part of, its bytes, and when it lived."""

    part: str
    size: int
    born: int
    died: int | None = None
    reference: weakref.ref[Any] | None = None


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every living storage, and remembers when they were most.

    Args:
        device: "cpu" or "cuda": whose allocator rounds and whose backends serve.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.part = "transients"
        self.in_backward = False
        self.logits: int | None = None
        self.now = self.live = self.peak = self.peak_at = 0
        self._all: list[_Storage] = []
        self._living: dict[int, _Storage] = {}
        self._inside_op = False

    def add(self, tensor: Tensor, part: str | None = None) -> None:
        """Counts the tensor's storage until it dies; one that is counted may change its part."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._living.get(key)
        if known is not None:
            known.part = part or known.part
            return
        size = rounded(storage.nbytes(), self.device)
        if size == 0:
            return
        part = part or ("logits" if tensor.numel() == self.logits else self.part)
        made = _Storage(part, size, self.now)
        made.reference = weakref.ref(storage, lambda _: self._gone(key))
        self._all.append(made)
        self._living[key] = made
        self.live += size

    def _gone(self, key: int) -> None:
        storage = self._living.pop(key)
        storage.died, storage.reference = self.now, None
        self.live -= storage.size

    def look(self) -> None:
        """Takes what lives now for the peak, if it is more than before."""
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, self.now
        self.now += 1

    def move(self, old: str, new: str) -> None:
        """What lives of one part belongs to another."""
        for storage in self._living.values():
            if storage.part == old:
                storage.part = new

    def parts(self) -> dict[str, int]:
        """The bytes of each part at the peak."""
        found = dict.fromkeys(PARTS, 0)
        for s in self._all:
            if s.born <= self.peak_at and (s.died is None or s.died > self.peak_at):
                found[s.part] += s.size
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.look()
        if func.namespace == "ffa" and not self._inside_op:
            self._inside_op = True
            try:
                with self:
                    out = _served(self.device, func, args)
            finally:
                self._inside_op = False
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        # Autograd adds gradients up in place where it holds the last reference, but not under a
        # mode. Here the old one dies before the next call, and is looked at no more.
        if not (self.in_backward and func is torch.ops.aten.add.Tensor):
            self.look()
        return out


def rounded(nbytes: int, device: str) -> int:
    """What the device's allocator takes for a tensor of `nbytes`."""
    # CUDA's caching allocator hands out blocks of 512 bytes; PyTorch's on a CPU aligns to 64.
    unit = 512 if device == "cuda" else 64
    return -(-nbytes // unit) * unit


def _served(device: str, func: Any, args: tuple[Any, ...]) -> Any:
    """An op of this library as its backend allocates, on fake tensors."""
    name = func._schema.name.partition("::")[2]
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    floating = {t.dtype for t in tensors if t.is_floating_point()}
    wide = {torch.float64}
    narrow = tuple(floating - wide) or tuple(floating)
    backend = "triton" if device == "cuda" else backend_for(name, torch.device("cpu"), narrow)
    if backend == "reference":
        if name in ("linear", "linear_backward", "per_sample_grad", "per_sample_backward"):
            return getattr(reference, name)(*args)
        if name == "clip_accumulate":
            return _reference_clip(args[0], args[5])
        if name == "private_step":
            sums = zero_sums(args[4], args[11])
            _reference_clip(args[0], args[11])
            del sums
            return func(*args)
        return func(*args)
    if name == "per_sample_backward":
        # What keeps u to itself has it in a scratch; that it is padded there is not counted.
        parts = (torch.ops.ffa.per_sample_grad.default, torch.ops.ffa.linear_backward.default)
        per_record, input_gradient = (
            lambda *args, op=op: _served(device, op, args) for op in parts
        )
        return by_way_of_u(per_record, input_gradient)(*args)
    held: list[Tensor] = []
    if name in ("linear", "linear_backward"):
        x, weight, dropout_state = (args[k] for k in ((0, 1, 7) if name == "linear" else (0, 2, 5)))
        scale = (*args, None, None)[13 if name == "linear" else 8]
        if weight is not None and weight.dtype != x.dtype:
            one_kernel = backend == "cpu" and x.dtype == torch.float32
            one_kernel = one_kernel and cpu.multiplies(weight.dtype)
            if not (one_kernel and (scale is None or scale.dtype == x.dtype)):
                # W in x's dtype, for as long as its product takes.
                if name == "linear":
                    plain_product(x, weight, None, scale)
                else:
                    plain_backward(x, weight, scale)
            return func(*args)
        if backend == "cpu" and dropout_state is None:
            # PyTorch's own operators, and what they hold between them.
            return getattr(cpu, name)(*args)
    if name in ("per_sample_grad", "per_sample_clip"):
        held = [t.contiguous() for t in args[:2]]
    elif name == "clip_accumulate" or (name == "private_step" and backend == "cpu"):
        held = [t.contiguous() for t in args[0]]
    out = func(*args)
    del held
    return out


def _reference_clip(grads: list[Tensor], bounds: list[float]) -> Tensor:
    """`reference.clip_accumulate` with every record kept: which ones are, no fake tensor knows."""
    n = len(grads[0])
    rows = [g.reshape(n, math.prod(g.shape[1:])).double() for g in grads]
    norms = torch.stack([row.square().sum(dim=1) for row in rows])
    for grad in grads:
        records = grad.clone().double()
        scaled = records * norms[0].view(-1, *[1] * (grad.dim() - 1))
        scaled = scaled / 1.0
        scaled.trunc().long().sum(dim=0)
    return norms[: len(bounds)]


def fake_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """`model` with fake tensors for its own; call under a FakeTensorMode.

    Args:
        dtype: of the floating tensors that take no gradient; None for the model's own.
    """
    memo: dict[int, Any] = {}

    def fake(t: Tensor, castable: bool) -> Tensor:
        to = dtype if dtype is not None and castable and t.is_floating_point() else t.dtype
        return torch.empty_strided(t.shape, t.stride(), dtype=to, device="cpu")

    for p in model.parameters():
        memo[id(p)] = nn.Parameter(fake(p, not p.requires_grad), requires_grad=p.requires_grad)
    for module in model.modules():
        for b in module._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = fake(b, False)
        for value in vars(module).values():
            # Rotary embeddings keep a second copy of their frequencies as a plain attribute.
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = fake(value, False)
    # An adapter's copy gets this one in place of its own key.
    memo[id(Adapter._dropout_key)] = fake(Adapter._dropout_key, False)
    return copy.deepcopy(model, memo)


def walk(
    model: nn.Module,
    example: Mapping[str, Tensor],
    n: int,
    loss: Loss,
    *,
    device: str = "cpu",
    per_layer: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    vocabulary: int | None = None,
) -> Walked:
    """The peak of a private step with a physical batch of `n` records.

    The second step of a training is walked: sums and moments are there from the start.
    """
    counted = _Storages(device)
    with FakeTensorMode():
        fake = fake_copy(model, dtype)
        fake.train()
        if checkpointing:
            enable: Any = fake.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        named = {name: p for name, p in fake.named_parameters() if p.requires_grad}
        trained = attach_taps(fake, named, True, n)
        # Kept alive here, as the engine, the optimizer and the caller keep them.
        held = [zero_sums(list(named.values()), [1.0])]
        moments = [
            [torch.empty_like(p) for p in named.values()] for _ in range(OPTIMIZERS[optimizer])
        ]
        batch = {key: torch.empty((n, *t.shape[1:]), dtype=t.dtype) for key, t in example.items()}
        state = torch.zeros(5, dtype=torch.int64)
        for t in (*fake.parameters(), *fake.buffers()):
            counted.add(t, "weights")
        for part, tensors in (
            ("kept sums", held[0]),
            ("optimizer", [t for of in moments for t in of]),
            ("inputs", list(batch.values())),
        ):
            for t in tensors:
                counted.add(t, part)
        if vocabulary is not None:
            tokens = max(t.shape[1] for t in example.values() if t.dim() == 2)
            counted.logits = n * tokens * vocabulary
        with counted:
            taps = _tap(trained, n, counted, held[0], per_layer)
            counted.part = "transients"
            made = loss(fake, batch)
            # What is alive when forward is over was saved for backward.
            counted.move("transients", "activations")
            counted.in_backward = True
            made.backward()  # type: ignore[no-untyped-call]
            counted.in_backward = False
            del made
            _step(named, taps, moments, optimizer, state, per_layer)
        counted.look()
    return Walked(counted.peak, counted.parts())


def _tap(
    trained: list[Trained], n: int, counted: _Storages, sums: list[Tensor], per_layer: bool
) -> list[Tensor]:
    """Fresh taps, as `PrivateStep.begin` makes them; per layer, what arrives is clipped at once."""
    taps = []
    stats = torch.zeros(2, dtype=torch.int64)

    def arrived(tap: Tensor, total: Tensor) -> None:
        assert tap.grad is not None
        counted.add(tap.grad, "per-sample gradients")
        if per_layer:
            grad, tap.grad = tap.grad, None
            torch.ops.ffa.clip_accumulate([grad], [], [total], stats, None, [1.0])

    for t, total in zip(trained, sums, strict=True):
        tap = t.parameter.new_zeros(()).expand(n, *t.parameter.shape).detach().requires_grad_()
        tap.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda tap, total=total: arrived(tap, total)
        )
        norm_tap = None
        if all(name == "lora_B" for _, name in t.holders):
            norm_tap = torch.zeros((), dtype=torch.float64).expand(2, n).detach().requires_grad_()
        taps.append(tap)
        for record_taps, name in t.holders:
            record_taps.taps[name] = tap
            if norm_tap is not None:
                record_taps.norm_taps[name] = norm_tap
    return taps


def _step(
    named: dict[str, nn.Parameter],
    taps: list[Tensor],
    moments: list[list[Tensor]],
    optimizer: str,
    state: Tensor,
    per_layer: bool,
) -> None:
    """The end of a draw of one physical batch, the case with the most memory: see `PrivateStep`."""
    params = list(named.values())
    with torch.no_grad():
        hyper = torch.zeros(len(params), 5, dtype=torch.float64)
        stats = torch.zeros(2, dtype=torch.int64)
        counts = [torch.zeros(()) for _ in params]
        first, second = (*moments, [], [])[:2]
        kind = {"momentum": "sgd"}.get(optimizer, optimizer)
        if per_layer:
            return
        grads = [tap.grad for tap in taps if tap.grad is not None]
        torch.ops.ffa.private_step(
            grads,
            [],
            stats,
            None,
            params,
            first,
            second,
            counts,
            state,
            hyper,
            list(range(len(params))),
            [1.0],
            1.0,
            1.0,
            kind,
            False,
            False,
        )
