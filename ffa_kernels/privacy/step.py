"""The private step of one model: taps at the start of a batch, clipped sums, one noised update."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels import ops
from ffa_kernels.backends.grid import zero_sums
from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn.record_taps import RecordTaps
from ffa_kernels.privacy.adaptive import AdaptiveClipping, check_bound
from ffa_kernels.privacy.guard import Guard
from ffa_kernels.privacy.keys import SecretStream, drawn_since_seeding, seeds_are_secret
from ffa_kernels.privacy.ledger import Ledger
from ffa_kernels.privacy.probe import Probe
from ffa_kernels.privacy.ranks import Ranks
from ffa_kernels.privacy.sampling import Piece


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its qualified name, and where the layers that hold it look for taps."""

    name: str
    parameter: nn.Parameter
    holders: tuple[tuple[RecordTaps, str], ...]


@dataclass(frozen=True)
class Mechanism:
    """What one logical step releases: sum of clipped gradients + noise, over L.

    `max_grad_norm` holds one bound (flat) or one a tensor (per layer); the noise has standard
    deviation `noise_multiplier` times the root of the sum of their squares.

    Gradients come multiplied by `loss_scale` S, a power of two. They are clipped at S C on a grid S
    times as wide, and the noised sum is divided by S L: the bits of S = 1, but for what then
    neither over- nor underflows.

    With `adaptive`, a count of the records within the bound is released beside them, of which the
    next step's bound is made; `noise_multiplier` is that of the two together.
    """

    noise_multiplier: float
    max_grad_norm: tuple[float, ...]
    per_layer: bool
    expected_batch_size: float
    sample_rate: float
    poisson: bool
    keep_grad_sample: bool
    loss_scale: float = 1.0
    adaptive: AdaptiveClipping | None = None

    @property
    def gradient_noise(self) -> float:
        """The noise multiplier of the gradients alone."""
        if self.adaptive is None:
            return self.noise_multiplier
        return self.adaptive.gradient_noise(self.noise_multiplier, self.expected_batch_size)

    def after(self, doubled_count: int, gaussian: float) -> Mechanism:
        """That of the next step: this one releases the count with this Gaussian."""
        assert self.adaptive is not None
        noised = self.adaptive.noised(
            doubled_count, gaussian, self.noise_multiplier, self.expected_batch_size
        )
        (bound,) = self.max_grad_norm
        bound = self.adaptive.next_bound(bound, noised, self.expected_batch_size)
        return replace(self, max_grad_norm=(bound,))

    @property
    def scaled_bounds(self) -> tuple[float, ...]:
        """The bounds on gradients as they come, S C."""
        return tuple(self.loss_scale * c for c in self.max_grad_norm)

    @property
    def clips_in_backward(self) -> bool:
        """Per layer, a tensor's gradients are clipped as soon as they are whole, then freed."""
        return self.per_layer and not self.keep_grad_sample


class Plan:
    """So many steps that end at a target epsilon, if nothing else is charged to the ledger."""

    def __init__(self, ledger: Ledger, steps: int, target_epsilon: float) -> None:
        self._ledger, self._steps, self._target = ledger, steps, target_epsilon
        self._charged = ledger.steps

    def check(self, done: int) -> None:
        """Raises PrivacyError unless step `done` + 1 was reckoned with."""
        if done >= self._steps:
            raise PrivacyError(
                f"target_epsilon {self._target:g} is spent: the noise was chosen for "
                f"{self._steps} steps, which are done; accepted: make_private_with_epsilon with "
                "a larger target, or more epochs from the start"
            )
        if self._ledger.steps != self._charged + done:
            raise PrivacyError(
                "the ledger was charged for something else since make_private_with_epsilon, so "
                f"target_epsilon {self._target:g} would not hold; accepted: call it again"
            )


@dataclass(frozen=True)
class _Whole:
    """A draw of one physical batch, not clipped yet: gradients, known norms, who is kept."""

    grads: list[Tensor]
    squares: list[Tensor]
    keep: Tensor | None


