"""PrivacyEngine as its user meets it: an ordinary loop, ordinary optimizers, clear refusals."""

import copy
import inspect
import io
import math
import pickle

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine

WIDTH, CLASSES = 6, 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Body(nn.Module):
    def __init__(self, extra=None):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.extra = extra or nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.extra(self.body(x).tanh()))


def converted(dropout=0.0):
    torch.manual_seed(0)
    model = ffa.convert(
        Body(), r=2, target_modules=["body"], modules_to_save=["head"], dropout=dropout
    )
    nn.init.normal_(model.body.lora_B, std=0.1)
    return model


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, WIDTH, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator))


def loader_of(n=12, batch_size=12, **options):
    return DataLoader(data(n), batch_size=batch_size, **options)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model, **options):
    return torch.optim.SGD(trained(model), **{"lr": 0.1, **options})


def private(model, optimizer=None, loader=None, engine=None, **options):
    options = {
        "noise_multiplier": 0.0,
        "max_grad_norm": math.inf,
        "poisson_sampling": False,
        **options,
    }
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=optimizer or sgd(model),
        data_loader=loader_of() if loader is None else loader,
        **options,
    )


def drawing(records, batch_size, physical_size=None):
    """A model that is all trained, by Poisson draws in parts."""
    engine, model = PrivacyEngine(), Body()
    loader = DataLoader(TensorDataset(torch.randn(records, WIDTH)), batch_size=batch_size)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        max_physical_batch_size=physical_size,
    )
    return engine, model, optimizer, loader


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, loader, epochs=1):
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])
def test_a_trained_layer_may_be_given_its_input_by_name(layer):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), copy.deepcopy(layer)

        def forward(self, x):
            return self.head(input=self.body(input=x))

    model = ffa.convert(Named(), r=2, target_modules=["body"], modules_to_save=["head"])
    before = model.head.weight.detach().clone()
    train(*private(model))
    assert not torch.equal(model.head.weight, before)


# One import changes.


