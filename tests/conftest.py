"""Eight simulated CPU devices for every test, and one compile cache; before jax is imported.

Also which tests are the fast tier (`scripts/test.sh --fast`): those of FAST, files that compile no
step of a model and start no run.
"""

import os
import tempfile

import pytest

# Unoptimized machine code: the same HLO, compiled in half the time. Runs in processes of their own
# (tests/tiny.py) have the code that users run.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process they serve
    _cache = tempfile.TemporaryDirectory(prefix="jaxlm-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["XDG_CACHE_HOME"] = _cache.name  # of the planner
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402  (it reads the environment)

# The number again, as the planner asks for it: jax refuses another once the devices are in use.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small dataset, bytes as tokens."""
    import tiny

    return tiny.make_data(tmp_path_factory.mktemp("data") / "tokens")
