"""Losses for which a record's gradient is its own, and the stock one for which it is not."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError
from ffa_kernels.losses import causal_lm_loss, sequence_classification_loss

pytestmark = pytest.mark.usefixtures("one_thread")

N, T, VOCABULARY = 3, 7, 11


def logits_and_labels(dtype=torch.float64, ignored=True):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, T, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (N, T), generator=generator)
    if ignored:
        labels[1, 4:] = -100
        labels[2, :3] = -100
    return logits, labels


def by_hand(logits, labels):
    """Each record's losses, token by token, from the definition."""
    rows = []
    for i in range(N):
        row = []
        for t in range(T - 1):
            if labels[i, t + 1] != -100:
                row.append(-math.log(logits[i, t].softmax(-1)[labels[i, t + 1]]))
        rows.append(row)
    return rows


def test_the_loss_is_its_definition():
    logits, labels = logits_and_labels()
    rows = by_hand(logits, labels)
    assert [len(row) for row in rows] == [6, 3, 4]
    means = torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)
    sums = torch.tensor([sum(row) for row in rows], dtype=torch.float64)
    close = {"rtol": 1e-13, "atol": 0.0}
    torch.testing.assert_close(causal_lm_loss(logits, labels, reduction="none"), means, **close)
    torch.testing.assert_close(causal_lm_loss(logits, labels), means.mean(), **close)
    torch.testing.assert_close(
        causal_lm_loss(logits, labels, reduction="sum"), means.sum(), **close
    )
    summed = causal_lm_loss(logits, labels, per_record="sum", divisor=20.0, reduction="none")
    torch.testing.assert_close(summed, sums / 20, **close)
    other = labels.masked_fill(labels == -100, 5)
    torch.testing.assert_close(
        causal_lm_loss(logits, other, ignore_index=5, reduction="none"),
        causal_lm_loss(logits, other.masked_fill(other == 5, -100), reduction="none"),
        **close,
    )


def test_as_transformers_where_every_record_predicts_as_much():
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = logits_and_labels(torch.float32, ignored=False)
    stock = ForCausalLMLoss(logits, labels, VOCABULARY)
    torch.testing.assert_close(causal_lm_loss(logits, labels), stock)
    logits, labels = logits_and_labels(torch.float32)
    assert abs(causal_lm_loss(logits, labels) - ForCausalLMLoss(logits, labels, VOCABULARY)) > 1e-3


def test_sixteen_bit_logits_are_reckoned_in_fp32():
    logits, labels = logits_and_labels(torch.bfloat16)
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, causal_lm_loss(logits.float(), labels), rtol=0, atol=0)


def test_a_record_that_predicts_nothing_has_no_loss_and_no_gradient():
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    labels[1] = -100
    losses = causal_lm_loss(logits, labels, reduction="none")
    assert losses[1] == 0 and losses[0] > 0
    losses.sum().backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any()
    assert logits.grad.isfinite().all()


# The record-coupling bug.


def record_gradients(loss_of, labels):
    """The engine's gradient of each record of a small Llama: (parameter, record) to a tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )
    ffa.convert(model, r=2, target_modules=["q_proj", "o_proj"])
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    tokens = torch.arange(N * T).reshape(N, T) % VOCABULARY
    model, _, loader = ffa.PrivacyEngine().make_private(
        module=model.train(),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(tokens, labels), batch_size=N),
        noise_multiplier=0.0,
        max_grad_norm=math.inf,
        poisson_sampling=False,
    )
    for batch in loader:
        loss_of(model, *batch).backward()
        return [p.grad_sample.clone() for p in model.parameters() if p.requires_grad]
    raise AssertionError("the loader has no batch")


def stock_loss(model, tokens, labels):
    return model(input_ids=tokens, labels=labels).loss


def our_loss(model, tokens, labels):
    return causal_lm_loss(model(input_ids=tokens).logits, labels)


def test_the_stock_loss_couples_records_and_ours_does_not():
    """One record's labels change: another's gradient moves under transformers' loss, not ours."""
    labels = torch.arange(N * T).reshape(N, T) % VOCABULARY
    padded = labels.clone()
    padded[2, 3:] = -100
    # Predicted tokens: 18 of the batch before, 14 after.
    moved = zip(
        record_gradients(stock_loss, labels), record_gradients(stock_loss, padded), strict=True
    )
    for before, after in moved:
        assert (before[0] != 0).any()
        torch.testing.assert_close(after[:2], before[:2] * (18 / 14))
    ours = zip(record_gradients(our_loss, labels), record_gradients(our_loss, padded), strict=True)
    for before, after in ours:
        assert (before[0] != 0).any()
        assert torch.equal(after[:2], before[:2])
        assert (after[2] != before[2]).any()


