"""Losses for which a record's gradient is its own, and the stock one for which it is not."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError
from ffa_kernels.losses import (
    causal_lm_loss,
    chunked_causal_lm_loss,
    sequence_classification_loss,
)

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


WIDTH = 5


def head_and_labels(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, T, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    labels = logits_and_labels()[1]
    labels[2] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def each_record(loss, hidden, upstream):
    """(n,) losses and dL/dhidden, where record i's loss counts upstream[i] times."""
    hidden = hidden.detach().clone().requires_grad_()
    losses = loss(hidden)
    (losses * upstream).sum().backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_record": "sum", "divisor": 20.0}])
# One token at a time, chunks that end inside a record and not at the batch's end, all at once.
@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCABULARY + 3, 1 << 20])
def test_chunks_give_the_losses_and_gradients_of_the_whole(chunk_elements, options, with_bias):
    hidden, weight, bias, labels = head_and_labels(torch.float64)
    bias = bias if with_bias else None
    upstream = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)

    def whole(h):
        logits = torch.nn.functional.linear(h, weight, bias)
        return causal_lm_loss(logits, labels, reduction="none", **options)

    def chunked(h):
        return chunked_causal_lm_loss(
            h, weight, labels, head_bias=bias, chunk_elements=chunk_elements, reduction="none",
            **options,
        )  # fmt: skip

    expected, expected_grad = each_record(whole, hidden, upstream)
    losses, grad = each_record(chunked, hidden, upstream)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-14)
    assert (losses[:2] > 0).all() and losses[2] == 0 and (grad[2] == 0).all()
    for reduction, of in (("mean", losses.mean()), ("sum", losses.sum())):
        made = chunked_causal_lm_loss(
            hidden, weight, labels, head_bias=bias, reduction=reduction, **options
        )
        torch.testing.assert_close(made, of, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_err_no_more_than_the_whole(dtype):
    hidden, weight, _, labels = head_and_labels(dtype)
    upstream = torch.ones(N)

    def errors(loss):
        got, got_grad = each_record(loss, hidden, upstream)
        return [(a.double() - b).abs().max() for a, b in ((got, exact), (got_grad, exact_grad))]

    exact, exact_grad = each_record(
        lambda h: causal_lm_loss(h @ weight.double().t(), labels, reduction="none"),
        hidden.double(),
        upstream.double(),
    )
    of_whole = errors(lambda h: causal_lm_loss(h @ weight.t(), labels, reduction="none"))
    of_chunks = errors(
        lambda h: chunked_causal_lm_loss(h, weight, labels, chunk_elements=40, reduction="none")
    )
    # The order of sums differs, and with it the last bit of either: of the largest value here.
    last_bits = [torch.finfo(dtype).eps * t.abs().max() for t in (exact, exact_grad)]
    for chunks, whole, bit in zip(of_chunks, of_whole, last_bits, strict=True):
        assert chunks <= whole + bit


def test_chunks_hold_no_more_logits_than_they_are_told():
    hidden, weight, _, labels = head_and_labels(torch.float64)
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.shape[-1:] == (VOCABULARY,):
                    # Not the head, transposed.
                    seen.extend([t.numel()] * (t.data_ptr() != weight.data_ptr()))
            return out

    hidden.requires_grad_()
    with Sizes():
        chunked_causal_lm_loss(hidden, weight, labels, chunk_elements=3 * VOCABULARY).backward()
    assert max(seen) == 3 * VOCABULARY


def test_chunks_refuse_a_head_that_is_trained_and_what_does_not_fit():
    hidden, weight, bias, labels = head_and_labels(torch.float32)
    for name, arguments in (
        ("head_weight is trained", {"head_weight": weight.clone().requires_grad_()}),
        ("head_bias is trained", {"head_bias": bias.clone().requires_grad_()}),
        ("head_weight is torch.float64", {"head_weight": weight.double()}),
        ("head_weight is torch.float32", {"head_weight": weight.t()}),
        ("head_bias is torch.float32", {"head_bias": bias[1:]}),
        ("hidden is", {"hidden": hidden[0]}),
        ("labels are", {"labels": labels[:, 1:]}),
        ("chunk_elements is 0", {"chunk_elements": 0}),
        ("divisor is 2.0", {"divisor": 2.0}),
        ("reduction is 'max'", {"reduction": "max"}),
    ):
        given = {"hidden": hidden, "head_weight": weight, "labels": labels, **arguments}
        with pytest.raises(ConfigError, match=name):
            chunked_causal_lm_loss(given.pop("hidden"), given.pop("head_weight"),
                                   given.pop("labels"), **given)  # fmt: skip
