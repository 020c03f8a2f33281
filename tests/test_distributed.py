"""Two processes make one private step: the bits of one process with all the records.

The pair is started once; what each rank saw comes back as a file, and the tests read those.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import AdaptiveClipping, PrivacyEngine

TESTS = Path(__file__).parent
WIDTH, CLASSES, SHARDS, DELTA = 6, 3, (7, 6), 1e-3
TIMEOUT = 20.0


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.body(x).tanh()))


def net(seed=0):
    torch.manual_seed(0)
    model = ffa.convert(Net(), r=2, target_modules=["body"], modules_to_save=["norm", "head"])
    torch.manual_seed(seed)
    nn.init.normal_(model.body.lora_B, std=0.1)
    nn.init.normal_(model.head.weight)
    return model


def records(rank=None):
    """(x, label, number of the record) of a rank's shard, or of all."""
    generator = torch.Generator().manual_seed(1)
    n = sum(SHARDS)
    tensors = (
        torch.randn(n, WIDTH, generator=generator) * 3,
        torch.randint(CLASSES, (n,), generator=generator),
        torch.arange(n),
    )
    if rank is None:
        return TensorDataset(*tensors)
    first = sum(SHARDS[:rank])
    return TensorDataset(*(t[first : first + SHARDS[rank]] for t in tensors))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Given:
    """Draws that are given, for a DataLoader."""

    def __init__(self, draws, batch_size):
        self.draws, self.batch_size = draws, batch_size

    def __iter__(self):
        return iter(self.draws)

    def __len__(self):
        return len(self.draws)


# Each record alone in its physical batch: a matrix product's bits may depend on its batch.
SETTINGS = {
    "flat": dict(max_grad_norm=0.5, clipping="flat"),
    "per_layer": dict(max_grad_norm=0.5, clipping="per_layer"),
    "scaled": dict(max_grad_norm=0.5, loss_scale=256.0),
    "adaptive": dict(
        max_grad_norm=0.5, adaptive_clipping=AdaptiveClipping(0.7, count_noise_multiplier=1.0)
    ),
}
OPTIMIZERS = {
    "flat": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "per_layer": lambda p: torch.optim.AdamW(p, lr=0.01),
    "scaled": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adaptive": lambda p: torch.optim.Adam(p, lr=0.01),
}
COMMON = dict(noise_multiplier=0.7, max_physical_batch_size=1, pad_physical_batches=False)


def train(model, optimizer, loader, epochs=1):
    """Returns the records of each draw."""
    draws, draw = [], []
    for _ in range(epochs):
        for x, y, number in loader:
            piece = optimizer.private_step.piece
            draw += number[: piece.kept].tolist()
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.scale(loss).backward()
            optimizer.step()
            if piece.last:
                draws.append(draw)
                draw = []
    return draws


def private(rank, model=None, engine=None, make="make_private", optimizer=None, **options):
    model = net() if model is None else model
    engine = engine or PrivacyEngine(new_ledger=True)
    optimizer = optimizer or torch.optim.SGD(trained(model).values(), lr=0.5)
    data = DataLoader(records(rank), batch_size=2)
    options = {**COMMON, "max_grad_norm": 0.5, "process_group": dist.group.WORLD, **options}
    if make != "make_private":
        del options["noise_multiplier"]
    made = getattr(engine, make)(module=model, optimizer=optimizer, data_loader=data, **options)
    return engine, *made


# What a rank does. Each returns what it saw.


def same_as_one(rank, folder, name):
    """Several epochs; ranks begin with different trained tensors."""
    model = net(seed=rank)
    engine = PrivacyEngine(
        seed=5, ledger=folder / f"{name}.jsonl" if rank == 0 else None, new_ledger=True
    )
    optimizer = OPTIMIZERS[name](trained(model).values())
    _, model, optimizer, loader = private(
        rank, model, engine, optimizer=optimizer, **SETTINGS[name]
    )
    draws = train(model, optimizer, loader, epochs=3)
    return {
        "draws": draws,
        "length": len(loader),
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
        "history": engine.ledger.history,
        "stats": engine.stats,
        "bound": optimizer.max_grad_norm,
    }


def failure(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def a_charge_fails(rank, folder):
    engine = PrivacyEngine(ledger=folder / "fails.jsonl" if rank == 0 else None, new_ledger=True)
    _, model, optimizer, loader = private(rank, engine=engine)
    before = [p.detach().clone() for p in model.parameters()]
    if rank == 0:
        engine.ledger.close()
    error = failure(lambda: train(model, optimizer, loader))
    same = all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    return {"error": error, "unchanged": same, "steps": engine.ledger.steps}


def one_rank_refuses(rank, folder):
    engine, model, optimizer, loader = private(rank)
    before = [p.detach().clone() for p in trained(model).values()]
    if rank == 1:
        with torch.no_grad():
            model.body.weight.add_(1e-3)
    error = failure(lambda: train(model, optimizer, loader))
    same = all(torch.equal(p, q) for p, q in zip(before, trained(model).values(), strict=True))
    return {"error": error, "unchanged": same, "steps": engine.ledger.steps}


def bounds_differ(rank, folder):
    engine, model, optimizer, loader = private(rank, **SETTINGS["adaptive"])
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "max_grad_norm": 0.5 * 2**rank})
    return {"error": failure(lambda: train(model, optimizer, loader)), "steps": engine.ledger.steps}


