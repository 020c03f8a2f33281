"""Losses and layers that couple records are found before anything is released."""

import copy
import dataclasses
import math
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine

RECORDS, TOKENS, WIDTH = 24, 5, 6


class Net(nn.Module):
    """An adapted layer between what `before` and `after` do; logits (n, T, d), or their loss."""

    def __init__(self, before=None, after=None, dropout=0.0):
        super().__init__()
        self.body = ffa.FFALinear(WIDTH, WIDTH, r=2, dropout=dropout)
        self.head = nn.Linear(WIDTH, 3)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.head(self.after(self.body(self.before(x)).tanh()))


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def private(model, data=None, batch_size=8, seed=None, **options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(RECORDS, TOKENS, WIDTH)) if data is None else data
    engine = PrivacyEngine(accountant="rdp", seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(data, batch_size=batch_size)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, **{**settings, **options}
    )
    return engine, *made


def train(model, optimizer, loader, loss_of=lambda y: y.square().mean()):
    for (x,) in loader:
        loss_of(model(x)).backward()
        optimizer.step()


def attend(x):
    flat = x.flatten(1)
    return torch.einsum("nm,mtd->ntd", (flat @ flat.T / flat.shape[1]).softmax(dim=1), x)


def route(x):
    """A capacity for the whole batch: the better half."""
    sums = x.sum((1, 2))
    return x * (0.1 + 0.9 * (sums >= sums.mean()))[:, None, None]


COUPLED = {
    "centred over the batch": lambda: Net(after=Do(lambda x: x - x.mean(0))),
    "attention over the batch": lambda: Net(before=Do(attend)),
    "scaled by the batch's largest": lambda: Net(before=Do(lambda x: x / x.abs().max())),
    "a router with a capacity": lambda: Net(after=Do(route)),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_layers_that_mix_records_are_found(name, clipping):
    torch.manual_seed(2)
    engine, model, optimizer, loader = private(COUPLED[name](), clipping=clipping)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrivacyError, match="one of its layers, couples records"):
        train(model, optimizer, loader)
    assert engine.ledger.steps == 0
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_tokens_taken_for_records_by_chance_are_found():
    """A model of tokens first, in a batch of as many records as tokens."""
    swapped = Net(before=Do(lambda x: x.transpose(0, 1)), after=Do(lambda x: x.transpose(0, 1)))
    engine, model, optimizer, loader = private(swapped, batch_size=TOKENS)
    with pytest.raises(PrivacyError, match="its first dimension must be the record"):
        train(model, optimizer, loader)
    assert engine.ledger.steps == 0


SOUND = {
    "plain": Net,
    "dropout": lambda: Net(before=nn.Dropout(0.5), dropout=0.3),
    "checkpointed": lambda: Net(before=Do(lambda x: checkpoint(torch.sin, x, use_reentrant=False))),
    "normalised in each record": lambda: Net(after=nn.LayerNorm(WIDTH).requires_grad_(False)),
    "noise of its own": lambda: Net(before=Do(lambda x: x + 1e-4 * torch.empty(1).normal_())),
}


@pytest.mark.filterwarnings("ignore:PrivacyEngine.seed")
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize(
    "options",
    [
        {"poisson_sampling": True},
        {"max_physical_batch_size": 4},
        {"clipping": "per_layer"},
        {"loss_scale": 1024.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sound_models_train_as_without_a_probe(name, options):
    """No generator is moved, no gradient touched."""
    results = []
    for probed in (True, False):
        torch.manual_seed(2)
        engine, model, optimizer, loader = private(SOUND[name](), seed=5, **options)
        torch.manual_seed(1)
        if not probed:
            optimizer.private_step.probe = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for (x,) in loader:
                optimizer.scale(model(x).square().mean()).backward()
                optimizer.step()
        assert not probed or optimizer.private_step.probe.concluded
        assert engine.ledger.steps == len(loader)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], p) for n, p in results[1].items())


# Losses.


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return ffa.convert(transformers.LlamaForCausalLM(config), r=2, target_modules=["v_proj"])


