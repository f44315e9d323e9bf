"""Messages about optional packages against what pyproject.toml declares."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from jaxlm import extras

ROOT = Path(__file__).parent.parent
TEXTS = (".py", ".md", ".sh", ".sbatch", ".yaml")


def test_messages_install_what_the_extras_declare():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, packages in extras.EXTRAS.items():
        assert list(packages) == declared["optional-dependencies"][name]
        words = extras.install(name).split()
        assert words[:2] == ["pip", "install"]
        assert [Requirement(word.strip("'")).name for word in words[2:]] == [
            Requirement(package).name for package in packages
        ]


def test_nothing_advises_a_distribution_that_is_not_published():
    """`pip install jaxlm` fails, or installs a stranger's package; extras.py makes all advice."""
    folders = [ROOT / name for name in ("jaxlm", "scripts", "tests", "benchmarks", "configs")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in TEXTS]
    files += ROOT.glob("*.md")
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not re.search(r"pip install\s+(-\w+\s+)*['\"]?jaxlm\b", text), path
        if ROOT / "jaxlm" in path.parents and path.name != "extras.py":
            assert "pip install" not in text, path
