"""Labelled text for a federation: reading it, holding some out, and sharing it over sites.

Error messages give places, key names and short labels, never a record's text: they may reach
a log that leaves the site.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffa_kernels.errors import ConfigError

_KEYS = ("text", "label")
# Values of up to this many characters are quoted in an error; a longer one may be a misplaced text.
_SHORT = 12

_DEMO_TAR = "additional_resources/hutto_ICWSM_2014.tar.gz"
_DEMO_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
_DEMO_NEUTRAL = 0.5
_COMMON = (
    *("the", "a", "of", "and", "this", "that", "it", "was", "with", "for", "but", "on", "they"),
    *("film", "book", "house", "street", "day"),
)
_STEMS = ("good", "bad", "light", "dark", "high", "low", "warm", "cold", "north", "south")
_ENDS = ("", "ish", "er", "est", "ly", "ness")


@dataclass
class Records:
    """Texts and their class numbers (0, 1, ...), in step with each other.

    Raises:
        ConfigError: the two lists differ in length.
    """

    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ConfigError(
                f"labels: got {len(self.labels)} for {len(self.texts)} texts, need one for each"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str, label: int) -> None:
        """Append one record."""
        self.texts.append(text)
        self.labels.append(label)

    def take(self, indices: Iterable[int]) -> Records:
        """The records at `indices`, in that order."""
        chosen = list(indices)
        return Records([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


def load_demo(path: str | Path) -> dict[str, Records]:
    """Four sites of sentences with human sentiment ratings (Hutto and Gilbert, ICWSM 2014).

    Args:
        path: the source distribution of vaderSentiment 3.3.2, which carries the data set. It is
            read in memory; nothing is unpacked.

    Returns:
        {"movie", "amazon", "tweets", "nyt"} -> sentences whose mean rating (-4 to 4) lies more than
        0.5 from neutral, labelled 1 above and 0 below.

    Raises:
        ConfigError: `path` is not that archive.
    """
    try:
        outer_bytes = _read_bytes(Path(path))
        with tarfile.open(fileobj=io.BytesIO(outer_bytes)) as outer:
            inner_bytes = _member(outer, _DEMO_TAR)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
            return {
                site: _rated_sentences(_member(inner, name)) for site, name in _DEMO_FILES.items()
            }
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"path: {path} is not the source distribution of vaderSentiment 3.3.2 ({error})"
        ) from error


def synthetic(count: int, classes: int, seed: int) -> Records:
    """Sentences of common words, some of which go with a class: for trials without anyone's data.

    Args:
        count: records, of all classes nearly alike.
        classes: 2 or more.
        seed: the same sentences for the same seed.
    """
    rng = random.Random(f"synthetic {seed}")
    telling = [[f"{a}{b}" for b in _ENDS] for a in _STEMS[:classes]]
    if len(telling) < classes:
        raise ConfigError(f"classes is {classes}; accepted: up to {len(_STEMS)}")
    records = Records()
    for number in range(count):
        label = number % classes
        # One word in three tells the class, and one of those tells a wrong one.
        words = [rng.choice(_COMMON) for _ in range(8)]
        words += [rng.choice(telling[label]) for _ in range(3)]
        words.append(rng.choice(telling[rng.randrange(classes)]))
        rng.shuffle(words)
        records.add(" ".join(words), label)
    return records


def load_file(path: str | Path) -> Records:
    """Records from a UTF-8 file: JSON lines with keys text and label, or CSV with that header.

    Args:
        path: a file that ends in .jsonl or .csv. Labels are class numbers 0, 1, ...; blank lines
            are skipped.

    Raises:
        ConfigError: naming the file, the line, what was found and what is accepted.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise ConfigError(f"path: {path} ends in {path.suffix!r}, accepted are .jsonl and .csv")
    raw = _read_bytes(path)
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its bytes, and not the file's: a byte order mark is left out of what it counts.
        read: bytes = error.object
        line = read.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{read[error.start]:02x}"
        raise ConfigError(f"{path}, line {line}: {found} is not UTF-8, accepted is UTF-8") from None
    records = Records()
    for where, row in readers[path.suffix](path, content):
        records.add(*_checked(where, row))
    if not records.texts:
        raise ConfigError(f"{path}: no record found, at least one is needed")
    return records


def train_test_split(
    records: Records, test_fraction: float, seed: int = 0
) -> tuple[Records, Records]:
    """(train, test), each record's side decided by a hash of its own text and the seed.

    A record therefore keeps its side whatever else the file holds, and texts that differ only in
    case or white space never stand on both sides. The test share comes out near `test_fraction`,
    not exactly at it.

    Raises:
        ConfigError: `test_fraction` lies outside 0 to 1 (both excluded).
    """
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(f"test_fraction: got {test_fraction}, accepted is 0 < test_fraction < 1")
    bound = int(test_fraction * 2**64)
    is_test = [_hash64(text, seed) < bound for text in records.texts]
    train = records.take(i for i, held_out in enumerate(is_test) if not held_out)
    test = records.take(i for i, held_out in enumerate(is_test) if held_out)
    return train, test


def pool(sources: Mapping[str, Records]) -> Records:
    """All records of all sources, in the order of the mapping."""
    pooled = Records()
    for records in sources.values():
        pooled.texts.extend(records.texts)
        pooled.labels.extend(records.labels)
    return pooled


def split_natural(sources: Mapping[str, Records]) -> dict[str, Records]:
    """A site for each source.

    Raises:
        ConfigError: no source, or a source without records.
    """
    if not sources:
        raise ConfigError("sources: got none, at least one is needed")
    for name, records in sources.items():
        if not records.texts:
            raise ConfigError(f"sources: {name!r} holds no record, each needs at least one")
    return dict(sources)


