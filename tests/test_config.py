"""A configuration is read strictly: each mistake is named, with what is accepted."""

from __future__ import annotations

import copy
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated.config import load, parse

DEMO = Path(__file__).parent.parent / "ffa_kernels" / "federated" / "demo.toml"

MINIMAL = """
[federation]
rounds = 3
local_steps = 2
[privacy]
target_epsilon = 6
target_delta = 1e-5
[train]
batch_size = 16
lr = 0.1
[data]
source = "files"
[[site]]
name = "north"
train = "north.jsonl"
[[site]]
name = "south"
train = "south.csv"
test = "south-test.csv"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("north.jsonl", "south.csv", "south-test.csv", "demo.tar.gz"):
        (tmp_path / name).touch()
    return tmp_path


def changed(where: str, key: str, value: Any) -> dict[str, Any]:
    """The minimal document with one key set, or removed where the value is None."""
    document = tomllib.loads(MINIMAL)
    table = document["site"][0] if where == "site" else document.setdefault(where, {})
    if value is None:
        del table[key]
    else:
        table[key] = value
    return document


def test_a_minimal_file_has_the_documented_defaults(folder: Path) -> None:
    path = folder / "config.toml"
    path.write_text(MINIMAL)
    config = load(path)
    assert config.federation.method == "ffa" and config.federation.sites_per_round is None
    assert config.federation.eval_records_per_site == 100
    assert config.model.target_modules == ("query", "value") and config.model.r == 8
    assert config.privacy.target_epsilon == 6.0 and type(config.privacy.target_epsilon) is float
    assert [site.name for site in config.sites] == ["north", "south"]


def test_paths_are_relative_to_the_file_not_to_the_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = load(folder / "config.toml")
    assert config.sites[0].train == str(folder / "north.jsonl")
    assert config.sites[1].test == str(folder / "south-test.csv")


@pytest.mark.parametrize(
    ("where", "key", "near"),
    [
        ("federation", "round", "rounds"),
        ("privacy", "target_epsilom", "target_epsilon"),
        ("train", "batchsize", "batch_size"),
        ("model", "target_module", "target_modules"),
        ("data", "test_fractoin", "test_fraction"),
        ("site", "nam", "name"),
    ],
)
def test_a_misspelt_key_is_named_with_its_table_and_the_near_name(
    folder: Path, where: str, key: str, near: str
) -> None:
    table = r"\[\[site\]\]" if where == "site" else rf"\[{where}\]"
    with pytest.raises(ConfigError, match=rf"{table}.*'{key}'.*did you mean '{near}'"):
        parse(changed(where, key, 1), folder)


def test_a_misspelt_table_is_named_with_the_near_name(folder: Path) -> None:
    document = tomllib.loads(MINIMAL)
    document["federatoin"] = document.pop("federation")
    with pytest.raises(ConfigError, match=r"'federatoin'.*did you mean 'federation'"):
        parse(document, folder)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("federation", "rounds", 0),
        ("federation", "rounds", 2.0),
        ("federation", "rounds", True),
        ("federation", "method", "fedprox"),
        ("federation", "seed", -1),
        ("model", "r", 0),
        ("model", "alpha", "16"),
        ("model", "target_modules", []),
        ("model", "target_modules", "query"),
        ("model", "target_modules", [1]),
        ("model", "dropout", 1.0),
        ("model", "init", "zeros"),
        ("privacy", "target_epsilon", 0),
        ("privacy", "target_epsilon", math.nan),
        ("privacy", "target_delta", 1.0),
        ("privacy", "max_grad_norm", math.inf),
        ("privacy", "accountant", "gdp"),
        ("train", "batch_size", 1.5),
        ("train", "lr", -0.1),
        ("train", "lr", 1e308),
        ("train", "head_lr", 5e-324),
        ("train", "weight_decay", 1e308),
        ("federation", "server_lr", 1e308),
        ("privacy", "max_grad_norm", 5e-324),
        ("train", "optimizer", "lamb"),
        ("data", "test_fraction", 0.0),
        ("data", "split", "random"),
        ("site", "name", "../north"),
        ("site", "name", ".."),
        ("site", "name", ""),
        ("site", "train", "nowhere.jsonl"),
        ("site", "test", "nowhere.jsonl"),
        ("model", "kind", "no-such-folder"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_given(
    folder: Path, where: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(where, key, value), folder)
    message = str(caught.value)
    assert key in message and repr(value) in message and "accepted" in message


@pytest.mark.parametrize(
    ("where", "key"),
    [("federation", "rounds"), ("privacy", "target_delta"), ("train", "lr"), ("site", "train")],
)
def test_a_missing_key_is_named(folder: Path, where: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: missing; accepted"):
        parse(changed(where, key, None), folder)


@pytest.mark.parametrize(
    ("where", "key", "value", "named"),
    [
        ("site", "name", "south", "'south' is given twice"),
        ("data", "source", "demo", "beside"),
        ("data", "path", "demo.tar.gz", "path"),
        ("data", "split", "iid", "sites"),
        ("data", "sites", 3, "sites"),
        ("data", "dirichlet_alpha", 0.5, "dirichlet_alpha"),
        ("train", "momentum", 0.9, "momentum"),
        ("train", "sample_rate", 0.1, "one of the two"),
        ("train", "batch_size", None, "one of the two"),
    ],
)
def test_keys_that_do_not_fit_together(
    folder: Path, where: str, key: str, value: Any, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(changed(where, key, value), folder)


def dealt_out() -> dict[str, Any]:
    """The minimal document, its files dealt out over two sites."""
    document = tomllib.loads(MINIMAL)
    del document["site"][1]["test"]
    document["data"] |= {"split": "iid", "sites": 2}
    document["privacy"]["new_ledger"] = True
    return document


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("test", "south-test.csv"), ("ledger", "north.ledger"), ("weight", 1.0), ("r", 2)),
        *(("target_modules", ["query"]), ("max_physical_batch_size", 4), ("memory", "1GiB")),
        *(("device", "cuda"), ("dtype", "bf16")),
    ],
)
def test_what_a_site_has_of_its_own_cannot_go_with_a_split_that_pools(
    folder: Path, key: str, value: Any
) -> None:
    document = dealt_out()
    config = parse(document, folder)
    assert config.data.sites == 2 and {site.ledger for site in config.sites} == {None}
    document["site"][0][key] = value
    with pytest.raises(ConfigError, match=rf"\[\[site\]\] {key}: got one with split = 'iid'"):
        parse(document, folder)


def test_files_are_dealt_out_only_where_their_records_are_counted_elsewhere(folder: Path) -> None:
    document = dealt_out()
    document["privacy"]["new_ledger"] = False
    with pytest.raises(ConfigError, match=r"\[privacy\] new_ledger: got false.*not counted over"):
        parse(document, folder)


def test_parts_that_are_dealt_out_have_no_declared_weights(folder: Path) -> None:
    document = dealt_out()
    document["federation"]["weights"] = "declared"
    for site in document["site"]:
        site["weight"] = 1.0
    with pytest.raises(ConfigError, match=r"weights: got 'declared' with split = 'iid'"):
        parse(document, folder)


def test_one_site_table_in_place_of_a_list(folder: Path) -> None:
    document = tomllib.loads(MINIMAL)
    document["site"] = document["site"][0]
    with pytest.raises(ConfigError, match=r"\[\[site\]\], once for each"):
        parse(document, folder)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[federation\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="not TOML in UTF-8"):
        load(tmp_path / "latin.toml")


def test_the_document_is_not_changed_by_parsing(folder: Path) -> None:
    document = tomllib.loads(MINIMAL)
    before = copy.deepcopy(document)
    parse(document, folder)
    assert document == before


def test_the_demo_asks_for_what_the_library_promises(folder: Path) -> None:
    document = tomllib.loads(DEMO.read_text())
    document["data"]["path"] = "demo.tar.gz"
    config = parse(document, folder)
    assert config.federation.method == "ffa" and config.model.kind == "minilm"
    assert config.privacy.target_epsilon == 6.0 and config.privacy.target_delta == 1e-5
    assert config.data.split == "natural"