def test_names_and_defaults_are_those_of_opacus():
    for name in ("make_private", "make_private_with_epsilon", "get_epsilon"):
        ours = inspect.signature(getattr(PrivacyEngine, name)).parameters
        theirs = inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters
        needed = {n for n, p in theirs.items() if p.default is p.empty and n != "kwargs"}
        assert needed <= ours.keys(), name
        for n in needed:
            assert ours[n].default is inspect.Parameter.empty, (name, n)
    default = inspect.signature(PrivacyEngine.make_private).parameters
    assert default["poisson_sampling"].default is True
    assert default["clipping"].default == "flat"
    assert default["loss_reduction"].default == "mean"
    accountant = inspect.signature(PrivacyEngine).parameters["accountant"].default
    assert accountant == inspect.signature(opacus.PrivacyEngine).parameters["accountant"].default


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook")
@pytest.mark.parametrize("home", [opacus, ffa])
def test_one_loop_serves_both(home):
    torch.manual_seed(0)
    model = Body()
    engine = home.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader_of(batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = [p.detach().clone() for p in model.parameters()]
    batches = 0
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        batches += 1
    assert batches == len(loader) == 3
    accountant = opacus.accountants.RDPAccountant()
    for _ in range(3):
        accountant.step(noise_multiplier=1.0, sample_rate=4 / 12)
    assert engine.get_epsilon(delta=1e-5) == pytest.approx(accountant.get_epsilon(delta=1e-5))
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_same_object_and_same_names():
    model = converted()
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    returned, optimizer, loader = private(model)
    assert returned is model
    assert list(model.state_dict()) == names
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert isinstance(model.head, nn.Linear) and isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(loader, DataLoader)
    # The model's own hook is the probe's, which leaves with the first batches.
    hooks = [name for name, m in model.named_modules() if m._forward_hooks or m._backward_hooks]
    assert hooks == [""]
    fresh = converted()
    fresh.load_state_dict(model.state_dict())


def test_grad_sample_has_a_row_for_each_record_and_grad_stays_none():
    model, optimizer, loader = private(converted())
    for batch in loader:
        loss_of(model, batch).backward()
        for p in trained(model):
            assert p.grad_sample.shape == (12, *p.shape)
            assert p.grad is None
        optimizer.step()
        assert all(p.grad is None and p.grad_sample is None for p in trained(model))


def test_a_hook_on_a_trained_tensor_is_given_no_summed_gradient():
    model, optimizer, loader = private(converted())
    seen = []
    for p in trained(model):
        p.register_hook(seen.append)
    for batch in loader:
        loss_of(model, batch).backward()
        optimizer.step()
    assert seen == []


# Refusals, with nothing half done.


def state_of(model):
    return [
        (n, type(m), [(k, p, p.requires_grad, p.grad) for k, p in m.named_parameters()])
        for n, m in model.named_modules()
    ]


def assert_untouched(model, before):
    for (name, kind, held), (now_name, now_kind, now_held) in zip(
        before, state_of(model), strict=True
    ):
        assert (name, kind) == (now_name, now_kind)
        for (k, p, needed, grad), (now_k, now_p, now_needed, now_grad) in zip(
            held, now_held, strict=True
        ):
            assert k == now_k and p is now_p and needed == now_needed and grad is now_grad
    assert not hasattr(model, "_private_step")


class RawParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.gate


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.attention(x, x, x)[0].squeeze(1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (nn.BatchNorm1d(WIDTH), r"'extra' is BatchNorm1d.*GroupNorm"),
        (nn.BatchNorm1d(WIDTH, affine=False), r"'extra' is BatchNorm1d"),
        (nn.SyncBatchNorm(WIDTH), r"'extra' is SyncBatchNorm"),
        (nn.InstanceNorm1d(WIDTH, track_running_stats=True), r"'extra' is InstanceNorm1d"),
        (nn.Embedding(5, WIDTH, max_norm=1.0), r"'extra' has max_norm"),
        (nn.Embedding(5, WIDTH, scale_grad_by_freq=True), r"'extra' has scale_grad_by_freq"),
        (RawParameter(), r"extra\.gate \(RawParameter\)"),
        (Attention(), r"extra\.attention\.in_proj_weight \(MultiheadAttention\)"),
        (nn.GRU(WIDTH, WIDTH), r"extra\.weight_ih_l0 \(GRU\)"),
        (nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), r"extra\.weight \(Conv1d\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), r"extra\.param"),
    ],
)
def test_a_model_that_cannot_be_private_is_refused_untouched(extra, message):
    model = Body(extra)
    model.body.weight.grad = torch.ones_like(model.body.weight)
    before = state_of(model)
    with pytest.raises(PrivacyError, match=message):
        private(model)
    assert_untouched(model, before)


