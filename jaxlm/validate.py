"""Checks of a config before anything is traced; errors name the values that would work."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.config import (
    AXES,
    DIMS,
    RULES,
    STORAGE,
    Config,
    Mesh,
    Model,
    UserError,
    check_text,
    padded_vocab,
)
from jaxlm.configfile import did_you_mean
from jaxlm.models import family_module, staged_pattern

REMAT_NAMES = ("query", "key", "value", "attention", "mlp")
# Arrays of the model: in use, an axis may split only one dimension of each.
ARRAYS = (
    "batch seq embed", "batch residual_seq embed", "batch seq heads head_dim",
    "batch seq kv_heads head_dim", "batch seq mlp", "batch seq vocab",
    "embed heads head_dim", "embed kv_heads head_dim", "embed mlp", "vocab embed",
    "positions embed", "experts embed mlp", "cache_batch cache_seq cache_kv_heads head_dim",
)  # fmt: skip
# Dimensions that stay in one piece, in use and (but for norms) at rest.
WHOLE = {
    "layers": "layers are scanned", "parts": "the parts of a weight are taken apart",
    "norm": "a norm's scale meets whole vectors",
}  # fmt: skip
SEARCH = 1 << 16  # no axis is larger: bounds the search for sizes that work

Table = dict[str, tuple[str, ...]]


def validate(config: Config, num_devices: int | None = None) -> None:
    """Raise UserError for the first mistake; without num_devices an axis of -1 counts as 1."""
    _check_text(dataclasses.asdict(config))
    for check in (_check_run, _check_devices, _check_optimizer, _check_remat, _check_kernel):
        check(config)
    _check_sample(config)
    FAMILY_CHECKS[config.model.family](config, config.model)
    if num_devices is None:
        _check_sizes(config.mesh)
        sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in AXES}
    else:
        sizes = resolve_mesh(config.mesh, num_devices)
    _check_dcn(config.mesh, sizes, num_devices is not None)
    _check_tables(config)
    problems = dict.fromkeys(layout_problems(config, sizes))
    if problems:
        near = near_meshes(config, sizes)
        hint = f"; nearest meshes that fit: {' or '.join(near)}" if near else ""
        raise UserError("; and ".join(problems) + hint)


def layout_problems(config: Config, sizes: dict[str, int]) -> Iterator[str]:
    """Every dimension that its axes do not fit, each with the nearest values that do."""
    rules, storage = RULES | config.rules, STORAGE | config.storage
    yield from _check_arrays(rules, sizes)
    yield from _check_heads(config, rules, storage, sizes)
    yield from _check_batch(config, rules, sizes)
    yield from _check_pipeline(config, rules, storage, sizes)
    yield from _check_weights(config, rules, storage, sizes)


def near_meshes(config: Config, sizes: dict[str, int], count: int = 3) -> list[str]:
    """The meshes of as many devices that fit the config and change the fewest factors."""
    axes = [axis for axis in AXES if sizes[axis] > 1 or axis in ("data", "fsdp", "tensor")]
    ranked = []
    for shape in factorisations(math.prod(sizes.values()), len(axes)):
        other = dict.fromkeys(AXES, 1) | dict(zip(axes, shape, strict=True))
        if any(other[axis] % factor for axis, factor in config.mesh.dcn.items()):
            continue
        distance = sum(abs(math.log(other[axis] / sizes[axis])) for axis in AXES)
        ranked.append((distance, shape, other))
    found = (other for _, _, other in sorted(ranked, key=lambda each: each[:2]))
    fit = (other for other in found if not any(layout_problems(config, other)))
    name = lambda other: ",".join(f"{axis}={n}" for axis, n in other.items() if n > 1)
    return [name(other) or "one device" for other in itertools.islice(fit, count)]


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as an ordered product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


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
            near = _join(_near_divisors(num_devices, product))
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
    near = _join(_near_divisors(num_devices, product))
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
            raise UserError(f"mesh.dcn.{axis} is not a mesh axis{_or_list(axis, AXES)}")
        if factor < 1:
            raise UserError(f"mesh.dcn.{axis}={factor} must be at least 1")
        if (resolved or getattr(mesh, axis) != -1) and sizes[axis] % factor:
            near = _join(_near_divisors(sizes[axis], factor))
            raise UserError(
                f"mesh.dcn.{axis}={factor} does not divide mesh.{axis}={sizes[axis]}; use {near}"
            )


def _check_tables(config: Config) -> None:
    """rules and storage name dimensions and axes that exist, an axis once per dimension."""
    for table, entries in (("rules", config.rules), ("storage", config.storage)):
        for dim, axes in entries.items():
            name = f"{table}.{dim}"
            if dim not in DIMS:
                raise UserError(f"{name}: {dim!r} is not a dimension{_or_list(dim, DIMS)}")
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"{name}: {axis!r} is not a mesh axis{_or_list(axis, AXES)}")
                if axes.count(axis) > 1:
                    raise UserError(f"{name}: axis {axis} is given twice; once is enough")
            whole = WHOLE.get(dim, "") if (table, dim) != ("storage", "norm") else ""
            if whole and set(axes) - ({"stage"} if dim == "layers" else set()):
                raise UserError(f"{name}: {whole} and cannot be split; use {name}=[]")


def _check_arrays(rules: Table, sizes: dict[str, int]) -> Iterator[str]:
    """No axis splits two dimensions of one array."""
    for dims in ARRAYS:
        owner: dict[str, str] = {}
        for dim in dims.split():
            for axis in rules.get(dim, ()):
                if sizes[axis] > 1 and axis in owner:
                    yield (
                        f"rules.{owner[axis]} and rules.{dim} both use axis {axis} "
                        f"(mesh.{axis}={sizes[axis]}), and an array has the dimensions "
                        f"({', '.join(dims.split())}); take {axis} from one of them"
                    )
                owner[axis] = dim


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
        for problem in _divide("checkpoint.keep_every", keep_every, {"checkpoint.every": every}):
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
                hint = _or_list(name, REMAT_NAMES)
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


def _check_gpt2(config: Config, model: Any) -> None:
    if model.num_kv_heads != model.num_heads:
        raise UserError(
            f"model.num_kv_heads={model.num_kv_heads}: gpt2 has no grouped heads; "
            f"use model.num_kv_heads={model.num_heads} (model.num_heads)"
        )
    _check_positions("batch.sequence_length", config.batch.sequence_length, model.max_positions)
    if config.sample.every:
        _check_positions("sample.tokens", config.sample.tokens, model.max_positions)


def _check_positions(name: str, length: int, positions: int) -> None:
    if length > positions:
        raise UserError(
            f"{name}={length} is above model.max_positions={positions}; "
            f"use {name}={positions} or model.max_positions={length}"
        )


def _check_llama(config: Config, model: Any) -> None:
    names = ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_length")
    _check_rotary(model, names if model.rope_scaling == "llama3" else names[:1])
    if model.rope_scaling == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise UserError(
            f"model.rope_low_freq_factor={model.rope_low_freq_factor} must be below "
            f"model.rope_high_freq_factor={model.rope_high_freq_factor}, as 1 and 4"
        )


def _check_rotary(model: Any, names: tuple[str, ...]) -> None:
    if model.head_dim % 2:
        near = _join([n for n in (model.head_dim - 1, model.head_dim + 1) if n])
        raise UserError(f"model.head_dim={model.head_dim} must be even to rotate; use {near}")
    for name in names:
        value = getattr(model, f"rope_{name}")
        if value <= 0:
            raise UserError(f"model.rope_{name}={value} must be above 0")


def _check_moe(config: Config, model: Any) -> None:
    """Experts, and for the rotary families their head width."""
    m, rules, share = model, RULES | config.rules, model.capacity_factor
    _check_rotary(model, ("theta",))
    if m.experts_per_token > m.num_experts:
        raise UserError(
            f"model.experts_per_token={m.experts_per_token} is above model.num_experts="
            f"{m.num_experts}; a token is sent to {m.num_experts} at most"
        )
    if m.dispatch == "capacity" and not share:
        raise UserError("model.capacity_factor=0.0 leaves no slot; use 1.25, or 1.0 for even loads")
    if outside := [axis for axis in rules["experts"] if axis not in rules["batch"]]:
        raise UserError(
            f"rules.experts: axis {outside[0]} is not in rules.batch={list(rules['batch'])}: "
            "tokens are sent along the axes of experts, each device its own; add it there"
        )


FAMILY_CHECKS = {
    "llama": _check_llama, "gpt2": _check_gpt2, "mixtral": _check_moe, "qwen3_moe": _check_moe,
}  # fmt: skip


def _check_batch(config: Config, rules: Table, sizes: dict[str, int]) -> Iterator[str]:
    b, loss = config.batch, config.loss
    microbatches = {"batch.microbatches": b.microbatches}
    yield from _divide("batch.sequences", b.sequences, _axes(rules, "batch", sizes) | microbatches)
    name, length = "batch.sequence_length", b.sequence_length
    yield from _divide(name, length, _axes(rules, "residual_seq", sizes))
    split = _axes(rules, "seq", sizes)
    yield from _divide(name, length, split | {"loss.chunks": loss.chunks})
    if split and config.attention.context != "all_to_all":  # two pieces of it on each device
        yield from _divide(name, length, split, pieces=2)


def _check_pipeline(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Layers divide into chunks, and with repeats microbatches go in turns of all stages."""
    stages, repeats, count = sizes["stage"], config.pipeline.repeats, config.batch.microbatches
    if stages == 1:
        if repeats > 1:
            yield (
                f"pipeline.repeats={repeats} has no effect with mesh.stage=1; "
                "use pipeline.repeats=1 or mesh.stage=2"
            )
        return
    if "stage" not in rules["layers"]:
        yield (
            f"rules.layers=[] with mesh.stage={stages}: layers live on stages; "
            "use rules.layers=[stage] or mesh.stage=1"
        )
    misplaced = [dim for dim, axes in rules.items() if "stage" in axes]
    misplaced = [dim for dim in misplaced if dim not in ("layers", "vocab")]
    if misplaced:
        yield (f"rules.{misplaced[0]}: stages split layers and vocab only; drop stage")
    if at_rest := [dim for dim, axes in config.storage.items() if "stage" in axes]:
        yield (f"storage.{at_rest[0]}: layers rest on their stage; drop stage")
    groups = family_module(config.model.family).groups(config.model)
    factors = {"mesh.stage": stages} | ({"pipeline.repeats": repeats} if repeats > 1 else {})
    if len(groups) == 1 and len(groups[0][0]) == 1:
        yield from _divide("model.num_layers", config.model.num_layers, factors)
    else:
        yield from _divide_pattern(config.model, factors)
    if len(groups) > 1:
        rows = _axes(rules, "batch", sizes) | {"batch.microbatches": count, "mesh.stage": stages}
        yield from _divide("batch.sequences", config.batch.sequences, rows)
    if repeats > 1:
        yield from _divide("batch.microbatches", count, {"mesh.stage": stages})
    # Generation holds a part of every layer on every stage (generate.py).
    embed = _axes(rules, "embed", sizes) | _axes(storage, "embed", sizes)
    yield from _divide("model.embed_dim", config.model.embed_dim, embed | {"mesh.stage": stages})


