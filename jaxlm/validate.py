"""Checks of a config before anything is traced; errors name the values that would work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import (
    AXES,
    DIMS,
    Config,
    Mesh,
    UserError,
    check_text,
)
from jaxlm.divisibility import layout_problems, near_meshes
from jaxlm.models import family_module
from jaxlm.nearest import divide, join, near_divisors, or_list
from jaxlm.validate_outer import check_outer

REMAT_NAMES = ("query", "key", "value", "attention", "mlp")
# Dimensions that are not split, and why. Exceptions: `layers` by stage, `norm` at rest.
WHOLE = {
    "layers": "layers are scanned", "parts": "the parts of a weight are taken apart",
    "norm": "a norm's scale meets whole vectors",
}  # fmt: skip


def validate(config: Config, num_devices: int | None = None) -> None:
    """Raise UserError for the first mistake; without num_devices an axis of -1 counts as 1."""
    _check_text(dataclasses.asdict(config))
    for check in (_check_run, _check_devices, _check_optimizer, _check_remat, _check_kernel):
        check(config)
    _check_sample(config)
    _check_privacy(config)
    family_module(config.model.family).check(config)
    if num_devices is None:
        _check_sizes(config.mesh)
        sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in AXES}
    else:
        sizes = resolve_mesh(config.mesh, num_devices)
    _check_dcn(config.mesh, sizes, num_devices is not None)
    _check_tables(config)
    check_outer(config, sizes)
    problems = dict.fromkeys(layout_problems(config, sizes))
    if problems:
        near = near_meshes(config, sizes)
        hint = f"; nearest meshes that fit: {' or '.join(near)}" if near else ""
        raise UserError("; and ".join(problems) + hint)


def resolve_mesh(mesh: Mesh, num_devices: int) -> dict[str, int]:
    """Axis -> size, in the order of AXES, with -1 filled; their product is num_devices."""
    _check_sizes(mesh)
    if mesh.auto:
        raise UserError(
            "mesh=auto is for train and plan, which choose a mesh; here give its axes, as in "
            "mesh.fsdp=-1"
        )
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    given = {axis: size for axis, size in sizes.items() if size > 1}
    product = math.prod(given.values())
    shape = " x ".join(f"mesh.{axis}={size}" for axis, size in given.items()) or "a mesh of ones"
    fill = next((axis for axis, size in sizes.items() if size == -1), None)
    if product > num_devices:
        fixes = [
            f"mesh.{axis}={num_devices * size // product}"
            for axis, size in given.items()
            if num_devices * size % product == 0
        ]
        raise UserError(
            f"{shape} needs {product} devices and there are too few: {num_devices}; use "
            f"{' or '.join(fixes) or 'smaller sizes'}, or devices.simulate={product} (CPU)"
        )
    if fill is not None:
        if num_devices % product:
            near = join(near_divisors(num_devices, product))
            raise UserError(
                f"mesh.{fill}=-1 cannot be filled: {num_devices} devices do not divide by "
                f"{product} ({shape}); the product of the other axes can be {near}"
            )
        return sizes | {fill: num_devices // product}
    if product < num_devices:
        raise UserError(
            f"{shape} uses {product} of {num_devices} devices; {_grow(sizes, num_devices)}"
            f"start with {product} (devices.simulate, CUDA_VISIBLE_DEVICES)"
        )
    return sizes


def _grow(sizes: dict[str, int], num_devices: int) -> str:
    """Which axis can take the devices that a mesh leaves unused."""
    product = math.prod(sizes.values())
    works = [a for a in ("data", "fsdp", "tensor") if num_devices % (product // sizes[a]) == 0]
    if works:
        return f"use mesh.{works[0]}=-1 to take the rest, or "
    near = join(near_divisors(num_devices, product))
    return f"make the product {num_devices} (an axis of -1 can fill it from {near}), or "


def _check_sizes(mesh: Mesh) -> None:
    given = [axis for axis in AXES if getattr(mesh, axis) != 1]
    if mesh.auto and (given or mesh.dcn):
        raise UserError(
            f"mesh.auto=true with mesh.{(given or ['dcn'])[0]}: auto chooses every axis; "
            "give the axes, or mesh=auto alone"
        )
    fills = [f"mesh.{axis}=-1" for axis in AXES if getattr(mesh, axis) == -1]
    if len(fills) > 1:
        raise UserError(f"{' and '.join(fills)}: only one axis can be -1; give the others a size")
    for axis in AXES:
        size = getattr(mesh, axis)
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size} must be at least 1, or -1 to take what is left")


def _check_dcn(mesh: Mesh, sizes: dict[str, int], resolved: bool) -> None:
    for axis, factor in mesh.dcn.items():
        if axis not in AXES:
            raise UserError(f"mesh.dcn.{axis} is not a mesh axis{or_list(axis, AXES)}")
        if factor < 1:
            raise UserError(f"mesh.dcn.{axis}={factor} must be at least 1")
        if (resolved or getattr(mesh, axis) != -1) and sizes[axis] % factor:
            near = join(near_divisors(sizes[axis], factor))
            raise UserError(
                f"mesh.dcn.{axis}={factor} does not divide mesh.{axis}={sizes[axis]}; use {near}"
            )


def _check_tables(config: Config) -> None:
    """rules and storage name dimensions and axes that exist, an axis once per dimension."""
    for table, entries in (("rules", config.rules), ("storage", config.storage)):
        for dim, axes in entries.items():
            name = f"{table}.{dim}"
            if dim not in DIMS:
                raise UserError(f"{name}: {dim!r} is not a dimension{or_list(dim, DIMS)}")
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"{name}: {axis!r} is not a mesh axis{or_list(axis, AXES)}")
                if axes.count(axis) > 1:
                    raise UserError(f"{name}: axis {axis} is given twice; once is enough")
            whole = WHOLE.get(dim, "") if (table, dim) != ("storage", "norm") else ""
            if whole and set(axes) - ({"stage"} if dim == "layers" else set()):
                raise UserError(f"{name}: {whole} and cannot be split; use {name}=[]")


def _check_text(values: Mapping[str, Any], prefix: str = "") -> None:
    """All text can be kept in config.yaml, and read by a tokenizer."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_text(value, f"{prefix}{name}.")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str):
                check_text(f"{prefix}{name}", text)


