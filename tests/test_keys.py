"""Keys of noise, sampling and dropout: new in each process, used once, on no disk."""

import copy
import io
import os
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.privacy import PrivacyEngine
from ffa_kernels.privacy.keys import SecretStream
from ffa_kernels.privacy.sampling import PoissonSampler


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = ffa.FFALinear(6, 6, r=2, dropout=0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def private(engine, **options):
    model = Net()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=8),
        **settings,
    )


def train(model, optimizer, loader, epochs=1):
    for _ in range(epochs):
        for (x,) in loader:
            model(x).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_no_block_of_noise_is_drawn_twice(monkeypatch, name):
    """Over steps, tensors, models of an engine, ways to release, and a step that failed."""
    drawn = []
    for op in ("private_update", "private_step"):
        real = getattr(ops, op)

        def noted(*args, real=real, **settings):
            state = next(a for a in args if isinstance(a, torch.Tensor) and a.shape == (5,))
            drawn.extend((*state.tolist(), tensor) for tensor in settings["tensor_ids"])
            return real(*args, **settings)

        monkeypatch.setattr(ops, op, noted)
    engine = PrivacyEngine(accountant="rdp")
    with use_backend(name):
        models = [private(engine), private(engine, max_physical_batch_size=3)]
        for _ in range(2):
            for made in models:
                train(*made)
        model, optimizer, loader = models[0]
        (x,) = next(iter(loader))
        model(x).square().mean().backward()
        with monkeypatch.context() as patch:
            patch.setattr(ops, "private_step", lambda *a, **s: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
        train(*models[0])
    tensors = len(models[0][1].private_step.trained)
    assert tensors == 3 and len(drawn) == 5 * 3 * tensors
    assert len(set(drawn)) == len(drawn)
    # Within a step one key and one number, and the tensors told apart.
    assert {entry[-1] for entry in drawn} == set(range(tensors))


def test_threads_that_share_an_engine_draw_apart(monkeypatch):
    drawn, real = [], ops.private_step

    def noted(*args, **settings):
        state = next(a for a in args if isinstance(a, torch.Tensor) and a.shape == (5,))
        drawn.append(tuple(state.tolist()))
        # Others come by now, if they can.
        time.sleep(1e-3)
        return real(*args, **settings)

    monkeypatch.setattr(ops, "private_step", noted)
    engine = PrivacyEngine(accountant="rdp")
    models = [private(engine) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda made: train(*made, epochs=4), models))
    assert len(drawn) == 3 * 4 * 3 == len(set(drawn))


def test_no_key_is_in_what_training_leaves(tmp_path):
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger.jsonl")
    model, optimizer, loader = private(engine)
    train(model, optimizer, loader)
    streams = [engine._noise, engine._sampling, engine._dropout]
    words = [w.tobytes() for s in streams for w in s.state[:4].numpy()]
    words += [w.tobytes() for w in model.body._dropout_key.numpy()]
    assert len(set(words)) == 16 and bytes(8) not in words
    ffa.save_adapter(model, tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    memory = io.BytesIO()
    torch.save(model, memory)
    (tmp_path / "pickle").write_bytes(pickle.dumps(model) + pickle.dumps(loader.dataset))
    (tmp_path / "whole.pt").write_bytes(memory.getvalue())
    engine.ledger.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        content = path.read_bytes()
        for word in words:
            number = str(int.from_bytes(word, "little", signed=True)).encode()
            assert word not in content and word.hex().encode() not in content, path
            assert number not in content, path


def in_child(function):
    """What `function` returns in a forked child, as bytes."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks in a process with threads; that is what is being tried.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            os.write(write, pickle.dumps(function()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pickle.loads(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
    return result


def test_a_forked_child_draws_with_keys_of_its_own():
    engine = PrivacyEngine()
    sampler = PoissonSampler(200, 0.5, 4, engine._sampling)

    def draw():
        keys = [
            stream.state.tolist() for stream in (engine._noise, engine._sampling, engine._dropout)
        ]
        return keys, list(sampler)

    list(sampler)
    before = engine._sampling.state.clone()
    children = [in_child(draw) for _ in range(2)]
    assert torch.equal(engine._sampling.state, before)
    results = [*children, draw()]
    for i in range(3):
        for j in range(i):
            for a, b in zip(results[i][0], results[j][0], strict=True):
                assert a[:4] != b[:4]
            assert all(a != b for a, b in zip(results[i][1], results[j][1], strict=True))


def test_the_private_steps_own_key_is_renewed_after_a_fork():
    engine = PrivacyEngine()
    _, optimizer, _ = private(engine)
    state = optimizer.private_step._noise_state
    child = in_child(lambda: optimizer.private_step._noise_state.tolist())
    assert child[:4] != state[:4].tolist()


def test_streams_are_renewed_by_copies_and_pickles():
    stream = SecretStream("noise")
    key = bytes(stream.state.numpy())
    file = pickle.dumps(stream)
    assert key[:8] not in file and key[8:16] not in file
    others = [pickle.loads(file), copy.deepcopy(stream), SecretStream("noise")]
    assert len({tuple(s.state.tolist()) for s in [stream, *others]}) == 4
