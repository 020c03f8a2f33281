"""Our layers under Opacus' PrivacyEngine: the gradients there are the ones of our own engine."""

import copy
import subprocess
import sys

import pytest
import torch
from opacus import GradSampleModule
from opacus import PrivacyEngine as OpacusEngine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.privacy import PrivacyEngine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]

RECORDS = 6
KINDS = ["linear", "wrapped", "taken over"]
TOLERANCE = 1e-5
# Between the smallest and the largest norm of the records below.
BOUND = 1.5
# What subtracting a moved tensor (of size 1) from what it was may round away.
MOVED = 1e-7


class Ternary(nn.Module):
    """A FrozenBase: a weight of -1, 0 and 1 under one scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().mean())
        signs = (linear.weight.detach() / self.scale).round().clamp(-1, 1).to(torch.int8)
        self.signs = nn.Parameter(signs, requires_grad=False)
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        return self.signs.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


class Net(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        make = Ternary if wrap else nn.Identity
        linears = [nn.Linear(8, 12), nn.Linear(12, 8, bias=False)]
        self.up, self.down = (make(linear) if wrap else linear for linear in linears)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.down(torch.tanh(self.up(x)))).mean(dim=1))


def model_of(kind):
    torch.manual_seed(4)
    net = Net(kind == "wrapped")
    if kind == "taken over":
        options = {"target_modules": ["up", "down"], "modules_to_save": ["head"]}
        model = ffa.convert(get_peft_model(net, LoraConfig(r=3, lora_alpha=5, **options)))
    else:
        model = ffa.convert(
            net, r=3, alpha=5, target_modules=["up", "down"], modules_to_save=["head"]
        )
    assert sum(isinstance(m, Adapter) for m in model.modules()) == 2
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.train()


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(RECORDS, 5, 8, generator=generator)
    return TensorDataset(x, torch.randint(3, (RECORDS,), generator=generator))


def loss_of(model, batch, reduction="mean"):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def trained(model):
    return {n.removeprefix("_module."): p for n, p in model.named_parameters() if p.requires_grad}


def under_ours(model, reduction, **options):
    """Per-record gradients, and what a step of SGD with rate 1 subtracts."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "poisson_sampling": False}
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data(), batch_size=RECORDS),
        loss_reduction=reduction,
        **{**settings, **options},
    )
    loss_of(model, next(iter(loader)), reduction).backward()
    samples = {n: p.grad_sample.clone() for n, p in trained(model).items()}
    optimizer.step()
    return samples, {n: before[n] - p.detach() for n, p in trained(model).items()}


def assert_close(a, b):
    assert a.keys() == b.keys() and len(a) == 4
    for name, value in a.items():
        assert value.shape == b[name].shape
        for one, other in zip(value.double(), b[name].double(), strict=True):
            assert (one - other).norm() <= TOLERANCE * other.norm() + MOVED, name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_samples_are_the_same_under_opacus_hooks(kind, reduction):
    model = model_of(kind)
    expected, _ = under_ours(model, reduction)
    assert all(g.flatten(1).norm(dim=1).min() > 0 for g in expected.values())
    theirs = GradSampleModule(model, loss_reduction=reduction, strict=True)
    loss_of(theirs, data()[:], reduction).backward()
    assert_close({n: p.grad_sample for n, p in trained(theirs).items()}, expected)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_opacus_engine_is_a_step_of_ours(kind, mode):
    model = model_of(kind)
    samples, expected = under_ours(model, "mean")
    norms = sum(g.double().flatten(1).square().sum(1) for g in samples.values()).sqrt()
    # Both sides of the bound are there.
    assert norms.min() < BOUND < norms.max()
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    criterion = nn.CrossEntropyLoss()
    made = OpacusEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained(model).values(), lr=1.0),
        criterion=criterion,
        data_loader=DataLoader(data(), batch_size=RECORDS),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    theirs, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else criterion
    x, y = data()[:]
    optimizer.zero_grad()
    criterion(theirs(x), y).backward()
    optimizer.step()
    moved = {n: before[n] - p.detach() for n, p in trained(theirs).items()}
    # Opacus divides by the norm plus 1e-6.
    assert_close(moved, expected)


@pytest.mark.parametrize("kind", ["linear", "wrapped"])
def test_ghost_norms_are_those_of_the_gradients(kind):
    model = model_of(kind)
    expected, _ = under_ours(model, "mean")
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    theirs = GradSampleModuleFastGradientClipping(model, loss_reduction="mean")
    assert type(model.up) in theirs.NORM_SAMPLERS
    loss_of(theirs, data()[:]).backward()
    for name, p in trained(theirs).items():
        torch.testing.assert_close(
            p._norm_sample, expected[name].flatten(1).norm(dim=1), rtol=TOLERANCE, atol=0
        )


@pytest.mark.parametrize("kind", ["linear", "wrapped"])
def test_dropout_that_hooks_do_not_see_is_refused(kind):
    model = model_of(kind)
    model.up.dropout = 0.1
    theirs = GradSampleModule(model)
    with pytest.raises(PrivacyError, match=r"has dropout 0\.1, whose mask Opacus' hooks do not"):
        loss_of(theirs, data()[:]).backward()


def test_dropout_of_a_taken_over_layer_is_opacus_own():
    torch.manual_seed(4)
    lora = LoraConfig(r=3, target_modules=["up"], lora_dropout=0.5)
    model = ffa.convert(get_peft_model(Net(False), lora)).train()
    theirs = GradSampleModule(model)
    torch.manual_seed(1)
    loss_of(theirs, data()[:]).backward()
    (B,) = trained(theirs).values()
    torch.testing.assert_close(B.grad_sample.mean(dim=0), B.grad)


def test_the_hooks_are_left_and_ours_takes_over_again():
    model = model_of("taken over")
    expected, _ = under_ours(model, "mean")
    theirs = GradSampleModule(model)
    loss_of(theirs, data()[:]).backward()
    model = theirs.to_standard_module()
    for p in model.parameters():
        p.grad = None
    again, _ = under_ours(model, "mean")
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


# This module is the order of Opacus first.
ORDERS = {
    "opacus second": "import ffa_kernels as ffa; ffa.nn; import opacus; "
    "layer = ffa.FFALinear(4, 3, 2)",
    "opacus last": "import ffa_kernels as ffa; layer = ffa.FFALinear(4, 3, 2); import opacus",
}
CHECK = """
import torch
from torch import nn
torch.manual_seed(0)
nn.init.normal_(layer.double().lora_B)
x = torch.randn(5, 2, 4).double()
module = opacus.GradSampleModule(nn.Sequential(layer))
module(x).square().sum(dim=(1, 2)).mean().backward()
got = layer.lora_B.grad_sample
rows = [torch.autograd.grad(layer(x[i : i + 1]).square().sum(), layer.lora_B)[0] for i in range(5)]
torch.testing.assert_close(got, torch.stack(rows))
"""


@pytest.mark.parametrize(
    "order", [pytest.param("opacus second", marks=pytest.mark.full), "opacus last"]
)
def test_any_order_of_imports(order):
    program = ORDERS[order] + CHECK
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
