"""PrivateOptimizer: the user's optimizer, stepped with clipped and noised gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ffa_kernels.errors import PrivacyError, UnsupportedError
from ffa_kernels.privacy.step import PrivateStep

_SHARED_FLAGS = ("nesterov", "maximize", "decoupled_weight_decay")


class PrivateOptimizer(Optimizer):
    """Stands for `optimizer`: the same groups, state and state_dict, a private step.

    torch.amp.GradScaler is refused: it skips steps and changes its scale by what private gradients
    hold. `make_private(loss_scale=)` and `scale(loss)` are what fp16 is trained with here.

    `step()` on a piece of a draw that is not the last clips and accumulates only; on the last it
    charges the ledger, adds noise and updates. SGD, Adam and AdamW run fused in one op; for any
    other optimizer the noised gradient is put into `.grad` and its own step is called.

    Args:
        optimizer: the optimizer that holds the trained tensors.
        private_step: what clips, sums and releases.
    """

    def __init__(self, optimizer: Optimizer, private_step: PrivateStep) -> None:
        self.original_optimizer = optimizer
        self.private_step = private_step
        self._hyper: tuple[list[list[float]], Tensor] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's own groups."""
        # All ways of a GradScaler to an optimizer's gradients lead through this method of its,
        # which has no other hook. Were it ever renamed, the scaler itself refuses to step without
        # a .grad to look at.
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":
            raise PrivacyError(
                "GradScaler: a dynamic loss scale skips steps and changes by what private "
                "gradients hold, without noise, and a private step may do neither; accepted: "
                "make_private(..., loss_scale=1024.0, say) and optimizer.scale(loss).backward(), "
                "or bfloat16, which needs no scale"
            )
        return self.original_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's own state."""
        return self.original_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's own defaults."""
        return self.original_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state_dict; before a save, the guard reads the model's values.

        Raises:
            PrivacyError: see `PrivacyEngine.check`.
        """
        self.private_step.check(saving=True)
        return self.unchecked_state_dict()

    def unchecked_state_dict(self) -> dict[str, Any]:
        """`state_dict()` of a model that was checked just now."""
        state: dict[str, Any] = self.original_optimizer.state_dict()
        if self.private_step.mechanism.adaptive is not None:
            state["max_grad_norm"] = self.max_grad_norm
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of the optimizer's own type; adaptive clipping goes on from its C.

        Raises:
            ConfigError: its C is none.
            PrivacyError: the draw under way is clipped in part; nothing was loaded then.
        """
        held = state_dict.get("max_grad_norm")
        if held is not None and self.private_step.mechanism.adaptive is not None:
            self.private_step.clip_at(held)
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the set of clipped tensors is fixed by make_private."""
        raise UnsupportedError("add_param_group: add the group before make_private")

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"Private({self.original_optimizer!r})"

    @property
    def max_grad_norm(self) -> float | list[float]:
        """The bound C on a record's gradient in the step to come; of each tensor if per layer.

        It changes with each step of adaptive clipping, is made of what was released, and is kept
        in `state_dict()` then.
        """
        mechanism = self.private_step.mechanism
        bounds = mechanism.max_grad_norm
        return list(bounds) if mechanism.per_layer else bounds[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the last batch's gradients. Where the next batch begins before they are made again,
        all of its draw is given up: the sum of the batches before it, and those that follow."""
        self.private_step.drop()

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times make_private's `loss_scale`, to call backward on."""
        factor = self.private_step.mechanism.loss_scale
        return loss if factor == 1.0 else loss * factor

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One physical batch: clip and accumulate; at the draw's end, noise and update.

        Args:
            closure: recomputes the loss (forward and backward) first, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            PrivacyError: no batch, no gradients, or gradients that came around the clipping.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_strays()
        if self.private_step.accumulate():
            self._release()
        return loss

    def _refuse_strays(self) -> None:
        trained = {id(t.parameter) for t in self.private_step.trained}
        held = [p for group in self.param_groups for p in group["params"]]
        strays = [tuple(p.shape) for p in held if id(p) not in trained and p.grad is not None]
        if strays:
            self.private_step.abandon()
            raise PrivacyError(
                f"the optimizer holds gradients, summed over records, of {len(strays)} tensors "
                f"that were frozen in make_private (shapes {strays[:3]}): call make_private again "
                "after unfreezing"
            )

    def _fused_kind(self, groups: list[dict[str, Any]]) -> str:
        kind = {SGD: "sgd", Adam: "adam", AdamW: "adamw"}.get(type(self.original_optimizer))
        groups = _distinct(groups)
        shared = all(
            group.get(flag, False) == groups[0].get(flag, False)
            for group in groups
            for flag in _SHARED_FLAGS
        )
        # SGD without momentum in one group and with it in another has no common buffer list.
        momenta = {group.get("momentum", 0) == 0 for group in groups}
        plain = all(not group.get("amsgrad", False) for group in groups)
        # Hooks on its step see gradients, and may change them: only its own step calls them.
        inner = self.original_optimizer
        plain = plain and not inner._optimizer_step_pre_hooks
        plain = plain and not inner._optimizer_step_post_hooks
        if not (kind and shared and plain and len(momenta) == 1):
            return "none"
        # Adam's own flag makes it AdamW.
        return "adamw" if groups[0].get("decoupled_weight_decay", False) else kind

    def _release(self) -> None:
        by_id = {id(p): group for group in self.param_groups for p in group["params"]}
        params: list[Tensor] = [t.parameter for t in self.private_step.trained]
        for t in self.private_step.trained:
            if id(t.parameter) not in by_id:
                self.private_step.abandon()
                raise PrivacyError(
                    f"{t.name}: the optimizer held it when made private, and does not any more; "
                    "accepted: make_private again with the new optimizer"
                )
        groups = [by_id[id(p)] for p in params]
        self._update(params, groups)
        moves = {id(group): _moves(group) for group in _distinct(groups)}
        self.private_step.released([moves[id(group)] for group in groups])

    def _update(self, params: list[Tensor], groups: list[dict[str, Any]]) -> None:
        kind = self._fused_kind(groups)
        if kind == "none":
            hyper = torch.zeros(len(params), 5, dtype=torch.float64, device=params[0].device)
            grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
            self.private_step.release(grads, [], [], [], hyper, kind)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            try:
                self.original_optimizer.step()
            finally:
                for p in params:
                    p.grad = None
            return
        hyper = self._hyper_table(groups, params[0].device)
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        states = self.state
        for p, group in zip(params, groups, strict=True):
            state = states[p]
            if kind != "sgd":
                exp_avgs.append(_buffer(state, "exp_avg", p))
                exp_avg_sqs.append(_buffer(state, "exp_avg_sq", p))
            elif group.get("momentum", 0) != 0:
                # PyTorch's SGD keeps no step count; a buffer of its making has begun already.
                begun = float("momentum_buffer" in state)
                _step_count(state, p, begun)
                exp_avgs.append(_buffer(state, "momentum_buffer", p))
            if kind == "sgd" and "step" not in state:
                steps.append(torch.zeros((), device=p.device))
                continue
            steps.append(_step_count(state, p, 0.0))
        self.private_step.release(
            params,
            exp_avgs,
            exp_avg_sqs,
            steps,
            hyper,
            kind,
            nesterov=bool(groups[0].get("nesterov", False)),
            maximize=bool(groups[0].get("maximize", False)),
        )

    def _hyper_table(self, groups: list[dict[str, Any]], device: torch.device) -> Tensor:
        """fp64 (K, 5) on `device`; uploaded when it changes, and a tensor lr is never read here."""
        lrs = [group["lr"] for group in groups]
        on_device = [_is_on_device(lr) for lr in lrs]
        of_group = {
            id(group): _hyper(group, _is_on_device(group["lr"])) for group in _distinct(groups)
        }
        rows = [of_group[id(group)] for group in groups]
        if self._hyper is None or self._hyper[0] != rows or self._hyper[1].device != device:
            table = torch.tensor(rows, dtype=torch.float64, pin_memory=device.type == "cuda")
            self._hyper = (rows, table.to(device, non_blocking=True))
        table = self._hyper[1]
        if any(on_device):
            table = table.clone()
            for row, lr, there in zip(table, lrs, on_device, strict=True):
                if there:
                    row[0].copy_(lr)
        return table