def _divide_pattern(model: Model, factors: dict[str, int]) -> Iterator[str]:
    """The repeats of the pattern that stages are cut from divide; other layers are on no stage."""
    pattern, number = staged_pattern(model)
    unit = math.prod(factors.values())
    if number % unit == 0:
        return
    below = number // unit * unit
    layers = [model.num_layers + (n - number) * len(pattern) for n in (below, below + unit) if n]
    fixes = [f"model.num_layers={_join(layers)}", *_near_factors(number, factors)]
    yield (
        f"model.num_layers={model.num_layers} has {number} repeats of the {len(pattern)} layers "
        f"that stages are cut from, not divisible by {_product(factors)}; "
        f"nearest: {', or '.join(fixes)}"
    )


def _check_heads(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Query heads divide; kv heads divide too, or are fewer than their axes and are replicated."""
    m = config.model
    if m.num_heads % m.num_kv_heads:
        near = _join(_near_divisors(m.num_heads, m.num_kv_heads))
        yield (
            f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; "
            f"nearest: model.num_kv_heads={near}"
        )
    heads = _axes(rules, "heads", sizes) | _axes(storage, "heads", sizes)
    yield from _divide("model.num_heads", m.num_heads, heads)
    kv, ways = m.num_kv_heads, _axes(rules, "kv_heads", sizes)
    count = math.prod(ways.values())
    if kv % count and count % kv:
        fits = [n for n in _divisors(m.num_heads) if kv % n == 0 or n % kv == 0]
        near = [*[n for n in fits if n < count][-1:], *[n for n in fits if n > count][:1]]
        axis = next(iter(ways)) if len(ways) == 1 else "their product"
        yield (
            f"model.num_kv_heads={kv} is not divisible by {_product(ways)}; nearest: "
            f"{axis}={_join(near)}, or rules.kv_heads=[] to replicate them"
        )
    if config.attention.context == "all_to_all":  # kv heads are repeated
        parts = _axes(rules, "heads", sizes) | _axes(rules, "seq", sizes)
        yield from _divide("model.num_heads", m.num_heads, parts)
    extra = _axes(storage, "kv_heads", sizes)
    if extra:
        yield from _divide("model.num_kv_heads", kv, (ways if count <= kv else {}) | extra)
    # Where the config does not say, the cache follows kv_heads.
    yield from _divide("model.num_kv_heads", kv, _axes(config.rules, "cache_kv_heads", sizes))


def _check_weights(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Every dimension of a weight divides by its axes, in use and at rest."""
    m = config.model
    rows = padded_vocab(m)
    dims = [
        ("embed", "model.embed_dim", m.embed_dim), ("mlp", "model.mlp_dim", m.mlp_dim),
        ("head_dim", "model.head_dim", m.head_dim), ("norm", "model.embed_dim", m.embed_dim),
    ]  # fmt: skip
    dims += [("norm", "model.head_dim", m.head_dim)] if m.qk_norm else []
    if "num_experts" in vars(m):
        dims += [("experts", "model.num_experts", vars(m)["num_experts"])]
        dims += [("mlp", "model.expert_mlp_dim", vars(m)["expert_mlp_dim"])]
        dims += [("mlp", "model.shared_expert_dim", vars(m)["shared_expert_dim"])]
    positions = vars(m).get("max_positions")  # of gpt2
    dims += [("positions", "model.max_positions", positions)] if positions else []
    for dim, name, size in dims:
        yield from _divide(name, size, _axes(rules, dim, sizes) | _axes(storage, dim, sizes))
    ways = _axes(rules, "vocab", sizes) | _axes(storage, "vocab", sizes)
    unit = math.prod(ways.values())
    if rows % unit:
        near = _join(_near_divisors(rows, unit))
        yield (
            f"model.vocab_size={m.vocab_size}, padded to {rows}, is not divisible by "
            f"{_product(ways)}; use a product of {near}, or "
            f"model.vocab_multiple={math.lcm(m.vocab_multiple, unit)}"
        )


def _axes(table: Table, dim: str, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh axes over which a dimension is split: {"mesh.tensor": 2}."""
    return {f"mesh.{axis}": sizes[axis] for axis in table.get(dim, ()) if sizes[axis] > 1}


def _divide(name: str, value: int, factors: dict[str, int], pieces: int = 1) -> Iterator[str]:
    """What is wrong if `pieces` times the product of the factors does not divide a value."""
    factors = {key: factor for key, factor in factors.items() if factor > 1}
    unit = pieces * math.prod(factors.values())
    if value % unit == 0:
        return
    below = value // unit * unit
    fixes = [f"{name}={_join([n for n in (below, below + unit) if n])}"]
    fixes += _near_factors(value, factors, pieces)
    yield (
        f"{name}={value} is not divisible by {f'{pieces} x ' if pieces > 1 else ''}"
        f"{_product(factors)}; nearest: {', or '.join(fixes)}"
    )


def _near_factors(value: int, factors: dict[str, int], pieces: int = 1) -> Iterator[str]:
    """The nearest sizes of each factor, the others as they are, with which all divide a value."""
    for key, factor in factors.items():
        rest = pieces * math.prod(factors.values()) // factor
        if value % rest == 0:
            yield f"{key}={_join(_near_divisors(value // rest, factor))}"


def _product(factors: dict[str, int]) -> str:
    text = " x ".join(f"{key}={factor}" for key, factor in factors.items())
    return text if len(factors) == 1 else f"{math.prod(factors.values())} ({text})"


@functools.cache  # a search asks for those of few numbers very often
def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, SEARCH) + 1) if number % n == 0]


def _near_divisors(number: int, near: int) -> list[int]:
    """The largest divisor below `near` and the smallest above."""
    divisors = _divisors(number)
    return [*[n for n in divisors if n < near][-1:], *[n for n in divisors if n > near][:1]]


def _join(values: list[int]) -> str:
    return " or ".join(map(str, values))


def _or_list(word: str, names: tuple[str, ...]) -> str:
    """The nearest names, or all of them."""
    return did_you_mean(word, names) or f"; there are {', '.join(names)}"
