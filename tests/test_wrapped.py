"""FFAWrapped and PEFT's layers around weights of other makes: bitsandbytes, torchao, one's own."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.wrapped import dequantized, mixes_records
from ffa_kernels.privacy import PrivacyEngine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*was instantiated without `get_apply_tensor_subclass`"),
]

D_IN, D_OUT, R, ALPHA = 64, 96, 4, 6
RECORDS, TOKENS = 3, 5
# A product of 64 terms in fp32, its sums in any order.
ROUNDING = 64 * 2.0**-24


class Ternary(nn.Module):
    """A FrozenBase of one's own: -1, 0 and 1 under one scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().mean())
        signs = (linear.weight.detach() / self.scale).round().clamp(-1, 1).to(torch.int8)
        self.register_buffer("signs", signs)
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        return self.signs.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


def bitsandbytes_4bit(linear, **options):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        *(D_IN, D_OUT), bias=linear.bias is not None, compute_dtype=torch.float32, **options
    )
    layer.load_state_dict(linear.state_dict())
    # Quantised when it is moved.
    return layer.to("cpu")


def bitsandbytes_8bit(linear, **options):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        *(D_IN, D_OUT), bias=linear.bias is not None, has_fp16_weights=False, **options
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(linear, config, **options):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, getattr(quantization, config)(**options))
    return holder[0]


MAKES = {
    "own": Ternary,
    "nf4": lambda linear: bitsandbytes_4bit(linear, quant_type="nf4"),
    "fp4": lambda linear: bitsandbytes_4bit(linear, quant_type="fp4", compress_statistics=False),
    "int8": bitsandbytes_8bit,
    "ao-int8": lambda linear: torchao(linear, "Int8WeightOnlyConfig"),
    "ao-float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
    "ao-intx": lambda linear: torchao(linear, "IntxWeightOnlyConfig"),
}


@pytest.fixture(params=MAKES)
def make(request):
    return MAKES[request.param]


class Net(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def net(make, bias=True):
    torch.manual_seed(0)
    return Net(make(nn.Linear(D_IN, D_OUT, bias=bias)))


def randomised(model):
    generator = torch.Generator().manual_seed(5)
    for m in model.modules():
        if isinstance(m, Adapter):
            B = m.trained_B()
            B.data = torch.randn(B.shape, generator=generator) * 0.1
    return model


def converted(make, bias=True):
    model = net(make, bias)
    return randomised(ffa.convert(model, r=R, alpha=ALPHA, target_modules=["base"], seed=1))


def taken_over(make, bias=True):
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["base"])
    return randomised(ffa.convert(get_peft_model(net(make, bias), lora)))


WAYS = {"converted": converted, "taken over": taken_over}


@pytest.fixture(params=WAYS)
def adapt(request, make):
    if request.param == "taken over" and make is Ternary:
        pytest.skip("PEFT knows no layers of one's own")
    return lambda **options: WAYS[request.param](make, **options)


def adapter_of(model):
    (layer,) = (m for m in model.modules() if isinstance(m, Adapter))
    return layer


def inputs():
    return torch.randn(RECORDS, TOKENS, D_IN, generator=torch.Generator().manual_seed(8))


def reference(layer):
    """W + s B A and b in fp64, from the library's own dequantised weight."""
    W = dequantized(layer.base_layer).double()
    A, B = layer.frozen_A().double(), layer.trained_B().detach().double()
    return W, W + layer.adapter_scaling() * B @ A, layer.base_layer.bias


