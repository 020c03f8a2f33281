"""A site that is opened anew goes on as it was: its noise, its optimizer's state, its budget."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from test_federated import document, settled, tiny_bert  # noqa: F401

from ffa_kernels.errors import ConfigError, LedgerError, PrivacyError
from ffa_kernels.federated import driver
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Train
from ffa_kernels.federated.server import Server
from ffa_kernels.federated.site import Site, build_optimizer
from ffa_kernels.privacy import Ledger, PrivacyEngine

RUN = "5e" * 8
pytestmark = pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated")


class North:
    """One site and the server it trains with."""

    def __init__(self, document: dict[str, Any], tmp_path: Path, **changes: Any) -> None:  # noqa: F811
        self.config = settled(document, tmp_path, **changes)
        self.model, self.tokenizer = build(self.config)
        self.records = driver.load_records(self.config)["north"][0]
        self.folder = tmp_path / "north"

    def server(self) -> Server:
        return driver.make_server(self.config, self.model, RUN)

    def open(self, folder: Path | None = None, seed: int | None = None, run: str = RUN) -> Site:
        parts = (self.records, self.model, self.tokenizer, self.config, run)
        return Site("north", *parts, folder=folder or self.folder, seed=seed)


@pytest.fixture
def north(document: dict[str, Any], tmp_path: Path) -> North:  # noqa: F811
    return North(document, tmp_path)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("ffa", {"optimizer": "adam", "lr": 0.05, "lr_decay": 0.5}),
        ("ffa", {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}),
        ("ffa", {"optimizer": "adamw", "lr": 0.05, "weight_decay": 0.1}),
        ("ffa", {"optimizer": "adam", "lr": 0.05, "smoothing": 0.5}),
        ("alternating", {"optimizer": "adam", "lr": 0.05}),
    ],
)
def test_opened_for_each_round_or_once_it_sends_the_same(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    method: str,
    train: dict[str, Any],
) -> None:
    rounds = {"ffa": 2, "alternating": 4}[method]
    changes: dict[str, Any] = {"train": train, "privacy": {"new_ledger": True}}
    federation = {"method": method, "rounds": rounds}
    north = North(document, tmp_path, federation=federation, **changes)
    server = north.server()
    with closing(north.open(tmp_path / "once", seed=5)) as site:
        for round_ in range(1, rounds + 1):
            update = site.run_round(round_, server.message(round_, "north"))
            with closing(north.open(tmp_path / "anew", seed=5)) as again:
                assert again.noise_multiplier == site.noise_multiplier
                assert_equal(again.run_round(round_, server.message(round_, "north")), update)
            server.aggregate(round_, ["north"], [("north", update)])


def assert_equal(a: bytes, b: bytes) -> None:
    """In every bit of every tensor; the header's entries come in any order."""
    mine, others = safetensors.load(a), safetensors.load(b)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_the_budget_ends_where_it_would_have(north: North) -> None:
    server = north.server()
    for round_ in (1, 2):
        with closing(north.open()) as site:
            server.aggregate(
                *(round_, ["north"]),
                [("north", site.run_round(round_, server.message(round_, "north")))],
            )
            spent = site.epsilon()
    with closing(north.open()) as site:
        assert site.epsilon() == spent <= north.config.privacy.target_epsilon
        kept = north.folder / f"update-{RUN}-0002.safetensors"
        assert site.run_round(2, b"") == kept.read_bytes(), "sent again"
        kept.unlink()
        with pytest.raises(PrivacyError, match="is spent"):
            site.run_round(2, server.message(2, "north"))