def sentences(equal_lengths):
    """Token ids (n, 6) and labels, in which padding is -100."""
    ids = torch.randint(1, 40, (RECORDS, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if not equal_lengths:
        for k in range(RECORDS):
            labels[k, 2 + k % 5 :] = -100
    return TensorDataset(ids, labels)


@pytest.mark.parametrize("equal_lengths", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_transformers_own_causal_lm_loss_is_found(equal_lengths, autocast):
    """Its mean over the batch's tokens; also where these happen to be as many in each record."""
    engine, model, optimizer, loader = private(language_model(), sentences(equal_lengths))
    ids, labels = next(iter(loader))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    with pytest.raises(PrivacyError, match="the model's loss, or one of its layers, couples"):
        optimizer.step()
    assert engine.ledger.steps == 0


@pytest.mark.parametrize("autocast", [True, False])
def test_a_loss_that_is_not_trained_on_does_not_matter(autocast):
    engine, model, optimizer, loader = private(language_model(), sentences(False))
    for ids, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=ids, labels=labels)
        assert output.loss.requires_grad
        ffa.causal_lm_loss(output.logits, labels).backward()
        optimizer.step()
    assert engine.ledger.steps == 3 and optimizer.private_step.probe.concluded


def test_a_loss_outside_the_model_is_checked_when_asked():
    engine, model, _, loader = private(Net(), TensorDataset(torch.randn(9, TOKENS, WIDTH)))
    (x,) = next(iter(loader))

    def contrastive(batch):
        y = nn.functional.normalize(model(batch).mean(1), dim=-1)
        return nn.functional.cross_entropy(y @ y.T, torch.arange(len(y)))

    with pytest.raises(PrivacyError, match="the loss couples records"):
        engine.check_loss(model, contrastive, x)
    engine.check_loss(model, lambda batch: model(batch).square().mean(), x)
    with pytest.raises(ConfigError, match="batch has 1 records"):
        engine.check_loss(model, lambda batch: model(batch).mean(), x[:1])
    with pytest.raises(ConfigError, match="module is not private"):
        engine.check_loss(Net(), contrastive, x)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("declared", ["mean", "sum"])
def test_a_loss_taken_for_a_mean_that_is_a_sum_is_found(declared, dropout):
    """And the reverse: n and 1 / n would be left in each record's gradient."""
    kinds = (nn.Dropout(0.3), nn.Dropout(0.3), 0.3) if dropout else ()
    model = Net(*kinds)
    data = TensorDataset(torch.randn(9, TOKENS, WIDTH))
    engine, model, _, loader = private(model, data, loss_reduction=declared)
    (x,) = next(iter(loader))
    losses = {
        "mean": lambda batch: model(batch).square().mean(),
        "sum": lambda batch: model(batch).square().mean(dim=(1, 2)).sum(),
    }
    engine.check_loss(model, losses.pop(declared), x)
    (other, wrong), *_ = losses.items()
    if dropout:
        # Masks of a larger batch are others: nothing can be said, and nothing is.
        engine.check_loss(model, wrong, x)
        return
    message = f"the loss is a {other} over records and taken for a {declared}"
    with pytest.raises(PrivacyError, match=message):
        engine.check_loss(model, wrong, x)
    # One that is made for two records says nothing of three.
    engine.check_loss(model, lambda batch: wrong(batch) * {2: 1.0}[len(batch)], x)
    # Two records are enough.
    with pytest.raises(PrivacyError, match=message):
        engine.check_loss(model, wrong, x[:2])


def test_a_model_that_takes_no_two_records_is_said_not_to_be_probed():
    eight = Net(before=Do(lambda x: x.reshape(8, TOKENS, WIDTH)))
    engine, model, optimizer, loader = private(eight)
    with pytest.warns(UserWarning, match=r"could not be probed.*a batch of two was not taken"):
        for _ in range(3):
            train(model, optimizer, loader)
    assert engine.ledger.steps == 9 and not model._forward_hooks


def test_batches_of_one_have_nothing_to_couple():
    engine, model, optimizer, loader = private(
        COUPLED["centred over the batch"](), max_physical_batch_size=1
    )
    train(model, optimizer, loader, lambda y: y.square().sum())
    assert engine.ledger.steps == 3 and not optimizer.private_step.probe.concluded


def test_copies_of_a_model_carry_no_probe():
    _, model, optimizer, loader = private(Net())
    (x,) = next(iter(loader))
    model.eval()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x), model(x))
    model.train()
    train(model, optimizer, loader)


