"""PrivateTrainer: transformers' Trainer, with a private step in place of its own.

To Trainer an item of the training loader is one draw and one step. The physical batches that a
draw is cut into are read, announced to the engine and run inside that step, never ahead of it.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.losses import causal_lm_loss, sequence_classification_loss
from ffa_kernels.privacy import Ledger, PrivacyEngine, epsilon, noise_multiplier_for
from ffa_kernels.privacy.accounting import check_delta
from ffa_kernels.privacy.adaptive import AdaptiveClipping, check_bound
from ffa_kernels.privacy.keys import generators_kept
from ffa_kernels.privacy.optimizer import PrivateOptimizer
from ffa_kernels.privacy.sampling import Piece, PrivateDataLoader, check_loader
from ffa_kernels.privacy.step import Plan, PrivateStep

try:
    from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
except ImportError as error:
    raise ImportError(
        f"PrivateTrainer needs transformers ({error}): pip install transformers accelerate"
    ) from error

_NOT_COVERED = (
    "PrivateTrainer: loss, metrics of private records and what callbacks derive from them are made "
    "without noise: epsilon does not cover them, in logs, in trainer_state.json, or where "
    "report_to sends them; keep them at the site. The trained weights and `epsilon` are covered"
)


class PrivateTrainer(Trainer):
    """`transformers.Trainer` whose training is differentially private for each record.

    The model is one that `ffa.convert` adapted (or any that `PrivacyEngine.make_private` takes).
    A step is a Poisson draw of expected size `per_device_train_batch_size` times
    `gradient_accumulation_steps`, run in physical batches of at most
    `per_device_train_batch_size`; `max_steps`, logging and saving count such steps.

    Training losses are a mean over records of each record's own loss: for causal language models
    the mean over the record's tokens (`ffa.causal_lm_loss`), for sequence classifiers
    transformers' own. Another model needs a `compute_loss_func`, which returns one loss for each
    record, (n,); a subclass that overrides `compute_loss` must keep to a mean over records of each
    record's own loss. Evaluation is Trainer's.

    Not covered by epsilon: loss and metrics in logs and in `trainer_state.json`. They come from
    private records without noise, belong in the site's own log, and must not leave it; a warning
    says so once. A checkpoint chosen by them (`load_best_model_at_end`, early stopping) is covered
    only if the evaluation records are public. `epsilon`, in every log and on the progress bar,
    depends on no record, and `max_grad_norm`, which adaptive clipping logs, on what was released.

    Checkpoints hold model, optimizer and scheduler, and no generator: a resumed run draws afresh.
    What it released before stays counted, since the ledger, not the checkpoint, keeps the account.
    `save_model` writes lora_A and lora_B beside the weights; `ffa.merge(model)` first for a plain
    model.

    Args:
        model, args: as in Trainer. `args` is copied; its `max_grad_norm` is the clipping bound
            where none is given here.
        engine: the `PrivacyEngine` that keeps the account; None makes one of the three arguments
            that follow.
        ledger: the account's file, by default `ledger.jsonl` in the output folder. An account that
            is in it goes on.
        new_ledger: begin another account for records that have one elsewhere.
        accountant: "prv" or "rdp".
        target_epsilon: for all the ledger holds when training ends. Alone, the noise is the least
            with which all steps fit; beside `noise_multiplier`, training stops before the step
            that would exceed it.
        target_delta: below 1 / number of records; epsilon is logged at it.
        noise_multiplier: the noise's standard deviation over the clipping bound.
        max_grad_norm: as in `make_private`.
        clipping: "flat" or "per_layer".
        adaptive_clipping: as in `make_private`; the bound of the step to come is in the logs, and a
            resumed run goes on from its checkpoint's.
        pad_physical_batches: as in `make_private`; False cuts draws evenly instead.
        compute_loss_func: (outputs, labels, num_items_in_batch=None) to losses (n,).
        callbacks, options: as in Trainer.

    Raises:
        ConfigError: an argument that is not accepted, or a setting of `args` that private training
            cannot honour.
        PrivacyError: in `train`, a target that is already spent, or a checkpoint whose steps the
            ledger does not hold.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        target_delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        max_grad_norm: float | Sequence[float] | None = None,
        clipping: str = "flat",
        adaptive_clipping: AdaptiveClipping | None = None,
        pad_physical_batches: bool = False,
        engine: PrivacyEngine | None = None,
        ledger: str | os.PathLike[str] | Ledger | None = None,
        new_ledger: bool = False,
        accountant: str | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else copy.copy(args)
        _check_args(args)
        if target_epsilon is None and noise_multiplier is None:
            raise ConfigError(
                "target_epsilon and noise_multiplier are None; accepted: either, or both"
            )
        if engine is not None and (ledger is not None or accountant is not None or new_ledger):
            raise ConfigError(
                "engine is given together with ledger, new_ledger or accountant; accepted: one of "
                "them, since an engine has its own"
            )
        super().__init__(
            model,
            args,
            compute_loss_func=compute_loss_func,
            callbacks=[_Privately(self), *(callbacks or [])],
            **options,
        )
        # Read here, for Accelerate's own settings may have changed it. Trainer's loop shall count
        # one batch a step: how many a draw is cut into is not known before it is drawn.
        self._accumulation = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        # Batches of a resumed epoch are drawn afresh: there are none to skip.
        args.ignore_data_skip = True
        self.target_epsilon, self.target_delta = target_epsilon, target_delta
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = args.max_grad_norm if max_grad_norm is None else max_grad_norm
        self.clipping, self.pad_physical_batches = clipping, pad_physical_batches
        self.adaptive_clipping = adaptive_clipping
        if engine is None:
            engine = PrivacyEngine(
                accountant=accountant or "prv",
                ledger=Path(str(args.output_dir), "ledger.jsonl") if ledger is None else ledger,
                new_ledger=new_ledger,
            )
        self.engine = engine
        self._draws: _Draws | None = None
        self._private: PrivateOptimizer | None = None
        self._last_step: tuple[int, int] | None = None
        self._bound_of_checkpoint: float | None = None
        self._warned = False

    @property
    def expected_batch_size(self) -> int:
        """Records that a draw holds on average: L, the divisor of a step's sum."""
        return int(self._train_batch_size * self._accumulation)

    def get_train_dataloader(self) -> Any:
        """Trainer's loader without Accelerate's wrapper, which would read one batch ahead."""
        stock: Any = super().get_train_dataloader()
        workers: dict[str, Any] = {}
        if stock.num_workers > 0:
            workers = {
                "prefetch_factor": stock.prefetch_factor,
                "persistent_workers": stock.persistent_workers,
                "multiprocessing_context": stock.multiprocessing_context,
            }
        plain: DataLoader[Any] = DataLoader(
            stock.dataset,
            batch_size=self.expected_batch_size,
            num_workers=stock.num_workers,
            collate_fn=stock.collate_fn,
            pin_memory=stock.pin_memory and self.args.device.type != "cpu",
            timeout=stock.timeout,
            worker_init_fn=stock.worker_init_fn,
            **workers,
        )
        _, records = check_loader(plain, self._train_batch_size)
        self._draws = _Draws(plain, math.ceil(records / self.expected_batch_size))
        return self._draws

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The expected size of a draw."""
        return self.expected_batch_size

    def _begin(self) -> None:
        """Makes model, optimizer and loader private; the number of steps is known by now."""
        draws, ledger, delta = self._draws, self.engine.ledger, self.target_delta
        bound, self._bound_of_checkpoint = self._bound_of_checkpoint, None
        model: Any = self.model
        assert draws is not None
        base, kind = self._base_and_kind()
        own = type(self).compute_loss is PrivateTrainer.compute_loss
        if kind == "ForCausalLM" and own and self.compute_loss_func is None:
            _check_shift(base)
        records = len(draws.dataset)
        check_delta(delta, records)
        done: int = self.state.global_step
        if ledger.steps < done:
            raise PrivacyError(
                f"the checkpoint is of step {done}, but the ledger holds {ledger.steps} steps: "
                "what the earlier ones released would not be counted; accepted: the ledger of the "
                "run that made the checkpoint"
            )
        if self.target_epsilon is not None and not ledger.private:
            raise PrivacyError(
                "the ledger holds steps whose noise was seeded: its total is not private, and "
                "cannot be held to target_epsilon"
            )
        steps: int = self.state.max_steps - done
        if steps <= 0:
            draws.end()
            return
        noise, allowed = self._noise_and_steps(self.expected_batch_size / records, steps)
        _, private, loader = self.engine.make_private(
            module=model,
            optimizer=self._own_optimizer(),
            data_loader=draws.plain,
            noise_multiplier=noise,
            max_grad_norm=self.max_grad_norm,
            clipping=self.clipping,
            adaptive_clipping=self.adaptive_clipping,
            # Whatever compute_loss returns: what goes back in `training_step` is a sum.
            loss_reduction="sum",
            target_delta=delta,
            max_physical_batch_size=int(self._train_batch_size),
            pad_physical_batches=self.pad_physical_batches,
        )
        self._set_optimizer(private)
        self._private = private
        if bound is not None:
            private.private_step.clip_at(bound)
        self._last_step = None
        if self.target_epsilon is not None:
            private.private_step.plan = Plan(ledger, allowed, self.target_epsilon)
            self._last_step = (allowed, ledger.steps)
        draws.begin(loader, private.private_step)
        if not self._warned:
            warnings.warn(_NOT_COVERED, stacklevel=2)
            self._warned = True

    def _own_optimizer(self) -> Any:
        """The optimizer without the engine's around it, or Accelerate's."""
        holder: Any = self.optimizer
        plain = holder.optimizer if hasattr(holder, "accelerator_state") else holder
        return plain.original_optimizer if isinstance(plain, PrivateOptimizer) else plain

    def _set_optimizer(self, optimizer: Any) -> None:
        holder: Any = self.optimizer
        # Accelerate's wrapper stays around it, for the scheduler holds on to that.
        if hasattr(holder, "accelerator_state"):
            holder.optimizer = optimizer
        else:
            self.optimizer = optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, and the bound that adaptive clipping had come to.

        Raises:
            ConfigError: the checkpoint's bound is none.
        """
        if self._private is not None:
            # The last run's may be in the middle of a draw, and will make no step any more.
            self._set_optimizer(self._own_optimizer())
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.adaptive_clipping is None or checkpoint is None:
            return
        path = Path(checkpoint, OPTIMIZER_NAME)
        # Without either, Trainer loads none of the two.
        if path.is_file() and Path(checkpoint, SCHEDULER_NAME).is_file():
            held = torch.load(path, map_location="cpu", weights_only=True).get("max_grad_norm")
            try:
                self._bound_of_checkpoint = None if held is None else check_bound(held)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None

    def _noise_and_steps(self, sample_rate: float, steps: int) -> tuple[float, int]:
        """The noise multiplier, and how many of `steps` may be taken with it."""
        engine, target = self.engine, self.target_epsilon
        if self.noise_multiplier is None:
            assert target is not None
            noise = noise_multiplier_for(
                target,
                self.target_delta,
                sample_rate,
                steps,
                engine.accountant,
                engine.ledger.history,
            )
            return noise, steps
        noise = self.noise_multiplier
        if target is None:
            return noise, steps
        history = engine.ledger.history

        def fits(count: int) -> bool:
            entries = [*history, (noise, sample_rate, count)]
            return epsilon(entries, self.target_delta, engine.accountant) <= target

        if fits(steps):
            return noise, steps
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low == 0:
            raise PrivacyError(
                f"target_epsilon {target:g} leaves no step of noise_multiplier {noise:g}: the "
                f"ledger holds epsilon {engine.get_epsilon(self.target_delta):.4g} at delta "
                f"{self.target_delta:g}; accepted: a larger target, or more noise"
            )
        return noise, low

    def _end_if_spent(self) -> None:
        """Tells Trainer to stop where another step would be beyond the target."""
        if self._last_step is None or self._private is None or self.control.should_training_stop:
            return
        (allowed, charged), done = self._last_step, self._private.private_step.steps
        if done < allowed and self.engine.ledger.steps == charged + done:
            return
        self.control.should_training_stop = True
        step, steps = self.state.global_step, self.state.max_steps
        if step < steps:
            warnings.warn(
                f"target_epsilon {self.target_epsilon:g} leaves no more steps after {step} of "
                f"{steps}: training stops",
                stacklevel=2,
            )
            self.control.should_log = True
            self.control.should_save = self.args.save_strategy == "steps"

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """One draw, unread, and no count of its tokens: no loss may be divided by that."""
        # Between the last step and this one a callback may have charged the ledger.
        self._end_if_spent()
        draw = None if self.control.should_training_stop else next(epoch_iterator, None)
        return [] if draw is None else [draw], None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs a draw's physical batches: forward, backward, clipped sum; the last is left to step.

        Returns:
            The mean loss of the draw's rows; NaN of an empty one, which Trainer's logs leave out.
        """
        model.train()
        private = self._private
        assert private is not None
        total, rows, kept = torch.zeros((), device=self.args.device), 0, 0
        own = type(self).compute_loss is PrivateTrainer.compute_loss
        for batch, piece in inputs:
            prepared = self._prepare_inputs(batch)
            if piece.kept > 1:
                self._probe(model, prepared, piece)
            with self.compute_loss_context_manager():
                if own:
                    loss = self._losses(model, prepared)[0].sum()
                else:
                    loss = self.compute_loss(model, prepared)
            if loss.dim() != 0:
                raise ConfigError(
                    f"compute_loss returned {tuple(loss.shape)}; accepted: a scalar, the mean over "
                    "records of each record's own loss"
                )
            # Not a mean, whose 1 / n one record more would change, and with it how the gradients
            # of all others are rounded. Of a subclass' mean times n, n / n comes back: 1, or on a
            # device that divides by multiplying, nearly.
            loss = loss if own else _at_least_fp32(loss) * piece.records
            loss.backward()
            total += loss.detach()
            rows, kept = rows + piece.records, kept + piece.kept
            if not piece.last:
                private.step()
        return total / rows if kept else torch.full_like(total, math.nan)

    def _probe(self, model: nn.Module, inputs: Any, piece: Piece) -> None:
        """Raises PrivacyError if compute_loss couples records; see privacy.probe."""
        assert self._private is not None
        probe = self._private.private_step.probe
        assert probe is not None

        def loss_of(batch: Any) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, batch)
                return loss

        autocast = bool(self.args.bf16)
        probe.attempt(loss_of, inputs, piece.records, "compute_loss", autocast)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training, the mean over records of each record's own loss; otherwise Trainer's."""
        if not model.training and self.compute_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        losses, outputs = self._losses(model, inputs)
        mean = losses.mean()
        return (mean, outputs) if return_outputs else mean

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """(each record's own loss (n,), what the model returned)."""
        names = self.label_names if self.compute_loss_func is None else ["labels"]
        labels = inputs.get("labels")
        if names != ["labels"] or labels is None:
            raise ConfigError(
                f"label_names are {names} and the batch has {sorted(inputs)}; accepted: 'labels', "
                "or a compute_loss_func that needs no other"
            )
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return _at_least_fp32(self._record_losses(outputs, labels)), outputs

    def _record_losses(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            losses: Tensor = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
            if losses.shape != labels.shape[:1]:
                raise ConfigError(
                    f"compute_loss_func returned {tuple(losses.shape)}; accepted: "
                    f"{tuple(labels.shape[:1])}, each record's own loss"
                )
            return losses
        base, kind = self._base_and_kind()
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if kind == "ForCausalLM":
            return causal_lm_loss(logits, labels, reduction="none")
        if kind == "ForSequenceClassification":
            problem_type = base.config.problem_type
            return sequence_classification_loss(
                logits, labels, problem_type=problem_type, reduction="none"
            )
        raise ConfigError(
            f"model is {type(base).__name__}, whose loss for each record is not known here; "
            "accepted: a causal language model, a sequence classifier, or compute_loss_func"
        )

    def _base_and_kind(self) -> tuple[Any, str | None]:
        """The model without PEFT's around it, and the name of its kind of loss."""
        base: Any = self.model
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        # GPT-2's class has another name than its kind.
        if type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return base, "ForCausalLM"
        return base, getattr(base, "loss_type", None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the epsilon spent so far."""
        if self._private is not None:
            logs["epsilon"] = self.engine.get_epsilon(self.target_delta)
            if self.adaptive_clipping is not None:
                logs["max_grad_norm"] = self._private.private_step.mechanism.max_grad_norm[0]
            for callback in self.callback_handler.callbacks:
                bar = getattr(callback, "training_bar", None)
                if isinstance(callback, ProgressCallback) and bar is not None:
                    bar.set_postfix_str(f"epsilon {logs['epsilon']:.4g}")
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: their count would tell how many records were drawn, which is not to be known."""
        return 0

    # Gradients are clipped record by record, in the private step. There is none to clip here, and
    # no norm to log: it would come from private records.

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    # The state of generators that made masks for private records is kept nowhere.

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        return None


def _at_least_fp32(losses: Tensor) -> Tensor:
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


class _Draws:
    """The training loader as Trainer sees it: an item is one draw, its batches not yet read.

    Args:
        plain: the loader to draw from.
        steps: draws an epoch.
    """

    def __init__(self, plain: DataLoader[Any], steps: int) -> None:
        self.plain, self.steps = plain, steps
        self.dataset: Any = plain.dataset
        self._loader: PrivateDataLoader | None = None
        self._step: PrivateStep | None = None
        self._ended = False

    def begin(self, loader: PrivateDataLoader, step: PrivateStep) -> None:
        """Draws come from `loader`, which announces their batches to `step`."""
        self._loader, self._step = loader, step

    def end(self) -> None:
        """There are no more draws."""
        self._ended = True

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        if self._ended:
            return
        assert self._loader is not None
        batches = iter(self._loader)
        for _ in range(self.steps):
            yield self._draw(batches)

    def _draw(self, batches: Iterator[Any]) -> Iterator[Any]:
        """(batch, its Piece) up to the draw's last."""
        assert self._step is not None
        for batch in batches:
            piece = self._step.piece
            assert piece is not None
            yield batch, piece
            if piece.last:
                return


class _Privately(TrainerCallback):
    """Makes training private when all it needs is there, and ends it with the budget."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer leaves its last epoch's loader unfinished, which would have checked by itself.
        if self.trainer._private is not None:
            self.trainer._private.private_step.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_if_spent()


def _check_shift(model: Any) -> None:
    """Of some causal language models (BART's decoder) the own loss takes labels that are shifted
    already: shifted here again, they would be those of the token after the next.

    Raises:
        ConfigError: the model is one of them.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device).view(1, 4)
    try:
        with torch.no_grad(), generators_kept():
            made = model.eval()(input_ids=ids, labels=ids)
        own, logits = made.loss.float(), made.logits.float()
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        shifted = causal_lm_loss(logits, ids)
    except Exception:
        # It takes more than ids, or makes no loss of its own: nothing is known of it.
        return
    finally:
        for module, training in modes:
            module.training = training
    if torch.isclose(own, plain, rtol=1e-4) and not torch.isclose(own, shifted, rtol=1e-4):
        raise ConfigError(
            f"model is {type(model).__name__}, whose own loss takes labels that are shifted "
            "already, and PrivateTrainer's would shift them again; accepted: a compute_loss_func "
            "that does as the model's own"
        )


def _check_args(args: TrainingArguments) -> None:
    """Raises ConfigError for the settings that private training cannot honour."""
    refused = [
        (
            args.fp16,
            "fp16 is True: its GradScaler skips steps and changes its scale by what private "
            "gradients hold, and a private step may do neither; accepted: bf16=True or fp32",
        ),
        (
            args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp,
            f"args ask for {args.world_size} processes, {args.n_gpu} GPUs, DeepSpeed or FSDP; "
            "accepted: one process on one device (CUDA_VISIBLE_DEVICES chooses it)",
        ),
        (
            args.label_smoothing_factor,
            f"label_smoothing_factor is {args.label_smoothing_factor}: Trainer's divides by the "
            "batch's number of labels; accepted: 0, or smoothing inside compute_loss_func",
        ),
        (
            args.neftune_noise_alpha,
            f"neftune_noise_alpha is {args.neftune_noise_alpha}: its noise is scaled by the "
            "batch's longest record, so that records depend on each other; accepted: None",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size is True: it starts over after steps that were released; "
            "accepted: False",
        ),
        (
            getattr(args, "train_sampling_strategy", "random") != "random"
            or getattr(args, "group_by_length", False),
            f"train_sampling_strategy is {getattr(args, 'train_sampling_strategy', None)!r}, which "
            "picks who comes together; accepted: 'random', which stands for Poisson sampling here",
        ),
        (
            str(getattr(args, "include_num_input_tokens_seen", "no")) not in ("no", "False"),
            "include_num_input_tokens_seen counts the tokens of private draws; accepted: 'no'",
        ),
        (
            args.push_to_hub,
            "push_to_hub is True: it would publish losses, which epsilon does not cover; accepted: "
            "False, and pushing the model itself afterwards",
        ),
        (
            any(part in str(args.optim).lower() for part in ("layerwise", "lomo")),
            f"optim is {args.optim}, which updates in backward, around the private step; accepted: "
            "any other",
        ),
    ]
    for given, message in refused:
        if given:
            raise ConfigError(f"args: {message}")
