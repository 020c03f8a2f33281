"""One record more or less moves the sum by C at most, to the last bit, and no order shows.

Everything is measured on the integers that are summed, in exact arithmetic: a sum in int64 times
its grid is the number that the noise is added to.
"""

import importlib
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.backends.compose import merging_pays
from ffa_kernels.privacy import PrivacyEngine
from ffa_kernels.privacy.sampling import Piece

pytestmark = pytest.mark.usefixtures("one_thread")

# Examples of a property, in a quick run and a full one; Triton's interpreter is slow.
EXAMPLES = {"reference": (60, 2000), "cpu": (60, 2000), "triton": (2, 24), "cuda": (40, 400)}
FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

many = pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]
)


def check_all(backend, many, check, *, share=1, **strategies):
    """`check` for a share of the examples, which are the same in each run."""

    @settings(max_examples=math.ceil(EXAMPLES[backend][many] / share))
    @given(**strategies)
    def examples(**values):
        check(**values)

    examples()


def served(backend, op):
    """The dtypes, by name, for which `backend` serves `op`."""
    module = importlib.import_module(f"ffa_kernels.backends.{backend}")
    device = torch.get_default_device()
    return [name for name, dtype in FLOATS.items() if module.supports(op, device, dtype)]


def grid_of(bound: float) -> Fraction:
    """2^(floor(log2 C) - 32), exactly."""
    exponent = math.frexp(bound)[1] - 1
    assert Fraction(2) ** exponent <= Fraction(bound) < Fraction(2) ** (exponent + 1)
    return Fraction(2) ** (exponent - 32)


def moved(some: list[Tensor], others: list[Tensor], bounds: list[float]) -> list[Fraction]:
    """The squared distance of two lists of sums: of all together (flat), or of each pair."""
    squares = []
    for k, (a, b) in enumerate(zip(some, others, strict=True)):
        assert a.dtype == b.dtype == torch.int64
        steps = [p - q for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
        grid = grid_of(bounds[k if len(bounds) > 1 else 0])
        squares.append(sum(step * step for step in steps) * grid**2)
    return squares if len(bounds) > 1 else [sum(squares, Fraction(0))]


def within(squares: list[Fraction], bounds: list[float]) -> bool:
    return all(s <= Fraction(c) ** 2 for s, c in zip(squares, bounds, strict=True))


def total(grads, bounds, keep=None, squares=(), into=None):
    """The integer sums of these records, added to `into`."""
    sums = into
    if sums is None:
        sums = [torch.zeros(g.shape[1:], dtype=torch.int64) for g in grads]
    stats = torch.zeros(2, dtype=torch.int64)
    ops.clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)
    return sums


def rows(grads, squares, keep, chosen):
    """The chosen records of a batch, as `total` takes them."""
    chosen = torch.tensor(chosen, dtype=torch.int64)
    return (
        [g[chosen] for g in grads],
        None if keep is None else keep[chosen],
        [s[:, chosen] for s in squares],
    )


# Whatever the gradients are.

# Bounds whose next number up is a multiple of the grid: there a sum that is rounded up shows.
EDGES = [math.nextafter(x, 0.0) for x in (1.0, 0.25, 3.0, 24.0, 2.0**-20)]
BOUNDS = st.one_of(
    st.sampled_from([1.0, 5.0, 0.7, 2.0**-500, 2.0**500, *EDGES]), st.floats(2.0**-30, 2.0**30)
)
SHAPES = st.sampled_from([(3,), (2, 5), (), (1,), (17,), (4, 16), (130,)])
KINDS = ["plain", "plain", "edge", "one", "huge", "tiny", "denormal", "nan", "inf", "zero"]