def test_a_compiled_model_is_traced_whole():
    torch.compiler.reset()
    engine, model, optimizer, loader = private(Net())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, optimizer, loader)
    assert engine.ledger.steps == 3


# Cases of a hostile review: each of these once passed, or was once refused for nothing.


class Recurrent(nn.Module):
    """Records taken for time steps."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x):
        return self.lstm(x)[0]


class ByNorm(torch.autograd.Function):
    """Nothing in forward; in backward the whole batch's gradient has length 1."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


class Answer(Net):
    """A mean over all tokens that count, said in one of several ways."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def forward(self, x):
        logits = super().forward(x)
        counted = x[..., 0] > 0
        return self.say(logits, (logits.square().mean(-1) * counted).sum() / counted.sum())


HIDDEN = {
    "records taken for time": lambda: Net(before=Recurrent()),
    "what came before": lambda: Net(after=Do(lambda x: x.cumsum(0).tanh())),
    "logits less their mean": lambda: nn.Sequential(Net(), Do(lambda z: z - z.mean(0))),
    "logits and their neighbour's": lambda: nn.Sequential(Net(), Do(lambda z: z + z.roll(1, 0))),
    "gradients scaled together": lambda: nn.Sequential(Net(), Do(ByNorm.apply)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_couplings_that_hide_are_found(name):
    torch.manual_seed(2)
    engine, model, optimizer, loader = private(HIDDEN[name]())
    with pytest.raises(PrivacyError, match="couples records"):
        train(model, optimizer, loader)
    assert engine.ledger.steps == 0


WAYS_TO_SAY = {
    "tuple": (lambda z, loss: (loss, z), lambda out: out[0]),
    "scalar": (lambda z, loss: loss, lambda out: out),
    "key": (lambda z, loss: {"total_loss": loss}, lambda out: out["total_loss"]),
    "one element": (lambda z, loss: {"loss": loss[None]}, lambda out: out["loss"].sum()),
    "tokens first": (lambda z, loss: z.transpose(0, 1) / z.norm(), lambda out: out.sum()),
}


@pytest.mark.parametrize("way", WAYS_TO_SAY)
def test_a_models_own_loss_is_found_however_it_is_returned(way):
    torch.manual_seed(2)
    say, take = WAYS_TO_SAY[way]
    engine, model, optimizer, loader = private(Answer(say))
    with pytest.raises(PrivacyError, match="couples records"):
        train(model, optimizer, loader, take)
    assert engine.ledger.steps == 0


def test_a_small_coupling_beside_a_large_tensor_counts_where_each_is_clipped():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.small = nn.Linear(WIDTH, 3)

        def forward(self, x):
            part = self.small(x)
            return torch.cat([1e-4 * (part - part.mean(0)), super().forward(x)], dim=-1)

    torch.manual_seed(2)
    _, model, optimizer, loader = private(Two(), clipping="per_layer")
    with pytest.raises(PrivacyError, match="couples records"):
        train(model, optimizer, loader)


def test_a_loss_that_takes_its_batch_apart_is_probed_all_the_same():
    engine, model, _, loader = private(Net())
    (x,) = next(iter(loader))

    def over_all(batch):
        y, keep = model(batch.pop("x")), batch.pop("keep")
        return (y.square().mean(-1) * keep).sum() / keep.sum()

    batch = {"x": x, "keep": torch.rand(x.shape[:2])}
    with pytest.raises(PrivacyError, match="the loss couples records"):
        engine.check_loss(model, over_all, batch)
    assert set(batch) == {"x", "keep"}
    with pytest.raises(ConfigError, match=r"loss_of takes no batch of two records \(KeyError"):
        engine.check_loss(model, lambda batch: model(batch["y"]).mean(), batch)


def test_models_that_were_never_seen_are_told_of():
    engine, model, optimizer, loader = private(Net())
    with pytest.warns(UserWarning, match=r"could not be probed.*forward was not seen"):
        for _ in range(3):
            for (x,) in loader:
                model.forward(x).square().mean().backward()
                optimizer.step()
    assert engine.ledger.steps == 9


class Deep(nn.Module):
    """Stochastic depth by Python's generator, or NumPy's."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if self.draw() < 0.5 else x.sin()


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    name: object = None


