"""The account on disk: over processes, crashes, damage and forks."""

import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ffa_kernels import cli
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError, LedgerError, PrivacyError
from ffa_kernels.privacy import Ledger, PrivacyEngine, registry
from ffa_kernels.privacy import ledger as ledger_module

ROOT = Path(__file__).parents[1]
DELTA = 1e-5


def run_python(source, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def written(path, *charges):
    ledger = Ledger(path)
    for charge in charges:
        ledger.charge(*charge)
    ledger.close()
    return path.read_bytes()


def history_of(path):
    ledger = Ledger(path)
    try:
        return ledger.history, ledger.private
    finally:
        ledger.close()


def prepared(engine, optimizer=torch.optim.SGD, options=(("lr", 0.1),), **arguments):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return engine.make_private(
        module=model,
        optimizer=optimizer(model.parameters(), **dict(options)),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=10),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        **arguments,
    )


def train(model, optimizer, loader):
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()


# Going on.


def test_a_reopened_ledger_goes_on_counting(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    for run in (1, 2, 3):
        engine = PrivacyEngine(accountant="rdp", ledger=path)
        train(*prepared(engine))
        assert engine.ledger.history == [(2.0, 0.25, 4 * run)]
        engine.ledger.close()
    assert len(path.read_bytes().splitlines()) == 2 + 12


def train_to(target, path):
    """Two epochs at the noise that keeps the ledger's total within `target`."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    engine = PrivacyEngine(accountant="rdp", ledger=path)
    try:
        private = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=10),
            target_epsilon=target,
            target_delta=DELTA,
            epochs=2,
            max_grad_norm=1.0,
        )
        for _ in range(2):
            train(*private)
        return engine.get_epsilon(DELTA)
    finally:
        engine.ledger.close()


def test_what_another_process_has_spent_is_spent(tmp_path):
    path = tmp_path / "ledger.jsonl"
    source = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_ledger import train_to
        print(train_to(2.0, Path(sys.argv[1])))
    """
    first = run_python(source, path, Path(__file__).parent)
    assert first.returncode == 0, first.stderr
    assert 1.95 < float(first.stdout) <= 2.0
    with pytest.raises(PrivacyError, match="already spent"):
        train_to(1.9, path)
    assert 2.95 < train_to(3.0, path) <= 3.0
    history, private = history_of(path)
    assert private and [steps for _, _, steps in history] == [8, 8]


def test_in_memory_ledgers_keep_the_same_account():
    engine = PrivacyEngine(accountant="rdp")
    train(*prepared(engine))
    assert engine.ledger.path is None and engine.ledger.history == [(2.0, 0.25, 4)]
    other = PrivacyEngine(accountant="rdp", ledger=engine.ledger)
    train(*prepared(other))
    assert other.get_epsilon(DELTA) == engine.get_epsilon(DELTA)
    assert engine.ledger.history == [(2.0, 0.25, 8)]


def test_a_seeded_step_marks_the_ledger_for_good(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.warns(UserWarning, match="seed"):
        engine = PrivacyEngine(seed=1, ledger=path)
    train(*prepared(engine))
    assert engine.get_epsilon(DELTA) == math.inf
    engine.ledger.close()
    honest = PrivacyEngine(ledger=path)
    train(*prepared(honest))
    assert not honest.ledger.private and honest.get_epsilon(DELTA) == math.inf
    honest.ledger.close()


# Charged before anything is released.


def sizes_at_update(path, monkeypatch):
    """The ledger's size on disk at each moment that an op which releases is entered."""
    from ffa_kernels.privacy import step as step_module

    sizes, synced, fsync = [], [], os.fsync

    def noted(file):
        fsync(file)
        synced.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", noted)

    def watch(op):
        def watched(*arguments, **options):
            # Not in the system's memory alone.
            assert synced[-1] == path.stat().st_size
            sizes.append(len(path.read_bytes().splitlines()))
            return op(*arguments, **options)

        return watched

    # A draw of one physical batch is released by the second, any other by the first.
    for name in ("private_update", "private_step"):
        monkeypatch.setattr(step_module.ops, name, watch(getattr(step_module.ops, name)))
    return sizes


def test_the_charge_is_on_disk_when_the_update_begins(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    sizes = sizes_at_update(path, monkeypatch)
    engine = PrivacyEngine(ledger=path)
    train(*prepared(engine))
    assert sizes == [3, 4, 5, 6]
    engine.ledger.close()


def fail_in_the_middle(optimizer):
    """Makes the second tensor's momentum unusable: the update fails, in op or check."""
    _, bias = optimizer.private_step.trained
    optimizer.state[bias.parameter]["momentum_buffer"] = torch.zeros(7)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_failed_update_is_charged_and_draws_other_noise_after(tmp_path, backend):
    path = tmp_path / "ledger.jsonl"
    engine = PrivacyEngine(ledger=path)
    momentum = (("lr", 0.1), ("momentum", 0.9))
    try:
        with use_backend(backend):
            model, optimizer, loader = prepared(engine, options=momentum)
            batches = iter(loader)
            (x,) = next(batches)
            model(x).square().mean().backward()
            fail_in_the_middle(optimizer)
            drawn = int(engine._noise.state[4])
            with pytest.raises((ValueError, RuntimeError)):
                optimizer.step()
            assert len(path.read_bytes().splitlines()) == 3
            # What it may have shown must not be drawn again for another sum.
            assert int(engine._noise.state[4]) == drawn + 1
            with pytest.raises(PrivacyError, match="without a batch"):
                optimizer.step()
    finally:
        engine.ledger.close()
    assert history_of(path) == ([(2.0, 0.25, 1)], True)


def test_nothing_is_released_when_the_charge_fails(tmp_path):
    engine = PrivacyEngine(ledger=tmp_path / "ledger.jsonl")
    model, optimizer, loader = prepared(engine)
    before = copy.deepcopy(model.state_dict())
    (x,) = next(iter(loader))
    model(x).square().mean().backward()
    engine.ledger.close()
    with pytest.raises((LedgerError, ValueError)):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert engine.stats["steps"] == 0


def test_a_killed_process_has_charged_what_it_released(tmp_path):
    path = tmp_path / "ledger.jsonl"
    source = """
        import sys, torch
        from torch.utils.data import DataLoader, TensorDataset
        from ffa_kernels.privacy import PrivacyEngine

        engine = PrivacyEngine(ledger=sys.argv[1])
        model = torch.nn.Linear(3, 2)
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=10),
            noise_multiplier=2.0, max_grad_norm=1.0,
        )
        while True:
            for (x,) in loader:
                model(x).square().mean().backward()
                optimizer.step()
                print("released", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    released = [process.stdout.readline() for _ in range(7)]
    process.send_signal(signal.SIGKILL)
    released += process.stdout.readlines()
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    count = sum(line == "released\n" for line in released)
    ((_, _, steps),), _ = history_of(path)
    assert count >= 7 and steps >= count


# Damage.


def test_a_torn_last_line_counts_as_another_step(tmp_path):
    path = tmp_path / "ledger.jsonl"
    charges = [(1.0, 0.5), (2.0, 0.25)]
    whole = written(path, *charges)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    before = len(whole[:start])
    for end in range(before, len(whole)):
        path.write_bytes(whole[:end])
        history, private = history_of(path)
        torn = before < end < len(whole) - 1
        expected = {(1.0, 0.5): 2 if torn else 1}
        if end == len(whole) - 1:
            # Only its newline is missing: what it says is known, and counts.
            expected[(2.0, 0.25)] = 1
        assert {(s, q): n for s, q, n in history} == expected and private
        # It has been repaired: the next process reads the same.
        assert history_of(path)[0] == history
        assert path.read_bytes().endswith(b"\n")


def test_a_torn_first_line_is_begun_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    header = written(path)
    for end in range(len(header) + 1):
        path.write_bytes(header[:end])
        assert history_of(path) == ([], True)
        assert path.read_bytes() == header


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = written(path, (1.0, 0.5), (2.0, 0.25), (0.5, 1.0, 3))
    truth = history_of(path)
    refused = 0
    for position in range(len(whole)):
        for mask in (0x01, 0x20, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            try:
                assert history_of(path) == truth, (position, mask)
            except LedgerError as error:
                assert str(path) in str(error)
                assert path.read_bytes() == damaged
                refused += 1
    assert refused > 0.95 * 3 * len(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[0], lines[2], lines[1], lines[3]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], b"[]", *lines[1:]],
        lambda lines: [lines[0], b"[" * 100_000, *lines[1:]],
        lambda lines: [lines[0], b"", *lines[1:]],
        lambda lines: [b"\xff\xfe" + lines[0], *lines[1:]],
    ],
)
def test_lines_taken_out_moved_or_repeated_are_refused(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    whole = written(path, (1.0, 0.5), (2.0, 0.25), (0.5, 1.0))
    damaged = b"\n".join(change(whole.splitlines())) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(LedgerError, match=r"line \d"):
        Ledger(path)
    assert path.read_bytes() == damaged
    # A refusal gives the lock back.
    path.write_bytes(whole)
    assert len(history_of(path)[0]) == 3


def test_a_file_that_is_something_else_is_not_touched(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("my notes\nnot yours\n", "a note of one line", "\0" * 40):
        path.write_text(text)
        with pytest.raises(LedgerError, match="line 1"):
            Ledger(path)
        assert path.read_text() == text


@pytest.mark.parametrize(
    "charge",
    [
        *((-1.0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1.0, 0.0), (1.0, 1.5), (1.0, 0.5, 0)),
        *((1.0, 0.5, 2.9), (1.0, 0.5, math.inf), ("1", 0.5), (1.0, None)),
    ],
)
def test_charges_that_make_no_sense_are_refused(tmp_path, charge):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    size = path.stat().st_size
    with pytest.raises(LedgerError, match="accepted"):
        ledger.charge(*charge)
    assert path.stat().st_size == size and ledger.history == []
    ledger.close()


def test_lines_are_plain_json(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(line) for line in written(path, (1.0, 0.5, 3)).splitlines()]
    assert lines[0]["format"] == 2
    assert {k: v for k, v in lines[1].items() if k != "checksum"} == {
        "noise_multiplier": 1.0,
        "sample_rate": 0.5,
        "steps": 3,
        "private": True,
    }


@pytest.mark.parametrize(
    "record",
    [
        {"noise_multiplier": "1", "sample_rate": 0.5, "steps": 1, "private": True},
        {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": -3, "private": True},
        {"noise_multiplier": 1.0, "sample_rate": 0.5, "private": True},
        {"steps": 1},
        {"delta": "small"},
        {"delta": 2.0},
        {"accountant": "gdp"},
        {"data": ""},
        {"format": 2},
        {},
    ],
)
def test_a_line_with_a_right_checksum_must_still_make_sense(tmp_path, record):
    path = tmp_path / "ledger.jsonl"
    whole = written(path, (1.0, 0.5))
    last = json.loads(whole.splitlines()[-1])["checksum"]
    line = json.dumps({**record, "checksum": ledger_module._checksum(last, record)})
    path.write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(LedgerError, match=r"line 3: .*; accepted"):
        Ledger(path)


def test_a_second_binding_line_binds_to_nothing_else(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.bind(data="these", delta=DELTA)
    ledger.close()
    whole = path.read_bytes()
    last = json.loads(whole.splitlines()[-1])["checksum"]
    record = {"accountant": "rdp", "delta": 1e-3}
    line = json.dumps({**record, "checksum": ledger_module._checksum(last, record)})
    path.write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(LedgerError, match=r"line 3: .*is bound before"):
        Ledger(path)


def test_many_different_charges_open_in_time_that_grows_with_them(tmp_path):
    charges = [(1.0 + i / 2**20, 0.5) for i in range(20000)]
    path, lines, last = tmp_path / "ledger.jsonl", [], ""
    for record in [{"format": 2}] + [
        {"noise_multiplier": noise, "sample_rate": rate, "steps": 1, "private": True}
        for noise, rate in charges
    ]:
        lines.append(ledger_module._line(record, last))
        last = json.loads(lines[-1])["checksum"]
    path.write_bytes(b"".join(lines))
    begun = time.perf_counter()
    assert Ledger(path).history == [(*charge, 1) for charge in charges]
    assert time.perf_counter() - begun < 5


def test_a_path_that_cannot_be_is_refused(tmp_path):
    for opened in (Ledger, ledger_module.read_account):
        with pytest.raises(LedgerError, match=r"NUL|null byte"):
            opened(f"{tmp_path}/a\0b")


# A file that is not as it was left.


@pytest.mark.parametrize("change", ["deleted", "replaced", "cut", "appended"])
def test_nothing_is_charged_to_a_file_that_changed_under_the_ledger(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge(1.0, 0.5)
    content = path.read_bytes()
    if change == "deleted":
        path.unlink()
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(content)
        other.replace(path)
    elif change == "cut":
        os.truncate(path, len(content) - len(content.splitlines(keepends=True)[-1]))
    else:
        with path.open("ab") as file:
            file.write(b" ")
    with pytest.raises(LedgerError, match=r"moved, deleted or replaced|something else has written"):
        ledger.charge(1.0, 0.5)
    assert ledger.steps == 1
    ledger.close()


def test_a_write_that_fails_halfway_ends_the_ledger_and_is_repaired(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge(1.0, 0.5)
    write, room = os.write, [10]

    def disk_full(file, octets):
        if not room:
            raise OSError(28, "No space left on device")
        return write(file, octets[: room.pop()])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk_full)
        with pytest.raises(LedgerError, match=r"cannot be written .No space"):
            ledger.charge(1.0, 0.5)
    assert ledger.steps == 1
    # There is space again, but after half a line no whole one may follow.
    with pytest.raises(LedgerError, match="a write to it failed; open it anew"):
        ledger.charge(1.0, 0.5)
    ledger.close()
    assert history_of(path) == ([(1.0, 0.5, 2)], True)


def test_threads_may_charge_one_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: ledger.charge(1.0 + k % 3, 0.5), range(120)))
    assert ledger.steps == 120
    ledger.close()
    history, private = history_of(path)
    assert private and sorted(history) == [(1.0 + k, 0.5, 40) for k in range(3)]


def test_an_interrupt_between_file_and_account_ends_the_ledger(tmp_path, monkeypatch):
    """The file is a step ahead of the process: another line of it would name the wrong one."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge(1.0, 0.5)

    def interrupted(account, record, checksum):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module.Account, "_add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(1.0, 0.5)
    with pytest.raises(LedgerError, match="open it anew"):
        ledger.charge(1.0, 0.5)
    ledger.close()
    assert history_of(path) == ([(1.0, 0.5, 2)], True)


# What an account is of.


def loader_of(seed=0, records=40):
    data = torch.randn(records, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(data), batch_size=10)


def engine_on(path, loader, target_delta=DELTA, **settings):
    engine = PrivacyEngine(**{"accountant": "rdp", "ledger": path, **settings})
    model = nn.Linear(3, 2)
    try:
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=2.0,
            max_grad_norm=1.0,
            target_delta=target_delta,
        )
    finally:
        if isinstance(path, Path):
            engine.ledger.close()
    return engine


def test_an_account_is_of_one_data_set_one_delta_and_one_accountant(tmp_path):
    path = tmp_path / "ledger.jsonl"
    bound = engine_on(path, loader_of()).ledger.bound
    assert bound["delta"] == DELTA and bound["accountant"] == "rdp"
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"its data is 'sha256:.*data_id= if they come"):
        engine_on(path, loader_of(seed=1))
    with pytest.raises(LedgerError, match="its data is"):
        engine_on(path, loader_of(records=41))
    with pytest.raises(LedgerError, match="its delta is 1e-05, but 1e-06 was given"):
        engine_on(path, loader_of(), target_delta=1e-6)
    with pytest.raises(LedgerError, match="its accountant is 'rdp', but 'prv' was given"):
        engine_on(path, loader_of(), accountant="prv")
    # The same records go on, whoever loads them; a delta may be left out.
    assert engine_on(path, loader_of(), target_delta=None).ledger.bound == bound
    assert path.read_bytes() == before


@pytest.mark.parametrize("target_delta", [1 / 40, 0.5, 0.0, 1])
def test_a_delta_that_promises_nothing_is_refused(tmp_path, target_delta):
    with pytest.raises(ConfigError, match=r"target_delta is .*below 1 / 40"):
        engine_on(tmp_path / "ledger.jsonl", loader_of(), target_delta=target_delta)


def test_another_budget_for_the_same_records_takes_a_word(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    engine_on(first, loader_of())
    for path in (second, None):
        with pytest.raises(LedgerError, match=r"have the ledger .*first\.jsonl.*new_ledger=True"):
            engine_on(path, loader_of())
    engine_on(second, loader_of(), new_ledger=True)
    # Said once: from then on these are two accounts of theirs.
    engine_on(second, loader_of())
    engine_on(first, loader_of())
    # Other records need no word, also if they were tried on the wrong ledger before.
    with pytest.raises(LedgerError, match="its data is"):
        engine_on(first, loader_of(seed=2))
    engine_on(tmp_path / "other.jsonl", loader_of(seed=2))


@pytest.mark.parametrize("how", ["deleted", "emptied", "moved"])
def test_a_ledger_that_is_gone_gives_no_fresh_budget(tmp_path, how):
    path = tmp_path / "ledger.jsonl"
    engine_on(path, loader_of())
    content = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    else:
        path.rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(LedgerError, match=r"have the ledger .*ledger\.jsonl, which is gone"):
        engine_on(path, loader_of())
    if how == "moved":
        # There it goes on.
        path.unlink()
        engine_on(tmp_path / "elsewhere.jsonl", loader_of())
    else:
        path.write_bytes(content)
        engine_on(path, loader_of())


def test_a_copy_of_a_ledger_is_no_second_budget(tmp_path):
    path, copied = tmp_path / "ledger.jsonl", tmp_path / "copy.jsonl"
    engine_on(path, loader_of())
    copied.write_bytes(path.read_bytes())
    with pytest.raises(LedgerError, match=r"have the ledger .*ledger\.jsonl"):
        engine_on(copied, loader_of())
    engine_on(path, loader_of())
    (tmp_path / "link.jsonl").symlink_to(path)
    engine_on(tmp_path / "link.jsonl", loader_of())


def test_a_registry_that_was_lost_or_damaged_is_begun_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine_on(path, loader_of())
    registry.registry_path().unlink()
    engine_on(path, loader_of())
    with registry.registry_path().open("ab") as file:
        file.write(b'\xff\n{"data": ')
    engine_on(tmp_path / "other.jsonl", loader_of(seed=1))
    for seed in (0, 1):
        with pytest.raises(LedgerError, match="have the ledger"):
            engine_on(tmp_path / "second.jsonl", loader_of(seed=seed))


def test_records_in_another_form_are_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine_on(path, loader_of(), data_id="visits of 2025")
    engine_on(path, loader_of(seed=3, records=20), data_id="visits of 2025", target_delta=None)
    with pytest.raises(LedgerError, match="its data is 'visits of 2025'"):
        engine_on(path, loader_of())
    with pytest.raises(ConfigError, match="data_id is ''"):
        PrivacyEngine(data_id="")
    # Another name, or none, does not make them other records.
    for name in ("something else", None):
        with pytest.raises(LedgerError, match="have the ledger"):
            engine_on(tmp_path / "second.jsonl", loader_of(), data_id=name)


class Kind(Enum):
    FIRST = 0
    SECOND = 1


class Odd:
    """No value that a digest knows."""

    def __init__(self, value):
        self.value = value


class Rows:
    """Records of one kind each; `noisy` ones differ at each reading."""

    def __init__(self, change=0, noisy=False):
        self.change, self.noisy = change, noisy
        array = np.arange(6.0).reshape(2, 3)
        self.rows = [
            {"text": "a\ud800", "label": 1 + change},
            ("pair", [b"octets", array + change]),
            {"odd": Odd(change), "none": None, "nested": {"t": torch.ones(2) * change}},
            {"kind": Kind(change), "set": {"b", f"a{change}"}, "day": date(2025, 1, 1 + change)},
            np.array(["text", 1.5 + change, None], dtype=object),
            [torch.ones(2, 2).to_sparse() * (1 + change), Decimal(change)],
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return (self.rows[index], torch.rand(1)) if self.noisy else self.rows[index]


def test_a_fingerprint_is_of_what_the_records_hold():
    def of(rows, **settings):
        return registry.fingerprint(DataLoader(rows, batch_size=1, **settings))

    assert of(Rows()) == of(Rows()) == of(Rows(), num_workers=1)
    changed = Rows()
    prints = {of(changed)}
    for k, row in enumerate(Rows(change=1).rows):
        changed.rows[k] = row
        prints.add(of(changed))
    assert len(prints) == 7
    shuffled = Rows()
    shuffled.rows.reverse()
    assert of(shuffled) == of(Rows())
    # Reading draws from no generator of the user's, and augmented records still have one.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert of(Rows(noisy=True)) == of(Rows(noisy=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FFA_LEDGERS", str(tmp_path / "file" / "ledgers"))
    with pytest.warns(UserWarning, match="second ledger for these records will not be noticed"):
        engine_on(tmp_path / "ledger.jsonl", loader_of())


# From the command line.


def command(capsys, *arguments):
    status = cli.main(["ledger", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out + err


def test_show_and_verify_read_a_ledger_in_use(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.bind(data="these", delta=DELTA, accountant="rdp")
    ledger.charge(2.0, 0.25, 3)
    spent = ledger.epsilon()
    status, text = command(capsys, "show", path)
    assert status == 0 and f"epsilon {spent:.6g} at delta 1e-05, by rdp" in text
    assert "3 of noise multiplier 2 at sample rate 0.25" in text and "not private" not in text
    status, text = command(capsys, "show", path, "--json", "--delta", "1e-6")
    shown = json.loads(text)
    assert shown["epsilon"] == ledger.epsilon(1e-6) > spent and shown["steps"] == 3
    assert shown["bound"]["data"] == "these"
    status, text = command(capsys, "verify", path)
    mark = text.split()[-1]
    assert status == 0 and text.startswith("whole: 3 steps")
    ledger.charge(2.0, 0.25, private=False)
    ledger.close()
    assert command(capsys, "verify", path, "--extends", mark)[0] == 0
    assert "not private" in command(capsys, "show", path)[1]
    # A line cut off at its end leaves a whole file: only who has noted more knows.
    mark = command(capsys, "verify", path)[1].split()[-1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert command(capsys, "verify", path)[0] == 0
    status, text = command(capsys, "verify", path, "--extends", mark)
    assert status == 2 and "taken off its end" in text
    path.write_bytes(lines[0] + lines[2])
    status, text = command(capsys, "verify", path)
    assert status == 2 and "line 2: its checksum does not fit" in text
    assert command(capsys, "show", tmp_path / "none")[0] == 2


# One process at a time.


def test_a_second_process_is_kept_out_until_the_first_is_done(tmp_path):
    path = tmp_path / "ledger.jsonl"
    source = """
        import sys
        from ffa_kernels.errors import LedgerError
        from ffa_kernels.privacy import Ledger
        try:
            Ledger(sys.argv[1])
        except LedgerError as error:
            print(error, flush=True)
        sys.stdin.readline()
        ledger = Ledger(sys.argv[1])
        ledger.charge(1.0, 0.5)
        print(ledger.history)
    """
    ledger = Ledger(path)
    ledger.charge(2.0, 0.25)
    with pytest.raises(LedgerError, match="holds it"):
        Ledger(path)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as other:
        assert "holds it" in other.stdout.readline()
        ledger.close()
        answer, _ = other.communicate("now\n", timeout=60)
    assert other.returncode == 0
    assert answer == "[(2.0, 0.25, 1), (1.0, 0.5, 1)]\n"


def in_child(function):
    """The exit status of a forked child that returns `function()`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_forked_child_cannot_charge_nor_release(tmp_path, on_disk):
    path = tmp_path / "ledger.jsonl"
    engine = PrivacyEngine(ledger=path if on_disk else None)
    model, optimizer, loader = prepared(engine)
    (x,) = next(iter(loader))
    before = copy.deepcopy(model.state_dict())

    def release():
        torch.set_num_threads(1)
        try:
            engine.ledger.charge(1.0, 0.5)
            return 2
        except LedgerError:
            pass
        model(x).square().mean().backward()
        try:
            optimizer.step()
            return 3
        except LedgerError:
            same = all(torch.equal(before[n], p) for n, p in model.state_dict().items())
            return 0 if same else 4

    assert in_child(release) == 0
    assert engine.ledger.history == []
    engine.ledger.charge(1.0, 0.5)
    engine.ledger.close()
    if on_disk:
        assert history_of(path) == ([(1.0, 0.5, 1)], True)


def test_closing_gives_the_lock_back_though_a_child_lives_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        ledger.close()
        Ledger(path).close()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_ledgers_are_neither_copied_nor_pickled(tmp_path):
    ledger = Ledger()
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LedgerError):
            action(ledger)
        with pytest.raises(LedgerError):
            action(PrivacyEngine(ledger=ledger))
