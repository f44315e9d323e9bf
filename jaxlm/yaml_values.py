"""One value of a config file: a YAML node read as the type of its key, and a value as YAML text."""

from __future__ import annotations

import math
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"
BOOL = "tag:yaml.org,2002:bool"
TAGS = {f"tag:yaml.org,2002:{name}" for name in "str null bool int float timestamp seq map".split()}
KINDS = {
    bool: "true or false", int: "an integer", float: "a number", str: "text",
    tuple[str, ...]: "a list of text", dict[str, int]: "a mapping of axis to factor",
    dict[str, tuple[str, ...]]: "a mapping of dimension to axes",
}  # fmt: skip
TEXT_KINDS = (str, tuple[str, ...], dict[str, tuple[str, ...]])  # of the last, its items


def read_value(kind: Any, node: yaml.Node, typed: bool) -> Any:
    """A node as a value of this kind; `typed` on a command line, text needs no quotes."""
    if node.tag not in TAGS:
        raise ValueError(f"has the YAML tag {node.tag}; write text that starts with ! in quotes")
    if node.tag == NULL:
        raise ValueError("is null; leave the key out to take its default")
    if kind == tuple[str, ...]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(read_value(str, item, typed) for item in items)
    if not isinstance(node, yaml.ScalarNode):
        hint = "; write text with such signs in quotes" if kind is str else ""
        raise ValueError(f"must be {KINDS[kind]}, not {noun(node)}{hint}")
    if kind is bool:
        return _read_bool(node.value)
    if kind is str:
        if node.tag != TEXT and not typed:
            raise ValueError(f"must be text; write '{short(node.value)}' in quotes")
        return node.value
    return _read_int(node.value) if kind is int else _read_float(node.value)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return text.lower() == "true"


def _read_float(text: str) -> float:
    """3e-4, 5 and 1_000.0 are numbers; nan and inf are not."""
    try:
        value = float(text.replace(".inf", "inf").replace(".nan", "nan"))  # YAML's spelling
    except ValueError as error:
        raise ValueError("must be a number") from error
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _read_int(text: str) -> int:
    """3, 8_192, 1e3 and 2.0 are integers."""
    try:
        value = int(text)
    except ValueError:
        try:
            value = _read_float(text)
        except ValueError as error:
            raise ValueError("must be an integer") from error
    if abs(value) >= 2**63:
        raise ValueError("must be an integer below 2**63")
    if value != int(value):
        raise ValueError(f"must be an integer; nearest: {math.floor(value)} or {math.ceil(value)}")
    return int(value)


def noun(node: yaml.Node) -> str:
    """What a node of YAML is, in words."""
    kinds = {yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list"}
    return kinds.get(type(node), "a single value")


def shown(node: yaml.Node) -> str:
    """A value as the user wrote it, shortened."""
    if isinstance(node, yaml.ScalarNode):
        return short(node.value)
    start, end = node.start_mark, node.end_mark
    assert start.buffer is not None  # texts are parsed from strings
    return short(start.buffer[start.pointer : end.pointer].strip())


def short(text: str, width: int = 60) -> str:
    """The text, cut where it is longer than `width` characters."""
    return text if len(text) <= width else f"{text[:width]}..."


def yaml_text(value: Any) -> str:
    """A plain value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    if text.removesuffix("...\n").count("\n") > 1:  # text with line breaks
        text = yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf)
    return text.removesuffix("...\n").strip()
