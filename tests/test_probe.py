"""Losses and layers that couple records are found before anything is released."""

import copy
import pickle
import warnings

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
    with pytest.raises(PrivacyError, match="one of the model's layers couples records"):
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
        assert not probed or (optimizer.private_step.probe.done and not model._forward_hooks)
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
    assert engine.ledger.steps == 3 and optimizer.private_step.probe.done


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


def test_a_model_that_takes_no_two_records_is_said_not_to_be_probed():
    eight = Net(before=Do(lambda x: x.reshape(8, TOKENS, WIDTH)))
    engine, model, optimizer, loader = private(eight)
    with pytest.warns(UserWarning, match=r"could not be probed.*a batch of two was not taken"):
        train(model, optimizer, loader)
    assert engine.ledger.steps == 3 and not model._forward_hooks


def test_batches_of_one_have_nothing_to_couple():
    engine, model, optimizer, loader = private(
        COUPLED["centred over the batch"](), max_physical_batch_size=1
    )
    train(model, optimizer, loader, lambda y: y.square().sum())
    assert engine.ledger.steps == 3 and not optimizer.private_step.probe.done


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
