"""PrivacyEngine: DP-SGD for a model, with the names and meanings of `opacus.PrivacyEngine`."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ffa_kernels.backends.grid import grid_size
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.nn.adapter import Adapter, owned_parameters
from ffa_kernels.nn.record_taps import RecordTaps
from ffa_kernels.nn.recorded import RECORDED, is_recorded
from ffa_kernels.nn.wrapped import mixes_records
from ffa_kernels.privacy.accounting import check_accountant, check_delta, noise_multiplier_for
from ffa_kernels.privacy.adaptive import AdaptiveClipping
from ffa_kernels.privacy.guard import Guard
from ffa_kernels.privacy.keys import SecretStream, forget_seeds, seeds_are_secret
from ffa_kernels.privacy.ledger import Ledger
from ffa_kernels.privacy.optimizer import PrivateOptimizer
from ffa_kernels.privacy.probe import Probe, rows_of
from ffa_kernels.privacy.ranks import Ranks, agree
from ffa_kernels.privacy.registry import bind_ledger, fingerprint, registry_path
from ffa_kernels.privacy.sampling import (
    Piece,
    PoissonSampler,
    PrivateDataLoader,
    check_loader,
    check_order,
    check_whole,
)
from ffa_kernels.privacy.step import Mechanism, Plan, PrivateStep, Trained

# Of the noise multiplier, where a record more or less moves two records of a step.
_FIXED_BATCH_SHARE = 0.5

# By name: torch.distributed need not be there.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


class PrivacyEngine:
    """Makes models train privately, and says what that has cost.

    What is protected is one record of the data set (add/remove adjacency); the number of records
    is taken as public.

    Args:
        accountant: "prv" or "rdp".
        ledger: a file that keeps this data set's account over all runs, a `Ledger`, or None for
            an account in memory, which forgets.
        data_id: the data set's name in its ledger, if its records may come in another form or
            order; by default a fingerprint of them.
        new_ledger: begin another account for records that have one on this machine: for public
            ones, say. What is released of private records is the two together.
        seed: for tests: makes noise and sampling repeatable, and the ledger "not private".

    Raises:
        ConfigError: an argument that is not accepted.
        LedgerError: the ledger is damaged or held by another process.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        ledger: str | os.PathLike[str] | Ledger | None = None,
        data_id: str | None = None,
        new_ledger: bool = False,
        seed: int | None = None,
    ) -> None:
        self.accountant = check_accountant(accountant)
        if data_id is not None and (not isinstance(data_id, str) or not data_id):
            raise ConfigError(f"data_id is {data_id!r}; accepted: None or a name")
        self._data_id, self._new_ledger = data_id, new_ledger
        self.seed = seed
        if seed is not None:
            warnings.warn(
                f"PrivacyEngine(seed={seed}): noise and sampling can be repeated by anyone who "
                "knows the seed; nothing trained is private",
                stacklevel=2,
            )
        self._noise = SecretStream("noise", seed)
        self._sampling = SecretStream("sampling", seed)
        self._dropout = SecretStream("dropout", seed)
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._steps: list[PrivateStep] = []

    def reseed(self, seed: int) -> None:
        """For tests: noise (on a CPU), sampling and dropout begin again, as with this `seed`.

        Raises:
            PrivacyError: the engine was made without a seed: its noise is secret, and stays so.
        """
        if self.seed is None:
            raise PrivacyError("reseed: the engine has no seed; accepted: one made with seed=")
        for stream in (self._noise, self._sampling, self._dropout):
            stream.seed = seed
            stream.renew()

    def get_epsilon(self, delta: float) -> float:
        """Epsilon at `delta` of everything the ledger holds; infinity if any step had no noise."""
        return self.ledger.epsilon(delta, self.accountant)

    def check(self) -> None:
        """Reads the values of this engine's models: trained tensors moved, and nothing else did.

        So does the end of each iteration of the loader, the state_dict() of model or optimizer,
        and, as far as the host knows it without waiting for a device, each release.

        Raises:
            PrivacyError: a frozen tensor or buffer moved, or a trained tensor did not
                since the last check, or no record's gradient has reached it. It is named.
        """
        for step in self._steps:
            step.check()

    def check_loss(self, module: nn.Module, loss_of: Callable[[Any], Tensor], batch: Any) -> None:
        """Probes whether a loss of one's own, outside the model, keeps records apart.

        What couples them inside the model, or in the loss that the model itself returns, is found
        without being asked, in some of the first batches; so is it in PrivateTrainer.

        Args:
            module: the private model.
            loss_of: a batch to the loss that is trained on, a mean or sum over its records. What is
                trained under autocast is checked under it, where rounding is allowed for.
            batch: tensors (n, ...), n >= 2, in tuples, lists and mappings; rows are exchanged, and
                `loss_of` is called with two of them. Labels under the key "labels" are in part
                replaced by -100.

        Raises:
            PrivacyError: one record's gradient moves when another record is changed or added; with
                the number of records, where `loss_reduction` says otherwise than the loss does.
            ConfigError: `module` is not private, or the batch has no two records with a gradient.
        """
        reference = getattr(module, "_private_step", None)
        step = None if reference is None else reference.step
        if step is None or step.probe is None:
            raise ConfigError("module is not private; accepted: one that make_private returned")
        records = rows_of(batch)
        try:
            device = step.trained[0].parameter.device.type
            autocast = torch.is_autocast_enabled(device)
            conclusive = records > 1 and step.probe.check(
                loss_of, batch, records, "the loss", autocast
            )
            if conclusive:
                step.probe.check_reduction(loss_of, batch, records, autocast)
        except PrivacyError:
            raise
        except Exception as error:
            raise ConfigError(
                f"loss_of takes no batch of two records ({type(error).__name__}: {error}); "
                "accepted: a function that calls the model and does"
            ) from error
        if not conclusive:
            raise ConfigError(
                f"batch has {records} records, or none has a gradient that stays the same; "
                "accepted: two or more, whose gradients do"
            )

    @property
    def stats(self) -> dict[str, int]:
        """Steps, clipped and dropped counts over all of this engine's models.

        Clipped and dropped come from private records without noise: not covered by epsilon.
        """
        totals = {"steps": 0, "clipped": 0, "dropped": 0}
        for step in self._steps:
            for name, value in step.stats.items():
                totals[name] += value
        return totals

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float],
        **options: Any,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
        """`make_private` with the least noise that keeps the ledger's total within the target.

        Args:
            target_epsilon: for all that the ledger holds when the `epochs` are over, what it
                already holds included. A step beyond them is refused, and so is any once the
                ledger has been charged for something else meanwhile.
            target_delta: below 1 / number of records.
            epochs: how often the returned loader will be iterated.
            module, optimizer, data_loader, max_grad_norm, options: as in `make_private`.

        Raises:
            PrivacyError: the target is already spent.
            ConfigError: an argument that is not accepted.
        """
        group = options.get("process_group")
        ranks = None if group is None else Ranks(group)
        poisson = options.get("poisson_sampling", True)

        def local() -> _Data:
            if not isinstance(epochs, int) or epochs < 1:
                raise ConfigError(f"epochs is {epochs!r}; accepted: an integer of 1 or more")
            return self._data(data_loader, options.get("max_physical_batch_size"), poisson)

        data = _all_data(ranks, [local()] if ranks is None else ranks.together(local), poisson)

        def solved() -> float:
            check_delta(target_delta, data.records)
            if not self.ledger.private:
                raise PrivacyError(
                    "the ledger holds steps whose noise was seeded: its total is not "
                    "private, and cannot be held to target_epsilon"
                )
            return noise_multiplier_for(
                target_epsilon,
                target_delta,
                data.sample_rate,
                epochs * data.steps,
                self.accountant,
                self.ledger.history,
            )

        charged_noise = solved() if ranks is None else ranks.led(solved)
        private = self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=charged_noise if poisson else charged_noise / _FIXED_BATCH_SHARE,
            max_grad_norm=max_grad_norm,
            target_delta=target_delta,
            **options,
        )
        private[1].private_step.plan = Plan(self.ledger, epochs * data.steps, target_epsilon)
        return private

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        poisson_sampling: bool = True,
        clipping: str = "flat",
        loss_reduction: str = "mean",
        max_physical_batch_size: int | None = None,
        pad_physical_batches: bool = True,
        keep_grad_sample: bool = False,
        loss_scale: float = 1.0,
        target_delta: float | None = None,
        process_group: Any = None,
        adaptive_clipping: AdaptiveClipping | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
        """Prepares a model, its optimizer and its data for private training.

        Use the three that are returned in an ordinary loop. After `loss.backward()` each trained
        parameter has `.grad_sample` (n, *shape), the gradients of the records' own losses.
        Unless the engine has a seed, the generators of Python, NumPy and PyTorch get new ones from
        the operating system: what is drawn for private records must not be repeatable.

        Args:
            module: the model; the same object is returned, its state_dict names unchanged.
            optimizer: holds every trained parameter of `module`.
            data_loader: its batch size is the expected size of a draw, and the divisor.
            noise_multiplier: the noise's standard deviation over the clipping bound; 0 for none.
            max_grad_norm: the bound C on a record's gradient; with clipping "per_layer" one for
                each trained tensor, a single number C meaning C / sqrt(K) for each of K.
            poisson_sampling: each record is drawn with probability batch size / N. Otherwise the
                loader's own order is kept (the data set's, or shuffled without a generator=) and
                nothing is gained from sampling: each step is charged at rate 1, and at half its
                noise, since one record more shifts the batches after it and so can change two
                records of a step.
            clipping: "flat" (one norm over all trained tensors) or "per_layer".
            loss_reduction: "mean" or "sum": how the loss combines the records' own losses. A sum
                rounds no record by how many there are; see SECURITY.md.
            max_physical_batch_size: draws are cut into batches of at most this size.
            pad_physical_batches: pad those to that size with rows that are left out of the sum,
                for the static shapes of `torch.compile` and CUDA graphs. They are the last
                rows: the model must keep a batch's rows in their order.
            keep_grad_sample: with "per_layer", keep `.grad_sample` until `step()`.
            loss_scale: a power of two by which the loss is multiplied before backward, for fp16
                (`optimizer.scale(loss).backward()`). It is divided out before clipping, so that
                nothing but underflow depends on it; `.grad_sample` holds it still. A record whose
                gradient overflows is left out, and counted in `stats` as dropped.
            target_delta: of the promise for these records, below 1 / their number: a ledger on
                disk is bound to it from then on.
            process_group: a torch.distributed group whose processes make each step together, as
                one process with all their records would; None for this process alone. Each gives
                a `data_loader` of its own records; batch sizes and numbers of records add up, and
                all records are drawn at one rate. Trained tensors are those of rank 0, whose
                engine alone has a `ledger` on disk, and is charged. What the processes tell each
                other is not private: theirs must be a network that may carry the records.
            adaptive_clipping: with "flat": `max_grad_norm` is the bound of the first step, and
                then follows a quantile of the records' norms, at no cost in epsilon. The bound is
                `optimizer.max_grad_norm`. Each step waits for a GPU then.

        Returns:
            (module, optimizer, data loader).

        Raises:
            ConfigError: an argument that is not accepted; nothing has been changed then.
            PrivacyError: a model that cannot be trained privately, with the module named;
                nothing has been changed then.
            LedgerError: the ledger is of other records, another delta or accountant, or these
                records have another ledger; nothing has been changed then.
        """
        ranks = None if process_group is None else Ranks(process_group)
        per_layer, poisson = clipping == "per_layer", bool(poisson_sampling)

        def local() -> _Local:
            data = self._data(data_loader, max_physical_batch_size, poisson)
            if clipping not in ("flat", "per_layer"):
                raise ConfigError(f"clipping is {clipping!r}; accepted: flat, per_layer")
            if loss_reduction not in ("mean", "sum"):
                raise ConfigError(f"loss_reduction is {loss_reduction!r}; accepted: mean, sum")
            if not isinstance(noise_multiplier, (int, float)) or not (
                0 <= noise_multiplier < math.inf
            ):
                raise ConfigError(f"noise_multiplier is {noise_multiplier!r}; accepted: 0 or more")
            _check_loss_scale(loss_scale)
            _check_model(module)
            if ranks is not None and not ranks.leads and self.ledger.path is not None:
                raise ConfigError(
                    f"ledger is {self.ledger.path} on rank {ranks.rank}; accepted: None, since "
                    "rank 0 alone keeps the account"
                )
            names = _check_trained(module, optimizer)
            bounds = _bounds(max_grad_norm, clipping, len(names), noise_multiplier, loss_scale)
            return _Local(data, names, bounds)

        settings = {
            "noise_multiplier": noise_multiplier,
            "clipping": clipping,
            "loss_scale": loss_scale,
            "poisson_sampling": poisson,
            "adaptive_clipping": adaptive_clipping,
            "optimizer": type(optimizer).__name__,
        }
        mine, data = self._agreed(ranks, local, poisson, settings)
        if target_delta is not None:
            check_delta(target_delta, data.records)
        if adaptive_clipping is not None:
            if not isinstance(adaptive_clipping, AdaptiveClipping):
                raise ConfigError(
                    f"adaptive_clipping is {adaptive_clipping!r}; accepted: None, or "
                    "AdaptiveClipping(...)"
                )
            adaptive_clipping.check(clipping, mine.bounds, float(noise_multiplier), data.batch_size)
        self._bind(ranks, mine.data.loader, target_delta)
        if ranks is not None:
            self._follow(ranks, mine.names)

        mechanism = Mechanism(
            noise_multiplier=float(noise_multiplier),
            max_grad_norm=mine.bounds,
            per_layer=per_layer,
            expected_batch_size=data.batch_size,
            sample_rate=data.sample_rate,
            poisson=poisson,
            keep_grad_sample=keep_grad_sample,
            loss_scale=float(loss_scale),
            adaptive=adaptive_clipping,
        )
        guard = Guard(module, mine.names, noised=noise_multiplier > 0)
        if ranks is not None:
            agree(ranks, ranks.together(guard.frozen_values))
        records = round(min(data.batch_size, max_physical_batch_size or math.inf))
        trained = attach_taps(module, mine.names, loss_reduction == "mean", records)
        step = PrivateStep(
            trained,
            mechanism,
            *self._noise_state(trained[0].parameter.device, ranks),
            lambda: self._charge(mechanism),
            guard,
            ranks,
        )
        _retire(module, step)
        holders = [(t.parameter, t.holders) for t in trained]
        step.probe = Probe(module, holders, float(loss_scale), per_layer)
        self._steps.append(step)
        loader = mine.data.loader
        logical: Any = loader.batch_sampler
        if poisson:
            stream = self._sampling
            if ranks is not None:
                stream = SecretStream(f"sampling on rank {ranks.rank}", self.seed)
            logical = PoissonSampler(mine.data.records, data.sample_rate, data.steps, stream)
        dropping = [
            m for m in module.modules() if isinstance(m, Adapter) and m.adapter_dropout() > 0
        ]
        private_loader = self._private_loader(
            loader, logical, max_physical_batch_size, pad_physical_batches, step, dropping
        )
        if self.seed is None:
            # Masks and augmentations follow the order of the records: under a public seed one
            # record more would give all after it others. Unless nobody knows them.
            forget_seeds()
        return module, PrivateOptimizer(optimizer, step), private_loader

    def _agreed(
        self,
        ranks: Ranks | None,
        local: Callable[[], _Local],
        poisson: bool,
        settings: dict[str, Any],
    ) -> tuple[_Local, _Data]:
        """What `local` finds here, and the data of all ranks, which must have all else in common.

        Raises:
            ConfigError: what `local` raises on any rank, or settings that differ.
        """
        if ranks is None:
            mine = local()
            return mine, _all_data(None, [mine.data], poisson)
        made: list[_Local] = []

        def told() -> tuple[_Data, dict[str, Any]]:
            made.append(local())
            return made[0].data, {
                **settings,
                "max_grad_norm": made[0].bounds,
                "the seed": self.seed,
                "module's trained tensors": [
                    (name, str(p.dtype), tuple(p.shape)) for name, p in made[0].names.items()
                ],
            }

        facts = ranks.together(told)
        agree(ranks, [fact for _, fact in facts])
        return made[0], _all_data(ranks, [data for data, _ in facts], poisson)

    def _private_loader(
        self,
        loader: DataLoader[Any],
        logical: Any,
        physical_size: int | None,
        pad: bool,
        step: PrivateStep,
        dropping: Sequence[Adapter],
    ) -> PrivateDataLoader:
        """The loader whose batches `step` is told of; `dropping` are the adapters with dropout."""
        keys = {
            device: torch.zeros(4, dtype=torch.int64, device=device)
            for device in {layer.trained_B().device for layer in dropping}
        }
        for layer in dropping:
            layer._dropout_key = keys[layer.trained_B().device]

        def announce(piece: Piece) -> bool:
            if not step.begin(piece):
                return False
            if keys:
                # For each batch: a mask never depends on who else was drawn before. Renewed in its
                # place, where a captured forward reads it again.
                key = self._dropout_key()
                for place in keys.values():
                    place.copy_(key)
            return True

        def reseed() -> None:
            if self.seed is None and not seeds_are_secret():
                warnings.warn(
                    "PyTorch's generators were seeded after make_private: they are seeded anew "
                    "from the operating system, since what is drawn for private records (masks, "
                    "orders, augmentations) must not be repeatable; seed before make_private, or "
                    "for tests with PrivacyEngine(seed=)",
                    stacklevel=3,
                )
                forget_seeds()

        return PrivateDataLoader(
            loader, logical, physical_size, announce, pad, step.restart, step.end_epoch, reseed
        )

    def _data(self, data_loader: object, max_physical_batch_size: object, poisson: object) -> _Data:
        loader, records = check_loader(data_loader, max_physical_batch_size)
        rate, steps = _rate_and_steps(loader, records, poisson)
        # A test may want draws of its own.
        if not poisson and self.seed is None:
            check_order(loader)
        return _Data(loader, records, _expected_batch_size(loader), rate, steps)

    def _bind(self, ranks: Ranks | None, loader: Any, delta: float | None) -> None:
        """Sees to it that these records have one account, of one promise."""
        names = [] if self._data_id is None else [self._data_id]
        if ranks is not None:
            each = ranks.together(lambda: fingerprint(loader))
            names.append(hashlib.sha256(" ".join(sorted(each)).encode()).hexdigest()[:32])
        elif self.ledger.path is not None or registry_path().exists():
            names.append(fingerprint(loader))
        else:
            # In memory, where no ledger was ever noted.
            return

        def bind() -> None:
            bind_ledger(self.ledger, names, delta, self.accountant, self._new_ledger)

        if ranks is None:
            bind()
        else:
            ranks.led(bind)

    def _follow(self, ranks: Ranks, trained: dict[str, nn.Parameter]) -> None:
        """Takes rank 0's trained tensors, and on the other ranks a copy of its account."""
        values = ranks.led(lambda: [p.detach().cpu() for p in trained.values()])
        history, private = ranks.led(lambda: (self.ledger.history, self.ledger.private))
        if ranks.leads:
            return
        with torch.no_grad():
            for p, value in zip(trained.values(), values, strict=True):
                p.copy_(value)
        self.ledger = Ledger()
        for noise, rate, steps in history:
            self.ledger.charge(noise, rate, steps, private)

    def _noise_state(
        self, device: torch.device, ranks: Ranks | None
    ) -> tuple[Tensor, SecretStream]:
        """Key and step of the noise, where the parameters are: a step must not wait for it; and
        the stream that it is of, or stands for."""
        if ranks is not None:
            # Rank 0's, so that all draw the one noise of the step.
            words = ranks.led(lambda: SecretStream("noise", self.seed).state.tolist())
            state = torch.tensor(words, dtype=torch.int64, device=device)
            return state, SecretStream("noise", self.seed)
        if device.type == "cpu":
            return self._noise.state, self._noise
        # A key of its own: two models that counted apart under one key would draw alike.
        own = SecretStream("noise", self.seed)
        return own.state.to(device), own

    def _charge(self, mechanism: Mechanism) -> None:
        noise = mechanism.noise_multiplier
        if not mechanism.poisson:
            noise *= _FIXED_BATCH_SHARE
        self.ledger.charge(noise, mechanism.sample_rate, private=self.seed is None)

    def _dropout_key(self) -> torch.Tensor:
        from ffa_kernels.ops import chacha20

        with self._dropout.lock:
            words = chacha20(self._dropout.state, 0, 0, 1).view(torch.int64)
            self._dropout.state[4] += 1
        return words[0, :4].clone()