def _check_run(config: Config) -> None:
    name = config.name
    if not name.strip() or name in (".", "..") or set(name) & set("/\\\0"):
        raise UserError(f"name={name!r} must be a file name without separators, as in name=run")
    start_from, cache = config.checkpoint.start_from, config.plan.cache
    for key, path in (
        ("run.dir", config.run.dir), ("data.path", config.data.path),
        ("checkpoint.start_from", start_from), ("plan.cache", cache),
    ):  # fmt: skip
        if "\0" in path:
            raise UserError(f"{key}={path!r} must be a path, without a NUL character")
    if not config.data.path.strip():
        raise UserError("data.path is empty; give the directory that `jaxlm data prepare` wrote")
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every and not every:
        raise UserError(
            f"checkpoint.keep_every={keep_every} with checkpoint.every=0: there is none to keep "
            f"before the end; use checkpoint.keep_every=0 or checkpoint.every={keep_every}"
        )
    if keep_every:
        for problem in divide("checkpoint.keep_every", keep_every, {"checkpoint.every": every}):
            raise UserError(problem)


def _check_devices(config: Config) -> None:
    d = config.devices
    if d.coordinator and not d.num_processes:
        raise UserError(
            f"devices.coordinator={d.coordinator} without devices.num_processes: "
            "give the number of processes, and devices.process_id on each"
        )
    host, _, port = d.coordinator.rpartition(":")
    if d.coordinator and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"devices.coordinator={d.coordinator} must be host:port, as in host0:1234")
    if d.process_id and not d.coordinator:
        raise UserError(f"devices.process_id={d.process_id} works with devices.coordinator only")
    if d.num_processes and d.process_id >= d.num_processes:
        raise UserError(
            f"devices.process_id={d.process_id} is not below devices.num_processes="
            f"{d.num_processes}; processes count from 0 to {d.num_processes - 1}"
        )


