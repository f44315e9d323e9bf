"""What README and docs name is there: files, links, commands with their options, config keys."""

import re
import shlex
from pathlib import Path

import pytest

from jaxlm.cli import make_parser
from jaxlm.config import AXES, DIMS, FAMILIES
from jaxlm.configfile import schema, sections, tables

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
KEYS = schema(*FAMILIES).keys() | set(sections()) | set(tables()) | {"include"}
ITEMS = {f"mesh.dcn.{axis}" for axis in AXES}
ITEMS |= {f"{table}.{dim}" for table in ("rules", "storage") for dim in DIMS}


def commands(page: Path) -> list[str]:
    """The lines of shell blocks that call jaxlm, without their comments."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("jaxlm ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_parsed(page):
    for command in commands(page):
        words = [word for word in shlex.split(command)[1:] if word != "..."]
        overrides = [w for w in words if re.fullmatch(r"[a-z_.0-9]+=.*", w)]
        try:
            args, rest = make_parser().parse_known_args(words)
        except SystemExit as error:
            raise AssertionError(f"{page.name}: {command}: no such command or option") from error
        assert callable(args.run), command
        wrong = [word for word in rest if word not in overrides]
        assert not wrong, f"{page.name}: {command}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_files_and_links_are_there(page):
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + commands(page)
    words = [word for each in code for word in shlex.split(each.replace("'", " "))]
    for word in words:
        if match := re.fullmatch(r"([a-z_]+(?:\.[a-z_0-9]+)+)(=.*)?", word):
            key = match[1]
            if match[2] or key.partition(".")[0] in sections():
                known = key in KEYS or key in ITEMS or key == "key.sub" or (ROOT / key).exists()
                assert known or key.endswith((".py", ".yaml")), f"{page.name}: {key}"
        if re.fullmatch(r"(jaxlm|tests|configs|scripts|benchmarks|docs)/[\w/.-]*\.\w+", word):
            assert (ROOT / word).exists(), f"{page.name}: {word}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
