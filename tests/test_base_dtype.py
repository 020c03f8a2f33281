"""convert(base_dtype=...): the frozen base in bf16 or int8, what is trained as it was."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ffa_kernels as ffa
from ffa_kernels.backends import native
from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.frozen import FrozenEmbedding, FrozenLinear

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["bf16", "int8"]
# What a whole small model may differ by: bf16 has 8 bits, int8 127 steps of a row's largest.
CLOSE = {"bf16": 0.03, "int8": 0.05}
N, T, VOCABULARY = 6, 9, 50


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), ["query", "value", "intermediate.dense"]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), ["c_attn", "mlp.c_proj"]


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}
HEADS = {"bert": ["classifier"], "llama": [], "gpt2": []}


def tokens():
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (N, T))


def converted(name, base_dtype, **options):
    model, targets = MODELS[name]()
    options = {"r": 4, "alpha": 8, "modules_to_save": HEADS[name], **options}
    ffa.convert(model.train(), target_modules=targets, base_dtype=base_dtype, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in adapters(model):
            layer.trained_B().normal_(std=0.05)
    return model


def adapters(model):
    return [layer for layer in model.modules() if isinstance(layer, Adapter)]


def nbytes(parameters):
    return sum({id(p): p.nbytes for p in parameters}.values())


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def private(model, noise=0.0, C=1.0, **options):
    return ffa.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(TensorDataset(tokens()), batch_size=N),
        noise_multiplier=noise, max_grad_norm=C, poisson_sampling=False, **options,
    )  # fmt: skip


def loss_of(model, ids):
    logits = model(input_ids=ids).logits.float()
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, ids[:, 0] % 2)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def one_step(model, optimizer, loader):
    for (ids,) in loader:
        loss_of(model, ids).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_nearly_the_same(name, kind):
    wanted, found = (converted(name, k)(input_ids=tokens()).logits for k in (None, kind))
    assert 0 < relative(found, wanted) < CLOSE[kind]


@pytest.mark.parametrize("kind,part", [("bf16", 0.5), ("int8", 0.25)])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_takes_a_part_of_its_memory(name, kind, part):
    model, _ = MODELS[name]()
    before = nbytes(model.parameters())
    model = converted(name, kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    A = [layer.frozen_A() for layer in adapters(model)]
    own = {id(p) for p in (*trained, *A)}
    assert {p.dtype for p in (*trained, *A)} == {torch.float32}
    frozen = nbytes(p for p in model.parameters() if id(p) not in own)
    # Norms, biases and scales of rows weigh in models as small as these: one in 32 of a matrix.
    assert frozen <= before * (part + (1 / 32 + 0.02 if kind == "int8" else 0.02))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_stay_tied(name, kind):
    model = converted(name, kind)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, FrozenLinear) and isinstance(embedding, FrozenEmbedding)
    assert head.stored is embedding.stored and head.scale is embedding.scale


@pytest.fixture(params=[False, True], ids=["in floats", "with instructions for bf16"])
def own_rounding(request, monkeypatch):
    """Whether the CPU library's product rounds to bf16."""
    if request.param and not native.has_bf16_product():
        pytest.skip("no CPU library, or no bf16 on this machine")
    if not request.param:
        monkeypatch.setattr(native, "has_bf16_product", lambda: False)
    return request.param