def rates_differ(rank, folder):
    _, model, optimizer, loader = private(rank)
    optimizer.param_groups[0]["lr"] *= 1 + rank
    return {"error": failure(lambda: train(model, optimizer, loader)), "steps": len(loader)}


def refusals(rank, folder):
    other_base = net()
    if rank == 1:
        with torch.no_grad():
            other_base.body.weight[0, 0] += 1.0
    loaders = {"data_loader": DataLoader(records(rank), batch_size=2 + 2 * rank)}
    engine = PrivacyEngine(ledger=folder / f"refused-{rank}.jsonl", new_ledger=True)

    def uneven():
        model = net()
        PrivacyEngine(new_ledger=True).make_private(
            module=model,
            optimizer=torch.optim.SGD(trained(model).values(), lr=0.5),
            poisson_sampling=False,
            process_group=dist.group.WORLD,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **loaders,
        )

    wrapped = nn.parallel.DistributedDataParallel(net())
    return {
        "base": failure(lambda: private(rank, other_base)),
        "noise": failure(lambda: private(rank, noise_multiplier=1.0 + rank)),
        "argument": failure(lambda: private(rank, clipping=["flat", "adaptive"][rank])),
        "ledger": failure(lambda: private(rank, engine=engine)),
        "steps": failure(uneven),
        "wrapped": failure(lambda: private(rank, wrapped)),
    }


def to_a_target(rank, folder):
    path = folder / "target.jsonl" if rank == 0 else None
    engine = PrivacyEngine(accountant="rdp", ledger=path, new_ledger=True)
    # Spent before, where only rank 0 knows of it.
    if rank == 0:
        engine.ledger.charge(3.0, 0.3)
    target = dict(make="make_private_with_epsilon", target_delta=DELTA, epochs=2)
    _, model, optimizer, loader = private(rank, None, engine, target_epsilon=4.0, **target)
    train(model, optimizer, loader, epochs=2)
    noise = optimizer.private_step.mechanism.noise_multiplier
    beyond = failure(lambda: train(model, optimizer, loader))
    spent = failure(lambda: private(rank, None, engine, target_epsilon=2.0, **target))
    return {"noise": noise, "epsilon": engine.get_epsilon(DELTA), "beyond": beyond, "spent": spent}


def dies(rank, folder):
    _, model, optimizer, loader = private(rank)
    for done, (x, y, _) in enumerate(loader):
        if rank == 1 and done and optimizer.private_step.steps:
            os._exit(7)
        nn.functional.cross_entropy(model(x), y).backward()
        began = time.monotonic()
        try:
            optimizer.step()
        except Exception as error:
            return {"error": repr(error), "seconds": time.monotonic() - began}
    return {"error": None}


SCENARIOS = {
    **{name: lambda rank, folder, name=name: same_as_one(rank, folder, name) for name in SETTINGS},
    "a_charge_fails": a_charge_fails,
    "one_rank_refuses": one_rank_refuses,
    "bounds_differ": bounds_differ,
    "rates_differ": rates_differ,
    "refusals": refusals,
    "to_a_target": to_a_target,
    # The last: rank 1 does not come back.
    "dies": dies,
}


def work(rank, folder):
    """The body of one process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(rank, folder), folder / f"{name}-{rank}.pt")
    # A rank whose peer is dead cannot leave in good order.
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def run_pair(folder):
    """Exit codes of the two ranks; an error if they take longer than they may."""
    source = "import sys, test_distributed as t; t.work(int(sys.argv[1]), sys.argv[2])"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=150)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], errors


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What the ranks saw of every scenario; of the last, rank 0 alone."""
    folder = tmp_path_factory.mktemp("pair")
    codes, errors = run_pair(folder)
    assert codes == [0, 7], "\n".join(errors)
    files = {name: sorted(folder.glob(f"{name}-?.pt")) for name in SCENARIOS}
    return folder, {name: [torch.load(file) for file in found] for name, found in files.items()}