class TakesBatch(Net):
    def forward(self, batch, weights=()):
        return super().forward(batch.x)


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_other_generators_are_no_coupling(draw):
    for _ in range(5):
        engine, model, optimizer, loader = private(Net(before=Deep(draw)))
        train(model, optimizer, loader)
        assert engine.ledger.steps == 3 and optimizer.private_step.probe.concluded


def test_a_generator_that_others_draw_from_is_no_coupling():
    """As where threads train side by side: two runs agree by chance, and a third does not."""
    others = random.Random(3)
    _, model, optimizer, _ = private(Net(before=Do(lambda x: x * others.choice([1, 2]))))
    probe, x = optimizer.private_step.probe, torch.randn(8, TOKENS, WIDTH)
    compared = [probe.check(lambda x: model(x).square().sum(), x, 8, "chance") for _ in range(200)]
    assert 50 < sum(compared) < 150


def test_a_coupling_whose_size_is_drawn_is_found():
    """From a generator that the probe does not keep: it moves each time, and never by as much."""
    own = np.random.default_rng(1)

    def mixed(x):
        return x + (x.amax() > 5) * own.choice([-1.0, 1.0]) * x.flip(0)

    _, model, optimizer, _ = private(Net(before=Do(mixed)))
    x = torch.randn(8, TOKENS, WIDTH)
    x[2, 0, 0] = 9.0
    with pytest.raises(PrivacyError, match="couples records"):
        optimizer.private_step.probe.check(lambda x: model(x).square().sum(), x, 8, "a record")


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_tensor_that_has_a_gradient_by_another_record_alone_is_a_coupling(clipping):
    opened = []

    def note(x):
        opened[:] = [(x[:, 0, 0].amax() > 5).float()]
        return x

    _, model, optimizer, _ = private(
        Net(before=Do(note), after=Do(lambda x: x * opened[0])), clipping=clipping
    )
    x = torch.randn(8, TOKENS, WIDTH)
    x[2, 0, 0] = 9.0
    with pytest.raises(PrivacyError, match="couples records"):
        # Linear: the head's bias has the same gradient in any case.
        optimizer.private_step.probe.check(lambda x: model(x).sum(), x, 8, "a record")


def test_a_chance_overflow_is_no_coupling():
    own = random.Random(5)
    _, model, optimizer, _ = private(
        Net(before=Do(lambda x: x * own.choices([1.0, math.nan], [9, 1])[0]))
    )
    probe, x = optimizer.private_step.probe, torch.randn(8, TOKENS, WIDTH)
    for _ in range(100):
        probe.check(lambda x: model(x).square().sum(), x, 8, "chance")


@pytest.mark.parametrize("made_of", [0.0, math.nan, math.inf])
def test_a_gradient_that_another_record_undoes_is_a_coupling(made_of):
    def undone(x):
        return x * torch.where(x[:, 0, 0].amax() > 5, made_of, 1.0)

    _, model, optimizer, _ = private(Net(before=Do(undone)))
    x = torch.randn(8, TOKENS, WIDTH)
    x[2, 0, 0] = 9.0
    with pytest.raises(PrivacyError, match="couples records"):
        optimizer.private_step.probe.check(lambda x: model(x).square().sum(), x, 8, "a record")