@dataclass(frozen=True)
class _Data:
    """The records of one process, or of all together, and how they are drawn."""

    loader: Any
    records: int
    batch_size: float
    sample_rate: float
    steps: int

    def __getstate__(self) -> dict[str, Any]:
        # Other ranks are told numbers, and get no data set.
        return {**vars(self), "loader": None}


@dataclass(frozen=True)
class _Local:
    """What `make_private` has checked in this process."""

    data: _Data
    names: dict[str, nn.Parameter]
    bounds: tuple[float, ...]


def _all_data(ranks: Ranks | None, each: list[_Data], poisson: object) -> _Data:
    """The union of the ranks' records: sizes add up, and all are drawn at one rate."""
    if ranks is None:
        return each[0]
    records, size = sum(d.records for d in each), sum(d.batch_size for d in each)
    if poisson:
        return _Data(None, records, size, size / records, math.ceil(records / size))
    steps = {d.steps for d in each}
    if len(steps) > 1:
        raise ConfigError(
            f"data_loader has {[d.steps for d in each]} batches on the ranks; accepted: as many on "
            "each, or poisson_sampling=True"
        )
    return _Data(None, records, size, 1.0, steps.pop())


def _check_loss_scale(loss_scale: object) -> None:
    fits = isinstance(loss_scale, (int, float)) and 2.0**-100 <= loss_scale <= 2.0**100
    if not fits or math.frexp(float(loss_scale))[0] != 0.5:  # type: ignore[arg-type]
        raise ConfigError(
            f"loss_scale is {loss_scale!r}; accepted: a power of two, so that dividing by it is "
            "exact (1024.0, say)"
        )


