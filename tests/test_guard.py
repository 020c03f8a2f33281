"""The guard: trained tensors learn and move, everything else stays, or an error names the layer."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine
from ffa_kernels.privacy.guard import checksum, checksums

N, WIDTH, CLASSES = 8, 6, 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def plain():
    torch.manual_seed(0)
    return Net()


def converted():
    return ffa.convert(plain(), r=2, target_modules=["first", "second"], modules_to_save=["head"])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def private(model, optimizer=None, engine=None, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (N,), generator=generator)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, **options}
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=optimizer or torch.optim.SGD(trained(model), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=N // 2),
        **options,
    )


def train(model, optimizer, loader, steps=None, before_step=lambda: None):
    for done, (x, y) in enumerate(loader, start=1):
        nn.functional.cross_entropy(model(x), y).backward()
        before_step()
        optimizer.step()
        if done == steps:
            return


# Training that trains nothing: Opacus issue 820, by every order of wrapping that leads there.


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first", "second"]))


def test_an_optimizer_made_before_convert_is_refused_and_the_tensors_named():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ffa.convert(model, r=2, target_modules=["first", "second"])
    with pytest.raises(ConfigError, match=r"lacks first\.lora_B, second\.lora_B"):
        private(model, optimizer)


def test_an_optimizer_made_before_peft_wraps_is_refused_and_the_tensors_named():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = ffa.convert(lora(model))
    with pytest.raises(ConfigError, match=r"lacks .*first\.lora_B\.default\.weight"):
        private(model, optimizer)


def test_an_optimizer_of_another_copy_is_refused():
    model = converted()
    with pytest.raises(ConfigError, match=r"lacks first\.lora_B.*not the module's"):
        private(model, torch.optim.SGD(trained(copy.deepcopy(model)), lr=0.1))


def test_peft_wrapped_around_a_private_model_is_named_at_the_first_release():
    """The optimizer holds W, which PEFT has frozen; the new A and B are in no optimizer."""
    engine = PrivacyEngine()
    model = plain()
    model, optimizer, loader = private(model, engine=engine)
    wrapped = lora(model)
    wrapped.base_model.model.head.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"'first': weight was trained.*requires no gradient"):
        train(wrapped, optimizer, loader)
    assert engine.ledger.steps == 0
    with pytest.raises(PrivacyError, match=r"layer 'first'"):
        engine.check()


def test_tensors_added_after_make_private_are_named():
    """Here what was trained is trained still, beside adapters that nothing moves."""
    engine = PrivacyEngine()
    model = plain()
    model.first.requires_grad_(False)
    model, optimizer, loader = private(model, engine=engine)
    model.first = ffa.FFALinear.from_linear(model.first, r=2)
    with pytest.raises(PrivacyError, match=r"first\.lora_B: trained, but not when make_private"):
        train(model, optimizer, loader)


class Bypassed(Net):
    """Its forward uses what it has copied of a layer, not the layer."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = [self.second.weight.detach().clone(), self.second.bias.detach().clone()]
        return self.head(nn.functional.linear(self.first(x).tanh(), *self.kept).tanh())


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_layer_that_the_forward_does_not_use_is_named_after_the_first_epoch(noise, clipping):
    """With noise its B moves and the loss falls all the same: no look at values would tell."""
    torch.manual_seed(0)
    model = ffa.convert(
        Bypassed(), r=2, target_modules=["first", "second"], modules_to_save=["head"]
    )
    model, optimizer, loader = private(model, noise_multiplier=noise, clipping=clipping)
    with pytest.raises(PrivacyError, match=r"second\.lora_B: no record's gradient has reached it"):
        train(model, optimizer, loader)
    assert optimizer.private_step.steps == 2
    assert bool(model.second.lora_B.any()) is (noise > 0)


def test_an_adapter_that_is_merged_or_disabled_is_named():
    for stop in ("merge_adapter", "disable_adapter_layers"):
        model = ffa.convert(lora(plain()))
        model.base_model.model.head.requires_grad_(True)
        model, optimizer, loader = private(model)
        getattr(model, stop)()
        with pytest.raises(PrivacyError, match=r"first"):
            train(model, optimizer, loader)


def test_layers_that_were_merged_away_are_named():
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader)
    ffa.merge(model)
    model.head.requires_grad_(True)
    with pytest.raises(PrivacyError):
        train(model, optimizer, loader)
    with pytest.raises(PrivacyError, match=r"first\.lora_B: the optimizer holds it, but the model"):
        optimizer.private_step.check()


