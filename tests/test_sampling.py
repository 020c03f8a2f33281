"""Poisson draws, physical batches, and where their randomness comes from."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine
from ffa_kernels.privacy.keys import SecretStream
from ffa_kernels.privacy.sampling import Piece, PoissonSampler, PrivateDataLoader

# Bounds below are five and a half standard deviations: one false alarm in 10^7 a comparison.
Z = 5.5


class Fixed:
    """Logical batches that a test has chosen."""

    def __init__(self, draws):
        self.draws = draws

    def __len__(self):
        return len(self.draws)

    def __iter__(self):
        return iter(self.draws)


class Numbers(Dataset):
    """Record i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor(float(i))


def announced(draws, physical_size=None, records=100, pad=True, **options):
    pieces = []
    loader = PrivateDataLoader(
        DataLoader(Numbers(records), batch_size=4, **options),
        Fixed(draws),
        physical_size,
        pieces.append,
        pad=pad,
    )
    return loader, pieces


def draws_of(records, rate, steps, seed=None):
    return list(PoissonSampler(records, rate, steps, SecretStream("sampling", seed)))


def test_inclusion_rates_are_those_of_independent_coins():
    records, rate, steps = 203, 0.11, 3000
    drawn = torch.zeros(steps, records, dtype=torch.float64)
    for step, indices in enumerate(draws_of(records, rate, steps)):
        assert indices == sorted(set(indices))
        drawn[step, indices] = 1
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(drawn.mean() - rate) < Z * deviation / math.sqrt(steps * records)
    assert (drawn.mean(dim=0) - rate).abs().max() < Z * deviation / math.sqrt(steps)
    # The sizes vary as a binomial's do; a sampler of fixed size has variance 0.
    variance = records * rate * (1 - rate)
    assert drawn.sum(dim=1).var() == pytest.approx(variance, rel=Z * math.sqrt(2 / steps))
    centred = (drawn - rate) / deviation
    # Between any two records within a step, and between one step and the next for each record.
    together = centred.T @ centred / steps
    together.fill_diagonal_(0)
    assert together.abs().max() < (Z + 0.7) / math.sqrt(steps)
    after = (centred[1:] * centred[:-1]).mean(dim=0)
    assert after.abs().max() < Z / math.sqrt(steps - 1)


@pytest.mark.parametrize(("records", "rate"), [(1, 0.5), (7, 1.0), (9, 1 / 9), (64, 0.99)])
def test_every_record_can_be_drawn(records, rate):
    counts = torch.zeros(records)
    for indices in draws_of(records, rate, 400):
        counts[indices] += 1
    spread = Z * math.sqrt(rate * (1 - rate) * 400)
    assert (counts - 400 * rate).abs().max() <= spread


def test_two_iterations_draw_different_batches():
    sampler = PoissonSampler(200, 0.5, 3, SecretStream("sampling"))
    first, second = list(sampler), list(sampler)
    flat = [tuple(draw) for draw in first + second]
    assert len(set(flat)) == 6
    assert len(sampler) == 3


@pytest.mark.parametrize("size", [1, 3, 4, 10, 50, None])
@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_cut_never_truncated(size, workers):
    draws = [[5, 9, 11], [], list(range(20, 43)), [7], [0, 99], list(range(30, 40))]
    loader, pieces = announced(draws, size, num_workers=workers)
    assert len(loader) == len(draws)
    for iteration in range(2):
        pieces.clear()
        seen, current = [], None
        for number, batch in enumerate(loader, start=1):
            # Announced before it is yielded, one for each, in order.
            assert len(pieces) == number
            piece = pieces[-1]
            assert len(batch) == piece.records >= 1
            if size is not None:
                assert piece.records == size
            if piece.first:
                assert current is None
                current = []
            current += batch[: piece.kept].int().tolist()
            if piece.last:
                seen.append(current)
                current = None
        assert seen == draws
        expected = sum(max(1, math.ceil(len(d) / (size or 1000))) for d in draws)
        assert len(pieces) == expected
        # No two draws have one number, whichever iteration they are of.
        numbers = [piece.draw for piece in pieces if piece.first]
        assert numbers == [iteration * len(draws) + k for k in range(len(draws))]
        if size is None:
            assert pieces[1] == Piece(1, kept=0, first=True, last=True, draw=numbers[1])


