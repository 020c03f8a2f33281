"""A site: its own records, model copy, optimizer and ledger; only noised updates leave it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ffa_kernels.errors import ConfigError, LedgerError, PrivacyError, WireError
from ffa_kernels.federated import wire
from ffa_kernels.federated.basis import Bases, basis_of, opens
from ffa_kernels.federated.config import Config, Train, site_of
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.wire import Header
from ffa_kernels.files import write_atomic
from ffa_kernels.memory.allocator import give_freed_memory_back
from ffa_kernels.memory.planning import plan
from ffa_kernels.privacy import AdaptiveClipping, PrivacyEngine, epsilon, noise_multiplier_for
from ffa_kernels.privacy.step import Plan

_log = logging.getLogger(__name__)

Batch = tuple[dict[str, Tensor], Tensor]

# A site that has lost most of its budget, in rounds that broke off say, would send noise alone.
_MOST_NOISE = 4.0
# So many times what records would need of which nothing was released is worth a word.
_MUCH_NOISE = 2.0
# What a state's file that is not as it was written makes the reader raise.
_DAMAGED = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError)


class Site:
    """One participant.

    Args:
        name: as in the configuration; messages carry it.
        records: its training records; their number is taken as public.
        model: the adapted model that all sites begin with; a copy is trained, which shares what is
            frozen. Where A is sent, the copy has an A of its own, and knows none until it has come.
        tokenizer: of the model, as transformers calls it.
        config: the federation's.
        run: the run's identifier; an update is kept under (run, round).
        folder: the site's own; updates and local log live there.
        ledger: the account of all that was ever released of these records; in `folder` by
            default, which suits data that are made for the run or public.
        seed: for tests: the noise and draws of a round follow from it, the site's name and the
            round; nothing is private then, and the ledger says so.

    A site that is opened again for the same run goes on with the noise and the optimizer's state
    that it had: it may live in one process for all rounds, or in a new one for each. Its ledger may
    have grown meanwhile; lines that the run has seen must be there.

    Raises:
        ConfigError: too few records, a delta too large for them, or a damaged state; nothing has
            been trained or charged then.
        PrivacyError: the ledger leaves no budget under the target.
        LedgerError: the ledger lacks what the run had charged to it: an older copy, or another.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        model: nn.Module,
        tokenizer: Any,
        config: Config,
        run: str,
        folder: Path,
        ledger: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        check_records(name, len(records), config)
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.records = len(records)
        self._config = config
        self._run = run
        self._folder = folder
        self._tokenizer = tokenizer
        self._fingerprint = wire.fingerprint(model)
        privacy = config.privacy
        self.batch_size = batch_size(config.train, len(records))
        self.sample_rate = self.batch_size / len(records)
        self._engine = PrivacyEngine(
            accountant=privacy.accountant,
            ledger=ledger or folder / "ledger.jsonl",
            new_ledger=privacy.new_ledger,
            seed=seed,
        )
        self._entry = site_of(config, name)
        self._device = torch.device("cpu" if self._entry is None else self._entry.device)
        if self._device.type == "cpu":
            own = copy_sharing_frozen(model, wire.frozen_A(model) if config.sends_A else ())
        else:
            own = _on(self._device, copy.deepcopy(model), name)
        self._own = own.train()
        self._tensors = wire.trained_tensors(self._own)
        self._rows = _by_length(records)
        self._moving: frozenset[str] | None = None
        self._ffa = config.federation.method == "ffa"
        self._lacks_A = config.sends_A
        self._bases = Bases.of(config, self._own)
        try:
            if config.sends_A and frozen_file(folder, run).exists():
                self._load_kept_A()
            self._fold_kept()
            self._state, self._unfit = self._begin()
            done = self._rounds_done()
            try:
                if done < config.federation.rounds:
                    self._ready(done + 1, config.federation.rounds - done)
            except PrivacyError:
                # What was made can be sent again all the same; a round that trains will say it.
                if not done:
                    raise
        except BaseException:
            self.close()
            raise

    def _load_A(self, message: bytes) -> None:
        """The model with the A of `message`; nothing is done if that does not fit (WireError)."""
        A = wire.frozen_A(self._own)
        received = wire.decode(message, self._header(wire.FROZEN, 0), A)
        for name, tensor in A.items():
            tensor.copy_(received[name])
        # Of what was loaded: a round's message must name the same.
        self._fingerprint = replace(self._fingerprint, recipe=wire.digest(A))
        # Only a new guard takes another A.
        self._moving, self._lacks_A = None, False

    def _load_kept_A(self) -> None:
        kept = frozen_file(self._folder, self._run)
        try:
            self._load_A(kept.read_bytes())
        except WireError as error:
            raise ConfigError(
                f"site {self.name!r}: {kept.name} is damaged ({error}); accepted: the file as it "
                "came, or none, and A is sent again"
            ) from error

    def _fold(self, number: int, message: bytes) -> None:
        """Begins basis `number` with the message that opens it; nothing is done if that does not
        fit (WireError)."""
        assert self._bases is not None
        B = self._opening(number, message)
        self._check_frozen()
        # First: what fails here is tried again, or, halfway, refused by the check above.
        self._bases.fold(self._own, number, B)
        self._bases.close(B)
        self._fingerprint = wire.fingerprint(self._own)
        # Only a new guard takes another W.
        self._moving = None

    def _opening(self, number: int, message: bytes) -> dict[str, Tensor]:
        """The tensors of the message that opens basis `number`: each B in full."""
        assert self._bases is not None
        told = self._config.federation
        header = self._bases.opening(number, self._run, told.weights, told.codec)
        head = {name: t for name, t in self._tensors.items() if not wire.is_adapter(name)}
        return wire.decode(message, header, {**self._bases.like, **head})

    def _fold_kept(self) -> None:
        for number in range(1, openings_kept(self._folder, self._run) + 1):
            kept = opening_file(self._folder, self._run, number)
            try:
                self._fold(number, kept.read_bytes())
            except WireError as error:
                raise ConfigError(
                    f"site {self.name!r}: {kept.name} is damaged ({error}); accepted: the file as "
                    "it came, or none, and it is sent again"
                ) from error

    def _received(
        self, round_: int, message: bytes, opening: Callable[[int], bytes] | None
    ) -> dict[str, Tensor]:
        """The trained tensors that a round begins with, once the model is in the round's basis."""
        bases, every = self._bases, self._config.federation.rebasis_every
        if bases is None:
            return wire.decode(message, self._header("global", round_), self._tensors)
        due = basis_of(every, round_)
        if due < bases.number:
            raise WireError(
                f"round: got {round_}, of basis {due}; accepted: rounds of basis {bases.number}, "
                "which this site has begun"
            )
        while bases.number < due:
            number = bases.number + 1
            if number == due and opens(every, round_):
                data = message
            elif opening is None:
                raise WireError(f"basis: {number} was opened without this site; accepted: opening=")
            else:
                data = opening(number)
            self._fold(number, data)
            write_atomic(opening_file(self._folder, self._run, number), data)
        if not opens(every, round_):
            return wire.decode(message, self._header("global", round_), self._tensors)
        received, folded = self._opening(due, message), bases.closed[due - 1]
        if not all(torch.equal(received[name], B) for name, B in folded.items()):
            raise WireError("lora_B: got another than was folded when the basis was opened")
        return {
            name: torch.zeros(tensor.shape) if wire.is_B(name) else received[name]
            for name, tensor in self._tensors.items()
        }

    @property
    def noise_multiplier(self) -> float:
        """Of the round that comes next."""
        return float(self._state["noise_multiplier"])

    def close(self) -> None:
        """Gives the ledger back to other processes; the site trains no more."""
        self._engine.ledger.close()

    def epsilon(self) -> float:
        """Spent so far, over all that the site's ledger holds, at the configured delta."""
        return self._engine.get_epsilon(self._config.privacy.target_delta)

    def _begin(self) -> tuple[dict[str, Any], bool]:
        """(the run's state at this site, whether its noise no longer keeps the target)."""
        ledger, state = self._engine.ledger, self._read_state()
        if not math.isinf(self._config.privacy.target_epsilon) and not (
            ledger.private or self._engine.seed is not None
        ):
            raise PrivacyError(
                f"site {self.name!r}: its ledger holds steps that were not private; no "
                "target_epsilon can be kept"
            )
        if state is None:
            return {
                **{"noise_multiplier": 0.0, "first_noise_multiplier": None},
                **{"until": 0, "optimizers": {}, "basis": 0, "ledger": None},
            }, True
        if state["ledger"] is not None:
            self._check_ledger(*state["ledger"])
        return state, not self._fits(state["noise_multiplier"], state["until"] - ledger.steps)

    def _check_ledger(self, checksum: str, steps: int) -> None:
        """Raises LedgerError where an older copy, or another ledger, would be short of steps."""
        try:
            self._engine.ledger.check_extends(checksum)
        except LedgerError as error:
            raise LedgerError(
                f"site {self.name!r}: {error}; it holds {self._engine.ledger.steps} steps; "
                f"accepted: the ledger that held {steps} when run {self._run} was last here, or "
                "what it has become since"
            ) from error

    def _rounds_done(self) -> int:
        """The last round that the run has an update of; those before it will not be asked again."""
        kept = self._folder.glob(f"update-{self._run}-*.safetensors")
        return max((int(path.stem.rpartition("-")[2]) for path in kept), default=0)

    def _ready(self, round_: int, rounds_left: int) -> None:
        """Makes the model private for a round, unless it is so already.

        Steps that were charged and lost, in a round that broke off say, come out of the budget: the
        noise is chosen anew then, for the rounds that are left.
        """
        steps = rounds_left * self._config.federation.local_steps
        method = self._config.federation.method
        moving = frozenset(n for n in self._tensors if wire.moves(n, method, round_))
        short = self._unfit or self._state["until"] - self._engine.ledger.steps < steps
        if short:
            self._renew(rounds_left)
            self._unfit = False
        # What does not move in this round has moved in others: only a new guard takes that.
        if short or moving != self._moving or len(moving) < len(self._tensors):
            self._prepare(moving)

    def _renew(self, rounds_left: int) -> None:
        """Chooses the noise that so many rounds, one or more, can have."""
        steps = rounds_left * self._config.federation.local_steps
        noise, first = self._solve_noise(steps), self._state["first_noise_multiplier"]
        if first is not None and noise > _MOST_NOISE * first:
            raise PrivacyError(
                f"site {self.name!r}: target_epsilon {self._config.privacy.target_epsilon:g} is "
                f"spent: the {steps} steps that are left would need noise {noise:.3g}, over "
                f"{_MOST_NOISE:g} times the {first:.3g} that the run began with, and harm the "
                "average; accepted: a larger target, or no part in these rounds"
            )
        self._state["noise_multiplier"] = noise
        if first is None:
            self._state["first_noise_multiplier"] = noise
            self._warn_of_much(noise, steps)
        self._state["until"] = self._engine.ledger.steps + steps
        self._write_state(self._state)

    def _prepare(self, moving: frozenset[str]) -> None:
        """Makes the model private, with a new guard, which takes what is frozen as it is.

        Raises:
            PrivacyError: a frozen tensor has moved since the site was opened.
        """
        privacy, train = self._config.privacy, self._config.train
        for name, parameter in self._tensors.items():
            parameter.requires_grad_(name in moving)
        self._model, self._optimizer, self._loader = self._engine.make_private(
            module=self._own,
            optimizer=build_optimizer(self._own, train),
            data_loader=DataLoader(
                self._rows,  # type: ignore[arg-type]
                batch_size=self.batch_size,
                collate_fn=self._collate,
            ),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            clipping=privacy.clipping,
            loss_reduction="sum",
            target_delta=privacy.target_delta,
            max_physical_batch_size=self._physical_batch_size(),
            pad_physical_batches=False,
            adaptive_clipping=self._adaptive_clipping(),
        )
        # Not before: the guard that was would find what other rounds have moved.
        self._check_frozen()
        self._moving = moving
        held = self._state["optimizers"].get(_key(moving))
        if held is not None:
            same = self._bases is None or self._bases.number == self._state["basis"]
            self._restore(held if same else _without_adapters(held))
        if self.noise_multiplier > 0.0:
            # A round that is tried again is charged again, and cannot overspend.
            left = self._state["until"] - self._engine.ledger.steps
            self._optimizer.private_step.plan = Plan(
                self._engine.ledger, max(left, 0), privacy.target_epsilon
            )
        self._batches = self._endless()

    def _check_frozen(self) -> None:
        now, then = wire.fingerprint(self._own), self._fingerprint
        if now.base != then.base or (self._ffa and now.recipe != then.recipe):
            raise PrivacyError(
                f"site {self.name!r}: a frozen tensor has moved since the site was opened, and may "
                "have learned from records without noise; accepted: the site opened anew"
            )

    def _adaptive_clipping(self) -> AdaptiveClipping | None:
        quantile = self._config.privacy.target_quantile
        if quantile is None:
            return None
        # The gradients' own noise is 1.16 times as much at most, however small the batches.
        count_noise = max(self.batch_size / 20, self.noise_multiplier)
        return AdaptiveClipping(quantile, count_noise_multiplier=count_noise)

    def _warn_of_much(self, noise: float, steps: int) -> None:
        """Says it where a ledger that is nearly spent leaves a run next to nothing but noise."""
        privacy, history = self._config.privacy, self._engine.ledger.history
        alone = [(noise / _MUCH_NOISE, self.sample_rate, steps)]
        if (
            not history
            or noise == 0.0
            or epsilon(alone, privacy.target_delta, privacy.accountant) > privacy.target_epsilon
        ):
            return
        _log.warning(
            "site %r: its ledger holds epsilon %.4g of target_epsilon %g: what is left takes noise "
            "%.3g, where an empty ledger would take %.3g",
            *(self.name, self.epsilon(), privacy.target_epsilon, noise),
            self._solve_noise(steps, history=[]),
        )

    def _solve_noise(
        self, steps: int, history: Sequence[tuple[float, float, int]] | None = None
    ) -> float:
        """The noise of so many more steps after `history`, the ledger's by default."""
        privacy = self._config.privacy
        if math.isinf(privacy.target_epsilon):
            return 0.0
        try:
            return noise_multiplier_for(
                privacy.target_epsilon,
                privacy.target_delta,
                self.sample_rate,
                steps,
                accountant=privacy.accountant,
                history=self._engine.ledger.history if history is None else history,
            )
        except PrivacyError as error:
            raise PrivacyError(f"site {self.name!r}: {error}") from error

    def _restore(self, held: dict[str, Any]) -> None:
        """What the optimizer has gathered; its settings are the configuration's of today."""
        gathered = ("params", *_Smoothing.GATHERED)
        groups = self._optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k not in gathered} for group in groups]
        try:
            self._optimizer.load_state_dict(held)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"site {self.name!r}: its state of run {self._run} is of another optimizer "
                f"({error}); accepted: the [train] it began with, or a new run"
            ) from error
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.pop("first_lr", None)
            group.update(own)

    def _physical_batch_size(self) -> int | None:
        """As configured for the site or all of them, or what fits in the site's memory."""
        entry, train = self._entry, self._config.train
        own = None if entry is None else entry.max_physical_batch_size
        most = own or train.max_physical_batch_size
        if entry is None or entry.memory is None:
            return most
        tokens = self._config.model.max_length
        example = tokenize(self._tokenizer, ["word " * tokens], self._config)
        example["labels"] = torch.zeros(1, dtype=torch.int64)

        def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")

        try:
            made = plan(
                self._own,
                memory=entry.memory,
                batch_size=min(most or self.batch_size, self.batch_size),
                example=example,
                loss=loss,
                device=self._device.type,
                optimizer="momentum" if train.momentum else train.optimizer,
                clipping=self._config.privacy.clipping,
                allow=(),
            )
        except ConfigError as error:
            raise ConfigError(f"site {self.name!r}: {error}") from error
        if self._device.type == "cpu":
            give_freed_memory_back()
        return made.max_physical_batch_size

    def _fits(self, noise_multiplier: float, left: int) -> bool:
        """Whether so many more steps with this noise keep the target."""
        privacy = self._config.privacy
        if math.isinf(privacy.target_epsilon):
            return True
        more = [(noise_multiplier, self.sample_rate, left)] if left > 0 else []
        history = [*self._engine.ledger.history, *more]
        total = epsilon(history, privacy.target_delta, privacy.accountant)
        return total <= privacy.target_epsilon

    def _state_file(self) -> Path:
        return self._folder / f"state-{self._run}.pt"

    def _read_state(self) -> dict[str, Any] | None:
        path = self._state_file()
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True)
            first, held = state["first_noise_multiplier"], state.get("ledger")
            return {
                "noise_multiplier": float(state["noise_multiplier"]),
                "first_noise_multiplier": None if first is None else float(first),
                "until": int(state["until"]),
                "optimizers": dict(state["optimizers"]),
                "basis": int(state.get("basis", 0)),
                "ledger": None if held is None else (str(held[0]), int(held[1])),
            }
        except _DAMAGED as error:
            raise ConfigError(
                f"site {self.name!r}: its state of run {self._run} is damaged; accepted: the file "
                "as it was written, or a new run"
            ) from error

    def _write_state(self, state: dict[str, Any]) -> None:
        # A ledger that is put back from an older copy would pass for one with budget left.
        state["ledger"] = (self._engine.ledger.checksum, self._engine.ledger.steps)
        # Moments and buffers come from noised gradients alone: keeping them costs no privacy.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self._state_file(), buffer.getvalue())

    def _repeat_noise(self, round_: int) -> None:
        """For tests: the streams begin where (seed, site, round) says, in whatever process."""
        text = f"{self._engine.seed} {self.name} {round_}"
        self._engine.reseed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))

    def run_round(
        self,
        round_: int,
        message: bytes,
        on_step: Callable[[], None] = lambda: None,
        frozen: Callable[[], bytes] | None = None,
        opening: Callable[[int], bytes] | None = None,
    ) -> bytes:
        """The site's update for a round: trained once, and sent as the same bytes ever after.

        Args:
            round_: from 1 to the configured rounds; the noise was chosen for so many.
            message: the server's global tensors for this round and site.
            on_step: called after each local step.
            frozen: gives the server's message with A; called where A is sent and has not come yet,
                or is lost. What has come is kept in the site's folder, for the run.
            opening: gives the server's message that opened a basis, by its number; called for each
                that the site has missed. These are kept too.

        Raises:
            WireError: a message does not fit, A or what opened a basis has not come, or the round
                is out of range; nothing is trained or charged then.
            PrivacyError: a trained tensor did not move, or a frozen one did; it is named, and
                nothing is released.
        """
        kept = self._folder / f"update-{self._run}-{round_:04d}.safetensors"
        if kept.exists():
            return kept.read_bytes()
        rounds = self._config.federation.rounds
        if not 1 <= round_ <= rounds:
            raise WireError(f"round: got {round_}, accepted: 1 to {rounds}")
        if self._lacks_A:
            if frozen is None:
                raise WireError("A: has not come from the server; accepted: a round with frozen=")
            sent = frozen()
            self._load_A(sent)
            write_atomic(frozen_file(self._folder, self._run), sent)
        load_trained(self._own, self._received(round_, message, opening))
        self._ready(round_, rounds - round_ + 1)
        began = time.monotonic()
        before = dict(self._engine.stats)
        try:
            # The guard's: what moves from here on has moved in this round.
            self._engine.check()
            if self._engine.seed is not None:
                self._repeat_noise(round_)
            self._set_learning_rates(1.0 - self._config.train.lr_decay * (round_ - 1) / rounds)
            loss, seen = self._train(self._config.federation.local_steps, on_step)
            self._check_moved()
        except BaseException:
            # A batch may be under way, and a draw half read: another try begins anew.
            self._moving = None
            raise
        trained = wire.trained_tensors(self._model)
        update = wire.encode(self._header("update", round_), trained)
        assert self._moving is not None
        held = self._optimizer.unchecked_state_dict()
        self._state["optimizers"][_key(self._moving)] = held
        self._state["basis"] = 0 if self._bases is None else self._bases.number
        self._write_state(self._state)
        write_atomic(kept, update)
        after = self._engine.stats
        groups = len(trained) if self._config.privacy.clipping == "per_layer" else 1
        clipped = after["clipped"] - before["clipped"]
        adaptive = self._config.privacy.target_quantile is not None
        self._log(
            {
                "round": round_,
                "training_loss": loss if math.isfinite(loss) else None,
                "clipped_fraction": clipped / max(seen * groups, 1),
                "dropped_records": after["dropped"] - before["dropped"],
                "seconds": time.monotonic() - began,
                **({"max_grad_norm": self._optimizer.max_grad_norm} if adaptive else {}),
            }
        )
        return update

    def _set_learning_rates(self, share: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = share * group.setdefault("first_lr", group["lr"])

    def _train(self, steps: int, on_step: Callable[[], None]) -> tuple[float, int]:
        """(mean loss over the records seen, their number) of so many logical steps."""
        total, seen = 0.0, 0
        done = 0
        while done < steps:
            inputs, labels = next(self._batches)
            piece = self._optimizer.private_step.piece
            assert piece is not None
            with self._autocast():
                logits: Tensor = self._model(**inputs).logits
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            self._optimizer.zero_grad()
            # Not their mean: dividing by a number that one record more would change, and
            # multiplying with it again, rounds the others' gradients otherwise.
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            # Rows beyond `kept` are padding.
            total += float(losses.detach()[: piece.kept].sum())
            seen += piece.kept
            # A draw may come in several physical batches; only its last makes a step.
            if piece.last:
                done += 1
                on_step()
        return total / max(seen, 1), seen

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._entry is None or self._entry.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _check_moved(self) -> None:
        try:
            self._engine.check()
        except PrivacyError as error:
            raise PrivacyError(f"site {self.name!r}: {error}") from error

    def _header(self, kind: str, round_: int) -> Header:
        prints = self._fingerprint
        if self._bases is not None:
            # Not of W's own bits, once something is folded into it; A's rows are this site's.
            prints = replace(prints, base=self._bases.prints[-1].base)
        told = self._config.federation
        return Header(
            *(kind, self._run, round_, self.name, prints.base, prints.recipe),
            *(told.weights, "fp32" if kind == wire.FROZEN else told.codec),
        )

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._loader

    def _collate(self, rows: list[tuple[str, int]]) -> Batch:
        inputs = tokenize(self._tokenizer, [text for text, _ in rows], self._config)
        labels = torch.tensor([label for _, label in rows])
        return {k: t.to(self._device) for k, t in inputs.items()}, labels.to(self._device)

    def _log(self, entry: dict[str, Any]) -> None:
        entry = {"run": self._run, **entry, "not covered by epsilon": True}
        with (self._folder / "local.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def frozen_file(folder: Path, run: str) -> Path:
    """Where a site keeps the A that has come for a run."""
    return folder / f"frozen-{run}.safetensors"


def opening_file(folder: Path, run: str, number: int) -> Path:
    """Where a site keeps the message that opened a basis of a run."""
    return folder / f"basis-{run}-{number:04d}.safetensors"


def openings_kept(folder: Path, run: str) -> int:
    """How many of them a site has, from that of basis 1 on."""
    number = 0
    while opening_file(folder, run, number + 1).exists():
        number += 1
    return number


def batch_size(train: Train, records: int) -> int:
    """The expected records of a step at a site of so many."""
    if train.batch_size is not None:
        return train.batch_size
    assert train.sample_rate is not None
    return max(1, round(train.sample_rate * records))


def _by_length(records: Records) -> list[tuple[str, int]]:
    """The records, short texts first: a draw is cut in this order, so little is padding.

    The clipped sum does not depend on the order.
    """
    return sorted(zip(records.texts, records.labels, strict=True), key=lambda row: len(row[0]))


def check_records(name: str, count: int, config: Config) -> None:
    """Raises ConfigError unless a site of `count` training records can take part."""
    least, size = config.data.min_records, batch_size(config.train, count)
    if count < max(least, size):
        raise ConfigError(
            f"site {name!r}: got {count} training records; accepted: at least {max(least, size)} "
            f"([data] min_records is {least}, a step draws {size})"
        )
    if config.privacy.target_delta * count >= 1.0:
        raise ConfigError(
            f"[privacy] target_delta: got {config.privacy.target_delta:g} for the {count} training "
            f"records of site {name!r}; accepted: below 1/{count}"
        )


def build_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The configured optimizer over adapters and, at its own rate, the head."""
    trained = wire.trained_tensors(model)
    head_lr = train.lr if train.head_lr is None else train.head_lr
    groups = [
        {"params": [p for name, p in trained.items() if wire.is_adapter(name)], "lr": train.lr},
        {"params": [p for name, p in trained.items() if not wire.is_adapter(name)], "lr": head_lr},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=train.momentum, **settings)
    elif train.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    if train.smoothing:
        optimizer.register_step_pre_hook(_Smoothing(train.smoothing))
    return optimizer


def _without_adapters(held: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state less what it has gathered of each B: that is of another A.

    The head's stays, and so does the bound of adaptive clipping.
    """
    first, *others = held["param_groups"]  # build_optimizer's first are the adapters
    begun = {key: value for key, value in first.items() if key not in _Smoothing.GATHERED}
    state = {k: of_one for k, of_one in held["state"].items() if k not in first["params"]}
    return {**held, "param_groups": [begun, *others], "state": state}


class _Smoothing:
    """Gives the optimizer's step a weighted mean of the noised gradients so far.

    What it holds lies in the optimizer's groups, and so in its state_dict.
    """

    GATHERED = ("smoothed", "smoothed_steps")

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            grads = [p.grad for p in group["params"]]
            means = group.setdefault("smoothed", [torch.zeros_like(grad) for grad in grads])
            steps = group["smoothed_steps"] = group.get("smoothed_steps", 0) + 1
            for grad, mean in zip(grads, means, strict=True):
                mean.lerp_(grad, 1.0 - self.share)
                torch.div(mean, 1.0 - self.share**steps, out=grad)


def copy_sharing_frozen(model: nn.Module, but: Collection[str] = ()) -> nn.Module:
    """A deep copy with its own trained parameters; every frozen parameter and buffer is shared.

    Args:
        but: names of frozen parameters that are not.
    """
    named = model.named_parameters(remove_duplicate=False)
    frozen = [p for name, p in named if not p.requires_grad and name not in but]
    memo: dict[int, Any] = {id(t): t for t in [*frozen, *model.buffers()]}
    return copy.deepcopy(model, memo)


def _on(device: torch.device, model: nn.Module, name: str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"[[site]] device: site {name!r} got {str(device)!r}, which PyTorch does not have here "
            f"({error}); accepted: 'cpu', or a GPU that is there"
        ) from error


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model's parameters of those names, whatever their dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _key(moving: Iterable[str]) -> str:
    """Under which the state of the optimizer of these tensors is kept."""
    return "\n".join(sorted(moving))


def tokenize(tokenizer: Any, texts: list[str], config: Config) -> dict[str, Tensor]:
    """The model's inputs for `texts`, padded to the longest of them: int64 (n, T) each."""
    encoded = tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=config.model.max_length,
        return_tensors="pt",
    )
    return dict(encoded)