def fill(rng: random.Random, kind: str, grads: list[Tensor], i: int, bound: float) -> None:
    """Record i of the batch, over all tensors of `grads`."""
    values = [torch.randn(g.shape[1:], dtype=torch.float64, device="cpu") for g in grads]
    norm = math.sqrt(sum(float(v.square().sum()) for v in values))
    if kind == "plain":
        factor = bound / norm * 10.0 ** rng.uniform(-5, 5)
    elif kind == "edge":
        # As near to C as the last bits of its numbers allow.
        factor = bound / norm * (1 + rng.randrange(-4, 5) * 2.0**-52)
    else:
        factor = 0.0
    for g, v in zip(grads, values, strict=True):
        info = torch.finfo(g.dtype)
        if kind == "huge":
            v = v.sign() * info.max * rng.choice([1.0, 0.5])
        elif kind == "tiny":
            v = v * info.tiny
        elif kind == "denormal":
            v = v.sign() * info.smallest_normal * info.eps * rng.randrange(1, 4)
        else:
            v = v * factor
        g[i] = v.to(g.dtype)
    place = rng.choice(grads)
    if kind == "one":
        # A single number, so that no other's truncation makes up for its rounding.
        number = rng.choice([3.0, 5.0, 7.0, 11.0]) * 2.0 ** math.frexp(bound)[1]
    else:
        number = {"nan": math.nan, "inf": rng.choice([math.inf, -math.inf])}.get(kind)
    if number is not None:
        # Cast, it may be infinite.
        number = torch.tensor(number, dtype=torch.float64, device="cpu").to(place.dtype)
        place[i].view(-1)[rng.randrange(place[i].numel())] = number


