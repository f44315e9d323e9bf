"""Starting devices: simulated or real ones, alone or with the other processes of a job."""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import pkgutil
import sys
import types

import jax
from jax.extend import backend

from jaxlm import config as cfg

logger = logging.getLogger("jaxlm")


# Files that show a driver: of NVIDIA GPUs (dxg under WSL, nvmap on Tegra), of TPUs (accel on older
# VMs, vfio on newer ones; /dev/vfio/vfio is on machines without a TPU too).
NVIDIA_FILES = ("/dev/nvidia*", "/dev/dxg", "/dev/nvmap", "/proc/driver/nvidia/version")
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Threads of XLA's CPU runtime per simulated device: as many collectives of one device can wait at
# once as loops are nested in a step (microbatches, ticks or layers, the ring), and one more.
# A loop runs on while the collective after it already waits; each waiting one keeps a thread.
THREADS = 4


def start(devices: cfg.Devices) -> None:
    """Simulate CPU devices and join the other processes, before anything touches a device."""
    absent = leave_out_absent()
    if absent and not devices.simulate:
        logger.info(f"not loaded, since this machine has no such device: {', '.join(absent)}")
    if devices.simulate:
        jax.config.update("jax_platforms", "cpu")
        simulate(devices.simulate)
    elif devices.coordinator or launcher():
        _give_threads(1)
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


def simulate(count: int) -> None:
    """Ask for `count` CPU devices; before anything touches a device."""
    jax.config.update("jax_num_cpu_devices", count)
    _give_threads(count)


def _give_threads(count: int) -> None:
    """Have XLA's CPU runtime start enough threads for `count` devices; PJRT_NPROC wins.

    By itself it starts one per device, or one per core that this process may use. Then a collective
    that waits can hold the very thread that another device needs to take part, and all wait for
    ever.
    """
    limited = hasattr(os, "sched_getaffinity")  # Linux
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    if THREADS * count > cores:
        os.environ.setdefault("PJRT_NPROC", str(THREADS * count))


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
