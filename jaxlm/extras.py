"""Optional packages: the one place that says how to install what a feature needs."""

from __future__ import annotations

import shlex

# Feature -> packages, as the extra of this name in pyproject.toml. Messages name the packages and
# not the extra: that works from a clone and from an installed copy, and jaxlm is on no index.
EXTRAS = {
    "plan-tpu": ("libtpu",),
    "plan-gpu": ("jax-cuda12-plugin", "jax-cuda12-pjrt"),
    "parquet": ("pyarrow>=15",),
    "tensorboard": ("tensorboardX>=2.6",),
    "wandb": ("wandb>=0.18",),
}


def install(extra: str) -> str:
    """The command that installs the packages of an extra: "pip install libtpu"."""
    return shlex.join(["pip", "install", *EXTRAS[extra]])