def batch(seed, n, shapes, dtypes, kinds, bounds):
    """Records of these kinds, K tensors of these shapes and dtypes, and a bound each or for all."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    grads = [
        torch.zeros((n, *shape), dtype=FLOATS[name])
        for shape, name in zip(shapes, dtypes, strict=False)
    ]
    bounds = bounds[:1] if len(bounds) < len(grads) else bounds[: len(grads)]
    for i in range(n):
        if len(bounds) == 1:
            fill(rng, kinds[i], grads, i, bounds[0])
        else:
            for g, bound in zip(grads, bounds, strict=True):
                fill(rng, kinds[i], [g], i, bound)
    return grads, bounds


def gradients(backend):
    return {
        "seed": st.integers(0, 2**20),
        "n": st.integers(1, 6),
        "shapes": st.lists(SHAPES, min_size=1, max_size=4),
        "dtypes": st.lists(
            st.sampled_from(served(backend, "clip_accumulate")), min_size=4, max_size=4
        ),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=6, max_size=6),
        # Four are for tensors one each, one is for all.
        "bounds": st.one_of(
            st.lists(BOUNDS, min_size=1, max_size=1), st.lists(BOUNDS, min_size=4, max_size=4)
        ),
    }


@many
def test_a_record_moves_the_sum_by_its_bound_at_most(backend, many):
    check_all(
        backend, many, check_one_record, **gradients(backend), padding=st.sets(st.integers(0, 5))
    )


def check_one_record(seed, n, shapes, dtypes, kinds, bounds, padding):
    grads, bounds = batch(seed, n, shapes, dtypes, kinds, bounds)
    keep = torch.tensor([j not in padding for j in range(n)])
    everyone = total(grads, bounds, keep)
    for i in range(n):
        others, their_keep, _ = rows(grads, [], keep, [j for j in range(n) if j != i])
        squares = moved(everyone, total(others, bounds, their_keep), bounds)
        assert within(squares, bounds), (i, kinds[i])
        if i in padding or kinds[i] in ("nan", "inf"):
            assert not any(squares)
        # It is the clipped record that is measured: one of a norm far above C moves it by C.
        norms = [float(g[i].double().norm()) for g in grads]
        norms = norms if len(bounds) > 1 else [math.hypot(*norms)]
        for square, norm, bound in zip(squares, norms, bounds, strict=True):
            if i not in padding and 1.01 * bound < norm < 1e150:
                assert square >= Fraction(bound * (1 - 2**-27)) ** 2


@many
def test_order_split_and_padding_never_show_in_the_bits(backend, many):
    check_all(backend, many, check_order, **gradients(backend), cuts=st.sets(st.integers(1, 5)))


def check_order(seed, n, shapes, dtypes, kinds, bounds, cuts):
    grads, bounds = batch(seed, n, shapes, dtypes, kinds, bounds)
    rng = random.Random(seed)
    calls = torch.tensor([float(rng.choice([1, 1, 2])) for _ in range(n)], dtype=torch.float64)
    squares = [
        torch.stack([g.double().reshape(n, -1).square().sum(dim=1), calls.double()])
        if g.dim() > 1
        else torch.stack([g.double().square(), calls.double()])
        for g in grads
    ]
    once = total(grads, bounds, None, squares)
    order = rng.sample(range(n), n)
    ends = sorted({min(cut, n) for cut in cuts} | {n})
    pieces, start = None, 0
    for end in ends:
        some, _, known = rows(grads, squares, None, order[start:end])
        keep = None
        if rng.random() < 0.5:
            # Behind them, rows of padding that hold anything.
            held = rng.choice([1.0, math.nan])
            keep = torch.tensor([True] * (end - start) + [False] * 2)
            some = [torch.cat([g, torch.full_like(g[:1].expand(2, *g.shape[1:]), held)])
                    for g in some]  # fmt: skip
            known = [torch.cat([s, torch.full((2, 2), math.inf, dtype=s.dtype)], 1) for s in known]
        pieces = total(some, bounds, keep, known, into=pieces)
        start = end
    for a, b in zip(once, pieces, strict=True):
        assert torch.equal(a, b)


# What the kernels of backward make of it.


@many
def test_the_norm_is_that_of_the_numbers_that_are_stored(backend, many):
    """Where the gradient is rounded to be stored, its norm before that is another."""
    check_all(
        backend,
        many,
        check_stored,
        seed=st.integers(0, 2**20),
        n=st.integers(1, 4),
        sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5)),
        name=st.sampled_from(served(backend, "per_sample_grad")),
        bound=st.sampled_from([1e-3, 0.7, *EDGES]),
        mean_loss=st.booleans(),
    )


def check_stored(seed, n, sizes, name, bound, mean_loss):
    tokens, d_out, r = sizes
    torch.manual_seed(seed)
    g, h = (torch.randn(n, tokens, width).to(FLOATS[name]) for width in (d_out, r))
    options = {"scaling": 0.37, "mean_loss": mean_loss}
    _, G, squares = ops.per_sample_grad(g, h, None, **options)
    known = [squares]
    everyone = total([G], [bound], None, known)
    for i in range(n):
        others = rows([G], known, None, [j for j in range(n) if j != i])
        assert within(moved(everyone, total(others[0], [bound], None, others[2]), [bound]), [bound])

    # And in the op that keeps no G.
    sums = []
    for left_out in (None, seed % n):
        keep = torch.tensor([j != left_out for j in range(n)])
        sums.append(torch.zeros(d_out, r, dtype=torch.int64))
        stats = torch.zeros(2, dtype=torch.int64)
        ops.per_sample_clip(g, h, None, sums[-1], stats, keep, max_grad_norm=bound, **options)
    assert within(moved(sums[:1], sums[1:], [bound]), [bound])


# What the engine makes of it.


class Model(nn.Module):
    """A layer that runs twice, another with an adapter, and a head that is trained whole."""

    def __init__(self, twice):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.twice = twice

    def forward(self, x):
        y = self.first(x)
        if self.twice == "same":
            # Parallel gradients, whose norms do not add up as their squares do.
            y = y + self.first(x)
        elif self.twice == "after":
            y = self.first(y)
        return self.head(self.second(y)).mean(dim=1)


def made(twice, dtype, seed):
    torch.manual_seed(seed)
    model = ffa.convert(
        Model(twice), r=2, target_modules=["first", "second"], modules_to_save=["head"]
    ).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
    return model


ENGINE = {
    "seed": st.integers(0, 2**10),
    "n": st.sampled_from([2, 3, 1, 4, 5, 6]),
    "twice": st.sampled_from(["same", "after", "no"]),
    "clipping": st.sampled_from(["flat", "per_layer"]),
    "keep_grad_sample": st.booleans(),
    "loss_reduction": st.sampled_from(["mean", "sum"]),
    "loss_scale": st.sampled_from([1.0, 2.0**-7, 1024.0]),
    "max_physical_batch_size": st.sampled_from([None, 1, 2, 4]),
    "pad": st.booleans(),
    "bound": st.sampled_from([1e-3, 0.1, *EDGES[:2], 100.0]),
    "bad": st.sampled_from([None, None, None, math.nan, math.inf]),
}


@many
def test_a_record_moves_the_engines_sum_by_its_bound_at_most(backend, many, monkeypatch):
    spied, each = Spied(monkeypatch), backend != "triton"
    check_all(
        backend,
        many,
        lambda name, **values: check_engine(spied, each, FLOATS[name], **values),
        name=st.sampled_from(served(backend, "linear")),
        **ENGINE,
    )


class Spied:
    """Keeps what the engine gives to the ops that clip."""

    def __init__(self, monkeypatch):
        self.batches = []
        clip_accumulate, private_step = ops.clip_accumulate, ops.private_step

        def spied_clip(grads, sums, stats, keep, bounds, *, squares=()):
            self.batches.append((list(grads), sums, keep, list(bounds), list(squares)))
            return clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)

        def spied_step(grads, stats, keep, params, *rest, max_grad_norm, squares=(), **more):
            self.batches.append((list(grads), None, keep, list(max_grad_norm), list(squares)))
            return private_step(
                grads, stats, keep, params, *rest, max_grad_norm=max_grad_norm, squares=squares,
                **more,
            )  # fmt: skip

        self.clip_accumulate = clip_accumulate
        monkeypatch.setattr(ops, "clip_accumulate", spied_clip)
        monkeypatch.setattr(ops, "private_step", spied_step)


def check_engine(
    spied, each, dtype, seed, n, twice, clipping, bound, bad, pad, loss_scale, **options
):
    model = made(twice, dtype, seed)
    x = torch.randn(n, 3, 6).to(dtype)
    if bad is not None:
        x[seed % n, 0, 0] = bad
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=n),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
        clipping=clipping,
        loss_scale=loss_scale,
        pad_physical_batches=pad,
        **options,
    )
    before = [p.detach().clone() for p in trained]
    spied.batches.clear()
    for (rows_of,) in loader:
        losses = model(rows_of).square().sum(dim=1)
        loss = losses.mean() if options["loss_reduction"] == "mean" else losses.sum()
        optimizer.scale(loss).backward()
        optimizer.step()
    share = 1 / math.sqrt(len(trained)) if clipping == "per_layer" else 1.0
    scaled = [bound * share * loss_scale] * (len(trained) if clipping == "per_layer" else 1)

    # By tensors that are clipped together: their sum over the pieces, with and without a record.
    groups = {}
    for batch_ in spied.batches:
        key = tuple(tuple(g.shape[1:]) for g in batch_[0])
        groups.setdefault(key if len(batch_[0]) == 1 else "all", []).append(batch_)
    released = [torch.zeros(p.shape, dtype=torch.float64) for p in trained]
    for pieces in groups.values():
        bounds = pieces[0][3]
        assert set(bounds) == set(scaled)
        everyone = summed(spied, pieces)
        for at, (grads, _, _, _, _) in enumerate(pieces):
            for i in range(len(grads[0])) if each else [seed % len(grads[0])]:
                without = summed(spied, pieces, leave_out=(at, i))
                assert within(moved(everyone, without, bounds), bounds)
        for tensor in everyone:
            (k,) = [k for k, p in enumerate(trained) if p.shape == tensor.shape]
            released[k] = tensor.double() * float(grid_of(bounds[0])) / (loss_scale * n)
    # What was looked at is what was released.
    for p, old, grad in zip(trained, before, released, strict=True):
        rounding = 2 * torch.finfo(dtype).eps * (old.double().abs() + grad.abs())
        assert ((p.detach().double() - (old.double() - grad)).abs() <= rounding).all()


def summed(spied, pieces, leave_out=(None, None)):
    sums = None
    for at, (grads, _, keep, bounds, squares) in enumerate(pieces):
        if sums is None:
            sums = [torch.zeros(g.shape[1:], dtype=torch.int64) for g in grads]
        if at == leave_out[0]:
            chosen = [j for j in range(len(grads[0])) if j != leave_out[1]]
            grads, keep, squares = rows(grads, squares, keep, chosen)
        stats = torch.zeros(2, dtype=torch.int64)
        spied.clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)
    return sums


# With and without a record in the data set.


class Whole(nn.Module):
    """Layers of small whole numbers, one of which runs twice: whatever they compute is exact."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = ffa.FFALinear(4, 4, r=2, alpha=4.0, bias=False)
        self.second = ffa.FFALinear(4, 3, r=2, alpha=2.0, bias=False)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))

    def forward(self, x):
        return self.second(self.first(x) + self.first(2 * x))


