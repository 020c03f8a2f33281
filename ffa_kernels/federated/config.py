"""A federation's configuration: one TOML file, read strictly into frozen dataclasses.

The dataclasses below are the reference of the format: a field is a key, its default what holds
without it. A key that is unknown, of the wrong type or out of range is an error that names it, what
was given and what is accepted.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.federated.codecs import CODECS
from ffa_kernels.memory.planning import parse_memory
from ffa_kernels.nn.init import INITS

METHODS = ("ffa", "lora", "alternating")

_T = TypeVar("_T")
# A hundred sites take 10 KB.
_MOST_BYTES = 512 << 10
_SITE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def _key(accepted: str, ok: Callable[[Any], bool], default: Any = MISSING) -> Any:
    """A key with the values it accepts, in words and as a test of a value of the right type."""
    return field(default=default, metadata={"accepted": accepted, "ok": ok})


def _one_of(*names: str, default: str) -> Any:
    return _key(" or ".join(map(repr, names)), lambda value: value in names, default)


def _whole(least: int, default: Any = MISSING) -> Any:
    return _key(f"a whole number from {least}", lambda value: value >= least, default)


def _positive(default: Any = MISSING) -> Any:
    return _key("a finite number above 0", lambda value: 0.0 < value < math.inf, default)


def _moderate(default: Any = MISSING) -> Any:
    """What fp32 can multiply with: a step that came out as 0 or infinity was charged all the same.

    Bounds of nine powers of ten are far from any use.
    """
    return _key("a number from 1e-9 to 1e9", _is_moderate, default)


def _is_moderate(value: float) -> bool:
    return 1e-9 <= value <= 1e9


def _fraction(default: float) -> Any:
    return _key("a number from 0 to below 1", lambda value: 0.0 <= value < 1.0, default)


def _names(default: tuple[str, ...] | None) -> Any:
    return _key("a list of names, at least one", lambda value: bool(value) and all(value), default)


def _list(of: str, ok: Callable[[Any], bool], default: tuple[Any, ...]) -> Any:
    def fits(value: Any) -> bool:
        return bool(value) and all(map(ok, value)) and len(set(value)) == len(value)

    return _key(f"a list of {of}, none twice", fits, default)


def _is_size(text: str) -> bool:
    try:
        parse_memory(text)
    except ConfigError:
        return False
    return True


def _path(default: Any = MISSING) -> Any:
    return _key("a file", lambda value: bool(value) and "\0" not in value, default)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """[federation]: who trains how long.

    Attributes:
        name: shown in the report.
        method: "ffa" (A frozen, B trained), "lora" (PEFT's LoRA, both trained), or "alternating"
            (PEFT's LoRA, B trained in odd rounds and A in even ones, as RoLoRA, arXiv 2502.01755).
        rounds: averages taken.
        local_steps: optimizer steps of a site in a round.
        sites_per_round: sites drawn for each round; all of them by default. No privacy
            amplification is claimed.
        weights: of the average: "equal", "declared" (each site's `weight`), or "records" (each
            site's number, which is taken as public). A count that a site would not publish must
            not be its weight: every site is told the policy, and averages tell the weights.
        min_updates: valid updates below which a round is tried again, with those sites that have
            given none; a site sends the very bytes that it has made for the round.
        attempts: tries of a round, after which the run stops; `--resume` goes on.
        rebasis_every: after each so many rounds the averaged B is folded into W, at every end
            alike, and a new A is drawn (method "ffa"): the whole update is then confined to no one
            A's row space, and A is still not sent. 0 for one A throughout. What the optimizers of
            sites and server have gathered of B begins anew, for it is of the old A. Every site then
            holds adapted weights of its own, also beside others in one process.
        codec: of messages: "fp32", "bf16" or "int8".
        max_update_norm: an update whose change is longer is refused; none by default.
        aggregation: "mean", or Flower's "median" or "trimmed_mean" of each number, against liars.
        server_optimizer: "none", "momentum" (FedAvgM) or "adam" (FedAdam), with `server_lr`,
            `server_momentum` and, for Adam, `server_tau`.
        seed: of what is public: A's recipe, the head's start, splits and the draw of sites. Never
            of noise.
        eval_records_per_site: held-out records scored after each round; the end scores all.
    """

    name: str = _key("a text that is not empty", bool, "federation")
    method: str = _one_of(*METHODS, default="ffa")
    rounds: int = _whole(1)
    local_steps: int = _whole(1)
    sites_per_round: int | None = _whole(1, None)
    weights: str = _one_of("equal", "declared", "records", default="equal")
    min_updates: int = _whole(1, 1)
    attempts: int = _whole(1, 3)
    rebasis_every: int = _whole(0, 0)
    codec: str = _one_of(*CODECS, default="fp32")
    max_update_norm: float | None = _positive(None)
    aggregation: str = _one_of("mean", "median", "trimmed_mean", default="mean")
    server_optimizer: str = _one_of("none", "momentum", "adam", default="none")
    server_lr: float = _moderate(1.0)
    server_momentum: float = _fraction(0.9)
    server_tau: float = _positive(1e-3)
    seed: int = _whole(0, 0)
    eval_records_per_site: int = _whole(1, 100)


@dataclass(frozen=True, kw_only=True)
class Model:
    """[model]: the base model and what is trained in it.

    Attributes:
        kind: "minilm", or the folder of a local transformers model for sequence classification.
        r, alpha: rank; the adapter is scaled by alpha / r.
        target_modules: linear layers that are adapted, by name or its last parts.
        init: how A is made for method "ffa"; the others keep PEFT's kaiming. "pissa" comes from an
            SVD, whose bits differ between machines: the server makes it, and sends it once.
        dropout: LoRA dropout.
        base_dtype: of what is frozen, "bf16" and "int8" as in `ffa_kernels.convert` (method "ffa").
        modules_to_save: modules trained and sent whole; () for none.
        max_length: tokens of a record; the rest is cut off.
        prompts: for "minilm": public sentences for each class, from which the head is made; a
            random head by default.
        classes: number of labels. Declared and not counted, for which labels occur is private.
        cached_layers: for "minilm": so many of its lowest layers are run once for each text, whose
            states are then kept in memory (fp32, tokens x width). Only layers above are adapted.
    """

    kind: str = _key("'minilm' or a folder", bool, "minilm")
    r: int = _whole(1, 8)
    alpha: float = _positive(16.0)
    target_modules: tuple[str, ...] = _names(("query", "value"))
    init: str = _one_of("orthogonal", "kaiming", "gaussian", "pissa", default="orthogonal")
    dropout: float = _fraction(0.0)
    base_dtype: str = _one_of("fp32", "bf16", "int8", default="fp32")
    modules_to_save: tuple[str, ...] = _key("a list of names", all, ("classifier",))
    max_length: int = _whole(2, 64)
    prompts: tuple[tuple[str, ...], ...] | None = _key(
        "a list of lists of sentences, one list for each class", lambda v: all(map(all, v)), None
    )
    classes: int = _whole(2, 2)
    cached_layers: int = _whole(0, 0)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """[privacy]: what each site promises over all rounds together.

    Attributes:
        target_epsilon: of (epsilon, delta), over all that the site's ledger holds; inf trains
            without noise.
        target_delta: must be below 1 / n at every site of n records.
        max_grad_norm: bound C of one record's gradient.
        clipping: "flat" (one norm) or "per_layer" (C / sqrt(K) for each of K tensors).
        target_quantile: of the norms of a site's records, which its own C then follows, beginning
            with max_grad_norm (adaptive clipping, arXiv 1905.03871); fixed by default.
        accountant: Opacus' "prv" or "rdp".
        new_ledger: begin another account for records that have one on this machine: for public
            ones, say. Files that are dealt out need it: see `Data`.
    """

    target_epsilon: float = _key("a number above 0, or inf", lambda value: value > 0.0)
    target_delta: float = _key("a number between 0 and 1", lambda value: 0.0 < value < 1.0)
    max_grad_norm: float = _moderate(1.0)
    clipping: str = _one_of("flat", "per_layer", default="flat")
    target_quantile: float | None = _key(
        "a number between 0 and 1", lambda value: 0.0 < value < 1.0, None
    )
    accountant: str = _one_of("prv", "rdp", default="prv")
    new_ledger: bool = _key("true or false", lambda value: True, False)


@dataclass(frozen=True, kw_only=True)
class Train:
    """[train]: a site's optimizer.

    Attributes:
        batch_size: expected records of a step; each record is drawn with probability batch_size /
            n.
        sample_rate: in place of batch_size, that probability, rounded to a whole batch size at each
            site.
        max_physical_batch_size: records in memory at once; the whole draw by default.
        optimizer: with the learning rate `lr`, `head_lr` (for modules_to_save; `lr` by default),
            `weight_decay`, and `momentum` for "sgd" alone.
        smoothing: s of a low-pass filter on the noised gradients, which costs no privacy: the
            optimizer takes their mean with weights s^k for the k-th before, as in DOPPLER (arXiv
            2408.13460) of first order.
        lr_decay: round t of R trains at (1 - lr_decay (t - 1) / R) of these learning rates.
    """

    batch_size: int | None = _whole(1, None)
    sample_rate: float | None = _key(
        "a number above 0, up to 1", lambda value: 0.0 < value <= 1.0, None
    )
    max_physical_batch_size: int | None = _whole(1, None)
    optimizer: str = _one_of("sgd", "adam", "adamw", default="adam")
    lr: float = _moderate()
    head_lr: float | None = _moderate(None)
    momentum: float = _fraction(0.0)
    smoothing: float = _fraction(0.0)
    lr_decay: float = _fraction(0.0)
    weight_decay: float = _key("a number from 0 to 1e9", lambda value: 0.0 <= value <= 1e9, 0.0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """[data]: where records come from and how they lie over the sites.

    Attributes:
        source: "demo" (four sites of rated sentences), or "files": the [[site]] tables.
        path: for "demo", the source distribution of vaderSentiment 3.3.2.
        split: "natural" (each source its own site), or all records pooled and dealt out, "iid" or
            "dirichlet". A file's records then have no ledger beside them: each part that is dealt
            out has one of its own, and another seed deals other parts. So this takes
            privacy.new_ledger, and a [[site]] has a name and a file alone.
        sites: number of sites of an "iid" or "dirichlet" split.
        dirichlet_alpha: label skew of "dirichlet": small is severe.
        test_fraction: held out at every site that has no test file of its own.
        min_records: training records below which a site is not let in.
    """

    source: str = _one_of("demo", "files", default="demo")
    path: str | None = _path(None)
    split: str = _one_of("natural", "iid", "dirichlet", default="natural")
    sites: int | None = _whole(1, None)
    dirichlet_alpha: float | None = _positive(None)
    test_fraction: float = _key("a number between 0 and 1", lambda value: 0.0 < value < 1.0, 0.2)
    min_records: int = _whole(1, 50)


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """[pilot]: the small trials of `ffa-kernels pilot`: all combinations of the lists below.

    A list that is not given holds the configuration's own value alone. All combinations are
    checked before the first is tried.

    Attributes:
        records: what is trained on: "synthetic" sentences, the public "file" at `path`, dealt out
            evenly, or the sites' "own" records: each trial of these is a release, is charged to the
            sites' ledgers, and leaves less of the budget. They take data.source "files" and split
            "natural", where records have ledgers.
        path: of "file".
        sites, records_per_site: of what is dealt out; federation.min_updates is at most so many.
        rounds: of a trial; the federation's by default.
        seeds: each combination is tried with each.
        method, init, r, lr, max_grad_norm, target_epsilon: values to try.
    """

    records: str = _one_of("synthetic", "file", "own", default="synthetic")
    path: str | None = _path(None)
    sites: int = _whole(1, 3)
    records_per_site: int = _whole(20, 500)
    rounds: int | None = _whole(1, None)
    seeds: tuple[int, ...] = _list("whole numbers from 0", lambda v: v >= 0, (0, 1, 2))
    method: tuple[str, ...] = _list("names of methods", lambda v: v in METHODS, ())
    init: tuple[str, ...] = _list("names of inits", lambda v: v in INITS, ())
    r: tuple[int, ...] = _list("whole numbers from 1", lambda v: v >= 1, ())
    lr: tuple[float, ...] = _list("numbers from 1e-9 to 1e9", _is_moderate, ())
    max_grad_norm: tuple[float, ...] = _list("numbers from 1e-9 to 1e9", _is_moderate, ())
    target_epsilon: tuple[float, ...] = _list("numbers above 0, or inf", lambda v: v > 0.0, ())


@dataclass(frozen=True, kw_only=True)
class SiteFiles:
    """[[site]]: one site's records, .jsonl or .csv with text and label.

    Attributes:
        name: letters, digits, "_", "-" and "."; also the name of the site's folder.
        train: file of records to train on.
        test: file of held-out records; without one, data.test_fraction of `train` is held out.
        ledger: the account of what was ever released of these records, made if missing; by default
            the train file's name with ".ledger.jsonl" added, so that another run goes on counting.
        weight: in the average, with federation.weights "declared".
        r: a rank below the model's, for a weak machine (method "ffa"): its A is the first r rows,
            and each column of B is averaged over the sites that have it.
        target_modules: some of the model's, for a weak machine (method "ffa").
        max_physical_batch_size: in place of [train]'s.
        memory: what training may take beyond a process that has imported all, "2GiB" say; the
            physical batch is then as large as fits, up to max_physical_batch_size.
        device: "cpu", or a GPU as PyTorch names it.
        dtype: of the forward and backward pass: "fp32", or "bf16" by autocast. What is trained,
            clipped and sent stays fp32.
    """

    name: str = _key(
        "1 to 64 letters, digits, '_', '-' or '.', not opening with '-' or '.'",
        lambda value: _SITE_NAME.fullmatch(value) is not None,
    )
    train: str = _path()
    test: str | None = _path(None)
    ledger: str | None = _path(None)
    weight: float | None = _positive(None)
    r: int | None = _whole(1, None)
    target_modules: tuple[str, ...] | None = _names(None)
    max_physical_batch_size: int | None = _whole(1, None)
    memory: str | None = _key("a size such as 500MB, 2GiB", _is_size, None)
    device: str = _key(
        "'cpu', or a GPU such as 'cuda' or 'cuda:1'",
        lambda value: re.fullmatch(r"cpu|cuda(:\d{1,3})?", value) is not None,
        "cpu",
    )
    dtype: str = _one_of("fp32", "bf16", default="fp32")

    @property
    def has_less(self) -> bool:
        """Whether its rank or its layers are its own."""
        return self.r is not None or self.target_modules is not None


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration; paths in it are absolute."""

    federation: Federation
    model: Model
    privacy: Privacy
    train: Train
    data: Data
    pilot: Pilot = field(default_factory=Pilot)
    sites: tuple[SiteFiles, ...] = ()

    @property
    def sends_A(self) -> bool:
        """Whether sites have A from the server, and do not derive it."""
        return self.federation.method == "ffa" and self.model.init == "pissa"


_TABLES: dict[str, type[Any]] = {
    "federation": Federation,
    "model": Model,
    "privacy": Privacy,
    "train": Train,
    "data": Data,
    "pilot": Pilot,
}


def site_of(config: Config, name: str) -> SiteFiles | None:
    """The [[site]] of that name; None where records are dealt out, and none was given."""
    return next((site for site in config.sites if site.name == name), None)


def load(path: str | Path) -> Config:
    """The configuration in a TOML file; paths in it are relative to the file's folder.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds what is not accepted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"config: {path} cannot be read ({error.strerror}); accepted: a readable TOML file"
        ) from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"config: {path} is too long; accepted: {_MOST_BYTES >> 10} KiB")
    try:
        raw = read_toml(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config: {path} is not TOML in UTF-8: {shown(error, str)}") from error
    return parse(raw, path.parent)


# Texts and comments, those that do not end included.
_TEXTS = re.compile(
    r'''"""(?:[^\\]|\\.?)*?(?:"""|\Z)|"(?:[^"\\\n]|\\.)*+"?|'''
    r"'''.*?(?:'''|\Z)|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
_DOTTED = re.compile(r'(?<![\w"-])(?:(?:[\w-]++|"")[ \t]*+\.[ \t]*+){8}')


def read_toml(content: bytes) -> dict[str, Any]:
    """The document; a key of many parts, on which tomllib would spend their square, is refused."""
    text = content.decode()
    if found := _DOTTED.search(_TEXTS.sub('""', text)):
        raise ValueError(f"key {found[0]}... has many parts; accepted: two at most")
    return tomllib.loads(text)


def parse(raw: Mapping[str, Any], folder: Path) -> Config:
    """The configuration in a parsed TOML document; paths in it are relative to `folder`.

    Raises:
        ConfigError: naming the key, its table, what was given and what is accepted.
    """
    _check_names(raw, [*_TABLES, "site"], "the file", "table")
    tables = {name: _table(cls, raw.get(name, {}), f"[{name}]") for name, cls in _TABLES.items()}
    listed = raw.get("site", [])
    if not isinstance(listed, list):
        raise ConfigError("site: got one table; accepted: [[site]], once for each site")
    sites = tuple(_table(SiteFiles, entry, "[[site]]") for entry in listed)
    config = Config(**tables, sites=sites)
    check_together(config)
    return _with_paths(config, folder.resolve())


# Once a class, not once a site.
_HINTS = {cls: get_type_hints(cls) for cls in (*_TABLES.values(), SiteFiles)}


def _table(cls: type[_T], raw: object, where: str) -> _T:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: got {shown(raw)}; accepted: a table")
    keys: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    _check_names(raw, list(keys), where, "key")
    hints = _HINTS[cls]
    values = {}
    for name, key in keys.items():
        if name in raw:
            values[name] = _value(raw[name], hints[name], key, where)
        elif key.default is MISSING:
            accepted = key.metadata["accepted"]
            raise ConfigError(f"{where} {name}: missing; accepted: {accepted}")
    return cls(**values)


def _check_names(raw: Mapping[str, Any], accepted: list[str], where: str, noun: str) -> None:
    for name in raw:
        if name not in accepted:
            near = get_close_matches(name, accepted, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{where}: unknown {noun} {shown(name)}; did you mean {near!r}? "
                f"accepted: {', '.join(accepted)}"
            )


def _value(given: object, hint: Any, key: Field[Any], where: str) -> Any:
    if get_origin(hint) is types.UnionType:
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    value: Any = given
    if hint is float and _is_whole(given):
        value = float(value)
    elif get_origin(hint) is tuple and isinstance(given, list):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in given)
    fits = _is_whole(value) if hint is int else type(value) is (get_origin(hint) or hint)
    if fits and isinstance(value, tuple):
        of = get_args(hint)[0]
        if of is float:
            value = tuple(float(v) if _is_whole(v) else v for v in value)
        fits = all(_is_item(item, of) for item in value)
    if not fits or not key.metadata["ok"](value):
        raise ConfigError(
            f"{where} {key.name}: got {shown(given)}; accepted: {key.metadata['accepted']}"
        )
    return value


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number of TOML's: its own reader takes those of any length."""
    # type(), not isinstance(): true and false are no numbers here.
    return type(value) is int and -(2**63) <= value < 2**63


def _is_item(item: object, hint: Any) -> bool:
    """Whether `item` is of the hint's type, a tuple of texts where it says so."""
    if hint in (str, int, float):
        return _is_whole(item) if hint is int else type(item) is hint
    return isinstance(item, tuple) and all(isinstance(text, str) for text in item)


def check_together(config: Config) -> None:
    """Raises ConfigError for what no single key decides; paths may be absolute already."""
    data, train, names = config.data, config.train, [site.name for site in config.sites]
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConfigError(
            f"[[site]] name: {repeated[0]!r} is given twice; accepted: each name once"
        )
    if data.source == "files" and not names:
        raise ConfigError("[data] source: got 'files' without a [[site]]; accepted: one or more")
    if data.source == "demo" and names:
        raise ConfigError(
            "[data] source: got 'demo' beside [[site]] tables; accepted: 'files', or no [[site]]"
        )
    if (data.source == "demo") != (data.path is not None):
        raise ConfigError(
            "[data] path: "
            + ("missing" if data.source == "demo" else "got one beside source = 'files'")
            + "; accepted: the vaderSentiment 3.3.2 source distribution with source = 'demo', "
            "no path otherwise"
        )
    if (config.pilot.records == "file") != (config.pilot.path is not None):
        raise ConfigError(
            f"[pilot] path: got {config.pilot.path} with records = {config.pilot.records!r}; "
            "accepted: a file with 'file', none otherwise"
        )
    if config.pilot.records == "own" and (data.source, data.split) != ("files", "natural"):
        raise ConfigError(
            f"[pilot] records: got 'own' with [data] source = {data.source!r} and split = "
            f"{data.split!r}; accepted: 'synthetic', 'file', or source = 'files' and split = "
            "'natural'"
        )
    if config.model.prompts is not None and config.model.kind != "minilm":
        raise ConfigError(
            f"[model] prompts: got some with kind = {config.model.kind!r}; accepted: with "
            "'minilm' alone"
        )
    if config.model.cached_layers and config.model.kind != "minilm":
        raise ConfigError(
            f"[model] cached_layers: got {config.model.cached_layers} with kind = "
            f"{config.model.kind!r}; accepted: 0, or kind = 'minilm'"
        )
    if (data.split == "natural") != (data.sites is None):
        raise ConfigError(
            f"[data] sites: got {data.sites} with split = {data.split!r}; "
            "accepted: a number with 'iid' and 'dirichlet', none with 'natural'"
        )
    if (data.split == "dirichlet") != (data.dirichlet_alpha is not None):
        raise ConfigError(
            f"[data] dirichlet_alpha: got {data.dirichlet_alpha} with split = {data.split!r}; "
            "accepted: a number with 'dirichlet', none otherwise"
        )
    if data.split != "natural":
        _check_dealt_out(config)
    if (train.batch_size is None) == (train.sample_rate is None):
        raise ConfigError(
            f"[train] batch_size, sample_rate: got {train.batch_size} and {train.sample_rate}; "
            "accepted: one of the two"
        )
    federation = config.federation
    lacking = [site.name for site in config.sites if site.weight is None]
    declared = federation.weights == "declared"
    if declared and (lacking or not names):
        raise ConfigError(
            f"[federation] weights: got 'declared' without a weight for {lacking or 'any site'}; "
            "accepted: a weight in every [[site]]"
        )
    if not declared and len(lacking) < len(names):
        raise ConfigError(
            f"[[site]] weight: got one with weights = {federation.weights!r}; accepted: none, or "
            "weights = 'declared'"
        )
    if federation.weights != "equal" and federation.aggregation != "mean":
        raise ConfigError(
            f"[federation] aggregation: got {federation.aggregation!r} with weights = "
            f"{federation.weights!r}; accepted: weights = 'equal', or aggregation = 'mean'"
        )
    if federation.rebasis_every:
        _check_rebasis(config)
    for site in config.sites:
        own = site.target_modules or ()
        if site.r is None and not own:
            continue
        if federation.method != "ffa" or federation.aggregation != "mean":
            raise ConfigError(
                f"[[site]] {site.name}: got r or target_modules of its own with method = "
                f"{federation.method!r} and aggregation = {federation.aggregation!r}; accepted: "
                "with 'ffa' and 'mean'"
            )
        if site.r is not None and site.r > config.model.r:
            raise ConfigError(
                f"[[site]] {site.name}: r: got {site.r}; accepted: up to [model] r = "
                f"{config.model.r}"
            )
        if foreign := [name for name in own if name not in config.model.target_modules]:
            raise ConfigError(
                f"[[site]] {site.name}: target_modules: got {foreign[0]!r}; accepted: some of "
                f"{', '.join(config.model.target_modules)}"
            )
    if config.model.base_dtype != "fp32" and federation.method != "ffa":
        raise ConfigError(
            f"[model] base_dtype: got {config.model.base_dtype!r} with method = "
            f"{federation.method!r}; accepted: 'fp32', or method = 'ffa'"
        )
    if config.privacy.target_quantile is not None and config.privacy.clipping != "flat":
        raise ConfigError(
            f"[privacy] target_quantile: got {config.privacy.target_quantile} with clipping = "
            f"{config.privacy.clipping!r}; accepted: none, or clipping = 'flat'"
        )
    if train.momentum and train.optimizer != "sgd":
        raise ConfigError(
            f"[train] momentum: got {train.momentum} with optimizer = {train.optimizer!r}; "
            "accepted: 0, or optimizer = 'sgd'"
        )


def _check_dealt_out(config: Config) -> None:
    """What goes with each file as a site of its own alone."""
    given = f"with split = {config.data.split!r}, which deals all records out"
    if config.federation.weights == "declared":
        raise ConfigError(
            f"[federation] weights: got 'declared' {given}; accepted: 'equal', 'records', or "
            "split = 'natural'"
        )
    for key in fields(SiteFiles):
        default = [site for site in config.sites if getattr(site, key.name) == key.default]
        if key.default is not MISSING and len(default) < len(config.sites):
            raise ConfigError(
                f"[[site]] {key.name}: got one {given}; accepted: none, or split = 'natural'"
            )
    if config.data.source == "files" and not config.privacy.new_ledger:
        raise ConfigError(
            f"[privacy] new_ledger: got false {given}: the parts get ledgers, and what is released "
            "of a file's records is not counted over runs; accepted: split = 'natural', or true "
            "where the records are public or accounted for elsewhere"
        )


def _check_rebasis(config: Config) -> None:
    given = f"[federation] rebasis_every: got {config.federation.rebasis_every} with"
    for method in (config.federation.method, *config.pilot.method):
        if method != "ffa":
            raise ConfigError(f"{given} method = {method!r}; accepted: 0, or method = 'ffa'")
    if "pissa" in (config.model.init, *config.pilot.init):
        # It is of a W whose last bits differ between ends once something is folded into it.
        raise ConfigError(
            f"{given} init = 'pissa', whose A the server would have to send for each basis; "
            "accepted: 0, or an init that every site derives"
        )
    if config.model.base_dtype != "fp32":
        raise ConfigError(
            f"{given} [model] base_dtype = {config.model.base_dtype!r}, whose rounding would "
            "swallow small updates; accepted: 0, or base_dtype = 'fp32'"
        )
    for site in config.sites:
        if site.target_modules is not None:
            raise ConfigError(
                f"{given} target_modules of its own for site {site.name!r}, which would fold into "
                "layers that it does not adapt; accepted: 0, or the same layers at every site"
            )


def _with_paths(config: Config, folder: Path) -> Config:
    model, data = config.model, config.data
    if model.kind != "minilm":
        path = folder / model.kind
        if not os.path.isfile(path / "config.json"):
            raise ConfigError(
                f"[model] kind: got {shown(model.kind)}; accepted: 'minilm' or a folder with a "
                "transformers config.json"
            )
        model = replace(model, kind=str(path.resolve()))
    if data.path is not None:
        data = replace(data, path=_file(folder, data.path, "[data] path"))
    sites = tuple(
        replace(
            site,
            train=_file(folder, site.train, f"[[site]] {site.name}: train"),
            test=site.test and _file(folder, site.test, f"[[site]] {site.name}: test"),
            ledger=_ledger(folder, site) if data.split == "natural" else None,
        )
        for site in config.sites
    )
    pilot = config.pilot
    if pilot.path is not None:
        pilot = replace(pilot, path=_file(folder, pilot.path, "[pilot] path"))
    return replace(config, pilot=pilot, model=model, data=data, sites=sites)


def _ledger(folder: Path, site: SiteFiles) -> str:
    return os.path.realpath(folder / (site.ledger or f"{site.train}.ledger.jsonl"))


def _file(folder: Path, given: str, where: str) -> str:
    path = folder / given
    # Unlike pathlib's, this takes a name that is too long for one of no file.
    if not os.path.isfile(path):
        raise ConfigError(
            f"{where}: got {shown(given)}, which is no file; accepted: a file that is there"
        )
    return str(path.resolve())
