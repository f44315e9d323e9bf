"""Seconds of a step: each of its parts over the rate at which the hardware does it.

    matmuls, kernels    FLOPs over the peak
    memory              bytes over the bandwidth of device memory; products and kernels read while
                        they compute
    grouped             bytes over that bandwidth of the rows of grouped products (experts), which
                        compilers mask for each group
    links, network      bytes that nothing hides over the bandwidth of the wires

and every rate times an efficiency, of which this file has the only table. Where a compiled program
comes with its compiler's estimate of computing, that stands for the parts that it covers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.hardware.chips import Kind
from jaxlm.hardware.target import Target
from jaxlm.plan.cost import Cost

logger = logging.getLogger("jaxlm")


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The part of a peak that is reached; a rate itself where no peak is published (CPU)."""

    value: float
    origin: str


@dataclasses.dataclass(frozen=True)
class Time:
    """One step."""

    seconds: float
    parts: dict[str, float]  # their sum is the step
    limit: str  # the largest of them


_MANUAL = "the bandwidths of devices.py, whole: what makers publish"
_NVLINK = "a round value: what NCCL's large all-gathers reach of NVLink and InfiniBand"
_LIBTPU = "a round value: traces are then 1 to 26 % over libtpu's estimates (benchmarks)"
_SPLASH = "a round value for attention kernels: the softmax is not the matrix unit's work"
_RAGGED = "a round value: libtpu's estimates of experts on v5e (benchmarks/ranking.py)"
_CUBLAS = "a round value: large bfloat16 products of cuBLAS on H100"
_STREAM = "a round value: what streaming kernels reach of HBM's bandwidth"
EFFICIENCIES = {  # platform -> what is known without a measurement
    "tpu": {
        "matmuls": Efficiency(0.85, _LIBTPU), "kernels": Efficiency(0.5, _SPLASH),
        "grouped": Efficiency(0.05, _RAGGED),
        "memory": Efficiency(0.7, _LIBTPU), "links": Efficiency(1.0, _MANUAL),
        "network": Efficiency(1.0, _MANUAL),
    },
    "gpu": {
        "matmuls": Efficiency(0.7, _CUBLAS), "kernels": Efficiency(0.6, _SPLASH),
        "grouped": Efficiency(0.9, _STREAM),
        "memory": Efficiency(0.9, _STREAM), "links": Efficiency(0.8, _NVLINK),
        "network": Efficiency(0.8, _NVLINK),
    },
}  # fmt: skip
PARTS = ("matmuls", "grouped", "kernels", "memory", "links", "network", "overhead")


def platform(kind: Kind) -> str:
    """tpu, gpu or cpu."""
    if not kind.bf16_flops:
        return "cpu"
    return "tpu" if kind.torus else "gpu"


def estimate(cost: Cost, target: Target, known: dict[str, Efficiency]) -> Time:
    """Seconds of a step, its parts, and which is the largest."""
    parts = {name: _scaled(name, value, known) for name, value in terms(cost, target).items()}
    if cost.compute_seconds:  # the compiler's, of all but kernels (and, on GPU, matmuls)
        parts["memory"] = 0.0 if target.platform == "tpu" else cost.compute_seconds
        if target.platform == "tpu":
            parts["matmuls"] = cost.compute_seconds
    working = parts["matmuls"] + parts["kernels"]
    if target.platform != "cpu":  # whose caches hold what products read
        reading = _scaled("memory", cost.hidden_bytes / _bandwidth(target), known)
        parts["memory"] += max(0.0, reading - working)
    computing = working + parts["memory"] + parts["grouped"]
    hidden = sum(
        _scaled(_wires(row.network), (row.wire - row.blocking) / row.bandwidth, known)
        for row in cost.traffic
        if row.bandwidth
    )
    if hidden > computing:
        parts["links"] += hidden - computing
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    total = sum(parts.values())
    return Time(total, parts, max(parts, key=lambda name: parts[name], default=""))


def _scaled(name: str, value: float, known: dict[str, Efficiency]) -> float:
    """Seconds of a part; 0 where nothing is known of it."""
    if name not in known:
        return 0.0
    return value * known[name].value if name == "overhead" else value / known[name].value


def terms(cost: Cost, target: Target) -> dict[str, float]:
    """Part -> seconds at full efficiency; of CPU FLOPs and bytes of all devices, which share it.

    `overhead` is the number of collectives: where devices are simulated each is a meeting of all.
    """
    kind, matmuls = target.kind, cost.total_flops - cost.kernel_flops
    wires = {"links": 0.0, "network": 0.0}
    for row in cost.traffic:
        if row.bandwidth:
            wires[_wires(row.network)] += row.blocking / row.bandwidth
    if target.platform == "cpu":
        wires["links"] = target.size * sum(row.wire for row in cost.traffic)
    peak = 1 / target.size if target.platform == "cpu" else kind.bf16_flops  # all cores
    return {
        "matmuls": matmuls / peak, "kernels": cost.kernel_flops / peak,
        "grouped": cost.grouped_bytes / _bandwidth(target),
        "memory": (cost.hbm_bytes - cost.hidden_bytes) / _bandwidth(target), **wires,
        "overhead": sum(row.count for row in cost.traffic) + 1,
    }  # fmt: skip