def _check_model(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"module is {type(module).__name__}; accepted: torch.nn.Module")
    for name, layer in module.named_modules():
        if type(layer).__name__ in _WRAPPERS:
            raise PrivacyError(
                f"module {name!r} is {type(layer).__name__}, which adds up .grad over processes or "
                "devices: gradients of single records never come there, and each process would "
                "draw a noise of its own; accepted: the module inside, with "
                "make_private(..., process_group=torch.distributed.group.WORLD)"
            )
        coupled = isinstance(layer, _BatchNorm) or (
            isinstance(layer, _InstanceNorm) and layer.track_running_stats
        )
        if coupled:
            raise PrivacyError(
                f"layer {name!r} is {type(layer).__name__}, which mixes records: no record's "
                "gradient is its own; accepted: GroupNorm, LayerNorm or RMSNorm in its place"
            )
        mixing = mixes_records(layer)
        if mixing is not None:
            raise PrivacyError(f"layer {name!r} ({type(layer).__name__}) {mixing}")
        if getattr(layer, "max_norm", None) is not None and isinstance(
            layer, (nn.Embedding, nn.EmbeddingBag)
        ):
            raise PrivacyError(
                f"layer {name!r} has max_norm, which rewrites in the forward pass the rows that a "
                "batch uses, without noise; accepted: max_norm=None"
            )
        if getattr(layer, "scale_grad_by_freq", False) and next(layer.parameters()).requires_grad:
            raise PrivacyError(
                f"layer {name!r} has scale_grad_by_freq, which divides a record's gradient by what "
                "its whole batch holds; accepted: scale_grad_by_freq=False"
            )


