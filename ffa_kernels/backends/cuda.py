"""Every op on the compiled CUDA kernels of ``csrc/cuda``; the matrix products not for float64.

Same names and arguments as the ops. Outputs and scratch space are allocated here; the launchers get
addresses, sizes and the current stream of the tensors' device. Nothing waits for the device, so
every op may be captured in a CUDA graph. Rules of dtype and shape are the ops' own business and
checked there.

A library that runs the same kernels on the CPU, one thread after another (``csrc/cuda/block.h``),
takes CPU tensors instead; `FFA_CUDA_LIBRARY` names it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ffa_kernels.backends import native
from ffa_kernels.backends.compose import by_way_of_G, by_way_of_u, plain_backward, plain_product
from ffa_kernels.backends.dispatch import OPS, computed_in
from ffa_kernels.backends.grid import known_squares
from ffa_kernels.errors import NativeError

# enum ffa_dtype and enum ffa_optimizer of csrc/ffa.h
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_OPTIMIZERS = {"none": 0, "sgd": 1, "adam": 2, "adamw": 3}
_MATRIX_OPS = (
    *("linear", "linear_backward", "per_sample_grad", "per_sample_backward", "per_sample_clip"),
)
# Elements of x whose dropout is in flight at a time: in 16 bits they fit a T4's L2 cache.
_DROPOUT_CHUNK = 1 << 20


@functools.cache
def _serial() -> bool:
    return bool(native.load("cuda").handle.ffa_cuda_serial())


def _on(device: torch.device) -> Any:
    """Makes `device` the current one inside a block."""
    return contextlib.nullcontext() if _serial() else torch.cuda.device(device)


@functools.cache
def _has_code_for(device: torch.device) -> bool:
    try:
        with _on(device):
            native.load("cuda").call("check_device")
    except NativeError as error:
        warnings.warn(f"{device}: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def supports(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `op` runs here for tensors of these dtypes on this device.

    Warns once for a device that the library was not compiled for.
    """
    floating = computed_in(op, dtypes)
    served = set(_DTYPES) - ({torch.float64} if op in _MATRIX_OPS else set())
    return (
        op in OPS
        and floating <= served
        and native.available("cuda")
        and device.type == ("cpu" if _serial() else "cuda")
        and _has_code_for(device)
    )


def _launch(op: str, device: torch.device, *arguments: Any) -> None:
    """The launcher of `op` with `arguments`, then the current stream of `device`."""
    library = native.load("cuda")
    if _serial():
        library.call(op, *arguments, None)
        return
    with torch.cuda.device(device):
        library.call(op, *arguments, torch.cuda.current_stream(device).cuda_stream)


def _scratch(op: str, device: torch.device, *sizes: Any) -> Tensor:
    size = native.longs([0])
    with _on(device):
        native.load("cuda").call(f"{op}_scratch", *sizes, size)
    return torch.empty(size[0], dtype=torch.uint8, device=device)


def _codes(tensors: Sequence[Tensor]) -> Any:
    return native.ints([_DTYPES[t.dtype] for t in tensors])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return native.pointers(tensors) if tensors else None


