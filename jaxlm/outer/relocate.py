"""One compilation for several sets of devices of the same shape.

XLA compiles for named devices, and jax compiles anew for each island. Here a program is compiled
for the first island; for the others the compiled code is loaded again with their devices' names.
jax's own loader (jax.experimental.serialize_executable) keeps the names, so that its reader and the
runtime's compile options are used below it. What is read is what this process has just written.

jax's cache of compiled programs is not asked: a program for CPUs that was loaded once cannot be
loaded again. On GPUs it leaves the names out by itself, and is used in place of all this.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

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

    cached = (
        meshes[0].devices.flat[0].platform == "gpu"
        and jax.config.values["jax_compilation_cache_dir"]
    )
    if len(meshes) == 1 or cached:
        return compile_all(range(len(meshes)))
    with _uncached():
        first = compile_all(range(1))
    try:
        return first + [_load(first[0], meshes[0], mesh) for mesh in meshes[1:]]
    except (AttributeError, TypeError, NotImplementedError, ValueError, RuntimeError) as error:
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


def _load(compiled: Any, there: Any, here: Any) -> jax.stages.Compiled:
    """The compiled program on the devices of mesh `here`, in place of those of `there`."""
    data, inputs, outputs = serialize_executable.serialize(compiled)
    old, new = list(there.devices.flat), list(here.devices.flat)
    reader = _Reader(io.BytesIO(data), old[0].client, new)
    reader.devices_by_id = dict(zip((device.id for device in old), new, strict=True))
    unloaded, arguments, no_kwargs = reader.load()
    return jax.stages.Compiled(
        unloaded.load(), [], inputs.unflatten(arguments), outputs, no_kwargs=no_kwargs
    )


class _Reader(serialize_executable._JaxPjrtUnpickler):
    """jax's reader, with a device assignment of our own."""

    def persistent_load(self, pid):
        if pid[0] != "exec":
            return super().persistent_load(pid)
        from jaxlib import xla_client

        ids = np.array([[device.id for device in self.devices_by_id.values()]])
        options = xla_client.CompileOptions()
        options.num_partitions = ids.size
        options.device_assignment = xla_client.DeviceAssignment.create(ids)
        options.executable_build_options.num_partitions = ids.size
        return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
