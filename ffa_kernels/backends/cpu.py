"""Every op on the compiled CPU kernels of ``csrc/cpu``, for float32 and float64.

Same names and arguments as the ops. Outputs are allocated here; the launchers get addresses, sizes
and a thread count. Rules of dtype, shape and layout are the ops' own business and checked there:
parameters, moments and sums come contiguous.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ffa_kernels.backends import compose, native
from ffa_kernels.backends.compose import (
    base_product,
    by_way_of_G,
    can_merge,
    merged_weight,
    plain_backward,
    plain_product,
)
from ffa_kernels.backends.dispatch import OPS, computed_in
from ffa_kernels.errors import NativeError

# enum ffa_dtype and enum ffa_optimizer of csrc/ffa.h
_DTYPES = {torch.float32: 0, torch.float64: 1}
# Of the matrix in a product.
_FACTORS = {torch.float32: 0, torch.bfloat16: 3, torch.int8: 4}
_OPTIMIZERS = {"none": 0, "sgd": 1, "adam": 2, "adamw": 3}
# Elements of x whose dropout is in flight at a time: the scratch stays in L2.
_DROPOUT_CHUNK = 1 << 17
# In evaluation fewer rows repay no packing of W. In training how a record is rounded must not
# depend on how many others there are.
LEAST_ROWS = 4

# Of tensors that are no subclass's.
PLAIN = (Tensor, torch.nn.Parameter)

_in_forked_child = False


def _after_fork() -> None:
    # GNU's runtime hangs in a child whose parent has used it, in torch's own operators as well.
    global _in_forked_child
    _in_forked_child = True
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def supports(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `op` runs here for tensors of these dtypes: the library loads and every floating
    dtype that it computes in is float32 or float64 (one of the two, where an op multiplies)."""
    floating = computed_in(op, dtypes)
    mixes = op in ("clip_accumulate", "private_update", "private_step")
    return (
        op in OPS
        and device.type == "cpu"
        and not any(dtype.is_complex for dtype in dtypes)
        and floating <= _DTYPES.keys()
        and (mixes or len(floating) <= 1)
        and native.available("cpu")
    )


def _threads() -> int:
    return 1 if _in_forked_child else torch.get_num_threads()


def _dtype_code(dtype: torch.dtype) -> int:
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise NativeError(
            f"dtype: {dtype} is not served here; accepted: torch.float32, torch.float64"
        ) from None


def chacha20(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """Blocks of RFC 8439, section 2.3, as int32 bit patterns (n_blocks, 16)."""
    out = torch.empty((n_blocks, 16), dtype=torch.int32, device="cpu")
    state = rng_state.contiguous()
    native.load("cpu").call(
        "chacha20", state.data_ptr(), tensor_id, first_block, n_blocks, out.data_ptr(), _threads()
    )
    return out


def gaussian(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) standard Gaussians, computed in fp64 and rounded to `dtype`."""
    made = dtype if dtype in _DTYPES else torch.float64
    out = torch.empty(numel, dtype=made, device="cpu")
    state = rng_state.contiguous()
    native.load("cpu").call(
        *("gaussian", state.data_ptr(), tensor_id, numel),
        *(_dtype_code(out.dtype), out.data_ptr(), _threads()),
    )
    return out.to(dtype)


def _dropout_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about `_DROPOUT_CHUNK` elements."""
    step = max(1, _DROPOUT_CHUNK // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dropped_product(
    x: Tensor, lora_A: Tensor, dropout_state: Tensor, dropout_p: float, h: Tensor
) -> None:
    """h = dropout(x) A^T, with x (rows, d_in) masked a chunk of rows at a time."""
    library, columns = native.load("cpu"), x.shape[1]
    state = _dense(dropout_state)
    chunks = _dropout_chunks(*x.shape)
    scratch = x.new_empty((chunks[0][1] if chunks else 0, columns))
    for start, end in chunks:
        rows = x[start:end].contiguous()
        masked = scratch[: end - start]
        library.call(
            *("dropout", state.data_ptr(), dropout_p, start, end - start, columns),
            *(_dtype_code(x.dtype), rows.data_ptr(), masked.data_ptr(), _threads()),
        )
        # Not BLAS, which rounds a row otherwise where it is the chunk's only one.
        _project(masked, lora_A, h[start:end])


def has_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> bool:
    """Whether `product` is the one to take for these: not where more is asked for than values, nor
    for what has none at its address, nor for what PyTorch's would refuse."""
    # First what is cheap to ask, and often the end of it.
    return (
        x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(x) in PLAIN
        and weight.dim() == 2
        and (weight.dtype != torch.float32 or compose.takes_fp32(x, weight))
        and multiplies(weight.dtype)
        and _is_plain(x)
        and _is_plain(weight)
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or _is_plain(bias))
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
        and (scale is None) == (weight.dtype != torch.int8)
        and (scale is None or (_is_plain(scale) and scale.dtype == x.dtype))
        and (scale is None or scale.shape in ((len(weight), 1), (1, weight.shape[1])))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
    )


