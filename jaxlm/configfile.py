"""Config files: YAML with includes and command-line overrides into a Config, and back.

A file becomes a flat table, dotted key -> (YAML node, where it stands). Includes and overrides are
merged by updating that table, so sections merge deeply and every value knows its source.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxlm.config import FAMILIES, Config, Model, UserError, expand_home
from jaxlm.models import family_module
from jaxlm.nearest import did_you_mean
from jaxlm.yaml_values import (
    BOOL,
    NULL,
    TEXT,
    TEXT_KINDS,
    noun,
    read_value,
    short,
    shown,
    yaml_text,
)

OVERRIDE = "override"
DEFAULT = "default"


class Key(NamedTuple):
    """One key of the schema."""

    name: str  # dotted
    kind: (
        Any  # bool, int, float, str, tuple[str, ...], dict[str, int] or dict[str, tuple[str, ...]]
    )
    field: dataclasses.Field
    families: tuple[str, ...]  # those that have it; empty: all

    @property
    def is_table(self) -> bool:
        """Whether the value is an open mapping (rules, storage, mesh.dcn)."""
        return typing.get_origin(self.kind) is dict

    @property
    def default(self) -> Any:
        """The default as plain data; None where the key is required."""
        if self.field.default is not dataclasses.MISSING:
            return plain(self.field.default)
        factory = self.field.default_factory
        return None if factory is dataclasses.MISSING else plain(factory())


class Entry(NamedTuple):
    """A value as written, and where: "configs/base.yaml:12" or "override"."""

    node: yaml.Node
    source: str


# The schema.


@functools.cache
def schema(*families: str) -> dict[str, Key]:
    """Every dotted key in order, with the model keys of these families."""
    found = {}
    for family in families if len(families) == 1 else ("", *families):
        for key in _walk(Config, "", family):
            first = found.setdefault(key.name, key)
            if key.families and key is not first:
                found[key.name] = first._replace(families=first.families + key.families)
    order = [field.name for field in dataclasses.fields(Config)]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split(".")[0])))


def _walk(cls: Any, prefix: str, family: str) -> Iterator[Key]:
    common = {field.name for field in dataclasses.fields(Model)}
    for field, kind in _fields(cls, family):
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.", family)
        else:
            own = issubclass(cls, Model) and field.name not in common
            yield Key(prefix + field.name, kind, field, (family,) if own else ())


def _fields(cls: Any, family: str) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Fields with their resolved types; `model` is the family's own class."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        yield field, model_class(family) if kind is Model else kind


def model_class(family: str) -> type[Model]:
    """The Config of jaxlm/models/<family>.py; the keys that all families have for an empty name."""
    return family_module(family).Config if family else Model


def sections() -> list[str]:
    """Dotted names that hold keys: mesh, model, ..."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in schema() if "." in name))


def tables() -> list[str]:
    """Dotted names of open mappings: mesh.dcn, rules, storage."""
    return [key.name for key in schema().values() if key.is_table]


# Reading.


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with its includes and `key=value` overrides."""
    return load_with_sources(path, overrides)[0]


def load_with_sources(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
    """The config, and where each dotted key's value came from."""
    entries = _read_file(Path(path), ())
    for override in overrides:
        entries = _over(entries, _read_override(override))
    family = _family(entries)
    keys = schema(family)
    for name, entry in entries.items():
        if name not in keys and not name.startswith(tuple(f"{table}." for table in tables())):
            raise UserError(f"{entry.source}: {_unknown(name, family)}")
    missing = [
        k.name for k in keys.values() if k.field.metadata["required"] and k.name not in entries
    ]
    if missing:
        raise UserError(f"{path}: required and not set: {', '.join(missing)}")
    config = _build(Config, "", family, entries)
    sources = {name: DEFAULT for name in keys} | {n: e.source for n, e in entries.items()}
    filled = {table for table in tables() if any(n.startswith(f"{table}.") for n in entries)}
    return config, {name: source for name, source in sources.items() if name not in filled}


