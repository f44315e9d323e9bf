"""Facts about each kind of device, as its maker publishes them."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh


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
