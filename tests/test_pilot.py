"""The pilot: a grid on stand-in records, made once, and what it says."""

import json
import math
import tomllib
from pathlib import Path

import pytest
import torch

from ffa_kernels.cli import main
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.federated import data, driver, pilot
from ffa_kernels.federated.config import load, parse
from ffa_kernels.privacy.ledger import read_account

pytest.importorskip("transformers")
pytest.importorskip("tomli_w")


def make_bert(folder):
    """A random two-layer BERT that knows the words of synthetic records."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = sorted({word for text in data.synthetic(500, 2, 0).texts for word in text.split()})
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(vocabulary), "intermediate_size": 48, "initializer_range": 0.3}
    config = BertConfig(**sizes)
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture
def document(tmp_path):
    """Two sites of their own records, and a pilot of two settings with two seeds."""
    make_bert(tmp_path / "bert")
    for name in ("east", "west"):
        records = data.synthetic(80, 2, seed=name)
        rows = zip(records.texts, records.labels, strict=True)
        lines = [json.dumps({"text": t, "label": y}) + "\n" for t, y in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "federation": {"rounds": 2, "local_steps": 2, "eval_records_per_site": 10},
        "model": {"kind": "bert", "r": 2, "max_length": 16},
        "privacy": {"target_epsilon": 8.0, "target_delta": 1e-3, "accountant": "rdp"},
        "train": {"batch_size": 16, "optimizer": "sgd", "lr": 0.1},
        "data": {"source": "files", "min_records": 16},
        "pilot": {
            "records_per_site": 60,
            "sites": 2,
            "seeds": [0, 1],
            "lr": [0.1, 1],
        },
        "site": [{"name": name, "train": f"{name}.jsonl"} for name in ("east", "west")],
    }


def test_a_pilot_is_resumable_and_touches_no_ones_records(document, tmp_path, monkeypatch):
    config = parse(document, tmp_path)
    assert len(pilot.trials(config)) == len({t.key for t in pilot.trials(config)}) == 4
    made, real = [], driver.run

    def counted(settings, *args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(settings)
        return real(settings, *args, **options)

    monkeypatch.setattr(driver, "run", counted)
    out = tmp_path / "pilot"
    with pytest.raises(KeyboardInterrupt):
        pilot.run(config, out)
    # As a process leaves it that is killed while it writes.
    with (out / "trials.jsonl").open("a") as log:
        log.write('\n{"of": "')
    monkeypatch.setattr(driver, "run", real)
    result = pilot.run(config, out)
    lines = [line for line in (out / "trials.jsonl").read_text().splitlines() if line]
    assert len(lines) == 4 + 1 and made[0].sites == ()
    assert not list(tmp_path.glob("*.ledger.jsonl"))
    assert [s["runs"] for s in result["settings"]] == [2] * 2
    assert set(result["sensitivity"]) == {"lr"}
    monkeypatch.setattr(driver, "run", lambda *a, **k: 1 / 0)
    assert pilot.run(config, out) == result
    text = (out / "pilot.md").read_text()
    assert "nothing was released of anyone's records" in text and "To go on with" in text
    assert (out / "pilot.png").read_bytes().startswith(b"\x89PNG")


def test_the_recommendation_is_a_configuration_that_runs(document, tmp_path):
    document["pilot"] |= {"seeds": [0], "target_epsilon": [8.0, math.inf]}
    config = parse(document, tmp_path)
    out = tmp_path / "pilot"
    result = pilot.run(config, out)
    best = result["recommended"]
    fitting = [s for s in result["settings"] if s["knobs"]["target_epsilon"] <= 8.0]
    assert best["accuracy"] == max(s["accuracy"] for s in fitting) and best in fitting
    settled = load(out / "recommended.toml")
    assert settled.train.lr == best["knobs"]["lr"] and settled.privacy.target_epsilon == 8.0
    assert [site.name for site in settled.sites] == ["east", "west"]
    assert "pilot" not in tomllib.loads((out / "recommended.toml").read_text())
    assert driver.run(settled, tmp_path / "run")["epsilon"] <= 8.0


def test_trials_on_own_records_are_charged_to_their_ledgers(document, tmp_path):
    document["pilot"] |= {"records": "own", "target_epsilon": [2.0], "seeds": [0]}
    config = parse(document, tmp_path)
    result = pilot.run(config, tmp_path / "pilot")
    accounts = [read_account(Path(site.ledger)) for site in config.sites]
    for account in accounts:
        # Each trial at the noise that it would have alone.
        noises = [noise for noise, _, _ in account.history]
        assert account.steps == 2 * 4 and max(noises) < 1.01 * min(noises)
        assert 2.0 < account.epsilon(1e-3, "rdp") < 4.0
    told = max(s["epsilon"] for s in result["settings"])
    assert told == pytest.approx(max(a.epsilon(1e-3, "rdp") for a in accounts), rel=1e-6)
    text = (tmp_path / "pilot" / "pilot.md").read_text()
    assert "epsilon is the total of their ledgers" in text
    # And what they have spent is spent.
    document["privacy"]["target_epsilon"] = 1.5
    with pytest.raises(PrivacyError, match="already spent"):
        driver.run(parse(document, tmp_path), tmp_path / "after")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": []}, r"\[pilot\] lr: got \[\]; accepted: a list of numbers from 1e-9 to 1e9"),
        ({"lr": [0.1, -1.0]}, r"\[pilot\] lr: got"),
        ({"seeds": [True]}, r"\[pilot\] seeds: got"),
        ({"init": ["random"]}, r"\[pilot\] init: got \['random'\]"),
        ({"records": "file"}, r"\[pilot\] path: got None with records = 'file'"),
        ({"records": "none"}, r"\[pilot\] records: got 'none'"),
        ({"lr": [0.1, 0.1]}, r"\[pilot\] lr: got \[0.1, 0.1\]; accepted: .*, none twice"),
        ({"seeds": [0, 1, 0]}, r"\[pilot\] seeds: got .*, none twice"),
    ],
)
def test_bad_pilots(document, tmp_path, changes, message):
    document["pilot"] |= changes
    with pytest.raises(ConfigError, match=message):
        parse(document, tmp_path)


def test_own_records_are_those_that_have_ledgers(document, tmp_path):
    document["pilot"] |= {"records": "own"}
    document["data"] |= {"split": "iid", "sites": 2}
    document["privacy"]["new_ledger"] = True
    with pytest.raises(ConfigError, match=r"\[pilot\] records: got 'own' with .* split = 'iid'"):
        parse(document, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pilot": {"r": [2, 64]}}, "64 orthonormal rows do not fit"),
        ({"pilot": {"method": ["ffa", "lora"]}, "model": {"base_dtype": "bf16"}}, "base_dtype"),
    ],
)
def test_what_a_later_trial_would_fail_of_is_said_first(
    document, tmp_path, monkeypatch, changes, message
):
    for table, values in changes.items():
        document[table] |= values
    monkeypatch.setattr(driver, "run", lambda *a, **k: 1 / 0)
    with pytest.raises(ConfigError, match=message):
        pilot.run(parse(document, tmp_path), tmp_path / "pilot")


def test_a_pilot_of_fewer_sites_than_a_round_needs(document, tmp_path, monkeypatch):
    """Its stand-ins are few; they are not the federation's sites."""
    document["federation"]["min_updates"] = 3
    document["pilot"] |= {"seeds": [0], "lr": [0.1]}
    asked, real = [], driver.run
    monkeypatch.setattr(driver, "run", lambda c, *a, **k: asked.append(c) or real(c, *a, **k))
    pilot.run(parse(document, tmp_path), tmp_path / "pilot")
    assert asked[0].federation.min_updates == 2


def test_a_public_file_must_have_enough(document, tmp_path):
    document["pilot"] |= {"records": "file", "path": "east.jsonl", "records_per_site": 41}
    with pytest.raises(ConfigError, match=r"got 80 records; accepted: 82 or more"):
        pilot.run(parse(document, tmp_path), tmp_path / "pilot")


def test_the_command(document, tmp_path, capsys):
    import tomli_w

    document["pilot"] |= {"lr": [0.1], "target_epsilon": [8.0], "seeds": [0]}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(document))
    assert main(["pilot", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]) == 0
    assert "accuracy 0." in capsys.readouterr().out
