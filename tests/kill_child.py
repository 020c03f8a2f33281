"""Trains in a child, kills it with SIGKILL at a random moment, looks at what it left, and again.

`python tests/kill_child.py FOLDER KILLS SEED` prints what was seen as JSON. Each child goes on from
the adapter and the ledger that its predecessor left. It is forked from a process that has all
loaded and no threads, so that a kill costs milliseconds.
"""

import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.privacy.ledger import read_account

DELTA = 1e-3


class Log:
    """Lines that are in the file, whole, as soon as `write` returns."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **entry: object) -> None:
        os.write(self.file, (json.dumps(entry) + "\n").encode())


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)), torch.nn.Linear(16, 4))


def train(folder: Path, last: float = math.inf) -> None:
    """Steps up to the `last`, by default without end; after every second one a saved adapter."""
    log = Log(folder / "log.jsonl")
    model = net()
    if (folder / "adapter" / "adapter_config.json").exists():
        ffa.load_adapter(model, folder / "adapter")
    else:
        ffa.convert(model, r=2, target_modules=["0", "1", "2"])
    trained = [p for p in model.parameters() if p.requires_grad]
    log.write(began=digest([p.detach() for p in trained]))
    engine = ffa.PrivacyEngine(accountant="rdp", ledger=folder / "ledger.jsonl")
    data = TensorDataset(torch.randn(64, 16))
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        target_delta=DELTA,
        max_physical_batch_size=8,
    )
    steps = 0
    while steps < last:
        for (x,) in loader:
            model(x).square().mean().backward()
            counter = engine._noise.state.tolist()
            optimizer.step()
            if optimizer.private_step.steps == steps:
                continue
            steps += 1
            log.write(released=digest([p.detach() for p in trained]), noise=counter)
            if steps % 2 == 0:
                log.write(saving=digest([p.detach() for p in trained]))
                ffa.save_adapter(model, folder / "adapter")
                log.write(saved=steps)
    engine.ledger.close()


def look(folder: Path) -> dict[str, int]:
    """What the killed one left; raises AssertionError where a promise is broken."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    released = [line for line in lines if "released" in line]
    counters = [tuple(line["noise"]) for line in released]
    assert len(set(counters)) == len(counters), "a noise counter was used twice"
    path = folder / "ledger.jsonl"
    steps = 0
    if path.exists():
        account = read_account(path)
        steps = account.steps
        told = account.epsilon(DELTA, "rdp")
        spent = ffa.privacy.epsilon([(1.0, 0.25, len(released))], DELTA, "rdp")
        assert told >= spent, f"epsilon {told} is reported, {spent} was released"
    assert steps >= len(released), f"{steps} steps are charged, {len(released)} were released"
    saved = folder / "adapter" / "adapter_model.safetensors"
    # The last that is known to be whole, or one that was begun since.
    whole = max((k for k, line in enumerate(lines) if "saved" in line), default=0)
    wanted = [line["saving"] for line in lines[max(whole - 1, 0) :] if "saving" in line]
    if saved.exists() and (folder / "adapter" / "adapter_config.json").exists():
        model = ffa.load_adapter(net(), folder / "adapter")
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        found = digest(trained)
        assert found in wanted, f"the adapter is {found}, of {wanted}"
        assert set(load_file(saved)) and len(trained) == 3
    else:
        # Before the first was whole.
        assert not whole, "an adapter is gone"
    return {
        "released": len(released),
        "charged": steps,
        "saved": sum("saved" in line for line in lines),
    }


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    generator = random.Random(seed)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:
        os.environ["FFA_LEDGERS"] = str(Path(warm) / "ledgers")
        train(Path(warm), last=2)
        # As far as some steps, however busy the machine is; a child copies the pages it writes.
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            train(Path(warm), last=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        longest = 4 * (time.monotonic() - begun)
        look(Path(warm))
    os.environ["FFA_LEDGERS"] = str(folder / "ledgers")
    seen: dict[str, int] = {}
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                train(folder)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"the child ended by itself: {status}"
        seen = look(folder)
    print(json.dumps({"kills": kills, **seen}))


if __name__ == "__main__":
    main()
