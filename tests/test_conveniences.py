"""What people do around a training loop: casts, scales, checkpoints, moves, copies."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.backends.grid import grid_size
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine

N, TOKENS, WIDTH, CLASSES = 6, 4, 8, 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Adapted, shared and whole layers of the kinds that are trained; over tokens."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, CLASSES)
        # True: reentrant, False: not, None: no checkpointing.
        self.checkpointed = checkpointed

    def block(self, x):
        return self.body(x).tanh() + x

    def forward(self, x):
        given = x
        for _ in range(2):
            if self.checkpointed is None:
                x = self.block(x)
            else:
                x = x if x.requires_grad else x.requires_grad_()
                x = checkpoint(self.block, x, use_reentrant=self.checkpointed)
        x = self.norm(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        # Under autocast float32, while the head's output will be narrower.
        return self.head(x.mean(dim=1) + given.mean(dim=1))


HEADS = ["norm", "conv", "head"]


def peft_model(*arguments):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=HEADS)
    return ffa.convert(peft.get_peft_model(Net(*arguments), config))


def converted(*arguments, peft=False):
    torch.manual_seed(0)
    if peft:
        model = peft_model(*arguments)
    else:
        model = ffa.convert(Net(*arguments), r=2, target_modules=["body"], modules_to_save=HEADS)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, TOKENS, WIDTH, generator=generator).to(dtype)
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=generator))


class Reveal(torch.optim.Optimizer):
    """Keeps what is released: the noised gradient of each tensor."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.released = []

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        self.released.append([p.grad.double() for p in held])


def private(model, optimizer=None, engine=None, dtype=torch.float32, batch_size=N, **options):
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "poisson_sampling": False, **options}
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=optimizer or torch.optim.SGD(trained(model).values(), lr=0.1),
        data_loader=DataLoader(data(dtype), batch_size=batch_size),
        **options,
    )


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def train(model, optimizer, loader, autocast=None, inside=False):
    for batch in loader:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = loss_of(model, batch)
            if inside:
                optimizer.scale(loss).backward()
        if not inside:
            optimizer.scale(loss).backward()
        optimizer.step()


