"""One trace for many candidates of a search, which differ in sizes and not in what the step does.

A step is traced on a small mesh, with a large prime as the rows of a device. So a dimension that is
a multiple of the prime holds rows, and what a shard_map made smaller by a mesh axis is known from
its operands: every dimension becomes a number times names (rows of a microbatch, microbatches) over
mesh axes, and the sizes of a candidate are put in their place.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm import config as cfg
from jaxlm.divisibility import layout_problems
from jaxlm.hardware.target import AbsentDevice, Target
from jaxlm.plan import estimate, roofline, traced
from jaxlm.plan.estimate import Estimate
from jaxlm.plan.walk import Array, Axes, Body, Sizes
from jaxlm.program import program_on, trace_train_step, turns
from jaxlm.sharding import Layout

ROWS, MICROBATCHES, TURNS = "rows", "microbatches", "turns"
FREE = ("data", "fsdp", "tensor")  # a step on 2 devices of each is one on any number, also on one
PRIMES = [n for n in range(100, 1000) if all(n % m for m in range(2, n))]


class Estimator:
    """Estimates of configs on a target; each step that is different is traced once."""

    def __init__(self, config: cfg.Config, target: Target) -> None:
        self.target = target
        self.known = roofline.efficiencies(target.kind, estimate.efficiencies_path(config))
        self.device = estimate.one_device(target)
        self.structure = estimate.structure_of(config)
        sizes = {n for shape in self.structure.shapes.values() for n in shape}
        self.sizes = sizes | {config.batch.sequence_length}
        self.steps: dict[Any, traced.Step] = {}

    def __call__(self, configs: Sequence[tuple[cfg.Config, dict[str, int]]]) -> list[Estimate]:
        """An estimate for each (config, sizes of its mesh)."""
        alike: dict[Any, list[int]] = collections.defaultdict(list)
        found: dict[int, Estimate] = {}
        with _uncollected():
            for i, (config, sizes) in enumerate(configs):
                alike[self.step_of(config, sizes)].append(i)
            for key, places in alike.items():
                meshes = [self.named(*configs[i]) for i in places]
                costs = traced.analyze_all(self.steps[key], meshes, self.target)
                for i, cost in zip(places, costs, strict=True):
                    found[i] = Estimate(cost, roofline.estimate(cost, self.target, self.known))
        return [found[i] for i in range(len(configs))]

    def named(self, config: cfg.Config, sizes: dict[str, int]) -> tuple[Sizes, dict[str, int]]:
        """What the names of a step's dimensions are for a config, and its dcn."""
        count = config.batch.microbatches
        layout = estimate.layout_of(config, sizes, self.device)
        rows = {ROWS: config.batch.sequences // count, MICROBATCHES: count}
        return sizes | rows | {TURNS: turns(config, layout)}, config.mesh.dcn

    def step_of(self, config: cfg.Config, sizes: dict[str, int]) -> Any:
        """The key of the step that stands for a config."""
        layout = estimate.layout_of(config, sizes, self.device)
        many = config.batch.microbatches > 1
        batch = dataclasses.replace(config.batch, sequences=1, microbatches=1 + many)
        alike = dataclasses.replace(config, mesh=cfg.Mesh(), batch=batch)
        small = {axis: 2 if axis in FREE else n for axis, n in sizes.items()}
        own = sizes["tensor"]
        counts = {2, 4, 8} | {n for n in range(2, own + 1) if own % n == 0}
        layouts = {}
        for mesh in (*(small | {"tensor": n} for n in (*sorted(counts), own)), sizes):
            here = estimate.layout_of(config, mesh, self.device)
            if mesh is sizes or dataclasses.replace(here, axes=layout.axes) == layout:
                layouts[tuple(mesh.items())] = here
        *rest, last = layouts
        for mesh in map(dict, (*sorted(rest, key=lambda m: self.alike(layouts[m])), last)):
            key = (repr(alike), *mesh.values())
            if key not in self.steps:
                one = self.enlarged(config, mesh)
                if mesh != sizes and any(layout_problems(one, mesh)):
                    continue
                self.steps[key] = self.trace(one, mesh)
            if all(mesh[axis] == sizes[axis] for axis in self.steps[key].unclear):
                return key
        raise AssertionError("a config stands for itself")

    def alike(self, layout: Layout) -> int:
        """How many dimensions of weights are as large on a device as another one, or an axis."""
        local = {axis: n for axis, n in layout.axes if axis not in FREE and n > 1}
        for name, shape in self.structure.shapes.items():
            dims = self.structure.dims[name]
            local |= zip(dims.split(), layout.local_shape(dims, shape), strict=True)
        large = [n for n in local.values() if n > 1]
        return len(large) - len(set(large))

    def enlarged(self, config: cfg.Config, sizes: dict[str, int]) -> cfg.Config:
        """The config on a mesh, with numbers of rows and microbatches that nothing else has."""
        free = [p for p in PRIMES if all(n % p for n in self.sizes)]
        count = 1
        if config.batch.microbatches > 1:
            count = free[1] * sizes["stage"]
        ways = math.prod(sizes[axis] for axis in (cfg.RULES | config.rules)["batch"])
        rows = ways * free[0]
        batch = dataclasses.replace(config.batch, sequences=rows * count, microbatches=count)
        mesh = dataclasses.replace(cfg.Mesh(), **sizes)
        return dataclasses.replace(config, mesh=mesh, batch=batch)

    def trace(self, config: cfg.Config, sizes: dict[str, int]) -> traced.Step:
        """The step of an enlarged config, with names for its sizes."""
        kind = self.device[0]
        devices: Any = [
            AbsentDevice(i, kind.platform, kind.device_kind, 0)
            for i in range(math.prod(sizes.values()))
        ]
        grid = np.array(devices, object).reshape(tuple(sizes.values()))
        mesh = Mesh(grid, cfg.AXES, axis_types=(AxisType.Explicit,) * len(cfg.AXES))
        layout, count = estimate.layout_of(config, sizes, self.device), config.batch.microbatches
        program = program_on(config, mesh, layout)
        step = traced.read_step(trace_train_step(config, program), self.target)
        rows = config.batch.sequences // count
        unclear = generalize(step.body, Units(sizes, rows, count, turns(config, layout)))
        return dataclasses.replace(step, unclear=unclear)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for garbage in cycles: traces make none, and it takes a fifth of the time
    (21.9 s against 17.6 s of CPU, llama3-8b on v6e:16x16; the memory in use is the same)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Units(NamedTuple):
    """The sizes of the step that was traced."""

    mesh: Sizes
    rows: int  # of a microbatch, on all devices
    microbatches: int
    turns: int  # of the loop over them


class _Dim(NamedTuple):
    number: int
    times: Axes = ()
    mapped: Axes = ()


Table = dict[int, _Dim]  # a size inside a shard_map -> what it is


def generalize(body: Body, units: Units) -> frozenset[str]:
    """Put names in the place of the sizes that are those of the traced mesh and batch.

    Returns the mesh axes that the step stands for with this size alone: inside a shard_map, a
    dimension that they split is as large as another one.
    """
    namer = _Namer(body, units)
    namer.rename(body)
    return frozenset(namer.unclear)


class _Namer:
    def __init__(self, body: Body, units: Units) -> None:
        self.units = units
        inputs = [body.arrays[v] for v in body.inputs]
        self.parts = {each for one in inputs for each in zip(one.shape, one.split, strict=True)}
        rows = units.rows * units.microbatches
        split = (one.split[0] for one in inputs if one.shape[:1] == (rows,))
        self.batch: Axes = next(split, ())  # the axes that split rows
        self.kept: dict[tuple, list[_Dim]] = {}
        self.unclear: set[str] = set()
        self.tables: list[Table] = [{}]
        # The same of whole shapes, in any order and without ones: sorted sizes -> size -> what.
        self.shapes: list[dict[tuple[int, ...], Table]] = [{}]
        # Sizes and shapes that have another meaning as well, and the axes that tell them apart.
        self.doubtful: list[dict[Any, set[str]]] = [{}]
        for pairs in body.frames[1:]:
            self.tables.append(self.table(pairs))

    def table(self, pairs: list[tuple[Array, Array]]) -> Table:
        """Of a shard_map, from its operands and results: those that are split tell by how many."""
        table: Table = {}
        meanings: dict[tuple[int, ...], set[_Dim]] = collections.defaultdict(set)
        shapes: dict[tuple[int, ...], Table] = {}
        for outer, inner in pairs:
            if self.is_kept(outer):
                continue
            dims = list(self.dims(outer))
            for i, n in enumerate(inner.shape):
                axes = tuple(axis for axis in outer.split[i] if axis not in inner.split[i])
                dims[i] = dims[i]._replace(mapped=dims[i].mapped + axes)
                if n > 1 and dims[i].mapped:
                    table.setdefault(n, dims[i])
                if n == 1 < outer.shape[i]:  # not seen any more where it is split further
                    self.unclear |= {*axes} - {*self.batch}
            if any(dim.mapped for dim in dims):
                each = sorted(set(zip(inner.shape, dims, strict=True)))
                each = [(n, dim) for n, dim in each if n > 1]
                if len(dict(each)) == len(each):
                    shapes.setdefault(_sorted(inner.shape), dict(each))
                for n, dim in each:
                    meanings[(n,)].add(dim)
                    meanings[*_sorted(inner.shape), n].add(dim)
        self.shapes.append(shapes)
        doubtful: dict[Any, set[str]] = collections.defaultdict(set)
        for key, found in meanings.items():
            axes = [set(dim.mapped) for dim in found]
            doubtful[key[:-1] or key[0]] |= set.union(*axes) - set.intersection(*axes)
        self.doubtful.append(doubtful)
        for outer, inner in pairs:
            if self.is_kept(outer):
                dims = [self.dim(n, table) for n in inner.shape]
                self.kept.setdefault((outer.shape, outer.split), dims)
        return table

    def is_kept(self, outer: Array) -> bool:
        """Whether autodiff keeps it from one shard_map for another: a dimension is one of each
        device's, side by side."""
        if outer.frame:
            return False
        if len({axis for axes in outer.split for axis in axes}) == len(self.units.mesh):
            return True  # else axes of one device are left out
        sizes = [(n, axes) for n, axes in zip(outer.shape, outer.split, strict=True) if axes]
        if not sizes:  # a constant
            return any(n % (self.units.rows // self.count(self.batch)) == 0 for n in outer.shape)
        split = [each for each in sizes if each[0] > self.count(each[1])] or sizes
        if len(split) != 1:
            return False
        ((n, axes),) = split
        if n % self.units.rows == 0:
            return bool(set(axes) - set(self.batch))
        return (n, axes) not in self.parts

    def count(self, axes: Axes) -> int:
        """Devices along them."""
        return math.prod(self.units.mesh[axis] for axis in axes)

    def dims(self, array: Array) -> list[_Dim]:
        """The dimensions of an array as it was traced."""
        kept = self.find_kept(array)
        if kept:
            return kept
        doubtful, key = self.doubtful[array.frame], _sorted(array.shape)
        if key in self.shapes[array.frame]:
            self.unclear |= doubtful.get(key, set())
            known = self.shapes[array.frame][key]
            return [known.get(n, _Dim(n)) for n in array.shape]
        self.unclear |= {axis for n in array.shape for axis in doubtful.get(n, ())}
        found = [self.dim(n, self.tables[array.frame]) for n in array.shape]
        for i, (n, axes) in enumerate(zip(array.shape, array.split, strict=True)):
            if n == self.count(axes) > 1 and (n, axes) not in self.parts:  # one for each device
                found[i] = _Dim(1)
        if any(ROWS in dim.times for dim in found):
            parts = _Dim(1, (MICROBATCHES,))
            found = [parts if dim == _Dim(self.units.microbatches) else dim for dim in found]
        return found

    def find_kept(self, array: Array) -> list[_Dim]:
        """The dimensions of what autodiff keeps, one by one or stacked by a loop; else none."""
        for lead in (0, 1):
            kept = self.kept.get((array.shape[lead:], array.split[lead:]))
            if kept and array.frame == 0:
                return [_Dim(n) for n in array.shape[:lead]] + kept
        return []

    def dim(self, n: int, table: Table) -> _Dim:
        """What a size is."""
        if n in table:
            return table[n]
        mapped = () if table is self.tables[0] else self.batch
        mapped = next((dim.mapped for dim in table.values() if ROWS in dim.times), mapped)
        whole, count = n * self.count(mapped), self.units.microbatches
        if whole % self.units.rows:
            return _Dim(n)
        number = whole // self.units.rows
        if count > 1 and number % count == 0:
            return _Dim(number // count, (ROWS, MICROBATCHES), mapped)
        return _Dim(number, (ROWS,), mapped)

    def rename(self, body: Body) -> None:
        """Of a body and those of its loops."""
        for number, array in body.arrays.items():
            dims = self.dims(array)
            split = ((),) * len(dims) if self.find_kept(array) else array.split
            body.arrays[number] = dataclasses.replace(
                array, shape=tuple(dim.number for dim in dims),
                times=tuple(dim.times for dim in dims), split=split,
                mapped=tuple(dim.mapped for dim in dims),
            )  # fmt: skip
        for op in body.ops:
            if op.name == "scan" and op.params["length"] == self.units.turns > 1:
                op.params = op.params | {"length": TURNS}
            for inner in op.bodies:
                self.rename(inner)


def _sorted(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))
