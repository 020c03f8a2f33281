"""PEFT's models in, PEFT's files out: what is kept, what is refused, and every bit both ways."""

import contextlib
import copy
import json
import os
import pickle
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.adapter import Adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

TOKENS = torch.arange(24).view(4, 6) % 20
TARGETS = ["query", "value", "attention.output.dense"]
# A layer of its own rank, one of its own alpha.
PATTERNS = {
    "rank_pattern": {"layer.1.attention.self.value": 2},
    "alpha_pattern": {"layer.0.attention.self.query": 20},
}


def bert(seed=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed=3):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=2, n_positions=8)
    return GPT2LMHeadModel(config).eval()


def randomise(model):
    """As after some training: every B, and whatever else is trained."""
    generator = torch.Generator().manual_seed(9)
    for name, p in model.named_parameters():
        if p.requires_grad or "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def with_lora(model, **options):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options}
    return get_peft_model(model, LoraConfig(**settings)).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def assert_as_close_as(ours, theirs, model):
    """ours and theirs are two roundings of what `model` gives in fp64."""
    reference = logits(copy.deepcopy(model).double())
    error = (theirs.double() - reference).abs().max()
    assert (ours.double() - reference).abs().max() <= 2 * error + 1e-7


MODELS = {
    "plain": (bert, {}),
    "patterns": (bert, PATTERNS),
    "rslora": (bert, {"use_rslora": True}),
    "head": (bert, {"modules_to_save": ["classifier"]}),
    "sequence": (bert, {"task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "mlp.c_fc"]}),
    "regex": (bert, {"target_modules": r".*layer\.1\.attention.*\.(query|key)"}),
    "layers": (bert, {"target_modules": ["query"], "layers_to_transform": [1]}),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, options = MODELS[request.param]
    return make, options


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_taking_over_keeps_logits_settings_and_names(case):
    make, options = case
    model = with_lora(make(), **options)
    before, names = logits(model), list(model.state_dict())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    scaling = [layer.scaling["default"] for layer in layers]
    trained_by_peft = trained(model)
    assert ffa.convert(model) is model
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == names
    assert layers and all(isinstance(layer, Adapter) for layer in layers)
    assert [layer.adapter_scaling() for layer in layers] == scaling
    assert trained(model) == {n for n in trained_by_peft if "lora_A" not in n}

    plain = randomise(with_lora(make(), **options))
    model.load_state_dict(plain.state_dict())
    expected = logits(plain)
    assert not torch.equal(expected, before)
    assert_as_close_as(logits(model), expected, plain)


def test_only_B_and_the_saved_head_move():
    model = ffa.convert(with_lora(bert(), modules_to_save=["classifier"], lora_dropout=0.1)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(TOKENS).logits.square().sum().backward()
        optimizer.step()
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == trained(model) and len(moved) == 2 * len(TARGETS) + 2


def lora_bias(model):
    model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_bias["default"] = True


def two_adapters(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))


def none_active(model):
    model.base_model.set_adapter([])


@pytest.mark.parametrize(
    "options, spoil, reason",
    [
        ({"use_dora": True}, None, "is DoRA or another variant"),
        ({}, two_adapters, "holds the adapters default, second, active default; accepted: one"),
        ({}, none_active, "holds the adapters default, active none; accepted: one, active"),
        ({"lora_bias": True}, None, "lora_bias"),
        ({}, lora_bias, "has lora_bias, which is trained beside B"),
        ({"bias": "lora_only"}, None, "trains its base layer.*accepted: bias='none'"),
        ({"bias": "all"}, None, "trains its base layer.*accepted: bias='none'"),
        ({}, lambda m: m.merge_adapter(), r"is merged; accepted: unmerge_adapter\(\) first"),
        ({"target_modules": ["word_embeddings"]}, None, "is Embedding; accepted: Linear"),
        ({"target_modules": ["word_embeddings", "query"]}, None, "is Embedding; accepted: Linear"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_the_reason(options, spoil, reason):
    model = with_lora(bert(), **options)
    if spoil is not None:
        spoil(model)
    classes = [type(m) for m in model.modules()]
    grads = trained(model)
    with pytest.raises(ConfigError, match=r"PEFT's layer 'base_model\.model\..*" + reason):
        ffa.convert(model)
    assert [type(m) for m in model.modules()] == classes and trained(model) == grads


def test_a_peft_model_keeps_its_own_settings():
    with pytest.raises(ConfigError, match="convert\\(model\\) with no other argument"):
        ffa.convert(with_lora(bert()), r=2)
    model = ffa.convert(with_lora(bert()))
    with pytest.raises(ConfigError, match="already converted"):
        ffa.convert(model, target_modules=["key"])


def test_peft_of_both_factors_is_refused_when_called_with_adapter_names():
    model = ffa.convert(with_lora(bert()))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(ConfigError, match="adapter_names"):
        layer(torch.zeros(2, 3, 12), adapter_names=["default", "default"])


def test_pefts_own_methods_still_work(tmp_path):
    base = logits(bert())
    model = randomise(ffa.convert(with_lora(bert())))
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    assert_as_close_as(logits(model), adapted, model)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(bert(), tmp_path / "theirs").eval()
    assert_as_close_as(logits(back), adapted, back)
    lora = {n: v for n, v in model.state_dict().items() if "lora_" in n}
    assert lora and all(torch.equal(v, back.state_dict()[n]) for n, v in lora.items())
    merged = copy.deepcopy(model).merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, Adapter)]
    assert_as_close_as(logits(merged), adapted, back)
    merged = ffa.merge(copy.deepcopy(model))
    assert_as_close_as(logits(merged), adapted, back)


class SharedWeight(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, tokens):
        return SimpleNamespace(logits=self.b(self.a(tokens.float() / 20).tanh()))


def replicated_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=20, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


REPLICATED = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "make,options",
    [
        (SharedWeight, {"target_modules": ["a", "b"]}),
        (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
        (replicated_llama, REPLICATED),
    ],
    ids=["two layers", "tied head", "layer_replication"],
)
def test_merge_leaves_a_weight_that_others_share(make, options):
    model = randomise(ffa.convert(with_lora(make(), **options)))
    adapted, training = logits(model), model.training
    plain = ffa.merge(model)
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-4, atol=1e-4)
    assert not trained(plain) and plain.training == training


def test_merge_adds_once_what_peft_has_merged_already():
    model = randomise(ffa.convert(with_lora(bert())))
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(ffa.merge(model)), adapted, rtol=1e-4, atol=1e-5)


def test_replicated_layers_are_not_saved_for_a_model_without_them(tmp_path):
    model = ffa.convert(with_lora(replicated_llama(), **REPLICATED))
    with pytest.raises(ConfigError, match=r"layer_replication .*; accepted: model.save_pretrained"):
        ffa.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_share_nothing(clone):
    model = randomise(ffa.convert(with_lora(bert(), modules_to_save=["classifier"])))
    other = clone(model)
    expected = logits(model)
    assert torch.equal(logits(other), expected) and trained(other) == trained(model)
    assert sum(isinstance(m, Adapter) for m in other.modules()) == 2 * len(TARGETS)
    randomise(other)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, Adapter)).trained_B().zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)