@pytest.mark.parametrize("per_record", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_way_of_reducing_couples_records(per_record, reduction):
    gradients = []
    for cut in (T, 3):
        logits, labels = logits_and_labels()
        logits.requires_grad_()
        labels[2, cut:] = -100
        causal_lm_loss(logits, labels, per_record=per_record, reduction=reduction).backward()
        gradients.append(logits.grad)
    assert torch.equal(gradients[0][:2], gradients[1][:2])
    assert (gradients[0][2] != gradients[1][2]).any()


# Sequence classification.


@pytest.mark.parametrize(
    ("classes", "labels", "problem_type"),
    [
        (4, torch.tensor([0, 3, 1]), "single_label_classification"),
        (
            4,
            torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
            "multi_label_classification",
        ),
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (2, torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]]), "regression"),
    ],
)
def test_classification_is_transformers_loss_for_each_record(classes, labels, problem_type):
    from transformers import PreTrainedConfig
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    logits = torch.randn(N, classes, generator=torch.Generator().manual_seed(0))
    config = PreTrainedConfig(num_labels=classes, problem_type=problem_type)
    stock = ForSequenceClassificationLoss(labels, logits, config)
    loss = sequence_classification_loss(logits, labels, problem_type=problem_type)
    torch.testing.assert_close(loss, stock)
    if (classes, problem_type) != (2, "regression"):
        assert sequence_classification_loss(logits, labels) == loss
    losses = sequence_classification_loss(
        logits, labels, problem_type=problem_type, reduction="none"
    )
    assert losses.shape == (N,)
    for i in range(N):
        alone = sequence_classification_loss(
            logits[i : i + 1], labels[i : i + 1], problem_type=problem_type
        )
        torch.testing.assert_close(losses[i], alone)


# Refusals.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_record": "token"}, "per_record is 'token'; accepted: mean, sum"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; accepted: mean, sum, none"),
        ({"per_record": "sum", "divisor": 0.0}, "divisor is 0.0; accepted: a fixed positive"),
        ({"per_record": "sum", "divisor": torch.tensor(3)}, "divisor is tensor"),
        ({"divisor": 2.0}, 'divisor is 2.0; accepted: with per_record="sum" only'),
        ({"logits": torch.zeros(N * T, VOCABULARY)}, r"logits are torch.float32 \(21, 11\)"),
        ({"labels": torch.zeros(N, T - 1, dtype=torch.int64)}, r"labels are .*accepted.*\(3, 7\)"),
        ({"labels": torch.zeros(N, T)}, "labels are torch.float32"),
    ],
)
def test_bad_arguments_of_the_causal_loss_are_named(changed, message):
    logits, labels = logits_and_labels()
    arguments = {"logits": logits, "labels": labels, **changed}
    with pytest.raises(ConfigError, match=message):
        causal_lm_loss(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"problem_type": "ranking"}, "problem_type is 'ranking'; accepted: None, regression"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"logits": torch.zeros(N, T, 4)}, r"logits are torch.float32 \(3, 7, 4\)"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, r"labels are torch.int64 \(4,\)"),
        ({"problem_type": "regression"}, r"accepted for regression.*\(3, 4\)"),
    ],
)
def test_bad_arguments_of_the_classification_loss_are_named(changed, message):
    arguments = {"logits": torch.zeros(N, 4), "labels": torch.zeros(N, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=message):
        sequence_classification_loss(**{**arguments, **changed})
