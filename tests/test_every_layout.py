"""Layouts over eight devices, from all seven axes: every one trains the same model.

Seven triples in which each of the 21 pairs of axes meets once (a Fano plane); families and options
are drawn by a seed, expert goes with the families that have experts. The nightly set holds more of
the same: every axis alone at its largest size, all pairs, and a dozen other triples. Large sizes
each day: tensor=4 and data=4 in test_layouts.py, stage=4 in test_pipeline.py, context=8 in
test_context.py, expert=4 in test_moe.py. jaxlm/verify.py is the oracle.
"""

import functools
import itertools
import math
import random

import pytest
import tiny

from jaxlm import verify
from jaxlm.config import AXES

SEED = 515  # draws both dense families twice, both sparse ones, every remat policy twice
DENSE, SPARSE = ("llama", "gpt2"), ("mixtral", "qwen3_moe")
LARGEST = {"stage": 4, "tensor": 4, "expert": 4}  # layers, heads and experts of the tiny models
VARIANTS = {  # of what one device computes; each is measured there once
    "packed": ["batch.microbatches=2", "batch.sequences=16"],
    "whole, MHA": ["data.segments=false", "model.num_kv_heads=4", "batch.microbatches=4"],
}
# GPT-2 has an attention of its own; it is as its authors made it in test_layouts.py.
OPTIONS = {"gpt2": ["model.qk_norm=true", "model.attention_softcap=20", "model.logit_softcap=5"]}
REMAT = ("none", "full", "dots")
PLANE = [
    tuple(line.split())
    for line in """
        replica stage data
        replica fsdp context
        replica expert tensor
        stage fsdp expert
        stage context tensor
        data fsdp tensor
        data context expert
    """.strip().splitlines()
]


def sizes_of(axes: tuple[str, ...], rng: random.Random) -> dict[str, int]:
    """Sizes of 2 and more whose product is at most 8."""
    choices = itertools.product(*([n for n in (2, 4, 8) if n <= LARGEST.get(a, 8)] for a in axes))
    fit = [sizes for sizes in choices if math.prod(sizes) <= 8]
    return dict(zip(axes, rng.choice(fit), strict=True))


def draw(rng: random.Random, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple:
    """(sizes, family, variant, remat) of a layout."""
    family = rng.choice(SPARSE if "expert" in axes else DENSE + SPARSE[:1])
    return sizes, family, rng.choice(list(VARIANTS)), rng.choice(REMAT)


def draw_all(seed: int) -> tuple[list[tuple], list[tuple]]:
    """Layouts, and those of the nightly set."""
    rng = random.Random(seed)
    few = [draw(rng, line, dict.fromkeys(line, 2)) for line in PLANE]
    alone = [draw(rng, (axis,), {axis: LARGEST.get(axis, 8)}) for axis in AXES]
    triples = rng.sample(list(itertools.combinations(AXES, 3)), 14)
    more = [*itertools.combinations(AXES, 2), *triples]
    return few, alone + [draw(rng, axes, sizes_of(axes, rng)) for axes in more]


LAYOUTS, MORE = draw_all(SEED)


def config(family: str, variant: str, *overrides: str):
    own = [*VARIANTS[variant], *OPTIONS.get(family, [])]
    return tiny.config(family, "batch.sequences=32", "model.num_layers=4", *own, *overrides)


@functools.cache
def reference(family: str, variant: str):
    return functools.cache(functools.partial(verify.measure, config(family, variant)))


def name(layout: tuple) -> str:
    sizes, *options = layout
    return ", ".join(["x".join(f"{axis}{size}" for axis, size in sizes.items()), *options])


def test_the_layouts_cover_what_they_should():
    pairs = [frozenset(p) for sizes, *_ in LAYOUTS for p in itertools.combinations(sizes, 2)]
    assert len(pairs) == len(set(pairs)) == 21
    for i, values in enumerate([DENSE + SPARSE, VARIANTS, REMAT], 1):
        drawn = [layout[i] for layout in LAYOUTS]
        assert min(drawn.count(value) for value in values) >= (1, 3, 2)[i - 1]
    assert {axis for sizes, *_ in MORE if len(sizes) == 1 for axis in sizes} == set(AXES)
    assert {frozenset(sizes) for sizes, *_ in MORE if len(sizes) == 2} == set(pairs)


NIGHTLY = [pytest.param(layout, marks=pytest.mark.nightly, id=name(layout)) for layout in MORE]


@pytest.mark.parametrize("layout", [*LAYOUTS, *NIGHTLY], ids=name)
def test_a_layout_trains_the_same_model(layout):
    sizes, family, variant, remat = layout
    drawn = verify.replace_mesh(config(family, variant, f"remat.policy={remat}"), sizes)
    # Rounding alone can choose another expert, where two are nearly tied; nothing else is excused.
    double = family in SPARSE
    # The three lines through `replica` hold every axis: there initial values and updates as well.
    how = double, layout in LAYOUTS and "replica" not in sizes
    found = verify.errors(reference(family, variant)(*how), verify.measure(drawn, *how))
    assert not verify._first(found, "float64" if double else "float32")