def seeded(seed=3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PrivacyEngine(seed=seed)


# Autocast.


def grad_samples(model, dtype=torch.float32, autocast=None, inside=False):
    model, optimizer, loader = private(model, dtype=dtype, max_grad_norm=math.inf)
    (batch,) = loader
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = loss_of(model, batch)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    result = {n: p.grad_sample.double() for n, p in trained(model).items()}
    assert all(p.grad_sample.dtype == p.dtype for p in trained(model).values())
    optimizer.step()
    return result


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_autocast_gives_the_gradients_of_a_bfloat16_model(peft, inside):
    """Judged by what bfloat16 itself costs: the whole model's distance from float64."""
    exact = grad_samples(converted(peft=peft).double(), torch.float64)
    narrow = grad_samples(converted(peft=peft).bfloat16(), torch.bfloat16)
    mixed = grad_samples(converted(peft=peft), autocast=torch.bfloat16, inside=inside)
    for name, G in exact.items():
        own = (narrow[name] - G).norm() / G.norm()
        assert 2.0**-12 < own < 0.1, name
        assert (mixed[name] - G).norm() / G.norm() < 2 * own, name
        # It was autocast that ran: in float32 the distance would be some 2^-20.
        assert (mixed[name] - G).norm() / G.norm() > 2.0**-14, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_layer_takes_what_the_layer_before_gives(dtype):
    """bfloat16 after another product, where nn.Linear casts its weight all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)).to(dtype)
    ffa.convert(model, r=4, target_modules=["1", "2"])
    with torch.no_grad():
        for name in ("1", "2"):
            model.get_submodule(name).lora_B.normal_()
    plain = ffa.merge(copy.deepcopy(model))
    x, before = torch.randn(5, 4, 12), []
    model[1].register_forward_pre_hook(lambda module, args: before.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = model(x), plain(x)
    assert before == [torch.bfloat16] and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))
    y.float().square().mean().backward()
    assert all(p.grad.dtype == dtype for p in trained(model).values())


def test_autocast_gives_the_gradients_that_pytorch_gives():
    """Of a batch of one record, the tap and .grad hold the same gradient."""
    model = converted()
    plain = copy.deepcopy(model)
    ours = grad_samples(model, autocast=torch.bfloat16)
    x, y = data().tensors
    for i in range(N):
        plain.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(plain, (x[i : i + 1], y[i : i + 1]))
        loss.backward()
        for name, p in trained(plain).items():
            torch.testing.assert_close(
                ours[name][i], p.grad.double(), rtol=2.0**-5, atol=2.0**-7 * float(p.grad.norm())
            )


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("parameters", "given", "autocast"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, None),
        # G is made wider than the tensor that it is for, and rounded once more.
        (torch.bfloat16, torch.float32, torch.float16),
    ],
)
def test_the_norm_is_of_what_is_summed(parameters, given, autocast, twice):
    """One record far above C leaves C in the sum, less what truncation to the grid takes."""
    C, width = 2.0**-10, 64

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(width, width, bias=False)

        def forward(self, x):
            return self.layer(x) + self.layer(x.flip(-1)) if twice else self.layer(x)

    torch.manual_seed(0)
    model = ffa.convert(One(), r=4, target_modules=["layer"]).to(parameters)
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=Reveal(trained(model).values()),
        data_loader=DataLoader(TensorDataset(torch.randn(2, 5, width).to(given)), batch_size=2),
        noise_multiplier=0.0,
        max_grad_norm=C,
        poisson_sampling=False,
        max_physical_batch_size=1,
    )
    (x,) = next(iter(loader))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        model(x).float().square().sum().backward()
    G = model.layer.lora_B.grad_sample.double()[0]
    assert G.norm() > 100 * C
    optimizer.step()
    # The first of two pieces: the sum holds its one record, in units of the grid.
    (total,) = optimizer.private_step._sums
    clipped = total.double() * grid_size(C)
    assert (clipped - G * (C / G.norm())).abs().max() <= grid_size(C) * (1 + 1e-3)
    assert C - grid_size(C) * math.sqrt(total.numel()) * (1 + 1e-3) <= clipped.norm() <= C


# A static loss scale.


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
@pytest.mark.parametrize("pieces", [None, 4])
def test_a_loss_scale_changes_no_bit(clipping, optimizer, pieces):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    }[optimizer]

    def run(scale):
        model = converted()
        engine = seeded()
        model, private_optimizer, loader = private(
            model,
            make(trained(model).values()),
            engine,
            noise_multiplier=0.8,
            clipping=clipping,
            loss_scale=scale,
            max_physical_batch_size=pieces,
        )
        for _ in range(3):
            train(model, private_optimizer, loader)
        return [p.detach() for p in trained(model).values()], engine.stats, engine.ledger.history

    first, stats, history = run(1.0)
    assert stats["clipped"] > 0
    assert not any(map(torch.equal, first, trained(converted()).values()))
    for scale in (2.0**-10, 1024, 2.0**20):
        tensors, others, other_history = run(scale)
        assert others == stats and other_history == history
        assert all(map(torch.equal, first, tensors))


def test_fp16_trains_with_a_loss_scale_where_it_underflows_without():
    """The loss is small on purpose: float16 has nothing below 2^-24."""

    def run(scale, autocast):
        model = converted()
        reveal = Reveal(trained(model).values())
        model, optimizer, loader = private(model, reveal, loss_scale=scale, max_grad_norm=math.inf)
        for batch in loader:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = loss_of(model, batch) * 1e-6
            optimizer.scale(loss).backward()
            optimizer.step()
        return torch.cat([g.flatten() for g in reveal.released[0]])

    exact = run(1.0, None)
    assert exact.norm() > 0
    assert (run(1.0, torch.float16) - exact).norm() > 0.3 * exact.norm()
    assert (run(2.0**20, torch.float16) - exact).norm() < 0.02 * exact.norm()


def test_a_record_that_overflows_is_dropped_and_counted():
    model = converted()
    engine = PrivacyEngine()
    model, optimizer, loader = private(model, engine=engine, loss_scale=2.0**40)
    before = [p.detach().clone() for p in trained(model).values()]
    train(model, optimizer, loader, autocast=torch.float16)
    assert engine.stats["dropped"] == N
    assert all(map(torch.equal, before, trained(model).values()))


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, 1000, math.inf, math.nan, "1024", 2.0**200])
def test_a_loss_scale_that_does_not_divide_exactly_is_refused(scale):
    with pytest.raises(ConfigError, match=r"loss_scale is .*accepted: a power of two"):
        private(converted(), loss_scale=scale)


def test_a_bound_that_its_scale_takes_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"does not fit.*loss_scale counted in"):
        private(converted(), loss_scale=2.0**90, max_grad_norm=2.0**450)


@pytest.mark.parametrize("way", ["step", "unscale_"])
def test_a_dynamic_scaler_is_refused(way):
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine, noise_multiplier=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in trained(model).values()]
    for batch in loader:
        scaler.scale(loss_of(model, batch)).backward()
        with pytest.raises(PrivacyError, match=r"GradScaler.*loss_scale=.*optimizer\.scale"):
            getattr(scaler, way)(optimizer)
        optimizer.zero_grad()
    assert engine.ledger.steps == 0
    assert all(map(torch.equal, before, trained(model).values()))


def test_a_scaler_that_is_switched_off_is_let_through():
    model, optimizer, loader = private(converted())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for batch in loader:
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.private_step.steps == 1


# Gradient checkpointing, of a layer that runs twice.


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_shared_layers(peft, reentrant):
    """Dropout too: a mask that were drawn anew in the second forward would show."""

    def run(checkpointed):
        model = converted(checkpointed, peft=peft)
        layer = model.get_submodule("base_model.model.body" if peft else "body")
        if peft:
            layer.lora_dropout["default"] = nn.Dropout(0.3)
        else:
            layer.dropout = 0.3
        torch.manual_seed(4)
        reveal = Reveal(trained(model).values())
        model, optimizer, loader = private(model, reveal, seeded())
        train(model, optimizer, loader)
        return reveal.released[0]

    plain, again = run(None), run(reentrant)
    assert all(G.norm() > 0 for G in plain)
    for G, H in zip(plain, again, strict=True):
        torch.testing.assert_close(G, H, rtol=1e-5, atol=1e-8)


def test_per_layer_and_reentrant_checkpoints_of_a_shared_layer_are_refused_by_name():
    """Each segment's backward delivers a gradient of its own, and the first is clipped by then."""
    model, optimizer, loader = private(converted(True), clipping="per_layer")
    with pytest.raises(PrivacyError, match=r"body\.lora_B: a second gradient.*keep_grad_sample"):
        train(model, optimizer, loader)


# Accumulation.


def test_batches_cannot_be_added_up_by_leaving_steps_out_and_the_way_is_named():
    model, optimizer, loader = private(converted(), batch_size=2)
    with pytest.raises(PrivacyError, match=r"add up several batches.*max_physical_batch_size="):
        for number, batch in enumerate(loader):
            loss_of(model, batch).backward()
            if number % 2:
                optimizer.step()


def test_a_batch_in_pieces_makes_the_step_of_the_whole():
    def run(size):
        model = converted().double()
        model, optimizer, loader = private(
            model, dtype=torch.float64, max_physical_batch_size=size, pad_physical_batches=False
        )
        train(model, optimizer, loader)
        return optimizer.private_step.steps, [p.detach() for p in trained(model).values()]

    whole, pieces = run(None), run(4)
    assert whole[0] == pieces[0] == 1
    for p, q in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


# transformers' own ways of using a model.


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("training", [True, False])
def test_generate_and_save_pretrained_on_a_private_model(gpt2, training, tmp_path):
    model = ffa.convert(copy.deepcopy(gpt2), r=2, target_modules=["c_attn"])
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained(model).values(), lr=1.0),
        data_loader=DataLoader(TensorDataset(tokens), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    start = model.transformer.h[0].attn.c_attn.lora_B.detach().clone()
    for (batch,) in loader:
        model.train()
        ffa.causal_lm_loss(model(batch).logits, batch).backward()
        # In the middle of a step, whose batch must not be disturbed.
        model.train(training)
        made = model.generate(
            batch[:1], max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert made.shape == (1, 9) and torch.equal(made[0, :6], batch[0])
        model.save_pretrained(tmp_path)
        optimizer.step()
    assert optimizer.private_step.steps == 2
    B = model.transformer.h[0].attn.c_attn.lora_B
    assert not torch.equal(B, start)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["transformer.h.0.attn.c_attn.lora_B"], B)


# Compiled, before and after.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["wrapped before", "wrapped after", "in place"])
def test_a_compiled_model_is_trained_as_any_other(how):
    torch._dynamo.reset()

    def run(how):
        model = converted()
        if how == "wrapped before":
            model = torch.compile(model, backend="aot_eager")
        model, optimizer, loader = private(model, engine=seeded(), noise_multiplier=0.5)
        forward = model
        if how == "wrapped after":
            forward = torch.compile(model, backend="aot_eager")
        if how == "in place":
            model.compile(backend="aot_eager")
        for _ in range(2):
            train(forward, optimizer, loader)
        return list(trained(model).values())

    for p, q, start in zip(run(None), run(how), trained(converted()).values(), strict=True):
        assert not torch.equal(p, start)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Moves after make_private: they work, or are refused; nothing trains for nothing.


def test_moves_that_change_something_are_refused_by_name_and_others_are_not():
    moves = {
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "half": lambda m: m.half(),
        "double": lambda m: m.double(),
    }
    for name, move in moves.items():
        engine = PrivacyEngine()
        model, optimizer, loader = private(converted(), engine=engine)
        move(model)
        with pytest.raises(
            PrivacyError, match=r"(body\.lora_B: is|'body': lora_B is).*model\.to\(\.\.\.\)"
        ):
            train(model, optimizer, loader)
        assert engine.ledger.steps == 0, name
    # This one puts other tensors into the model, which cannot be used with the batch.
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)
    with pytest.raises(ConfigError, match="weight is on meta; accepted: cpu, as x"):
        train(model.to("meta"), optimizer, loader)
    assert engine.ledger.steps == 0
    model, optimizer, loader = private(converted())
    model.to("cpu").float().to(memory_format=torch.contiguous_format)
    train(model, optimizer, loader)
    assert optimizer.private_step.steps == 1