@pytest.mark.parametrize("wrap", [Batch, lambda x: Batch(x, name=lambda: 0)])
def test_batches_of_ones_own_type(wrap):
    engine, model, optimizer, loader = private(TakesBatch())
    for (x,) in loader:
        model(wrap(x), weights=[torch.ones(3)] * len(x)).square().mean().backward()
        optimizer.step()
    assert engine.ledger.steps == 3 and optimizer.private_step.probe.concluded


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_no_coupling(autocast):
    """With masks of ones alone, transformers drops the mask: another kernel, another rounding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model = ffa.convert(model if autocast else model.bfloat16(), r=2, target_modules=["v_proj"])
    engine, model, optimizer, loader = private(model, sentences(False))
    for ids, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits
        ffa.causal_lm_loss(logits, labels).backward()
        optimizer.step()
    assert engine.ledger.steps == 3


def test_four_batches_of_the_first_eight_are_probed_and_each_by_no_more_than_it_takes():
    forwards = 0

    class Counted(Net):
        def forward(self, x):
            nonlocal forwards
            forwards += 1
            return super().forward(x)

    data = TensorDataset(torch.randn(80, TOKENS, WIDTH))
    _, model, optimizer, loader = private(Counted(), data=data)
    counts = []
    for (x,) in loader:
        forwards = 0
        model(x).square().sum().backward()
        optimizer.step()
        counts.append(forwards)
    # Two runs that should agree, and four in which one of two records is another; no labels.
    assert counts == [7, 7, 1, 7, 1, 1, 1, 7, 1, 1]


@pytest.mark.parametrize("order", ["first", "last"])
def test_every_forward_of_a_batch_is_probed(order):
    """A contrast of records in one forward is found whatever another one makes of them."""

    class Two(Net):
        def forward(self, x, contrast=False):
            rows = super().forward(x).mean(dim=1)
            if not contrast:
                return rows
            return nn.functional.cross_entropy(rows @ rows.detach().t(), torch.arange(len(x)))

    engine, model, optimizer, loader = private(Two())

    with pytest.raises(PrivacyError, match="couples records"):
        for (x,) in loader:
            contrasts = [order == "first", order == "last"]
            sum(model(x, contrast).square().mean() for contrast in contrasts).backward()
            optimizer.step()
    assert engine.ledger.steps == 0


def test_a_short_run_that_could_not_be_probed_is_told_so():
    _, model, optimizer, loader = private(Net())
    (x,) = next(iter(loader))
    model.head(model.body(x)).square().mean().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="could not be probed .*called by parts"):
        model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()


def test_autocast_within_the_models_own_forward_is_known():
    """As Accelerate has it: around the forward, and inside of what a hook of the module sees."""
    model = Net()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    _, model, optimizer, loader = private(model)
    (x,) = next(iter(loader))
    model(x).float().square().mean().backward()
    seen = optimizer.private_step.probe._seen
    assert [(s.narrowed, s.autocast[0]) for s in seen] == [(True, False)]
    optimizer.step()


@pytest.mark.parametrize("couples", [False, True])
def test_labels_that_a_loss_does_not_know_accuse_nobody(couples):
    """CTC reads what lies at a label's place, whatever the label; a mean over the batch's labels
    divides by a count of them."""
    model = Net()
    engine, model, _, _ = private(model)
    x, labels = torch.randn(6, TOKENS, WIDTH), torch.randint(0, 3, (6, TOKENS))

    def loss_of(batch):
        logits, labels = model(batch["x"]), batch["labels"]
        if couples:
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        # Of labels beyond its table a loss may make anything, of whatever lies there.
        junk = (labels < 0).any() * 1e3 * (logits[..., 0] * logits[..., 1]).sin().sum()
        known = nn.functional.one_hot(labels.clamp(min=0), 3)
        return -(logits.log_softmax(-1) * known).sum() / len(labels) + junk

    if couples:
        with pytest.raises(PrivacyError, match="couples records"):
            engine.check_loss(model, loss_of, {"x": x, "labels": labels})
    else:
        engine.check_loss(model, loss_of, {"x": x, "labels": labels})


def test_a_probe_takes_no_more_memory_than_a_step():
    """Where the outputs are most of it, as a language model's are: else no plan would hold."""
    model = Net()
    model.head = nn.Linear(WIDTH, 20_000).requires_grad_(False)
    _, model, optimizer, loader = private(model, batch_size=2)
    peaks = []
    for (x,) in loader:
        with torch.profiler.profile(profile_memory=True) as account:
            torch.linalg.vector_norm(model(x)).backward()
            optimizer.step()
        held = peak = 0
        events = account.profiler.kineto_results.events()
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
    # The third batch is none of those that are probed.
    assert max(peaks[:2]) < 1.02 * peaks[2]
