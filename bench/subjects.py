"""Who makes a training step: the floor, this library, and its peers on the same work.

Each is a function of a Setting, a frozen model of its own, and the device; it gives a step, which
takes the round's number. All but the floor take their batches from a DataLoader and end with an
AdamW update of what they train. Those that are not private say so in their names. A peer that is
not installed is left out.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from models import Setting
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.nn.product import multiply_faster

Step = Callable[[int], object]
NOISE, CLIP, LR, DROPOUT = 1.0, 1.0, 1e-4, 0.05
# The engine looks for coupled records in the physical batches 1, 2, 4 and 8.
PROBED = 8


def _batches(s: Setting, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    tokens, labels = (t.to(device).split(s.n) for t in s.records())
    return itertools.cycle(list(zip(tokens, labels, strict=True)))


def _loader(s: Setting) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*s.records()), batch_size=s.n)


def _forever(loader: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for tokens, labels in loader:
            yield tokens.to(device), labels.to(device)


def floor(s: Setting, model: nn.Module, device: torch.device, compiled: bool = False) -> Step:
    """The frozen model's forward and its gradient as far as the embeddings.

    That is a little beyond what an adapter needs: see `passes_needed`."""
    if compiled:
        model.compile()
    batches = _batches(s, device)
    embedding = model.get_submodule(s.embedding)

    def step(_: int) -> object:
        tokens, labels = next(batches)
        inputs = embedding(tokens).detach().requires_grad_()
        logits = s.logits(model, None, inputs_embeds=inputs)
        return torch.autograd.grad(s.loss(logits, tokens, labels), inputs)

    return step


def floor_compiled(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return floor(s, model, device, compiled=True)


def floor_by_ours(s: Setting, model: nn.Module, device: torch.device) -> Step:
    """The same passes, the frozen layers multiplied as this library does."""
    multiply_faster(model.modules())
    return floor(s, model, device)


def passes_needed(s: Setting, model: nn.Module, device: torch.device) -> Step:
    """The forward, and the gradient as far as the outputs of the lowest layers that have adapters:
    what every step of adapters does, whoever makes it."""
    lowest: list[Tensor] = []

    def begin_graph(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if not output.requires_grad:
            lowest.append(output.requires_grad_())

    for name in s.targets(model):
        model.get_submodule(name).register_forward_hook(begin_graph)
    batches = _batches(s, device)

    def step(_: int) -> object:
        tokens, labels = next(batches)
        lowest.clear()
        loss = s.loss(s.logits(model, tokens), tokens, labels)
        return torch.autograd.grad(loss, lowest)

    return step


def private(
    s: Setting, model: nn.Module, device: torch.device, compiled: bool = False, **options: Any
) -> Step:
    """This library's private step, once the probe of the first batches is over."""
    _convert(s, model, **options)
    if compiled:
        model.compile()
    model, optimizer, loader = ffa.PrivacyEngine().make_private(
        module=model, optimizer=_adamw(model), data_loader=_loader(s), noise_multiplier=NOISE,
        max_grad_norm=CLIP, poisson_sampling=False,
    )  # fmt: skip
    step = _plain(s, model, optimizer, _forever(loader, device))
    for i in range(PROBED):
        step(i)
    return step


def private_compiled(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, compiled=True)


def private_bf16_compiled(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, compiled=True, base_dtype="bf16")


def private_int8_compiled(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, compiled=True, base_dtype="int8")


def private_bf16(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, base_dtype="bf16")


def private_int8(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, base_dtype="int8")