def test_what_is_refused_when_trained_is_accepted_when_frozen():
    counting = nn.Embedding(5, WIDTH, scale_grad_by_freq=True).requires_grad_(False)
    private(Body(counting))
    for extra in (RawParameter(), Attention()):
        model = Body(extra.requires_grad_(False))
        _, optimizer, loader = private(model)
        train(model, optimizer, loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": 1.0}, "max_grad_norm is infinite"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": [1.0, 1.0, 1.0]}, "max_grad_norm has 3 bounds"),
        ({"max_grad_norm": [1.0], "clipping": "per_layer"}, "max_grad_norm has 1 bounds"),
        ({"clipping": "adaptive"}, "clipping.*flat, per_layer"),
        ({"loss_reduction": "none"}, "loss_reduction.*mean, sum"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size"),
        ({"max_physical_batch_size": 2.5}, "max_physical_batch_size"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(options, message):
    model = converted()
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        private(model, **options)
    assert_untouched(model, before)


class Stream(IterableDataset):
    def __iter__(self):
        yield from data()


def test_data_loaders_that_cannot_be_sampled_are_refused():
    model = converted()
    before = state_of(model)
    cases = [
        (DataLoader(Stream(), batch_size=4), "stream"),
        (loader_of(3, batch_size=8), "batch size is 8, but there are 3 records"),
        (DataLoader(data(), batch_size=None), "no batch size"),
        ([1, 2, 3], "data_loader is list"),
    ]
    for loader, message in cases:
        with pytest.raises(ConfigError, match=message):
            private(model, loader=loader)
        with pytest.raises(ConfigError, match=message):
            private(model, loader=loader, poisson_sampling=True)
    assert_untouched(model, before)
    _, _, used = private(model)
    with pytest.raises(ConfigError, match="private already"):
        private(model, loader=used)


def test_three_records_can_be_trained_on():
    model, optimizer, loader = private(converted(), loader=loader_of(3, batch_size=3))
    train(model, optimizer, loader)


def test_optimizer_and_model_must_fit():
    model = converted()
    before = state_of(model)
    lacking = torch.optim.SGD([model.body.lora_B, model.head.weight], lr=0.1)
    with pytest.raises(ConfigError, match=r"lacks head\.bias"):
        private(model, lacking)
    foreign = torch.optim.SGD([*trained(model), nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ConfigError, match="1 tensors that are not the module's"):
        private(model, foreign)
    with pytest.raises(ConfigError, match="trains nothing"):
        private(Body().requires_grad_(False), foreign)
    assert_untouched(model, before)
    _, optimizer, _ = private(model)
    with pytest.raises(ConfigError, match="PrivateOptimizer"):
        private(model, optimizer)
    with pytest.raises(NotImplementedError, match="add_param_group"):
        optimizer.add_param_group({"params": []})


# Steps out of order.


def test_step_without_backward():
    model, optimizer, loader = private(converted())
    for batch in loader:
        with pytest.raises(PrivacyError, match="without gradients"):
            optimizer.step()
        loss_of(model, batch).backward()
        optimizer.zero_grad()
        with pytest.raises(PrivacyError, match="without gradients"):
            optimizer.step()


def test_a_batch_that_no_loader_announced():
    engine = PrivacyEngine()
    model, optimizer, _ = private(converted(), engine=engine)
    batch = data().tensors
    with pytest.raises(PrivacyError, match=r"'body'.*no batch is under way"):
        loss_of(model, batch)
    with pytest.raises(PrivacyError, match="without a batch"):
        optimizer.step()
    assert engine.ledger.history == []


def test_two_steps_on_one_batch_release_once():
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)
    for batch in loader:
        loss_of(model, batch).backward()
        optimizer.step()
        with pytest.raises(PrivacyError, match="without a batch"):
            optimizer.step()
        with pytest.raises(PrivacyError, match="no batch is under way"):
            loss_of(model, batch)
    assert engine.ledger.history == [(0.0, 1.0, 1)]


def test_a_skipped_step_is_noticed():
    model, _, loader = private(converted(), loader=loader_of(batch_size=4))
    batches = iter(loader)
    loss_of(model, next(batches)).backward()
    with pytest.raises(PrivacyError, match="was not stepped"):
        next(batches)


def test_a_batch_of_another_size_is_refused():
    model, optimizer, loader = private(converted(), loader=loader_of(batch_size=4))
    for x, y in loader:
        with pytest.raises(PrivacyError, match="batch has 4 records"):
            loss_of(model, (torch.cat([x, x]), torch.cat([y, y])))
        optimizer.zero_grad()


def test_eval_mode_and_no_grad_are_plain():
    model = converted()
    plain = copy.deepcopy(model).eval()
    engine = PrivacyEngine()
    model, optimizer, loader = private(model, engine=engine)
    x, y = data().tensors
    model.eval()
    torch.testing.assert_close(model(x), plain(x))
    # A gradient made in eval mode is summed over records: it must not be stepped with.
    next(iter(loader))
    loss_of(model, (x, y)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrivacyError, match=r"summed over records"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert engine.ledger.history == []


@pytest.mark.parametrize("frozen_part", ["body", "head"])
def test_a_layer_left_in_eval_mode_gives_no_summed_gradient(frozen_part):
    model, optimizer, loader = private(converted())
    model.get_submodule(frozen_part).eval()
    before = copy.deepcopy(model.state_dict())
    for batch in loader:
        loss_of(model, batch).backward()
        with pytest.raises(PrivacyError, match=frozen_part):
            optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_second_make_private_retires_the_first():
    model = converted()
    optimizer = sgd(model)
    _, old_optimizer, old_loader = private(model, optimizer)
    _, new_optimizer, new_loader = private(model, optimizer)
    with pytest.raises(PrivacyError, match="made private again"):
        next(iter(old_loader))
    with pytest.raises(PrivacyError, match="made private again"):
        old_optimizer.step()
    before = model.head.weight.detach().clone()
    train(model, new_optimizer, new_loader)
    assert not torch.equal(before, model.head.weight)


def test_frozen_after_a_first_engine_is_frozen():
    model = converted()
    private(model)
    model.head.requires_grad_(False)
    _, optimizer, loader = private(model)
    head = model.head.weight.detach().clone()
    B = model.body.lora_B.detach().clone()
    train(model, optimizer, loader)
    assert torch.equal(head, model.head.weight) and not torch.equal(B, model.body.lora_B)


def seeded():
    return torch.Generator().manual_seed(0)


ORDERS = {
    "replacement": lambda d: {"sampler": RandomSampler(d, replacement=True, num_samples=12)},
    "more than once": lambda d: {"sampler": RandomSampler(d, num_samples=24)},
    "a seed": lambda d: {"shuffle": True, "generator": seeded()},
    "weights": lambda d: {"sampler": WeightedRandomSampler([1.0] * 12, 12, replacement=False)},
    "ranks": lambda d: {"sampler": DistributedSampler(d, num_replicas=2, rank=0)},
    "a part": lambda d: {"sampler": SubsetRandomSampler(range(6))},
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_one_record_more_would_change_everywhere_is_refused(name):
    """What is charged without Poisson sampling is two records of a step, not all of them."""
    loader = DataLoader(data(), batch_size=4, **ORDERS[name](data()))
    model = converted()
    told = "RandomSampler, with a generator of its own" if name == "a seed" else "Sampler"
    with pytest.raises(ConfigError, match=rf"{told}: one record more may change.*shuffle=False"):
        private(model, loader=loader)
    assert not hasattr(model, "_private_step")


@pytest.mark.filterwarnings("ignore:PrivacyEngine.seed")
def test_a_sampler_that_repeats_a_record_within_a_batch_is_refused():
    """Where any order is taken, by a test's engine, as well."""
    repeats = RandomSampler(data(2), replacement=True, num_samples=64)
    # Two records in a batch of 2, 32 times: the chance that none repeats is 2^-32.
    loader = DataLoader(data(2), batch_size=2, sampler=repeats)
    model, optimizer, loader = private(converted(), loader=loader, engine=PrivacyEngine(seed=1))
    with pytest.raises(PrivacyError, match="twice in one batch"):
        train(model, optimizer, loader)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}])
def test_orders_that_are_taken_without_poisson_sampling(options):
    engine = PrivacyEngine()
    model, optimizer, loader = private(
        converted(), loader=loader_of(batch_size=5, **options), engine=engine
    )
    train(model, optimizer, loader)
    assert engine.ledger.steps == (2 if "drop_last" in options else 3)


# Optimizers: the released gradient, then PyTorch's own arithmetic.

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    ),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam as adamw": (
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
}