def _check_trained(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The trained parameters by name, each of which the optimizer holds and a layer records."""
    if (
        not isinstance(optimizer, Optimizer)
        or isinstance(optimizer, PrivateOptimizer)
        # Accelerate's, whose own step is not that of the optimizer in it.
        or type(optimizer).__name__ == "AcceleratedOptimizer"
    ):
        raise ConfigError(
            f"optimizer is {type(optimizer).__name__}; accepted: a plain torch.optim.Optimizer "
            "(of one that accelerator.prepare returned, its .optimizer)"
        )
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            f"module is {type(module).__name__} and trains nothing: no parameter requires a "
            "gradient; accepted: a model after convert()"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    own = {id(p) for p in module.parameters()}
    foreign = len(held - own)
    if missing or foreign:
        raise ConfigError(
            "optimizer and module do not fit: "
            + (f"the optimizer lacks {', '.join(missing)}; " if missing else "")
            + (f"it holds {foreign} tensors that are not the module's; " if foreign else "")
            + "accepted: an optimizer over the module's own trained parameters, made after convert"
        )
    refused = []
    for name, layer, local, p in owned_parameters(module):
        if not p.requires_grad:
            continue
        adapter = isinstance(layer, Adapter) and local == "lora_B"
        # Opacus' convolution samplers know no other padding; weight_norm's pairs have no tap.
        recordable = (
            (type(layer) in RECORDED or is_recorded(layer))
            and getattr(layer, "padding_mode", "zeros") == "zeros"
            and local in ("weight", "bias")
        )
        if not adapter and not recordable:
            refused.append(f"{name}.{local} ({type(layer).__name__})".lstrip("."))
    if refused:
        known = sorted({recording._plain.__name__ for recording in RECORDED.values()})
        raise PrivacyError(
            f"cannot clip record by record: {', '.join(refused)}; accepted: B of an adapted layer, "
            f"parameters of {', '.join(known)}, or requires_grad_(False)"
        )
    return trained


def _bounds(
    max_grad_norm: float | Sequence[float],
    clipping: str,
    count: int,
    noise_multiplier: float,
    loss_scale: float,
) -> tuple[float, ...]:
    if isinstance(max_grad_norm, (int, float)):
        share = 1 / math.sqrt(count) if clipping == "per_layer" else 1.0
        bounds = (float(max_grad_norm) * share,) * (count if clipping == "per_layer" else 1)
    else:
        bounds = tuple(float(c) for c in max_grad_norm)
        if clipping == "flat" or len(bounds) != count:
            raise ConfigError(
                f"max_grad_norm has {len(bounds)} bounds; accepted: one number, or with "
                f'clipping="per_layer" {count}, one for each trained tensor'
            )
    if not all(c > 0 for c in bounds):
        raise ConfigError(f"max_grad_norm is {max_grad_norm!r}; accepted: above 0")
    if noise_multiplier > 0 and not all(map(math.isfinite, bounds)):
        raise ConfigError("max_grad_norm is infinite; accepted with noise: a finite bound")
    scaled = [c * loss_scale for c in bounds]
    noise_std = noise_multiplier * math.sqrt(sum(c * c for c in scaled)) if noise_multiplier else 0
    for c in filter(math.isfinite, scaled):
        # A Gaussian here stays below 8.6 sigma; on its tensor's grid it must fit in 64 bits.
        if not (2.0**-500 <= c <= 2.0**500 and noise_std < 2.0**58 * grid_size(c)):
            raise ConfigError(
                f"max_grad_norm {c:g} with noise of standard deviation {noise_std:g} does not fit "
                "the 64-bit sum; accepted: bounds from 2^-500 to 2^500, noise up to 2^25 times "
                "each, with loss_scale counted in"
            )
    return bounds


def _expected_batch_size(loader: DataLoader[Any]) -> float:
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        raise ConfigError("data_loader has no batch size; accepted: a loader made with batch_size")
    return float(size)


def _rate_and_steps(
    loader: DataLoader[Any], records: int, poisson_sampling: object
) -> tuple[float, int]:
    size = _expected_batch_size(loader)
    if size > records:
        raise ConfigError(
            f"data_loader's batch size is {int(size)}, but there are {records} records; accepted: "
            "a batch size of at most the number of records"
        )
    if not poisson_sampling:
        return 1.0, len(loader)
    check_whole(loader)
    return size / records, math.ceil(records / size)


def attach_taps(
    module: nn.Module, trained: dict[str, nn.Parameter], mean_loss: bool, records: int
) -> list[Trained]:
    """Makes every layer with trained tensors record them; so many records are expected at once."""
    holders: dict[int, list[tuple[RecordTaps, str]]] = {id(p): [] for p in trained.values()}
    for p in module.parameters():
        # Frozen ones too: an optimizer steps whatever has a gradient, a stale one as well.
        p.grad = None
    for recording in module.modules():
        if isinstance(recording, Adapter) or is_recorded(recording):
            vars(recording)["record_taps"] = None
    for name, layer, local, p in owned_parameters(module):
        if id(p) not in holders:
            continue
        if type(layer) in RECORDED:
            layer.__class__ = RECORDED[type(layer)]
        holder: Any = layer
        if holder.record_taps is None:
            holder.record_taps = RecordTaps(name, mean_loss, records)
        holders[id(p)].append((holder.record_taps, local))
    return [Trained(name, p, tuple(holders[id(p)])) for name, p in trained.items()]


def _retire(module: nn.Module, step: PrivateStep) -> None:
    """Detaches the private step that `module` had, if any: one model, one mechanism."""
    previous = getattr(module, "_private_step", None)
    if previous is not None:
        previous.step.detach()
    object.__setattr__(module, "_private_step", _StepReference(step))
    if _check_before_save not in module._state_dict_pre_hooks.values():
        module.register_state_dict_pre_hook(_check_before_save)  # type: ignore[no-untyped-call]


def _check_before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A model that may have trained for nothing, or learned without noise, is not saved silently.

    A function of this module, and so no obstacle to copies and pickles, where it finds no step.
    """
    reference = getattr(module, "_private_step", None)
    if reference is not None and reference.step is not None:
        reference.step.check(saving=True)


class _StepReference:
    """Holds a model's private step without following the model into copies and pickles."""

    def __init__(self, step: PrivateStep | None) -> None:
        self.step = step

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
