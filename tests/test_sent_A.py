"""An A that each end would make with other bits (pissa) is sent once, checked, kept, counted."""

from __future__ import annotations

import functools
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from test_federated import document, failing, header_of, settled, tiny_bert  # noqa: F401
from test_site import RUN, North, assert_equal
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, FederationError, WireError
from ffa_kernels.federated import build as building
from ffa_kernels.federated import driver, wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config, site_of
from ffa_kernels.federated.server import Server
from ffa_kernels.federated.site import Site, copy_sharing_frozen, frozen_file
from ffa_kernels.federated.wire import Fingerprint, Header
from ffa_kernels.nn import convert
from ffa_kernels.nn.init import pissa_A

pytestmark = pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated")
D_IN, LAYERS, R = 32, 4, 4


@pytest.fixture
def pissa(document: dict[str, Any]) -> dict[str, Any]:  # noqa: F811
    document["model"]["init"] = "pissa"
    document["privacy"]["new_ledger"] = True
    return document


@pytest.fixture
def north(pissa: dict[str, Any], tmp_path: Path) -> North:
    return North(pissa, tmp_path)


def of_another_machine(weight: Tensor, r: int) -> Tensor:
    """The same singular vectors with other bits: the last place, and signs, which are free."""
    A = torch.nextafter(pissa_A(weight, r), torch.tensor(torch.inf))
    A[::2] *= -1
    return A


def never(*_: Any) -> Any:
    raise AssertionError("was not to be called")


def test_only_the_server_makes_an_svd(north: North, monkeypatch: pytest.MonkeyPatch) -> None:
    server = north.server()
    monkeypatch.setattr(torch.linalg, "svd", never)
    model, _ = build(north.config)
    assert wire.fingerprint(model).base == wire.fingerprint(north.model).base
    for name, A in wire.frozen_A(model).items():
        assert not A.any(), "nothing can be trained with it"
        assert model.get_submodule(name.removesuffix(".lora_A")).init == "pissa"
    with closing(Site(*parts(north, model), folder=north.folder, seed=5)) as site:
        site.run_round(1, server.message(1, "north"), frozen=lambda: server.frozen_message("north"))


def parts(north: North, model: nn.Module) -> tuple[Any, ...]:
    return "north", north.records, model, north.tokenizer, north.config, RUN


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_ends_whose_own_svds_differ_train_the_same_B(
    pissa: dict[str, Any], tmp_path: Path, codec: str
) -> None:
    pissa["federation"]["codec"] = codec
    north = North(pissa, tmp_path)
    server, sent = north.server(), []
    other = copy_sharing_frozen(north.model, wire.frozen_A(north.model))
    for layer in other.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A.copy_(of_another_machine(layer.weight, R))
    assert wire.fingerprint(other).recipe != wire.fingerprint(north.model).recipe
    before = wire.fingerprint(other)

    def frozen() -> bytes:
        sent.append(server.frozen_message("north"))
        return sent[-1]

    updates = []
    for model, folder in ((north.model, "same"), (other, "other")):
        with closing(Site(*parts(north, model), folder=tmp_path / folder, seed=5)) as site:
            updates.append(site.run_round(1, server.message(1, "north"), frozen=frozen))
            assert site._fingerprint == wire.fingerprint(north.model)
    assert wire.fingerprint(other) == before, "the site's A is its own"
    assert len(sent) == 2
    assert_equal(*sent)
    if codec == "fp32":  # int8 rounds with a key of its own
        assert_equal(*updates)
    assert server.aggregate(1, ["north"], [("north", updates[1])]).averaged


