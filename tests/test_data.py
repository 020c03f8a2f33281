"""Reading labelled text, holding some out, and sharing it over sites."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated.data import (
    Records,
    load_demo,
    load_file,
    majority_accuracy,
    pool,
    split_dirichlet,
    split_iid,
    split_natural,
    train_test_split,
)

DEMO = Path(
    os.environ.get(
        "FFA_DEMO_SDIST",
        Path(__file__).parents[1] / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz",
    )
)


def numbered(count: int, classes: int = 2) -> Records:
    return Records([f"sentence {i}" for i in range(count)], [i % classes for i in range(count)])


def as_pairs(records: Records) -> Counter[tuple[str, int]]:
    return Counter(zip(records.texts, records.labels, strict=True))


@pytest.mark.skipif(not DEMO.exists(), reason="the vaderSentiment sdist is not in .cache/demo")
def test_demo_sites_have_the_published_sizes_and_sensible_labels():
    sites = load_demo(DEMO)
    assert {name: len(records) for name, records in sites.items()} == {
        "movie": 10_043,
        "amazon": 2_943,
        "tweets": 3_362,
        "nyt": 2_788,
    }
    movie = dict(zip(sites["movie"].texts, sites["movie"].labels, strict=True))
    assert movie["Effective but too tepid biopic"] == 0  # rated -0.6
    tweets = dict(zip(sites["tweets"].texts, sites["tweets"].labels, strict=True))
    assert tweets["Yay. Another good phone interview."] == 1  # rated 1.44
    assert not any(text != text.strip("\r\n\t") for text in pool(sites).texts)
    assert majority_accuracy(pool(sites)) < 0.6


def test_demo_refuses_another_archive_and_a_missing_one(tmp_path):
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match=r"path: .*other.tar.gz is not the source distribution"):
        load_demo(other)
    with pytest.raises(ConfigError, match=r"path: .*absent.tar.gz cannot be read"):
        load_demo(tmp_path / "absent.tar.gz")


def test_jsonl_keeps_unicode_and_unusual_line_separators(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": "naïve \u2028 café", "label": 2}, {"label": 0, "text": "two\nlines"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + lines[0] + "\n\n" + lines[1] + "\r\n", encoding="utf-8", newline="")
    assert load_file(path) == Records(["naïve \u2028 café", "two\nlines"], [2, 0])


def test_csv_reads_quoted_fields_in_either_column_order(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'label,text\r\n1,"one, with\r\na ""break"""\r\n0,plain\r\n')
    assert load_file(path) == Records(['one, with\r\na "break"', "plain"], [1, 0])


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", b'{"text": "x", "label": 0}\n{"text": "y"}\n', 2, "no label"),
        ("a.jsonl", b'{"text": "y", "label": null}\n', 1, "no label"),
        ("a.jsonl", b'\n{"text": "y", "label": 0, "id": 7}\n', 2, "unknown key 'id'"),
        ("a.jsonl", b'{"text": "  ", "label": 0}\n', 1, "an empty text"),
        ("a.jsonl", b'{"label": 0}\n', 1, "no text"),
        ("a.jsonl", b'{"text": ["y"], "label": 0}\n', 1, "text"),
        ("a.jsonl", b'{"text": "y", "label": true}\n', 1, "label True"),
        ("a.jsonl", b'{"text": "y", "label": -1}\n', 1, "label -1"),
        ("a.jsonl", b'{"text": "y", "label": 0.5}\n', 1, "label 0.5"),
        ("a.jsonl", b'{"text": "y", "label": "good"}\n', 1, "label 'good'"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 0}\n', 1, "half a surrogate pair"),
        ("a.jsonl", b'["y", 0]\n', 1, "JSON of type list"),
        ("a.jsonl", b'{"text": "y", label: 0}\n', 1, "not JSON"),
        ("a.jsonl", b'{"text": "y", "label": 0}\n{"text": "caf\xe9", "label": 0}\n', 2, "0xe9"),
        ("a.csv", b"text,label\ny,0\nz,\n", 3, "no label"),
        ("a.csv", b'text,label\n"two\nlines",0\nz\n', 4, "found 1 columns"),
        ("a.csv", b"text,label\n,0\n", 2, "an empty text"),
        ("a.csv", b"text,label,id\ny,0,7\n", 1, "a header of 3 columns"),
        ("a.csv", b"y,0\nz,1\n", 1, "a header of 2 columns"),
        ("a.csv", b"text,label\ny,positive\n", 2, "label 'positive'"),
        ("a.csv", b'text,label\ny,0\n"open,1\n', 3, "not CSV"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    shown = str(caught.value)
    assert shown.startswith(f"{path}, line {line}: ")
    assert message in shown
    assert "accepted" in shown


def test_an_error_never_shows_a_text(tmp_path):
    path = tmp_path / "swapped.csv"
    path.write_bytes(b"label,text\nmy secret diagnosis,0\n")
    with pytest.raises(ConfigError, match="label of type str") as caught:
        load_file(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"\n"), ("a.csv", b"text,label\n")])
def test_a_file_without_records_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no record found"):
        load_file(path)


def test_an_unknown_suffix_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in '.txt', accepted are .jsonl and .csv"):
        load_file(tmp_path / "data.txt")
    with pytest.raises(ConfigError, match=r"path: .*absent.csv cannot be read"):
        load_file(tmp_path / "absent.csv")