@pytest.mark.parametrize("drawn", [0, 1, 5, 9])
def test_without_padding_a_draw_is_cut_evenly(drawn):
    loader, pieces = announced([list(range(drawn))], 4, pad=False)
    batches = [batch.tolist() for batch in loader]
    sizes = [len(batch) for batch in batches]
    assert len(batches) == max(1, math.ceil(drawn / 4))
    assert max(sizes) <= 4 and max(sizes) - min(sizes) <= 1
    assert [piece.records for piece in pieces] == sizes
    assert [i for batch in batches for i in batch][:drawn] == list(range(drawn))
    assert sum(piece.kept for piece in pieces) == drawn


def by_size(rows):
    return torch.stack(sorted(rows, key=float, reverse=True))


def test_padding_is_last_whatever_order_collation_makes():
    loader, pieces = announced([[3, 1, 7]], 8, collate_fn=by_size)
    (batch,) = loader
    assert batch.tolist() == [7.0, 3.0, 1.0] + [7.0] * 5
    assert pieces == [Piece(8, 3, True, True)]


def test_padding_reaches_into_collated_structures():
    def collate(rows):
        return {"x": torch.stack(rows), "pair": (torch.ones(len(rows), 2), ["a"] * len(rows))}

    loader, _ = announced([[3, 1]], 4, collate_fn=collate)
    (batch,) = loader
    assert batch["x"].tolist() == [3.0, 1.0, 3.0, 3.0]
    assert batch["pair"][0].shape == (4, 2) and batch["pair"][1] == ["a"] * 4


def test_what_cannot_be_padded_is_refused():
    loader, pieces = announced([[3, 1]], 4, collate_fn=lambda rows: object())
    with pytest.raises(ConfigError, match="pad_physical_batches"):
        list(loader)
    assert not pieces


def test_persistent_workers_and_an_iteration_left_early():
    draws = [[1, 2, 3], [4], [5, 6]]
    loader, pieces = announced(draws, 2, num_workers=2, persistent_workers=True)
    for _ in loader:
        break
    for _ in range(2):
        pieces.clear()
        kept = [batch[: pieces[-1].kept].int().tolist() for batch in loader]
        assert kept == [[1, 2], [3], [4], [5, 6]]
        assert [p.last for p in pieces] == [False, True, True, True]


def test_the_loaders_collation_and_workers_are_kept():
    def collate(rows):
        return {"rows": torch.stack(rows), "count": len(rows)}

    loader, _ = announced([[1, 2]], collate_fn=collate, num_workers=1, prefetch_factor=3)
    (batch,) = loader
    assert batch["count"] == 2
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(x)


def private(engine, records=40, batch_size=4, seed=0, **options):
    torch.manual_seed(seed)
    model = Model()
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.arange(records), torch.randn(records, 4)), batch_size=batch_size
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )


def drawn_by(engine, **options):
    """The records of each logical batch of one epoch, and the parameters after it."""
    model, optimizer, loader = private(engine, **options)
    draws = []
    for indices, x in loader:
        piece = optimizer.private_step._piece
        if piece.first:
            draws.append([])
        draws[-1] += indices[: piece.kept].tolist()
        model(x).square().mean().backward()
        optimizer.step()
    return draws, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("size", [None, 3])
def test_engine_draws_every_record_at_the_rate_of_the_batch_size(size):
    engine = PrivacyEngine()
    counts = torch.zeros(40)
    epochs, sizes = 30, []
    for _ in range(epochs):
        draws, _ = drawn_by(engine, max_physical_batch_size=size)
        assert len(draws) == 10
        for draw in draws:
            assert len(set(draw)) == len(draw)
            counts[draw] += 1
            sizes.append(len(draw))
    steps = epochs * 10
    spread = Z * math.sqrt(0.1 * 0.9 * steps)
    assert (counts - 0.1 * steps).abs().max() < spread
    assert min(sizes) < 4 < max(sizes)
    assert engine.ledger.history == [(1.0, 0.1, steps)]


def test_length_is_the_logical_steps_and_rounds_up():
    for records, batch_size, steps in [(40, 4, 10), (41, 4, 11), (3, 3, 1), (10, 3, 4)]:
        _, _, loader = private(PrivacyEngine(), records, batch_size, max_physical_batch_size=2)
        assert len(loader) == steps


def test_without_poisson_sampling_the_order_is_the_loaders_and_nothing_is_gained():
    engine = PrivacyEngine()
    draws, _ = drawn_by(engine, poisson_sampling=False)
    assert draws == [list(range(i, i + 4)) for i in range(0, 40, 4)]
    assert engine.ledger.history == [(0.5, 1.0, 10)]  # one record more can move two of a step


