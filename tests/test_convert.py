"""convert() and merge(): what is trained, what stays, and models left whole by every refusal."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn import FFALinear


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.dense = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.query(x)) * self.value(x) + self.dense(x).mean()


class Model(nn.Module):
    """Tokens to logits, through two layers of attention's shape."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.layers = nn.ModuleList([Attention(width), Attention(width)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(dim=1))


TOKENS = torch.arange(24).view(4, 6) % 20


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def random_B(model: nn.Module) -> nn.Module:
    """As after some training."""
    for module in model.modules():
        if isinstance(module, ffa.FFALinear):
            nn.init.normal_(module.lora_B)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


ADAPTED = {f"layers.{i}.{name}.lora_B" for i in range(2) for name in ("query", "value")}


@pytest.mark.parametrize("init", ["orthogonal", "kaiming", "gaussian", "pissa"])
def test_convert_works_in_place_and_trains_B_and_what_is_saved(model, init):
    modules = dict(model.named_modules())
    weights = {name: p for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    logits = model(TOKENS)
    result = ffa.convert(
        model,
        r=4,
        alpha=6,
        target_modules=["query", "value"],
        init=init,
        modules_to_save=["classifier"],
    )
    assert result is model
    assert trained(model) == ADAPTED | {"classifier.weight", "classifier.bias"}
    assert {n for n, m in model.named_modules() if isinstance(m, ffa.FFALinear)} == {
        name.removesuffix(".lora_B") for name in ADAPTED
    }
    # Every tensor of before is still there: the same object under the same name.
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in weights.items())
    assert all(torch.equal(model.state_dict()[name], v) for name, v in values.items())
    assert set(now) - set(weights) == {
        name.replace("lora_B", part) for name in ADAPTED for part in ("lora_A", "lora_B")
    }
    assert model.classifier is modules["classifier"]
    assert model.layers[0].dense is modules["layers.0.dense"]
    layer = model.layers[0].query
    assert layer.r == 4 and layer.scaling == 1.5
    assert layer.lora_A.shape == (4, 12) and layer.lora_B.shape == (12, 4)
    assert layer.lora_A.any(dim=1).all() and not layer.lora_B.any()
    torch.testing.assert_close(model(TOKENS), logits, rtol=1e-6, atol=1e-7)


def test_only_B_and_what_is_saved_move_in_training(model):
    ffa.convert(model, r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(TOKENS).square().sum().backward()
        optimizer.step()
    moved = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert moved == trained(model)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


def test_A_follows_seed_and_name(model):
    first = ffa.convert(copy.deepcopy(model), r=4, target_modules=["query"], seed=3)
    again = ffa.convert(copy.deepcopy(model), r=4, target_modules=["query"], seed=3)
    other = ffa.convert(copy.deepcopy(model), r=4, target_modules=["query"], seed=4)
    A = [m.layers[0].query.lora_A for m in (first, again, other)]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])
    assert not torch.equal(A[0], first.layers[1].query.lora_A)


def test_names_match_as_suffixes_of_whole_parts(model):
    ffa.convert(model, r=2, target_modules=["layers.1.query", "dense"])
    adapted = {n for n, m in model.named_modules() if isinstance(m, ffa.FFALinear)}
    assert adapted == {"layers.1.query", "layers.0.dense", "layers.1.dense"}
    with pytest.raises(ConfigError, match="names 'uery'"):
        ffa.convert(Model(), r=2, target_modules=["uery"])


def test_mode_dtype_and_options_carry_over(model):
    model.double().eval()
    model.layers[1].train()
    ffa.convert(model, r=2, target_modules=["query"], dropout=0.25)
    assert [layer.query.training for layer in model.layers] == [False, True]
    assert model.layers[0].query.dropout == 0.25
    assert model.layers[0].query.lora_A.dtype == model.layers[0].query.lora_B.dtype == torch.float64
    assert model(TOKENS).dtype == torch.float64
    ffa.merge(model)
    assert [layer.query.training for layer in model.layers] == [False, True]


