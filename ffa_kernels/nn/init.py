"""The frozen A, made from a recipe (method, seed, layer, shape): the same bits on every machine.

ChaCha20 words and elementwise fp64 arithmetic in a fixed order. No BLAS, LAPACK, libm or library
generator, which differ between machines, versions and thread counts; NumPy's elementwise
+ - * / and sqrt are exactly rounded, and `add.accumulate` adds in order.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.ops import chacha20

INITS = ("kaiming", "gaussian", "orthogonal", "pissa")

_Array = npt.NDArray[np.float64]
# ln 2 in two parts; k times the first is exact for every exponent k.
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_LANES = 8


def _uniform53(words: npt.NDArray[np.uint64]) -> _Array:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _log(x: _Array) -> _Array:
    """ln x for normal x > 0: x = m 2^k, m in [sqrt(1/2), sqrt 2), and 2 atanh((m-1)/(m+1))."""
    bits = x.view(np.uint64)
    exponent = (bits >> np.uint64(52)).astype(np.int64) - 1023
    mantissa = ((bits & np.uint64((1 << 52) - 1)) | np.uint64(1023 << 52)).view(np.float64)
    upper = mantissa > math.sqrt(2.0)
    mantissa = np.where(upper, mantissa * 0.5, mantissa)
    k = (exponent + upper).astype(np.float64)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.full_like(t, 1.0 / 27.0)
    for odd in range(25, 0, -2):
        series = series * square + 1.0 / odd
    return k * _LN2_HIGH + (2.0 * t * series + k * _LN2_LOW)


def _sincos_turns(turns: _Array) -> tuple[_Array, _Array]:
    """sin and cos of 2 pi `turns`, turns in [0, 1): Taylor series inside an eighth of a turn."""
    quarter = np.floor(turns * 4.0 + 0.5)
    angle = (turns - quarter * 0.25) * (2.0 * math.pi)
    square = angle * angle
    sine, cosine = np.full_like(angle, 1.0), np.full_like(angle, 1.0)
    for k in range(8, 0, -1):
        sine = 1.0 - sine * square * (1.0 / (2 * k * (2 * k + 1)))
        cosine = 1.0 - cosine * square * (1.0 / (2 * k * (2 * k - 1)))
    sine = sine * angle
    q = quarter.astype(np.int64) & 3
    swapped = (q & 1) == 1
    a, b = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(q >= 2, -a, a), np.where((q == 1) | (q == 2), -b, b)


def _key_stream(
    method: str, seed: int, layer: str, basis: int, count: int
) -> npt.NDArray[np.uint64]:
    """`count` 64-bit words under a public key that names the recipe, the layer and the basis."""
    recipe = f"ffa_kernels frozen A, version 1\0{method}\0{seed}\0{layer}"
    if basis:
        recipe += f"\0basis {basis}"
    key = np.frombuffer(hashlib.sha256(recipe.encode()).digest(), dtype="<i8")
    state = torch.from_numpy(np.append(key.astype(np.int64), np.int64(0)))
    words = chacha20(state, 0, 0, -(-count // 8)).numpy().astype("<i4", copy=False)
    return words.reshape(-1).view("<u8")[:count].astype(np.uint64)


def _normal(words: npt.NDArray[np.uint64]) -> _Array:
    radius = np.sqrt(-2.0 * _log(_uniform53(words[0::2]) + 2.0**-53))
    sine, cosine = _sincos_turns(_uniform53(words[1::2]))
    return np.stack([radius * cosine, radius * sine], axis=-1).reshape(-1)


def _dot(a: _Array, b: _Array) -> Any:
    """Row-wise a . b, summed over eight lanes in order and the lanes in order."""
    product = a * b
    padding = -product.shape[-1] % _LANES
    product = np.pad(product, [(0, 0)] * (product.ndim - 1) + [(0, padding)])
    lanes = product.reshape(*product.shape[:-1], -1, _LANES)
    lane_sums = np.add.accumulate(lanes, axis=-2)[..., -1, :]
    return np.add.accumulate(lane_sums, axis=-1)[..., -1]


def _orthonormal_rows(rows: _Array) -> _Array:
    """Modified Gram-Schmidt, passed twice over each row; the first rows do not depend on r."""
    done: list[_Array] = []
    for row in rows:
        for _ in range(2):
            for q in done:
                row = row - _dot(row, q) * q
        done.append(row / np.sqrt(_dot(row, row)))
    return np.stack(done)


def frozen_A(
    method: str, seed: int, layer: str, r: int, in_features: int, basis: int = 0
) -> Tensor:
    """The frozen projection A for one layer.

    Args:
        method: "kaiming" (uniform within 1 / sqrt(d_in), as PEFT's default), "gaussian"
            (N(0, 1/r^2), as PEFT's) or "orthogonal" (orthonormal rows).
        seed: the federation's public seed, any integer.
        layer: the layer's qualified name; layers of equal shape get different A.
        r: rank; `in_features`: d_in.
        basis: its number, where a layer gets one A after another; each is drawn anew.

    Returns:
        fp32 (r, d_in). Row i is the same for every r > i ("gaussian": up to its scale 1 / r).

    Raises:
        ConfigError: an unknown method, a seed that is no integer, or more rows
            than can be orthonormal.
    """
    if method not in ("kaiming", "gaussian", "orthogonal"):
        raise ConfigError(f"init: {method!r} is no recipe; accepted: kaiming, gaussian, orthogonal")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed is {shown(seed)}; accepted: an integer")
    # Rows start at whole blocks, so that row i depends on neither r nor the other rows.
    per_row = -(-in_features // 8) * 8
    words = _key_stream(method, seed, layer, basis, r * per_row)
    if method == "kaiming":
        values = (2.0 * _uniform53(words) - 1.0) / math.sqrt(in_features)
    else:
        values = _normal(words)
    rows = values.reshape(r, per_row)[:, :in_features]
    if method == "gaussian":
        rows = rows / r
    if method == "orthogonal":
        if r > in_features:
            raise ConfigError(
                f"init: {r} orthonormal rows do not fit in {in_features} dimensions; accepted: "
                f"r up to {in_features}, or another init"
            )
        rows = _orthonormal_rows(rows)
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))


def pissa_A(weight: Tensor, r: int) -> Tensor:
    """The top r right singular vectors of W as orthonormal rows (after PiSSA, arXiv 2404.02948).

    An SVD is not the same to the bit everywhere: this A must be sent, not derived.

    Args:
        weight: (d_out, d_in).
        r: rank, at most min(d_out, d_in).

    Returns:
        fp32 (r, d_in); each row's largest entry is positive.

    Raises:
        ConfigError: r is larger than W has singular vectors.
    """
    if r > min(weight.shape):
        raise ConfigError(
            f"init: pissa has {min(weight.shape)} singular vectors for a weight of "
            f"{tuple(weight.shape)}, given r = {r}; accepted: r up to that"
        )
    rows: Tensor = torch.linalg.svd(weight.detach().double(), full_matrices=False).Vh[:r]
    signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    leading: Tensor = rows * signs
    return leading.float()
