"""Whether a config's dimensions divide over a mesh, and the nearest values and meshes that work."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jaxlm.config import AXES, RULES, STORAGE, Config, Model, padded_vocab
from jaxlm.models import family_module, staged_pattern
from jaxlm.nearest import (
    divide,
    divisors,
    factorisations,
    join,
    near_divisors,
    near_factors,
    product,
)

# The arrays of a model, by their dimensions: an axis may split only one dimension of each in use.
ARRAYS = (
    "batch seq embed", "batch residual_seq embed", "batch seq heads head_dim",
    "batch seq kv_heads head_dim", "batch seq mlp", "batch seq vocab",
    "embed heads head_dim", "embed kv_heads head_dim", "embed mlp", "vocab embed",
    "positions embed", "experts embed mlp", "cache_batch cache_seq cache_kv_heads head_dim",
)  # fmt: skip

Table = dict[str, tuple[str, ...]]


def layout_problems(config: Config, sizes: dict[str, int]) -> Iterator[str]:
    """Every dimension that its mesh axes do not divide, each with the nearest values that do."""
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


def _check_batch(config: Config, rules: Table, sizes: dict[str, int]) -> Iterator[str]:
    b, loss = config.batch, config.loss
    microbatches = {"batch.microbatches": b.microbatches}
    yield from divide("batch.sequences", b.sequences, _axes(rules, "batch", sizes) | microbatches)
    name, length = "batch.sequence_length", b.sequence_length
    yield from divide(name, length, _axes(rules, "residual_seq", sizes))
    split = _axes(rules, "seq", sizes)
    yield from divide(name, length, split | {"loss.chunks": loss.chunks})
    if split and config.attention.context != "all_to_all":  # two pieces of it on each device
        yield from divide(name, length, split, pieces=2)


def _check_pipeline(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Layers divide into chunks; with pipeline.repeats, microbatches divide over the stages."""
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
        yield from divide("model.num_layers", config.model.num_layers, factors)
    else:
        yield from _divide_pattern(config.model, factors)
    if len(groups) > 1:
        rows = _axes(rules, "batch", sizes) | {"batch.microbatches": count, "mesh.stage": stages}
        yield from divide("batch.sequences", config.batch.sequences, rows)
    if repeats > 1:
        yield from divide("batch.microbatches", count, {"mesh.stage": stages})
    # Generation holds a part of every layer on every stage (generate.py).
    embed = _axes(rules, "embed", sizes) | _axes(storage, "embed", sizes)
    yield from divide("model.embed_dim", config.model.embed_dim, embed | {"mesh.stage": stages})


def _divide_pattern(model: Model, factors: dict[str, int]) -> Iterator[str]:
    """The repeats of the pattern that stages are cut from divide; other layers are on no stage."""
    pattern, number = staged_pattern(model)
    unit = math.prod(factors.values())
    if number % unit == 0:
        return
    below = number // unit * unit
    layers = [model.num_layers + (n - number) * len(pattern) for n in (below, below + unit) if n]
    fixes = [f"model.num_layers={join(layers)}", *near_factors(number, factors)]
    yield (
        f"model.num_layers={model.num_layers} has {number} repeats of the {len(pattern)} layers "
        f"that stages are cut from, not divisible by {product(factors)}; "
        f"nearest: {', or '.join(fixes)}"
    )


def _check_heads(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Query heads divide; kv heads divide too, or are fewer than their axes and are replicated."""
    m = config.model
    if m.num_heads % m.num_kv_heads:
        near = join(near_divisors(m.num_heads, m.num_kv_heads))
        yield (
            f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; "
            f"nearest: model.num_kv_heads={near}"
        )
    heads = _axes(rules, "heads", sizes) | _axes(storage, "heads", sizes)
    yield from divide("model.num_heads", m.num_heads, heads)
    kv, ways = m.num_kv_heads, _axes(rules, "kv_heads", sizes)
    count = math.prod(ways.values())
    if kv % count and count % kv:
        fits = [n for n in divisors(m.num_heads) if kv % n == 0 or n % kv == 0]
        near = [*[n for n in fits if n < count][-1:], *[n for n in fits if n > count][:1]]
        axis = next(iter(ways)) if len(ways) == 1 else "their product"
        yield (
            f"model.num_kv_heads={kv} is not divisible by {product(ways)}; nearest: "
            f"{axis}={join(near)}, or rules.kv_heads=[] to replicate them"
        )
    if config.attention.context == "all_to_all":  # kv heads are repeated
        parts = _axes(rules, "heads", sizes) | _axes(rules, "seq", sizes)
        yield from divide("model.num_heads", m.num_heads, parts)
    extra = _axes(storage, "kv_heads", sizes)
    if extra:
        yield from divide("model.num_kv_heads", kv, (ways if count <= kv else {}) | extra)
    # Where the config does not say, the cache follows kv_heads.
    yield from divide("model.num_kv_heads", kv, _axes(config.rules, "cache_kv_heads", sizes))


def _check_weights(
    config: Config, rules: Table, storage: Table, sizes: dict[str, int]
) -> Iterator[str]:
    """Every dimension of a weight divides by its axes, in use and at rest."""
    m = config.model
    rows = padded_vocab(m)
    dims = [
        (dim, f"model.{field.name}", getattr(m, field.name))
        for field in dataclasses.fields(m)
        for dim in field.metadata["dim"].split()
    ]
    dims += [("norm", "model.head_dim", m.head_dim)] if m.qk_norm else []
    for dim, name, size in dims:
        yield from divide(name, size, _axes(rules, dim, sizes) | _axes(storage, dim, sizes))
    ways = _axes(rules, "vocab", sizes) | _axes(storage, "vocab", sizes)
    unit = math.prod(ways.values())
    if rows % unit:
        near = join(near_divisors(rows, unit))
        yield (
            f"model.vocab_size={m.vocab_size}, padded to {rows}, is not divisible by "
            f"{product(ways)}; use a product of {near}, or "
            f"model.vocab_multiple={math.lcm(m.vocab_multiple, unit)}"
        )


def _axes(table: Table, dim: str, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh axes over which a dimension is split: {"mesh.tensor": 2}."""
    return {f"mesh.{axis}": sizes[axis] for axis in table.get(dim, ()) if sizes[axis] > 1}
