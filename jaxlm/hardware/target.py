"""Targets: hardware named in a line, v6e:16x16, 2*v5p:4x4x4, h100:4x8, cpu:8 or local.

A target is known without its hardware and without its compiler: `absent_devices` stand in for its
devices wherever only their number, kind and place matter (meshes, layouts, tracing). `devices` asks
the compiler's plugin for its own, which programs can be compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from jaxlm import config as cfg
from jaxlm import devices as here
from jaxlm import extras
from jaxlm.hardware import chips

# Name in a target -> the device kind that jax reports.
TPUS = {
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
}  # fmt: skip
# cloud.google.com/tpu/docs/{v5e,v6e}: slices; v4, v5p and tpu7x: these, and any 4a x 4b x 4c.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
ALIASES = {"a100": "a100-80"}


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
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1555200000000, 41943040, 1.41,
                   42331013120, 167936, 12),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2039040000000, 41943040, 1.41,
                   85100068864, 167936, 12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 3352320000000, 52428800, 1.98,
                84942979072, 233472, 18),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 4800000000000, 52428800, 1.98,
                151397597184, 233472, 18),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 7672320000000, 132644864, 1.965,
                191514411008, 233472, 18),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """Stands in for a device where only its kind and place matter."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0

    @property
    def compute_capability(self) -> str:
        """Of an NVIDIA GPU, as jax reports it; "0" of other devices."""
        found = [gpu.capability for gpu in GPUS.values() if gpu.name == self.device_kind]
        return ".".join(map(str, found[0])) if found else "0"


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to plan for."""

    text: str  # as given
    platform: str  # tpu, gpu, cpu
    name: str  # v5p, h100, cpu
    shape: tuple[int, ...]  # chips along each side of the torus; hosts, GPUs; devices
    slices: int = 1

    @property
    def size(self) -> int:
        """Devices, as jax counts them."""
        cores = 2 if self.name == "tpu7x" else 1
        return self.slices * math.prod(self.shape) * cores

    @property
    def chips(self) -> int:
        """Chips, as they are rented."""
        return self.slices * math.prod(self.shape)

    @property
    def device_kind(self) -> str:
        """As jax reports it."""
        if self.platform == "tpu":
            return TPUS[self.name]
        return GPUS[self.name].name if self.platform == "gpu" else "cpu"

    @property
    def kind(self) -> chips.Kind:
        """Facts about the chip."""
        return chips.find_kind(self.device_kind)

    def absent_devices(self) -> list[AbsentDevice]:
        """One stand-in for each device, in the order of the real ones."""
        if self.platform == "tpu":
            return [device for n in range(self.slices) for device in self._slice(n)]
        width = self.shape[1] if self.platform == "gpu" else self.size
        make = functools.partial(AbsentDevice, platform=self.platform, device_kind=self.device_kind)
        return [
            make(id=i, process_index=i // width, coords=(0, i // width, i % width))
            for i in range(self.size)
        ]

    def _slice(self, number: int) -> Iterator[AbsentDevice]:
        """The devices of one TPU slice, host by host: 2 x 2 chips each."""
        cores = self.size // self.chips
        x_size, y_size, z_size = (*self.shape, 1)[:3]
        x_hosts, y_hosts = -(-x_size // 2), -(-y_size // 2)
        first = 100000 * (number + 1) if self.slices > 1 else 0  # as libtpu numbers them
        process = number * x_hosts * y_hosts * z_size
        blocks = itertools.product(range(z_size), range(0, y_size, 2), range(0, x_size, 2))
        for host, (z, y0, x0) in enumerate(blocks):
            for dy, dx, core in itertools.product(range(2), range(2), range(cores)):
                x, y = x0 + dx, y0 + dy
                if x < x_size and y < y_size:
                    place = x + x_size * (y + y_size * z)
                    yield AbsentDevice(
                        first + cores * place + core, "tpu", self.device_kind, process + host,
                        number, (x, y, z), core,
                    )  # fmt: skip

    def devices(self) -> list:
        """The devices of the compiler's plugin; UserError names the extra where it is missing."""
        if self.platform != "gpu":  # its compiler is the CUDA plugin
            here.leave_out_absent()
        jax.config.update("jax_platforms", "cpu")
        if self.platform == "tpu":
            return _tpu_devices(self)
        if self.platform == "gpu":
            return _gpu_devices(self)
        here.simulate(self.size)
        return jax.devices("cpu")