def close(a, b, scale):
    return (a.double() - b).abs().max() <= ROUNDING * float(scale.abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_are_those_of_the_dequantised_weight(adapt, bias):
    model = adapt(bias=bias).train()
    layer = adapter_of(model)
    W, adapted, b = reference(layer)
    assert (W - adapted).abs().max() > 0.01
    x = inputs().requires_grad_()
    y = model(x)
    assert y.dtype == torch.float32 and y.shape == (RECORDS, TOKENS, D_OUT)
    expected = x.detach().double() @ adapted.t() + (0 if b is None else b.detach().double())
    bound = x.detach().double().abs() @ adapted.abs().t() + 1
    assert close(y.detach(), expected, bound)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(g)
    assert close(x.grad, g.double() @ adapted, g.double().abs() @ adapted.abs())
    h = x.detach().double() @ layer.frozen_A().double().t()
    expected = layer.adapter_scaling() * g.double().flatten(0, 1).t() @ h.flatten(0, 1)
    torch.testing.assert_close(layer.trained_B().grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p is layer.trained_B()
    }


def test_dequantised_weight_is_near_what_was_quantised(make):
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT)
    weight = linear.weight.detach().clone()
    found = dequantized(make(linear))
    assert found.shape == (D_OUT, D_IN) and found.is_floating_point()
    # Ternary is the coarsest here.
    assert 0 < (found - weight).norm() < 0.6 * weight.norm()


def test_records_are_those_of_autograd(adapt):
    model = adapt().train()
    plain = copy.deepcopy(model)
    x, t = inputs(), torch.randn(RECORDS, TOKENS, D_OUT)
    optimizer = torch.optim.SGD([adapter_of(model).trained_B()], lr=1.0)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, t), batch_size=RECORDS),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    for x, t in loader:
        (model(x) * t).sum().backward()
        G = adapter_of(model).trained_B().grad_sample
        B = adapter_of(plain).trained_B()
        for i in range(RECORDS):
            (own,) = torch.autograd.grad((plain(x[i : i + 1]) * t[i : i + 1]).sum(), B)
            assert own.norm() > 0
            assert (G[i].double() - own.double()).norm() <= 1e-5 * own.double().norm()
        optimizer.step()
    assert not torch.equal(adapter_of(model).trained_B(), B)


def test_merge_gives_a_plain_linear_that_computes_the_same(adapt):
    model = adapt()
    _, adapted, b = reference(adapter_of(model))
    x = inputs()
    with torch.no_grad():
        y = model.train()(x)
    ffa.merge(model)
    (plain,) = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert type(plain) is nn.Linear and not plain.weight.requires_grad
    assert type(plain.weight) is nn.Parameter and plain.bias is b
    assert torch.equal(plain.weight, adapted.to(plain.weight.dtype))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_B_at_zero_changes_nothing_and_only_B_is_trained(make):
    base = net(make)
    x = inputs()
    before = base.train()(x).detach()
    model = ffa.convert(base, r=R, alpha=ALPHA, target_modules=["base"])
    assert isinstance(model.base, ffa.FFAWrapped) and torch.equal(model(x), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base.lora_B"]
    assert model.base.lora_A.dtype == model.base.lora_B.dtype == torch.float32


def test_copies_pickles_and_other_settings(make):
    model = net(make)
    ffa.convert(model, r=R, alpha=ALPHA, target_modules=["base"], rslora=True, dropout=0.2)
    layer = randomised(model).eval().base
    assert layer.scaling == ALPHA / 2 and "dropout=0.2" in repr(layer)
    x = inputs()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        try:
            bare = pickle.dumps(layer.base_layer)
        except AttributeError:
            bare = None  # torchao's own layers are in no pickle.
        if bare is not None:
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.manual_seed(1)
    assert not torch.equal(model.train()(x), expected)


def test_an_adapter_of_a_quantised_model_goes_to_a_plain_one_and_back(make, tmp_path):
    model = randomised(ffa.convert(net(make), r=R, alpha=ALPHA, target_modules=["base"]))
    ffa.save_adapter(model, tmp_path)
    plain = ffa.load_adapter(net(lambda linear: linear), tmp_path)
    again = ffa.load_adapter(net(make), tmp_path)
    assert type(plain.base) is ffa.FFALinear and type(again.base) is ffa.FFAWrapped
    for other in (plain, again):
        assert torch.equal(other.base.lora_A, model.base.lora_A)
        assert torch.equal(other.base.lora_B, model.base.lora_B)


def test_pissa_is_of_the_dequantised_weight(make):
    model = ffa.convert(net(make), r=R, target_modules=["base"], init="pissa")
    W = dequantized(model.base.base_layer).double()
    A = model.base.lora_A.double()
    torch.testing.assert_close(A @ A.t(), torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-6)
    top = torch.linalg.svdvals(W)[:R]
    torch.testing.assert_close((W @ A.t()).norm(dim=0), top, rtol=1e-5, atol=1e-6)


class NoFeatures(nn.Module):
    def forward(self, x):
        return x

    def dequantized(self):
        return torch.eye(4)


class Subclassed(nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(2, 2, 1), NoFeatures(), Subclassed(4, 4), nn.Bilinear(2, 2, 2)]
)
def test_other_layers_are_refused(layer):
    with pytest.raises(ConfigError, match=rf"base_layer is {type(layer).__name__}; accepted: tor"):
        ffa.FFAWrapped(layer, r=1)


