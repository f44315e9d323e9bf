"""Imports run downwards through the layers of docs/architecture.md, and in no circle."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def find_modules() -> dict[str, ast.Module]:
    """Dotted name below jaxlm -> syntax tree; the package itself is ''."""
    files = {file.relative_to(ROOT / "jaxlm"): file for file in (ROOT / "jaxlm").rglob("*.py")}
    names = {".".join(path.with_suffix("").parts): file for path, file in files.items()}
    trees = {name: ast.parse(file.read_text()) for name, file in names.items()}
    return {re.sub(r"(^|\.)__init__$", "", name): tree for name, tree in trees.items()}


MODULES = find_modules()


def imports(name: str) -> set[str]:
    """The modules that one imports by name, at the top or inside a function."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("jaxlm.") in MODULES else node.module)
    ours = {each.removeprefix("jaxlm.") for each in found if each.startswith("jaxlm.")}
    unknown = ours - MODULES.keys()
    assert not unknown, f"{name} imports {unknown}, which are not there"
    return ours - {name}


def layers() -> dict[str, int]:
    """Name -> its height, from the first block of the section Layers; the lowest line is 0."""
    block = PAGE.split("## Layers")[1].split("```text\n")[1].split("```")[0]
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    names = [name for line in lines for name in line]
    assert len(names) == len(set(names)), "a name stands in two layers"
    return {name: height for height, line in enumerate(reversed(lines)) for name in line}


LAYERS = layers()


def place(module: str) -> str:
    """The name that stands for a module on the page: its own, or that of its package."""
    while module and module not in LAYERS:
        module = module.rpartition(".")[0]
    return module


def test_every_module_has_its_layer_and_every_name_its_module():
    homeless = [name for name in MODULES if name and not place(name)]
    assert not homeless, f"not in docs/architecture.md: {homeless}"
    assert not LAYERS.keys() - {place(name) for name in MODULES}


def test_imports_run_down():
    up = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if place(other) != place(name) and LAYERS[place(other)] >= LAYERS[place(name)]
    ]
    assert not up, up
    assert not imports(""), "the package itself imports nothing"


def test_no_circle_of_imports():
    """Python runs the __init__ of every package on the way to a module, so it counts too."""
    graph = {}
    for name in MODULES:
        graph[name] = imports(name)
        for other in imports(name):
            parents = [other[:i] for i, letter in enumerate(other) if letter == "."]
            graph[name] |= {each for each in parents if not f"{name}.".startswith(f"{each}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
