"""Layouts drawn over eight devices, from all seven axes: every one trains the same model.

All 21 pairs of axes, every axis alone and a dozen triples, each with a family and options drawn by
a seed; expert goes with the families that have experts. jaxlm/verify.py is the oracle.
"""

import functools
import itertools
import math
import random

import pytest
import tiny

from jaxlm import verify
from jaxlm.config import AXES

SEED = 0
DENSE, SPARSE = ("llama", "gpt2"), ("mixtral", "qwen3_moe")
LARGEST = {"stage": 4, "tensor": 4, "expert": 4}  # layers, heads and experts of the tiny models
VARIANTS = {  # of what one device computes; each is measured there once
    "packed": ["batch.microbatches=2"],
    "whole, MHA": ["data.segments=false", "model.num_kv_heads=4", "batch.microbatches=4"],
}
REMAT = ("none", "full", "dots")


def sizes_of(axes: tuple[str, ...], rng: random.Random) -> dict[str, int]:
    """Sizes of 2 and more whose product is at most 8."""
    choices = itertools.product(*([n for n in (2, 4, 8) if n <= LARGEST.get(a, 8)] for a in axes))
    fit = [sizes for sizes in choices if math.prod(sizes) <= 8]
    return dict(zip(axes, rng.choice(fit), strict=True))


def draw(seed: int) -> list[tuple]:
    """(sizes, family, variant, remat) of every layout."""
    rng = random.Random(seed)
    triples = rng.sample(list(itertools.combinations(AXES, 3)), 14)
    drawn = []
    for axes in [*((a,) for a in AXES), *itertools.combinations(AXES, 2), *triples]:
        family = rng.choice(SPARSE if "expert" in axes else DENSE + SPARSE[:1])
        variant = rng.choice(list(VARIANTS))
        drawn.append((sizes_of(axes, rng), family, variant, rng.choice(REMAT)))
    return drawn


LAYOUTS = draw(SEED)


def config(family: str, variant: str, *overrides: str):
    return tiny.config(
        family, "batch.sequences=32", "model.num_layers=4", *VARIANTS[variant], *overrides
    )


@functools.cache
def reference(family: str, variant: str):
    return functools.cache(lambda double: verify.measure(config(family, variant), double))


def name(layout: tuple) -> str:
    sizes, *options = layout
    return ", ".join(["x".join(f"{axis}{size}" for axis, size in sizes.items()), *options])


def test_the_drawn_layouts_cover_what_they_should():
    pairs = {frozenset(sizes) for sizes, *_ in LAYOUTS if len(sizes) == 2}
    assert len(pairs) == 21
    assert len({tuple(sizes.items()) for sizes, *_ in LAYOUTS}) >= 40
    assert {family for _, family, _, _ in LAYOUTS} == {*DENSE, *SPARSE}


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_a_layout_trains_the_same_model(layout):
    sizes, family, variant, remat = layout
    drawn = verify.replace_mesh(config(family, variant, f"remat.policy={remat}"), sizes)
    result = verify.verify_mesh(drawn, reference(family, variant))
    assert result.equal, result
    # Rounding alone can choose another expert, where two are nearly tied; nothing else is excused.
    assert result.precision == "float32" or family in SPARSE, result
