"""The nearest values and names that would work, for the hints in errors."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Iterator

SEARCH = 1 << 16  # no axis is larger: bounds the search for sizes that work


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A hint to append to an error: "; did you mean mesh.tensor?", or nothing."""
    names = list(names)
    found = [name for name in names if _tail(name) == _tail(word)]
    found = found or difflib.get_close_matches(word, names, n=1, cutoff=0.65)
    if not found:
        close = difflib.get_close_matches(_tail(word), map(_tail, names), n=2, cutoff=0.75)
        found = [name for name in names if _tail(name) in close]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


def or_list(word: str, names: tuple[str, ...]) -> str:
    """The nearest names, or all of them."""
    return did_you_mean(word, names) or f"; there are {', '.join(names)}"


def join(values: list[int]) -> str:
    """Numbers as a choice in words: 2 or 4."""
    return " or ".join(map(str, values))


@functools.cache  # a search asks for those of a few numbers, very often
def divisors(number: int) -> list[int]:
    """Those that an axis can be as large as, in order."""
    return [n for n in range(1, min(number, SEARCH) + 1) if number % n == 0]


def near_divisors(number: int, near: int) -> list[int]:
    """The largest divisor below `near` and the smallest above."""
    found = divisors(number)
    return [*[n for n in found if n < near][-1:], *[n for n in found if n > near][:1]]


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as an ordered product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def divide(name: str, value: int, factors: dict[str, int], pieces: int = 1) -> Iterator[str]:
    """What is wrong if `pieces` times the product of the factors does not divide a value."""
    factors = {key: factor for key, factor in factors.items() if factor > 1}
    unit = pieces * math.prod(factors.values())
    if value % unit == 0:
        return
    below = value // unit * unit
    fixes = [f"{name}={join([n for n in (below, below + unit) if n])}"]
    fixes += near_factors(value, factors, pieces)
    yield (
        f"{name}={value} is not divisible by {f'{pieces} x ' if pieces > 1 else ''}"
        f"{product(factors)}; nearest: {', or '.join(fixes)}"
    )


def near_factors(value: int, factors: dict[str, int], pieces: int = 1) -> Iterator[str]:
    """The nearest sizes of each factor, the others as they are, with which all divide a value."""
    for key, factor in factors.items():
        rest = pieces * math.prod(factors.values()) // factor
        if value % rest == 0:
            yield f"{key}={join(near_divisors(value // rest, factor))}"


def product(factors: dict[str, int]) -> str:
    """Keys and their numbers as a product: `8 (mesh.data=2 x mesh.fsdp=4)`."""
    text = " x ".join(f"{key}={factor}" for key, factor in factors.items())
    return text if len(factors) == 1 else f"{math.prod(factors.values())} ({text})"