def test_a_sampler_that_poisson_sampling_would_replace_is_refused():
    model, data = Model(), TensorDataset(torch.arange(40), torch.randn(40, 4))
    sampler = torch.utils.data.SubsetRandomSampler(range(20))
    with pytest.raises(ConfigError, match=r"SubsetRandomSampler.*Subset"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4, sampler=sampler),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_torch_seeds_decide_neither_draws_nor_noise():
    results = [drawn_by(PrivacyEngine(), seed=3) for _ in range(2)]
    assert results[0][0] != results[1][0]
    assert not torch.equal(results[0][1], results[1][1])


class Dropping(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(p), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def made_private(model, **settings):
    engine = PrivacyEngine(**settings)
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    return engine, optimizer, loader


def test_masks_do_not_follow_a_seed_given_before_their_batch():
    model, masks = Dropping(), []
    model.layers[0].register_forward_hook(lambda layer, args, y: masks.append(y.detach()))
    _, optimizer, loader = made_private(model)
    for _ in range(2):
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="seeded after make_private"):
            for (x,) in loader:
                model(x).sum().backward()
                optimizer.zero_grad()
    first, second = masks
    assert not torch.equal(first, second)


class Augmented(Numbers):
    """A record with what a random augmentation would draw for it."""

    def __getitem__(self, i):
        return torch.tensor([float(i), *torch.randn(3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_for_batches_does_not_follow_a_seed_given_before_them(workers):
    """Orders, workers' seeds and augmentations are drawn before a batch is there."""
    seen = []
    for _ in range(2):
        model = nn.Linear(4, 2)
        _, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(Augmented(20), batch_size=4, shuffle=True, num_workers=workers),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="seeded after make_private"):
            batches = []
            for x in loader:
                batches.append(x)
                model(x).sum().backward()
                optimizer.step()
                torch.manual_seed(3)
        seen.append(torch.cat(batches))
    for one in seen:
        assert sorted(one[:, 0].tolist()) == list(range(20))
    # In one place of twenty the same record, by chance; and no two drew alike.
    assert (seen[0][:, 0] == seen[1][:, 0]).sum() < 10
    drawn = torch.cat(seen)[:, 1:]
    assert len(drawn.unique()) == drawn.numel()


@pytest.mark.parametrize("drops", [True, False])
def test_a_seed_given_within_a_batch_ends_it_if_anything_was_drawn(drops):
    model = Dropping(0.5 if drops else 0.0)
    engine, optimizer, loader = made_private(model)
    for (x,) in loader:
        torch.manual_seed(3)
        model(x).sum().backward()
        if drops:
            with pytest.raises(PrivacyError, match="seeded within this batch"):
                optimizer.step()
        else:
            optimizer.step()
    assert engine.ledger.steps == (0 if drops else 1)


def test_other_engines_and_seeded_ones_forget_no_seed_twice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = Dropping(), Dropping()
        made = [made_private(model) for model in models]
        for _ in range(2):
            for (_, optimizer, loader), model in zip(made, models, strict=True):
                for (x,) in loader:
                    model(x).sum().backward()
                    optimizer.step()
    with pytest.warns(UserWarning, match="seed=.*nothing trained is private"):
        engine, optimizer, loader = made_private(model := Dropping(), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for (x,) in loader:
            torch.manual_seed(3)
            model(x).sum().backward()
            optimizer.step()
    assert engine.ledger.steps == 1


def test_seed_repeats_and_says_so():
    results = []
    for seed in (5, 5, 6):
        with pytest.warns(UserWarning, match=r"seed=.*nothing trained is private"):
            engine = PrivacyEngine(seed=seed)
        results.append(drawn_by(engine))
        assert not engine.ledger.private
        assert engine.get_epsilon(1e-5) == math.inf
    (draws, parameters), (again, same), (other, different) = results
    assert draws == again and torch.equal(parameters, same)
    assert draws != other and not torch.equal(parameters, different)


def test_purposes_have_keys_of_their_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines = [PrivacyEngine(), PrivacyEngine(), PrivacyEngine(seed=1), PrivacyEngine(seed=2)]
    keys = {
        tuple(stream.state[:4].tolist())
        for engine in engines
        for stream in (engine._noise, engine._sampling, engine._dropout)
    }
    assert len(keys) == 12


def test_dropout_has_a_new_key_each_batch():
    import ffa_kernels as ffa

    engine = PrivacyEngine()
    model = ffa.convert(nn.Sequential(nn.Linear(4, 2)), r=2, target_modules=["0"], dropout=0.5)
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    keys = set()
    for (x,) in loader:
        keys.add(tuple(model[0]._dropout_key.tolist()))
        model(x)
        optimizer.zero_grad()
    assert len(keys) == 4 and (0, 0, 0, 0) not in keys
