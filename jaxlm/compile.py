"""Compile the train step for devices that are not here, and read what the compiler made of it.

python -m jaxlm.compile CONFIG --target v5e:2x4 [key=value ...]     TPU chips
python -m jaxlm.compile CONFIG --target h100:1x8 [key=value ...]    hosts x GPUs
python -m jaxlm.compile CONFIG --target cpu:8 [key=value ...]       simulated
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.sharding import Layout, batch_shardings
from jaxlm.state import abstract_state
from jaxlm.train import Program, make_program


def trace_train_step(config: cfg.Config, program: Program) -> jax.stages.Traced:
    """The train step on shapes only; `.lower().compile()` needs the compiler, not the devices."""
    mesh, layout = program.mesh, program.layout
    shape = (config.batch.sequences, config.batch.sequence_length)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding
        )
        for name, sharding in batch_shardings(config, layout, mesh).items()
    }
    with jax.set_mesh(mesh):
        state = abstract_state(config, layout, program.optimizer, mesh)
        return program.train_step.trace(state, batch)


def tpu_devices(topology: str) -> list:
    """The devices of a slice such as v5e:2x4 or v5p:4x4x4, by libtpu, with its real links.

    Cubes of v4, v5p and tpu7x wrap around; v5e and v6e do along a dimension of 16. Without that the
    compiler plans for an open mesh (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
    """
    if importlib.util.find_spec("libtpu") is None:
        raise cfg.UserError(f"target={topology}: libtpu is missing; pip install 'jaxlm[plan-tpu]'")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "x", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    kind, _, shape = topology.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    torus = len(sizes) == 3
    period = 4 if torus else 16
    wraps = [size % period == 0 for size in sizes]
    settings: dict = {"wrap": (all(wraps),) * 3 if torus else (*wraps, False)}
    if kind in ("v4", "v5p"):  # one device is a chip of two cores
        settings |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    name = f"{'v5' if kind == 'v5p' else kind}:{shape}"
    return list(topologies.get_topology_desc(name, "tpu", **settings).devices)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU that is not here."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units per core
    bandwidth: int  # of memory, bytes/s
    cache: int  # L2, bytes
    clock: float  # GHz
    memory: int  # bytes
    shared: int  # shared memory per core, bytes
    links: int  # NVLink


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2039040000000, 41943040, 1.41,
                85100068864, 167936, 12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 3352320000000, 52428800, 1.98,
                84942979072, 233472, 18),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 4800000000000, 52428800, 1.98,
                151397597184, 233472, 18),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 7672320000000, 132644864, 1.965,
                191514411008, 233472, 18),
}  # fmt: skip


def gpu_devices(kind: str, hosts: int, gpus: int) -> list:
    """The devices of `hosts` x `gpus` NVIDIA GPUs, by the CUDA plugin of jax."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise cfg.UserError(
            f"target={kind}: the CUDA plugin is missing; pip install 'jaxlm[plan-gpu]'"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    topology = topologies.get_topology_desc(
        kind, "cuda", target_config=target_text(GPUS[kind]), topology=f"1x{hosts}x{gpus}"
    )
    return list(topology.devices)


def target_text(gpu: Gpu) -> str:
    """A GpuTargetConfigProto (xla/stream_executor/device_description.proto)."""
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    info = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49152, "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared - 1024, "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64, "memory_bandwidth": gpu.bandwidth, "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock, "device_memory_size": gpu.memory,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "device_address_bits": 64, "pcie_bandwidth": 2**35,
        "collective_memory_granularity": 2**21,
    }  # fmt: skip
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    return f"""gpu_device_info {{ {fields}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
      device_interconnect_info {{ active_links: {gpu.links} }} device_vendor: "NVIDIA Corporation"
      name: "{gpu.name}" driver_version: "12.9.0" runtime_version: "12.9.0"
      compile_time_toolkit_version: "12.9.0" dnn_version: "9.8.0" }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 }} device_description_str: "{gpu.name}" """


def target_devices(target: str) -> list:
    """The devices that a target names: v5e:2x4, h100:1x8, cpu:8."""
    jax.config.update("jax_platforms", "cpu")
    kind, _, shape = target.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if kind in ("v4", "v5e", "v5p", "v6e", "tpu7x") and len(sizes) in (2, 3):
        return tpu_devices(target)
    if kind in GPUS and len(sizes) == 2:
        return gpu_devices(kind, *sizes)
    if kind == "cpu" and len(sizes) == 1:
        jax.config.update("jax_num_cpu_devices", sizes[0])
        return jax.devices("cpu")
    raise cfg.UserError(
        f"target={target} is not known; use a slice as v5e:2x4, v5p:4x4x4, hosts x GPUs as "
        f"h100:1x8 (of {', '.join(GPUS)}), or cpu:8"
    )


