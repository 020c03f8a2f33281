"""Per-record gradients, and their clipped sum, equal those of Opacus on the same model."""

import copy
import warnings

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import ffa_kernels as ffa
from ffa_kernels.privacy import PrivacyEngine

TARGETS = ["query", "value", "attention.output.dense", "intermediate.dense"]
R, ALPHA = 4, 8
RECORDS, TOKENS = 5, 11
# Opacus adds this to the norm before it divides.
OPACUS_MARGIN = 1e-6
# What two fp32 summation orders may differ by; a lost term or a wrong factor is far above it.
TOLERANCE = 1e-5


pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def bert():
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


class Tokens(Dataset):
    """Records of different lengths, padded, with an attention mask."""

    def __init__(self, records=RECORDS, tokens=TOKENS):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(1, 50, (records, tokens), generator=generator)
        lengths = torch.randint(3, tokens + 1, (records,), generator=generator)
        self.mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
        self.labels = torch.randint(3, (records,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"ids": self.ids[i], "mask": self.mask[i], "labels": self.labels[i]}


def batch_loss(model, batch, reduction):
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction=reduction)


def adapted_pair():
    """The same model twice: FFALinear layers, and PEFT's plain nn.Linear A (frozen) and B."""
    ours = ffa.convert(bert(), r=R, alpha=ALPHA, target_modules=TARGETS)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_B" in name or name.startswith("classifier"))
    torch.manual_seed(7)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs = get_peft_model(
        bert(), LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    )
    layers = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            layer = layers[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(layer.lora_A)
            module.lora_B["default"].weight.data.copy_(layer.lora_B)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name or ".classifier." in name)
    ours.train(), theirs.train()
    return ours, theirs


def peft_name(name):
    return "base_model.model." + name.replace("lora_B", "lora_B.default.weight")