@pytest.mark.parametrize("restarted", [True, False])
def test_steps_of_a_round_that_broke_off_come_out_of_the_budget(
    north: North, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """The rounds that are left get more noise, all are trained, and the target holds."""
    server, federation = north.server(), north.config.federation
    site = north.open()
    with monkeypatch.context() as patched:
        patched.setattr(site, "_check_moved", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            site.run_round(1, server.message(1, "north"))
        noise = site.noise_multiplier
    if restarted:
        site.close()
        site = north.open()
    with closing(site):
        for round_ in (1, 2):
            update = site.run_round(round_, server.message(round_, "north"))
            assert site.noise_multiplier > 1.01 * noise
            server.aggregate(round_, ["north"], [("north", update)])
        target = north.config.privacy.target_epsilon
        assert 0.98 * target < site.epsilon() <= target
    ledger = Ledger(north.folder / "ledger.jsonl")
    assert ledger.steps == 3 * federation.local_steps
    ledger.close()


def test_what_else_was_charged_meanwhile_is_made_up_for_with_noise(north: North) -> None:
    with closing(north.open()) as site:
        noise, rate = site.noise_multiplier, site.sample_rate
    ledger = Ledger(north.folder / "ledger.jsonl")
    ledger.charge(0.9 * noise, rate)
    ledger.close()
    server = north.server()
    with closing(north.open()) as site:
        assert site.noise_multiplier > noise
        for round_ in (1, 2):
            site.run_round(round_, server.message(round_, "north"))
        assert site.epsilon() <= north.config.privacy.target_epsilon
    ledger = Ledger(north.folder / "ledger.jsonl")
    ledger.charge(0.9 * noise, rate)
    ledger.close()
    with pytest.raises(PrivacyError, match="'north': "):
        north.open(run="6f" * 8)


@pytest.mark.parametrize("how", ["older", "deleted", "another"])
def test_a_ledger_that_lacks_what_the_run_has_charged_is_refused(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    how: str,
) -> None:
    """Though its records' account may be begun anew: the run's epsilon would be told too small."""
    north = North(document, tmp_path, privacy={"new_ledger": True})
    with closing(north.open()) as site:
        site.run_round(1, north.server().message(1, "north"))
    path = north.folder / "ledger.jsonl"
    whole = path.read_bytes()
    if how == "older":
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    else:
        path.unlink()
    if how == "another":
        north.open(run="6f" * 8).close()
    with pytest.raises(
        LedgerError, match=r"'north': .*no line has the checksum.*accepted: .* held 2 when run 5e"
    ):
        north.open()
    path.write_bytes(whole)
    north.open().close()


def test_a_ledger_that_is_nearly_spent_is_told_of(
    north: North, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(north.open()) as site:
        noise, rate = site.noise_multiplier, site.sample_rate
    assert not caplog.records
    ledger = Ledger(north.folder / "ledger.jsonl")
    ledger.charge(1.001 * noise, rate, steps=4)
    ledger.close()
    with closing(north.open(run="6f" * 8)) as site:
        spent, much = site.epsilon(), site.noise_multiplier
    assert much > 2 * noise
    (record,) = caplog.records
    assert record.getMessage() == (
        f"site 'north': its ledger holds epsilon {spent:.4g} of target_epsilon 8: what is left "
        f"takes noise {much:.3g}, where an empty ledger would take {noise:.3g}"
    )


def test_a_damaged_state_is_named_and_the_ledger_given_back(north: North) -> None:
    north.open().close()
    path = north.folder / f"state-{RUN}.pt"
    whole = path.read_bytes()
    for content in (b"", whole[:-200], b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"'north': its state of run 5e.* is damaged"):
            north.open()
    for key in ("noise_multiplier", "until", "optimizers"):
        state = torch.load(path_of(whole, path), weights_only=True)
        torch.save({k: v for k, v in state.items() if k != key}, path)
        with pytest.raises(ConfigError, match="is damaged"):
            north.open()
    state = torch.load(path_of(whole, path), weights_only=True)
    torch.save({**state, "noise_multiplier": 0.0}, path)
    with closing(north.open()) as site:
        assert site.noise_multiplier == state["noise_multiplier"], "chosen anew"
    path.write_bytes(whole)
    north.open().close()


def path_of(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def test_an_engine_without_a_seed_is_never_given_one() -> None:
    with pytest.raises(PrivacyError, match="the engine has no seed"):
        PrivacyEngine().reseed(1)


def of_north(document: dict[str, Any], **values: Any) -> dict[str, Any]:  # noqa: F811
    sites = [{**s, **(values if s["name"] == "north" else {})} for s in document["site"]]
    return {**document, "site": sites}


def test_a_sites_memory_decides_its_physical_batches(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    north = North(of_north(document, memory="200kB"), tmp_path)
    with closing(north.open()) as site:
        rows: list[int] = []
        site._model.register_forward_pre_hook(
            lambda _, inputs, named: rows.append(len(named["input_ids"])), with_kwargs=True
        )
        site.run_round(1, north.server().message(1, "north"))
        assert 1 <= max(rows) < 16
    with pytest.raises(ConfigError, match=r"site 'north': memory is '50kB', which is too little"):
        North(of_north(document, memory="50kB"), tmp_path).open(tmp_path / "small")


def test_a_site_may_compute_in_bfloat16_and_sends_fp32(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    updates = []
    for dtype in ("fp32", "bf16"):
        # As one set of noise words after the other would have it: a ledger that is seeded.
        north = North(of_north(document, dtype=dtype), tmp_path, privacy={"new_ledger": True})
        with closing(north.open(tmp_path / dtype, seed=3)) as site:
            updates.append(safetensors.load(site.run_round(1, north.server().message(1, "north"))))
    for name, exact in updates[0].items():
        narrow = updates[1][name]
        assert narrow.dtype == torch.float32 and not torch.equal(narrow, exact)
        assert (narrow - exact).norm() < 0.05 * exact.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    north = North(of_north(document, device="cuda:1"), tmp_path)
    with pytest.raises(ConfigError, match=r"device: site 'north' got 'cuda:1'.*accepted: 'cpu'"):
        north.open()
    with pytest.raises(ConfigError, match=r"device: got 'gpu'.*accepted: 'cpu', or a GPU"):
        North(of_north(document, device="gpu"), tmp_path)


def test_smoothing_gives_the_step_a_mean_of_the_gradients_so_far() -> None:
    torch.manual_seed(0)
    share, grads = 0.6, [torch.randn(3, 2) for _ in range(5)]
    train = Train(optimizer="sgd", lr=1.0, smoothing=share, batch_size=1)

    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        model = torch.nn.Module()
        model.lora_B = torch.nn.Parameter(torch.zeros(3, 2))
        return model.lora_B, build_optimizer(model, train)

    (p, optimizer), expected = made(), torch.zeros(3, 2)
    for t, grad in enumerate(grads, start=1):
        if t == 3:
            # Another process goes on.
            held, value = optimizer.state_dict(), p.detach()
            p, optimizer = made()
            optimizer.load_state_dict(held)
            with torch.no_grad():
                p.copy_(value)
        weights = [share**k for k in range(t)]
        mean = sum(w * g for w, g in zip(weights, reversed(grads[:t]), strict=True)) / sum(weights)
        expected = expected - mean
        p.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected)


def test_a_round_that_fails_before_a_step_can_be_tried_again(
    north: North, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = north.server()
    with closing(north.open()) as site:
        with monkeypatch.context() as patched:
            patched.setattr(site._model, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                site.run_round(1, server.message(1, "north"))
        assert site.epsilon() == 0.0
        site.run_round(1, server.message(1, "north"))


def test_a_frozen_tensor_that_moved_stays_refused(north: North) -> None:
    """Also when the round is tried again, with another noise and another guard."""
    server = north.server()
    with closing(north.open()) as site:
        frozen = next(p for p in site._own.parameters() if not p.requires_grad)
        message = server.message(1, "north")
        with pytest.raises(PrivacyError, match="frozen tensor moved"):
            site.run_round(1, message, on_step=lambda: frozen.data.view(-1)[0].add_(1e-4))
        for _ in range(2):
            with pytest.raises(PrivacyError, match="a frozen tensor has moved since"):
                site.run_round(1, message)


def test_what_was_made_is_sent_again_though_the_budget_is_spent(north: North) -> None:
    server = north.server()
    with closing(north.open()) as site:
        update = site.run_round(1, server.message(1, "north"))
        noise, rate = site.noise_multiplier, site.sample_rate
    ledger = Ledger(north.folder / "ledger.jsonl")
    ledger.charge(0.3 * noise, rate, steps=20)
    ledger.close()
    with closing(north.open()) as site:
        assert site.run_round(1, b"") == update
        for _ in range(2):
            with pytest.raises(PrivacyError, match="spent"):
                site.run_round(2, server.message(2, "north"))


def test_a_run_that_goes_on_takes_the_learning_rate_of_today(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    """And the moments that were gathered; those of another optimizer are refused by name."""
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 0.05, "lr_decay": 0.5}
    north = North(document, tmp_path, train=settings)
    with closing(north.open()) as site:
        site.run_round(1, north.server().message(1, "north"))
    path = north.folder / f"state-{RUN}.pt"
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    for held in state["optimizers"].values():
        held["param_groups"] = held["param_groups"][:1]
    torch.save(state, path)
    with pytest.raises(ConfigError, match="is of another optimizer"):
        north.open()
    path.write_bytes(whole)
    again = North(document, tmp_path, train={**settings, "lr": 0.002})
    with closing(again.open()) as site:
        site.run_round(2, again.server().message(2, "north"))
        # lr_decay has it at 3/4 in round 2 of 2.
        assert {group["lr"] for group in site._optimizer.param_groups} == {0.002 * 0.75}
        moments = site._optimizer.state.values()
        assert {int(of_one["step"]) for of_one in moments} == {2 * 2}
