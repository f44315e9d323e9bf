"""Text about a config: every value with its source, and what a key means."""

from __future__ import annotations

import functools
import typing
from typing import Any

from jaxlm.config import AXES, DIMS, FAMILIES, RULES, STORAGE, Config, UserError
from jaxlm.configfile import (
    Key,
    changes,
    plain,
    schema,
    sections,
    tables,
    to_dict,
    yaml_lines,
)
from jaxlm.nearest import did_you_mean
from jaxlm.yaml_values import KINDS, yaml_text

CHANGES = {
    "recompiles": "the train step is compiled anew",
    "checkpoint": "a checkpoint written before cannot be restored",
    "numbers": "losses change beyond rounding",
    "data": "the order or content of the sample stream changes",
}
TABLE_LEGAL = {
    "mesh.dcn": f"axes ({', '.join(AXES)}) with a factor that divides the axis' size",
    "rules": f"dimensions ({', '.join(DIMS)}) with a list of axes ({', '.join(AXES)})",
    "storage": f"dimensions ({', '.join(DIMS)}) with a list of axes ({', '.join(AXES)})",
}
TABLE_DEFAULTS: dict[str, dict[str, Any]] = {"mesh.dcn": {}, "rules": RULES, "storage": STORAGE}


def show(config: Config, sources: dict[str, str]) -> str:
    """The whole config as YAML, each value with the place it came from."""
    lines = list(yaml_lines(to_dict(config)))
    width = min(60, max(len(line) for _, line in lines))
    return "".join(
        f"{line:{width}}  # {sources[name]}\n" if name in sources else f"{line}\n"
        for name, line in lines
    )


def explain(name: str, config: Config | None = None) -> str:
    """What a key means and what changing it alters; a section gives all its keys, "" every key."""
    keys = dict(schema(*FAMILIES))
    for own in schema(config.model.family).values() if config is not None else ():
        keys[own.name] = own._replace(families=keys[own.name].families)
    table = next((t for t in tables() if name.startswith(f"{t}.")), None)
    if name in keys:
        return "\n".join(_explain_key(key, config) for key in _variants(keys[name], config))
    if table is not None:
        return _explain_item(keys[table], name.removeprefix(f"{table}."), config)
    inside = [key for key in keys.values() if not name or key.name.startswith(f"{name}.")]
    if not inside:
        raise UserError(f"unknown key {name}{did_you_mean(name, [*keys, *sections()])}")
    head = f"{name}: {_section_doc(name)}\n\n" if name else ""
    return head + "\n".join(_explain_key(key, config) for key in inside)


def _variants(key: Key, config: Config | None) -> list[Key]:
    """The key of the config's family; without a config, one for all families that have it alike."""
    if config is not None or not key.families:
        return [key]
    alike: dict[Any, list[str]] = {}
    for family in key.families:
        own = schema(family)[key.name]
        alike.setdefault((own.field.metadata["doc"], own.default), []).append(family)
    return [schema(f[0])[key.name]._replace(families=tuple(f)) for f in alike.values()]


def _section_doc(name: str) -> str:
    return typing.get_type_hints(Config)[name].__doc__


def _explain_key(key: Key, config: Config | None) -> str:
    limits = key.field.metadata
    value = TABLE_DEFAULTS[key.name] if key.is_table else key.default
    default = "required" if limits["required"] else f"default {yaml_text(plain(value))}"
    family = f", family {' or '.join(key.families)} only" if key.families else ""
    lines = [f"{key.name}: {KINDS[key.kind]}, {default}{family}", f"meaning: {limits['doc']}"]
    lines += [f"legal: {_legal(key)}"]
    known = config is not None and (not key.families or config.model.family in key.families)
    found = changes(key, config) if config is not None and known else limits["changes"]
    where = {"numbers": f", where {limits['numbers_where']}"} if limits["numbers_where"] else {}
    lines += [
        f"changing it: {change}: {CHANGES[change]}{where.get(change, '')}" for change in found
    ]
    if not found:
        lines += ["changing it: alters neither program, checkpoint, losses nor data order"]
    if config is not None and known:
        value = functools.reduce(dict.__getitem__, key.name.split("."), to_dict(config))
        lines += [f"now: {yaml_text(value)}"]
    return "\n  ".join(lines) + "\n"


def _legal(key: Key) -> str:
    """The values that a key takes."""
    limits = key.field.metadata
    if key.is_table:
        return TABLE_LEGAL[key.name]
    if key.name.startswith("mesh.") and key.kind is int:
        return "at least 1; -1 for one axis at most: the devices that are left"
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    bounds = [f"at least {limits['minimum']}"] if limits["minimum"] is not None else []
    bounds += [f"at most {limits['maximum']}"] if limits["maximum"] is not None else []
    return ", ".join(bounds) or f"{KINDS[key.kind]}"


def _explain_item(key: Key, item: str, config: Config | None) -> str:
    """One entry of a table, such as rules.mlp."""
    names = AXES if key.name == "mesh.dcn" else DIMS
    if item not in names:
        raise UserError(f"unknown key {key.name}.{item}{did_you_mean(item, names)}")
    default = TABLE_DEFAULTS[key.name].get(item, 1 if key.name == "mesh.dcn" else ())
    return f"{key.name}.{item}: default {yaml_text(plain(default))}\n{_explain_key(key, config)}"