def _bandwidth(target: Target) -> float:
    """Bytes/s of a device's memory at its peak; of simulated devices, each has one core for it."""
    if target.platform == "cpu":
        return min(target.size, os.cpu_count() or 1) / target.size
    return target.kind.hbm_bandwidth


def _wires(network: str) -> str:
    return "network" if network == "network" else "links"


def efficiencies(kind: Kind, path: Path) -> dict[str, Efficiency]:
    """What is known of a kind of hardware: calibrated, measured (CPU) or the table above."""
    stored = load(path).get(kind.name, {})
    if platform(kind) == "cpu" and not stored:
        stored = measure_cpu()
        try:
            save(path, kind.name, stored)
        except OSError as error:  # measured again next time
            logger.warning("plan.cache=%s: rates are not kept: %s", path.parent, error.strerror)
    return EFFICIENCIES.get(platform(kind), {}) | stored


def load(path: Path) -> dict[str, dict[str, Efficiency]]:
    """Calibrated efficiencies by kind; none where there is no readable file."""
    try:
        kinds = json.loads(path.read_text())
        return {
            kind: {name: _efficiency(name, e) for name, e in rows.items()}
            for kind, rows in kinds.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _efficiency(name: str, entry: dict) -> Efficiency:
    """An entry of the file; ValueError where its value cannot be a rate."""
    value = float(entry["value"])
    if not math.isfinite(value) or value < 0 or (value == 0 and name != "overhead"):
        raise ValueError(f"{name}: {value}")
    return Efficiency(value, str(entry["origin"]))


def save(path: Path, kind: str, found: dict[str, Efficiency]) -> None:
    """Keep the efficiencies of one kind next to those of others."""
    kinds = load(path) | {kind: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    plain = {k: {n: dataclasses.asdict(e) for n, e in rows.items()} for k, rows in kinds.items()}
    temporary.write_text(json.dumps(plain, indent=1))
    os.replace(temporary, path)


def measure_cpu() -> dict[str, Efficiency]:
    """Rates of this machine's CPU, in about a second: a product, a sum of two arrays."""
    origin = "measured on this machine by a float32 product of 1024 and a sum of 2^24 numbers"
    ones = jax.device_put(jnp.ones((1024, 1024)), jax.local_devices(backend="cpu")[0])
    long = jax.device_put(jnp.ones(1 << 24), jax.local_devices(backend="cpu")[0])
    product = _seconds(jax.jit(jnp.matmul), ones, ones)
    added = _seconds(jax.jit(jnp.add), long, long)
    rate, memory = 2 * 1024**3 / product, 3 * long.nbytes / added
    return {
        "matmuls": Efficiency(rate, origin), "kernels": Efficiency(rate, origin),
        "grouped": Efficiency(memory, origin),
        "memory": Efficiency(memory, origin), "links": Efficiency(memory / 2, origin),
        "overhead": Efficiency(2e-4, "a meeting of simulated devices, on two cores"),
    }  # fmt: skip


def _seconds(function, *arguments) -> float:
    """The fastest of many calls: until eight in a row are not faster by a tenth than the best
    before them. What is kept of a busy moment would be wrong ever after."""
    function(*arguments).block_until_ready()
    best, since = math.inf, 0
    while since < 8:
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        took = time.perf_counter() - start
        since = 0 if took < 0.9 * best else since + 1
        best = min(best, took)
    return best


def fit_efficiencies(
    measured: Sequence[tuple[Cost, float]], target: Target | Sequence[Target]
) -> dict[str, Efficiency]:
    """The efficiencies with which `estimate` is nearest to measured seconds, in relative squares.

    Nonnegative least squares over the parts; parts that the runs do not tell apart are left out.
    """
    targets = [target] * len(measured) if isinstance(target, Target) else list(target)
    rows = [terms(cost, each) for (cost, _), each in zip(measured, targets, strict=True)]
    names = [name for name in PARTS if any(row[name] for row in rows)]
    scale = np.array([seconds for _, seconds in measured])
    table = np.array([[row[name] for name in names] for row in rows]) / scale[:, None]
    best, chosen = np.inf, {}
    for count in range(1, min(len(names), len(measured)) + 1):
        for some in itertools.combinations(range(len(names)), count):
            columns = table[:, some]
            found, *_ = np.linalg.lstsq(columns, np.ones(len(scale)), rcond=None)
            error = float(np.sum((columns @ found - 1) ** 2))
            if (found > 0).all() and error < 0.98 * best:  # another part must earn its place
                best, chosen = error, dict(zip((names[i] for i in some), found, strict=True))
    origin = f"fitted to {len(measured)} runs, which it meets to {(best / len(scale)) ** 0.5:.0%}"
    return {
        name: Efficiency(float(value if name == "overhead" else 1 / value), origin)
        for name, value in chosen.items()
    }
