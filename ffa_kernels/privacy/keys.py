"""Secret keys for noise, sampling and dropout: one stream a purpose, never shared, never stored.

A stream is a 256-bit ChaCha20 key from the operating system's entropy and a step that only
grows. A fork, a copy or an unpickling draws a new key, so no counter is met twice under one key.
"""

from __future__ import annotations

import hashlib
import operator
import os
import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffa_kernels.errors import ConfigError


class SecretStream:
    """A key and a step, as the `rng_state` that `ops.chacha20` describes.

    Args:
        purpose: what is drawn from it, "noise" say.
        seed: None draws the key from the operating system. An integer derives it instead: a test
            then repeats, and nothing drawn is private.

    Attributes:
        state: int64 (5,), changed in place.
        lock: held from reading the step until it has counted on: threads may share a stream.
    """

    def __init__(self, purpose: str, seed: int | None = None) -> None:
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise ConfigError(f"seed is {seed!r}; accepted: None, or an integer of 0 or more")
        self.purpose, self.seed = purpose, seed
        self.state: Tensor = torch.zeros(5, dtype=torch.int64)
        self.lock = threading.Lock()
        self.renew()
        _streams.add(self)

    def renew(self) -> None:
        """Draws a new key and starts at step 0; a seeded stream starts again instead."""
        if self.seed is None:
            key = os.urandom(32)
        else:
            key = hashlib.sha256(f"ffa_kernels test\0{self.purpose}\0{self.seed}".encode()).digest()
        words = [int.from_bytes(key[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
        self.state.copy_(torch.tensor([*words, 0]))

    def __deepcopy__(self, memo: dict[int, Any]) -> SecretStream:
        return SecretStream(self.purpose, self.seed)

    def __reduce__(self) -> tuple[Any, ...]:
        return SecretStream, (self.purpose, self.seed)


_streams: weakref.WeakSet[SecretStream] = weakref.WeakSet()


def _renew_after_fork() -> None:
    global _seeding
    _seeding = threading.Lock()
    for stream in list(_streams):
        # Whoever held it is not in this process.
        stream.lock = threading.Lock()
        if stream.seed is None:
            stream.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, the CPU generators of Python, NumPy and PyTorch go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def forget_seeds() -> None:
    """Seeds the generators of Python, NumPy and PyTorch from the operating system."""
    global _secret_seeds
    random.seed()
    np.random.seed()
    with _seeding:
        torch.seed()
        _secret_seeds = _seeds()


# PyTorch's, as `forget_seeds` left them.
_secret_seeds: tuple[int, ...] | None = None
_seeding = threading.Lock()


def _seeds() -> tuple[int, ...]:
    return (torch.initial_seed(), *((torch.cuda.initial_seed(),) if _uses_gpu() else ()))


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seeds_are_secret() -> bool:
    """Whether nobody has seeded PyTorch's generators since `forget_seeds`."""
    # A GPU that has come into use since was seeded like the host.
    return _secret_seeds is not None and all(map(operator.eq, _seeds(), _secret_seeds))


def drawn_since_seeding() -> bool:
    """Whether PyTorch's generators have drawn anything since they were seeded last."""
    host = torch.Generator().manual_seed(torch.initial_seed())
    moved = not torch.equal(host.get_state(), torch.get_rng_state())
    if _uses_gpu():
        device = torch.device("cuda", torch.cuda.current_device())
        there = torch.Generator(device).manual_seed(torch.cuda.initial_seed())
        moved = moved or not torch.equal(there.get_state(), torch.cuda.get_rng_state(device))
    return moved
