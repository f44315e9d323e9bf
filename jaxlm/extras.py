"""Optional packages: the one place that says how to install what a feature needs."""

from __future__ import annotations

import importlib
import shlex
from types import ModuleType

from jaxlm.config import UserError

# Feature -> packages, as the extra of this name in pyproject.toml. Messages name the packages and
# not the extra: that works from a clone and from an installed copy, and jaxlm is on no index.
EXTRAS = {
    "plan-tpu": ("libtpu",),
    "plan-gpu": ("jax-cuda12-plugin", "jax-cuda12-pjrt"),
    "parquet": ("pyarrow>=15",),
    "tensorboard": ("tensorboardX>=2.6",),
    "wandb": ("wandb>=0.18",),
    "privacy": ("dp-accounting>=0.5",),
    "store": ("obstore>=0.6",),
    "sign": ("cryptography>=42",),
}


def install(extra: str) -> str:
    """The command that installs the packages of an extra: "pip install libtpu"."""
    return shlex.join(["pip", "install", *EXTRAS[extra]])


def load(module: str, extra: str, wanted_by: str) -> ModuleType:
    """Import an optional package, or a module of it.

    Raises UserError, which begins with `wanted_by`: how to install a package that is absent; the
    reason where it is there and cannot be imported, such as a library that it lacks.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UserError(f"{wanted_by} needs {package}: {install(extra)}") from error
        raise UserError(
            f"{wanted_by}: {package} is installed and fails to import: "
            f"{type(error).__name__}: {error}"
        ) from error