def tampered(message: bytes, server: Server) -> dict[str, tuple[bytes, str]]:
    """By what is wrong: the message, and how the refusal begins."""
    header, A = server.header(wire.FROZEN, 0, "north"), server.frozen
    first, told = next(iter(A)), {"protocol": wire.PROTOCOL, **header_of(message)}

    def forged(tensors: dict[str, Tensor]) -> bytes:
        """With a recipe that is theirs."""
        recipe = wire.digest({n: t for n, t in tensors.items() if n in A})
        return safetensors.save(tensors, metadata={**told, "recipe": recipe})

    return {
        "a bit": (message[:-1] + bytes([message[-1] ^ 1]), "recipe: got"),
        "a recipe": (wire.encode(replace(header, recipe="c" * 64), A), "recipe: got 'cccc"),
        "no recipe": (wire.encode(replace(header, recipe=""), A), "recipe: got ''"),
        "a base": (wire.encode(replace(header, base="c" * 64), A), "base"),
        "a site": (wire.encode(replace(header, site="east"), A), "site"),
        "a run": (wire.encode(replace(header, run="6f" * 8), A), "run"),
        "a round": (wire.encode(replace(header, round=1), A), "round"),
        "a kind": (wire.encode(replace(header, kind="global"), A), "kind"),
        "a codec": (wire.encode(replace(header, codec="bf16"), A), "codec"),
        "another message": (server.message(1, "north"), "kind"),
        "an end": (message[:-4], "message"),
        "more": (message + bytes(1 << 16), "size"),
        "nothing": (b"", "message: truncated"),
        "a row": (forged({**A, first: A[first][:-1].clone()}), f"{first}: got shape"),
        "a layer": (forged({n: t for n, t in A.items() if n != first}), "tensors"),
        "a head": (forged({**A, "classifier.bias": torch.zeros(2)}), "tensors: unknown"),
        "a dtype": (forged({**A, first: A[first].double()}), f"{first}: got dtype"),
        "a number": (forged({**A, first: A[first] / 0.0}), f"{first}: holds NaN"),
    }


def test_an_A_that_does_not_fit_is_refused_and_nothing_is_trained_or_charged(north: North) -> None:
    server = north.server()
    message, round_ = server.frozen_message("north"), server.message(1, "north")
    with closing(north.open(seed=5)) as site:
        with pytest.raises(WireError, match=r"^A: has not come"):
            site.run_round(1, round_)
        for what, (bad, start) in tampered(message, server).items():
            with pytest.raises(WireError) as caught:
                site.run_round(1, round_, frozen=lambda bad=bad: bad)
            assert str(caught.value).startswith(start), what
            assert site.epsilon() == 0.0, what
        assert not [p for p in north.folder.iterdir() if p.name.startswith(("frozen", "update"))]
        # Another A of the server's own making, than the one that the round's message speaks of.
        A = {name: -t for name, t in server.frozen.items()}
        theirs = replace(server.header(wire.FROZEN, 0, "north"), recipe=wire.digest(A))
        with pytest.raises(WireError, match=r"^recipe: got"):
            site.run_round(1, round_, frozen=lambda: wire.encode(theirs, A))
        assert site.epsilon() == 0.0
    frozen_file(north.folder, RUN).unlink()
    with closing(north.open(seed=5)) as site:
        assert site.run_round(1, round_, frozen=lambda: message)


def test_a_site_that_is_opened_again_needs_no_second_sending(north: North, tmp_path: Path) -> None:
    server = north.server()
    message = server.frozen_message("north")
    with closing(north.open(tmp_path / "once", seed=5)) as site:
        for round_ in (1, 2):
            asked = server.message(round_, "north")
            given = (lambda: message) if round_ == 1 else never
            update = site.run_round(round_, asked, frozen=given)
            with closing(north.open(tmp_path / "anew", seed=5)) as again:
                assert_equal(again.run_round(round_, asked, frozen=given), update)
            server.aggregate(round_, ["north"], [("north", update)])
    kept = frozen_file(tmp_path / "anew", RUN)
    assert kept.read_bytes() == message
    other = north.open(tmp_path / "anew", seed=5, run="6f" * 8)
    with closing(other), pytest.raises(WireError, match=r"^A: has not come"):
        # Each run has an A of its own.
        other.run_round(1, b"")
    kept.write_bytes(message[:-1])
    with pytest.raises(ConfigError, match=rf"'north': {kept.name} is damaged .*sent again"):
        north.open(tmp_path / "anew", seed=5)
    kept.unlink()
    north.open(tmp_path / "anew", seed=5).close()