def test_records_need_a_label_for_each_text():
    with pytest.raises(ConfigError, match="got 1 for 2 texts"):
        Records(["a", "b"], [0])


def test_test_split_is_a_partition_of_about_the_right_size():
    records = numbered(4000)
    train, test = train_test_split(records, 0.2, seed=3)
    assert as_pairs(train) + as_pairs(test) == as_pairs(records)
    # Four standard deviations of a binomial (4000, 0.2).
    assert abs(len(test) - 800) <= 101


def test_a_record_keeps_its_side_whatever_else_the_file_holds():
    small, large = numbered(200), numbered(1000)
    held_out_small = set(train_test_split(small, 0.3, seed=1)[1].texts)
    held_out_large = set(train_test_split(large, 0.3, seed=1)[1].texts)
    assert held_out_small == held_out_large & set(small.texts)
    assert held_out_small != set(train_test_split(small, 0.3, seed=2)[1].texts)


def test_duplicates_never_straddle_the_split():
    records = numbered(300)
    shouted = [f"  {text.upper().replace(' ', '   ')} " for text in records.texts]
    train, test = train_test_split(
        Records(records.texts + shouted, records.labels + records.labels), 0.5
    )
    sides = [{" ".join(text.lower().split()) for text in side.texts} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(train) % 2 == 0 and len(test) % 2 == 0


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_bad_test_fraction_is_refused(fraction):
    with pytest.raises(
        ConfigError, match=r"test_fraction: got .*accepted is 0 < test_fraction < 1"
    ):
        train_test_split(numbered(4), fraction)


def test_a_byte_that_is_not_utf8_is_found_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\n\xff,1\n")
    with pytest.raises(ConfigError, match="line 2: byte 0xff is not UTF-8"):
        load_file(tmp_path / "a.csv")


def test_a_text_of_csv_may_be_long(tmp_path):
    """The csv module takes 128 KiB unless told otherwise, of which others see nothing."""
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text,label\n" + "word " * 40_000 + ",1\n")
    assert len(load_file(tmp_path / "a.csv").texts[0]) > 190_000
    assert csv.field_size_limit() == before


def test_iid_split_is_an_even_shuffled_partition():
    records = numbered(103)
    sites = split_iid(records, 4, seed=5)
    assert sorted(len(site) for site in sites.values()) == [25, 26, 26, 26]
    assert as_pairs(pool(sites)) == as_pairs(records)
    assert sites == split_iid(records, 4, seed=5) != split_iid(records, 4, seed=6)
    assert sites["site-0"].texts != records.texts[0::4]


def test_dirichlet_split_is_a_partition_whose_skew_follows_alpha():
    records = numbered(2000, classes=4)

    def spread(alpha: float) -> float:
        """Mean over sites of the largest class's share; 0.25 when even."""
        sites = split_dirichlet(records, 5, alpha, seed=0)
        assert as_pairs(pool(sites)) == as_pairs(records)
        assert len(sites) == 5 and all(len(site) for site in sites.values())
        return sum(majority_accuracy(site) for site in sites.values()) / len(sites)

    assert spread(1000.0) < 0.30
    assert spread(0.1) > 0.55
    assert split_dirichlet(records, 5, 1.0, seed=1) == split_dirichlet(records, 5, 1.0, seed=1)
    assert split_dirichlet(records, 5, 1.0, seed=1) != split_dirichlet(records, 5, 1.0, seed=2)


def test_dirichlet_split_gives_up_when_sites_stay_empty():
    with pytest.raises(ConfigError, match=r"alpha: 1e-09 left one of 8 sites with fewer than 1 "):
        split_dirichlet(numbered(8, classes=2), 8, 1e-9)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"alpha: got .*accepted is a positive finite number"):
        split_dirichlet(numbered(8), 2, alpha)


@pytest.mark.parametrize("sites", [0, -1, 9])
def test_a_bad_number_of_sites_is_refused(sites):
    with pytest.raises(ConfigError, match=r"sites: got .*accepted is 1 to .*\(8\)"):
        split_iid(numbered(8), sites)
    with pytest.raises(ConfigError, match=r"sites: got .*accepted is 1 to .*\(8\)"):
        split_dirichlet(numbered(8), sites, 1.0)


def test_natural_split_is_a_site_for_each_source():
    sources = {"a": numbered(2), "b": numbered(3)}
    assert split_natural(sources) == sources
    with pytest.raises(ConfigError, match="'b' holds no record"):
        split_natural({"a": numbered(2), "b": Records()})
    with pytest.raises(ConfigError, match="sources: got none"):
        split_natural({})


def test_majority_accuracy_counts_the_most_frequent_label():
    assert majority_accuracy(Records(list("abcd"), [1, 2, 1, 1])) == 0.75
    with pytest.raises(ConfigError, match="records: got none"):
        majority_accuracy(Records())


def test_a_skewed_split_leaves_every_site_as_many_records_as_are_asked_for():
    pooled = Records([f"text {k}" for k in range(600)], [k % 2 for k in range(600)])
    smallest = {}
    for least in (1, 60):
        splits = [split_dirichlet(pooled, 3, 0.3, seed, least) for seed in range(8)]
        assert all(sum(map(len, split.values())) == 600 for split in splits)
        smallest[least] = min(len(of_site) for split in splits for of_site in split.values())
    assert smallest[1] < 60 <= smallest[60]