def private_dropout(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return private(s, model, device, dropout=DROPOUT)


def not_private(s: Setting, model: nn.Module, device: torch.device) -> Step:
    """This library's layers in an ordinary training loop."""
    _convert(s, model)
    return _plain(s, model, _adamw(model), _forever(_loader(s), device))


def peft(s: Setting, model: nn.Module, device: torch.device) -> Step:
    adapted = _peft(s, model, train_A=True)
    return _plain(s, adapted, _adamw(adapted), _forever(_loader(s), device))


def peft_B(s: Setting, model: nn.Module, device: torch.device, dropout: float = 0.0) -> Step:
    adapted = _peft(s, model, train_A=False, dropout=dropout)
    return _plain(s, adapted, _adamw(adapted), _forever(_loader(s), device))


def peft_B_dropout(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return peft_B(s, model, device, DROPOUT)


def by_hand(s: Setting, model: nn.Module, device: torch.device) -> Step:
    """LoRA's backward written out over BLAS and in-place addmm, as Unsloth's; A and B trained."""
    for name in s.targets(model):
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, _ByHand(model.get_submodule(name), s.r))
    return _plain(s, model, _adamw(model), _forever(_loader(s), device))


def opacus(
    s: Setting,
    model: nn.Module,
    device: torch.device,
    mode: str = "hooks",
    autocast: torch.dtype | None = None,
) -> Step:
    from opacus import PrivacyEngine

    adapted = _peft(s, model, train_A=False)
    settings: dict[str, Any] = {"grad_sample_mode": mode}
    if mode == "ghost":
        settings["criterion"] = nn.CrossEntropyLoss()
    made = PrivacyEngine().make_private(
        module=adapted, optimizer=_adamw(adapted), data_loader=_loader(s), noise_multiplier=NOISE,
        max_grad_norm=CLIP, poisson_sampling=False, **settings,
    )  # fmt: skip
    if mode != "ghost":
        return _plain(s, made[0], made[1], _forever(made[2], device), autocast)
    adapted, optimizer, criterion, loader = made
    batches = _forever(loader, device)

    def step(_: int) -> object:
        tokens, labels = next(batches)
        inputs, targets = s.flat(s.logits(adapted, tokens), tokens, labels)
        shape = (len(tokens), s.length - 1) if s.causal else None
        criterion(inputs, targets, shape=shape).backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


def opacus_bf16(s: Setting, model: nn.Module, device: torch.device) -> Step:
    """Forward under bf16 autocast. Opacus then has gradients in bf16, which parameters in fp32 take
    only when told to."""
    step = opacus(s, model, device, autocast=torch.bfloat16)
    for p in model.parameters():
        if p.requires_grad:
            p.grad_dtype = None
    return step


def opacus_functorch(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return opacus(s, model, device, "functorch")


def opacus_ghost(s: Setting, model: nn.Module, device: torch.device) -> Step:
    return opacus(s, model, device, "ghost")


def fastdp(s: Setting, model: nn.Module, device: torch.device) -> Step:
    from fastDP import PrivacyEngine

    adapted = _peft(s, model, train_A=False)
    optimizer = _adamw(adapted)
    engine = PrivacyEngine(
        adapted, batch_size=s.n, sample_size=64 * s.n, epochs=1, noise_multiplier=NOISE,
        max_grad_norm=CLIP, clipping_mode="MixOpt", clipping_fn="Abadi",
    )  # fmt: skip
    engine.attach(optimizer)
    return _plain(s, adapted, optimizer, _forever(_loader(s), device))


def dp_lora(s: Setting, model: nn.Module, device: torch.device) -> Step:
    from dp_lora.privacy_engine import DPLoRAEngine

    engine = DPLoRAEngine()
    adapted = _peft(s, model, train_A=False)
    adapted, optimizer, loader = engine.make_private(
        model=adapted, optimizer=_adamw(adapted), data_loader=_loader(s), noise_multiplier=NOISE,
        max_grad_norm=CLIP, method="ffa", poisson_sampling=False,
    )  # fmt: skip
    batches = _forever(loader, device)

    def step(_: int) -> object:
        tokens, labels = next(batches)
        s.loss(s.logits(adapted, tokens), tokens, labels).backward()
        optimizer.step(engine.grad_sample_module.get_per_sample_grads())
        engine.grad_sample_module.clear_per_sample_grads()
        return optimizer.zero_grad()

    return step


FLOOR, OURS, PEFT_B = "floor", "ffa_kernels, private", "PEFT, B alone (not private)"
FLOOR_BY_OURS = "floor, this library's products (not private)"
NEEDED = "floor, to the lowest adapters (not private)"
SUBJECTS: dict[str, tuple[Callable[[Setting, nn.Module, torch.device], Step], str]] = {
    OURS: (private, "ffa_kernels"),
    NEEDED: (passes_needed, "torch"),
    FLOOR_BY_OURS: (floor_by_ours, "ffa_kernels"),
    "ffa_kernels (not private)": (not_private, "ffa_kernels"),
    PEFT_B: (peft_B, "peft"),
    "PEFT, A and B (not private)": (peft, "peft"),
    "by hand, A and B (not private)": (by_hand, "torch"),
    "Opacus, hooks": (opacus, "opacus"),
    "Opacus, functorch": (opacus_functorch, "opacus"),
    "Opacus, ghost": (opacus_ghost, "opacus"),
    "fastDP": (fastdp, "fastDP"),
    "dp-lora": (dp_lora, "dp_lora"),
    "ffa_kernels, private, bf16 base": (private_bf16, "ffa_kernels"),
    "ffa_kernels, private, int8 base": (private_int8, "ffa_kernels"),
    "Opacus, hooks, bf16 autocast": (opacus_bf16, "opacus"),
    "floor, torch.compile (not private)": (floor_compiled, "torch"),
    "ffa_kernels, private, torch.compile": (private_compiled, "ffa_kernels"),
    "ffa_kernels, private, bf16 base, torch.compile": (private_bf16_compiled, "ffa_kernels"),
    "ffa_kernels, private, int8 base, torch.compile": (private_int8_compiled, "ffa_kernels"),
    f"ffa_kernels, private, dropout {DROPOUT}": (private_dropout, "ffa_kernels"),
    f"PEFT, B alone, dropout {DROPOUT} (not private)": (peft_B_dropout, "peft"),
}
# What the quick suite has.
QUICK = (OURS, FLOOR_BY_OURS, PEFT_B, "Opacus, hooks", "Opacus, ghost", "fastDP", "dp-lora",
         "ffa_kernels, private, bf16 base", "Opacus, hooks, bf16 autocast")  # fmt: skip


def names(suite: str) -> list[str]:
    """The subjects that are installed."""
    return [
        name
        for name, (_, package) in SUBJECTS.items()
        if find_spec(package) is not None and (suite == "full" or name in QUICK)
    ]


def make(name: str, s: Setting, model: nn.Module, device: torch.device) -> Step:
    """The step of the subject `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SUBJECTS[name][0](s, model, device)


def _convert(s: Setting, model: nn.Module, **options: Any) -> None:
    ffa.convert(model, r=s.r, alpha=2 * s.r, target_modules=s.targets(model), **options)


def _peft(s: Setting, model: nn.Module, train_A: bool, dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=s.r, lora_alpha=2 * s.r, lora_dropout=dropout, target_modules=s.targets(model)
    )
    adapted: nn.Module = get_peft_model(model, settings).train()
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora_B" in name or (train_A and "lora_A" in name))
    return adapted


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def _plain(
    s: Setting,
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    autocast: torch.dtype | None = None,
) -> Step:
    def step(_: int) -> object:
        tokens, labels = next(batches)
        with torch.autocast(tokens.device.type, autocast, enabled=autocast is not None):
            loss = s.loss(s.logits(model, tokens), tokens, labels)
        loss.backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


class _ByHand(nn.Module):
    def __init__(self, frozen: nn.Module, r: int) -> None:
        super().__init__()
        self.frozen, W = frozen, frozen.weight
        like: dict[str, Any] = {"device": W.device, "dtype": W.dtype}
        self.A = nn.Parameter(torch.randn(r, W.shape[1], **like) / W.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(W.shape[0], r, **like))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _LoRA.apply(x, self.frozen.weight, self.frozen.bias, self.A, self.B)
        return made


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, W, b)
        y.addmm_(rows @ A.t(), B.t(), alpha=2.0)
        ctx.save_for_backward(x, W, A, B)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        u = g_rows @ B
        dA = (u.t() @ rows).mul_(2.0)
        dB = (g_rows.t() @ (rows @ A.t())).mul_(2.0)
        dx = g_rows @ W
        dx.addmm_(u, A, alpha=2.0)
        return dx.view(x.shape), None, None, dA, dB