def _check_optimizer(config: Config) -> None:
    o = config.optimizer
    for key in ("b1", "b2", "momentum"):
        if getattr(o, key) >= 1:
            raise UserError(f"optimizer.{key}={getattr(o, key)} must be below 1, as in 0.95")
    if not o.train or not all(o.train):
        raise UserError("optimizer.train is empty: nothing would be trained; use ['*'] for all")
    if config.precision.compute == "float32" and config.precision.reduce == "bfloat16":
        raise UserError(
            "precision.reduce=bfloat16 has no effect with precision.compute=float32; "
            "use precision.reduce=float32 or precision.compute=bfloat16"
        )


def _check_remat(config: Config) -> None:
    r = config.remat
    for key in ("names", "offload"):
        for name in getattr(r, key):
            if name not in REMAT_NAMES:
                hint = or_list(name, REMAT_NAMES)
                raise UserError(f"remat.{key}: {name!r} is not a named activation{hint}")
    if r.names and r.policy != "names":
        raise UserError(f"remat.names has no effect with remat.policy={r.policy}; use names")
    if r.policy == "names" and not r.names:
        raise UserError(
            f"remat.policy=names needs remat.names, of {', '.join(REMAT_NAMES)}; "
            "to keep nothing use remat.policy=full"
        )
    extra = [name for name in r.offload if name not in r.names]
    if extra:
        raise UserError(f"remat.offload: {', '.join(extra)} must be in remat.names too")


def _check_kernel(config: Config) -> None:
    if config.attention.backend != "cudnn":
        return
    other = "use attention.backend=chunked or xla"
    if config.model.sliding_window:
        window = config.model.sliding_window
        raise UserError(f"model.sliding_window={window}: cudnn is not given a window here; {other}")
    if config.model.attention_softcap:
        softcap = config.model.attention_softcap
        raise UserError(f"model.attention_softcap={softcap}: cudnn has no soft cap; {other}")
    if config.precision.compute == "float32":
        raise UserError(f"precision.compute=float32: cudnn computes in bfloat16 only; {other}")


def _check_sample(config: Config) -> None:
    s, vocab = config.sample, config.model.vocab_size
    if s.every and not s.prompts:
        raise UserError("sample.prompts is empty; use [''] to start from nothing or sample.every=0")
    if s.top_k > vocab:
        raise UserError(f"sample.top_k={s.top_k} is above model.vocab_size={vocab}; 0 takes all")
    if not s.top_p:
        raise UserError("sample.top_p=0.0 leaves no token; for greedy use sample.temperature=0")


def _check_privacy(config: Config) -> None:
    p = config.privacy
    if not p.clip_norm:
        for key in ("noise_multiplier", "epsilon"):
            if value := getattr(p, key):
                raise UserError(
                    f"privacy.{key}={value:g} has no effect with privacy.clip_norm=0.0; use "
                    f"privacy.clip_norm=1.0, or privacy.{key}=0 to train without privacy"
                )
        return
    if not p.noise_multiplier:
        raise UserError(
            "privacy.noise_multiplier=0.0: without noise clipped gradients are not private; use "
            "1.0, and see `jaxlm privacy CONFIG` for what it gives"
        )
    if not 0 < p.delta < 1:
        raise UserError(f"privacy.delta={p.delta:g} must be between 0 and 1, as in 1e-6")
    if config.model.expert_share < 1:
        raise UserError(
            f"model.family={config.model.family} with privacy.clip_norm={p.clip_norm:g}: the "
            "losses that even the load of experts join the rows of a batch, so no row's part of "
            "the gradient is bounded; use a family without experts"
        )
    if config.mesh.stage != 1:
        raise UserError(
            f"mesh.stage={config.mesh.stage} with privacy.clip_norm={p.clip_norm:g}: the norms of "
            "rows are not known in a pipeline; use mesh.stage=1, with mesh.fsdp, mesh.tensor or "
            "mesh.context"
        )
    if config.outer.every:
        raise UserError(
            f"outer.every={config.outer.every} with privacy.clip_norm={p.clip_norm:g}: what "
            "islands spend together is not accounted for; use outer.every=0"
        )
