"""Messages: what goes in comes out, bytes are counted on the message, and a stranger is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors
from torch import Tensor, nn

from ffa_kernels.errors import WireError
from ffa_kernels.federated.codecs import CODECS
from ffa_kernels.federated.wire import (
    PROTOCOL,
    Header,
    decode,
    encode,
    fingerprint,
    is_adapter,
    measure,
    trained_tensors,
)
from ffa_kernels.nn import convert
from ffa_kernels.privacy.keys import SecretStream

HEADER = Header("update", run="1f", round=3, site="north", base="b" * 64, recipe="a" * 64)
TENSORS = {
    "layer.0.query.lora_B": torch.arange(24, dtype=torch.float32).reshape(8, 3) / 7,
    "layer.0.value.lora_B": torch.full((5, 3), -1e-30),
    "classifier.weight": torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),
    "classifier.bias": torch.zeros(2),
}


def metadata(**changes: str) -> dict[str, str]:
    values = {key: str(value) for key, value in vars(HEADER).items()}
    return {"protocol": PROTOCOL, **values, **changes}


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, payload) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, payload: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def test_a_message_gives_its_tensors_back_bit_for_bit() -> None:
    received = decode(encode(HEADER, TENSORS), HEADER, TENSORS)
    assert list(received) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(received[name], tensor) and received[name].dtype == torch.float32
        received[name].add_(1.0)  # its own memory, and writable


def test_a_message_is_a_plain_safetensors_file() -> None:
    loaded = safetensors.load(encode(HEADER, TENSORS))
    assert {name: t.tolist() for name, t in loaded.items()} == {
        name: t.tolist() for name, t in TENSORS.items()
    }


def test_tensors_that_are_views_of_one_another_are_sent_whole() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {"a.lora_B": base.t(), "b.lora_B": base[:, :2]}
    received = decode(encode(HEADER, views), HEADER, views)
    assert torch.equal(received["a.lora_B"], base.t())
    assert torch.equal(received["b.lora_B"], base[:, :2])


def test_bytes_are_counted_apart_and_add_up_to_the_message() -> None:
    data = encode(HEADER, TENSORS)
    size = measure(data)
    assert size.adapter == 4 * (24 + 15) and size.head == 4 * (16 + 2)
    assert size.total == len(data) and size.header == len(data) - len(parts(data)[1])
    assert (size + size).total == 2 * len(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "global"),
        ("run", "20"),
        ("round", 4),
        ("site", "south"),
        ("base", "c" * 64),
        ("recipe", "c" * 64),
    ],
)
def test_each_field_of_the_header_must_match(field: str, value: Any) -> None:
    data = encode(replace(HEADER, **{field: value}), TENSORS)
    with pytest.raises(WireError, match=rf"^{field}: got '{value}', expected"):
        decode(data, HEADER, TENSORS)


@pytest.mark.parametrize("value", ["ffa-kernels/2", None])
def test_another_protocol_or_none(value: str | None) -> None:
    values = metadata()
    del values["protocol"]
    if value is not None:
        values["protocol"] = value
    with pytest.raises(WireError, match="protocol"):
        decode(safetensors.save(TENSORS, metadata=values), HEADER, TENSORS)
    with pytest.raises(WireError, match="protocol"):
        decode(safetensors.save(TENSORS), HEADER, TENSORS)


def test_an_extra_header_entry_is_refused() -> None:
    data = safetensors.save(TENSORS, metadata=metadata(loss="0.3"))
    with pytest.raises(WireError, match="unknown entry 'loss'"):
        decode(data, HEADER, TENSORS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra.lora_B": torch.zeros(1)}, "unknown 'extra.lora_B'"),
        ({"classifier.bias": None}, "classifier.bias is missing"),
        ({"classifier.bias": torch.zeros(3)}, "classifier.bias: got shape"),
        ({"classifier.bias": torch.zeros(2, 1)}, "classifier.bias: got shape"),
        ({"classifier.bias": torch.zeros(2, dtype=torch.float64)}, "classifier.bias: got dtype"),
        ({"classifier.bias": torch.tensor([0.0, torch.nan])}, "classifier.bias: holds NaN"),
        ({"classifier.bias": torch.tensor([torch.inf, 0.0])}, "classifier.bias: holds NaN or inf"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor | None], named: str) -> None:
    tensors = {name: t for name, t in {**TENSORS, **change}.items() if t is not None}
    data = safetensors.save(tensors, metadata=metadata())
    with pytest.raises(WireError, match=named):
        decode(data, HEADER, TENSORS)


def test_nothing_that_is_not_finite_is_sent() -> None:
    with pytest.raises(WireError, match=r"classifier\.bias"):
        encode(HEADER, {"classifier.bias": torch.tensor([torch.nan])})
    with pytest.raises(WireError, match=r"classifier\.bias"):  # overflows when stored
        encode(HEADER, {"classifier.bias": torch.tensor([1e300], dtype=torch.float64)})


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(WireError, match="codec"):
        encode(replace(HEADER, codec="fp8"), TENSORS)


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(WireError, match=r"^size"):
        decode(encode(HEADER, TENSORS) + bytes(1 << 20), HEADER, TENSORS)
    with pytest.raises(WireError, match=r"^size"):
        decode(bytes(1 << 20), HEADER, TENSORS)


def test_bytes_hidden_between_or_after_the_tensors_are_refused() -> None:
    header, payload = parts(encode(HEADER, TENSORS))
    with pytest.raises(WireError, match="safetensors"):
        decode(joined(header, payload + b"hidden"), HEADER, TENSORS)


def test_a_key_that_is_given_twice_is_refused() -> None:
    header, payload = parts(encode(HEADER, TENSORS))
    raw = json.dumps(header).encode()
    twice = b'{"__metadata__":{},' + raw[1:]
    with pytest.raises(WireError, match="JSON"):
        decode(joined(twice, payload), HEADER, TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"\xff" * 64,
        joined(b"[" * 2000 + b"]" * 2000, b""),
        joined(b"[]", b""),
        joined(b'{"a": 1}', b""),
        joined(b'{"__metadata__": 3}', b""),
        joined(b"{\xff}", b""),
    ],
)
def test_what_is_no_message_at_all(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data, HEADER, TENSORS)
    with pytest.raises(WireError):
        measure(data)


def test_every_truncation_is_refused() -> None:
    data = encode(HEADER, TENSORS)
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:length], HEADER, TENSORS)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_header_byte_is_refused_or_changes_nothing(draw: st.DataObject) -> None:
    data = bytearray(encode(HEADER, TENSORS))
    end = len(data) - sum(4 * t.numel() for t in TENSORS.values())
    data[draw.draw(st.integers(0, end - 1))] = draw.draw(st.integers(0, 255))
    try:
        received = decode(bytes(data), HEADER, TENSORS)
    except WireError:
        return
    for name, tensor in TENSORS.items():
        assert torch.equal(received[name], tensor)


def test_a_hostile_value_cannot_break_a_log_line() -> None:
    data = safetensors.save(TENSORS, metadata=metadata(site="x\n\x1b[31m" + "y" * 500))
    with pytest.raises(WireError) as caught:
        decode(data, HEADER, TENSORS)
    message = str(caught.value)
    assert message.isprintable() and message.isascii() and len(message) < 200


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    return convert(model, r=2, target_modules=["0"], modules_to_save=["2"])


def test_what_is_trained_is_b_and_the_head() -> None:
    names = set(trained_tensors(small_model()))
    assert names == {"0.lora_B", "2.weight", "2.bias"}
    assert [name for name in sorted(names) if is_adapter(name)] == ["0.lora_B"]


def test_the_fingerprint_is_of_what_is_frozen_and_of_all_of_it() -> None:
    model = small_model()
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == first
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter.add_(1.0)
    assert fingerprint(model) == first
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-6
        now = fingerprint(other)
        assert (now.recipe != first.recipe) == (name == "0.lora_A"), name
        assert (now.base != first.base) == (name != "0.lora_A"), name


def test_the_fingerprint_knows_names_shapes_and_dtypes() -> None:
    class Holder(nn.Module):
        def __init__(self, name: str, tensor: Tensor) -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    zeros = torch.zeros(2, 3)
    models = [
        Holder("a", zeros),
        Holder("b", zeros),
        Holder("a", zeros.t().contiguous()),
        Holder("a", zeros.to(torch.int32)),
        Holder("a", zeros.to(torch.bfloat16)),
    ]
    assert len({fingerprint(model).base for model in models}) == len(models)


# Codecs.


def coded(codec: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    header = replace(HEADER, codec=codec)
    data = encode(header, tensors)
    assert measure(data).total == len(data)
    return decode(data, header, tensors), len(data)


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_keeps_values_as_well_as_it_can(codec: str) -> None:
    tensors = {
        **TENSORS,
        "zeros.lora_B": torch.zeros(6, 2),
        "large.lora_B": torch.tensor([[3e38, -1e-40], [-3e38, 1e-40]]),
        "one.lora_A": torch.randn(1, 40, generator=torch.Generator().manual_seed(1)),
        "empty.lora_B": torch.zeros(0, 3),
    }
    received, _ = coded(codec, tensors)
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        found = received[name]
        assert found.dtype == torch.float32 and found.shape == tensor.shape
        if codec == "fp32" or (codec == "int8" and tensor.dim() == 1):
            assert torch.equal(found, tensor)
        elif codec == "bf16":
            assert torch.equal(found, tensor.bfloat16().float())
        elif tensor.numel():
            axis = 1 if tensor.shape[0] < tensor.shape[1] else 0
            step = tensor.abs().amax(dim=axis, keepdim=True) / 127
            assert ((found - tensor).abs() <= step * (1 + 1e-5)).all()
            assert not (found.bool() & ~step.bool()).any()


def test_int8_rounds_at_random_and_keeps_the_mean() -> None:
    column = torch.linspace(-1, 1, 2001)[:, None]
    rounds = torch.stack([coded("int8", {"a.lora_B": column})[0]["a.lora_B"] for _ in range(400)])
    assert not torch.equal(rounds[0], rounds[1])
    error = rounds.mean(dim=0) - column
    # Of a step between two neighbours at most half in standard deviation, over 400 rounds.
    assert error.abs().max() < 5 * (1 / 127) * 0.5 / 20
    assert abs(float(error.mean())) < 5 * (1 / 127) * 0.5 / (20 * 2001**0.5)


def test_a_stream_of_ones_own_counts_on() -> None:
    header, stream = replace(HEADER, codec="int8"), SecretStream("rounding", seed=1)
    first = [safetensors.load(encode(header, TENSORS, stream)) for _ in range(2)]
    again = SecretStream("rounding", seed=1)
    name = "classifier.weight"
    assert not torch.equal(first[0][name], first[1][name])
    for held in first:
        assert torch.equal(safetensors.load(encode(header, TENSORS, again))[name], held[name])


def test_bytes_of_each_codec() -> None:
    B = {"a.lora_B": torch.randn(384, 8), "b.lora_B": torch.randn(1536, 8)}
    both = {**B, "a.lora_A": torch.randn(8, 384), "b.lora_A": torch.randn(8, 384)}

    def payload(codec: str, tensors: dict[str, Tensor]) -> int:
        return measure(encode(replace(HEADER, codec=codec), tensors)).adapter

    whole = payload("fp32", B)
    assert whole == 4 * 8 * (384 + 1536)
    assert payload("bf16", B) == whole // 2
    assert payload("int8", B) == whole // 4 + 2 * 8 * 4
    # Beside LoRA, which sends A as well.
    square = {"a.lora_B": B["a.lora_B"]}
    lora = payload("fp32", {**square, "a.lora_A": both["a.lora_A"]})
    assert payload("int8", square) <= 0.14 * lora


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_one_codec_is_not_taken_for_another(codec: str) -> None:
    data = encode(replace(HEADER, codec=codec), TENSORS)
    with pytest.raises(WireError, match=f"codec: got '{codec}', expected 'fp32'"):
        decode(data, HEADER, TENSORS)
    header, payload = parts(encode(HEADER, TENSORS))
    header["__metadata__"]["codec"] = codec
    with pytest.raises(WireError, match=r"got dtype 'F32', expected|scale is missing"):
        decode(joined(header, payload), replace(HEADER, codec=codec), TENSORS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_scales_that_make_no_number_are_refused(bad: float) -> None:
    header = replace(HEADER, codec="int8")
    held = safetensors.load(encode(header, TENSORS))
    held["layer.0.query.lora_B.scale"][1] = bad
    data = safetensors.save(held, metadata=metadata(codec="int8"))
    with pytest.raises(WireError, match="holds NaN or infinity"):
        decode(data, header, TENSORS)