class Reveal(torch.optim.Optimizer):
    """Keeps what is released, times L: a moved parameter would have rounded it away."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        self.released = {p: p.grad.double() * RECORDS for p in held}


def revealing(model):
    return Reveal([p for p in model.parameters() if p.requires_grad])


def private(model, dataset, batch_size=None, optimizer=None, **options):
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, **options}
    optimizer = optimizer or torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1.0
    )
    loader = DataLoader(dataset, batch_size=batch_size or len(dataset))
    return PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        poisson_sampling=False,
        **options,
    )


def grad_samples(model):
    return {n: p.grad_sample.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal_records(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, G in ours.items():
        assert G.shape == theirs[name].shape
        for i, (a, b) in enumerate(zip(G.double(), theirs[name].double(), strict=True)):
            assert b.norm() > 0, (name, i)
            assert (a - b).norm() < TOLERANCE * b.norm(), (name, i)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_peft_style_bert_equals_grad_sample_module(reduction):
    ours, theirs = adapted_pair()
    ours, _, loader = private(ours, Tokens(), loss_reduction=reduction)
    batch = next(iter(loader))
    loss = batch_loss(ours, batch, reduction)
    loss.backward()

    theirs = GradSampleModule(theirs, loss_reduction=reduction, strict=False)
    their_loss = batch_loss(theirs, batch, reduction)
    torch.testing.assert_close(loss, their_loss)
    their_loss.backward()
    expected = {
        n.removeprefix("_module."): p.grad_sample
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    got = {peft_name(n): g for n, g in grad_samples(ours).items()}
    assert len(got) == 2 * len(TARGETS) + 2
    assert_equal_records(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_sample_is_the_gradient_of_the_records_own_loss(reduction):
    ours, _ = adapted_pair()
    plain = copy.deepcopy(ours)
    ours, _, loader = private(ours, Tokens(), loss_reduction=reduction)
    batch = next(iter(loader))
    batch_loss(ours, batch, reduction).backward()
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    expected = {n: [] for n in trained}
    for i in range(RECORDS):
        record = {key: value[i : i + 1] for key, value in batch.items()}
        gradients = torch.autograd.grad(batch_loss(plain, record, "sum"), list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            expected[name].append(gradient)
    assert_equal_records(grad_samples(ours), {n: torch.stack(g) for n, g in expected.items()})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_sum_equals_dp_optimizer(reduction):
    ours, theirs = adapted_pair()
    reveal = revealing(ours)
    ours, optimizer, loader = private(
        ours, Tokens(), optimizer=reveal, loss_reduction=reduction, max_grad_norm=1.0
    )
    batch = next(iter(loader))
    batch_loss(ours, batch, reduction).backward()
    norms = sum(g.double().flatten(1).square().sum(1) for g in grad_samples(ours).values()).sqrt()
    # Both sides of the bound must be there, or the comparison says little.
    C = float(norms.median())
    assert norms.min() < C < norms.max()
    optimizer.zero_grad()

    ours, optimizer, loader = private(
        ours, Tokens(), optimizer=reveal, loss_reduction=reduction, max_grad_norm=C
    )
    batch_loss(ours, next(iter(loader)), reduction).backward()
    optimizer.step()
    released = {
        peft_name(n): reveal.released[p] for n, p in ours.named_parameters() if p.requires_grad
    }

    theirs = GradSampleModule(theirs, loss_reduction=reduction, strict=False)
    trained = {
        n.removeprefix("_module."): p for n, p in theirs.named_parameters() if p.requires_grad
    }
    their_optimizer = DPOptimizer(
        torch.optim.SGD(trained.values(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=RECORDS,
        loss_reduction=reduction,
    )
    batch_loss(theirs, batch, reduction).backward()
    samples = {n: p.grad_sample.double() for n, p in trained.items()}
    their_optimizer.clip_and_accumulate()
    norms = sum(g.flatten(1).square().sum(1) for g in samples.values()).sqrt()
    # Opacus' factor is C / (norm + 1e-6), at most 1; ours has no such term. What it leaves out:
    margin = (C / norms).clamp(max=1) - (C / (norms + OPACUS_MARGIN)).clamp(max=1)
    for name, p in trained.items():
        expected = p.summed_grad.double() + torch.einsum("i,i...", margin, samples[name])
        assert expected.norm() > 0
        assert (released[name] - expected).norm() < TOLERANCE * expected.norm(), name


class Text(nn.Module):
    """Embedding, LayerNorm, head: (n, T) token ids to logits."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(13, 6, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)).tanh().mean(dim=1))


class Image(nn.Module):
    """A strided, dilated and grouped convolution, GroupNorm, head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.second = nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).tanh()))
        return self.head(x.tanh().mean(dim=(2, 3)))


class Sequence(nn.Module):
    """A 1-D convolution, RMSNorm, head."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(3, 5, 3, padding="same")
        self.norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x).mT).tanh().mean(dim=1))


def inputs_for(model):
    generator = torch.Generator().manual_seed(11)
    if isinstance(model, Text):
        # Repeated tokens within a record, and in each the padding token.
        ids = torch.randint(0, 5, (4, 7), generator=generator)
        ids[:, 2] = 0
        return ids
    shape = (4, 2, 9, 9) if isinstance(model, Image) else (4, 3, 8)
    return torch.randn(shape, generator=generator)


def own_gradients(model, x, y):
    trained = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(trained.values())))
    return {n: torch.stack([r[k] for r in rows]) for k, n in enumerate(trained)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [Text, Image, Sequence])