def test_sites_of_one_process_share_what_is_frozen_but_not_A(north: North) -> None:
    server = north.server()
    with closing(north.open(seed=5)) as site:
        message = server.message(1, "north")
        site.run_round(1, message, frozen=lambda: server.frozen_message("north"))
        for (name, mine), (_, theirs) in zip(
            site._model.named_parameters(), north.model.named_parameters(), strict=True
        ):
            shared = mine.data_ptr() == theirs.data_ptr()
            assert shared == (not theirs.requires_grad and not wire.is_adapter(name)), name


def run(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    """The driver's, with noise that repeats and ledgers of its own in `out`."""
    sites = [replace(s, ledger=str(out / f"{s.name}.ledger.jsonl")) for s in config.sites]
    with monkeypatch.context() as patched:
        patched.setattr(driver, "Site", functools.partial(Site, seed=5))
        return driver.run(replace(config, sites=tuple(sites)), out, **more)


def test_A_is_counted_once_for_each_site_and_apart(
    pissa: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pissa["federation"]["codec"] = "int8"
    south, east, _ = pissa["site"]
    south |= {"r": 1}
    east |= {"target_modules": ["value"], "r": 3}
    config = settled(pissa, tmp_path)
    report = run(config, tmp_path / "out", monkeypatch)
    assert not any(entry["refused"] or entry["absent"] for entry in report["rounds"])
    due = {
        "south": 4 * 1 * LAYERS * D_IN,
        "east": 4 * 3 * LAYERS // 2 * D_IN,
        "north": 4 * R * LAYERS * D_IN,
    }
    first, second = report["rounds"]
    for name, values in due.items():
        (kept,) = (tmp_path / "out" / "sites" / name).glob("frozen-*")
        size = wire.measure(kept.read_bytes())
        assert size == wire.Size(header=size.header, frozen=values)
        assert report["sites"][name]["frozen_bytes_down"] == values
        assert first["sites"][name]["frozen_bytes_down"] == values
        assert second["sites"][name]["frozen_bytes_down"] == 0
        more = first["sites"][name]["bytes_down"] - second["sites"][name]["bytes_down"]
        # The header's entries may change their order, not their length.
        assert more == size.total
    assert report["frozen_bytes_down"] == sum(due.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    table = (tmp_path / "out" / "report.md").read_text()
    assert f"| of these A, which is sent once | {sum(due.values()):,} |" in table
    assert "bytes up | A, bytes down |" in table and f"| {due['east']:,} |" in table


def test_a_weak_site_has_the_first_rows_of_its_layers(
    pissa: dict[str, Any], tmp_path: Path
) -> None:
    pissa["site"][1] |= {"target_modules": ["value"], "r": 3}
    config = settled(pissa, tmp_path)
    whole, _ = build(config)
    server = driver.make_server(config, whole, RUN)
    small, _ = build(config, site_of(config, "east"))
    like = wire.frozen_A(small)
    assert len(like) == LAYERS // 2 and all(name.endswith("value.lora_A") for name in like)
    received = wire.decode(
        server.frozen_message("east"), server.header(wire.FROZEN, 0, "east"), like
    )
    for name, A in wire.frozen_A(whole).items():
        weight = whole.get_submodule(name.removesuffix(".lora_A")).weight
        assert torch.equal(A, pissa_A(weight, R))
        if name in like:
            assert torch.equal(received[name], A[:3])
            like[name].copy_(received[name])
    assert wire.fingerprint(small).recipe == server.header("global", 1, "east").recipe
    # Which is not that of another site, nor may it be taken for it.
    with pytest.raises(WireError, match="site"):
        wire.decode(server.frozen_message("north"), server.header(wire.FROZEN, 0, "east"), like)


@pytest.mark.parametrize(
    ("method", "init"),
    [("ffa", "orthogonal"), ("ffa", "kaiming"), ("ffa", "gaussian"), ("lora", "pissa")],
)
def test_no_byte_of_any_other_A_is_sent(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    init: str,
) -> None:
    document["federation"] |= {"method": method, "rounds": 1, "local_steps": 1}
    document["model"]["init"] = init
    document["privacy"] |= {"new_ledger": True, "target_epsilon": float("inf")}
    monkeypatch.setattr(Server, "frozen_message", never)
    report = run(settled(document, tmp_path), tmp_path / "out", monkeypatch)
    (entry,) = report["rounds"]
    assert report["frozen_bytes_down"] == 0 and not entry["absent"]
    for sites in (report["sites"], entry["sites"]):
        assert all(of_site["frozen_bytes_down"] == 0 for of_site in sites.values())
    assert not list((tmp_path / "out").rglob("frozen-*"))


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_goes_on_keeps_the_A_that_it_began_with(
    pissa: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    pissa["federation"] |= {"min_updates": 3, "attempts": 1}
    pissa["site"][1] |= {"r": 2}
    config = settled(pissa, tmp_path)
    whole = run(config, tmp_path / "whole", monkeypatch)
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(FederationError):
        failing(patched, lambda name, round_, _: (name, round_) == ("south", 2))
        run(config, out, monkeypatch)
    if lost:
        # Only who has still to train needs it.
        for path in out.glob("sites/*/frozen-*"):
            path.unlink()
    monkeypatch.setattr(building, "pissa_A", of_another_machine)
    again = run(config, out, monkeypatch, resume=True)
    a, b = ((o / "trained.safetensors").read_bytes() for o in (tmp_path / "whole", out))
    assert_equal(a, b)
    assert header_of(a)["recipe"] == header_of(b)["recipe"]
    assert again["accuracy"] == whole["accuracy"]
    more = whole["sites"]["south"]["frozen_bytes_down"] if lost else 0
    assert again["rounds"][1]["sites"]["south"]["frozen_bytes_down"] == more
    assert again["frozen_bytes_down"] == whole["frozen_bytes_down"] + more


def test_a_server_takes_over_no_A_that_is_not_the_state_s(north: North) -> None:
    server, other = north.server(), north.server()
    state = server.state({})
    held = safetensors.load(state)
    told = header_of(state)
    name = next(key for key in held if key.startswith("frozen."))
    for changed, match in (
        ({**held, name: -held[name]}, "another base or A"),
        ({k: t for k, t in held.items() if k != name}, "another base or A"),
    ):
        with pytest.raises(ConfigError, match=match):
            other.restore(safetensors.save(changed, metadata=told))
    derived = Server(server.tensors, Fingerprint(told["base"], told["recipe"]), RUN)
    with pytest.raises(ConfigError, match="has other tensors"):
        derived.restore(state)
    other.frozen = {n: -A for n, A in other.frozen.items()}
    other.restore(state)
    for key, A in server.frozen.items():
        assert torch.equal(other.frozen[key], A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_A_comes_with_the_bits_that_it_was_made_with(dtype: torch.dtype) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
        return convert(model, r=3, target_modules=["0", "1"], init="gaussian")

    here, there = adapted(), adapted()
    building.derive_A(here)
    prints = wire.fingerprint(here)
    header = Header(wire.FROZEN, RUN, 0, "north", prints.base, prints.recipe)
    message = wire.encode(header, wire.frozen_A(here))
    like = wire.frozen_A(there)
    received = wire.decode(message, replace(header, recipe="unknown"), like)
    for name, A in like.items():
        A.copy_(received[name])
    assert wire.fingerprint(there) == prints
    assert wire.measure(message).frozen == 4 * 3 * (6 + 5)