@pytest.mark.filterwarnings("ignore:PrivacyEngine.seed")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_of_one_process_with_all_the_records(pair, name):
    folder, seen = pair
    ranks = seen[name]
    steps = 3 * -(-sum(SHARDS) // 4)
    draws = [a + b for a, b in zip(*(r["draws"] for r in ranks), strict=True)]
    assert len(draws) == steps and ranks[0]["length"] == ranks[1]["length"] == steps // 3
    # Ranks drew for themselves: different numbers of records, and of physical batches.
    counts = [[len(draw) for draw in r["draws"]] for r in ranks]
    assert counts[0] != counts[1] and min(map(min, counts)) == 0
    assert all(0 <= n < SHARDS[0] for d in ranks[0]["draws"] for n in d)
    assert all(SHARDS[0] <= n for d in ranks[1]["draws"] for n in d)

    model = net(seed=0)
    engine = PrivacyEngine(seed=5)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=OPTIMIZERS[name](trained(model).values()),
        data_loader=DataLoader(records(), batch_sampler=Given(draws, batch_size=4)),
        poisson_sampling=False,
        **COMMON,
        **SETTINGS[name],
    )
    assert train(model, optimizer, loader) == draws
    start = net(seed=0)
    for key, p in model.named_parameters():
        for rank in ranks:
            assert torch.equal(rank["parameters"][key], p), key
        assert torch.equal(p, start.get_parameter(key)) is not p.requires_grad
    assert all(rank["bound"] == optimizer.max_grad_norm for rank in ranks)
    assert (optimizer.max_grad_norm == 0.5) is (name in ("flat", "scaled"))
    both = {k: ranks[0]["stats"][k] + ranks[1]["stats"][k] for k in ("clipped", "dropped")}
    assert engine.stats == {"steps": steps, **both} and both["clipped"] > 0

    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [line.get("steps") for line in lines] == [None, None] + [1] * steps
    assert {line["sample_rate"] for line in lines[2:]} == {4 / sum(SHARDS)}
    assert all(rank["history"] == [(0.7, 4 / sum(SHARDS), steps)] for rank in ranks)


def test_no_rank_releases_what_could_not_be_charged(pair):
    first, second = pair[1]["a_charge_fails"]
    assert "closed; open it anew" in first["error"]
    assert second["error"].startswith("PrivacyError") and "could not charge" in second["error"]
    for rank in (first, second):
        assert rank["unchanged"] and rank["steps"] == 0


def test_what_one_ranks_guard_refuses_all_refuse(pair):
    first, second = pair[1]["one_rank_refuses"]
    assert "'body': weight is frozen, and moved" in second["error"]
    assert "1 of 2 ranks refused the step" in first["error"]
    for rank in (first, second):
        assert rank["unchanged"] and rank["steps"] == 0


def test_ranks_that_clip_at_other_bounds_release_nothing(pair):
    for rank in pair[1]["bounds_differ"]:
        assert "clipped at 0.5 on one rank and at 1.0 on another" in rank["error"]
        assert rank["steps"] == 0


def test_ranks_that_drift_apart_are_stopped_at_the_end_of_the_epoch(pair):
    for rank in pair[1]["rates_differ"]:
        assert "differs between rank 0 and rank 1" in rank["error"]


def test_ranks_that_do_not_fit_are_told_on_each(pair):
    first, second = pair[1]["refusals"]
    for rank in (first, second):
        assert rank["base"].startswith("ConfigError") and "body.weight" in rank["base"]
        assert "noise_multiplier is" in rank["noise"] and "same on every rank" in rank["noise"]
        assert "clipping is 'adaptive'" in rank["argument"]
        assert "rank 0 alone keeps the account" in rank["ledger"]
        assert "accepted: as many on each" in rank["steps"]
        assert "DistributedDataParallel" in rank["wrapped"] and "process_group=" in rank["wrapped"]
    assert first["argument"].startswith("PrivacyError: process_group: rank 1 failed")
    assert second["argument"].startswith("ConfigError")


def test_a_target_is_rank_0s_and_holds_for_all_its_ledger_held(pair):
    first, second = pair[1]["to_a_target"]
    assert first["noise"] == second["noise"] > 0
    assert 3.9 < first["epsilon"] == second["epsilon"] <= 4.0
    assert "is spent" in first["beyond"] and "could not charge" in second["beyond"]
    assert "already spent" in first["spent"] and "already spent" in second["spent"]


def test_a_rank_that_dies_ends_the_other_in_time(pair):
    (seen,) = pair[1]["dies"]
    assert seen["error"] is not None and seen["seconds"] < TIMEOUT + 5


def test_a_group_must_be_one(tmp_path):
    for given in (2, "WORLD", [0, 1]):
        with pytest.raises(ConfigError, match=r"process_group is .*accepted: None, or a group"):
            private(0, process_group=given)


def test_one_process_may_be_a_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        engine, model, optimizer, loader = private(0)
        draws = train(model, optimizer, loader)
        assert len(draws) == engine.ledger.steps == len(loader) == 4
        pid = os.fork()
        if pid == 0:
            # The key is the parent's too: what a child draws must be nobody's noise.
            try:
                train(model, optimizer, loader)
            except PrivacyError as error:
                os._exit(0 if "another process" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        dist.destroy_process_group()
