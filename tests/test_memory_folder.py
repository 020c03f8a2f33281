"""Models to plan for, by a name and sizes, with neither weights nor a network."""

import re
from pathlib import Path

import pytest

from ffa_kernels.cli import main
from ffa_kernels.errors import ConfigError
from ffa_kernels.memory.folder import from_folder

pytest.importorskip("transformers")


def named(model):
    return from_folder(Path(model), 4, None, "float32")


def adapted_and_saved(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".")[-2] for name in trained if name.endswith(".lora_B")}
    return adapted, {name for name in trained if not name.endswith(".lora_B")}


@pytest.mark.parametrize(
    ("given", "cls", "adapted", "saved"),
    [
        (
            "llama:hidden_size=64,intermediate_size=96,num_hidden_layers=1,num_attention_heads=4,"
            "num_key_value_heads=2,vocab_size=100",
            "LlamaForCausalLM",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            set(),
        ),
        # An encoder, which also has a class for causal language models.
        (
            "bert:hidden_size=48,num_attention_heads=4,num_hidden_layers=1",
            "BertForSequenceClassification",
            {"query", "key", "value", "dense"},
            {"classifier.weight", "classifier.bias"},
        ),
        (
            "ViTForImageClassification:num_hidden_layers=1",
            "ViTForImageClassification",
            None,
            {"classifier.weight", "classifier.bias"},
        ),
    ],
)
def test_a_type_or_class_with_sizes(given, cls, adapted, saved):
    model = named(given)
    assert type(model).__name__ == cls and all(p.is_meta for p in model.parameters())
    found, heads = adapted_and_saved(model)
    assert heads == saved and (adapted is None or found == adapted)
    for size, value in re.findall(r"(\w+)=(\d+)", given):
        assert getattr(model.config, size) == int(value)
    assert all(p.shape[1] == 4 for n, p in model.named_parameters() if n.endswith(".lora_B"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("lama:hidden_size=3", "accepted: a local folder with a config.json, or .*mean llama"),
        ("no/such/folder", "accepted: a local folder with a config.json"),
        ("llama:hiden_size=64", "'hiden_size', which LlamaConfig does not have; .*hidden_size"),
        ("llama:hidden_size=x", "accepted: hidden_size= with a number"),
        ("bert:hidden_size=50", "BertForSequenceClassification does not accept its config"),
    ],
)
def test_names_that_name_nothing(given, says):
    with pytest.raises(ConfigError, match=f"MODEL.*{says}"):
        named(given)


def test_the_command_takes_a_name(capsys):
    sizes = "hidden_size=64,intermediate_size=96,num_hidden_layers=1,vocab_size=512"
    given = f"llama:{sizes},num_attention_heads=4,num_key_value_heads=2"
    arguments = ["--memory", "1GiB", "--batch-size", "4", "--tokens", "32"]
    assert main(["plan", given, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "max_physical_batch_size 4 (1 for a batch of 4)" in printed and "peak" in printed
