"""The islands of a job: sub-meshes along `replica`, and arrays that go from them to the whole mesh.

No array is copied on the way: the array [d, ...] of each of K islands is a part of one array
[K d, ...] that is split over `replica` first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import attention
from jaxlm import config as cfg
from jaxlm.models import experts
from jaxlm.outer import merge
from jaxlm.program import Program, program_on
from jaxlm.sharding import make_layout, partitions
from jaxlm.state import State, abstract_state

ISLAND = "replica"  # the mesh axis along which the islands lie


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The islands of a job: their devices, and the programs that they run."""

    config: cfg.Config
    whole: Program  # on all devices, for the steps before the islands part
    meshes: tuple[Mesh, ...]
    own: tuple[int, ...]  # the islands with devices of this process
    island: Program  # of the first of these
    abstract: State  # shapes and shardings of its state
    rule: merge.Rule
    wires: tuple[str, str]  # to those that merge, and back
    homes: dict[str, P]  # sharding at rest of each array of the model

    @property
    def count(self) -> int:
        """K, the number of islands."""
        return len(self.meshes)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, which are merged."""
        return tuple(self.abstract.params)

    @property
    def changed(self) -> tuple[str, ...]:
        """The variables that the forward may change, which are averaged; not frozen weights."""
        return tuple(n for n in self.abstract.fixed if n not in self.island.structure.weights)


def island_config(config: cfg.Config, sizes: dict[str, int]) -> cfg.Config:
    """The config of one island of a mesh of these sizes: its devices, and its rows of a batch."""
    dcn = {axis: n for axis, n in config.mesh.dcn.items() if axis != ISLAND}
    mesh = dataclasses.replace(config.mesh, **{**sizes, ISLAND: 1}, dcn=dcn)
    batch = dataclasses.replace(config.batch, sequences=config.batch.sequences // sizes[ISLAND])
    return dataclasses.replace(config, mesh=mesh, batch=batch, outer=cfg.Outer())


def open_fleet(config: cfg.Config, whole: Program) -> Fleet:
    """The islands of a config on the mesh of its program."""
    grid = whole.mesh.devices
    kinds = (AxisType.Explicit,) * grid.ndim
    meshes = tuple(Mesh(grid[k : k + 1], cfg.AXES, axis_types=kinds) for k in range(len(grid)))
    here = jax.process_index()
    own = tuple(
        k
        for k, mesh in enumerate(meshes)
        if any(d.process_index == here for d in mesh.devices.flat)
    )
    one, mesh = island_config(config, dict(whole.layout.axes)), meshes[own[0]]
    sizes = dict(whole.layout.axes) | {ISLAND: 1}
    layout = make_layout(one, sizes, attention.choose(one, mesh), experts.choose(mesh))
    island = program_on(one, mesh, layout)
    structure = island.structure
    with jax.set_mesh(mesh):
        abstract = abstract_state(one, layout, island.optimizer, mesh)
    homes = {n: structure.home(n, layout).stored(d) for n, d in structure.dims.items()}
    wires = (config.outer.wire[0], config.outer.wire[-1])
    rule = merge.make_rule(config.outer)
    fleet = Fleet(config, whole, meshes, own, island, abstract, rule, wires, homes)
    _check_fragments(fleet)
    return fleet


def _check_fragments(fleet: Fleet) -> None:
    """Rows of a fragment are the same on every mesh: shards begin with a row of the first one."""
    parts, sizes = fleet.config.outer.fragments, []
    for name in fleet.names:
        rows, local = fleet.abstract.params[name].shape[0], local_shape(fleet, name)[0]
        if local != rows:
            sizes.append(local)
            if local % parts:
                good = [n for n in range(1, parts) if all(size % n == 0 for size in sizes)]
                raise cfg.UserError(
                    f"outer.fragments={parts} does not divide the {local} rows of {name} that a "
                    f"device has on this mesh; use outer.fragments={good[-1]}"
                )


def local_shape(fleet: Fleet, name: str) -> tuple[int, ...]:
    """The shape of a parameter's shard on a device."""
    shape = fleet.abstract.params[name].shape
    return fleet.island.layout.local_shape(fleet.homes[name], shape)


