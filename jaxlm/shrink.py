"""The small config that stands for a large one in `verify-layout`, and the meshes it runs on.

Widths, layers and vocabulary become small; what makes the program what it is stays: the family,
every kind of block and group of layers, heads and experts, remat, chunks, segments, rules, the
optimizer. What depends on a size is scaled with it, so that it still happens: a window hides
tokens, a soft cap bends, experts run full, wavelengths are stretched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlm import config as cfg
from jaxlm.attention import SHORT
from jaxlm.models import family_module, staged_group
from jaxlm.optim import MIN_FACTORED
from jaxlm.validate import validate

LARGEST = 64  # devices of the config's own mesh that are simulated; above, its axes shrink to 2
SOFTCAP = 1.0  # scores and logits of the small model are about as large
MeshSizes = dict[str, int]  # of the axes of a mesh


def replace_mesh(config: cfg.Config, sizes: MeshSizes) -> cfg.Config:
    """The config on another mesh; `dcn` stays where the mesh still has its factors."""
    dcn = {a: n for a, n in config.mesh.dcn.items() if sizes.get(a, 1) % n == 0}
    every = {axis: sizes.get(axis, 1) for axis in cfg.AXES}
    mesh = dataclasses.replace(cfg.Mesh(), dcn=dcn, **every)
    pipeline = config.pipeline if mesh.stage > 1 else cfg.Pipeline()
    return dataclasses.replace(config, mesh=mesh, pipeline=pipeline)


def own_mesh(config: cfg.Config) -> MeshSizes:
    """The config's mesh, with -1 filled up to 8 devices; a large mesh has axes of 2."""
    fill = max(1, 8 // math.prod(max(1, getattr(config.mesh, a)) for a in cfg.AXES))
    sizes = {axis: getattr(config.mesh, axis) for axis in cfg.AXES}
    sizes = {axis: fill if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) > LARGEST:
        sizes = {axis: min(size, 2) for axis, size in sizes.items()}
    return sizes


def shrink(config: cfg.Config, meshes: Sequence[MeshSizes]) -> cfg.Config:
    """The config in float32 with the smallest sizes that all the meshes divide."""
    for sizes in meshes:
        validate(replace_mesh(config, sizes), math.prod(sizes.values()))
    unit = functools.partial(_unit, config, meshes)
    m, b = config.model, config.batch
    stages = max(sizes.get("stage", 1) for sizes in meshes)
    microbatches = min(b.microbatches, 2 * stages)
    chunks = min(config.loss.chunks, 4)
    length = math.lcm(2 * unit("seq"), unit("residual_seq"), unit("seq") * chunks)
    length *= -(-32 // length)
    multiple = math.lcm(unit("vocab"), 8)
    width = math.lcm(unit("embed") * unit("layers"), unit("norm"), 16)  # generation: over both
    # Adafactor keeps the means of wide matrices alone.
    least = MIN_FACTORED if config.optimizer.name == "adafactor" else 32
    embed, mlp = width * -(-least // width), math.lcm(unit("mlp"), 16)
    head = math.lcm(unit("head_dim"), 8)
    smaller = dict(
        num_layers=num_layers(config, meshes), embed_dim=embed, head_dim=head,
        mlp_dim=mlp * max(3, -(-least // mlp)), vocab_multiple=multiple,
        vocab_size=multiple * max(2, -(-64 // multiple)) - 3,
        init_std=m.init_std * math.sqrt(max(1.0, m.embed_dim / embed)),
    ) | dict(_scaled(m, b.sequence_length, length))  # fmt: skip
    for field in dataclasses.fields(m):  # those of a family
        if field.metadata["dim"] == "positions":
            smaller[field.name] = math.lcm(length, unit("positions"))
        elif field.metadata["dim"] == "mlp" and field.name != "mlp_dim" and getattr(m, field.name):
            smaller[field.name] = mlp
    smaller |= m.shrunk(smaller, length)
    kernels = config.attention.backend in ("splash", "cudnn")
    whole = config.attention.backend == "xla" or (
        config.attention.backend == "auto" and b.sequence_length <= SHORT
    )
    # Other numbers of microbatches divide it too.
    turns = 2 * stages if config.pipeline.repeats > 1 else 2
    beside = stages if len(family_module(m.family).groups(m)) > 1 else 1  # they split rows there
    sequences = math.lcm(unit("batch") * beside, 2) * math.lcm(microbatches, turns)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(m, **smaller),
        batch=cfg.Batch(
            sequences=sequences, sequence_length=length, microbatches=microbatches
        ),
        attention=dataclasses.replace(
            config.attention, backend="xla" if whole and not kernels else "chunked",
            chunk=max(1, length // 4),
        ),
        precision=cfg.Precision(compute="float32"),
        loss=dataclasses.replace(config.loss, chunks=chunks),
        sample=cfg.Sample(),
    )  # fmt: skip


def _unit(config: cfg.Config, meshes: Sequence[MeshSizes], dim: str) -> int:
    """What a dimension must be a multiple of, in use and at rest, on every mesh."""
    axes = (cfg.RULES | config.rules).get(dim, ()), (cfg.STORAGE | config.storage).get(dim, ())
    count = lambda sizes: math.prod(sizes.get(axis, 1) for axis in {*axes[0], *axes[1]})
    return math.lcm(*(count(sizes) for sizes in meshes))


def _scaled(model: cfg.Model, before: int, length: int) -> Iterator[tuple[str, Any]]:
    """Keys of a model whose effect depends on the length or on the sizes of activations."""
    for name, value in vars(model).items():
        if "window" in name and value:
            # A window that hides nothing of a sequence hides nothing of a short one.
            yield name, min(value, length // 3) if value < before else length
        elif "softcap" in name and value:
            yield name, min(value, SOFTCAP)


def num_layers(config: cfg.Config, meshes: Sequence[MeshSizes]) -> int:
    """The fewest layers with all that the config's layers have, and that all the meshes divide.

    The family says what its layers are: every pattern of blocks, whole, every pattern that another
    one follows, and repeats where there are repeats.
    """
    wanted = layer_kinds(config.model)
    for number in range(1, config.model.num_layers):
        model = dataclasses.replace(config.model, num_layers=number)
        fewer = dataclasses.replace(config, model=model)
        try:
            for sizes in meshes:
                validate(replace_mesh(fewer, sizes), math.prod(sizes.values()))
        except cfg.UserError:  # a number that the mesh or the family does not allow
            continue
        if layer_kinds(model) == wanted:
            return number
    return config.model.num_layers


def layer_kinds(model: cfg.Model) -> tuple[frozenset, frozenset, tuple]:
    """The patterns of blocks, each with whether it is repeated, which follow one another, and the
    one that stages are cut from.
    """
    groups = family_module(model.family).groups(model)
    kinds = [tuple(_kind(block) for block in pattern) for pattern, _ in groups]
    repeated = {(kind, min(2, repeats)) for kind, (_, repeats) in zip(kinds, groups, strict=True)}
    return frozenset(repeated), frozenset(itertools.pairwise(kinds)), kinds[staged_group(model)]


def _kind(block: Any) -> Any:
    """What tells blocks apart: the class, and the arguments that a partial of it has."""
    if isinstance(block, functools.partial):
        return block.func, repr(block.args), repr(sorted(block.keywords.items()))
    return block
