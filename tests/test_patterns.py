"""Patterns of an adapter's configuration: what Python's matcher says, without its blow-ups."""

import random
import re
import time

import pytest

from ffa_kernels.nn.patterns import Pattern

NAMES = [f"model.language_model.layers.{i}.self_attn.{x}_proj" for i in (0, 7) for x in "qkvo"]


def pattern(rng: random.Random, depth: int) -> str:
    """A random pattern of few letters."""
    kind = rng.randrange(11)
    if depth == 0 or kind < 3:
        letters = ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "[0-9a]", "[^b-d1]", r"\W"]
        return rng.choice(letters)
    if kind < 6:
        return pattern(rng, depth - 1) + pattern(rng, depth - 1)
    inner = pattern(rng, depth - 1)
    if kind == 6:
        return f"(?:{inner}|{pattern(rng, depth - 1)})"
    if kind == 7:
        repeats = ["*", "+", "?", "{2}", "{1,3}", "*?", "{2,}", "{0,2}?"]
        return f"({inner}){rng.choice(repeats)}"
    if kind == 8:
        return rng.choice(["(?=", "(?!"]) + inner + ")"
    if kind == 9:
        return rng.choice(["^", "$", r"\b", r"\B", "(?<=a)", "(?<!b)"])
    return f"({inner}|)"


def test_it_finds_what_pythons_matcher_finds():
    rng = random.Random(0)
    found = 0
    for _ in range(3000):
        text = pattern(rng, 4)
        ours, theirs = Pattern(text), re.compile(text)
        for _ in range(4):
            name = "".join(rng.choices("ab.1", k=rng.randrange(7)))
            expected = theirs.fullmatch(name) is not None
            found += expected
            assert ours.covers(name) is expected, (text, name)
    assert found > 1000


def test_a_match_may_begin_at_any_of_several_places():
    name = "blocks.0.query"
    starts = [0, 7, 9]
    for text, begins in [("query", True), ("0.query", True), ("uery", False), ("^query", False)]:
        assert Pattern(text).covers(name, starts) is begins
        assert (re.match(rf"(.*\.)?({text})$", name) is not None) is begins


@pytest.mark.parametrize(
    "text", ["(.*)*x", "(a|a|.)*x", "((.+)+)+x", ".*" * 30 + "x", "(" * 60 + "." + ")*" * 60 + "x"]
)
def test_no_pattern_takes_long(text):
    begun = time.process_time()
    assert not any(Pattern(text).covers(name) for name in NAMES)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "text, reason",
    [
        ("(", "missing"),
        ("a{99999999999999999999}", "too large"),
        ("(?i)a", "with flags"),
        ("(?i:a)", "subpattern"),
        (r"(a)\1", "groupref"),
        ("(?>a)", "atomic_group"),
        ("(" * 65 + ")" * 65, "65 groups"),
        ("a" * 2001, "2001 letters"),
    ],
)
def test_what_is_not_accepted(text, reason):
    with pytest.raises(ValueError, match=reason):
        Pattern(text)