def gradients_by_hand(model, batch, C):
    """The clipped sum over L, from one backward a record."""
    total = None
    for i in range(len(batch[0])):
        record = [t[i : i + 1] for t in batch]
        G = torch.autograd.grad(loss_of(model, record), trained(model))
        norm = torch.sqrt(sum(g.double().square().sum() for g in G))
        factor = float(min(1.0, C / norm))
        clipped = [g.double() * factor for g in G]
        total = clipped if total is None else [a + b for a, b in zip(total, clipped, strict=True)]
    return [t.float() / len(batch[0]) for t in total]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_equals_the_manual_computation(name):
    kind, options = OPTIMIZERS[name]
    C = 0.4
    model = converted()
    plain = copy.deepcopy(model)
    reference = kind(trained(plain), **options)
    _, optimizer, loader = private(
        model, kind(trained(model), **options), loader_of(batch_size=4), max_grad_norm=C
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    reference_scheduler = torch.optim.lr_scheduler.StepLR(reference, step_size=2, gamma=0.5)
    for _ in range(2):
        for batch in loader:
            gradients = gradients_by_hand(plain, batch, C)
            for p, gradient in zip(trained(plain), gradients, strict=True):
                p.grad = gradient
            reference.step()
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            scheduler.step()
            reference_scheduler.step()
    for p, q in zip(trained(model), trained(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    if name != "sgd" and "SGD" not in kind.__name__:
        assert ours["state"].keys() == theirs["state"].keys()
        for k, state in theirs["state"].items():
            assert ours["state"][k].keys() == state.keys()
            for key, value in state.items():
                torch.testing.assert_close(ours["state"][k][key], value, rtol=1e-3, atol=1e-6)


def test_groups_with_their_own_settings():
    def groups(model):
        return [
            {"params": [model.body.lora_B], "lr": 0.3},
            {"params": list(model.head.parameters()), "lr": 0.01, "weight_decay": 0.5},
        ]

    model = converted()
    plain = copy.deepcopy(model)
    _, optimizer, loader = private(model, torch.optim.AdamW(groups(model)), max_grad_norm=1.0)
    reference = torch.optim.AdamW(groups(plain))
    for batch in loader:
        for p, gradient in zip(trained(plain), gradients_by_hand(plain, batch, 1.0), strict=True):
            p.grad = gradient
        reference.step()
        loss_of(model, batch).backward()
        optimizer.step()
    for p, q in zip(trained(model), trained(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop"])
def test_state_dict_round_trip_goes_on_as_if_nothing_had_happened(name):
    kind, options = OPTIMIZERS[name]

    def run(interrupted):
        model = converted()
        optimizer = kind(trained(model), **options)
        _, optimizer, loader = private(model, optimizer, loader_of(batch_size=4), max_grad_norm=0.4)
        train(model, optimizer, loader)
        if interrupted:
            saved = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), saved)
            saved.seek(0)
            model_state, optimizer_state = torch.load(saved)
            model = converted()
            model.load_state_dict(model_state)
            optimizer = kind(trained(model), **options)
            _, optimizer, loader = private(
                model, optimizer, loader_of(batch_size=4), max_grad_norm=0.4
            )
            optimizer.load_state_dict(optimizer_state)
        train(model, optimizer, loader)
        return model

    for p, q in zip(run(False).parameters(), run(True).parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_plain_optimizers_state_can_be_taken_over():
    model = converted()
    adam = torch.optim.Adam(trained(model), lr=0.01)
    loss_of(model, data().tensors).backward()
    adam.step()
    plain, state = copy.deepcopy(model), copy.deepcopy(adam.state_dict())
    reference = torch.optim.Adam(trained(plain), lr=0.01)
    reference.load_state_dict(state)
    _, optimizer, loader = private(model, adam, max_grad_norm=math.inf)
    train(model, optimizer, loader)
    reference.zero_grad()
    loss_of(plain, data().tensors).backward()
    reference.step()
    for p, q in zip(trained(model), trained(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
)
# One made before watches the plain optimizer, which is never stepped itself.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("before", [True, False])
def test_schedulers_set_the_rate_that_is_used(make, before):
    model = converted()
    plain_optimizer = sgd(model, momentum=0.9)
    if before:
        scheduler = make(plain_optimizer)
    _, optimizer, loader = private(model, plain_optimizer, loader_of(batch_size=4))
    if not before:
        scheduler = make(optimizer)
    rates = []
    for batch in loader:
        rates.append(optimizer.param_groups[0]["lr"])
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
    assert len(set(rates)) == 3


def test_closures_are_called_once():
    model, optimizer, loader = private(converted())
    calls = []
    for batch in loader:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            calls.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


# Copies, pickles, compilers.


def test_a_copy_belongs_to_no_engine():
    model, optimizer, loader = private(converted())
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    for batch in loader:
        loss_of(model, batch).backward()
        with pytest.raises(PrivacyError, match="no batch is under way"):
            loss_of(twin, batch)
        assert all(getattr(p, "grad_sample", None) is None for p in trained(twin))
        optimizer.step()
    assert not torch.equal(model.head.weight, twin.head.weight)
    _, twin_optimizer, twin_loader = private(twin)
    train(twin, twin_optimizer, twin_loader)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pickled_model_predicts_and_can_be_made_private_again():
    model, optimizer, loader = private(converted(dropout=0.1))
    train(model, optimizer, loader)
    twin = pickle.loads(pickle.dumps(model))
    x, _ = data().tensors
    assert torch.equal(model.eval()(x), twin.eval()(x))
    twin.train()
    _, optimizer, loader = private(twin)
    train(twin, optimizer, loader)


def test_no_key_leaves_in_a_pickle_or_a_copy():
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(dropout=0.1), engine=engine)
    for batch in loader:
        loss_of(model, batch).backward()
        streams = [engine._noise.state, engine._sampling.state, engine._dropout.state]
        keys = [bytes(s[i : i + 1].numpy()) for s in streams for i in range(4)]
        keys += [bytes(model.body._dropout_key[i : i + 1].numpy()) for i in range(4)]
        assert len(set(keys)) == 16
        files = []
        for thing in (model, model.state_dict(), optimizer.state_dict()):
            saved = io.BytesIO()
            torch.save(thing, saved)
            files += [saved.getvalue(), pickle.dumps(thing)]
        assert not any(key in file for key in keys for file in files)
        assert copy.deepcopy(model).body._dropout_key.eq(0).all()
        for action in (pickle.dumps, copy.deepcopy):
            with pytest.raises(PrivacyError, match="key"):
                action(optimizer)
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_first", [True, False])
def test_torch_compile_gives_the_same_grad_samples(compiled_first):
    """Several batches of two sizes: taps that a compiled graph had frozen in would show."""
    torch._dynamo.reset()

    def run(compiled):
        torch.manual_seed(0)
        model = ffa.convert(
            Body(nn.LayerNorm(WIDTH)),
            r=2,
            target_modules=["body"],
            modules_to_save=["head", "extra"],
        )
        nn.init.normal_(model.body.lora_B, std=0.1)
        forward = model
        if compiled and compiled_first:
            forward = torch.compile(model, backend="aot_eager")
        _, optimizer, loader = private(model, loader=loader_of(10, batch_size=4))
        if compiled and not compiled_first:
            forward = torch.compile(model, backend="aot_eager")
        samples = []
        for _ in range(2):
            for batch in loader:
                loss_of(forward, batch).backward()
                samples.append([p.grad_sample.clone() for p in trained(model)])
                optimizer.step()
        return samples

    eager, compiled = run(False), run(True)
    assert [len(batch[0]) for batch in eager] == [4, 4, 2] * 2
    for a, b in zip(eager, compiled, strict=True):
        for G, H in zip(a, b, strict=True):
            assert G.abs().max() > 0
            torch.testing.assert_close(G, H, rtol=1e-5, atol=1e-6)


def test_a_loader_that_reads_ahead_is_refused():
    engine, model, optimizer, loader = drawing(18, 9, 8)
    with pytest.raises(PrivacyError, match="read batches ahead"):
        ahead = iter(loader)
        batch = next(ahead)
        for following in ahead:
            model(*batch).square().mean().backward()
            optimizer.step()
            batch = following
    assert engine.ledger.steps == 0


def test_a_loop_that_reads_ahead_and_drops_nothing_is_refused():
    """zero_grad() first, then the next batch, then the model with this one: by what is known of the
    next, rows that only pad this one would count, and record 0 again with each."""
    engine, model, optimizer, loader = drawing(24, 6, 24)
    with pytest.raises(PrivacyError, match="read batches ahead"):
        ahead = iter(loader)
        batch = next(ahead)
        for _ in range(3):
            optimizer.zero_grad()
            following = next(ahead)
            model(*batch).square().mean().backward()
            optimizer.step()
            batch = following
    assert engine.ledger.steps == 0


@pytest.mark.parametrize("after", ["forward", "backward"])
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_may_be_dropped_once_it_was_run(after, first):
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), loader=loader_of(batch_size=4), engine=engine)
    for k, batch in enumerate(loader):
        if first:
            optimizer.zero_grad()
        loss = loss_of(model, batch)
        if after == "backward" or k == 2:
            loss.backward()
        if k == 2:
            optimizer.step()
        elif after == "backward" or not first:
            optimizer.zero_grad()
    assert engine.ledger.steps == 1


def test_two_iterations_at_once_do_not_mix_their_draws():
    """Parts of two draws in one sum would count a record twice that is in both."""
    engine, model, optimizer, loader = drawing(9, 9, 5)

    def train_on(batch):
        model(*batch).square().mean().backward()
        optimizer.step()

    one, other = iter(loader), iter(loader)
    train_on(next(one))
    with pytest.raises(PrivacyError, match="begins while another one is under way"):
        next(other)
    with pytest.raises(PrivacyError, match="goes on with a draw that was given up"):
        next(one)
    for batch in loader:
        train_on(batch)
    assert engine.ledger.steps == 1


@pytest.mark.parametrize("stepped", [False, True])
def test_a_glance_at_another_batch_is_not_taken_for_this_one(stepped):
    """Its number of records and of padding rows are not this one's."""
    engine, model, optimizer, loader = drawing(18, 9, 18)
    with pytest.raises(PrivacyError, match="begins while another one is under way"):
        for (x,) in loader:
            if stepped:
                model(x).square().mean().backward()
                optimizer.step()
            next(iter(loader))
    with pytest.raises(PrivacyError, match="no batch is under way"):
        model(x)
    assert engine.ledger.steps == stepped


def test_an_iteration_that_nobody_can_go_on_with_is_not_under_way():
    _, model, optimizer, loader = drawing(18, 9, None)
    kept = [iter(loader)]
    kept.append(kept)
    next(kept[0])
    del kept
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()


def test_a_dropped_batch_gives_up_its_draw():
    """What is left is no sample in which each record is with the same probability."""
    engine, model, optimizer, loader = drawing(9, 9, 3)
    seen = []
    for epoch in range(2):
        for k, (x,) in enumerate(loader):
            seen.append((epoch, k))
            model(x).square().mean().backward()
            if (epoch, k) == (0, 1):
                optimizer.zero_grad()
            else:
                optimizer.step()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert engine.ledger.steps == 1


@pytest.mark.parametrize("dropped", [False, True])
def test_a_batch_is_added_once_though_its_step_was_interrupted(dropped, monkeypatch):
    """An interrupt comes when an op returns: the sum has the batch by then."""
    engine, model, optimizer, loader = drawing(9, 9, 5)
    clip = ops.clip_accumulate

    def interrupted(*arguments, **options):
        clip(*arguments, **options)
        raise KeyboardInterrupt

    (x,) = next(iter(loader))
    model(x).square().mean().backward()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "clip_accumulate", interrupted)
        optimizer.step()
    if dropped:
        optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="no batch is under way"):
        model(x)
    with pytest.raises(PrivacyError, match="without a batch"):
        optimizer.step()
    assert not any(total.any() for total in optimizer.private_step._sums)
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()
    assert engine.ledger.steps == 1


