"""Devices: starting them (simulated or distributed), and facts about each kind."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import pkgutil
import sys
import types

import jax
from jax.extend import backend
from jax.sharding import Mesh

from jaxlm import config as cfg

logger = logging.getLogger("jaxlm")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Facts about one kind of device, as its maker publishes them; of chips, dense."""

    name: str
    bf16_flops: float  # FLOP/s; 0: not known, so no MFU
    hbm_bytes: float  # capacity
    hbm_bandwidth: float = 0  # bytes/s
    link: float = 0  # bytes/s between close chips: one torus axis, both ways (TPU); NVLink, one way
    network: float = 0  # bytes/s per chip to other slices or hosts
    torus: int = 0  # sides of a TPU's torus
    clock: float = 0  # Hz of a TPU core: the unit of its compiler's estimates
    compiler_options: tuple[tuple[str, str | int | bool], ...] = ()


# Windowed einsum splits fsdp matmuls into many small ones; off, small groups are 1.7x faster.
_TPU = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),)
_TPU_V6E = _TPU + (("xla_tpu_scoped_vmem_limit_kib", "98304"),)
# Matched in order against the device kind that jax reports, lower case. Peaks: cloud.google.com/tpu
# and NVIDIA's data sheets.
KINDS = (
    ("tpu v4", Kind("TPU v4", 275e12, 32e9, 1228e9, 9e10, 3.1e9, 3, 1.05e9, _TPU)),
    ("tpu v5 lite", Kind("TPU v5e", 197e12, 16e9, 819e9, 9e10, 3.1e9, 2, 1.5e9, _TPU)),
    ("tpu v5e", Kind("TPU v5e", 197e12, 16e9, 819e9, 9e10, 3.1e9, 2, 1.5e9, _TPU)),
    ("tpu v5", Kind("TPU v5p", 459e12, 95e9, 2765e9, 1.8e11, 6.2e9, 3, 1.75e9, _TPU)),
    ("tpu v6", Kind("TPU v6e", 918e12, 32e9, 1640e9, 1.8e11, 12.5e9, 2, 1.75e9, _TPU_V6E)),
    # jax shows its two cores as devices
    ("tpu7x", Kind("TPU7x", 2307e12 / 2, 96e9, 3700e9, 1.8e11, 12.5e9, 3, 2.2e9, _TPU)),
    ("tpu", Kind("TPU", 0, 0, compiler_options=_TPU)),
    ("a100-sxm4-40", Kind("A100 40GB", 312e12, 40e9, 1555e9, 300e9, 25e9)),
    ("a100", Kind("A100", 312e12, 80e9, 2039e9, 300e9, 25e9)),
    ("h100 pcie", Kind("H100 PCIe", 756e12, 80e9, 2000e9, 64e9, 50e9)),
    ("h100 nvl", Kind("H100 NVL", 835e12, 94e9, 3900e9, 300e9, 50e9)),
    ("h100", Kind("H100", 989e12, 80e9, 3352e9, 450e9, 50e9)),
    ("h200", Kind("H200", 989e12, 141e9, 4800e9, 450e9, 50e9)),
    ("b200", Kind("B200", 2250e12, 180e9, 7672e9, 900e9, 50e9)),
)


def kind(mesh: Mesh) -> Kind:
    """Facts about the mesh's devices."""
    return find_kind(mesh.devices.flat[0].device_kind)


def find_kind(device_kind: str) -> Kind:
    """Facts about a kind that jax reports; unknown kinds have no peak and no options."""
    name = device_kind.lower()
    for pattern, facts in KINDS:
        if pattern in name:
            return facts
    return Kind(name, 0, 0)


# Files that show a driver: of NVIDIA GPUs (dxg under WSL, nvmap on Tegra), of TPUs (accel on older
# VMs, vfio on newer ones; /dev/vfio/vfio is on machines without a TPU too).
NVIDIA_FILES = ("/dev/nvidia*", "/dev/dxg", "/dev/nvmap", "/proc/driver/nvidia/version")
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def start(devices: cfg.Devices) -> None:
    """Simulate CPU devices and join the other processes, before anything touches a device."""
    absent = leave_out_absent()
    if absent and not devices.simulate:
        logger.info(f"not loaded, since this machine has no such device: {', '.join(absent)}")
    if devices.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices.simulate)
    if jax.distributed.is_initialized():
        return
    if devices.coordinator:
        _join(
            coordinator_address=devices.coordinator,
            num_processes=devices.num_processes,
            process_id=devices.process_id,
        )
    elif launcher():
        _join()  # jax reads the launcher's variables itself


def leave_out_absent() -> list[str]:
    """Keep jax from probing for NVIDIA GPUs and TPUs where there are none; names what it left out.

    Probing costs seconds of start and prints the traceback of the CUDA plugin and the complaints of
    libtpu, which are installed for `jaxlm plan`. Other plugins are untouched; JAX_PLATFORMS wins,
    as does what jax chose on a TPU VM. To be called before anything touches a device.
    """
    if jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        return []
    absent = []
    if cuda := [] if _any_file(NVIDIA_FILES) else _cuda_plugins():
        absent.append("the CUDA plugin")
        for name in cuda:  # jax imports each plugin and calls its initialize()
            plugin = types.ModuleType(name)
            plugin.__dict__["initialize"] = lambda: None
            sys.modules.setdefault(name, plugin)
    tpu = _any_file(TPU_FILES) or launcher() == "tpu"
    if not tpu and importlib.util.find_spec("libtpu") is not None:
        absent.append("libtpu")
        backend.register_backend_factory("tpu", _no_tpu, priority=-1, fail_quietly=True)
    return absent


def _any_file(patterns: tuple[str, ...]) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)


def _cuda_plugins() -> list[str]:
    """Modules of jax's CUDA plugins that are installed."""
    try:
        plugins = importlib.import_module("jax_plugins")
    except ImportError:  # no plugin at all
        return []
    found = pkgutil.iter_modules(plugins.__path__, "jax_plugins.")
    return [module.name for module in found if module.name.startswith("jax_plugins.xla_cuda")]


def _no_tpu():
    raise RuntimeError("this machine has no TPU: no /dev/accel* and no /dev/vfio/<number>")


def _join(**settings) -> None:
    """Set up jax.distributed; CPU processes talk through gloo."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        where = settings.get("coordinator_address", launcher())
        raise cfg.UserError(
            f"devices.coordinator={where}: could not join the other processes: "
            + " ".join(str(error).split())
        ) from error


def launcher(environ=os.environ) -> str:
    """The launcher that started several processes of this job: slurm, openmpi, tpu, or ''."""
    number = lambda name: int(environ.get(name) or 0)
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "openmpi"
    if "SLURM_STEP_NODELIST" in environ and number("SLURM_NTASKS") > 1:
        return "slurm"
    hosts = environ.get("TPU_WORKER_HOSTNAMES") or environ.get("TPU_PROCESS_ADDRESSES") or ""
    if "," in hosts or number("MEGASCALE_NUM_SLICES") > 1:
        return "tpu"
    return ""