def test_a_layer_with_two_names_becomes_one_adapter_under_both(model):
    model.layers[1].query = model.layers[0].query
    model.alias = model.layers[0].value
    model.layers[0].value.requires_grad_(True)
    logits = model(TOKENS)
    ffa.convert(model, r=2, target_modules=["query", "alias"])
    assert isinstance(model.alias, ffa.FFALinear)
    assert model.layers[0].query is model.layers[1].query
    assert model.alias is model.layers[0].value
    torch.testing.assert_close(model(TOKENS), logits)
    adapted = random_B(model)(TOKENS)
    ffa.merge(model)
    assert type(model.alias) is nn.Linear and model.alias is model.layers[0].value
    assert model.layers[0].query is model.layers[1].query
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_gives_plain_layers_that_compute_the_same(model, dtype):
    model.to(dtype)
    names = set(model.state_dict())
    base = model.layers[0].query.weight.detach().clone()
    ffa.convert(model, r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = random_B(model)(TOKENS)
    layer = model.layers[0].query
    assert ffa.merge(model) is model
    assert set(model.state_dict()) == names
    assert type(model.layers[0].query) is type(model.layers[0].value) is nn.Linear
    assert model.layers[0].value.bias is None
    assert trained(model) == {"classifier.weight", "classifier.bias"}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(model(TOKENS), adapted, rtol=tolerance, atol=tolerance)
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(model.layers[0].query.weight, base + delta)
    # The adapter that was replaced keeps its own weight.
    assert torch.equal(layer.weight, base)
    ffa.convert(model, r=2, target_modules=["query"])
    assert trained(model) == {f"layers.{i}.query.lora_B" for i in range(2)}


def test_merge_refuses_what_holds_no_adapter(model):
    with pytest.raises(ConfigError, match="a module that holds adapted layers"):
        ffa.merge(model)
    with pytest.raises(ConfigError, match="a module that holds adapted layers"):
        ffa.merge(ffa.FFALinear(4, 4, r=2))


class Subclassed(nn.Linear):
    pass


def spoil(model: Model) -> None:
    """Makes the last layer one that cannot be adapted, after others that can."""
    model.layers[1].value = Subclassed(12, 12)


def narrow(model: Model) -> None:
    model.layers[1].query = nn.Linear(3, 12)


def tie(model: Model) -> None:
    model.layers[1].query.weight = nn.Parameter(model.embedding.weight[:12])
    model.head = nn.Linear(12, 12)
    model.head.weight = model.layers[1].query.weight


Q = ["query"]


@pytest.mark.parametrize(
    "prepare, options, message",
    [
        (None, {"target_modules": Q, "r": 0}, "r is 0; accepted: an integer of 1 or more"),
        (None, {"target_modules": Q, "r": -2}, "r is -2; accepted"),
        (None, {"target_modules": Q, "r": 2.0}, r"r is 2\.0; accepted"),
        (None, {"target_modules": Q, "r": True}, "r is True; accepted"),
        (None, {"target_modules": Q, "alpha": 0}, "alpha is 0; accepted: a positive number"),
        (None, {"target_modules": Q, "alpha": math.nan}, "alpha is nan; accepted"),
        (None, {"target_modules": Q, "alpha": "16"}, "alpha is '16'; accepted"),
        (None, {"target_modules": Q, "dropout": 1.0}, r"dropout is 1\.0; accepted"),
        (None, {"target_modules": Q, "dropout": -0.1}, r"dropout is -0\.1; accepted"),
        (None, {"target_modules": Q, "init": "xavier"}, "init is 'xavier'; accepted: kaiming, g"),
        (None, {"target_modules": []}, "target_modules is empty; accepted: at least one"),
        (None, {"target_modules": "query"}, "target_modules is 'query'; accepted: a list"),
        (None, {"target_modules": None}, "target_modules is None; accepted: a list"),
        (None, {"target_modules": [3]}, "target_modules names 3, which the model does not have"),
        (None, {"target_modules": ["qurey"]}, r"'qurey'.*did you mean query"),
        (None, {"target_modules": ["query", "valeu"]}, r"'valeu'.*did you mean value\?"),
        (None, {"target_modules": ["zzzz"]}, "'zzzz'.*accepted: 0, 1, classifier, dense"),
        (None, {"target_modules": Q, "modules_to_save": ["clasifier"]}, "mean classifier"),
        (None, {"target_modules": Q, "modules_to_save": "classifier"}, "modules_to_save is 'cl"),
        (None, {"target_modules": Q, "modules_to_save": Q}, "'layers.0.query' is named by target"),
        (None, {"target_modules": Q, "modules_to_save": ["layers"]}, "'layers.0.query' is named"),
        (None, {"target_modules": ["norm"]}, "'norm', which is LayerNorm; accepted: torch.nn.L"),
        (None, {"target_modules": ["layers"]}, "'layers', which is ModuleList; accepted"),
        (None, {"target_modules": [""]}, "names '', which is Model; accepted"),
        (spoil, {"target_modules": ["query", "value"]}, "'layers.1.value', which is Subclassed"),
        (narrow, {"target_modules": Q, "r": 4}, "4 orthonormal rows do not fit in 3 dimensions"),
        (narrow, {"target_modules": Q, "r": 4, "init": "pissa"}, "pissa has 3 singular vectors"),
        (tie, {"target_modules": Q, "modules_to_save": ["head"]}, "'layers.1.query' is named"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(model, prepare, options, message):
    if prepare is not None:
        prepare(model)
    model.embedding.weight.requires_grad_(False)
    model.layers[0].query.bias.requires_grad_(False)
    modules = dict(model.named_modules())
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        ffa.convert(model, **{"r": 2, **options})
    assert dict(model.named_modules()) == modules
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[n] is p and p.requires_grad == grad for n, (p, grad) in parameters.items())
    assert all(torch.equal(v, values[name]) for name, v in model.state_dict().items())


def test_an_already_converted_model_is_refused_unchanged(model):
    ffa.convert(model, r=2, target_modules=["query"])
    before = trained(model)
    with pytest.raises(ConfigError, match=r"already converted \(layer 'layers.0.query'\)"):
        ffa.convert(model, r=2, target_modules=["value"])
    assert trained(model) == before and type(model.layers[0].value) is nn.Linear


def test_a_bare_linear_is_no_model_to_convert():
    linear = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="names the model itself"):
        ffa.convert(linear, r=2, target_modules=[""])
    assert all(p.requires_grad for p in linear.parameters()) and not list(linear.children())


def test_state_dict_round_trip(model):
    ffa.convert(model, r=4, target_modules=["query", "value"], seed=1)
    logits = random_B(model)(TOKENS)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    # Another seed: A comes from the file too.
    other = ffa.convert(Model(), r=4, target_modules=["query", "value"], seed=2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(TOKENS), logits)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_share_nothing(model, clone):
    ffa.convert(model, r=4, target_modules=["query"], dropout=0.2)
    random_B(model)
    secret = torch.tensor([1, 2, 3, 4])
    model.layers[0].query._dropout_key = secret
    other = clone(model)
    assert trained(other) == trained(model)
    torch.manual_seed(0)
    expected = other.eval()(TOKENS)
    assert torch.equal(model.eval()(TOKENS), expected)
    # The key that hides dropout's masks goes into no file and no second model.
    assert not other.layers[0].query._dropout_key.any()
    assert torch.equal(model.layers[0].query._dropout_key, secret)
    with torch.no_grad():
        other.layers[0].query.lora_B.zero_()
    assert model.layers[0].query.lora_B.any()
    assert torch.equal(model(TOKENS), expected) and not torch.equal(other(TOKENS), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(model, dtype):
    ffa.convert(model, r=4, target_modules=["query", "value"], dropout=0.1)
    logits = random_B(model).eval()(TOKENS)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert trained(model) == ADAPTED
    rtol = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(model(TOKENS).float(), logits, rtol=rtol, atol=rtol)
    model.train()(TOKENS).sum().backward()
    assert model.layers[0].query.lora_B.grad.dtype == dtype


def test_from_linear_alone(model):
    linear = nn.Linear(6, 10).eval()
    x = torch.randn(3, 6)
    layer = ffa.FFALinear.from_linear(linear, r=2, alpha=5, seed=9, layer="name")
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and layer.scaling == 2.5
    assert trained(layer) == {"lora_B"}
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-7)
    nn.init.normal_(layer.lora_B)
    expected = linear(x) + 2.5 * x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected)
    plain = layer.merged_layer()
    assert type(plain) is nn.Linear and not plain.training
    torch.testing.assert_close(plain(x), expected)
    with pytest.raises(ConfigError, match=r"linear is Conv1d; accepted: torch\.nn\.Linear"):
        ffa.FFALinear.from_linear(nn.Conv1d(2, 2, 1))


def test_a_refused_from_linear_leaves_the_layer_as_it_was():
    linear = nn.Linear(3, 10)
    for options in ({"r": 4}, {"r": 4, "init": "pissa"}, {"r": 0}, {"dropout": 2}):
        with pytest.raises(ConfigError):
            ffa.FFALinear.from_linear(linear, **options)
        assert linear.weight.requires_grad and linear.bias.requires_grad


def test_constructor_makes_a_fresh_layer():
    layer = ffa.FFALinear(6, 10, 3, 6, bias=False, dtype=torch.float64, init="kaiming")
    assert layer.bias is None and layer.scaling == 2
    assert layer(torch.randn(2, 5, 6).double()).shape == (2, 5, 10)
    assert trained(layer) == {"lora_B"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert repr(layer) == (
        "FFALinear(in_features=6, out_features=10, r=3, alpha=6, scaling=2, init=kaiming, "
        "dropout=0)"
    )
    with pytest.raises(ConfigError, match="r is 0; accepted"):
        ffa.FFALinear(6, 10, 0)


def test_a_hugging_face_encoder_converts_trains_and_merges():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    tokens = torch.arange(18).view(3, 6)
    logits = model(tokens).logits
    ffa.convert(
        model, r=4, target_modules=["query", "value"], modules_to_save=["classifier"]
    ).train()
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-6)
    model(tokens, labels=torch.tensor([0, 1, 0])).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == trained(model) and len(grads) == 6
    adapted = random_B(model)(tokens).logits
    torch.testing.assert_close(ffa.merge(model)(tokens).logits, adapted, rtol=1e-4, atol=1e-4)


def by_peft(model, r, target_modules, base_dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=r, target_modules=target_modules)
    return ffa.convert(peft.get_peft_model(model, config), base_dtype=base_dtype)


@pytest.mark.parametrize("convert", [ffa.convert, by_peft])
@pytest.mark.parametrize("base_dtype", [None, "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_calls_its_adapters_in_evaluation_too(convert, base_dtype, padded):
    """It reads its layers' weights there, and never their forward, where it may."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    model = convert(model, r=2, target_modules=["linear1", "linear2"], base_dtype=base_dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    options = {"src_key_padding_mask": padding} if padded else {}
    trained = model.train()(x, **options)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            evaluated = model.eval()(x, **options)
        torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=1e-5, atol=1e-5)
    if base_dtype is None:
        merged = ffa.merge(model)(x, **options)
        torch.testing.assert_close(merged[~padding], trained[~padding], rtol=1e-5, atol=1e-5)


def test_hooks_on_an_adapted_layer_stay_and_can_be_removed():
    model, heard = nn.Sequential(nn.Linear(4, 3)), []
    handle = model[0].register_forward_hook(lambda *_: heard.append(1))
    ffa.convert(model, target_modules=["0"], r=2)
    model(torch.randn(2, 4))
    assert heard == [1]
    handle.remove()
    model(torch.randn(2, 4))
    assert heard == [1]


@pytest.mark.parametrize("convert", [ffa.convert, by_peft])
@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_a_single_row_is_taken_as_nn_linear_takes_it(convert, base_dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model = convert(model, r=2, target_modules=["0"], base_dtype=base_dtype)
    x = torch.randn(4, requires_grad=True)
    y = model(x)
    assert y.shape == (3,) and torch.equal(y, model(x.unsqueeze(0))[0])
    y.sum().backward()
    assert x.grad.shape == (4,)
    assert [p.grad is not None for p in model.parameters() if p.requires_grad] == [True]


def test_the_input_may_be_named_as_nn_linear_names_it():
    x = torch.randn(2, 4)
    for base_dtype in (None, "bf16"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        ffa.convert(model, target_modules=["0"], r=2, base_dtype=base_dtype)
        for layer in model:
            assert torch.equal(layer(input=x), layer(x))
            x = layer(x)
        x = torch.randn(2, 4)


def pruned(layer):
    from torch.nn.utils import prune

    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("spoil", [pruned, nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_made_anew_from_another_is_refused(spoil):
    model = nn.Sequential(spoil(nn.Linear(4, 3)))
    with pytest.raises(ConfigError, match=r"which is Linear; accepted: .* weight of its own"):
        ffa.convert(model, target_modules=["0"], r=2)
    with pytest.raises(ConfigError, match="a weight of its own"):
        FFALinear.from_linear(model[0], r=2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_a_linear_one():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ConfigError, match=r"linear is Doubled; accepted: torch.nn.Linear"):
        FFALinear.from_linear(Doubled(4, 3), r=2)


def hooked_by_accelerate(layer: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    hook = hooks.ModelHook()
    hook.post_forward = lambda module, output: 2 * output
    return hooks.add_hook_to_module(layer, hook)


def patched(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


def pruned_bias(layer: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(layer, "bias", 0.3)


def masked(layer: nn.Module) -> nn.Module:
    layer.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))
    layer.register_forward_hook(lambda module, x, y: y * module.mask)
    return layer


def scaled(layer: nn.Module) -> nn.Module:
    layer.gain = nn.Parameter(torch.full((3,), 2.0))
    layer.register_forward_hook(lambda module, x, y: y * module.gain)
    return layer


def followed(layer: nn.Module) -> nn.Module:
    layer.norm = nn.LayerNorm(3)
    layer.register_forward_hook(lambda module, x, y: module.norm(y))
    return layer


MORE = [hooked_by_accelerate, patched, pruned_bias, masked, scaled, followed]


@pytest.mark.parametrize("base_dtype", [None, "bf16"])
@pytest.mark.parametrize("spoil", MORE)
def test_a_layer_that_is_more_than_its_weights_is_refused_and_else_left_alone(
    spoil, base_dtype, tmp_path
):
    model = nn.Sequential(spoil(nn.Linear(4, 3)), nn.Linear(3, 3))
    x = torch.randn(2, 4)
    wanted = model(x)
    with pytest.raises(ConfigError, match=r"layer '0' has .*; accepted: a layer with"):
        ffa.convert(model, target_modules=["0"], r=2, base_dtype=base_dtype)
    with pytest.raises(ConfigError, match=r"linear has .*; accepted: a layer with"):
        FFALinear.from_linear(model[0], r=2)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    ffa.save_adapter(ffa.convert(plain, target_modules=["0"], r=2), tmp_path)
    with pytest.raises(ConfigError, match=r"layer '0' has .*; accepted: a layer with"):
        ffa.load_adapter(model, tmp_path)
    assert torch.equal(model(x), wanted) and all(p.requires_grad for p in model.parameters())
    ffa.convert(model, target_modules=["1"], r=2, base_dtype=base_dtype)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("spoil", MORE)
def test_a_base_of_pefts_that_is_more_than_its_weights_is_refused(spoil):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(spoil(nn.Linear(4, 3)))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"layer '.*0' has a base layer that has .*; accepted:"):
        ffa.convert(theirs)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), theirs.peft_config["default"])
    hooked_by_accelerate(theirs.base_model.model[0])
    with pytest.raises(ConfigError, match=r"layer '.*0' has a forward of its own"):
        ffa.convert(theirs)


@pytest.mark.parametrize("base_dtype", [None, "bf16", "int8"])
def test_what_was_set_on_a_layer_goes_on_to_the_one_in_its_place(base_dtype):
    model, states = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 3)), []
    for stage, layer in enumerate(model):
        # What a smaller layer calls so itself stays its own.
        layer.stage, layer.scale = stage, "ours"
        layer.register_forward_hook(lambda module, x, y: states.append(module.stage))
    ffa.convert(model, target_modules=["1"], r=2, base_dtype=base_dtype)
    assert model(torch.arange(5)).isfinite().all()
    assert states == [layer.stage for layer in model] == [0, 1, 2]


@pytest.mark.parametrize("seed", ["1", 1.0, True, None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=r"seed is .*; accepted: an integer"):
        ffa.convert(model, target_modules=["0"], r=2, seed=seed)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