def parse_target(text: str) -> Target:
    """The target that a line names; UserError says which are known."""
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9\-]+)(?::(\d+(?:x\d+)*))?", text)
    count, name, shape = match.groups() if match else (None, "", None)
    name = ALIASES.get(name, name)
    sizes = tuple(int(n) for n in shape.split("x")) if shape else ()
    if name in TPUS:
        return _tpu_target(text, name, sizes, int(count or 1))
    if name in GPUS and not count:
        sizes = {0: (1, 8), 1: (1, *sizes)}.get(len(sizes), sizes)
        if len(sizes) == 2 and all(sizes):
            return Target(text, "gpu", name, sizes)
        raise cfg.UserError(f"target={text}: use hosts x GPUs, as {name}:1x8 or {name}:4x8")
    if name == "cpu" and not count and len(sizes) == 1 and sizes[0]:
        return Target(text, "cpu", name, sizes)
    raise cfg.UserError(
        f"target={text} is not known; use a TPU slice ({', '.join(TPUS)}) as v5e:2x4 or "
        f"v5p:4x4x4, several as 2*v5p:4x4x4, hosts x GPUs ({', '.join(GPUS)}) as h100:4x8, "
        "simulated devices as cpu:8, or local"
    )


def local_target(devices: list) -> Target:
    """The target that these devices are; UserError where their kind is not known."""
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        return parse_target(f"cpu:{count}")
    gpus = [name for name, gpu in GPUS.items() if gpu.name == kind]
    if gpus:
        hosts = len({device.process_index for device in devices})
        return parse_target(f"{gpus[0]}:{hosts}x{count // hosts}")
    tpus = [name for name, other in TPUS.items() if other == kind]
    if not tpus:
        raise cfg.UserError(
            f"target=local: there is no description of {kind!r} here; known: "
            f"{', '.join([*TPUS, *GPUS])}, cpu"
        )
    rank = chips.find_kind(kind).torus
    sides = [len(set(values)) for values in zip(*(d.coords for d in devices), strict=True)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = "x".join(map(str, sides[:rank]))
    return parse_target(f"{slices}*{tpus[0]}:{shape}" if slices > 1 else f"{tpus[0]}:{shape}")


def _tpu_target(text: str, name: str, sizes: tuple[int, ...], slices: int) -> Target:
    rank = chips.find_kind(TPUS[name]).torus
    shape = "x".join(map(str, sizes))
    cubes = rank == 3 and len(sizes) == 3 and all(n and n % 4 == 0 for n in sizes)
    if not slices or not (shape in SLICES[rank] or cubes):
        more = " or any cube of 4s, as 8x8x16" if rank == 3 else ""
        raise cfg.UserError(
            f"target={text}: {name} has slices {', '.join(SLICES[rank])}{more}; "
            f"as target={name}:{SLICES[rank][3]} or 2*{name}:{SLICES[rank][3]}"
        )
    return Target(text, "tpu", name, sizes, slices)


def _tpu_devices(target: Target) -> list:
    """The devices of slices, by libtpu, with their real links.

    Cubes of v4, v5p and tpu7x wrap around; v5e and v6e do along a dimension of 16. Without that the
    compiler plans for an open mesh (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
    """
    if importlib.util.find_spec("libtpu") is None:
        raise cfg.UserError(
            f"target={target.text}: libtpu is missing: {extras.install('plan-tpu')}"
        )
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "x", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    sizes = target.shape
    torus = len(sizes) == 3
    period = 4 if torus else 16
    wraps = [size % period == 0 for size in sizes]
    settings: dict = {"wrap": (all(wraps),) * 3 if torus else (*wraps, False)}
    if target.name in ("v4", "v5p"):  # one device is a chip of two cores
        settings |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if target.slices > 1:
        settings |= {"num_slices": target.slices}
    shape = "x".join(map(str, sizes))
    name = f"{'v5' if target.name == 'v5p' else target.name}:{shape}"
    return list(topologies.get_topology_desc(name, "tpu", **settings).devices)


def _gpu_devices(target: Target) -> list:
    """The devices of hosts x NVIDIA GPUs, by the CUDA plugin of jax."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise cfg.UserError(
            f"target={target.text}: the CUDA plugin is missing: {extras.install('plan-gpu')}"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    hosts, gpus = target.shape
    topology = topologies.get_topology_desc(
        target.name, "cuda", target_config=target_text(GPUS[target.name]),
        topology=f"1x{hosts}x{gpus}",
    )  # fmt: skip
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