def _read_file(path: Path, parents: tuple[Path, ...], wanted_by: str = "") -> dict[str, Entry]:
    """The flat table of a file over those of the files that it includes."""
    blame = f"{wanted_by}: include: " if wanted_by else ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{blame}{path}: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{blame}{path}: cannot be read: {reason}") from error
    if path.resolve() in (parent.resolve() for parent in parents):
        raise UserError(f"{blame}cycle: {' -> '.join(map(str, (*parents, path)))}")
    root = _parse(text, str(path))
    if root is None:
        raise UserError(f"{path}: the file is empty; a config is a mapping of keys")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{_line(root)}: a config is a mapping of keys, not {noun(root)}")
    own = _flatten(root, "", lambda node: f"{path}:{_line(node)}")
    include = own.pop("include", None)
    asked_by, entries = include.source if include else "", {}
    for name in _coerce("include", tuple[str, ...], include) if include else ():
        name = expand_home(name, f"{asked_by}: include")
        other = Path(os.path.normpath(path.parent / name))
        included = _read_file(other, (*parents, path), asked_by)
        entries = _over(entries, included)
    return _over(entries, own)


def _over(entries: dict[str, Entry], later: dict[str, Entry]) -> dict[str, Entry]:
    """The later entries win; `mesh: auto` and the axes of a mesh replace each other."""
    names = [name for name in later if name.startswith("mesh.")]
    if names == ["mesh.auto"] and later["mesh.auto"].node.value == "true":
        entries = {n: entry for n, entry in entries.items() if not n.startswith("mesh.")}
    elif names:
        entries = {n: entry for n, entry in entries.items() if n != "mesh.auto"}
    return entries | later


def _read_override(override: str) -> dict[str, Entry]:
    """The flat table of `key=value`."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UserError(f"override {short(override)!r} is not key=value, as in mesh.tensor=2")
    if name == "include":
        raise UserError("override: include works in files only")
    whole = yaml.MappingNode("", [(yaml.ScalarNode(TEXT, name), _override_node(name, text))])
    return _flatten(whole, "", lambda node: OVERRIDE)


def _override_node(name: str, text: str) -> yaml.Node:
    """The value of an override. It is read as YAML, but text is taken as it is written.

    Text is YAML only in quotes or brackets: else '# x' would be a comment, and *x an alias.
    """
    bare = text.strip()
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    marked = quoted or bare.startswith(("[", "{"))
    key = schema(*FAMILIES).get(name)
    item = schema().get(name.rpartition(".")[0])  # of a table, such as rules.mlp
    kind = key.kind if key else item.kind if item else None
    if kind in TEXT_KINDS and not marked:
        exact = key is not None and not key.field.metadata["choices"]
        return yaml.ScalarNode(TEXT, text if exact else bare)
    try:
        node = _parse(text, f"override: {name}={short(text)}")
    except UserError as error:
        if marked:
            hint = f"{error}; quote words with other signs, as in ['*norm*']"
            if kind in TEXT_KINDS and len(text) < 60:
                whole = yaml.safe_dump(bare, default_style='"', width=10**6).strip()
                hint += f", or all of it where it is one text: {shlex.quote(f'{name}={whole}')}"
            raise UserError(hint) from error
        node = None
    return node or yaml.ScalarNode(TEXT, bare)


def _parse(text: str, what: str) -> yaml.Node | None:
    """The node tree of a YAML text; scalars are read later, by the type of their key."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{what}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML leaks the last two
        raise UserError(f"{what}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what}: not valid YAML: nested too deeply") from error


def _flatten(
    mapping: yaml.MappingNode, prefix: str, where: Callable[[yaml.Node], str]
) -> dict[str, Entry]:
    """Leaves of a mapping by dotted key; only sections and tables of the schema are entered."""
    found, seen = {}, set()
    for key, node in mapping.value:
        source = where(key)
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{source}: a key must be a plain word")
        name = prefix + key.value
        if source != OVERRIDE and "." in key.value:
            nested = ": {".join(key.value.split(".")) + ": ..." + "}" * key.value.count(".")
            raise UserError(f"{source}: {name}: dots are for overrides; in a file write {nested}")
        if name in seen:
            raise UserError(f"{source}: {name} is given twice in this mapping")
        seen.add(name)
        if name == "mesh" and isinstance(node, yaml.ScalarNode) and node.value == "auto":
            found["mesh.auto"] = Entry(yaml.ScalarNode(BOOL, "true"), source)
        elif name in sections() or name in tables():
            if not isinstance(node, yaml.MappingNode):
                hint = "leave it out" if node.tag == NULL else f"write {name}: {{key: value}}"
                raise UserError(f"{source}: {name}={shown(node)} must be a mapping; {hint}")
            found |= _flatten(node, f"{name}.", where)
        else:
            found[name] = Entry(node, source)
    return found