class Collective(NamedTuple):
    """One collective of a compiled program; asynchronous halves are one."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute
    shapes: tuple[str, ...]  # results on one device, "f32[8,32]": several where combined
    bytes: int  # of those
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh that talk; (): all
    loops: int  # while loops around it
    times: int  # that it runs in a step

    @property
    def scalars(self) -> int:
        """How many of the results are a single number, or a few that were put together."""
        count = lambda shape: math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))
        return sum(count(shape) < 8 for shape in self.shapes)


_KINDS = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")
_CALLED = re.compile(r"[ ,](body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Every collective of an optimized HLO module, wherever it is called."""
    computations, entry = _computations(hlo)
    found = []

    def walk(name: str, loops: int, times: int, outer: set | None) -> None:
        # On TPU one collective spans its start, step and done fusions: within the computation
        # that calls those, `outer`, it counts once.
        seen = set() if outer is None else outer
        for line in computations[name]:
            match = _COLLECTIVE.search(line)
            if match:
                channel = re.search(r"channel_id=\d+", line)
                key = (*_ARRAY.findall(match[1]), match[2], channel[0] if channel else line)
                if outer is None or key not in seen:
                    found.append(_collective(match, name, loops, times))
                seen.add(key)
            for role, callee in _CALLED.findall(line):
                trips = _trips(line, computations) if role == "body" else 1
                inside = seen if role == "calls" else outer
                walk(callee, loops + (role == "body"), times * trips, inside)
            for branches in _BRANCHES.findall(line):
                for callee in re.findall(r"[\w.\-]+", branches):
                    walk(callee, loops, times, outer)

    walk(entry, 0, 1, None)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a while loop runs: the compiler says so, or its condition is counter < constant."""
    if known := re.search(r"known_trip_count\D*(\d+)", line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition, line
    lines = computations[condition[1]]
    limits = [m[1] for each in lines if (m := re.search(r"= s32\[\]\S* constant\((\d+)\)", each))]
    assert len(limits) == 1, (line, lines)
    return int(limits[0])


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the entry."""
    computations, entry, name = {}, "", ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _collective(match: re.Match, computation: str, loops: int, times: int) -> Collective:
    result, kind, start, rest = match.groups()
    arrays = _ARRAY.findall(result)
    if start and (kind != "all-reduce" or result.startswith("((")):  # operands, results, contexts
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    groups, parts = replica_groups(rest), 1
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # TPU: an all-reduce (of this shape) and the slice of it, fused
        parts = max(1, *map(len, groups))
    width = lambda t: 1 if t == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", t)) / 8
    size = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
    return Collective(
        kind, tuple(f"{t}[{dims}]" for t, dims in arrays),
        int(sum(width(t) * size(dims) for t, dims in arrays) / parts), groups, loops, times,
    )  # fmt: skip


def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The groups of an HLO line, in any of the ways that XLA writes them; (): all devices."""
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text)
    if lists:
        found = re.findall(r"\{([\d, ]+)\}", lists[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in found)
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return tuple(map(tuple, _iota(iota[1]).tolist()))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? *\{([^}]*)\}", text
    )
    assert mesh or "replica_groups={}" in text, text
    return _mesh_groups(*mesh.groups()) if mesh else ()


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): 0..7 as 2x4, transposed, as 4x2; without the left side not the last."""
    shape, source, order = (
        [int(n) for n in part.split(",") if n]
        for part in re.findall(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]
    )
    ids = np.arange(math.prod(source)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if shape else ids


def _mesh_groups(axes: str, ids: str | None, names: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=4,'b'=2] {'a'}: groups along axis a; 'a':(2)2 is its part of size 2 after 2."""
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)
    taken = {axis: (int(before or 1), int(size or sizes[axis])) for axis, before, size in parts}
    shape = []
    for axis, size in sizes.items():
        before, part = taken.get(axis, (1, 1))
        shape += [before, part, size // (before * part)]
    inside = [3 * i + 1 for i in range(len(sizes))]
    around = [i for i in range(len(shape)) if i not in inside]
    places = _iota(ids) if ids else np.arange(math.prod(shape))
    groups = places.reshape(shape).transpose(around + inside)
    return tuple(map(tuple, groups.reshape(-1, math.prod(shape[i] for i in inside)).tolist()))


def mesh_axes(groups: tuple[tuple[int, ...], ...], layout: Layout) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    shape = [size for _, size in layout.axes]
    groups = groups or (tuple(range(math.prod(shape))),)
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    varies = [any(len(set(p[i])) > 1 for p in places) for i in range(len(shape))]
    return tuple(axis for (axis, _), does in zip(layout.axes, varies, strict=True) if does)


SUMS = ("count", "arrays", "scalars", "bytes", "step_bytes")


def summarize(found: list[Collective], layout: Layout) -> list[dict]:
    """Collectives of one kind, axes and loop depth as one row each, largest first."""
    rows = collections.defaultdict(lambda: dict.fromkeys(SUMS, 0))
    for one in found:
        row = rows[one.kind, mesh_axes(one.groups, layout), one.loops]
        row["count"] += 1
        row["arrays"] += len(one.shapes)
        row["scalars"] += one.scalars
        row["bytes"] += one.bytes
        row["step_bytes"] += one.bytes * one.times
    names = ("kind", "axes", "loops")
    table = [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
    return sorted(table, key=lambda row: -row["step_bytes"])


def report(config: cfg.Config, target: str) -> dict:
    """Compile for a target: memory, collectives (bytes: results; once, and in a step), backend."""
    program = make_program(config, target_devices(target))
    start = time.monotonic()
    lowered = trace_train_step(config, program).lower()
    traced = time.monotonic()
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return {
        "target": target,
        "devices": program.mesh.size,
        "attention": program.layout.attention.backend,
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(time.monotonic() - traced, 1),
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_and_batch_bytes": memory.argument_size_in_bytes,
        "collectives": summarize(collectives(text), program.layout),
    }


def main(argv: list[str] | None = None) -> int:
    """Print a report as JSON; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Compile the train step for absent devices.")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--target", required=True, help="v5e:2x4, h100:1x8, cpu:8")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("jaxlm").setLevel(logging.INFO)
    try:
        print(json.dumps(report(configfile.load(args.config, args.overrides), args.target)))
    except cfg.UserError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