def test_a_plain_linear_may_be_wrapped_too():
    linear = nn.Linear(6, 5)
    layer = ffa.FFAWrapped(linear, r=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 6)
    expected = linear(x) + 1.5 * x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ConfigError, match="r is 0; accepted"):
        ffa.FFAWrapped(nn.Linear(6, 5), r=0)


def test_quantised_activations_are_not_weight_only():
    layer = torchao(nn.Linear(D_IN, D_OUT), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ConfigError, match=r"base_layer is Linear; accepted: .*weight-only"):
        ffa.FFAWrapped(layer, r=1)


def private(model):
    PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.zeros(2, D_IN)), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize("where", ["adapted", "frozen beside"])
def test_layers_that_mix_records_are_refused_by_the_engine(where):
    outliers = bitsandbytes_8bit(nn.Linear(D_IN, D_OUT), threshold=6.0)
    model = nn.Sequential(outliers if where == "adapted" else nn.Linear(D_IN, D_OUT))
    ffa.convert(model, r=2, target_modules=["0"])
    if where == "frozen beside":
        model.append(outliers.requires_grad_(False))
    with pytest.raises(PrivacyError, match=r"\(Linear8bitLt\) has llm_int8_threshold 6: a column"):
        private(model)
    outliers.state.threshold = 0.0
    private(model)


def test_outliers_of_one_record_do_change_another():
    # Why: the columns are chosen over all rows of the batch.
    functional = pytest.importorskip("bitsandbytes.functional")
    calm, loud = torch.randn(1, D_IN).half() / 8, torch.zeros(1, D_IN).half()
    loud[0, 3] = 60.0
    alone, _, columns = functional.int8_vectorwise_quant(calm, threshold=6.0)
    assert columns is None or columns.numel() == 0
    beside, _, columns = functional.int8_vectorwise_quant(torch.cat([calm, loud]), threshold=6.0)
    assert columns.tolist() == [3] and alone[0, 3] != 0 and beside[0, 3] == 0


def test_a_scale_for_the_whole_batch_mixes_records():
    quantization = pytest.importorskip("torchao.quantization")
    rows = torchao(nn.Linear(D_IN, D_OUT), "Int8DynamicActivationInt8WeightConfig")
    assert mixes_records(rows) is None
    try:
        whole = torchao(
            nn.Linear(D_IN, D_OUT),
            "Int8DynamicActivationInt8WeightConfig",
            granularity=quantization.PerTensor(),
        )
    except (AssertionError, TypeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"torchao makes none: {error}")
    assert "one scale for the whole batch" in mixes_records(whole)


def test_a_weight_that_was_repacked_for_inference_is_unpacked_and_stays_differentiable():
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = bitsandbytes_4bit(nn.Linear(D_IN, D_OUT), compress_statistics=False)
    before = dequantized(layer)
    # As its eval forward does on a CPU with AVX512-BF16.
    packed, state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    layer.weight.data, layer.weight.quant_state = packed, state
    layer.support_avx512bf16_for_cpu = True
    # Its statistics are bf16 from then on.
    torch.testing.assert_close(dequantized(layer).float(), before, rtol=2.0**-7, atol=0)
    wrapped = ffa.FFAWrapped(layer, r=2)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    with torch.no_grad():
        wrapped.eval()(inputs())
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x = inputs().requires_grad_()
    wrapped.train()(x).sum().backward()
    expected = torch.ones(D_OUT, dtype=torch.float64) @ dequantized(layer).double()
    assert close(x.grad, expected.expand_as(x.grad), torch.tensor(float(D_OUT)))