def files(folder):
    return {name: value for name, value in load_file(folder / "adapter_model.safetensors").items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


def test_our_file_of_a_taken_over_model_is_pefts_own(case, tmp_path):
    make, options = case
    model = with_lora(make(), **options)
    model = randomise(ffa.convert(model))
    model.save_pretrained(tmp_path / "theirs")
    ffa.save_adapter(model, tmp_path / "ours")
    assert_same_bits(files(tmp_path / "ours"), files(tmp_path / "theirs"))
    for back in (
        PeftModel.from_pretrained(make(), tmp_path / "ours").eval(),
        ffa.load_adapter(make(), tmp_path / "theirs"),
        ffa.load_adapter(make(), tmp_path / "ours"),
        ffa.load_adapter(ffa.convert(with_lora(make(), **options)), tmp_path / "ours"),
    ):
        assert_as_close_as(logits(back), logits(model), model)
        ffa_layers = [m for m in back.modules() if hasattr(m, "lora_A")]
        assert len(ffa_layers) == len([m for m in model.modules() if isinstance(m, Adapter)])
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    same = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out")
    assert {key: config[key] for key in same} == {key: theirs[key] for key in same}
    assert config["task_type"] == theirs["task_type"]
    # Of the names that a task asks for, those that the model has.
    assert set(config["modules_to_save"] or []) <= set(theirs["modules_to_save"] or [])


OURS = {
    "bert": (bert, {"target_modules": TARGETS, "modules_to_save": ["classifier"]}),
    "rslora": (bert, {"target_modules": ["query"], "rslora": True, "alpha": 5.5}),
    "one-layer": (bert, {"target_modules": ["layer.1.attention.self.query"], "dropout": 0.25}),
    # Ends in "output.dense", as a layer that is not adapted does.
    "suffix": (bert, {"target_modules": ["0.output.dense"], "modules_to_save": ["pooler"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    # lm_head and wte are one parameter.
    "tied": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("which", OURS)
def test_our_models_go_out_to_peft_and_come_back(which, tmp_path):
    make, options = OURS[which]
    model = randomise(ffa.convert(make(), r=4, **options).eval())
    ffa.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_as_close_as(logits(theirs), logits(model), theirs)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Adapter)}
    loaded = {
        n.removeprefix("base_model.model."): m
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    assert loaded.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(loaded[name].lora_A["default"].weight, layer.lora_A)
        assert torch.equal(loaded[name].lora_B["default"].weight, layer.lora_B)
        assert loaded[name].scaling["default"] == layer.scaling
    theirs.save_pretrained(tmp_path / "again")
    assert_same_bits(files(tmp_path / "again"), files(tmp_path))
    back = ffa.load_adapter(make(), tmp_path).eval()
    assert torch.equal(logits(back), logits(model))
    assert trained(back) == trained(model)
    other = ffa.convert(make(), r=4, **options, seed=5).eval()
    ffa.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_peft_files_with_patterns_keep_them_through_us(tmp_path):
    peft_model = randomise(with_lora(bert(), **PATTERNS))
    peft_model.save_pretrained(tmp_path / "in")
    model = ffa.load_adapter(bert(), tmp_path / "in")
    ranks = {n: m.r for n, m in model.named_modules() if isinstance(m, Adapter)}
    assert sorted(ranks.values()) == [2, 4, 4, 4, 4, 4]
    ffa.save_adapter(model, tmp_path / "out")
    assert_same_bits(files(tmp_path / "out"), files(tmp_path / "in"))
    again = PeftModel.from_pretrained(bert(), tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(peft_model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_files_bits_survive_other_types(dtype, tmp_path):
    ffa.save_adapter(
        randomise(ffa.convert(bert().to(dtype), r=2, target_modules=["query"])), tmp_path / "a"
    )
    assert {v.dtype for v in files(tmp_path / "a").values()} == {dtype}
    model = ffa.load_adapter(bert(), tmp_path / "a")
    ffa.save_adapter(model, tmp_path / "b")
    for name, value in files(tmp_path / "b").items():
        assert torch.equal(value.double(), files(tmp_path / "a")[name].double())


def test_values_that_the_model_would_round_are_refused(tmp_path):
    ffa.save_adapter(randomise(ffa.convert(bert(), r=2, target_modules=["query"])), tmp_path)
    model = ffa.convert(bert().bfloat16(), r=2, target_modules=["query"])
    with pytest.raises(ConfigError, match=r"is torch\.float32, which the model's torch\.bfloat16"):
        ffa.load_adapter(model, tmp_path)
    plain = ffa.load_adapter(bert().bfloat16(), tmp_path)
    ffa.save_adapter(plain, tmp_path / "again")
    assert_same_bits(files(tmp_path / "again"), files(tmp_path))


def edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = files(folder)
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def as_several(folder):
    (folder / "first").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "first" / name)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
CLASSIFIER = "base_model.model.classifier"
DAMAGE = [
    (as_several, "has no adapter_config.json, but the adapters first inside"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "holds list; accepted: an object"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    (cut, "adapter_model.safetensors is damaged or cut short"),
    (edit_config(peft_type="IA3"), "has peft_type 'IA3'; accepted: 'LORA'"),
    (edit_config(use_dora=True), "has use_dora True, which is more than"),
    (edit_config(lora_bias=True), "has lora_bias True"),
    (edit_config(bias="all"), "has bias 'all'; accepted: 'none'"),
    (edit_config(trainable_token_indices=[1]), r"has trainable_token_indices \[1\]"),
    (edit_config(something_new={"a": 1}), "has something_new"),
    (edit_config(init_lora_weights="pissa"), "'pissa', which rewrites the base"),
    (edit_config(r=0), "r is 0; accepted"),
    (edit_config(r=5), r"lora_A .* is \(4, 12\), but adapter_config.json gives the rank 5"),
    (edit_config(lora_alpha="x"), "alpha is 'x'"),
    (edit_config(rank_pattern=[1]), "has rank_pattern"),
    (edit_config(target_modules="(query"), "has target_modules '\\(query', no regular"),
    (edit_config(target_modules=[*TARGETS, "key"]), "self.key.* are missing, which target_modules"),
    (edit_config(modules_to_save=["classifier", "pooler"]), "pooler.dense.bias, .* is missing"),
    (edit_config(modules_to_save=None), "'classifier.(weight|bias)' is neither LoRA's nor"),
    (edit_tensors(lambda t: t.pop(f"{QUERY}.lora_B.weight")), "lora_B of layer .* is missing"),
    (
        edit_tensors(lambda t: [t.pop(f"{QUERY}.lora_{p}.weight") for p in "AB"]),
        r"layer\.0\.attention\.self\.query( are missing|; accepted)",
    ),
    (
        edit_tensors(lambda t: t.update({f"{QUERY}.lora_B.weight": torch.zeros(13, 4)})),
        r"lora_B \(13, 4\); accepted by the model: \(.*12\) and \(12, ",
    ),
    (
        edit_tensors(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 11)})),
        r"lora_A \(4, 11\)",
    ),
    (
        edit_tensors(lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.zeros(4)})),
        "no DoRA, no embedding",
    ),
    (
        edit_tensors(lambda t: t.update({"query.lora_A.weight": torch.zeros(4, 12)})),
        "accepted: names that begin base_model.model.",
    ),
    (edit_tensors(lambda t: t.pop(f"{CLASSIFIER}.bias")), "classifier.bias is missing"),
    (
        edit_tensors(lambda t: t.update({f"{CLASSIFIER}.weight": torch.zeros(2, 12)})),
        r"'classifier.weight' is \(2, 12\); accepted by the model: \(3, 12\)",
    ),
    (
        edit_tensors(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 12).int()})),
        "torch.int32 .*accepted: float types",
    ),
    (
        edit_tensors(
            lambda t: [
                t.update({k.replace("layer.0", "layer.7"): v.clone()})
                for k, v in list(t.items())
                if k.startswith(QUERY)
            ]
        ),
        "layer.7.attention.self.query",
    ),
]