def num_copies(fleet: Fleet, name: str) -> int:
    """Devices of an island that hold the same shard of a parameter."""
    shards = math.prod(fleet.abstract.params[name].shape) // math.prod(local_shape(fleet, name))
    return fleet.meshes[0].size // shards


def split(fleet: Fleet, tree: Any, like: Any) -> dict[int, Any]:
    """Island -> its part of arrays on the whole mesh; `like` has the shapes of an island's.

    The buffers are the same: whoever donates one side deletes the other.
    """

    def on(mesh: Mesh):
        devices = set(mesh.devices.flat)

        def one(array, leaf):
            shards = [s.data for s in array.addressable_shards if s.device in devices]
            if not leaf.shape:
                shards = [_reshaped(shard, ()) for shard in shards]
            home = NamedSharding(mesh, leaf.sharding.spec)
            return jax.make_array_from_single_device_arrays(leaf.shape, home, shards)

        return jax.tree.map(one, tree, like)

    return {k: on(fleet.meshes[k]) for k in fleet.own}


def _reshaped(number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number in another shape on its device; by way of the host, as no mesh has one device."""
    if number.shape == shape:
        return number
    return jax.device_put(np.asarray(number).reshape(shape), number.device)


def join(fleet: Fleet, trees: dict[int, Any]) -> Any:
    """Arrays of all islands as one on the whole mesh: [K d, ...], and [K] of scalars."""

    def one(*arrays):
        shards = [s.data for array in arrays for s in array.addressable_shards]
        if not arrays[0].shape:
            shards = [_reshaped(shard, (1,)) for shard in shards]
        like = join_abstract(fleet, arrays[0])
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)

    return jax.tree.map(one, *trees.values())


def join_abstract(fleet: Fleet, tree: Any) -> Any:
    """Shapes and shardings of `join`, of an island's."""

    def one(leaf):
        shape = (fleet.count * leaf.shape[0], *leaf.shape[1:]) if leaf.shape else (fleet.count,)
        home = NamedSharding(fleet.whole.mesh, joined(leaf.sharding.spec))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=home)

    return jax.tree.map(one, tree)


def joined(spec: P) -> P:
    """The sharding of [K d, ...] where that of an island's [d, ...] is `spec`."""
    first, *rest = partitions(spec) or (None,)
    inner = () if first is None else (first,) if isinstance(first, str) else tuple(first)
    return P((ISLAND, *inner), *rest)


def whole_of(fleet: Fleet, trees: dict[int, Any]) -> Any:
    """Arrays that are equal on all islands as one on the whole mesh."""

    def one(*arrays):
        shards = [s.data for array in arrays for s in array.addressable_shards]
        home = NamedSharding(fleet.whole.mesh, arrays[0].sharding.spec)
        return jax.make_array_from_single_device_arrays(arrays[0].shape, home, shards)

    return jax.tree.map(one, *trees.values())


def rows_of_island(fleet: Fleet, array: Any) -> jax.ShapeDtypeStruct:
    """The shape and sharding of an island's rows of a batch [B, S]."""
    batch, *rest = partitions(array.sharding.spec)
    inner = tuple(a for a in ((batch,) if isinstance(batch, str) else batch) if a != ISLAND)
    shape = (array.shape[0] // fleet.count, *array.shape[1:])
    home = NamedSharding(fleet.meshes[fleet.own[0]], P(inner or None, *rest))
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=home)


def on_island(fleet: Fleet, k: int, value) -> jax.Array:
    """A value of the host on every device of an island."""
    value, home = np.asarray(value), NamedSharding(fleet.meshes[k], P())
    return jax.make_array_from_callback(value.shape, home, lambda index: value[index])