def _distinct(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group once, of a list that has one for each tensor."""
    return list({id(group): group for group in groups}.values())


def _is_on_device(lr: object) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _moves(group: dict[str, Any]) -> bool | None:
    """Whether this learning rate is not 0; None where there is none, or only a device knows it."""
    lr = group.get("lr")
    if lr is None or _is_on_device(lr):
        return None
    return float(lr) != 0.0


def _step_count(state: dict[str, Any], p: Tensor, begun: float) -> Tensor:
    """The optimizer's own count of steps, where the parameter is."""
    step = state.get("step")
    if not isinstance(step, Tensor) or step.device != p.device:
        state["step"] = torch.tensor(begun if step is None else float(step), device=p.device)
    count: Tensor = state["step"]
    return count


def _buffer(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if state.get(name) is None:
        state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    buffer: Tensor = state[name]
    return buffer


def _hyper(group: dict[str, Any], skip_lr: bool) -> list[float]:
    """A group's lr, weight decay, beta1 or momentum, beta2 or dampening, and eps."""
    first, second = group.get("betas", (group.get("momentum", 0.0), group.get("dampening", 0.0)))
    lr = 0.0 if skip_lr else group["lr"]
    values = (lr, group.get("weight_decay", 0.0), first, second, group.get("eps", 0.0))
    return [float(value) for value in values]