def saved_bert(folder):
    model = ffa.convert(
        bert(), r=4, alpha=6, target_modules=TARGETS, modules_to_save=["classifier"]
    )
    ffa.save_adapter(randomise(model), folder)


@pytest.mark.parametrize("kind", ["plain", "converted", "taken over"])
def test_files_that_do_not_fit_are_refused_and_change_nothing(kind, tmp_path):
    saved_bert(tmp_path / "whole")
    if kind == "taken over":
        model = ffa.convert(with_lora(bert(), modules_to_save=["classifier"]))
    else:
        model = bert()
        if kind == "converted":
            options = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
            ffa.convert(model, r=4, alpha=6, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = trained(model)
    for k, (damage, message) in enumerate(DAMAGE):
        folder = tmp_path / str(k)
        folder.mkdir()
        for path in (tmp_path / "whole").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        damage(folder)
        if kind != "plain" and "is neither LoRA's" in message:
            continue  # The model itself says that it trains the head.
        with pytest.raises(ConfigError) as caught:
            ffa.load_adapter(model, folder)
        assert re.search(message, str(caught.value)), (k, caught.value)
        assert_same_bits(model.state_dict(), before)
        assert trained(model) == grads
    ffa.load_adapter(model, tmp_path / "whole")
    assert any(value.any() for n, value in model.state_dict().items() if "lora_B" in n)


def test_models_that_do_not_fit_are_refused(tmp_path):
    saved_bert(tmp_path)
    options = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
    for model, message in [
        (with_lora(bert()), "holds PEFT's own LoRA layers; accepted: a plain model, or convert"),
        (gpt2(), "is in the file and not in the model"),
        (ffa.convert(bert(), r=4, alpha=6, target_modules=["query"]), "no adapted layer"),
        (ffa.convert(bert(), r=3, alpha=6, **options), r"accepted by the model: \(3, 12\)"),
        (ffa.convert(bert(), r=4, alpha=7, **options), "is scaled by 1.5; accepted .* 1.75"),
        (
            ffa.convert(
                bert(), 4, 6, target_modules=TARGETS, modules_to_save=["classifier", "pooler"]
            ),
            "pooler.dense.bias, bert.pooler.dense.weight is missing",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            ffa.load_adapter(model, tmp_path)


def test_models_that_cannot_be_saved_write_nothing(tmp_path):
    def parameter_of_the_model(model):
        model.extra = nn.Parameter(torch.zeros(3))

    def norm_around_an_adapter(model):
        model.bert.encoder.register_parameter("extra", nn.Parameter(torch.zeros(3)))

    for spoil, message in [
        (None, "has no adapted layer; accepted: a model that convert"),
        (parameter_of_the_model, "trains extra, which PEFT's LoRA files cannot hold"),
        (norm_around_an_adapter, "would keep module 'bert.encoder' whole, but parts of it"),
    ]:
        model = bert()
        if spoil is not None:
            ffa.convert(model, r=2, target_modules=["query"])
            spoil(model)
        with pytest.raises(ConfigError, match=message):
            ffa.save_adapter(model, tmp_path / "none")
    with pytest.raises(ConfigError, match="holds PEFT's own LoRA layers"):
        ffa.save_adapter(with_lora(bert()), tmp_path / "none")
    with pytest.raises(ConfigError, match="is itself an adapted layer"):
        ffa.save_adapter(ffa.FFALinear(4, 4, 2), tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Crash(BaseException):
    pass


@pytest.mark.parametrize("change", ["values", "settings"])
def test_a_crash_leaves_one_adapter_or_none_never_a_mixture(change, tmp_path, monkeypatch):
    new = randomise(
        ffa.convert(bert(5), r=4 if change == "values" else 2, target_modules=["query"])
    )
    steps = 0
    for crash_at in range(40):
        folder = tmp_path / str(crash_at)
        ffa.save_adapter(ffa.convert(bert(), r=4, target_modules=["query"]), folder)
        (folder / "README.md").write_text("kept")
        old = [(folder / name).read_bytes() for name in sorted(os.listdir(folder))]
        calls = 0

        def crashing(real, crash_at=crash_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > crash_at:
                    raise Crash
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, crashing(getattr(os, name)))
            ffa.save_adapter(new, folder)
        steps = max(steps, calls)
        now = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        now = [now[name] for name in sorted(now) if not name.startswith(".")]
        if now != old:
            if not (folder / "adapter_config.json").exists():
                with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
                    ffa.load_adapter(bert(), folder)
            else:
                back = ffa.load_adapter(bert(5), folder)
                assert torch.equal(logits(back), logits(new))
        if calls <= crash_at:
            break
    assert steps >= 6 and now != old and (folder / "README.md").read_text() == "kept"


def test_a_model_inside_compile_is_saved_under_its_own_names(tmp_path):
    model = ffa.convert(bert(), r=2, target_modules=["query"])
    ffa.save_adapter(model, tmp_path / "a")
    ffa.save_adapter(torch.compile(model), tmp_path / "b")
    assert_same_bits(files(tmp_path / "a"), files(tmp_path / "b"))


def test_a_file_of_pefts_that_holds_more_than_lora_is_refused(tmp_path):
    dora = with_lora(bert(), use_dora=True)
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ConfigError, match="has use_dora True"):
        ffa.load_adapter(bert(), tmp_path / "dora")
    several = with_lora(bert())
    two_adapters(several)
    several.save_pretrained(tmp_path / "several", selected_adapters=["second"])
    with pytest.raises(ConfigError, match="but the adapters second inside"):
        ffa.load_adapter(bert(), tmp_path / "several")
    ia3 = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    get_peft_model(bert(), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="has peft_type 'IA3'"):
        ffa.load_adapter(bert(), tmp_path / "ia3")


def test_an_adapter_added_after_convert_is_not_left_out_in_silence():
    model = ffa.convert(with_lora(bert()))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("second")
    with pytest.raises(ConfigError, match=r"active adapters are \['second'\]; accepted"):
        logits(model)
    model.set_adapter("default")
    assert logits(model).isfinite().all()


class OneUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.query = nn.Linear(6, 6)
        self.key = self.query

    def forward(self, tokens):
        x = tokens.float() / 20
        return SimpleNamespace(logits=self.query(x) + self.key(x.sin()))


class SharedBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.encoder = self.decoder = block

    def forward(self, tokens):
        return SimpleNamespace(logits=self.decoder(self.encoder(tokens).logits * 20).logits)


def test_a_layer_of_two_names_is_not_saved_for_peft_to_adapt_one(tmp_path):
    model = ffa.convert(OneUnderTwoNames(), r=2, target_modules=["query"])
    with pytest.raises(ConfigError, match=r"'query' and 'key' are one adapted layer, .* the first"):
        ffa.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_file_that_adapts_one_of_two_names_needs_the_plain_layer_under_the_other(tmp_path):
    theirs = randomise(with_lora(OneUnderTwoNames(), target_modules=["query"]))
    theirs.save_pretrained(tmp_path / "theirs")
    plain = OneUnderTwoNames()
    for model in (plain, ffa.convert(OneUnderTwoNames(), r=4, alpha=6, target_modules=["key"])):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match=r"'query' and 'key' are one layer .* leaves 'key'"):
            ffa.load_adapter(model, tmp_path / "theirs")
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in after)
    # Taken over, PEFT's model has the plain layer there, and its file is the same.
    model = ffa.convert(with_lora(OneUnderTwoNames(), target_modules=["query"]))
    ffa.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs))
    ffa.save_adapter(model, tmp_path / "ours")
    back = PeftModel.from_pretrained(OneUnderTwoNames(), tmp_path / "ours")
    assert torch.equal(logits(back), logits(theirs))


def test_a_block_of_two_names_is_adapted_under_both_by_peft_too(tmp_path):
    def make():
        block = OneUnderTwoNames()
        block.key = nn.Linear(6, 6)
        return SharedBlock(block)

    model = randomise(ffa.convert(make(), r=2, target_modules=["query"]))
    ffa.save_adapter(model, tmp_path)
    for back in (PeftModel.from_pretrained(make(), tmp_path), ffa.load_adapter(make(), tmp_path)):
        torch.testing.assert_close(logits(back), logits(model))
