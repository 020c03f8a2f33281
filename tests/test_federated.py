"""The federation: sites, server and driver, with a small transformers model made on the spot."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor

from ffa_kernels.errors import ConfigError, FederationError, FFAError, PrivacyError, WireError
from ffa_kernels.federated import driver, rounds, wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config, parse, site_of
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.server import Rules, Server, Share
from ffa_kernels.federated.site import Site, copy_sharing_frozen
from ffa_kernels.federated.wire import Fingerprint, Header
from ffa_kernels.nn import FFALinear
from ffa_kernels.privacy import Ledger, epsilon

GOOD = ("fine", "great", "lovely", "superb")
BAD = ("awful", "bad", "dull", "poor")
FILLER = ("film", "phone", "plot", "the", "very", "was")
PRINTS = Fingerprint("b" * 64, "a" * 64)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


def make_tiny_bert(folder: Path) -> Path:
    """A random two-layer BERT in `folder`, with a vocabulary of single words."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose label is told by three words among filler; no text twice."""
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < count:
        label = rng.randrange(2)
        words = [rng.choice(FILLER) for _ in range(4)]
        for _ in range(3):
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
        rows[" ".join(words)] = label
    return [{"text": text, "label": label} for text, label in rows.items()]


@pytest.fixture
def document(tiny_bert: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration of three sites, of one size so that their noise is solved for but once."""
    for k, name in enumerate(("east", "north", "south")):
        lines = [json.dumps(row) + "\n" for row in sentences(100, seed=k)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:80]))
        (tmp_path / f"{name}-test.jsonl").write_text("".join(lines[80:]))
    return {
        "federation": {"rounds": 2, "local_steps": 2, "eval_records_per_site": 10},
        "model": {"kind": str(tiny_bert), "r": 4, "max_length": 16},
        "privacy": {"target_epsilon": 8.0, "target_delta": 1e-3, "accountant": "rdp"},
        "train": {"batch_size": 16, "optimizer": "sgd", "lr": 0.1},
        "data": {"source": "files"},
        "site": [
            {"name": name, "train": f"{name}.jsonl", "test": f"{name}-test.jsonl"}
            for name in ("south", "east", "north")
        ],
    }


def settled(document: dict[str, Any], folder: Path, **changes: dict[str, Any]) -> Config:
    merged = {**document}
    for table, values in changes.items():
        merged[table] = {**document[table], **values}
    return parse(merged, folder)


@pytest.fixture
def config(document: dict[str, Any], tmp_path: Path) -> Config:
    return settled(document, tmp_path)


def test_a_model_that_does_not_leave_padding_out_is_refused(document, tmp_path):
    """A longer record beside it would change what another one's gradient is."""
    from transformers import BertTokenizerFast, FNetConfig, FNetForSequenceClassification

    folder = make_tiny_bert(tmp_path)
    BertTokenizerFast(
        vocab=str(folder / "vocab.txt"), model_input_names=["input_ids", "token_type_ids"]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    fnet = FNetConfig(
        vocab_size=5 + len((*GOOD, *BAD, *FILLER)),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    FNetForSequenceClassification(fnet).save_pretrained(folder)
    model = {**document["model"], "kind": str(folder)}
    with pytest.raises(ConfigError, match=r"\[model\] kind.*when a longer one stands beside it"):
        build(settled(document, tmp_path, model=model))


class Bench:
    """One site and a server that speaks with it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.model, self.tokenizer = build(config)
        self.records = driver.load_records(config)
        self.server = Server(wire.trained_tensors(self.model), wire.fingerprint(self.model), "5e")

    def site(self, name: str = "north", run: str = "5e", records: Records | None = None) -> Site:
        train = self.records[name][0] if records is None else records
        return Site(
            *(name, train, self.model, self.tokenizer, self.config, run),
            folder=self.folder / name,
        )


@pytest.fixture
def bench(config: Config, tmp_path: Path) -> Bench:
    return Bench(config, tmp_path / "sites")


def update(
    values: dict[str, Tensor], site: str, round_: int = 1, prints: Fingerprint = PRINTS
) -> bytes:
    return wire.encode(Header("update", "5e", round_, site, prints.base, prints.recipe), values)


@pytest.fixture
def server() -> Server:
    start = {"l.lora_B": torch.zeros(4, 2), "head.bias": torch.ones(3)}
    return Server(start, PRINTS, "5e")


def filled(value: float) -> dict[str, Tensor]:
    return {"l.lora_B": torch.full((4, 2), value), "head.bias": torch.full((3,), value)}


SITES = ["a", "b", "c"]


def test_the_average_is_equal_and_in_fp64(server: Server) -> None:
    values = {"a": 1e8, "b": 1.0, "c": -1e8}  # in fp32, 1e8 + 1 - 1e8 is 0
    outcome = server.aggregate(1, SITES, [(s, update(filled(v), s)) for s, v in values.items()])
    assert outcome.averaged and not outcome.refused
    for tensor in server.tensors.values():
        assert torch.equal(tensor, torch.full_like(tensor, 1 / 3))


def test_weights_count_over_the_sites_that_answered(server: Server) -> None:
    weighted = Server(server.tensors, PRINTS, "5e", Rules(weights={"a": 1.0, "b": 5.0, "c": 3.0}))
    weighted.aggregate(1, SITES, [(s, update(filled(v), s)) for s, v in (("a", 4.0), ("c", 8.0))])
    assert torch.equal(weighted.tensors["head.bias"], torch.full((3,), 7.0))


@pytest.mark.parametrize("weight", [1e308, 5e-324])
def test_weights_may_be_of_any_size(server: Server, weight: float) -> None:
    rules = Rules(weights=dict.fromkeys(SITES, weight))
    weighted = Server(server.tensors, PRINTS, "5e", rules)
    values = {"a": 1.0, "b": 2.0, "c": 6.0}
    weighted.aggregate(1, SITES, [(s, update(filled(v), s)) for s, v in values.items()])
    assert torch.equal(weighted.tensors["head.bias"], torch.full((3,), 3.0))


def test_the_average_does_not_depend_on_who_came_first(server: Server) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [
        (s, update({n: torch.randn(t.shape, generator=generator) for n, t in filled(0).items()}, s))
        for s in SITES
    ]
    other = Server(server.tensors, PRINTS, "5e")
    server.aggregate(1, SITES, updates)
    other.aggregate(1, SITES, reversed(updates))
    for name, tensor in server.tensors.items():
        assert torch.equal(tensor, other.tensors[name])


def test_the_norm_is_of_the_change(server: Server) -> None:
    outcome = server.aggregate(1, SITES, [("a", update(filled(2.0), "a"))])
    assert outcome.norms == {"a": pytest.approx((8 * 4 + 3 * 1) ** 0.5)}


def test_bad_messages_are_refused_with_a_reason_and_the_rest_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"s{k}" for k in range(9)]
    down = server.message(1, "s1")
    other = Fingerprint("c" * 64, PRINTS.recipe)
    nan = safetensors.save(
        {**filled(1.0), "head.bias": torch.full((3,), torch.nan)},
        metadata={"protocol": wire.PROTOCOL, **header_of(update(filled(1.0), "s4"))},
    )
    updates = [
        ("s0", update(filled(3.0), "s0")),
        ("s1", down),
        ("s2", update(filled(9.0), "s2", round_=7)),
        ("s3", update(filled(9.0), "s3", prints=other)),
        ("s4", nan),
        ("s5", update(filled(9.0), "s5")[:-1]),
        ("s6", update(filled(9.0), "s0")),
        ("s7", b"nonsense"),
        ("s8", update(filled(9.0), "s8") + bytes(100_000)),
        ("stranger", update(filled(9.0), "stranger")),
        ("s0", update(filled(9.0), "s0")),
    ]
    outcome = server.aggregate(1, names, updates)
    assert list(outcome.norms) == ["s0"] and outcome.averaged
    reasons = [f"{site}: {reason}" for site, reason in outcome.refused]
    starts = (
        *("s1: kind", "s2: round", "s3: base", "s4: head.bias: holds NaN", "s5: "),
        *("s6: site", "s7: message", "s8: size", "stranger: site", "s0: site: has answered"),
    )
    assert len(reasons) == len(starts)
    for reason, start in zip(reasons, starts, strict=True):
        assert reason.startswith(start)
    assert all("refused" in record.message for record in caplog.records)
    assert len(caplog.records) == len(starts)
    for tensor in server.tensors.values():
        assert torch.equal(tensor, torch.full_like(tensor, 3.0))


def header_of(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found


def test_a_vanished_site_costs_its_share_of_one_round(server: Server) -> None:
    server.aggregate(1, SITES, [(s, update(filled(2.0), s)) for s in ("a", "c")])
    assert float(server.tensors["l.lora_B"][0, 0]) == 2.0
    server.aggregate(2, SITES, [(s, update(filled(5.0), s, round_=2)) for s in SITES])
    assert float(server.tensors["l.lora_B"][0, 0]) == 5.0


def test_too_few_valid_updates_keep_the_old_model(server: Server) -> None:
    strict = Server(server.tensors, PRINTS, "5e", Rules(min_updates=2))
    outcome = strict.aggregate(1, SITES, [("a", update(filled(2.0), "a")), ("b", b"")])
    assert not outcome.averaged and outcome.norms.keys() == {"a"}
    assert not server.aggregate(1, SITES, []).averaged
    for name, tensor in server.tensors.items():
        assert torch.equal(strict.tensors[name], tensor)


def test_an_update_that_goes_too_far_is_refused(server: Server) -> None:
    bound = Server(server.tensors, PRINTS, "5e", Rules(max_update_norm=7.0))
    # From l.lora_B = 0 and head.bias = 1, of 8 and 3 numbers.
    outcome = bound.aggregate(
        1, SITES, [(s, update(filled(v), s)) for s, v in (("a", 2), ("b", 4))]
    )
    assert list(outcome.norms) == ["a"]
    ((site, reason),) = outcome.refused
    assert site == "b" and reason == "norm: got 12.45, accepted: at most 7"


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_robust_averages_shrug_off_a_liar(server: Server, aggregation: str) -> None:
    pytest.importorskip("flwr")
    robust = Server(server.tensors, PRINTS, "5e", Rules(aggregation=aggregation))
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 1e6}
    robust.aggregate(1, values, [(s, update(filled(v), s)) for s, v in values.items()])
    for tensor in robust.tensors.values():
        assert torch.equal(tensor, torch.full_like(tensor, 3.0))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_server_optimizers_take_the_averages_change_for_a_gradient(
    server: Server, optimizer: str
) -> None:
    rules = Rules(optimizer=optimizer, lr=0.5, momentum=0.8, tau=1e-2)
    moved = Server(server.tensors, PRINTS, "5e", rules)
    x, first, second = 1.0, 0.0, 0.0
    for round_, average in enumerate((3.0, 5.0, -2.0), start=1):
        moved.aggregate(round_, ["a"], [("a", update(filled(average), "a", round_))])
        change = average - x
        if optimizer == "momentum":
            first = 0.8 * first + change
            x += 0.5 * first
        else:
            first = 0.8 * first + 0.2 * change
            second = 0.99 * second + 0.01 * change**2
            root = (second / (1 - 0.99**round_)) ** 0.5
            x += 0.5 * first / (1 - 0.8**round_) / (root + 1e-2)
        assert float(moved.tensors["head.bias"][0]) == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam"])
def test_a_restarted_server_goes_on_where_it_was(server: Server, optimizer: str) -> None:
    rules = Rules(optimizer=optimizer)
    first = Server(server.tensors, PRINTS, "5e", rules)
    first.aggregate(1, ["a"], [("a", update(filled(3.0), "a"))])
    state = first.state({"rounds": [1, {"x": None}]})
    again = Server(filled(0.0), PRINTS, "other", rules)
    assert again.restore(state) == {"rounds": [1, {"x": None}]} and again.run == "5e"
    for each in (first, again):
        each.aggregate(2, ["a"], [("a", update(filled(5.0), "a", 2))])
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
    for damaged in (b"", state[:-1], state[:100], b"{}" + state):
        with pytest.raises(ConfigError, match="state of the server"):
            again.restore(damaged)
    for other in (
        Server(filled(0.0), Fingerprint("c" * 64, PRINTS.recipe), "5e", rules),
        Server({"l.lora_B": torch.zeros(4, 2)}, PRINTS, "5e", rules),
    ):
        with pytest.raises(ConfigError, match=r"of another base|has other tensors"):
            other.restore(state)


@pytest.mark.parametrize("method", ["ffa", "lora"])
def test_every_process_builds_the_same_model(
    document: dict[str, Any], tmp_path: Path, method: str
) -> None:
    config = settled(document, tmp_path, federation={"method": method})
    state = torch.random.get_rng_state()
    first, _ = build(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    second, _ = build(config)
    assert wire.fingerprint(first) == wire.fingerprint(second)
    trained, again = wire.trained_tensors(first), wire.trained_tensors(second)
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    parts = {name.split(".")[-1] for name in trained if not wire.is_adapter(name)}
    assert parts == {"weight", "bias"} and all(
        "classifier" in name for name in trained if not wire.is_adapter(name)
    )
    sides = {part for name in trained for part in name.split(".") if part.startswith("lora_")}
    assert sides == ({"lora_B"} if method == "ffa" else {"lora_A", "lora_B"})


@pytest.mark.parametrize("method", ["ffa", "lora"])
def test_ends_with_another_alpha_do_not_take_each_others_messages(
    document: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """B means another change there; a site of a lower rank has the same."""
    config = settled(document, tmp_path, federation={"method": method})
    other = replace(config, model=replace(config.model, alpha=1.0))
    prints = [wire.fingerprint(build(each)[0]).base for each in (config, config, other)]
    assert prints[0] == prints[1] != prints[2]
    if method == "ffa":
        weak = replace(config.sites[0], r=3, target_modules=("value",))
        assert wire.fingerprint(build(config, weak)[0]).base == prints[0]


@pytest.mark.parametrize("method", ["ffa", "lora"])
@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_a_module_that_the_model_lacks_is_named(
    document: dict[str, Any], tmp_path: Path, method: str, key: str
) -> None:
    config = settled(document, tmp_path, federation={"method": method}, model={key: ["querry"]})
    with pytest.raises(ConfigError, match=f"{key}.*'querry'"):
        build(config)


def test_classes_that_the_checkpoints_head_does_not_have_are_named(
    document: dict[str, Any], tmp_path: Path, tiny_bert: Path
) -> None:
    config = settled(document, tmp_path, model={"classes": 3})
    with pytest.raises(ConfigError, match=r"\[model\] classes: got 3, .* of 2; accepted: 2, or"):
        build(config)
    shutil.copytree(tiny_bert, tmp_path / "headless")
    kept = safetensors.load_file(tiny_bert / "model.safetensors")
    body = {name: t for name, t in kept.items() if not name.startswith("classifier")}
    safetensors.save_file(body, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    build(settled(document, tmp_path, model={"classes": 3, "kind": str(tmp_path / "headless")}))


def test_the_report_shows_any_name_as_it_is(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    document["site"][0]["name"] = "_south"
    config = settled(document, tmp_path, federation={"name": "$\\foo$ and $5", "rounds": 1})
    made, real = [], figure.Figure.savefig

    def kept(self: Any, *args: Any, **named: Any) -> None:
        made.append(self)
        real(self, *args, **named)

    monkeypatch.setattr(figure.Figure, "savefig", kept)
    driver.run(config, tmp_path / "out")
    (drawn,) = made
    assert drawn.get_suptitle() == "$\\foo$ and $5, method ffa"
    for axes in drawn.axes[:2]:
        told = {text.get_text().strip() for text in axes.get_legend().get_texts()}
        assert told >= {"_south", "east", "north"}


def test_a_site_copy_shares_what_is_frozen_and_owns_what_is_trained(bench: Bench) -> None:
    own = copy_sharing_frozen(bench.model)
    for (name, mine), (_, theirs) in zip(
        own.named_parameters(), bench.model.named_parameters(), strict=True
    ):
        shared = mine.data_ptr() == theirs.data_ptr()
        assert shared == (not theirs.requires_grad), name


@pytest.mark.parametrize("method", ["ffa", "lora"])
def test_a_round_moves_what_is_trained_and_charges_each_step(
    document: dict[str, Any], tmp_path: Path, method: str
) -> None:
    config = settled(document, tmp_path, federation={"method": method})
    bench = Bench(config, tmp_path / "sites")
    before = wire.fingerprint(bench.model)
    ticks: list[int] = []
    with closing(bench.site()) as site:
        message = bench.server.message(1, "north")
        data = site.run_round(1, message, on_step=lambda: ticks.append(1))
        received = wire.decode(
            data, replace(header("update", bench), site="north"), bench.server.tensors
        )
        assert len(ticks) == config.federation.local_steps
        assert site.epsilon() > 0
    for name, tensor in received.items():
        assert not torch.equal(tensor, bench.server.tensors[name]), name
    assert wire.fingerprint(bench.model) == before
    ledger = Ledger(tmp_path / "sites" / "north" / "ledger.jsonl")
    assert [steps for _, _, steps in ledger.history] == [config.federation.local_steps]
    ledger.close()


def header(kind: str, bench: Bench, round_: int = 1) -> Header:
    prints = wire.fingerprint(bench.model)
    return Header(kind, "5e", round_, "north", prints.base, prints.recipe)


def test_an_update_starts_from_the_global_tensors_that_came(bench: Bench) -> None:
    far = {name: t + 100.0 for name, t in bench.server.tensors.items()}
    with closing(bench.site()) as site:
        data = site.run_round(1, wire.encode(header("global", bench), far))
    received = wire.decode(data, header("update", bench), far)
    for name, tensor in received.items():
        assert float((tensor - far[name]).abs().max()) < 50.0, name


def test_the_noise_spends_the_target_over_all_rounds(bench: Bench) -> None:
    federation, privacy = bench.config.federation, bench.config.privacy
    with closing(bench.site()) as site:
        for round_ in range(1, federation.rounds + 1):
            site.run_round(round_, bench.server.message(round_, "north"))
        assert 0.98 * privacy.target_epsilon < site.epsilon() <= privacy.target_epsilon
        steps = federation.rounds * federation.local_steps
        history = [(site.noise_multiplier, site.sample_rate, steps)]
        assert site.epsilon() == epsilon(history, privacy.target_delta, privacy.accountant)


def test_a_round_asked_for_again_gets_the_same_bytes_and_costs_nothing(bench: Bench) -> None:
    message = bench.server.message(1, "north")
    with closing(bench.site()) as site:
        first = site.run_round(1, message)
        spent = site.epsilon()
        assert site.run_round(1, message) == first
        assert site.run_round(1, b"whatever comes with it") == first
        assert site.epsilon() == spent
    with closing(bench.site()) as restarted:
        assert restarted.run_round(1, message) == first
        assert restarted.epsilon() == spent


def test_a_new_run_on_a_used_ledger_gets_what_is_left(bench: Bench) -> None:
    with closing(bench.site()) as site:
        site.run_round(1, bench.server.message(1, "north"))
        noise, spent = site.noise_multiplier, site.epsilon()
    with closing(bench.site(run="other")) as again:
        assert again.noise_multiplier > noise and again.epsilon() == spent
        bench.server.run = "other"
        for round_ in (1, 2):
            again.run_round(round_, bench.server.message(round_, "north"))
        assert again.epsilon() <= bench.config.privacy.target_epsilon
    ledger = Ledger(bench.folder / "north" / "ledger.jsonl")
    ledger.charge(1.0, 0.2, steps=10_000)
    ledger.close()
    with pytest.raises(PrivacyError, match=r"'north'.*already spent"):
        bench.site(run="third")


def test_a_server_cannot_ask_for_more_rounds_than_were_agreed(bench: Bench) -> None:
    with closing(bench.site()) as site:
        for round_ in (0, 3, -1):
            with pytest.raises(WireError, match="round"):
                site.run_round(round_, bench.server.message(round_, "north"))
        assert site.epsilon() == 0.0


def test_a_message_that_does_not_fit_trains_nothing(bench: Bench) -> None:
    with closing(bench.site()) as site:
        for message in (
            bench.server.message(1, "south"),
            bench.server.message(2, "north"),
            bench.server.message(1, "north")[:-4],
        ):
            with pytest.raises(WireError):
                site.run_round(1, message)
        assert site.epsilon() == 0.0


def test_a_frozen_tensor_that_moved_stops_the_release(bench: Bench) -> None:
    with closing(bench.site()) as site:
        frozen = next(p for n, p in bench.model.named_parameters() if n.endswith("lora_A"))

        def nudge() -> None:
            with torch.no_grad():
                frozen[0, 0] += 1e-4

        with pytest.raises(PrivacyError, match="frozen tensor moved"):
            site.run_round(1, bench.server.message(1, "north"), on_step=nudge)
    assert not list((bench.folder / "north").glob("update-*"))


def test_an_adapter_that_does_not_move_is_named(bench: Bench) -> None:
    with closing(bench.site()) as site:
        for group in site._optimizer.param_groups:
            group["lr"] = 0.0
        with pytest.raises(FFAError, match="lora_B: did not move"):
            site.run_round(1, bench.server.message(1, "north"))


def test_what_epsilon_does_not_cover_stays_at_the_site(bench: Bench) -> None:
    with closing(bench.site()) as site:
        data = site.run_round(1, bench.server.message(1, "north"))
    lines = (bench.folder / "north" / "local.jsonl").read_text().splitlines()
    (entry,) = [json.loads(line) for line in lines]
    assert entry["not covered by epsilon"] is True
    assert 0 < entry["training_loss"] < 5 and 0 <= entry["clipped_fraction"] <= 1
    assert entry["dropped_records"] == 0
    assert set(header_of(data)) == {"protocol", *vars(header("update", bench))}


def test_physical_batches_do_not_change_the_number_of_steps(
    document: dict[str, Any], tmp_path: Path
) -> None:
    config = settled(document, tmp_path, train={"max_physical_batch_size": 5})
    bench = Bench(config, tmp_path / "sites")
    ticks: list[int] = []
    with closing(bench.site()) as site:
        site.run_round(1, bench.server.message(1, "north"), on_step=lambda: ticks.append(1))
    assert len(ticks) == config.federation.local_steps
    entry = json.loads((tmp_path / "sites" / "north" / "local.jsonl").read_text())
    assert 0 <= entry["clipped_fraction"] <= 1


def test_a_round_tried_again_cannot_overspend(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time with more noise, for the rounds that are left; until it would be all noise."""
    noise: list[float] = []
    with closing(bench.site()) as site:
        monkeypatch.setattr(site, "_check_moved", lambda: 1 / 0)
        monkeypatch.setattr("ffa_kernels.federated.site._MOST_NOISE", 1.4)
        with pytest.raises(PrivacyError, match="is spent"):
            while len(noise) < 100:
                with pytest.raises(ZeroDivisionError):
                    site.run_round(1, bench.server.message(1, "north"))
                noise.append(site.noise_multiplier)
        assert len(noise) > 2 and noise == sorted(set(noise))
        assert site.epsilon() <= bench.config.privacy.target_epsilon


def test_alternating_trains_and_sends_b_and_a_in_turn(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """What moves is averaged, and what does not is the same at all sites."""
    config = settled(document, tmp_path, federation={"method": "alternating", "rounds": 3})
    model, tokenizer = build(config)
    server, records = driver.make_server(config, model, "5e"), driver.load_records(config)
    names = sorted(records)
    with ExitStack() as opened:
        sites = {
            name: opened.enter_context(
                closing(
                    Site(
                        *(name, records[name][0], model, tokenizer, config, "5e"),
                        folder=tmp_path / "sites" / name,
                    )
                )
            )
            for name in names
        }
        for round_ in (1, 2, 3):
            before = {name: t.clone() for name, t in server.tensors.items()}
            updates = {n: sites[n].run_round(round_, server.message(round_, n)) for n in names}
            turn = "lora_B" if round_ % 2 else "lora_A"
            for update in updates.values():
                sent = safetensors.load(update)
                adapters = {name for name in sent if wire.is_adapter(name)}
                assert adapters and all(turn in name for name in adapters)
                assert sent.keys() - adapters == {"classifier.weight", "classifier.bias"}
            assert server.aggregate(round_, names, updates.items()).averaged
            for name, tensor in server.tensors.items():
                moved = not torch.equal(tensor, before[name])
                assert moved == (turn in name or not wire.is_adapter(name)), name
        assert all(site.epsilon() <= config.privacy.target_epsilon for site in sites.values())
    # An update of the other half is not this round's.
    wrong = {n: t for n, t in server.tensors.items() if "lora_B" in n or "classifier" in n}
    message = wire.encode(server.header("update", 4, "north"), wrong)
    outcome = server.aggregate(4, ["north"], [("north", message)])
    assert not outcome.averaged and "unknown" in outcome.refused[0][1]


def test_another_output_folder_is_no_new_budget(config: Config, tmp_path: Path) -> None:
    first = driver.run(config, tmp_path / "first")["sites"]["north"]
    second = driver.run(config, tmp_path / "second")["sites"]["north"]
    # What is left of the same epsilon is next to nothing, and the ledger's total stays under it.
    assert second["noise_multiplier"] > 3 * first["noise_multiplier"]
    assert first["epsilon"] < second["epsilon"] <= config.privacy.target_epsilon


def test_a_site_with_three_records_is_not_let_in(bench: Bench) -> None:
    few = bench.records["north"][0].take(range(3))
    with pytest.raises(ConfigError, match="'north': got 3 training records; accepted: at least 50"):
        bench.site(records=few)
    assert not (bench.folder / "north").exists()


def test_a_site_smaller_than_a_step_is_not_let_in(document: dict[str, Any], tmp_path: Path) -> None:
    config = settled(document, tmp_path, train={"batch_size": 90})
    with pytest.raises(ConfigError, match="at least 90"):
        driver.load_records(config)


def test_a_delta_of_one_over_n_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    config = settled(document, tmp_path, privacy={"target_delta": 0.02})
    with pytest.raises(ConfigError, match=r"target_delta: got 0.02 .*accepted: below 1/"):
        driver.load_records(config)


def test_a_label_beyond_the_declared_classes_is_named(
    document: dict[str, Any], tmp_path: Path
) -> None:
    with (tmp_path / "east.jsonl").open("a") as lines:
        lines.write('{"text": "new kind of thing", "label": 2}\n')
    with pytest.raises(ConfigError, match="'east': got label 2; accepted: 0 to 1"):
        driver.load_records(settled(document, tmp_path))
    driver.load_records(settled(document, tmp_path, model={"classes": 3}))


def test_a_run_writes_a_report_that_adds_up(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = driver.run(config, out)
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(result))
    assert set(report) == {
        *("method", "accuracy", "accuracy_without_adapters", "baseline_accuracy", "epsilon"),
        *("delta", "seconds", "bytes_up", "bytes_down", "rounds", "adapter_bytes_up"),
        *("head_bytes_up", "header_bytes_up", "frozen_bytes_down", "sites", "adapter_norms"),
        "environment",
    }
    kept = {p: p.stat().st_size for p in out.glob("sites/*/update-*.safetensors")}
    assert len(kept) == 3 * 2 and report["bytes_up"] == sum(kept.values())
    parts = [report[f"{part}_bytes_up"] for part in ("adapter", "head", "header")]
    assert sum(parts) == report["bytes_up"] and min(parts) > 0
    per_site = [s for entry in report["rounds"] for s in entry["sites"].values()]
    assert sum(s["bytes_up"] for s in per_site) == report["bytes_up"]
    assert sum(s["bytes_down"] for s in per_site) == report["bytes_down"] > 0
    for entry in report["rounds"]:
        assert entry["attempts"] == 1 and not entry["refused"] and not entry["absent"]
        for of_site in entry["sites"].values():
            assert 0 <= of_site["accuracy"] <= 1 and of_site["update_norm"] > 0
    spent = [entry["sites"]["north"]["epsilon"] for entry in report["rounds"]]
    assert 0 < spent[0] < spent[1] <= config.privacy.target_epsilon
    assert report["epsilon"] == max(s["epsilon"] for s in report["sites"].values())
    layers = [f"{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
    assert len(report["adapter_norms"]) == len(layers)
    assert all(norm > 0 for norm in report["adapter_norms"].values())
    for name in ("east", "north", "south"):
        (of_site,) = (site for site in config.sites if site.name == name)
        ledger = Ledger(of_site.ledger)
        assert ledger.epsilon(1e-3, "rdp") == report["sites"][name]["epsilon"]
        ledger.close()
        lines = (out / "sites" / name / "local.jsonl").read_text().splitlines()
        assert len(lines) == 2
        assert all(json.loads(line)["not covered by epsilon"] is True for line in lines)
    public = (out / "report.json").read_text() + (out / "report.md").read_text()
    for private in ("loss", "clipped", "dropped", str(tmp_path)):
        assert private not in public
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob(".*"))


def test_training_without_noise_learns_in_the_adapters(
    document: dict[str, Any], tmp_path: Path
) -> None:
    config = settled(
        document,
        tmp_path,
        federation={"rounds": 4, "local_steps": 12},
        privacy={"target_epsilon": float("inf"), "max_grad_norm": 10.0},
        train={"optimizer": "adam", "lr": 0.02, "head_lr": 0.002},
    )
    report = driver.run(config, tmp_path / "out")
    assert report["epsilon"] is None
    assert report["accuracy"] > 0.8 > 0.7 > report["baseline_accuracy"]
    assert report["accuracy_without_adapters"] < report["accuracy"] - 0.1


def test_both_methods_of_one_config_send_what_they_train(
    document: dict[str, Any], tmp_path: Path
) -> None:
    sent = {}
    for method in ("ffa", "lora"):
        config = settled(document, tmp_path, federation={"method": method, "rounds": 1})
        sent[method] = driver.run(config, tmp_path / method)
        assert sent[method]["method"] == method
    # Square layers: B alone is half of A and B.
    assert 2 * sent["ffa"]["adapter_bytes_up"] == sent["lora"]["adapter_bytes_up"]
    assert sent["ffa"]["head_bytes_up"] == sent["lora"]["head_bytes_up"]


def test_the_draw_of_sites_is_public_and_each_round_pays_for_its_own(
    document: dict[str, Any], tmp_path: Path
) -> None:
    config = settled(document, tmp_path, federation={"rounds": 4, "sites_per_round": 1})
    names = ["east", "north", "south"]
    draws = [rounds.draw_sites(config, r, names) for r in range(1, 30)]
    assert draws == [rounds.draw_sites(config, r, names) for r in range(1, 30)]
    assert {name for draw in draws for name in draw} == set(names)
    other = replace(config, federation=replace(config.federation, seed=1))
    assert draws != [rounds.draw_sites(other, r, names) for r in range(1, 30)]
    report = driver.run(config, tmp_path / "out")
    for round_, entry in enumerate(report["rounds"], start=1):
        asked = rounds.draw_sites(config, round_, names)
        assert [n for n, s in entry["sites"].items() if s["bytes_up"]] == asked
        assert [n for n, s in entry["sites"].items() if s["update_norm"] is not None] == asked


def test_a_lying_site_is_reported_and_the_run_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Site.run_round

    def lying(self: Site, round_: int, *arguments: Any) -> bytes:
        data = honest(self, round_, *arguments)
        if self.name != "north":
            return data
        return data[:-4] + torch.tensor([torch.nan]).numpy().tobytes()

    monkeypatch.setattr(Site, "run_round", lying)
    report = driver.run(config, tmp_path / "out")
    for entry in report["rounds"]:
        assert [(r["site"], "NaN" in r["reason"]) for r in entry["refused"]] == [("north", True)]
        assert entry["sites"]["north"]["update_norm"] is None
        assert entry["sites"]["south"]["update_norm"] > 0
    assert "round 2: north refused" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("data", "sizes"),
    [({"split": "iid", "sites": 2}, 2), ({"split": "dirichlet", "sites": 3}, 3)],
)
def test_splits_deal_all_records_out_once(
    document: dict[str, Any], tmp_path: Path, data: dict[str, Any], sizes: int
) -> None:
    if data["split"] == "dirichlet":
        data = {**data, "dirichlet_alpha": 5.0}
    document["site"] = [{k: v for k, v in s.items() if k != "test"} for s in document["site"]]
    document["privacy"]["new_ledger"] = True
    config = settled(document, tmp_path, data={**data, "min_records": 16})
    records = driver.load_records(config)
    assert len(records) == sizes
    texts = [t for train, test in records.values() for t in train.texts + test.texts]
    assert len(texts) == 240
    assert all(len(test) for _, test in records.values())


def test_a_second_run_in_the_same_folder_gets_what_is_left(
    document: dict[str, Any], tmp_path: Path
) -> None:
    config = settled(document, tmp_path)
    first = driver.run(config, tmp_path / "out")
    second = driver.run(config, tmp_path / "out")
    assert first["epsilon"] < second["epsilon"] <= config.privacy.target_epsilon
    for name, of_site in second["sites"].items():
        assert of_site["noise_multiplier"] > 5 * first["sites"][name]["noise_multiplier"]


def test_more_sites_asked_for_than_there_are(document: dict[str, Any], tmp_path: Path) -> None:
    for key in ("sites_per_round", "min_updates"):
        config = settled(document, tmp_path, federation={key: 4})
        with pytest.raises(ConfigError, match=f"{key}: got 4 for 3 sites"):
            driver.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Rounds that fail, and runs that are cut off.


def failing(monkeypatch: pytest.MonkeyPatch, when: Any) -> list[tuple[str, int]]:
    """Sites raise where `when` (site, round, how often it was asked) says; who was asked."""
    honest, asked = Site.run_round, []

    def run_round(self: Site, round_: int, *arguments: Any) -> bytes:
        asked.append((self.name, round_))
        if when(self.name, round_, asked.count((self.name, round_))):
            raise RuntimeError("no power")
        return honest(self, round_, *arguments)

    monkeypatch.setattr(Site, "run_round", run_round)
    return asked


def test_an_absent_site_is_reported_and_the_run_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda name, round_, _: (name, round_) == ("east", 1))
    report = driver.run(config, tmp_path / "out")
    assert report["rounds"][0]["absent"] == [{"site": "east", "reason": "RuntimeError: no power"}]
    assert report["rounds"][0]["sites"]["east"]["update_norm"] is None
    assert report["rounds"][1]["absent"] == []
    assert report["rounds"][1]["sites"]["east"]["update_norm"] > 0
    assert "round 1: east absent: RuntimeError" in (tmp_path / "out" / "report.md").read_text()


def test_a_round_with_too_few_sites_is_tried_again_without_those_that_answered(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(document, tmp_path, federation={"min_updates": 3})
    asked = failing(monkeypatch, lambda name, round_, times: name == "east" and times < 3)
    report = driver.run(config, tmp_path / "out")
    assert [entry["attempts"] for entry in report["rounds"]] == [3, 3]
    assert asked == [
        (name, round_) for round_ in (1, 2) for name in ("east", "north", "south", "east", "east")
    ]
    assert all(site["epsilon"] <= 8.0 for site in report["sites"].values())


def test_a_run_that_was_cut_off_goes_on(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(document, tmp_path, federation={"rounds": 3, "min_updates": 3, "attempts": 2})
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--resume: .* is not there"):
        driver.run(config, out, resume=True)
    with monkeypatch.context() as patch:
        failing(patch, lambda name, round_, _: (name, round_) == ("south", 2))
        with pytest.raises(FederationError, match="round 2: got 2 valid updates in 2 attempts"):
            driver.run(config, out)
    kept = {path: path.read_bytes() for path in out.glob("sites/*/update-*.safetensors")}
    assert len(kept) == 3 + 2
    with monkeypatch.context() as patch:
        asked = failing(patch, lambda *_: False)
        report = driver.run(config, out, resume=True)
    # Round 1 is done; in round 2 those who have answered send the very bytes again.
    assert asked == [(name, round_) for round_ in (2, 3) for name in ("east", "north", "south")]
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert len(list(out.glob("sites/*/update-*.safetensors"))) == 9
    assert [entry["round"] for entry in report["rounds"]] == [1, 2, 3]
    per_site = [s for entry in report["rounds"] for s in entry["sites"].values()]
    assert sum(s["bytes_up"] for s in per_site) == report["bytes_up"]
    for of_site in config.sites:
        ledger = Ledger(of_site.ledger)
        # Each round was trained once, by each.
        assert ledger.steps == 3 * 2 and ledger.epsilon(1e-3, "rdp") <= 8.0
        ledger.close()


def test_a_run_that_was_cut_off_in_its_first_round_goes_on_and_not_an_older_one(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    older = driver.run(settled(document, tmp_path), out)
    document["privacy"] |= {"target_epsilon": 20.0}
    config = settled(document, tmp_path, federation={"min_updates": 3, "attempts": 1})
    with monkeypatch.context() as patch:
        failing(patch, lambda name, *_: name == "south")
        with pytest.raises(FederationError, match="round 1: got 2 valid updates"):
            driver.run(config, out)
    kept = {path: path.read_bytes() for path in out.glob("sites/*/update-*-0001.safetensors")}
    assert len(kept) == 3 + 2
    report = driver.run(config, out, resume=True)
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert len(list(out.glob("sites/*/update-*.safetensors"))) == 2 * 6
    assert report["rounds"][0]["sites"] != older["rounds"][0]["sites"]
    for of_site in config.sites:
        ledger = Ledger(of_site.ledger)
        # Two runs of two rounds, each of which was trained once by each.
        assert ledger.steps == 2 * 2 * 2
        ledger.close()


def test_a_run_goes_on_with_the_settings_and_sites_that_it_began_with(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """It is refused by name before anything is trained; rounds and the target may change."""
    document["privacy"]["target_epsilon"] = 20.0
    document["federation"] |= {"rounds": 1, "server_optimizer": "momentum"}
    out = tmp_path / "out"
    driver.run(settled(document, tmp_path), out)
    ledgers = {path: path.read_bytes() for path in tmp_path.glob("*.ledger.jsonl")}
    more: dict[str, Any] = {"rounds": 2}
    for table, key, given, begun in (
        *(("model", "alpha", 1.0, "16.0"), ("model", "max_length", 8, "16")),
        *(("federation", "weights", "records", "'equal'"), ("federation", "seed", 1, "0")),
        *(("federation", "codec", "int8", "'fp32'"), ("federation", "local_steps", 3, "2")),
        ("federation", "server_optimizer", "adam", "'momentum'"),
        *(("privacy", "clipping", "per_layer", "'flat'"), ("train", "smoothing", 0.5, "0.0")),
    ):
        changes = {"federation": more, table: {**(more if table == "federation" else {})}}
        changes[table][key] = given
        pattern = rf"\[{table}\] {key}: got {given!r} with --resume; accepted: {begun}, with which"
        with pytest.raises(ConfigError, match=pattern):
            driver.run(settled(document, tmp_path, **changes), out, resume=True)
    sites = document["site"]
    for other in (sites[1:], [*sites[1:], {**sites[0], "name": "west"}]):
        config = settled({**document, "site": other}, tmp_path, federation=more)
        with pytest.raises(
            ConfigError, match=r"got the sites .*accepted: east, north, south, with"
        ):
            driver.run(config, out, resume=True)
    assert ledgers == {path: path.read_bytes() for path in tmp_path.glob("*.ledger.jsonl")}
    changes = {"federation": more, "privacy": {"target_epsilon": 30.0}, "train": {"lr": 0.05}}
    report = driver.run(settled(document, tmp_path, **changes), out, resume=True)
    assert [entry["round"] for entry in report["rounds"]] == [1, 2]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_run_with_each_codec(document: dict[str, Any], tmp_path: Path, codec: str) -> None:
    whole = driver.run(settled(document, tmp_path), tmp_path / "fp32")
    document["privacy"]["new_ledger"] = True
    document["site"] = [{**s, "ledger": f"{s['name']}.{codec}"} for s in document["site"]]
    coded = driver.run(settled(document, tmp_path, federation={"codec": codec}), tmp_path / codec)
    share = coded["adapter_bytes_up"] / whole["adapter_bytes_up"]
    assert share == 0.5 if codec == "bf16" else 0.25 < share < 0.3
    assert coded["bytes_up"] < whole["bytes_up"]
    assert all(site["update_norm"] > 0 for site in coded["rounds"][-1]["sites"].values())


# Sites that have less.


def test_a_column_is_averaged_over_the_sites_that_have_it() -> None:
    """Padded ranks and missing layers: exact to the rounding of fp32."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    start = {"k.lora_B": random(5, 4), "l.lora_B": random(6, 4), "head.bias": random(3)}
    ranks = {"a": {"k.lora_B": 4, "l.lora_B": 4}, "b": {"k.lora_B": 2}, "c": {"k.lora_B": 3}}
    prints = {name: Fingerprint(PRINTS.base, name * 64) for name in ranks}
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    server = Server(
        *(start, PRINTS, "5e", Rules(weights=weights)),
        shares={name: Share(ranks[name], prints[name]) for name in ("b", "c")},
    )
    sent, messages = {}, []
    for name, of_site in ranks.items():
        like = {B: torch.zeros(start[B].shape[0], r) for B, r in of_site.items()}
        like["head.bias"] = torch.zeros(3)
        own = PRINTS if name == "a" else prints[name]
        header = Header("global", "5e", 1, name, own.base, own.recipe)
        got = wire.decode(server.message(1, name), header, like)
        for key, tensor in got.items():
            assert torch.equal(tensor, start[key][..., : tensor.shape[-1]])
        sent[name] = {key: random(*tensor.shape) for key, tensor in like.items()}
        messages.append((name, update(sent[name], name, prints=own)))
    outcome = server.aggregate(1, ranks, messages)
    assert list(outcome.norms) == ["a", "b", "c"] and not outcome.refused
    for key in ("k.lora_B", "l.lora_B"):
        for column in range(4):
            who = [name for name in ranks if ranks[name].get(key, 0) > column]
            mass = sum(weights[name] for name in who)
            mean = sum(weights[n] * sent[n][key][:, column].double() for n in who) / mass
            assert torch.equal(server.tensors[key][:, column], mean.float())
    # A column that none of those who answered has stays as it is.
    before = server.tensors["l.lora_B"].clone()
    prints_b = update(sent["b"], "b", 2, prints["b"])
    assert server.aggregate(2, ranks, [("b", prints_b)]).averaged
    assert torch.equal(server.tensors["l.lora_B"], before)
    # A site that has less cannot send more, nor speak for another A.
    for prints_, tensors in ((prints["b"], sent["c"]), (PRINTS, sent["b"])):
        wrong = update(tensors, "b", 3, prints_)
        assert server.aggregate(3, ranks, [("b", wrong)]).refused


@pytest.mark.parametrize("init", ["orthogonal", "kaiming", "gaussian"])
def test_weak_sites_join_the_same_federation(
    document: dict[str, Any], tmp_path: Path, init: str
) -> None:
    document["model"]["init"] = init
    south, east, _ = document["site"]
    south |= {"r": 1, "max_physical_batch_size": 3}
    east |= {"target_modules": ["value"], "r": 3}
    config = settled(document, tmp_path)
    whole, _ = build(config)
    small, _ = build(config, site_of(config, "south"))
    for name, layer in small.named_modules():
        if isinstance(layer, FFALinear):
            full = whole.get_submodule(name)
            assert torch.equal(layer.lora_A, full.lora_A[:1])
            assert layer.scaling == full.scaling
    report = driver.run(config, tmp_path / "out")
    assert not any(entry["refused"] or entry["absent"] for entry in report["rounds"])
    sizes = {name: of_site["bytes_up"] for name, of_site in report["sites"].items()}
    assert sizes["south"] < sizes["east"] < sizes["north"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, r"r: got 5; accepted: up to \[model\] r = 4"),
        ({"target_modules": ["key"]}, "target_modules: got 'key'; accepted: some of query, value"),
        ({"weight": 2.0}, "weight: got one with weights = 'equal'"),
    ],
)
def test_what_a_weak_site_may_not_have(
    document: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    document["site"][0] |= changes
    with pytest.raises(ConfigError, match=message):
        settled(document, tmp_path)


def test_declared_weights(document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'declared' without a weight for \['south', 'east'"):
        settled(document, tmp_path, federation={"weights": "declared"})
    for entry, weight in zip(document["site"], (1, 2, 3), strict=True):
        entry["weight"] = weight
    config = settled(document, tmp_path, federation={"weights": "declared"})
    model, _ = build(config)
    server = driver.make_server(config, model, "5e")
    assert server.rules.weights == {"south": 1.0, "east": 2.0, "north": 3.0}
    header = header_of(server.message(1, "south"))
    assert header["weights"] == "declared"
    with pytest.raises(ConfigError, match="accepted: weights = 'equal', or aggregation = 'mean'"):
        settled(document, tmp_path, federation={"weights": "declared", "aggregation": "median"})