def test_a_record_that_a_subset_has_twice_is_refused():
    Subset, Concat = torch.utils.data.Subset, torch.utils.data.ConcatDataset
    inner, last = Subset(data(), [3, 4, 3]), len(data()) - 1
    for twice in (
        Subset(inner, [0, 1, 2]),
        Subset(data(), [last, -1]),
        Concat([data(), inner]),
        Concat([inner.dataset] * 2),
        Subset(Concat([inner.dataset] * 2), [0, 1]),
    ):
        with pytest.raises(ConfigError, match="has a record more than once"):
            private(converted(), loader=DataLoader(twice, batch_size=1))
    for once in (Subset(inner, [0, 1]), Subset(data(), range(3)), Concat([data(), data()])):
        private(converted(), loader=DataLoader(once, batch_size=1))


def test_a_subset_of_a_data_set_without_a_length_may_have_keys_of_any_kind():
    class Keyed(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return torch.full((WIDTH,), float(len(key)))

    keys = torch.utils.data.Subset(Keyed(), ["a", "bb", "ccc"])
    private(converted(), loader=DataLoader(keys, batch_size=1))
    with pytest.raises(ConfigError, match="has a record more than once"):
        twice = torch.utils.data.Subset(Keyed(), ["a", "a"])
        private(converted(), loader=DataLoader(twice, batch_size=1))


def test_a_draw_in_which_an_error_was_caught_is_not_released():
    engine, model, optimizer, loader = drawing(9, 9, 5)
    with pytest.raises(PrivacyError, match="goes on with a draw that was given up"):
        for batch in loader:
            model(*batch).square().mean().backward()
            model.head.weight.grad = torch.ones_like(model.head.weight)
            with pytest.raises(PrivacyError, match="summed over records"):
                optimizer.step()
    assert engine.ledger.steps == 0


def test_an_iteration_left_early_can_be_begun_anew():
    engine, model, optimizer, loader = drawing(18, 9, None)
    for _ in loader:
        break
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()
    assert engine.ledger.steps == 2


def test_what_follows_a_trained_layer_may_work_in_place():
    engine = PrivacyEngine()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, CLASSES))
    plain = copy.deepcopy(model)
    _, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.randn(4, WIDTH)), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    for (x,) in loader:
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
        break
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad_sample.sum(0), theirs.grad)