def split_iid(records: Records, sites: int, seed: int = 0) -> dict[str, Records]:
    """Records shuffled and dealt evenly over "site-0", "site-1", ...; sizes differ by at most 1.

    Raises:
        ConfigError: `sites` is below 1 or above the number of records.
    """
    _check_sites(records, sites)
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    return {f"site-{k}": records.take(sorted(order[k::sites])) for k in range(sites)}


def split_dirichlet(
    records: Records, sites: int, alpha: float, seed: int = 0, least: int = 1
) -> dict[str, Records]:
    """Label skew: each class is shared over the sites in proportions drawn from Dirichlet(alpha).

    A small `alpha` gives each site few classes, a large one tends to even shares (label skew as in
    Hsu, Qi and Brown 2019, arXiv 1909.06335).

    Args:
        least: the draw is repeated until each site has so many records.

    Raises:
        ConfigError: `alpha` is not positive and finite, `sites` is below 1 or above the number of
            records, or a hundred draws each left some site with fewer than `least`.
    """
    _check_sites(records, sites)
    if not 0.0 < alpha < float("inf"):
        raise ConfigError(f"alpha: got {alpha}, accepted is a positive finite number")
    rng = random.Random(seed)
    by_label: dict[int, list[int]] = {}
    for i, label in enumerate(records.labels):
        by_label.setdefault(label, []).append(i)
    for _ in range(100):
        shares: list[list[int]] = [[] for _ in range(sites)]
        for label in sorted(by_label):
            members = by_label[label][:]
            rng.shuffle(members)
            weights = [rng.gammavariate(alpha, 1.0) for _ in range(sites)]
            # With a tiny alpha every draw can underflow to 0; then one site takes the class.
            if sum(weights) == 0.0:
                weights[rng.randrange(sites)] = 1.0
            total, reached, start = sum(weights), 0.0, 0
            for k, weight in enumerate(weights):
                reached += weight
                end = len(members) if k == sites - 1 else round(len(members) * reached / total)
                shares[k].extend(members[start:end])
                start = end
        if min(map(len, shares)) >= least:
            return {f"site-{k}": records.take(sorted(share)) for k, share in enumerate(shares)}
    raise ConfigError(
        f"alpha: {alpha} left one of {sites} sites with fewer than {least} records in each of 100 "
        "draws; accepted: a larger alpha, or fewer sites"
    )


def majority_accuracy(records: Records) -> float:
    """Accuracy, 0 to 1, of always answering the most frequent label of `records`.

    Raises:
        ConfigError: there is no record.
    """
    if not records.labels:
        raise ConfigError("records: got none, at least one is needed")
    return max(Counter(records.labels).values()) / len(records)


def _hash64(text: str, seed: int) -> int:
    normal = " ".join(text.casefold().split())
    digest = hashlib.sha256(f"{seed}\0{normal}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _check_sites(records: Records, sites: int) -> None:
    if not 1 <= sites <= len(records):
        raise ConfigError(
            f"sites: got {sites}, accepted is 1 to the number of records ({len(records)})"
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"path: {path} cannot be read ({error.strerror}), need a readable file"
        ) from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of the one member whose path ends in `name`, whatever folder it lies in."""
    for member in archive:
        if member.name.endswith("/" + name):
            stream = archive.extractfile(member)
            if stream is not None:
                return stream.read()
    raise KeyError(f"no {name} in it")


def _rated_sentences(raw: bytes) -> Records:
    """Rows of identifier, mean rating, sentence, separated by tabs."""
    records = Records()
    for line in raw.decode("utf-8-sig").split("\n"):
        if line.strip():
            _, rating, text = line.rstrip("\r").split("\t", 2)
            if abs(float(rating)) > _DEMO_NEUTRAL:
                records.add(text, int(float(rating) > 0))
    return records


def _jsonl_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f'{where}: not JSON ({error}), accepted is {{"text": ..., "label": ...}}'
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where}: found JSON of type {type(row).__name__}, "
                'accepted is {"text": ..., "label": ...}'
            )
        yield where, row


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    # The module's own bound on a text; what is here is in memory already.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(content)))
    try:
        for cells in reader:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if sorted(header) != sorted(_KEYS):
                    raise ConfigError(
                        f"{where}: found a header of {len(header)} columns that is not text,label; "
                        "accepted is text,label"
                    )
            elif len(cells) != len(header):
                raise ConfigError(f"{where}: found {len(cells)} columns, accepted are 2")
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {start}: not CSV ({error}), accepted is RFC 4180"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _checked(where: str, row: Mapping[str, Any]) -> tuple[str, int]:
    """(text, label) of a row, or an error that says what is wrong with it."""
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise ConfigError(f"{where}: unknown key {_shown(unknown[0])}, accepted are text and label")
    text, label = row.get("text"), row.get("label")
    if not isinstance(text, str) or not text.strip():
        found = "an empty text" if isinstance(text, str) else _found("text", text)
        raise ConfigError(f"{where}: {found}, accepted is a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: text holds half a surrogate pair, accepted is valid Unicode")
    if label is None or label == "":
        raise ConfigError(f"{where}: no label, accepted is a class number 0, 1, ...")
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= _SHORT:
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ConfigError(
            f"{where}: {_found('label', label)}, accepted is a class number 0, 1, ..."
        )
    return text, label


def _found(key: str, value: object) -> str:
    return f"no {key}" if value is None else f"{key} {_shown(value)}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHORT + 2 else f"of type {type(value).__name__}"
