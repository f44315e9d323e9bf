"""Which tensor of a Hugging Face directory is which part of our arrays, by a family's NAMES.

NAMES: our name -> (our dimensions as letters -> theirs, their name), such as ("dhc->(hc)d",
"model.layers.{layer}.self_attn.q_proj.weight"). "block.x" is parameter x of every layer's block. Of
an array that holds all experts of a layer, {expert} is the place.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config as cfg
from jaxlm.models import family_module


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor, and the part of our array that it is."""

    name: str  # Hugging Face's
    ours: str
    place: tuple[int, ...]  # leading indices into our array: repeat and expert, where stacked
    layer: int  # its number in the model; -1: of no layer
    pattern: str  # our dimensions -> theirs
    sizes: tuple[int, ...]  # of our dimensions, the vocabulary without its padding

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that Hugging Face gives it."""
        letters, groups = parse_pattern(self.pattern)
        sizes = dict(zip(letters, self.sizes, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


@functools.cache
def parse_pattern(pattern: str) -> tuple[str, list[str]]:
    """ "dhc->(hc)d" -> ("dhc", ["hc", "d"])."""
    letters, theirs = pattern.split("->")
    return letters, [group or letter for group, letter in re.findall(r"\((\w+)\)|(\w)", theirs)]


def tensors(model: cfg.Model, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Every Hugging Face tensor of a model whose arrays have these shapes."""
    family = family_module(model.family)
    firsts, found = first_layers(family.groups(model)), []
    for ours, shape in shapes.items():
        name, first, stride = ours, 0, 0
        if ours.startswith("groups."):
            _, i, j, rest = ours.split(".", 3)
            name = f"block.{rest}"
            first, stride = firsts[int(i)][int(j)]
        if name not in family.NAMES:
            raise cfg.UserError(f"{ours}: Hugging Face's {model.family} has no such parameter")
        pattern, template = family.NAMES[name]
        letters, _ = parse_pattern(pattern)
        lead, sizes = shape[: -len(letters)], shape[-len(letters) :]
        sizes = [model.vocab_size if x == "v" else n for x, n in zip(letters, sizes, strict=True)]
        for place in itertools.product(*map(range, lead)):
            layer = first + stride * place[0] if stride else -1
            theirs = template.format(layer=layer, expert=place[-1] if place else 0)
            found.append(Tensor(theirs, ours, place, layer, pattern, tuple(sizes)))
    return found


def first_layers(groups) -> list[list[tuple[int, int]]]:
    """(number, stride) of the layers that block j of pattern i stands for, as [i][j].

    Its repeat r is layer number + stride * r: layers count through a pattern, then its repeats.
    """
    found, start = [], 0
    for pattern, repeats in groups:
        found.append([(start + j, len(pattern)) for j in range(len(pattern))])
        start += len(pattern) * repeats
    return found


def to_theirs(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Our part of an array, padding cut off, as Hugging Face's tensor."""
    letters, groups = parse_pattern(tensor.pattern)
    array = array[tuple(slice(size) for size in tensor.sizes)]
    return array.transpose([letters.index(x) for x in "".join(groups)]).reshape(tensor.shape)


def from_theirs(source: Any, tensor: Tensor, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The block [low, high) of each of our dimensions, read from Hugging Face's tensor.

    Only that block is read where it is contiguous in theirs, else whole dimensions of theirs.
    """
    letters, groups = parse_pattern(tensor.pattern)
    wanted, sizes = dict(zip(letters, bounds)), dict(zip(letters, tensor.sizes))  # noqa: B905
    ranges, held = [], {}
    for group in groups:
        shape, box = [sizes[x] for x in group], [wanted[x] for x in group]
        start = int(np.ravel_multi_index([low for low, _ in box], shape))
        stop = int(np.ravel_multi_index([high - 1 for _, high in box], shape)) + 1
        if stop - start != math.prod(high - low for low, high in box):
            start, stop, box = 0, math.prod(shape), [(0, size) for size in shape]
        ranges.append(slice(start, stop))
        held |= dict(zip(group, box, strict=True))
    order = "".join(groups)
    block = np.asarray(source[tuple(ranges)]).astype(np.float32)
    block = block.reshape([held[x][1] - held[x][0] for x in order])
    block = block.transpose([order.index(x) for x in letters])
    cut = [(wanted[x][0] - held[x][0], wanted[x][1] - held[x][0]) for x in letters]
    return block[tuple(slice(low, high) for low, high in cut)]