def _dispatch_keys(t: Tensor) -> int:
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys


def _keys_of_values() -> frozenset[int]:
    with torch.inference_mode():
        made = torch.empty(0, device="cpu")
    return frozenset((_dispatch_keys(made), _dispatch_keys(torch.empty(0, device="cpu"))))


# Of tensors on a CPU whose elements lie where their address and strides say: nothing sparse, lazily
# negated, batched, wrapped or fake.
_PLAIN_KEYS = _keys_of_values()


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and _dispatch_keys(t) in _PLAIN_KEYS


def _dense(t: Tensor) -> Tensor:
    """t, contiguous, with its values at its address: a lazily negated one has others there, and a
    tensor of zeros may have none."""
    if not _is_plain(t) and not isinstance(t, FakeTensor):
        t = t.clone().resolve_neg()
    return t.contiguous()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether fp32 rows are multiplied here with a matrix of this type: PyTorch makes floats of
    narrower ones first, but where the processor has instructions for them."""
    if dtype == torch.float32:
        return compose.FUSES_FP32
    if dtype == torch.bfloat16:
        return native.has_bf16_product() or (compose.WIDENS_BF16 and native.available("cpu"))
    return dtype == torch.int8 and native.available("cpu")


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None = None,
    term: Tensor | None = None,
    scaling: float = 1.0,
    scale: Tensor | None = None,
) -> Tensor:
    """x W^T + b + s left term (..., d_out) in fp32, for W in fp32, bf16 or int8; with instructions
    for bf16, and W not in fp32, from x and W rounded to bf16, s left and term to 16 bits or more.

    W is (d_out, d_in), times `scale` if that is given, (d_out, 1) or (1, d_in). A row has the same
    bits whatever the other rows are; W is packed a part at a time. Where x is rounded subnormal
    numbers count as 0.
    """
    # In its last shape at once: what is a view of something else is not changed in place.
    y = x.new_empty((*x.shape[:-1], len(weight)))
    x, rows = x.contiguous(), math.prod(x.shape[:-1])
    bias = None if bias is None else bias.contiguous()
    if left is None or term is None:
        left, term = x.new_empty(rows, 0), x.new_empty(0, len(weight))
    left = left.contiguous()
    scale = None if scale is None else scale.contiguous()
    # Of the launcher's matrix, which is W^T.
    scales_rows = scale is not None and scale.shape != (len(weight), 1)
    rounds = weight.dtype != torch.float32 and native.has_bf16_product()
    native.load("cpu").call(
        *("bf16_product" if rounds else "fp32_product", rows, x.shape[-1], len(weight), len(term)),
        *(x.data_ptr(), weight.data_ptr(), _FACTORS[weight.dtype], *weight.stride()[::-1]),
        *(None if scale is None else scale.data_ptr(), scales_rows),
        *(None if bias is None else bias.data_ptr(), left.data_ptr(), term.data_ptr()),
        *(*term.stride(), scaling, y.data_ptr(), _threads()),
    )
    return y


def _project(x: Tensor, lora_A: Tensor, h: Tensor) -> None:
    """h = x A^T, all contiguous."""
    native.load("cpu").call(
        *("rank_term", math.prod(x.shape[:-1]), 0, len(lora_A), _dtype_code(x.dtype)),
        *(x.data_ptr(), x.shape[-1], lora_A.data_ptr(), h.data_ptr(), None, 1, 1, 0.0),
        *(False, None, None, _threads()),
    )


def _check_product(op: str, out: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
    """What a launcher adds to is of this form: its address is all that it is told."""
    if out.dtype != dtype or out.numel() != rows * columns:
        raise RuntimeError(
            f"{op}: a product came out as {out.dtype} {tuple(out.shape)}; accepted: {dtype}, "
            f"{rows} x {columns}"
        )


def _rank_term(
    op: str,
    left: Tensor,
    right: Tensor,
    scaling: float,
    out: Tensor,
    adds: bool = False,
    bias: Tensor | None = None,
    x: Tensor | None = None,
    lora_A: Tensor | None = None,
) -> None:
    """out (..., columns) = b + s left right^T, or += s left right^T, for left (..., r) and right
    (columns, r). With x (..., d_in) and A, left is made first: x A^T. All but right are contiguous.
    """
    if isinstance(out, FakeTensor):
        # The planner's walk asks for sizes alone.
        return
    rows, (columns, r) = math.prod(left.shape[:-1]), right.shape
    _check_product(op, out, left.dtype, rows, columns)
    made: tuple[Any, ...] = (None, -1, None)
    if x is not None and lora_A is not None:
        made = (x.data_ptr(), x.shape[-1], lora_A.data_ptr())
    native.load("cpu").call(
        *("rank_term", rows, columns, r, _dtype_code(out.dtype), *made, left.data_ptr()),
        *(right.data_ptr(), *right.stride(), scaling, adds),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), _threads()),
    )


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
    """y = x W^T + b + s h B^T (..., d_out) and h = dropout(x) A^T (..., r); x is (..., d_in)."""
    if merge and can_merge(weight, x, dropout_state is not None):
        assert weight is not None
        y = F.linear(x, merged_weight(weight, lora_A, lora_B, scaling), bias)
        # Last: the large product hides the time in which x comes into the cache.
        return y, F.linear(x, lora_A)
    x, lora_A, lora_B = _dense(x), _dense(lora_A), _dense(lora_B)
    bias = None if bias is None else _dense(bias)
    lead, (d_out, r) = x.shape[:-1], lora_B.shape
    h = x.new_empty((*lead, r))
    projected: tuple[Tensor | None, Tensor | None] = (x, lora_A)
    if dropout_state is not None:
        projected = (None, None)
        rows = x.view(math.prod(lead), x.shape[-1])
        _dropped_product(rows, lora_A, dropout_state, dropout_p, h.view(len(rows), r))
    if weight is not None and has_product(x, weight, None, weight_scale):
        if dropout_state is None:
            _project(x, lora_A, h)
        return product(x, weight, bias, h, lora_B.t(), scaling, weight_scale), h
    if weight is not None and weight.dtype != x.dtype:
        y = plain_product(x, weight, bias, weight_scale).contiguous()
        _rank_term("linear", h, lora_B, scaling, y, True, None, *projected)
        return y, h
    y = x.new_empty((*lead, d_out))
    _rank_term("linear", h, lora_B, scaling, y, False, bias, *projected)
    if weight is not None:
        # BLAS adds to what is there, as it does to a bias: no pass of its own for either.
        y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
    return y, h


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
    if u is None and can_merge(weight, g, dropout_state is not None):
        assert weight is not None
        return torch.matmul(g, merged_weight(weight, lora_A, lora_B, scaling))
    u, lora_A = torch.matmul(g, lora_B) if u is None else _dense(u), _dense(lora_A)
    lead, columns = g.shape[:-1], lora_A.shape[1]
    scale = None if weight_scale is None else weight_scale.t()
    if dropout_state is None:
        if weight is not None and has_product(g, weight.t(), None, scale):
            return product(g, weight.t(), None, u, lora_A, scaling, scale)
        if weight is None:
            dx = g.new_empty((*lead, columns))
        else:
            dx = plain_backward(g, weight, weight_scale).contiguous()
        _rank_term("linear_backward", u.contiguous(), lora_A.t(), scaling, dx, weight is not None)
        return dx
    library, state = native.load("cpu"), _dense(dropout_state)
    g_rows, u_rows = g.flatten(0, -2), u.contiguous().flatten(0, -2)
    if weight is None:
        dx = g.new_zeros(len(g_rows), columns)
    else:
        dx = base_product(g, weight.t(), None, scale).view(len(g_rows), columns)
    chunks = _dropout_chunks(*dx.shape)
    scratch = dx.new_empty((chunks[0][1] if chunks else 0, columns))
    for start, end in chunks:
        adapter = scratch[: end - start]
        _rank_term("linear_backward", u_rows[start:end], lora_A.t(), 1.0, adapter)
        library.call(
            *("dropout_add", state.data_ptr(), dropout_p, scaling, start, end - start),
            *(columns, _dtype_code(dx.dtype), adapter.data_ptr()),
            *(dx.data_ptr() + start * columns * dx.element_size(), _threads()),
        )
    return dx.view(*lead, columns)


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
    g, h = _dense(g), _dense(h)
    u = g.new_empty(0 if lora_B is None else (*g.shape[:-1], r))
    grad, squares = g.new_empty((n, d_out, r)), g.new_empty((2, n), dtype=torch.float64)
    lora_B = None if lora_B is None else _dense(lora_B)
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    native.load("cpu").call(
        *("per_sample_grad", n, rows, d_out, r, _dtype_code(g.dtype), g.data_ptr(), h.data_ptr()),
        None if lora_B is None else lora_B.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        *(scaling * n if mean_loss else scaling, u.data_ptr(), grad.data_ptr()),
        *(squares.data_ptr(), _threads()),
    )
    # B without elements has no address, and so looks as if nobody asked.
    return u if d_out else u.zero_(), grad, squares


def per_sample_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = g W + s u A (..., d_in), and G and |G_i|^2 as `per_sample_grad`."""
    if has_product(g, weight.t()):
        u, grad, squares = per_sample_grad(g, h, lora_B, cu_seqlens, scaling, mean_loss)
        return product(g, weight.t(), None, u, _dense(lora_A), scaling), grad, squares
    (d_out, r), d_in, rows = lora_B.shape, lora_A.shape[1], math.prod(g.shape[:-1])
    n = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    g, h, lora_A, lora_B = _dense(g), _dense(h), _dense(lora_A), _dense(lora_B)
    grad, squares = g.new_empty((n, d_out, r)), g.new_empty((2, n), dtype=torch.float64)
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    # All that can be is done before the large product: after it nothing is in the cache any more.
    call, threads = native.load("cpu").call, _threads()
    places = (
        *(n, rows, d_out, d_in, r, _dtype_code(g.dtype), g.data_ptr(), h.data_ptr()),
        *(lora_A.data_ptr(), lora_B.data_ptr(), None if offsets is None else offsets.data_ptr()),
        *(scaling, scaling * n if mean_loss else scaling),
    )
    written = (grad.data_ptr(), squares.data_ptr(), threads)
    dx = torch.matmul(g, weight).contiguous()
    _check_product("per_sample_backward", dx, g.dtype, rows, d_in)
    call("per_sample_backward", *places, dx.data_ptr(), *written)
    return dx, grad, squares