def test_merge_gives_plain_layers_back_after_private_training():
    model = ffa.convert(Body(), r=2, target_modules=["body"], modules_to_save=["head"])
    trained = [p for p in model.parameters() if p.requires_grad]
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.randn(4, WIDTH)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()
    x = torch.randn(3, WIDTH)
    expected = model.eval()(x)
    merged = ffa.merge(model)
    assert merged is model and type(model.body) is type(model.head) is nn.Linear
    torch.testing.assert_close(model.train()(x), expected)
    model(x).sum().backward()
    assert model.head.weight.grad is not None
    ffa.convert(model, r=2, target_modules=["body", "head"])


def test_a_step_that_was_replaced_keeps_its_counts_and_no_sums():
    model, engine = converted(), PrivacyEngine()
    inner = torch.optim.SGD(trained(model), lr=0.1)
    steps = []
    for _ in range(2):
        settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
        _, optimizer, loader = engine.make_private(
            module=model, optimizer=inner, data_loader=loader_of(batch_size=4), **settings
        )
        loss_of(model, next(iter(loader))).backward()
        optimizer.step()
        steps.append(optimizer.private_step)
    assert engine.stats["steps"] == 2
    assert [sum(total.numel() for total in step._sums) > 0 for step in steps] == [False, True]