class Idle(torch.optim.SGD):
    """Writes to nothing."""

    def step(self, closure=None):
        return None


def test_an_optimizer_that_writes_to_nothing_is_named():
    model = converted()
    model, optimizer, loader = private(model, Idle(trained(model), lr=0.1))
    with pytest.raises(PrivacyError, match=r"first\.lora_B: did not move.*written nothing"):
        train(model, optimizer, loader)


def test_an_optimizer_that_let_go_of_a_tensor_is_named():
    model, optimizer, loader = private(converted())
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(PrivacyError, match=r"first\.lora_B: the optimizer held it"):
        train(model, optimizer, loader)


def test_an_epoch_at_rate_0_is_named_but_a_warm_up_is_not():
    model, optimizer, loader = private(converted())
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, loader, steps=1)
    # Saved in the middle of a warm-up.
    model.state_dict()
    with pytest.raises(
        PrivacyError, match=r"first\.lora_B: did not move in \d steps: its lr was 0"
    ):
        train(model, optimizer, loader)
    model, optimizer, loader = private(converted())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


def test_updates_that_the_dtype_cannot_hold_are_named():
    """bfloat16 beside 1.0 has steps of 2^-8: much smaller updates are lost, every time."""

    def run(dtype):
        model = converted().to(dtype)
        nn.init.ones_(model.first.lora_B)
        model, optimizer, loader = private(model, torch.optim.SGD(trained(model), lr=1e-5))
        for x, y in loader:
            nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
            optimizer.step()

    run(torch.float32)
    with pytest.raises(PrivacyError, match=r"first\.lora_B: did not move in 2 steps, in spite of"):
        run(torch.bfloat16)


# What is frozen stays.


@pytest.mark.parametrize("frozen", ["first.weight", "first.lora_A", "second.bias"])
def test_a_frozen_tensor_that_moved_stops_the_release(frozen):
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)
    before = [p.detach().clone() for p in trained(model)]

    def nudge():
        with torch.no_grad():
            model.get_parameter(frozen).view(-1)[0] += 1e-6

    layer, _, local = frozen.partition(".")
    with pytest.raises(PrivacyError, match=f"layer '{layer}': {local} is frozen, and moved"):
        train(model, optimizer, loader, before_step=nudge)
    assert engine.ledger.steps == 0
    assert all(torch.equal(p, q) for p, q in zip(before, trained(model), strict=True))


def test_a_frozen_tensor_that_was_given_other_data_stops_the_release():
    """Which counts no version, but lies elsewhere."""
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)

    def swap():
        weight = model.first.weight
        version = weight._version
        weight.data = weight.data + 1e-6
        assert weight._version == version

    with pytest.raises(PrivacyError, match="layer 'first': weight is frozen, and moved"):
        train(model, optimizer, loader, before_step=swap)
    assert engine.ledger.steps == 0


@pytest.mark.parametrize("read", ["epoch", "model", "optimizer", "engine"])
def test_a_write_that_no_version_counter_knows_is_found_where_values_are_read(read):
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)

    def nudge():
        model.second.weight.data[0, 0] += 1e-6

    message = r"layer 'second': weight is frozen, and moved"
    if read == "epoch":
        with pytest.raises(PrivacyError, match=message):
            train(model, optimizer, loader, before_step=nudge)
        return
    train(model, optimizer, loader, steps=1, before_step=nudge)
    action = {"model": model.state_dict, "optimizer": optimizer.state_dict, "engine": engine.check}
    with pytest.raises(PrivacyError, match=message):
        action[read]()


def test_a_buffer_that_learns_from_records_is_named():
    model, optimizer, loader = private(converted())
    with pytest.raises(PrivacyError, match=r"buffer seen moved in private training"):
        train(model, optimizer, loader, before_step=lambda: model.seen.add_(1.0))