def _family(entries: dict[str, Entry]) -> str:
    """model.family, checked; empty where it is not set."""
    key = schema()["model.family"]
    return _value(key, entries[key.name]) if key.name in entries else ""


def _unknown(name: str, family: str) -> str:
    """Why a dotted key is refused, and what was probably meant."""
    everything = schema(*FAMILIES)
    owner = " or ".join(everything[name].families) if name in everything else ""
    if owner and family:
        return f"{name} is a key of family {owner}; model.family is {family}"
    if owner:
        return f"{name} is a key of family {owner}; set model.family={owner}"
    hint = did_you_mean(name, [*schema(family), *sections()])
    parent = name.rpartition(".")[0]
    if not hint and parent in sections():
        names = [n.removeprefix(f"{parent}.") for n in schema(family) if n.startswith(f"{parent}.")]
        hint = f"; {parent} has {', '.join(names)}"
    elif not hint:
        names = dict.fromkeys(n.partition(".")[0] for n in schema(family))
        hint = f"; the top-level names are {', '.join(names)}"
    return f"unknown key {name}{hint}"


def _build(cls: Any, prefix: str, family: str, entries: dict[str, Entry]) -> Any:
    """The dataclass `cls` from the entries under `prefix`; what is not set takes its default."""
    values = {}
    for field, kind in _fields(cls, family):
        name = prefix + field.name
        if dataclasses.is_dataclass(kind):
            values[field.name] = _build(kind, f"{name}.", family, entries)
        elif typing.get_origin(kind) is dict:
            item = typing.get_args(kind)[1]
            inside = [n for n in entries if n.startswith(f"{name}.")]
            values[field.name] = {
                n.removeprefix(f"{name}."): _coerce(n, item, entries[n]) for n in inside
            }
        elif name in entries:
            values[field.name] = _value(schema(family)[name], entries[name])
    return cls(**values)


def _value(key: Key, entry: Entry) -> Any:
    """The value of an entry, of the key's type and within its limits."""
    value, limits = _coerce(key.name, key.kind, entry), key.field.metadata
    why = ""
    if limits["choices"] and value not in limits["choices"]:
        hint = did_you_mean(value, limits["choices"])
        why = f"must be one of {', '.join(map(str, limits['choices']))}{hint}"
    elif limits["minimum"] is not None and value < limits["minimum"]:
        why = f"must be at least {limits['minimum']}"
    elif limits["maximum"] is not None and value > limits["maximum"]:
        why = f"must be at most {limits['maximum']}"
    if why:
        raise UserError(f"{entry.source}: {key.name}={shown(entry.node)} {why}")
    return expand_home(value, f"{entry.source}: {key.name}") if limits["path"] else value


def _coerce(name: str, kind: Any, entry: Entry) -> Any:
    try:
        return read_value(kind, entry.node, entry.source == OVERRIDE)
    except ValueError as error:
        raise UserError(f"{entry.source}: {name}={shown(entry.node)} {error}") from error


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


# Writing.


def plain(value: Any) -> Any:
    """The value as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain data."""
    return plain(config)


def dump(config: Config) -> str:
    """The config as YAML, every key written out; loads back to an equal Config."""
    return "".join(f"{line}\n" for _, line in yaml_lines(to_dict(config)))


def yaml_lines(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, line of YAML) of nested plain data; lists stay on their key's line."""
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield prefix + name, f"{indent}{name}:"
            yield from yaml_lines(value, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{indent}{name}: {yaml_text(value)}"


def changes(key: Key, config: Config) -> tuple[str, ...]:
    """What changing a key alters, of this config."""
    found = key.field.metadata["changes"]
    if key.name == "batch.microbatches" and not config.model.microbatches_change_numbers:
        return tuple(what for what in found if what != "numbers")
    return found


def differences(old: dict[str, Any], new: Config, what: str) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where a key that changes `what` differs from an earlier run's.

    `old` is its to_dict; a key that it lacks had its default, since its run was older than the key.
    """
    found, now = [], to_dict(new)
    for key in schema(new.model.family).values():
        if what in changes(key, new):
            before, after = _lookup(old, key.name, key.default), _lookup(now, key.name, None)
            if before != after:
                found.append((key.name, before, after))
    return found


def _lookup(values: Any, name: str, default: Any) -> Any:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return plain(values)
