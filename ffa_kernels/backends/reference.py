"""Every op in plain PyTorch: the definition that other backends are tested against.

Runs on any device and in any floating-point dtype, fp64 included. Symbols:
g = dL/dy, h = x A^T, u = g B, G_i = the gradient of record i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ffa_kernels.backends.compose import (
    by_way_of_G,
    by_way_of_sums,
    by_way_of_u,
    plain_backward,
    plain_product,
    scaled_product,
)
from ffa_kernels.backends.grid import NORM_MARGIN, grid_size, known_squares

_MASK32 = 0xFFFFFFFF
_SIGMA = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_COLUMN_AND_DIAGONAL_ROUNDS = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)


def supports(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """The reference serves everything."""
    return True


def _rotate(word: Tensor, bits: int) -> Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _MASK32


def _words(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """The ChaCha20 words as int64 (n_blocks, 16), each in [0, 2^32)."""
    device = rng_state.device
    halves = torch.stack([rng_state & _MASK32, (rng_state >> 32) & _MASK32], dim=1).flatten()
    constants = torch.tensor(_SIGMA, dtype=torch.int64, device=device)
    counter = torch.arange(first_block, first_block + n_blocks, device=device) & _MASK32
    initial = [constants[i].expand(n_blocks) for i in range(4)]
    initial += [halves[i].expand(n_blocks) for i in range(8)]
    initial += [counter, halves[8].expand(n_blocks), halves[9].expand(n_blocks)]
    initial += [torch.full_like(counter, tensor_id & _MASK32)]
    x = list(initial)
    for _ in range(10):
        for a, b, c, d in _COLUMN_AND_DIAGONAL_ROUNDS:
            x[a] = (x[a] + x[b]) & _MASK32
            x[d] = _rotate(x[d] ^ x[a], 16)
            x[c] = (x[c] + x[d]) & _MASK32
            x[b] = _rotate(x[b] ^ x[c], 12)
            x[a] = (x[a] + x[b]) & _MASK32
            x[d] = _rotate(x[d] ^ x[a], 8)
            x[c] = (x[c] + x[d]) & _MASK32
            x[b] = _rotate(x[b] ^ x[c], 7)
    return torch.stack([(p + q) & _MASK32 for p, q in zip(x, initial, strict=True)], dim=1)


def chacha20(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """RFC 8439 section 2.3, the block function; see `ffa_kernels.ops.chacha20`."""
    words = _words(rng_state, tensor_id, first_block, n_blocks)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gaussian(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Box-Muller on pairs of 64-bit words; see `ffa_kernels.ops.gaussian`."""
    words = _words(rng_state, tensor_id, 0, -(-numel // 8)).view(-1, 4, 2, 2)
    # The upper 53 bits of each 64-bit word, which fp64 holds exactly.
    upper = ((words[..., 1] << 21) | (words[..., 0] >> 11)).double()
    radius = torch.sqrt(-2.0 * torch.log((upper[..., 0] + 1.0) * 2.0**-53))
    angle = (2.0 * math.pi * 2.0**-53) * upper[..., 1]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten()[:numel].to(dtype)


def dropout_scale(dropout_state: Tensor, like: Tensor, dropout_p: float) -> Tensor:
    """The dropout mask times 1 / (1 - p), of the shape and dtype of `like`, from its counter."""
    threshold = round(dropout_p * 65536)
    columns = like.shape[-1]
    rows, blocks_a_row = math.prod(like.shape[:-1]), -(-columns // 32)
    words = _words(dropout_state, 0, 0, rows * blocks_a_row)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(rows, blocks_a_row * 32)
    keep = (halves[:, :columns] >= threshold).view(like.shape)
    # With a threshold of 65536 nothing is kept, and no scale is needed.
    return keep.to(like.dtype) * (65536.0 / max(65536 - threshold, 1))


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2)


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
    """y = x W^T + b + s h B^T and h = dropout(x) A^T; see `ffa_kernels.ops.linear`."""
    dropped = x if dropout_state is None else x * dropout_scale(dropout_state, x, dropout_p)
    h = dropped @ lora_A.t()
    if weight is None:
        y = scaled_product(_rows(h), lora_B.t(), scaling)
        return y.view(*x.shape[:-1], lora_B.shape[0]), h
    y = plain_product(x, weight, bias, weight_scale)
    _rows(y).addmm_(_rows(h), lora_B.t(), alpha=scaling)
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
    """dx = g W + s dropout^T(u A); see `ffa_kernels.ops.linear`."""
    u = g @ lora_B if u is None else u
    if weight is None:
        dx = scaled_product(_rows(u), lora_A, scaling).view(*g.shape[:-1], lora_A.shape[1])
        if dropout_state is not None:
            dx.mul_(dropout_scale(dropout_state, dx, dropout_p))
        return dx
    dx = plain_backward(g, weight, weight_scale)
    if dropout_state is None:
        _rows(dx).addmm_(_rows(u), lora_A, alpha=scaling)
        return dx
    adapter = u @ lora_A
    return dx.add_(adapter * dropout_scale(dropout_state, adapter, dropout_p), alpha=scaling)


def per_sample_grad(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = g B, G_i = s g_i^T h_i and |G_i|^2; see `ffa_kernels.ops.per_sample_grad`."""
    u = g.new_empty(0) if lora_B is None else g @ lora_B
    if cu_seqlens is None:
        n = g.shape[0]
        # Spelled without -1, which an empty batch leaves undetermined.
        tokens = math.prod(g.shape[1:-1])
        g, h = g.reshape(n, tokens, g.shape[-1]), h.reshape(n, tokens, h.shape[-1])
        grad = torch.bmm(g.transpose(1, 2), h)
    else:
        offsets = cu_seqlens.tolist()
        n, rows, h_rows = len(offsets) - 1, _rows(g), _rows(h)
        grad = g.new_empty(n, g.shape[-1], h.shape[-1])
        for i in range(n):
            of_record = slice(offsets[i], offsets[i + 1])
            torch.mm(rows[of_record].t(), h_rows[of_record], out=grad[i])
    grad.mul_(scaling * n if mean_loss else scaling)
    squares = known_squares(n, g.device)
    squares[0] = grad.double().square().sum(dim=(1, 2))
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
    """Clips each record and adds it on the grid; see `ffa_kernels.ops.clip_accumulate`."""
    n = grad_samples[0].shape[0]
    # Spelled without -1, which an empty batch leaves undetermined.
    rows = [g.reshape(n, math.prod(g.shape[1:])).double() for g in grad_samples]
    norms_sq = torch.stack([row.square().sum(dim=1) for row in rows])
    if squares:
        sums_of_squares, calls = torch.stack(squares).unbind(1)
        norms_sq = torch.where(calls == 1, sums_of_squares, norms_sq)
    if len(max_grad_norm) == 1:
        norms_sq = norms_sq.sum(dim=0, keepdim=True)
    bound = torch.tensor(max_grad_norm, dtype=torch.float64, device=norms_sq.device).unsqueeze(1)
    norm = norms_sq.sqrt() * NORM_MARGIN
    factors = torch.where(norm <= bound, torch.ones_like(norm), bound / norm)
    finite = norms_sq.isfinite()
    used = finite if keep is None else finite & keep
    dropped = ~finite if keep is None else ~finite & keep
    factors = torch.where(used, factors, torch.zeros_like(factors))
    stats += torch.stack([(used & (factors < 1)).sum(), dropped.sum()])
    for k, (grad_sample, total) in enumerate(zip(grad_samples, sums, strict=True)):
        group = 0 if len(max_grad_norm) == 1 else k
        chosen = used[group]
        records = grad_sample[chosen].double()
        factor = factors[group][chosen].view(-1, *[1] * (grad_sample.dim() - 1))
        if math.isinf(max_grad_norm[group]):
            total += records.sum(dim=0)
        else:
            grid = grid_size(max_grad_norm[group])
            total += (records * factor / grid).trunc().long().sum(dim=0)
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
    """Noise, then the optimizer's step; see `ffa_kernels.ops.private_update`."""
    noise_std = noise_multiplier * math.sqrt(sum(c * c for c in max_grad_norm))
    for k, (param, total) in enumerate(zip(params, sums, strict=True)):
        bound = max_grad_norm[0 if len(max_grad_norm) == 1 else k]
        if math.isinf(bound):
            grad = total / expected_batch_size
        else:
            grid = grid_size(bound)
            noised = total
            if noise_multiplier > 0:
                z = gaussian(rng_state, tensor_ids[k], total.numel(), torch.float64).to(
                    total.device
                )
                # In fp64, which holds these integers: int64 would overflow where another group's
                # bound, and so the noise, is 2^30 times this one's.
                noised = total + (z * (noise_std / grid)).round().view(total.shape)
            grad = noised.double() * grid / expected_batch_size
        total.zero_()
        grad = grad.to(param.dtype)
        if optimizer == "none":
            param.copy_(grad)
            continue
        lr, weight_decay, beta1, beta2, eps = hyper[k].tolist()
        first_step = steps[k].item() == 0
        steps[k] += 1
        if maximize:
            grad = -grad
        if optimizer == "adamw":
            param.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        if optimizer == "sgd":
            if exp_avgs:
                buffer = exp_avgs[k]
                if first_step:
                    buffer.copy_(grad)
                else:
                    buffer.mul_(beta1).add_(grad, alpha=1 - beta2)
                grad = grad.add(buffer, alpha=beta1) if nesterov else buffer
            param.add_(grad, alpha=-lr)
            continue
        exp_avgs[k].lerp_(grad, 1 - beta1)
        exp_avg_sqs[k].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = steps[k].item()
        denominator = (exp_avg_sqs[k].sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
        param.addcdiv_(exp_avgs[k], denominator, value=-lr / (1 - beta1**step))
    rng_state[4] += 1


private_step = by_way_of_sums(clip_accumulate, private_update)