class PrivateStep:
    """Gathers the per-record gradients of a model's trained tensors, clips, sums and releases.

    Args:
        trained: the tensors, in the order that decides their noise streams.
        mechanism: clipping, noise and divisor.
        noise_state: int64 (5,), the noise's key and step.
        stream: whose lock is held while they are used.
        charge: called once a logical step, before anything is released.
        guard: looks at the model before each release.
        ranks: the processes that make each step together, if there are others.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        mechanism: Mechanism,
        noise_state: Tensor,
        stream: SecretStream,
        charge: Callable[[], None],
        guard: Guard,
        ranks: Ranks | None = None,
    ) -> None:
        self.trained, self.mechanism = list(trained), mechanism
        self.guard, self.ranks = guard, ranks
        self.detached = False
        self.steps = 0
        self.plan: Plan | None = None
        self.probe: Probe | None = None
        self._noise_state, self._stream, self._charge = noise_state, stream, charge
        self._sums = zero_sums([t.parameter for t in self.trained], mechanism.scaled_bounds)
        self._stats = torch.zeros(2, dtype=torch.int64, device=self._sums[0].device)
        # Of the draw under way, for adaptive clipping: records within the bound less those beyond.
        self._count: Tensor | None = None
        if mechanism.adaptive is not None:
            self._count = torch.zeros((), dtype=torch.int64, device=self._sums[0].device)
        self._piece: Piece | None = None
        # The draw under way, None if it was given up; and the last of which a batch was dropped.
        self._draw: int | None = None
        self._dropped_draw: int | None = None
        self._dropped = False
        # Whether a gradient of the batch under way has arrived, even if it was dropped.
        self._ran = False
        self._keep: Tensor | None = None
        self._taps: list[Tensor] = []
        self._norm_taps: list[Tensor | None] = []
        # The gradient that arrived last, and its version then: norms of another are not its own.
        self._arrived: dict[int, tuple[Tensor, int]] = {}
        self._clipped: set[int] = set()
        self._whole: _Whole | None = None
        # Of the draw under way: who got a gradient, and whether there was a record.
        self._reached: set[int] = set()
        self._records = False
        self._forms = [(t.parameter.device, t.parameter.dtype) for t in self.trained]
        # Of B alone: its op has the norms at hand.
        self._knows_norms = [all(n == "lora_B" for _, n in t.holders) for t in self.trained]
        # Whether the sums may hold something.
        self._summed = False

    def _bound(self, k: int) -> float:
        bounds = self.mechanism.scaled_bounds
        return bounds[k if self.mechanism.per_layer else 0]

    @property
    def stats(self) -> dict[str, int]:
        """Steps released, (record, group) pairs scaled down, and dropped as not finite.

        The last two come from private records without noise: not covered by epsilon.
        """
        clipped, dropped = self._stats.tolist()
        return {"steps": self.steps, "clipped": clipped, "dropped": dropped}

    @property
    def piece(self) -> Piece | None:
        """The physical batch under way, from its announcement until `step()`."""
        return self._piece

    def begin(self, piece: Piece) -> bool:
        """Starts a physical batch: every trained tensor gets a fresh tap of `piece.records` rows.

        Returns:
            Whether the batch is to be run: not if another batch of its draw was dropped, for what
            is left of that is no Poisson sample.

        Raises:
            PrivacyError: the last batch's gradients were neither used nor dropped, or the draw
                that this is a part of was given up.
        """
        if self.detached:
            raise PrivacyError("this loader's model was made private again; use the newer loader")
        # A zero_grad() before anything was run with a batch dropped none of it: loops that read
        # ahead begin so, and would train on one batch by what is known of the next.
        ran = self._ran or any(taps.used for t in self.trained for taps, _ in t.holders)
        if self._piece is not None and not (self._dropped and ran):
            raise PrivacyError(
                "a batch begins, but the last one was not stepped: call optimizer.step() after "
                "each batch (or, to drop it and its draw, zero_grad() after its forward or "
                "backward), and do not read batches ahead, for what is announced is the batch that "
                "the model gets next. To add up several batches in one update, give the loader "
                "their whole size and make_private max_physical_batch_size="
            )
        if self._piece is not None:
            self._dropped_draw = self._piece.draw
            self.abandon()
        if piece.draw == self._dropped_draw:
            return False
        if not piece.first and piece.draw != self._draw:
            raise PrivacyError(
                "a batch goes on with a draw that was given up, by an error or by another "
                "iteration of the loader that has begun: what is summed now is no part of it; "
                "accepted: one iteration at a time, and a new one after an error"
            )
        for t, form in zip(self.trained, self._forms, strict=True):
            p = t.parameter
            if p.device != form[0] or p.dtype != form[1]:
                raise PrivacyError(
                    f"{t.name}: is {p.dtype} on {p.device}, and was {form[1]} on {form[0]} when "
                    "made private; accepted: model.to(...) before make_private"
                )
        if piece.first:
            # What an abandoned draw left behind was not released, and must not be.
            self._forget()
        self._piece, self._draw, self._dropped, self._ran = piece, piece.draw, False, False
        self._records = self._records or piece.kept > 0
        self._whole = None
        if self.probe is not None:
            self.probe.begin()
        self._clipped.clear()
        self._arrived.clear()
        device = self._sums[0].device
        self._keep = None
        if piece.kept < piece.records:
            self._keep = torch.arange(piece.records, device=device) < piece.kept
        self._taps, self._norm_taps = [], []
        self_ref = weakref.ref(self)
        n = piece.records
        # Each from one element. Tensors of one form and shape are alike.
        kinds = {(f, t.parameter.shape) for t, f in zip(self.trained, self._forms, strict=True)}
        zeros = {
            (form, shape): torch.zeros((), device=form[0], dtype=form[1]).expand(n, *shape)
            for form, shape in kinds
        }
        norm_zeros = {
            d: torch.zeros((), device=d, dtype=torch.float64).expand(2, n)
            for d, _ in set(self._forms)
        }
        for k, t in enumerate(self.trained):
            p, form = t.parameter, self._forms[k]
            p.grad_sample = None  # type: ignore[attr-defined]
            # A leaf of its own for each batch: a graph of an earlier one ends in its own.
            tap = zeros[form, p.shape].detach().requires_grad_()
            hook = functools.partial(_arrived, self_ref, k)
            tap.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._taps.append(tap)
            norm_tap = None
            if self._knows_norms[k]:
                norm_tap = norm_zeros[form[0]].detach().requires_grad_()
            self._norm_taps.append(norm_tap)
            for record_taps, name in t.holders:
                record_taps.taps[name] = tap
                record_taps.packed = record_taps.cu_seqlens is not None
                record_taps.used = record_taps.narrowed = False
                if norm_tap is not None:
                    record_taps.norm_taps[name] = norm_tap
        return True

    def arrived(self, k: int, tap: Tensor) -> None:
        """The gradient of tensor k for each record is in `tap.grad`, whole for this backward."""
        if k >= len(self._taps) or tap is not self._taps[k]:
            # A graph of an earlier batch: its records are not this batch's.
            tap.grad = None
            return
        self._dropped, self._ran = False, True
        assert tap.grad is not None
        trained = self.trained[k]
        if not self.mechanism.clips_in_backward:
            self._arrived[k] = (tap.grad, tap.grad._version)
            trained.parameter.grad_sample = tap.grad  # type: ignore[attr-defined]
            return
        grad, tap.grad = tap.grad, None
        if k in self._clipped:
            self.abandon()
            raise PrivacyError(
                f"{trained.name}: a second gradient in one batch, after the first was clipped and "
                "freed (a layer used in several checkpointed segments, or a second backward): "
                'accepted: clipping="flat", or keep_grad_sample=True'
            )
        self._clipped.add(k)
        self._reached.add(k)
        assert grad is not None
        self._summed = True
        ops.clip_accumulate([grad], [self._sums[k]], self._stats, self._keep, [self._bound(k)])

    def drop(self) -> None:
        """Forgets the gradients that were not clipped yet. Where the next batch begins before they
        are made again, their draw is given up."""
        self._dropped = True
        self._arrived.clear()
        for tap, norm_tap, t in zip(self._taps, self._norm_taps, self.trained, strict=False):
            tap.grad = None
            if norm_tap is not None:
                norm_tap.grad = None
            t.parameter.grad_sample = None  # type: ignore[attr-defined]
            t.parameter.grad = None

    def _end_batch(self) -> None:
        self.drop()
        self._taps, self._norm_taps, self._piece = [], [], None
        for t in self.trained:
            for record_taps, name in t.holders:
                record_taps.taps.pop(name, None)
                record_taps.norm_taps.pop(name, None)

    def abandon(self) -> None:
        """Forgets the draw under way, the sum of its earlier pieces included."""
        self._end_batch()
        self._whole, self._draw = None, None
        self._forget()

    def _forget(self) -> None:
        if self._summed:
            for total in self._sums:
                total.zero_()
            self._summed = False
        if self._count is not None:
            self._count.zero_()
        self._reached.clear()
        self._records = False

    def clip_at(self, max_grad_norm: object) -> None:
        """Adaptive clipping goes on from this bound, which another run of it has come to.

        Raises:
            ConfigError: no bound that it takes.
            PrivacyError: records of the draw under way were clipped at another.
        """
        bound = check_bound(max_grad_norm)
        if self._reached:
            raise PrivacyError(
                "load_state_dict in the middle of a draw, part of which is clipped at the bound "
                "that was; accepted: before the loop, or after a step"
            )
        self.mechanism = replace(self.mechanism, max_grad_norm=(bound,))

    def restart(self, alone: bool = True) -> None:
        """A new iteration of the data begins: what was under way is not released.

        Args:
            alone: no other iteration of the loader can go on.

        Raises:
            PrivacyError: another can, and its batch might be trained on as if it were this one's.
        """
        if self.detached:
            return
        if not alone:
            self.abandon()
            raise PrivacyError(
                "an iteration of the loader begins while another one is under way, so that it is "
                "not known whose batch the model gets next; accepted: one at a time (to look at "
                "records, a loader of your own; an iterator that is not wanted any more, deleted)"
            )
        self.abandon()
        self.end_epoch()

    def end_epoch(self) -> None:
        """Reads the values that the guard compares; on several ranks, also each other's.

        Raises:
            PrivacyError: the guard says so, or trained tensors differ between the ranks.
        """
        if self.detached or not self.guard.pending:
            return
        self._warn_unless_probed()
        if self.ranks is None:
            self.guard.check()
            return

        def checked() -> dict[str, int | None]:
            self.guard.check()
            return self.guard.trained_values()

        first, *others = self.ranks.together(checked)
        for rank, values in enumerate(others, start=1):
            for name, value in values.items():
                if value != first[name]:
                    raise PrivacyError(
                        f"{name}: differs between rank 0 and rank {rank}: something other than "
                        "the private step has moved it, or learning rates differ; accepted: the "
                        "same program on every rank"
                    )

    def check(self, saving: bool = False) -> None:
        """The guard's check on this process, unless the model has another step by now."""
        if not self.detached:
            self._warn_unless_probed()
            self.guard.check(saving)

    def _warn_unless_probed(self) -> None:
        if self.probe is not None:
            self.probe.warn_unless_concluded()

    def detach(self) -> None:
        """Ends this step's life: the model belongs to another engine from now on."""
        self.abandon()
        self.detached = True
        # Nothing is summed any more; what was counted stays.
        self._stats = self._stats.cpu()
        self._sums = [total.new_zeros(0) for total in self._sums]
        if self.probe is not None:
            self.probe.end()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise PrivacyError(
            "a private step holds the noise's key and cannot be copied or pickled; save "
            "optimizer.state_dict(), and call make_private on the copy's own model"
        )

    def accumulate(self) -> bool:
        """Clips the batch's gradients, adds them; True when the draw is whole.

        Raises:
            PrivacyError: nothing to clip, or a gradient came by a way around the taps.
        """
        if self.detached:
            raise PrivacyError("this optimizer's model was made private again; use the newer one")
        if self._piece is None:
            raise PrivacyError(
                "optimizer.step() without a batch: iterate the loader that make_private returned, "
                "and call step() once for each batch it yields"
            )
        for t in self.trained:
            if t.parameter.grad is not None:
                self.abandon()
                raise PrivacyError(
                    f"{t.name}: its gradient came to .grad, summed over records: the tensor is "
                    "used outside the layer that owns it, so records cannot be clipped"
                )
        present = [k for k, tap in enumerate(self._taps) if tap.grad is not None]
        if not present and not self._clipped:
            raise PrivacyError(
                "optimizer.step() without gradients: call loss.backward() first, on a forward "
                "made in training mode (model.train())"
            )
        if self._stream.seed is None and not seeds_are_secret() and drawn_since_seeding():
            self.abandon()
            raise PrivacyError(
                "PyTorch's generators were seeded within this batch, and have drawn since: dropout "
                "masks that others can make too follow the order of the records, and one record "
                "more would give all after it others; accepted: seeding before make_private, or "
                "for tests PrivacyEngine(seed=)"
            )
        if self.probe is not None:
            try:
                self.probe.run(self._piece.kept)
            except PrivacyError:
                self.abandon()
                raise
        piece = self._piece
        self._reached.update(present)
        grads = [grad for k in present if (grad := self._taps[k].grad) is not None]
        squares = [self._squares(k, piece.records) for k in present]
        whole = piece.first and piece.last and len(present) == len(self.trained)
        try:
            # First: an interrupt may come once the sum has grown, and the batch must not be there
            # to be added again.
            self._end_batch()
            if whole and self.ranks is None:
                # All there is of this draw: clipped, summed and noised in one op, by `release`.
                self._whole = _Whole(grads, squares, self._keep)
            elif present:
                bounds = self.mechanism.scaled_bounds
                self._summed = True
                factors = ops.clip_accumulate(
                    grads,
                    [self._sums[k] for k in present],
                    self._stats,
                    self._keep,
                    [bounds[k] for k in present] if self.mechanism.per_layer else list(bounds),
                    squares=squares,
                )
                if self._count is not None:
                    self._count += _within_less_beyond(factors)
        except BaseException:
            self.abandon()
            raise
        return piece.last

    def _squares(self, k: int, records: int) -> Tensor:
        """What backward knows of tensor k's norms; "no call" where that is not the gradient's."""
        norm_tap, grad = self._norm_taps[k], self._taps[k].grad
        seen, version = self._arrived.get(k, (None, 0))
        if norm_tap is None or norm_tap.grad is None or seen is not grad or seen is None:
            known = None
        else:
            known = norm_tap.grad if seen._version == version else None
        if known is None:
            device = self._sums[k].device
            return torch.zeros((), dtype=torch.float64, device=device).expand(2, records)
        return known

    def release(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        hyper: Tensor,
        optimizer: str,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        """Charges the ledger, then adds noise and updates `params`; see `ops.private_update`.

        On several ranks their sums are added first, and rank 0 alone charges.
        """
        if self._noise_state.is_cuda and torch.cuda.is_current_stream_capturing():
            raise PrivacyError(
                "a private step is being captured in a CUDA graph: its replays would release "
                "without a charge to the ledger; capture forward and backward, and call step() "
                "after each replay"
            )
        self._look_and_add()
        if self.ranks is None:
            self._check_and_charge()
        else:
            self.ranks.charged(self._check_and_charge, self._sums[0].device)
            if not self.ranks.leads:
                self._charge()
        self.steps += 1
        whole, self._whole = self._whole, None
        settings: dict[str, Any] = {
            "tensor_ids": list(range(len(self.trained))),
            "max_grad_norm": list(self.mechanism.scaled_bounds),
            "noise_multiplier": self.mechanism.gradient_noise,
            "expected_batch_size": self.mechanism.loss_scale * self.mechanism.expected_batch_size,
            "optimizer": optimizer,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        update = (exp_avgs, exp_avg_sqs, steps, self._noise_state, hyper)
        with self._stream.lock, torch.no_grad():
            # On a GPU the state is not read: one launch uses it, and counts on by itself.
            drawn = int(self._noise_state[4]) if self._noise_state.device.type == "cpu" else None
            gaussian: Tensor | None = None
            if self._count is not None:
                # Of this step, which the update counts on, and of an id that no tensor has.
                gaussian = ops.gaussian(self._noise_state, len(self.trained), 1, torch.float64)
            try:
                if whole is None:
                    ops.private_update(params, self._sums, *update, **settings)
                else:
                    factors = ops.private_step(
                        *(whole.grads, self._stats, whole.keep, params, *update),
                        squares=whole.squares,
                        **settings,
                    )
                    if self._count is not None:
                        self._count += _within_less_beyond(factors)
            finally:
                # Interrupted halfway, some tensors have shown this step's noise: never draw it
                # again.
                if drawn is not None:
                    self._noise_state[4] = drawn + 1
        if self._count is not None and gaussian is not None:
            # The next step's bound: here the host waits for the device.
            self.mechanism = self.mechanism.after(int(self._count), float(gaussian))
            self._count.zero_()

    def _look_and_add(self) -> None:
        """The guard's look at this process, and the other ranks' sums; or all ranks stop."""
        error: PrivacyError | None = None
        try:
            self.guard.look()
        except PrivacyError as raised:
            error = raised
        try:
            if self.ranks is not None:
                counts = [] if self._count is None else [self._count]
                self._summed = True
                self.ranks.add([*self._sums, *counts], self.steps, error is not None)
                # Where one fails, the others stopped in `add`.
                if counts and error is None:
                    self.ranks.check_bound(self.mechanism.max_grad_norm[0], counts[0].device)
            if error is not None:
                raise error
        except BaseException:
            self.abandon()
            raise

    def _check_and_charge(self) -> None:
        if self.plan is not None:
            self.plan.check(self.steps)
        self._charge()

    def released(self, moving: Sequence[bool | None]) -> None:
        """The update is made; `moving`: see `Guard.released`."""
        self.guard.released(self._reached, self._records, moving)
        self._reached.clear()
        self._records = False


def _within_less_beyond(factors: Tensor) -> Tensor:
    """The sum of 2 b_i - 1 over the records that are used: a factor of 0 is none of theirs."""
    return (factors == 1).sum() - ((factors > 0) & (factors < 1)).sum()


def _arrived(step_ref: weakref.ref[PrivateStep], k: int, tap: Tensor) -> None:
    # A tap must not keep its step alive: graphs may outlive the training.
    step = step_ref()
    if step is not None:
        step.arrived(k, tap)
