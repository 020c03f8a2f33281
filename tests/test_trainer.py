"""PrivateTrainer: Trainer's loop, the engine's step."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import AdaptiveClipping, Ledger, PrivacyEngine, epsilon
from ffa_kernels.privacy.probe import Probe

transformers = pytest.importorskip("transformers")
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:PrivateTrainer. loss", "ignore:PrivacyEngine.seed", "ignore:Initializing libiomp5"
    ),
]

RECORDS, TOKENS, VOCABULARY, DELTA = 24, 6, 32, 1e-3


def causal_model(tied=False, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    return ffa.convert(model, r=2, target_modules=["q_proj", "v_proj"], **options)


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    return ffa.convert(
        model, r=2, target_modules=["query", "value"], modules_to_save=["classifier"]
    )


def gpt2():
    """A causal language model by another name, whose linear layers are Conv1D."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=TOKENS
    )
    return ffa.convert(transformers.GPT2LMHeadModel(config), r=2, target_modules=["c_attn"])


def peft_model():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return ffa.convert(peft.get_peft_model(transformers.LlamaForCausalLM(config), lora))


def tokens(n=RECORDS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (n, TOKENS), generator=generator)


def causal_records(n=RECORDS):
    records = []
    for i, row in enumerate(tokens(n)):
        # Of different lengths, so that a loss over the batch's tokens would be another one.
        labels = row.clone()
        labels[2 + i % (TOKENS - 1) :] = -100
        records.append({"input_ids": row, "labels": labels})
    return records


def classified_records(n=RECORDS):
    return [{"input_ids": row, "labels": i % 3} for i, row in enumerate(tokens(n))]


def arguments(folder, **changed):
    given = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        **changed,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def trainer_of(folder, model=None, records=None, changed_args=None, **options):
    options = {"noise_multiplier": 1.0, "target_delta": DELTA, **options}
    if "engine" not in options:
        options.setdefault("accountant", "rdp")  # a hundred times faster than the default
    if options["noise_multiplier"] is None:
        del options["noise_multiplier"]
    return ffa.PrivateTrainer(
        causal_model() if model is None else model,
        arguments(folder, **(changed_args or {})),
        train_dataset=causal_records() if records is None else records,
        **options,
    )


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Stop(TrainerCallback):
    """Ends training after step `at`, as an interruption would; calls `also` there instead."""

    def __init__(self, at, also=None):
        self.at, self.also = at, also

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            if self.also is None:
                control.should_training_stop = True
            else:
                self.also()


# What it trains, and what that costs.


@pytest.mark.parametrize(
    ("make", "records"),
    [
        (causal_model, causal_records),
        (classifier, classified_records),
        (gpt2, causal_records),
        (peft_model, causal_records),
    ],
    ids=["causal", "classifier", "gpt2", "peft"],
)
def test_a_model_is_trained_and_the_cost_is_logged(tmp_path, make, records):
    model = make()
    before, frozen = trained(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, model, records(), accountant="prv")
    trainer.train()
    assert trainer.state.global_step == 3
    after = trained(model)
    assert all((after[n] != before[n]).any() for n in before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n not in before)
    rate = 8 / RECORDS
    assert trainer.engine.ledger.history == [(1.0, rate, 3)]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["epsilon"] for log in logs] == [
        pytest.approx(epsilon([(1.0, rate, k)], DELTA)) for k in (1, 2, 3)
    ]
    assert all(log["loss"] > 0 and "grad_norm" not in log for log in logs)
    # The account is in the output folder, and another process could go on with it.
    trainer.engine.ledger.close()
    assert Ledger(tmp_path / "ledger.jsonl").history == [(1.0, rate, 3)]


