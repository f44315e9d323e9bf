"""Eight simulated CPU devices for every test, and one compile cache; before jax is imported.

`scripts/test.sh --fast` leaves out what is marked slow: the tests of the files of SLOW, and those
that carry the mark. `-m oldest` is what also runs on the oldest Python and jax.
"""

import gc
import os
import tempfile
from pathlib import Path

import pytest

# Unoptimized machine code: the same HLO, compiled in half the time. So have processes that tests
# start, but those of test_devices, which have the code that users run. Devices that wait for one
# another end the process after five minutes, not thirty.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300"
)
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process they serve
    _cache = tempfile.TemporaryDirectory(prefix="jaxlm-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["XDG_CACHE_HOME"] = _cache.name  # of the planner
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxlm import devices  # noqa: E402  (jax reads the environment)

# The number again, as a run asks for it: jax refuses another once the devices are in use.
devices.simulate(8)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small dataset, bytes as tokens."""
    import tiny

    return tiny.make_data(tmp_path_factory.mktemp("data") / "tokens")


# Files whose tests compile steps of a model or start runs, the longest first: every worker takes a
# file at a time, and none is left with a long one when the others are done.
SLOW = (
    "verify every_layout islands private_runs privacy apart pipeline moe context run train parity "
    "layouts gemma generate optim merger plan_islands "
    "records attention tokenizer_files walk audit devices checkpoint qwen plan shared round_trip "
    "compile evaluate families hlo interop liveness overflow plan_memory"
).split()
# Of these, what on an older jax may fail or compute something else: its transformations in every
# kind of parallelism, rules of optimizers, and numbers against an oracle. Single tests carry the
# mark themselves.
OLDEST = {"attention", "every_layout", "optim", "parity"}


def pytest_collection_finish():
    """Python looks for garbage less often: what was imported is kept, and tracing makes little."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def name_of(item) -> str:
    return Path(item.path).stem.removeprefix("test_")


def pytest_collection_modifyitems(items):
    """Order and mark tests by their file."""
    rank = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(name_of(item), len(rank)))
    for item in items:
        name = name_of(item)
        if name in SLOW:
            item.add_marker("slow")
        if name not in SLOW or name in OLDEST:
            item.add_marker("oldest")