def test_int8_rounds_each_row_to_its_own_steps(own_rounding):
    linear = nn.Linear(40, 7)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 3, 7).unsqueeze(1))
        linear.weight[3] = 0.0
    model = ffa.convert(nn.Sequential(linear, nn.Linear(7, 2)), 2, target_modules=["1"],
                        base_dtype="int8")  # fmt: skip
    made = model[0]
    assert isinstance(made, FrozenLinear) and made.stored.dtype == torch.int8
    steps = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    error = (made.dequantized() - linear.weight).abs()
    assert (error <= 0.5001 * steps).all() and (made.dequantized()[3] == 0).all()
    x = torch.randn(3, 5, 40, requires_grad=True)
    g = torch.randn(3, 5, 7)
    wanted = nn.functional.linear(x, made.dequantized(), linear.bias)
    own, theirs = (torch.autograd.grad(y, x, g)[0] for y in (made(x), wanted))
    if own_rounding:
        assert ((made(x) - wanted).abs() <= 0.01 * wanted.abs().amax((0, 1))).all()
        assert relative(own, theirs) < 0.01
    else:
        torch.testing.assert_close(made(x), wanted)
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_private_step_clips_what_each_record_gives_alone(name, kind, own_rounding):
    model, twin = converted(name, kind), converted(name, kind)
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    C, total = 0.02, {n: torch.zeros_like(p, dtype=torch.float64) for n, p in trained.items()}
    for ids in tokens().split(1):
        twin.zero_grad()
        loss_of(twin, ids).backward()
        norm = sum(p.grad.double().square().sum() for p in trained.values()).sqrt()
        for n, p in trained.items():
            total[n] += p.grad.double() * min(1.0, C / norm)
    before = {n: p.detach().clone() for n, p in trained.items()}
    one_step(*private(model, C=C))
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in found.items()])
    wanted = torch.cat([total[n].flatten() / N for n in found])
    # Products of bf16 numbers: what is in one batch and alone rounds apart before them.
    assert relative(moved, wanted) < (0.01 if kind == "bf16" or own_rounding else 1e-4)
    assert moved.norm() <= C * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_to_all_that_is_trained(kind):
    model = converted("bert", kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    one_step(*private(model, noise=100.0))
    for n, p in model.named_parameters():
        if n in before and p.numel() > 50:
            assert (p.detach() - before[n]).std() > 5.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_checkpointing_and_autocast(kind):
    grads = []
    for checkpointed in (False, True):
        model = converted("llama", kind)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        loss_of(model, tokens()).backward()
        grads.append(torch.cat([layer.trained_B().grad.flatten() for layer in adapters(model)]))
    assert torch.equal(*grads)
    model = converted("llama", kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, tokens())
    loss.backward()
    under = torch.cat([layer.trained_B().grad.flatten() for layer in adapters(model)])
    assert relative(under, grads[0]) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_activations_norms_and_what_is_trained_keep_their_dtype(kind):
    model = converted("bert", kind, modules_to_save=["classifier", "output.LayerNorm"])
    seen = set()
    for module in model.modules():
        module.register_forward_hook(
            lambda m, x, y: seen.update(t.dtype for t in (*x, y) if isinstance(t, torch.Tensor))
        )
    one_step(*private(model))
    assert seen <= {torch.float32, torch.int64, torch.bool}
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert model.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts(kind):
    model = converted("bert", kind)
    wanted = model(input_ids=tokens()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), converted("bert", kind)):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(input_ids=tokens()).logits, wanted)
    total = sum(p.nbytes for p in model.parameters())
    assert sum(p.nbytes for p in copy.deepcopy(model).parameters()) == total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_merging_and_saving(name, kind, tmp_path):
    model = converted(name, kind)
    wanted = model(input_ids=tokens()).logits
    ffa.save_adapter(model, tmp_path)
    ffa.merge(model)
    assert not adapters(model)
    assert relative(model(input_ids=tokens()).logits, wanted) < CLOSE[kind]
    theirs = PeftModel.from_pretrained(MODELS[name]()[0].train(), tmp_path)
    assert relative(theirs(input_ids=tokens()).logits, wanted) < CLOSE[kind]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("by_peft", [False, True], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_of_its_own_classes_and_loads_as_they_do(name, kind, by_peft, tmp_path):
    model, targets = MODELS[name]()
    classes = {n: type(m) for n, m in model.named_modules()}
    like = {n: (v.shape, v.dtype) for n, v in model.state_dict().items()}
    inner = get_peft_model(model, LoraConfig(target_modules=targets)) if by_peft else model
    options = {} if by_peft else {"r": 4, "target_modules": targets}
    ffa.convert(inner.eval(), base_dtype=kind, **options)
    wanted = model(input_ids=tokens()).logits
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, *_: seen.append(type(m)))
    ffa.merge(inner)
    assert relative(model(input_ids=tokens()).logits, wanted) < CLOSE[kind]
    assert seen == [nn.Embedding]
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: (v.shape, v.dtype) for n, v in model.state_dict().items()} == like
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    fresh = MODELS[name]()[0]
    assert model.get_input_embeddings().padding_idx == fresh.get_input_embeddings().padding_idx
    model.save_pretrained(tmp_path)
    back, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert torch.equal(back.eval()(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_are_one_again_after_a_merge(name, kind):
    model = converted(name, kind)
    ffa.merge(model)
    weight = model.get_input_embeddings().weight
    assert type(weight) is nn.Parameter and model.get_output_embeddings().weight is weight
    assert not weight.requires_grad


def masked_bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    return BertForMaskedLM(config), ["query"]


TIED = {
    "llama": (llama, []),
    "an adapted head": (llama, ["lm_head"]),
    "gpt2": (gpt2, []),
    "bert": (masked_bert, []),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TIED)
def test_a_model_of_tied_weights_is_saved_and_loaded(name, kind, tmp_path):
    make, more = TIED[name]

    def smaller(seed):
        model, targets = make()
        return ffa.convert(
            model.eval(), 4, target_modules=[*targets, *more], seed=seed, base_dtype=kind
        )

    model = smaller(0)
    known = {n for n in model.all_tied_weights_keys if n.endswith((".stored", ".scale"))}
    assert len(known) == (1 if kind == "bf16" else 2)
    wanted = model(input_ids=tokens()).logits
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert known.isdisjoint(tensors) and not any(n.endswith("like") for n in tensors)
    other = copy.deepcopy(smaller(1))
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert known <= set(missing) and not unexpected
    assert torch.equal(other(input_ids=tokens()).logits, wanted)
    ffa.merge(model)
    assert model.all_tied_weights_keys == make()[0].all_tied_weights_keys
    model.save_pretrained(tmp_path)


def distilbert(seed=0):
    torch.manual_seed(seed)
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    return DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_module_that_peft_keeps_beside_a_head_goes_by_its_own_name(kind, tmp_path):
    options = {"r": 2, "target_modules": ["q_lin"], "modules_to_save": ["classifier"]}

    def smaller():
        return ffa.convert(distilbert(), base_dtype=kind, **options)

    model = smaller()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    wanted = model(input_ids=tokens()).logits
    ffa.save_adapter(model, tmp_path / "ours")
    # PEFT's modules_to_save takes any module whose name ends so.
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    kept = tensors["base_model.model.pre_classifier.weight"]
    assert torch.equal(kept, model.pre_classifier.dequantized())
    assert not any("stored" in n or "scale" in n for n in tensors)
    for back in (
        PeftModel.from_pretrained(distilbert(), tmp_path / "ours"),
        ffa.load_adapter(distilbert(), tmp_path / "ours"),
    ):
        assert relative(back(input_ids=tokens()).logits, wanted) < CLOSE[kind]
    # Of a base that was not rounded, as well.
    ffa.save_adapter(ffa.convert(distilbert(), **options), tmp_path / "wide")
    for folder in ("wide", "ours"):
        back = ffa.load_adapter(smaller(), tmp_path / folder)
        assert torch.equal(back.pre_classifier.stored, model.pre_classifier.stored)
    assert torch.equal(back(input_ids=tokens()).logits, wanted)
    ffa.save_adapter(ffa.convert(distilbert(seed=1), **options), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"'pre_classifier.weight' is not what .*; accepted:"):
        ffa.load_adapter(back, tmp_path / "other")
    assert torch.equal(back(input_ids=tokens()).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model(kind):
    base, targets = bert()
    settings = LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
    theirs = get_peft_model(base, settings)
    wanted = theirs(input_ids=tokens()).logits
    model = ffa.convert(theirs, base_dtype=kind).train()
    assert 0 < relative(model(input_ids=tokens()).logits, wanted) < CLOSE[kind]
    layer = adapters(model)[0]
    assert isinstance(layer.base_layer, FrozenLinear)
    assert layer.frozen_A().dtype == layer.trained_B().dtype == torch.float32
    before = layer.trained_B().detach().clone()
    one_step(*private(model))
    assert not torch.equal(layer.trained_B(), before)
    wanted = model.eval()(input_ids=tokens()).logits
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=tokens()).logits, wanted)
    ffa.merge(model)
    assert relative(model(input_ids=tokens()).logits, wanted) < CLOSE[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_cast_afterwards_works(kind, dtype):
    model = converted("bert", kind, modules_to_save=[]).to(dtype)
    logits = model(input_ids=tokens()).logits
    assert logits.dtype == dtype
    wanted = converted("bert", kind, modules_to_save=[])(input_ids=tokens()).logits
    assert relative(logits, wanted) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_takes_the_activations_that_its_int8_base_takes(dtype):
    model = ffa.convert(nn.Sequential(nn.Linear(24, 16)), 4, target_modules=["0"],
                        base_dtype="int8")  # fmt: skip
    x = torch.randn(3, 24)
    narrow = x.to(dtype).requires_grad_()
    y = model(narrow)
    y.sum().backward()
    assert y.dtype == narrow.grad.dtype == dtype
    assert relative(y, model(x)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_the_hooks_that_were_there(kind):
    model, targets = llama()
    model.enable_input_require_grads()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda m, x: seen.append(type(m)))
    ffa.convert(model, 4, target_modules=targets, base_dtype=kind)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    loss_of(model, tokens()).backward()
    assert adapters(model)[0].trained_B().grad is not None and seen == [FrozenLinear]


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_the_weight_finds_it_in_floats(kind):
    embedding, linear = nn.Embedding(20, 8), nn.Linear(8, 8)
    model = ffa.convert(nn.Sequential(embedding, linear, nn.Linear(8, 2)), 2,
                        target_modules=["2"], base_dtype=kind)  # fmt: skip
    for made, old in zip(model, (embedding, linear), strict=False):
        assert made.weight.dtype == torch.float32
        assert relative(made.weight, old.weight) < 0.01
    assert torch.equal(model[0](torch.arange(20)), model[0].weight)


def test_small_weights_in_half_precision_do_not_vanish_in_int8():
    linear = nn.Linear(16, 4).half()
    with torch.no_grad():
        linear.weight.mul_(1e-5)
    model = ffa.convert(nn.Sequential(linear, nn.Linear(4, 2)), 2, target_modules=["1"],
                        base_dtype="int8")  # fmt: skip
    assert relative(model[0].dequantized(), linear.weight) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_compiles(kind):
    model = converted("llama", kind)
    wanted = model(input_ids=tokens()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(input_ids=tokens()).logits, wanted) < 1e-2


@pytest.mark.parametrize("value", ["fp8", 8, torch.bfloat16, ""])
def test_other_values_are_refused(value):
    model, targets = bert()
    with pytest.raises(ConfigError, match=r"base_dtype is .*accepted: 'bf16', 'int8', or None"):
        ffa.convert(model, target_modules=targets, base_dtype=value)
    assert not adapters(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_conversion_changes_nothing(kind):
    model, targets = bert()
    before = {n: (p, p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    with pytest.raises(ConfigError):
        ffa.convert(model, target_modules=[*targets, "LayerNorm"], base_dtype=kind)
    after = {n: (p, p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    assert {n: (id(p), *rest) for n, (p, *rest) in before.items()} == {
        n: (id(p), *rest) for n, (p, *rest) in after.items()
    }
    assert not any(isinstance(m, FrozenLinear) for m in model.modules())


def test_what_shares_a_weight_with_something_trained_stays():
    model, targets = llama()
    ffa.convert(model, 4, target_modules=targets, modules_to_save=["lm_head"], base_dtype="int8")
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def frozen_bf16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 3))
    ffa.convert(model, target_modules=["1"], base_dtype="bf16")
    assert isinstance(model[0], FrozenLinear)
    return model[0]


def test_a_frozen_product_is_in_the_graph_that_a_tracer_makes():
    frozen, x = frozen_bf16(), torch.randn(5, 40)
    expected = frozen(x)
    traced = make_fx(lambda x: frozen(x))(x)
    torch.testing.assert_close(traced(x), expected, rtol=0.02, atol=0.02)
    other = torch.randn(5, 40)
    torch.testing.assert_close(traced(other), frozen(other), rtol=0.02, atol=0.02)
    with FlopCounterMode(display=False) as counter:
        frozen(x)
    assert counter.get_total_flops() == 2 * 5 * 40 * 70


def test_a_parameter_is_multiplied_as_any_tensor_is():
    frozen, x = frozen_bf16(), torch.randn(5, 40)
    assert torch.equal(frozen(nn.Parameter(x)), frozen(x))