def test_one_step_is_that_of_the_plain_loop(tmp_path):
    """The same seed in both: the same draw, noise, and bits of every trained tensor."""
    plain = causal_model().train()
    model, optimizer, loader = PrivacyEngine(seed=3).make_private(
        module=plain,
        optimizer=torch.optim.AdamW(
            [p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        ),
        data_loader=DataLoader(
            causal_records(), batch_size=8, collate_fn=transformers.default_data_collator
        ),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        loss_reduction="sum",
        max_physical_batch_size=4,
        pad_physical_batches=False,
    )
    pieces = 0
    for batch in loader:
        logits = model(input_ids=batch["input_ids"]).logits
        ffa.causal_lm_loss(logits, batch["labels"], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
        pieces += 1
        if optimizer.private_step.steps == 1:
            break
    assert pieces > 1
    trainer = trainer_of(
        tmp_path,
        engine=PrivacyEngine(accountant="rdp", seed=3),
        max_grad_norm=0.5,
        changed_args={
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "lr_scheduler_type": "constant",
        },
    )
    trainer.train()
    ours, theirs = trained(trainer.model), trained(model)
    assert all(torch.equal(ours[n], theirs[n]) and (ours[n] != 0).any() for n in theirs)


def test_accumulation_cuts_a_draw_and_changes_nothing_else(tmp_path, monkeypatch):
    """Expected batch 8 as 8 x 1 and as 2 x 4: the same draws, the same sums."""
    # Its forwards are none of the draws' records.
    monkeypatch.setattr(Probe, "done", True)
    results, sizes = [], []
    for physical, accumulation in ((8, 1), (2, 4)):
        model = causal_model().double()
        seen = []
        model.register_forward_pre_hook(
            lambda m, a, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer = trainer_of(
            tmp_path,
            model,
            engine=PrivacyEngine(accountant="rdp", seed=5),
            noise_multiplier=0.0,
            max_grad_norm=0.01,
            changed_args={
                "per_device_train_batch_size": physical,
                "gradient_accumulation_steps": accumulation,
                "optim": "sgd",
                "learning_rate": 1.0,
                "lr_scheduler_type": "constant",
            },
        )
        trainer.train()
        assert max(seen) <= physical
        assert trainer.state.global_step == 3 == trainer.engine.stats["steps"]
        results.append(trained(model))
        sizes.append(sum(seen))
    assert sizes[0] == sizes[1]
    for name, value in results[0].items():
        # A record's part may fall on the other side of a grid point: one grid step of C 2^-24 for
        # each record that was drawn, over L.
        bound = sizes[0] * 0.01 * 2.0**-24 / 8
        assert (value - results[1][name]).abs().max() <= bound
        assert value.abs().max() > 1e3 * bound


def test_the_loss_in_training_is_a_mean_over_records(tmp_path):
    """The gradient for each record that reaches the engine is of the record's own token mean."""
    trainer = trainer_of(tmp_path)
    caught = []

    class Caught(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            step = trainer._private.private_step
            caught.append([t.parameter.grad_sample.clone() for t in step.trained])
            caught.append(step.piece.records)

    trainer.add_callback(Caught())
    batches = []
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: batches.append(prepare(inputs)) or batches[-1]
    start = trained(trainer.model)
    trainer.args.max_steps = 1
    trainer.train()
    (gradients, rows), batch = caught, batches[-1]
    fresh = causal_model().train()
    assert all(torch.equal(p, start[n]) for n, p in trained(fresh).items())
    for i in range(rows):
        fresh.zero_grad()
        logits = fresh(input_ids=batch["input_ids"][i : i + 1]).logits
        predicted = batch["labels"][i, 1:]
        nn.functional.cross_entropy(logits[0, :-1], predicted).backward()
        own = [p.grad for p in fresh.parameters() if p.requires_grad]
        for gradient, expected in zip(gradients, own, strict=True):
            torch.testing.assert_close(gradient[i], expected)


def test_checkpointed_activations_change_nothing(tmp_path):
    results = []
    for checkpointed in (False, True):
        trainer = trainer_of(
            tmp_path,
            engine=PrivacyEngine(accountant="rdp", seed=7),
            changed_args={"activation_checkpointing": checkpointed, "max_steps": 1},
        )
        trainer.train()
        results.append(trained(trainer.model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_no_gradient_is_rounded_by_how_many_records_there_are(tmp_path, monkeypatch):
    """Each record's loss takes the gradient 1, not about n * (1 / n), in draws of any size."""
    # Its backward passes are none of training's.
    monkeypatch.setattr(Probe, "done", True)
    seen = []

    def losses(outputs, labels, num_items_in_batch=None):
        each = ffa.causal_lm_loss(outputs.logits, labels, reduction="none")
        if each.requires_grad:
            each.register_hook(seen.append)
        return each

    changed = {"per_device_train_batch_size": 12, "max_steps": 12, "bf16": True}
    trainer = trainer_of(tmp_path, compute_loss_func=losses, changed_args=changed)
    trainer.train()
    assert len({len(g) for g in seen}) > 3
    assert all((g == 1).all() for g in seen)


def test_a_mean_of_ones_own_compute_loss_trains_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "done", True)

    class Own(ffa.PrivateTrainer):
        def compute_loss(self, model, inputs, **options):
            return super().compute_loss(model, inputs, **options)

    results = []
    for kind in (ffa.PrivateTrainer, Own):
        monkeypatch.setattr(ffa, "PrivateTrainer", kind)
        engine = PrivacyEngine(accountant="rdp", seed=6)
        trainer = trainer_of(tmp_path, engine=engine, changed_args={"max_steps": 2})
        trainer.train()
        results.append((trained(trainer.model), trainer.state.log_history[-1]["train_loss"]))
    (ours, loss), (theirs, their_loss) = results
    assert loss == pytest.approx(their_loss, rel=1e-6) and loss > 0.1
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


def test_evaluation_is_trainers_own(tmp_path):
    trainer = trainer_of(
        tmp_path,
        eval_dataset=causal_records(10),
        changed_args={"eval_strategy": "epoch", "per_device_eval_batch_size": 10},
    )
    trainer.train()
    batch = transformers.default_data_collator(causal_records(10))
    trainer.model.eval()
    with torch.no_grad():
        stock = trainer.model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock, rel=1e-6)
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2 and all(log["epsilon"] > 0 for log in evaluated)
    assert trainer.engine.ledger.steps == 3


class Pooled(nn.Module):
    """A model that transformers knows nothing of."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids):
        return {"logits": self.head(self.body(self.embedding(input_ids).mean(dim=1)).tanh())}


def test_a_loss_of_ones_own_for_each_record(tmp_path):
    def losses(outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is None
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    def pooled():
        torch.manual_seed(0)
        return ffa.convert(Pooled(), r=2, target_modules=["body"], modules_to_save=["head"])

    options = {
        "changed_args": {"label_names": ["labels"]},
        "eval_dataset": classified_records(6),
        "new_ledger": True,
    }
    trainer = trainer_of(
        tmp_path / "a", pooled(), classified_records(), compute_loss_func=losses, **options
    )
    before = trained(trainer.model)
    trainer.train()
    assert all((p != before[n]).any() for n, p in trained(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer = trainer_of(tmp_path / "b", pooled(), classified_records(), **options)
    with pytest.raises(ConfigError, match="model is Pooled, whose loss for each record is not"):
        trainer.train()
    assert trainer.engine.ledger.steps == 0
    trainer = trainer_of(
        tmp_path / "c",
        pooled(),
        classified_records(),
        compute_loss_func=lambda outputs, labels, **_: outputs["logits"].mean(),
        **options,
    )
    with pytest.raises(ConfigError, match=r"compute_loss_func returned \(\)"):
        trainer.train()


def test_a_loss_that_couples_records_is_found(tmp_path):
    def over_all_tokens(outputs, labels, num_items_in_batch=None):
        losses = ffa.causal_lm_loss(outputs["logits"], labels, reduction="none")
        count = (labels[:, 1:] != -100).sum(dim=1)
        return losses * count * len(labels) / count.sum()

    trainer = trainer_of(tmp_path, compute_loss_func=over_all_tokens)
    with pytest.raises(PrivacyError, match="compute_loss couples records"):
        trainer.train()
    assert trainer.engine.ledger.steps == 0


def test_a_sum_of_ones_own_compute_loss_is_found(tmp_path, monkeypatch):
    """It would be multiplied by the number of records, and move with it."""

    class Sum(ffa.PrivateTrainer):
        def compute_loss(self, model, inputs, **options):
            return super().compute_loss(model, inputs, **options) * len(inputs["labels"])

    monkeypatch.setattr(ffa, "PrivateTrainer", Sum)
    trainer = trainer_of(tmp_path)
    with pytest.raises(PrivacyError, match="the loss is a sum over records and taken for a mean"):
        trainer.train()
    assert trainer.engine.ledger.steps == 0


# The budget.


def test_target_epsilon_is_met_and_not_exceeded(tmp_path):
    trainer = trainer_of(tmp_path, noise_multiplier=None, target_epsilon=3.0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert 2.9 < trainer.engine.get_epsilon(DELTA) <= 3.0
    trainer.target_epsilon = 2.5
    with pytest.raises(PrivacyError, match=r"target_epsilon 2\.5 is already spent"):
        trainer.train()
    assert trainer.engine.ledger.steps == 3


def test_training_stops_before_the_step_that_would_exceed_the_target(tmp_path):
    rate = 8 / RECORDS
    target = epsilon([(1.0, rate, 3)], DELTA, "rdp") + 1e-6
    trainer = trainer_of(tmp_path, target_epsilon=target, changed_args={"max_steps": 9})
    with pytest.warns(UserWarning, match="leaves no more steps after 3 of 9: training"):
        trainer.train()
    assert trainer.state.global_step == 3 == trainer.engine.ledger.steps
    assert trainer.engine.get_epsilon(DELTA) <= target < epsilon([(1.0, rate, 4)], DELTA, "rdp")
    with pytest.raises(PrivacyError, match="leaves no step of noise_multiplier 1"):
        trainer.train()


def test_training_stops_where_something_else_was_charged(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    trainer = trainer_of(
        tmp_path,
        engine=engine,
        target_epsilon=30.0,
        callbacks=[Stop(1, also=lambda: engine.ledger.charge(50.0, 0.1))],
        changed_args={"max_steps": 5},
    )
    with pytest.warns(UserWarning, match="leaves no more steps after 1 of 5"):
        trainer.train()
    assert trainer.state.global_step == 1 and engine.ledger.steps == 2


# Checkpoints.


def test_a_resumed_run_goes_on_with_the_ledger_and_draws_afresh(tmp_path):
    options = {"noise_multiplier": None, "target_epsilon": 3.0}
    saving = {"changed_args": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}}
    first = trainer_of(tmp_path, callbacks=[Stop(2)], **options, **saving)
    first.train()
    assert first.state.global_step == 2
    noise = first.engine.ledger.history
    key = first.engine._sampling.state[:4].clone()
    spent = first.engine.get_epsilon(DELTA)
    first.engine.ledger.close()
    folder = tmp_path / "checkpoint-2"
    assert not list(folder.glob("rng_state*"))

    second = trainer_of(tmp_path, **options, **saving)
    found = {}

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
            found["parameters"] = trained(second.model)
            found["moments"] = [s["exp_avg"].clone() for s in optimizer.state.values()]
            found["scheduler"] = lr_scheduler.last_epoch

    second.add_callback(Begun())
    assert second.engine.get_epsilon(DELTA) == spent
    second.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, found["parameters"][n]) for n, p in trained(first.model).items())
    states = first.optimizer.state.values()
    for moment, state in zip(found["moments"], states, strict=True):
        assert torch.equal(moment, state["exp_avg"]) and (moment != 0).any()
    assert found["scheduler"] == 2
    assert second.state.global_step == 4 == second.engine.ledger.steps
    assert (second.engine._sampling.state[:4] != key).all()
    assert spent < 2.9 < second.engine.get_epsilon(DELTA) <= 3.0
    # Noise for four steps of 3.0 fits two of what the first two left.
    sigmas = [sigma for sigma, _, _ in second.engine.ledger.history]
    assert sigmas == pytest.approx([noise[0][0]] * len(sigmas), rel=5e-3)
    logs = [log["epsilon"] for log in second.state.log_history if "loss" in log]
    assert len(logs) == 4 and logs == sorted(logs)


def test_a_smaller_base_of_tied_weights_is_saved_at_each_epoch_and_resumed(tmp_path):
    def model():
        return causal_model(tied=True, base_dtype="int8")

    saving = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    first = trainer_of(tmp_path, model(), changed_args=saving, callbacks=[Stop(3)])
    first.train()
    first.engine.ledger.close()
    second = trainer_of(tmp_path, model(), changed_args=saving)
    found = {}

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            found.update(trained(second.model))

    second.add_callback(Begun())
    second.train(resume_from_checkpoint=True)
    assert found and all(torch.equal(p, found[n]) for n, p in trained(first.model).items())
    head, embedding = second.model.lm_head, second.model.get_input_embeddings()
    assert head.stored is embedding.stored and head.scale is embedding.scale
    assert second.state.global_step == 6


ADAPTIVE = {
    "adaptive_clipping": AdaptiveClipping(target_quantile=0.9, count_noise_multiplier=2.0),
    "max_grad_norm": 1e-3,
    "changed_args": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
}


def bounds_at_begin(trainer):
    """A list that gets the bound with which each run of the trainer begins."""
    found = []

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            found.append(trainer._private.max_grad_norm)

    trainer.add_callback(Begun())
    return found


def test_the_bound_of_adaptive_clipping_is_logged_and_goes_on_from_the_checkpoint(tmp_path):
    first = trainer_of(tmp_path, callbacks=[Stop(2)], **ADAPTIVE)
    first.train()
    reached = first._private.max_grad_norm
    assert reached != 1e-3
    assert [log["max_grad_norm"] for log in first.state.log_history if "loss" in log][1] == reached
    first.engine.ledger.close()
    second = trainer_of(tmp_path, **ADAPTIVE)
    begun = bounds_at_begin(second)
    second.train(resume_from_checkpoint=True)
    assert begun == [reached] and second.state.global_step == 4
    # A run from no checkpoint begins at the bound that is given, whatever the one before did.
    second.train()
    assert begun == [reached, 1e-3]


def test_a_checkpoint_without_a_bound_is_gone_on_from_at_the_one_given(tmp_path):
    fixed = {**ADAPTIVE, "adaptive_clipping": None}
    first = trainer_of(tmp_path, callbacks=[Stop(2)], **fixed)
    first.train()
    assert not any("max_grad_norm" in log for log in first.state.log_history)
    first.engine.ledger.close()
    second = trainer_of(tmp_path, **ADAPTIVE)
    begun = bounds_at_begin(second)
    second.train(resume_from_checkpoint=True)
    assert begun == [1e-3]


@pytest.mark.parametrize("bound", [math.nan, 0.0, [1.0], "1"])
def test_a_checkpoint_with_a_bad_bound_is_refused_before_anything_is_charged(tmp_path, bound):
    trainer = trainer_of(tmp_path, callbacks=[Stop(2)], **ADAPTIVE)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    torch.save({**torch.load(path), "max_grad_norm": bound}, path)
    before = trainer.engine.ledger.steps
    with pytest.raises(ConfigError, match=r"optimizer.pt: max_grad_norm is .*accepted"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.engine.ledger.steps == before


def test_a_run_cut_off_in_the_middle_of_a_draw_is_gone_on_from_its_checkpoint(tmp_path):
    pieces = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    options = {**ADAPTIVE, "changed_args": {**ADAPTIVE["changed_args"], **pieces}}
    trainer = trainer_of(tmp_path, **options)
    begun, reached, losses = bounds_at_begin(trainer), [], trainer._losses

    def cut_off(model, inputs):
        if trainer.state.global_step == 2 and not reached and trainer._private.private_step._summed:
            reached.append(trainer._private.max_grad_norm)
            raise KeyboardInterrupt
        return losses(model, inputs)

    trainer._losses = cut_off
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert begun == [1e-3, *reached] and trainer.state.global_step == 4


def test_a_peft_models_checkpoint_is_its_adapter(tmp_path):
    saving = {"changed_args": {"save_strategy": "steps", "save_steps": 2}}
    first = trainer_of(tmp_path, peft_model(), callbacks=[Stop(2)], **saving)
    first.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    first.engine.ledger.close()
    second = trainer_of(tmp_path, peft_model(), **saving)
    begun = {}

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.update(trained(second.model))

    second.add_callback(Begun())
    second.train(resume_from_checkpoint=True)
    assert len(begun) == 1
    for name, value in begun.items():
        assert torch.equal(value, saved[name.replace(".default", "")]) and (value != 0).any()
    assert second.engine.ledger.steps == 3


def test_what_a_checkpoint_released_must_be_in_the_ledger(tmp_path):
    saving = {"changed_args": {"save_strategy": "steps", "save_steps": 2}}
    trainer_of(tmp_path, **saving).train()
    other = trainer_of(tmp_path, ledger=tmp_path / "other.jsonl", **saving)
    with pytest.raises(PrivacyError, match="checkpoint is of step 3, but the ledger holds 0"):
        other.train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_releases_nothing(tmp_path):
    saving = {"changed_args": {"save_strategy": "steps", "save_steps": 3}}
    trainer = trainer_of(tmp_path, **saving)
    trainer.train()
    after = trained(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.engine.ledger.steps == 3
    assert all(torch.equal(p, after[n]) for n, p in trained(trainer.model).items())


def test_a_saved_model_has_the_adapter_in_it(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in trained(trainer.model).items():
        assert torch.equal(saved[name], value)
    batch = transformers.default_data_collator(causal_records(4))
    trainer.model.eval()
    with torch.no_grad():
        adapted = trainer.model(**batch).logits
    ffa.merge(trainer.model).save_pretrained(tmp_path / "merged")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, adapted)


# What is not covered by epsilon, and what nobody may know.


def test_what_was_trained_is_checked_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path)
    layer = next(m for m in trainer.model.modules() if isinstance(m, ffa.FFALinear))

    def nudge():
        # Behind the version counter, so that only the values tell.
        layer.weight.data[0, 0] += 1

    trainer.add_callback(Stop(2, nudge))
    with pytest.raises(PrivacyError, match="weight is frozen, and moved"):
        trainer.train()


def test_what_epsilon_does_not_cover_is_said_once(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.warns(UserWarning, match="epsilon does not cover them"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PrivateTrainer")
        trainer.train()
    assert trainer.engine.ledger.steps == 6
    # Neither flops nor tokens: they would tell how many records were drawn.
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    state = json.loads(Path(tmp_path / "state.json").read_text())
    assert state["total_flos"] == 0 and state["num_input_tokens_seen"] == 0


def test_masks_do_not_follow_trainers_public_seed(tmp_path):
    seeds = set()
    for _ in range(2):
        trainer = trainer_of(
            tmp_path, engine=PrivacyEngine(accountant="rdp"), changed_args={"max_steps": 1}
        )
        trainer.train()
        seeds.add(torch.initial_seed())
    assert len(seeds) == 2 and trainer.args.seed not in seeds


def test_the_progress_bar_shows_epsilon(tmp_path, capsys):
    trainer = trainer_of(tmp_path, changed_args={"disable_tqdm": False})
    trainer.train()
    spent = trainer.engine.get_epsilon(DELTA)
    assert f"epsilon {spent:.4g}" in capsys.readouterr().err


# Refusals.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "fp16 is True: its GradScaler skips steps"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor is 0.1"),
        ("neftune_noise_alpha", 5.0, "neftune_noise_alpha is 5.0"),
        ("auto_find_batch_size", True, "auto_find_batch_size is True"),
        ("train_sampling_strategy", "group_by_length", "train_sampling_strategy"),
        ("include_num_input_tokens_seen", "all", "include_num_input_tokens_seen"),
        ("push_to_hub", True, "push_to_hub is True"),
        ("optim", "galore_adamw_layerwise", "optim is galore_adamw_layerwise"),
    ],
)
def test_settings_that_cannot_be_private_are_refused(tmp_path, name, value, message):
    args = arguments(tmp_path / "out")
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=message):
        ffa.PrivateTrainer(causal_model(), args, noise_multiplier=1.0, target_delta=DELTA)
    assert not (tmp_path / "out").exists()


def test_private_settings_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="target_epsilon and noise_multiplier are None"):
        trainer_of(tmp_path, noise_multiplier=None)
    with pytest.raises(ConfigError, match="engine is given together with ledger"):
        trainer_of(
            tmp_path, engine=PrivacyEngine(accountant="rdp"), ledger=tmp_path / "ledger.jsonl"
        )
    with pytest.raises(ConfigError, match="accountant is 'gdp'"):
        trainer_of(tmp_path, accountant="gdp")
    for changed, message in [
        ({"target_delta": 0.5}, "target_delta is 0.5; accepted: above 0 and below 1 / 24"),
        ({"clipping": "ghost"}, "clipping is 'ghost'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"changed_args": {"per_device_train_batch_size": 25}}, "batch size is 25"),
    ]:
        trainer = trainer_of(tmp_path, engine=PrivacyEngine(accountant="rdp"), **changed)
        with pytest.raises(ConfigError, match=message):
            trainer.train()
        assert trainer.engine.ledger.history == []


class Stream(IterableDataset):
    def __iter__(self):
        yield from causal_records()


def test_a_stream_of_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data set is a stream"):
        trainer_of(tmp_path, records=Stream()).train()


def test_the_settings_given_are_left_as_they_were(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    ffa.PrivateTrainer(causal_model(), args, noise_multiplier=1.0, target_delta=DELTA)
    assert args.gradient_accumulation_steps == 2 and not args.ignore_data_skip


def test_no_noise_is_no_privacy_and_said_so(tmp_path):
    trainer = trainer_of(tmp_path, noise_multiplier=0.0)
    trainer.train()
    assert all(math.isinf(log["epsilon"]) for log in trainer.state.log_history)


def test_an_empty_draw_is_a_step_without_a_loss(tmp_path):
    """At an expected size of 1, a third of the draws are empty: each is charged and noised."""
    trainer = trainer_of(
        tmp_path,
        engine=PrivacyEngine(accountant="rdp", seed=0),
        changed_args={"per_device_train_batch_size": 1, "max_steps": 12},
    )
    losses = []
    step = trainer.training_step
    trainer.training_step = lambda *a: losses.append(step(*a)) or losses[-1]
    trainer.train()
    assert any(loss.isnan() for loss in losses) and any(loss.isfinite() for loss in losses)
    assert len(losses) == 12 == trainer.engine.ledger.steps
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


def test_bf16_autocast_trains_in_fp32_parameters(tmp_path):
    seen = []
    model = causal_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    trainer = trainer_of(tmp_path, model, changed_args={"bf16": True})
    before = trained(model)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    after = trained(model)
    assert all(p.dtype == torch.float32 and (p != before[n]).any() for n, p in after.items())


@pytest.mark.full
def test_workers_read_ahead_and_the_engine_does_not(tmp_path):
    """Workers prefetch batches; a batch is announced when it is run, and each draw is a step."""
    trainer = trainer_of(
        tmp_path,
        engine=PrivacyEngine(accountant="rdp", seed=5),
        changed_args={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "dataloader_num_workers": 2,
            "max_steps": 5,
        },
    )
    trainer.train()
    alone = trainer_of(
        tmp_path,
        engine=PrivacyEngine(accountant="rdp", seed=5),
        changed_args={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 5,
        },
    )
    alone.train()
    ours, theirs = trained(trainer.model), trained(alone.model)
    assert all(torch.equal(ours[n], theirs[n]) and (ours[n] != 0).any() for n in theirs)


def test_a_causal_model_whose_labels_are_shifted_already_is_refused(tmp_path):
    """BART's decoder takes labels as they are to be predicted: shifted again they would be those
    of the token after the next."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
        encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    model = ffa.convert(transformers.BartForCausalLM(config), r=2, target_modules=["fc1"])
    ids = torch.randint(3, 40, (12, 6))
    records = [{"input_ids": row, "labels": row} for row in ids]
    trainer = trainer_of(tmp_path, model, records)
    with pytest.raises(ConfigError, match="BartForCausalLM, whose own loss takes labels that are"):
        trainer.train()
    assert trainer.engine.ledger.steps == 0 and model.training

    def losses(outputs, labels, num_items_in_batch=None):
        rows = nn.functional.cross_entropy(outputs.logits.mT, labels, reduction="none")
        return rows.mean(dim=1)

    trainer_of(tmp_path / "own", model, records, compute_loss_func=losses).train()

    class Own(ffa.PrivateTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            mean = losses(outputs, inputs["labels"]).mean()
            return (mean, outputs) if return_outputs else mean

    options = {"train_dataset": records, "noise_multiplier": 1.0, "target_delta": DELTA}
    options |= {"accountant": "rdp", "new_ledger": True}
    Own(model, arguments(tmp_path / "subclass"), **options).train()
