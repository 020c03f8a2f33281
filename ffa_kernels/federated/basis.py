"""Re-basis: the averaged B is folded into the base, W + s B A, and another A is drawn.

With one frozen A an update stays in A's row space. With `rebasis_every` = K basis k holds in
rounds k K + 1 to (k + 1) K. The message that opens basis k > 0, the global one of its first round,
carries in full the B that the basis before closed with: one for all sites, whatever their ranks,
and the same bytes for who asks again. So all ends fold what they read, with an A that each draws
from its recipe; no tensor is sent beyond a round's own, and of A not a byte.

W is not the same to the bit at all ends, for matrix products round differently. Ends tell each
other what it was made from: the first base, and each basis' A and closed B.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ffa_kernels.federated import wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config
from ffa_kernels.federated.wire import Fingerprint, Header
from ffa_kernels.nn import FFALinear, save_adapter
from ffa_kernels.nn.init import frozen_A


def basis_of(every: int, round_: int) -> int:
    """The number of the basis, from 0, that a round trains in; 0 always where `every` is."""
    return (round_ - 1) // every if every and round_ else 0


def opens(every: int, round_: int) -> bool:
    """Whether the message of a round opens a basis, and carries the B of the one before."""
    return basis_of(every, round_) > basis_of(every, round_ - 1)


class Bases:
    """The bases of a run as one end has followed them, from 0 on.

    Args:
        config: the federation's.
        model: as built, of any rank: nothing has been folded into it. It is not kept.

    Attributes:
        every: rounds of a basis.
        closed: of each basis that is over, its last B, fp32 and in full, by name.
        prints: of each basis, the last one under way; of the whole A, whatever a site has of it.
        like: the B, for shapes alone.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.every = config.federation.rebasis_every
        self._init, self._seed = config.model.init, config.federation.seed
        self._r = config.model.r
        layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, FFALinear)}
        self._forms = {n: (layer.in_features, layer.lora_A.dtype) for n, layer in layers.items()}
        self.like = {
            f"{n}.lora_B": torch.empty(layer.out_features, self._r, device="meta")
            for n, layer in layers.items()
        }
        # Folding takes two, one after the other.
        self.A = functools.lru_cache(maxsize=2)(self._draw)
        self.closed: list[dict[str, Tensor]] = []
        self.prints = [Fingerprint(wire.fingerprint(model).base, wire.digest(self.A(0)))]

    @staticmethod
    def of(config: Config, model: nn.Module) -> Bases | None:
        """None where one A holds throughout."""
        return Bases(config, model) if config.federation.rebasis_every else None

    def _draw(self, number: int) -> dict[str, Tensor]:
        """The A of a basis, (r, d_in) each, by name."""
        return {
            f"{name}.lora_A": frozen_A(
                self._init, self._seed, name, self._r, in_features, basis=number
            ).to(dtype)
            for name, (in_features, dtype) in self._forms.items()
        }

    @property
    def number(self) -> int:
        """Of the basis under way."""
        return len(self.closed)

    def close(self, B: Mapping[str, Tensor]) -> None:
        """Ends the basis under way with that B; the next one begins."""
        last = self.prints[-1]
        self.closed.append({name: B[name].clone() for name in self.like})
        text = f"{last.base} {last.recipe} {wire.digest(self.closed[-1])}"
        base = hashlib.sha256(text.encode()).hexdigest()
        self.prints.append(Fingerprint(base, wire.digest(self.A(self.number))))

    def opening(self, number: int, run: str, weights: str, codec: str) -> Header:
        """What the message that opens basis `number` says of itself: it is of the one before."""
        prints = self.prints[number - 1]
        first = number * self.every + 1
        return Header("global", run, first, "any", prints.base, prints.recipe, weights, codec)

    def fold(self, model: nn.Module, number: int, closed: Mapping[str, Tensor]) -> None:
        """Takes a model from basis `number` - 1, which ends with the B of `closed`, to `number`.

        A layer of less rank folds the whole B with the whole A, as all do, and goes on with the
        first rows of the next A.
        """
        for name in self.like:
            B = closed[name]
            layer = model.get_submodule(name.removesuffix(".lora_B"))
            assert isinstance(layer, FFALinear)
            key = name.replace("lora_B", "lora_A")
            closed_A, A = self.A(number - 1)[key], self.A(number)[key]
            layer.rebase(A[: layer.r], B, closed_A)


def save(config: Config, bases: Bases, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the run's model as one adapter in PEFT's files, for the base that it began with.

    The A of all bases stand one below the other and their B side by side: the rank is r times the
    number of bases, and alpha grows with it, so that the scaling s is the same.

    Args:
        tensors: the trained tensors of the basis under way.
    """
    steps = [*bases.closed, {name: tensors[name] for name in bases.like}]
    count, layers = len(steps), [name.removesuffix(".lora_B") for name in bases.like]
    wide = replace(
        config.model,
        r=count * config.model.r,
        alpha=count * config.model.alpha,
        # More rows than d_in cannot be orthonormal; all of them are written over.
        init="kaiming",
        # By their whole names: where lower layers are cached, these are of the whole model.
        target_modules=tuple(layers),
        cached_layers=0,
    )
    plain = replace(config.federation, rebasis_every=0)
    model, _ = build(replace(config, model=wide, federation=plain))
    stacked = _stacked(bases, layers, steps)
    stacked |= {name: t for name, t in tensors.items() if not wire.is_adapter(name)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stacked:
                parameter.copy_(stacked[name])
    save_adapter(model, folder)


def _stacked(
    bases: Bases, layers: Sequence[str], steps: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    A = [bases.A(number) for number in range(len(steps))]
    below = {f"{n}.lora_A": torch.cat([of_one[f"{n}.lora_A"] for of_one in A]) for n in layers}
    beside = {
        f"{n}.lora_B": torch.cat([of_one[f"{n}.lora_B"] for of_one in steps], dim=1) for n in layers
    }
    return below | beside
