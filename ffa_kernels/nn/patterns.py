"""Regular expressions from a file of unknown origin, matched in time that they cannot blow up.

Python's own matcher tries every way to match: `(.*)*x` on one module name takes it longer than
anyone waits. This one keeps the places that a match has reached, each once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST, _MOST_GROUPS = 2000, 64
# From (text, place), where a match may end.
_Matcher = Callable[[str, int], frozenset[int]]
_NOWHERE: frozenset[int] = frozenset()
_CATEGORIES = {
    codes.CATEGORY_DIGIT: re.compile(r"\d"),
    codes.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    codes.CATEGORY_SPACE: re.compile(r"\s"),
    codes.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    codes.CATEGORY_WORD: re.compile(r"\w"),
    codes.CATEGORY_NOT_WORD: re.compile(r"\W"),
}
_EDGES = {
    codes.AT_BEGINNING: re.compile(r"^"),
    codes.AT_BEGINNING_STRING: re.compile(r"\A"),
    codes.AT_BOUNDARY: re.compile(r"\b"),
    codes.AT_NON_BOUNDARY: re.compile(r"\B"),
    codes.AT_END: re.compile(r"$"),
    codes.AT_END_STRING: re.compile(r"\Z"),
}


class Pattern:
    """A regular expression without flags, references to groups, and atomic groups.

    Raises:
        ValueError: it is none, or has one of these.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST or text.count("(") > _MOST_GROUPS:
            raise ValueError(
                f"of {len(text)} letters and {text.count('(')} groups; accepted: {_LONGEST} and "
                f"{_MOST_GROUPS}"
            )
        try:
            tree = parser.parse(text)
            if tree.state.flags != re.UNICODE:
                raise ValueError("with flags; accepted: without")
            self._matcher = _sequence(tree)
        except (re.error, OverflowError) as error:
            raise ValueError(str(error)) from error

    def covers(self, text: str, starts: Iterable[int] = (0,)) -> bool:
        """Whether a match that begins at one of `starts` can end where the text ends."""
        return any(len(text) in self._matcher(text, start) for start in starts)


def _sequence(tree: Any) -> _Matcher:
    parts: list[_Matcher] = []
    for literal, items in itertools.groupby(tree, lambda item: item[0] is codes.LITERAL):
        if literal:
            parts.append(_word("".join(chr(letter) for _, letter in items)))
        else:
            parts += [_part(*item) for item in items]
    if len(parts) == 1:
        return parts[0]

    def match(text: str, start: int) -> frozenset[int]:
        places = frozenset((start,))
        for part in parts:
            if not places:
                break
            if len(places) == 1:
                places = part(text, *places)
            else:
                places = _NOWHERE.union(*[part(text, place) for place in places])
        return places

    return _remembering(match)


def _remembering(matcher: _Matcher) -> _Matcher:
    """What a matcher found at each place of the text it saw last."""
    seen: dict[int, frozenset[int]] = {}
    last = ""

    def match(text: str, start: int) -> frozenset[int]:
        nonlocal last
        if text != last:
            seen.clear()
            last = text
        if start not in seen:
            seen[start] = matcher(text, start)
        return seen[start]

    return match


def _part(code: Any, argument: Any) -> _Matcher:
    if code in (codes.NOT_LITERAL, codes.ANY, codes.IN):
        return _letter(_fits(code, argument))
    if code is codes.AT and argument in _EDGES:
        edge = _EDGES[argument]
        return lambda text, start: frozenset((start,)) if edge.match(text, start) else _NOWHERE
    if code is codes.BRANCH:
        ways = [_sequence(way) for way in argument[1]]
        return lambda text, start: _NOWHERE.union(*[way(text, start) for way in ways])
    if code is codes.SUBPATTERN and not argument[1] and not argument[2]:
        return _sequence(argument[3])
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        return _remembering(_repeat(argument[0], argument[1], _sequence(argument[2])))
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _look(argument[0] > 0, code is codes.ASSERT, _sequence(argument[1]))
    raise ValueError(f"with {str(code).lower()}; accepted: neither flags nor references to groups")


def _fits(code: Any, argument: Any) -> Callable[[str], bool]:
    """Whether a letter is one of those that are meant."""
    if code is codes.LITERAL:
        return lambda letter: ord(letter) == argument
    if code is codes.NOT_LITERAL:
        return lambda letter: ord(letter) != argument
    if code is codes.ANY:
        return lambda letter: letter != "\n"
    if code is codes.RANGE:
        low, high = argument
        return lambda letter: low <= ord(letter) <= high
    if code is codes.CATEGORY:
        category = _CATEGORIES[argument]
        return lambda letter: category.match(letter) is not None
    wanted = argument[0][0] is not codes.NEGATE
    members = [_fits(*member) for member in argument if member[0] is not codes.NEGATE]
    return lambda letter: any(member(letter) for member in members) is wanted


def _word(word: str) -> _Matcher:
    def match(text: str, start: int) -> frozenset[int]:
        return frozenset((start + len(word),)) if text.startswith(word, start) else _NOWHERE

    return match


def _letter(fits: Callable[[str], bool]) -> _Matcher:
    def match(text: str, start: int) -> frozenset[int]:
        return frozenset((start + 1,)) if start < len(text) and fits(text[start]) else _NOWHERE

    return match


def _repeat(least: int, most: int, body: _Matcher) -> _Matcher:
    def match(text: str, start: int) -> frozenset[int]:
        ends = {start} if least == 0 else set()
        places, count = frozenset((start,)), 0
        while places and count < most:
            then = _NOWHERE.union(*[body(text, place) for place in places])
            # Where nothing moves any more, it has been repeated as often as one likes.
            count = count + 1 if then != places else max(count + 1, int(least))
            # A place that was reached before with fewer repeats leads nowhere new.
            places = then if count < least else then - ends
            if count >= least:
                ends |= then
        return frozenset(ends)

    return match


def _look(ahead: bool, wanted: bool, body: _Matcher) -> _Matcher:
    def match(text: str, start: int) -> frozenset[int]:
        if ahead:
            found = bool(body(text, start))
        else:
            found = any(start in body(text, before) for before in range(start + 1))
        return frozenset((start,)) if found is wanted else _NOWHERE

    return match