@many
def test_a_data_set_without_a_record_has_the_sum_without_it(backend, many, monkeypatch):
    """Through all of the engine twice, where no rounding depends on how many records there are."""
    spied = Spied(monkeypatch)
    check_all(
        backend,
        many,
        lambda **values: check_removal(spied, **values),
        share=3,
        seed=st.integers(0, 2**10),
        n=st.sampled_from([3, 5, 2, 9, 4]),
        clipping=st.sampled_from(["flat", "per_layer"]),
        loss=st.sampled_from(["sum", "mean", "mean times n"]),
        max_physical_batch_size=st.sampled_from([4, 2, 8]),
        bound=st.sampled_from([0.7, 1e-3, *EDGES[:2], 500.0]),
    )


def check_removal(spied, seed, n, bound, **options):
    torch.manual_seed(seed)
    x, weights = torch.randint(-3, 4, (n, 2, 4)).float(), torch.randint(-3, 4, (n, 2, 3)).float()
    sums = []
    for left_out in (None, seed % n):
        chosen = [j for j in range(n) if j != left_out]
        sums.append(engine_sums(spied, seed, x[chosen], weights[chosen], bound, options))
    (bounds, everyone), (_, without) = sums
    assert within(moved(everyone, without, bounds), bounds)
    assert any(s.any() for s in everyone)