def test_an_optimizer_that_raises_leaves_no_gradients_behind():
    model = converted()
    inner = torch.optim.RMSprop(trained(model), lr=0.01)
    _, optimizer, loader = private(model, inner, loader_of(batch_size=4))

    def fail(*arguments, **settings):
        assert all(p.grad is not None for p in trained(model))
        raise ValueError("stop")

    inner.step = fail
    loss_of(model, next(iter(loader))).backward()
    with pytest.raises(ValueError, match="stop"):
        optimizer.step()
    assert all(p.grad is None for p in trained(model))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_hooks_on_the_optimizers_step_are_called_with_private_gradients(name):
    """A filter of noised gradients, say: what it leaves is what the step takes."""
    kind, options = OPTIMIZERS[name]
    results = []
    for halved in (False, True):
        model = converted()
        inner = kind(trained(model), **options)
        seen = []

        def halve(optimizer, args, kwargs, seen=seen):
            for p in optimizer.param_groups[0]["params"]:
                seen.append(p.grad.clone())
                p.grad.mul_(0.5)

        if halved:
            inner.register_step_pre_hook(halve)
        _, optimizer, loader = private(model, inner, loader_of(batch_size=4), max_grad_norm=0.4)
        loss_of(model, next(iter(loader))).backward()
        optimizer.step()
        assert len(seen) == (len(trained(model)) if halved else 0)
        results.append([p.detach().clone() for p in trained(model)])
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_optimizer_that_holds_another_is_refused():
    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = converted()
    with pytest.raises(ConfigError, match=r"is AcceleratedOptimizer; .*its \.optimizer"):
        private(model, AcceleratedOptimizer(sgd(model)))
