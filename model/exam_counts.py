"""What leaves a place where an adapter was examined: whole numbers, and no number about a single row.

An examination compares two adapters on the same held-out rows. Beside rows and right answers, three sums over the
pictures (of squares and of products of counts) travel, because rows of one picture are not independent and these sums
are what the variance of the difference needs. Every record that arrives is held against itself: counts that cannot
belong together are refused. Counts that are invented but possible cannot be told from true ones.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model import calibration

LEAST_ROWS, LEAST_GROUPS = 20, 3  # with fewer nothing leaves a clinic: a single picture has no spread to judge by
MAX_ROWS = 100_000  # more than a clinic's sealed set holds; a larger number is not believed
_NUMBERS = ("bits", "rows", "groups", "squares")
_PAIRS = ("installed", "base", "reliance", "seen")
_CELLS = ("cells-before", "right-before", "cells-after", "right-after")
KNOWN = (*_NUMBERS, *_PAIRS, *_CELLS)  # every name that a record may have


class CountsWrong(ValueError):
    """The numbers of an examination cannot be used; the message says which."""


@dataclass(frozen=True)
class Pair:
    """Yes/no marks of the same rows before and after: `lost` and `gained` rows, and sums over pictures.

    With d = gained - lost of a picture and n its rows: `squares` is the sum of d*d, `cross` that of d*n.
    """

    before: int
    after: int
    lost: int
    gained: int
    squares: int
    cross: int


@dataclass(frozen=True)
class Counts:
    """One place's examination: `installed` (right answers, what is installed now against the candidate), `base`
    (the bare model against the candidate), `reliance` (answers that depend on the picture) and `seen` (the right ones
    among them; both None: not measured), and answers by confidence before and after as (count, right) of
    `model.calibration.CELLS` cells."""

    bits: int
    rows: int
    groups: int
    squares: int  # sum over pictures of rows * rows
    installed: Pair
    base: Pair
    reliance: Pair | None
    seen: Pair | None
    before: tuple[list[int], list[int]]
    after: tuple[list[int], list[int]]

    def record(self) -> dict[str, int | list[int]]:
        """As plain numbers and lists of numbers, for a message."""
        found: dict[str, int | list[int]] = {name: int(getattr(self, name)) for name in _NUMBERS}
        for name in _PAIRS:
            pair = getattr(self, name)
            if pair is not None:
                found[name] = [pair.before, pair.after, pair.lost, pair.gained, pair.squares, pair.cross]
        return found | dict(zip(_CELLS, (*self.before, *self.after), strict=True))


def pair(before: Sequence[bool], after: Sequence[bool], groups: Sequence[str]) -> Pair:
    """The counts of two sets of marks of the same rows; `groups` names each row's picture."""
    changed: Counter[str] = Counter()
    for old, new, group in zip(before, after, groups, strict=True):
        changed[group] += int(new) - int(old)
    size = Counter(groups)
    lost = sum(bool(old) and not new for old, new in zip(before, after, strict=True))
    gained = sum(bool(new) and not old for old, new in zip(before, after, strict=True))
    squares, cross = sum(d * d for d in changed.values()), sum(d * size[g] for g, d in changed.items())
    return Pair(sum(map(bool, before)), sum(map(bool, after)), lost, gained, squares, cross)


def read(record: Mapping[str, Any]) -> Counts:
    """Counts from a message's record. Raises CountsWrong unless the numbers can belong together."""
    needed, known = {*_NUMBERS, "installed", "base", *_CELLS}, set(KNOWN)
    if not needed <= set(record) <= known:
        odd = sorted(needed - set(record)) or sorted(set(record) - known)
        raise CountsWrong(f"the entry {str(odd[0])[:40]!r} is missing or unexpected")
    numbers = {name: _whole(record[name], name) for name in _NUMBERS}
    pairs = {name: Pair(*_list(record[name], name, 6, signed=True)) for name in _PAIRS if name in record}
    lists = [_list(record[name], name, calibration.CELLS) for name in _CELLS]
    found = Counts(
        **numbers,
        installed=pairs["installed"],
        base=pairs["base"],
        reliance=pairs.get("reliance"),
        seen=pairs.get("seen"),
        before=(lists[0], lists[1]),
        after=(lists[2], lists[3]),
    )
    _check(found)
    return found


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise CountsWrong(f"{name} is {str(value)[:40]}, expected a whole number above 0")
    return value


def _list(values: Any, name: str, length: int, signed: bool = False) -> list[int]:
    given = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    if len(given) != length or any(type(value) is not int or (value < 0 and not signed) for value in given):
        raise CountsWrong(f"{name} is not a list of {length} whole numbers")
    return given


def _check(found: Counts) -> None:
    """Raise CountsWrong for numbers that no set of rows could have given."""
    rows, groups = found.rows, found.groups
    if rows > MAX_ROWS or groups > rows:
        raise CountsWrong(f"{rows} rows of {groups} pictures are not believed")
    if rows < LEAST_ROWS or groups < LEAST_GROUPS:
        raise CountsWrong(f"{rows} rows of {groups} pictures are fewer than {LEAST_ROWS} of {LEAST_GROUPS}")
    if not rows * rows <= found.squares * groups or found.squares > (rows - groups + 1) ** 2 + groups - 1:
        raise CountsWrong("the sizes of the pictures do not fit the rows")
    for name in _PAIRS:
        if (one := getattr(found, name)) is not None and not _possible(one, found):
            raise CountsWrong(f"the counts of {name} do not fit each other")
    for (count, right), marks in ((found.before, found.installed.before), (found.after, found.installed.after)):
        if sum(count) != rows or sum(right) != marks or any(r > c for c, r in zip(count, right, strict=True)):
            raise CountsWrong("the answers by confidence do not fit the rows")
    both = (found.reliance, found.seen)
    if (both[0] is None) != (both[1] is None):
        raise CountsWrong("reliance and seen come together or not at all")
    if both[0] and both[1] and (both[1].before > both[0].before or both[1].after > both[0].after):
        raise CountsWrong("more answers are right and depend on the picture than depend on it")
    if found.base.after != found.installed.after:
        raise CountsWrong("the candidate's right answers are given twice and differ")


def _possible(one: Pair, found: Counts) -> bool:
    """Whether marks of these rows and pictures could give these counts."""
    change = one.gained - one.lost
    return (
        0 <= one.lost <= one.before <= found.rows
        and 0 <= one.gained <= one.after <= found.rows
        and one.gained <= found.rows - one.before
        and one.after - one.before == change
        and change * change <= one.squares * found.groups
        and one.squares <= (one.lost + one.gained) ** 2
        and one.cross * one.cross <= one.squares * found.squares
    )


def difference(found: Counts, one: Pair) -> tuple[float, float]:
    """Change of the share of marked rows (-1..1) and the variance of it, over pictures as a sample of pictures.

    The variance is that of a ratio of two sums over pictures (Cochran, Sampling Techniques, 3rd ed. 1977, 2.11),
    infinite for a single picture.
    """
    mean = (one.gained - one.lost) / found.rows
    if found.groups < 2:
        return mean, math.inf
    spread = one.squares - 2 * mean * one.cross + mean * mean * found.squares
    return mean, max(0.0, spread) * found.groups / (found.groups - 1) / found.rows**2
