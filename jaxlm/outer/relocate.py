"""One compilation for several sets of CPU devices of the same shape.

XLA compiles for named devices, and jax compiles anew for each island. Here a program is compiled
for the first island; for the others the runtime loads the machine code again with their devices'
names, and jax's description of the program (a dataclass without a public name) is copied with their
shardings. Nothing is pickled. jax's cache of compiled programs is not asked: a program for CPUs
that was loaded once cannot be loaded again.

On other platforms jax compiles for each island. On GPUs its cache leaves the names of devices out,
so that only the first one is compiled; on TPUs it is not tried here whether machine code can move.
A process of a pod has devices of one island as a rule, and compiles once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jaxlib import xla_client

logger = logging.getLogger("jaxlm")


def compile_for(step: jax.stages.Wrapped, meshes: list, arguments: list[tuple]) -> list[Any]:
    """`step` compiled for each mesh, called with these arguments there.

    The meshes have the same shape, and so have the arguments but for their devices.
    """

    def compile_all(which: range) -> list[Any]:
        made = []
        for k in which:
            with jax.set_mesh(meshes[k]):
                made.append(step.lower(*arguments[k]).compile())
        return made

    if len(meshes) == 1 or meshes[0].devices.flat[0].platform != "cpu":
        return compile_all(range(len(meshes)))
    with _uncached():
        first = compile_all(range(1))
    try:
        return first + [_load(first[0], mesh) for mesh in meshes[1:]]
    except (AttributeError, TypeError) as error:  # another jax has other names for what is private
        logger.info(
            "each island's step is compiled on its own, as the runtime cannot move it: %s",
            " ".join(str(error).split())[:200],
        )
    return first + compile_all(range(1, len(meshes)))


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """jax's cache of compiled programs is not used inside."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _load(compiled: Any, mesh: Mesh) -> jax.stages.Compiled:
    """The compiled program on the devices of another mesh of the same shape."""
    there, devices = compiled._executable._unloaded_executable, list(mesh.devices.flat)
    client = devices[0].client
    options = xla_client.CompileOptions()
    options.num_partitions = options.executable_build_options.num_partitions = len(devices)
    ids = np.array([[device.id for device in devices]])
    options.device_assignment = xla_client.DeviceAssignment.create(ids)
    own = xla_client.DeviceList(tuple(devices))
    code = there.xla_executable
    code = code.serialize() if hasattr(code, "serialize") else client.serialize_executable(code)
    move = lambda homes: [NamedSharding(mesh, h.spec, memory_kind=h.memory_kind) for h in homes]
    here = dataclasses.replace(
        there, xla_executable=client.deserialize_executable(code, own, options), device_list=own,
        input_shardings=move(there.input_shardings), output_shardings=move(there.output_shardings),
    )  # fmt: skip
    return jax.stages.Compiled(
        here.load(), [], compiled.args_info, compiled.out_tree, no_kwargs=compiled._no_kwargs
    )