def chacha20(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """Blocks of RFC 8439, section 2.3, as int32 bit patterns (n_blocks, 16)."""
    out = torch.empty((n_blocks, 16), dtype=torch.int32, device=rng_state.device)
    state = rng_state.contiguous()
    _launch(
        *("chacha20", out.device, state.data_ptr(), tensor_id, first_block, n_blocks),
        out.data_ptr(),
    )
    return out


def gaussian(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) standard Gaussians, computed in fp64 and rounded to `dtype`."""
    out = torch.empty(numel, dtype=dtype, device=rng_state.device)
    state = rng_state.contiguous()
    _launch(
        *("gaussian", out.device, state.data_ptr(), tensor_id, numel, _DTYPES[dtype]),
        out.data_ptr(),
    )
    return out


def _add_rank_term(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    dropout_state: Tensor | None,
    dropout_p: float,
) -> None:
    """out += s left right, with the dropout mask of a matrix like `out`; right is (r, columns)."""
    rank_stride, column_stride = right.stride()
    state = None if dropout_state is None else dropout_state.contiguous()
    _launch(
        *("rank_term", out.device, *out.shape, left.shape[1], _DTYPES[out.dtype]),
        *(left.data_ptr(), right.data_ptr(), column_stride, rank_stride, scaling),
        *(_address(state), dropout_p, out.data_ptr()),
    )


def _dropped_product(x: Tensor, lora_A: Tensor, dropout_state: Tensor, dropout_p: float) -> Tensor:
    """dropout(x) A^T, with x (rows, d_in) masked a chunk of rows at a time."""
    rows, columns = x.shape
    h = x.new_empty((rows, lora_A.shape[0]))
    step = max(1, _DROPOUT_CHUNK // max(columns, 1))
    state, x = dropout_state.contiguous(), x.contiguous()
    masked = x.new_empty((min(step, rows), columns))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = x[start : start + count]
        _launch(
            *("dropout", x.device, state.data_ptr(), dropout_p, start, count, columns),
            *(_DTYPES[x.dtype], part.data_ptr(), masked.data_ptr()),
        )
        torch.mm(masked[:count], lora_A.t(), out=h[start : start + count])
    return h


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    tap: Tensor | None,
    norm_tap: Tensor | None,
    dropout_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    dropout_p: float,
    mean_loss: bool,
    merge: bool = False,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + s h B^T (..., d_out) and h = dropout(x) A^T (..., r); x is (..., d_in).

    The products with W and A are torch's; s h B^T is added in one read and write of y.
    """
    lead, rows = x.shape[:-1], x.flatten(0, -2)
    if dropout_state is None:
        h = rows @ lora_A.t()
    else:
        h = _dropped_product(rows, lora_A, dropout_state, dropout_p)
    d_out = lora_B.shape[0]
    if weight is None:
        y = x.new_zeros((len(rows), d_out))
    else:
        y = plain_product(rows, weight, bias, weight_scale)
    _add_rank_term(y, h, lora_B.t(), scaling, None, 0.0)
    return y.view(*lead, d_out), h.view(*lead, lora_A.shape[0])


def linear_backward(
    g: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """dx = g W + s dropout^T(u A) (..., d_in); g is (..., d_out), u (..., r)."""
    u = g @ lora_B if u is None else u
    rows, d_in = g.flatten(0, -2), lora_A.shape[1]
    if weight is None:
        dx = g.new_zeros((len(rows), d_in))
    else:
        dx = plain_backward(rows, weight, weight_scale)
    u_rows = u.flatten(0, -2).contiguous()
    _add_rank_term(dx, u_rows, lora_A, scaling, dropout_state, dropout_p)
    return dx.view(*g.shape[:-1], d_in)


def per_sample_grad(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = g B, G_i = s g_i^T h_i (n, d_out, r) and |G_i|^2 over ones (2, n), from one read of g."""
    d_out, r, rows = g.shape[-1], h.shape[-1], math.prod(g.shape[:-1])
    n = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    g, h = g.contiguous(), h.contiguous()
    u = g.new_empty(0 if lora_B is None else (*g.shape[:-1], r))
    grad, squares = g.new_empty((n, d_out, r)), known_squares(n, g.device)
    if d_out == 0 or r == 0:
        squares[0] = 0.0
        return u.zero_(), grad, squares
    B = None if lora_B is None else lora_B.contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    sizes = (n, rows, d_out, r, _DTYPES[g.dtype])
    scratch = _scratch(
        *("per_sample_grad", g.device, *sizes, int(B is not None), int(offsets is not None))
    )
    _launch(
        *("per_sample_grad", g.device, *sizes, g.data_ptr(), h.data_ptr(), _address(B)),
        *(_address(offsets), scaling * n if mean_loss else scaling, u.data_ptr()),
        *(grad.data_ptr(), squares.data_ptr(), scratch.data_ptr()),
    )
    return u, grad, squares


per_sample_backward = by_way_of_u(per_sample_grad, linear_backward)


def clip_accumulate(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    sums: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: list[float],
) -> Tensor:
    """Clip each record and add it to `sums` on their grids; factors float64 (groups, n)."""
    device, n = grad_samples[0].device, len(grad_samples[0])
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    in_place = native.InPlace()
    totals, (counts,) = in_place(sums), in_place([stats])
    kept = None if keep is None else keep.contiguous()
    factors = torch.empty((len(max_grad_norm), n), dtype=torch.float64, device=device)
    numels = native.longs([t.numel() for t in totals])
    scratch = _scratch("clip_accumulate", device, len(grads), n, numels)
    _launch(
        *("clip_accumulate", device, len(grads), n, numels, _codes(grads), _addresses(grads)),
        *(_addresses(known), _addresses(totals), len(max_grad_norm)),
        *(native.doubles(max_grad_norm), _address(kept), counts.data_ptr(), factors.data_ptr()),
        scratch.data_ptr(),
    )
    in_place.finish()
    return factors


per_sample_clip = by_way_of_G(per_sample_grad, clip_accumulate)


def private_update(
    params: list[Tensor],
    sums: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rng_state: Tensor,
    hyper: Tensor,
    tensor_ids: list[int],
    max_grad_norm: list[float],
    noise_multiplier: float,
    expected_batch_size: float,
    optimizer: str,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Noise `sums`, average, and step the optimizer on `params`, in as few launches as
    there are full tables of tensors."""
    device = params[0].device
    counts = [] if optimizer == "none" else steps
    in_place = native.InPlace()
    p, s, m, v = (in_place(tensors) for tensors in (params, sums, exp_avgs, exp_avg_sqs))
    (state,), table = in_place([rng_state]), hyper.contiguous()
    _launch(
        *("private_update", device, len(p), native.longs([t.numel() for t in p]), _codes(p)),
        *(_addresses(p), _addresses(s), _addresses(m), _addresses(v), _addresses(counts)),
        *(state.data_ptr(), table.data_ptr(), native.longs(tensor_ids), len(max_grad_norm)),
        *(native.doubles(max_grad_norm), noise_multiplier, expected_batch_size),
        *(_OPTIMIZERS[optimizer], int(nesterov), int(maximize)),
    )
    in_place.finish()


def private_step(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rng_state: Tensor,
    hyper: Tensor,
    tensor_ids: list[int],
    max_grad_norm: list[float],
    noise_multiplier: float,
    expected_batch_size: float,
    optimizer: str,
    nesterov: bool,
    maximize: bool,
) -> Tensor:
    """`clip_accumulate`, then `private_update`, with the sums in registers alone."""
    device, n = params[0].device, len(grad_samples[0])
    counted = [] if optimizer == "none" else steps
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    in_place = native.InPlace()
    p, m, v = (in_place(tensors) for tensors in (params, exp_avgs, exp_avg_sqs))
    counts, state = in_place([stats, rng_state])
    kept, table = None if keep is None else keep.contiguous(), hyper.contiguous()
    factors = torch.empty((len(max_grad_norm), n), dtype=torch.float64, device=device)
    numels = native.longs([t.numel() for t in p])
    scratch = _scratch("clip_accumulate", device, len(p), n, numels)
    _launch(
        *("private_step", device, len(p), n, numels, _codes(grads), _addresses(grads)),
        *(_addresses(known), _address(kept), counts.data_ptr(), factors.data_ptr()),
        *(scratch.data_ptr(), _codes(p), _addresses(p), _addresses(m), _addresses(v)),
        *(_addresses(counted), state.data_ptr(), table.data_ptr(), native.longs(tensor_ids)),
        *(len(max_grad_norm), native.doubles(max_grad_norm), noise_multiplier),
        *(expected_batch_size, _OPTIMIZERS[optimizer], int(nesterov), int(maximize)),
    )
    in_place.finish()
    return factors