def _codes(tensors: Sequence[Tensor]) -> Any:
    try:
        return native.ints([_DTYPES[t.dtype] for t in tensors])
    except KeyError:
        return [_dtype_code(t.dtype) for t in tensors]  # which says what is wrong


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return native.pointers(tensors) if tensors else None


def _numels(tensors: Sequence[Tensor]) -> Any:
    return native.longs([t.numel() for t in tensors])


def clip_accumulate(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    sums: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: list[float],
) -> Tensor:
    """Clip each record and add it to `sums` on their grids; factors float64 (groups, n)."""
    n = len(grad_samples[0])
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    in_place = native.InPlace()
    (counts,) = in_place([stats])
    factors = torch.empty((len(max_grad_norm), n), dtype=torch.float64, device="cpu")
    kept = None if keep is None else keep.contiguous()
    native.load("cpu").call(
        *("clip_accumulate", len(grads), n, _numels(sums), _codes(grads)),
        *(_addresses(grads), _addresses(known), _addresses(sums)),
        *(len(max_grad_norm), native.doubles(max_grad_norm)),
        *(None if kept is None else kept.data_ptr(), counts.data_ptr(), factors.data_ptr()),
        _threads(),
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
    """Noise `sums`, average, and step the optimizer on `params`, all tensors in one call."""
    in_place = native.InPlace()
    (state,) = in_place([rng_state])
    counts = [] if optimizer == "none" else steps
    table = hyper.contiguous()
    native.load("cpu").call(
        *("private_update", len(params), _numels(params), _codes(params)),
        *(_addresses(params), _addresses(sums), _addresses(exp_avgs), _addresses(exp_avg_sqs)),
        *(_addresses(counts), state.data_ptr(), table.data_ptr(), native.longs(tensor_ids)),
        *(len(max_grad_norm), native.doubles(max_grad_norm), noise_multiplier),
        *(expected_batch_size, _OPTIMIZERS[optimizer], int(nesterov), int(maximize), _threads()),
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
    """`clip_accumulate`, then `private_update`, with a chunk of the sums in the cache alone."""
    n = len(grad_samples[0])
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    in_place = native.InPlace()
    counts, state = in_place([stats, rng_state])
    kept, table = None if keep is None else keep.contiguous(), hyper.contiguous()
    factors = torch.empty((len(max_grad_norm), n), dtype=torch.float64, device="cpu")
    native.load("cpu").call(
        *("private_step", len(params), n, _numels(params), _codes(grads)),
        *(_addresses(grads), _addresses(known), None if kept is None else kept.data_ptr()),
        *(counts.data_ptr(), factors.data_ptr(), _codes(params), _addresses(params)),
        *(_addresses(exp_avgs), _addresses(exp_avg_sqs)),
        *(_addresses([] if optimizer == "none" else steps), state.data_ptr(), table.data_ptr()),
        *(native.longs(tensor_ids), len(max_grad_norm), native.doubles(max_grad_norm)),
        *(noise_multiplier, expected_batch_size, _OPTIMIZERS[optimizer], int(nesterov)),
        *(int(maximize), _threads()),
    )
    in_place.finish()
    return factors