def test_other_trained_layers_equal_opacus_and_autograd(kind, reduction):
    torch.manual_seed(1)
    model = kind()
    x, y = inputs_for(model), torch.tensor([0, 2, 1, 1])
    theirs, plain = copy.deepcopy(model), copy.deepcopy(model)
    model, _, loader = private(model, TensorDataset(x, y), loss_reduction=reduction)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
    got = grad_samples(model)
    assert_equal_records(got, own_gradients(plain, x, y))

    theirs = GradSampleModule(theirs, loss_reduction=reduction)
    nn.functional.cross_entropy(theirs(x), y, reduction=reduction).backward()
    expected = {n.removeprefix("_module."): p.grad_sample for n, p in theirs.named_parameters()}
    assert_equal_records(got, expected)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_convolutions_take_inputs_of_any_strides(layout):
    """Opacus' samplers reckon with those of a contiguous input."""
    torch.manual_seed(1)
    model = Image()
    x, y = inputs_for(model), torch.tensor([0, 2, 1, 1])
    x = x[:, :, :1].expand_as(x).contiguous() if layout == "expanded" else x
    plain = copy.deepcopy(model)
    model, _, loader = private(model, TensorDataset(x, y))
    x, y = next(iter(loader))
    strided = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: x[:, :, :1].expand_as(x),
    }[layout]()
    assert torch.equal(strided, x) and not strided.is_contiguous()
    nn.functional.cross_entropy(model(strided), y).backward()
    assert_equal_records(grad_samples(model), own_gradients(plain, x, y))


class Ids(nn.Module):
    """One index is all there is of a record; a norm without a bias, and one over two dimensions."""

    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6, bias=False)
        self.both = nn.LayerNorm((2, 3))

    def forward(self, x):
        return self.both(self.norm(self.users(x)).view(-1, 2, 3)).flatten(1).tanh()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_records_of_one_index_and_norms_without_a_bias(reduction):
    torch.manual_seed(1)
    model, plain = (nn.Module.train(Ids()) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x, y = torch.tensor([3, 1, 3, 8]), torch.tensor([0, 2, 1, 1])
    model, _, loader = private(model, TensorDataset(x, y), loss_reduction=reduction)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
    assert_equal_records(grad_samples(model), own_gradients(plain, x, y))


def test_padding_row_of_an_embedding_gets_no_gradient():
    torch.manual_seed(1)
    model = Text(padding_idx=0)
    x, y = inputs_for(model), torch.tensor([0, 2, 1, 1])
    assert (x == 0).any(dim=1).all()
    plain = copy.deepcopy(model)
    model, _, loader = private(model, TensorDataset(x, y))
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    assert_equal_records(grad_samples(model), own_gradients(plain, x, y))
    assert model.embedding.weight.grad_sample[:, 0].abs().max() == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_gradient_checkpointing_changes_nothing(use_reentrant, clipping):
    results = []
    for checkpointing in (False, True):
        model, _ = adapted_pair()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                # Reentrant checkpointing gives gradients only where an input asks for them.
                model.enable_input_require_grads()
        reveal = revealing(model)
        model, optimizer, loader = private(
            model, Tokens(), optimizer=reveal, clipping=clipping, max_grad_norm=0.5
        )
        layer = model.bert.encoder.layer[1]
        calls = []
        layer.attention.self.query.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch_loss(model, next(iter(loader)), "mean").backward()
        assert len(calls) == (2 if checkpointing else 1)
        samples = grad_samples(model) if clipping == "flat" else {}
        optimizer.step()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        results.append((samples, {n: reveal.released[p] for n, p in trained.items()}))
    (samples, released), (checkpointed_samples, checkpointed) = results
    if clipping == "flat":
        assert_equal_records(checkpointed_samples, samples)
    for name, total in released.items():
        assert total.norm() > 0
        assert (checkpointed[name] - total).norm() <= TOLERANCE * total.norm(), name


def test_peft_lora_with_both_factors_trained():
    _, model = adapted_pair()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".classifier." in name)
    theirs = GradSampleModule(copy.deepcopy(model), strict=False)
    model, _, loader = private(model, Tokens())
    batch = next(iter(loader))
    batch_loss(model, batch, "mean").backward()
    batch_loss(theirs, batch, "mean").backward()
    expected = {
        n.removeprefix("_module."): p.grad_sample
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert any("lora_A" in n for n in expected)
    assert_equal_records(grad_samples(model), expected)