def engine_sums(spied, seed, x, weights, bound, options):
    """(bounds, sums) of one draw of all records; with a mean loss in batches padded to one size."""
    loss, clipping = options["loss"], options["clipping"]
    model = Whole(seed)
    trained = [model.first.lora_B, model.second.lora_B]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(x, weights), batch_size=len(x)),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
        clipping=clipping,
        loss_reduction="mean" if loss == "mean" else "sum",
        pad_physical_batches=loss == "mean",
        max_physical_batch_size=options["max_physical_batch_size"],
    )
    spied.batches.clear()
    for rows_of, weights_of in loader:
        losses = (model(rows_of) * weights_of).sum(dim=(1, 2))
        count = torch.tensor(float(len(losses))) if loss == "mean times n" else None
        (losses.sum() if loss == "sum" else losses.mean()).backward(count)
        optimizer.step()
    sums = {p.shape: torch.zeros(p.shape, dtype=torch.int64) for p in trained}
    bounds = [0.0] * (len(trained) if clipping == "per_layer" else 1)
    for grads, _, keep, their_bounds, squares in spied.batches:
        places = [sums[g.shape[1:]] for g in grads]
        stats = torch.zeros(2, dtype=torch.int64)
        spied.clip_accumulate(grads, places, stats, keep, their_bounds, squares=squares)
        bounds = [their_bounds[0]] * len(bounds)
    return bounds, list(sums.values())


def test_how_many_records_there_are_changes_no_other_records_gradient(own_product):
    """Where a layer has two ways to round, the number of records does not choose between them."""
    torch.manual_seed(0)
    x = torch.randn(129, 64)
    seen = []
    # 128 and 129 rows stand on either side of where W + s B A begins to pay.
    weight = torch.zeros(64, 64)
    merges = [merging_pays(x[:n], weight, False) for n in (128, 129)]
    assert merges == [False, not own_product]
    for n in (128, 129):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            *(m for _ in range(3) for m in (torch.nn.Linear(64, 64), torch.nn.Tanh()))
        )
        ffa.convert(model, 4, target_modules=["0", "2", "4"])
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_()
        trained = [p for p in model.parameters() if p.requires_grad]
        model, optimizer, _ = ffa.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.0),
            data_loader=DataLoader(TensorDataset(x[:n]), batch_size=60),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            loss_reduction="sum",
            pad_physical_batches=False,
        )
        optimizer.private_step.begin(Piece(records=n, kept=n, first=True, last=True))
        model(x[:n]).square().sum().backward()
        seen.append([p.grad_sample[:128].clone() for p in trained])
    for own, other in zip(*seen, strict=True):
        assert torch.equal(own, other)