def test_a_buffer_that_no_file_holds_may_grow_and_not_learn():
    """An average of records would be in the gradients of all that come later."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("places", torch.arange(2.0), persistent=False)
            self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
            self.learns = False

        def forward(self, x):
            self.places = torch.arange(float(len(self.places) + 1))
            if self.learns:
                self.mean.lerp_(x.mean(0), 0.1)
            return x - self.mean

    model = converted()
    model.table = Table()
    model.register_forward_pre_hook(lambda module, args: (model.table(args[0]),))
    model, optimizer, loader = private(model)
    train(model, optimizer, loader)
    model.table.learns = True
    with pytest.raises(PrivacyError, match=r"buffer table.mean \(6,\) moved in private training"):
        train(model, optimizer, loader)


@pytest.mark.parametrize("learns", [True, False])
def test_extra_state_that_learns_from_records_is_named(learns):
    class Scaled(nn.Linear):
        """Keeps the largest input beside its parameters, as layers in 8 bits do."""

        def __init__(self):
            super().__init__(WIDTH, WIDTH)
            self.largest = [0.0]

        def forward(self, x):
            if learns:
                self.largest = [max(self.largest[0], float(x.abs().max()))]
            return super().forward(x)

        def get_extra_state(self):
            return {"largest": self.largest}

        def set_extra_state(self, state):
            self.largest = state["largest"]

    model = converted()
    model.scaled = Scaled().requires_grad_(False)
    model.register_forward_pre_hook(lambda module, args: (model.scaled(args[0]),))
    model, optimizer, loader = private(model)
    if not learns:
        train(model, optimizer, loader)
        assert "scaled._extra_state" in model.state_dict()
        return
    with pytest.raises(PrivacyError, match=r"buffer scaled._extra_state moved"):
        train(model, optimizer, loader)


def test_writes_of_the_same_values_are_no_movement():
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    first = model.first.weight
    first.data = first.data.clone()
    train(model, optimizer, loader)
    assert optimizer.private_step.steps == 4


def test_trained_tensors_may_be_loaded_between_steps():
    model, optimizer, loader = private(converted())
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, loader, steps=1)
    model.load_state_dict(start)
    # Back where it began, by the user's own hand: a save is no false alarm.
    assert torch.equal(model.state_dict()["first.lora_B"], start["first.lora_B"])
    train(model, optimizer, loader)


def test_a_tensor_replaced_in_the_model_is_named():
    for local in ("lora_A", "lora_B"):
        model, optimizer, loader = private(converted())
        old = getattr(model.first, local)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        setattr(model.first, local, new)
        with pytest.raises(PrivacyError, match=f"layer 'first': {local} is another tensor"):
            train(model, optimizer, loader)
    model, optimizer, loader = private(converted())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(PrivacyError, match=r"is another tensor.*assign=True"):
        train(model, optimizer, loader)


# No false alarms, no waiting.


def test_what_is_merged_after_training_can_be_saved():
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader)
    train(model, optimizer, loader, steps=1)
    saved = ffa.merge(model).state_dict()
    assert "first.weight" in saved and not any("lora" in name for name in saved)
    model = ffa.convert(lora(plain()))
    model, optimizer, loader = private(model)
    train(model, optimizer, loader, steps=1)
    model.merge_adapter()
    assert model.state_dict()
    model.unmerge_adapter()
    train(model, optimizer, loader, steps=1)
    assert model.merge_and_unload().state_dict()


def test_a_step_reads_no_values(monkeypatch):
    """A tensor's values become Python numbers through these, each of which waits for a device."""
    model, optimizer, loader = private(converted())
    guard = optimizer.private_step.guard
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()

    def refuse(*_):
        raise AssertionError("a value was read")

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, refuse)
        patched.setattr(torch, "equal", refuse)
        guard.look()
        torch.autograd.graph.increment_version(model.first.lora_B)
        guard.released([0], True, [True, None, None, None])
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", refuse)
        with pytest.raises(AssertionError, match="a value was read"):
            guard.check()


def test_copies_and_pickles_of_a_private_model_are_not_watched():
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader, steps=1)
    twin = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (twin, torch.load(saved, weights_only=False)):
        other.first.weight.data.zero_()
        assert not other.state_dict()["first.weight"].any()
    model.state_dict()


def test_seeded_runs_are_the_same_with_checks_between():
    def run(check):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = PrivacyEngine(seed=3)
        model, optimizer, loader = private(converted(), engine=engine)
        for _ in range(2):
            train(model, optimizer, loader)
            if check:
                engine.check()
        return [p.detach() for p in trained(model)]

    assert all(torch.equal(p, q) for p, q in zip(run(True), run(False), strict=True))


