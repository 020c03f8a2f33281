"""The contract: one file an op, with its schema, its checks, its fake and its meaning."""

from ffa_kernels.ops.chacha20 import chacha20
from ffa_kernels.ops.clip_accumulate import clip_accumulate
from ffa_kernels.ops.gaussian import gaussian
from ffa_kernels.ops.linear import linear
from ffa_kernels.ops.per_sample_backward import per_sample_backward
from ffa_kernels.ops.per_sample_clip import per_sample_clip
from ffa_kernels.ops.per_sample_grad import per_sample_grad
from ffa_kernels.ops.private_step import private_step
from ffa_kernels.ops.private_update import private_update

__all__ = [
    "chacha20",
    "clip_accumulate",
    "gaussian",
    "linear",
    "per_sample_backward",
    "per_sample_clip",
    "per_sample_grad",
    "private_step",
    "private_update",
]