def test_a_move_of_what_is_frozen_is_refused_by_name():
    engine = PrivacyEngine()
    model, optimizer, loader = private(converted(), engine=engine)
    for batch in loader:
        loss_of(model, batch).backward()
        model.body.weight.data = model.body.weight.data.bfloat16()
        with pytest.raises(PrivacyError, match=r"'body': weight is torch\.bfloat16.*float32"):
            optimizer.step()
    assert engine.ledger.steps == 0


def test_a_move_that_replaces_the_parameters_is_refused_by_name():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        engine = PrivacyEngine()
        model, optimizer, loader = private(converted(), engine=engine)
        model.to(torch.float64).to(torch.float32)
        with pytest.raises(PrivacyError, match=r"'body': \w+ is another tensor"):
            train(model, optimizer, loader)
        assert engine.ledger.steps == 0
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_a_move_before_make_private_is_what_the_error_asks_for():
    model = converted().double()
    model, optimizer, loader = private(model, dtype=torch.float64, noise_multiplier=1.0)
    train(model, optimizer, loader)
    assert all(p.dtype == torch.float64 for p in model.parameters())


# Going on from a file.


def test_a_resumed_run_goes_on_counting_with_new_noise(tmp_path):
    path, file = tmp_path / "ledger.jsonl", tmp_path / "checkpoint.pt"
    noises, epsilons = [], []
    for run in range(3):
        engine = PrivacyEngine(accountant="rdp", ledger=path)
        model = converted()
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
        if run:
            state = torch.load(file)
            model.load_state_dict(state["model"])
        model, optimizer, loader = private(
            model, optimizer, engine, poisson_sampling=True, batch_size=2, noise_multiplier=1.5
        )
        if run:
            optimizer.load_state_dict(state["optimizer"])
            assert engine.get_epsilon(1e-2) == epsilons[-1] > 0
        train(model, optimizer, loader)
        noises.append(engine._noise.state[:4].tolist())
        epsilons.append(engine.get_epsilon(1e-2))
        count = {int(s["step"]) for s in optimizer.state_dict()["state"].values()}
        assert count == {3 * (run + 1)}
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        words = [bytes(torch.tensor([w]).numpy()) for w in noises[-1]]
        assert not any(w in file.read_bytes() for w in words)
        assert engine.ledger.history == [(1.5, 2 / N, 3 * (run + 1))]
        engine.ledger.close()
    assert epsilons == sorted(set(epsilons))
    assert len({tuple(key) for key in noises}) == 3


@pytest.mark.parametrize("peft", [False, True])
def test_state_dicts_copies_and_pickles_of_a_trained_model(peft):
    import pickle

    model, optimizer, loader = private(converted(peft=peft), noise_multiplier=1.0)
    train(model, optimizer, loader)
    x, _ = data().tensors
    model.eval()
    expected = model(x)
    fresh = converted(peft=peft).eval()
    assert not torch.allclose(fresh(x), expected)
    fresh.load_state_dict(model.state_dict())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = {
        "state_dict": fresh,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for name, twin in twins.items():
        assert torch.equal(twin.eval()(x), expected), name
        # And each is a model like any other: it can be trained privately by an engine of its own.
        twin.train()
        before = [p.detach().clone() for p in trained(twin).values()]
        twin, twin_optimizer, twin_loader = private(twin, noise_multiplier=1.0)
        train(twin, twin_optimizer, twin_loader)
        assert not any(map(torch.equal, before, trained(twin).values())), name
    assert torch.equal(model(x), expected)