# The checksum.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (123, 123), (2, 5000), (4097,)])
def test_the_checksum_sees_every_single_bit(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).view(shape)
    first = checksum(tensor).item()
    assert checksum(tensor.clone()).item() == first
    octets = tensor.reshape(-1).view(torch.uint8)
    for at in {0, len(octets) // 2, len(octets) - 1} if len(octets) else ():
        for bit in (0, 7):
            octets[at] ^= 1 << bit
            assert checksum(tensor).item() != first
            octets[at] ^= 1 << bit
    assert checksum(tensor).item() == first


def test_the_checksum_is_of_values_not_of_where_they_lie():
    whole = torch.randn(64, 65)
    for view in (whole[1:], whole[:, 1:], whole.t(), whole.view(-1)[1:]):
        assert checksum(view).item() == checksum(view.clone()).item()
    order = torch.arange(3000, dtype=torch.int64)
    assert checksum(order).item() != checksum(order.flip(0).roll(1)).item()
    assert checksums([whole, torch.empty(3, device="meta")])[1] is None


class Statistics(nn.Module):
    """Takes a mean from the records that it sees first, as layers with such initialisation do."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.second = nn.Linear(WIDTH, CLASSES)
        if way == "filled":
            self.register_buffer("mean", None)
        if way == "grown":
            self.register_buffer("mean", torch.zeros(0), persistent=False)

    def forward(self, x):
        mean = x.detach().mean(0)
        if self.way == "filled" and self.mean is None:
            self.mean = mean
        if self.way == "registered" and not hasattr(self, "mean"):
            self.register_buffer("mean", mean)
        if self.way == "parameter" and not hasattr(self, "mean"):
            self.mean = nn.Parameter(mean, requires_grad=False)
        if self.way == "layer" and not hasattr(self, "inner"):
            self.inner = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        if self.way == "grown":
            self.mean = mean if len(self.mean) == 0 else 0.5 * (self.mean + mean)
        return self.second(x - getattr(self, "mean", 0.0))


@pytest.mark.parametrize("way", ["filled", "registered", "parameter", "layer"])
def test_what_forward_makes_for_a_state_dict_is_refused(way):
    engine = PrivacyEngine()
    model, optimizer, loader = private(Statistics(way), engine=engine)
    message = r"(mean|inner\.weight) was made since make_private"
    with pytest.raises(PrivacyError, match=message):
        train(model, optimizer, loader)
    with pytest.raises(PrivacyError, match=message):
        engine.check()
    if way != "layer":
        with pytest.raises(PrivacyError, match=message):
            model.state_dict()


def test_a_buffer_of_no_state_dict_keeps_what_it_first_held():
    model, optimizer, loader = private(Statistics("grown"))
    train(model, optimizer, loader)
    with pytest.raises(PrivacyError, match=r"buffer mean .* moved in private training"):
        train(model, optimizer, loader)


def test_a_layer_that_is_added_after_training_is_saved():
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader)
    model.extra = nn.Linear(2, 2).requires_grad_(False)
    assert "extra.weight" in model.state_dict()


def test_an_adapter_is_saved_as_a_state_dict_is(tmp_path):
    class Centred(Net):
        def forward(self, x):
            self.head.mean.lerp_(x.detach().mean(0), 0.1)
            return super().forward(x)

    torch.manual_seed(0)
    model = Centred()
    model.head.register_buffer("mean", torch.zeros(WIDTH))
    ffa.convert(model, r=2, target_modules=["first"], modules_to_save=["head"])
    model, optimizer, loader = private(model)
    with pytest.raises(PrivacyError, match=r"buffer head\.mean moved"):
        train(model, optimizer, loader)
    for save in (lambda: model.state_dict(), lambda: ffa.save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(PrivacyError, match=r"buffer head\.mean moved"):
            save()
    assert not (tmp_path / "adapter").exists()


def test_an_optimizer_that_writes_by_address_has_moved_its_tensors():
    """As bitsandbytes' do, whose writes no version counts."""

    class ByAddress(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.detach().numpy()[...] -= 0.1 * p.grad.numpy()

    model = converted()
    model, optimizer, loader = private(model, ByAddress(trained(model), lr=0.1))
    before = model.first.lora_B.detach().clone()
    train(model, optimizer, loader)
    assert not torch.equal(model.first.lora_B, before)


def test_layers_in_another_place_have_made_nothing():
    """As a compiled or checkpointed part has its layers, or PEFT's merge puts them back."""
    model, optimizer, loader = private(converted())
    train(model, optimizer, loader, steps=1)
    model.second = nn.Sequential(model.second)
    train(model, optimizer, loader)
    assert "second.0.weight" in model.state_dict()
