"""Compiled programs as test data: which they are, how their records are read and kept true.

`tests/data/hlo/` holds the text of each as its compiler gave it, what the compiler says of its
memory, and a list of what its trace computes; `record_hlo.py` writes them. Tests read claims off
the records, without a compiler; `test_records.py` checks that jaxlm still traces what was recorded,
and that today's compilers still do of one program for each platform what its record says.
"""

import functools
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
from known_programs import KNOWN, trace_known

from jaxlm import config as cfg
from jaxlm import configfile, xla
from jaxlm.hardware.target import Target, parse_target
from jaxlm.plan import compiled
from jaxlm.plan.overflow import Memory
from jaxlm.program import Program, make_program, trace_train_step

FOLDER = Path(__file__).parent / "data" / "hlo"
COMMAND = "python tests/record_hlo.py"
ROOT = Path(__file__).parent.parent
LLAMA = "tests/configs/llama.yaml"


class Source(NamedTuple):
    """What a record is compiled from: a train step, or one of known_programs.py."""

    target: str
    path: str  # of a config, from the root of the repository; or the name of a known program
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> cfg.Config:
        return configfile.load(ROOT / self.path, list(self.overrides))


class Record(NamedTuple):
    """A compiled program."""

    text: str
    memory: Memory  # by the compiler
    refusal: str  # the compiler's words, where the program does not fit the device; else empty
    warnings: list[str]  # of reshards that it cannot do without a full copy


# The layouts of test_compile.py: what each has to communicate.
UNTIED = "model.tie_embeddings=false"
LAYOUTS = {
    "one device": (1, []),
    "data": (8, ["mesh.data=8"]),
    "fsdp": (8, ["mesh.fsdp=8"]),
    "tensor": (2, ["mesh.tensor=2"]),
    "data x fsdp": (8, ["mesh.data=2", "mesh.fsdp=4"]),
    "fsdp x tensor": (8, ["mesh.fsdp=4", "mesh.tensor=2"]),
    "data x fsdp x tensor": (8, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    "data, 4 microbatches": (2, ["mesh.data=2", "batch.microbatches=4"]),
    "data x fsdp, 2 microbatches": (
        4, ["mesh.data=2", "mesh.fsdp=2", "batch.microbatches=2"],
    ),
    "gathered once a step": (
        4, ["mesh.data=2", "mesh.fsdp=2", "batch.microbatches=2", "gather_at=step"],
    ),
    **{
        f"data, {n} microbatches of 16": (
            2, ["mesh.data=2", "batch.sequences=16", f"batch.microbatches={n}"],
        )
        for n in (1, 2, 8)
    },
}  # fmt: skip
# Mid-size, so that the compilers choose as they do for real models; a layer has 17M weights.
MIDDLE = [
    "model.embed_dim=1024", "model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=128",
    "model.mlp_dim=4096", "model.vocab_size=4096", UNTIED,
    "batch.sequences=16", "batch.sequence_length=512", "precision.compute=bfloat16",
]  # fmt: skip
ABSENT = {
    "fsdp=8 on TPU": ("v5e:2x4", ["mesh.fsdp=8"]),
    "fsdp=4 x tensor=2 on TPU": ("v5e:2x4", ["mesh.fsdp=4", "mesh.tensor=2"]),
    "fsdp=8 on GPU": ("h100:1x8", ["mesh.fsdp=8"]),
    "fsdp=4 x tensor=2 on GPU": (
        "h100:1x8",
        ["mesh.fsdp=4", "mesh.tensor=2", "data.segments=false", "attention.backend=xla"],
    ),
    "2 hosts, 2 microbatches on GPU": (
        "h100:2x4", ["mesh.data=2", "mesh.fsdp=4", "batch.microbatches=2"],
    ),
    "2 hosts, bfloat16 sums on GPU": (
        "h100:2x4", ["mesh.data=2", "mesh.fsdp=4", "precision.reduce=bfloat16"],
    ),
    "a ring on TPU": ("v5e:2x4", ["mesh.context=4", "mesh.data=2"]),
    "a pipeline on TPU": ("v5e:2x4", ["mesh.stage=2", "mesh.data=4", "batch.microbatches=4"]),
}  # fmt: skip
# Those of test_liveness.py: large enough that the split of the peak says something.
SPLIT = [
    "model.num_layers=4", "model.embed_dim=256", "model.num_heads=8", "model.num_kv_heads=4",
    "model.head_dim=64", "model.mlp_dim=512", "model.vocab_size=4096",
    "batch.sequences=16", "batch.sequence_length=512",
]  # fmt: skip
FULL, NONE = "remat.policy=full", "remat.policy=none"
LARGE = ["batch.sequences=64", NONE]  # more than fits into a TPU's VMEM
STAGES = ["mesh.stage=2", "mesh.fsdp=4", "batch.microbatches=4"]
SPLITS = {
    "split, fsdp, full": ("cpu:8", ["mesh.fsdp=8", FULL]),
    "split, data x tensor, none": ("cpu:8", ["mesh.data=4", "mesh.tensor=2", NONE]),
    "split, microbatches, gathered once": (
        "cpu:8", ["mesh.fsdp=8", "batch.microbatches=2", "gather_at=step", FULL],
    ),
    "split, fsdp x tensor on TPU": ("v5e:2x4", [*LARGE, "mesh.fsdp=4", "mesh.tensor=2"]),
    "split, stages on TPU": ("v5e:2x4", [*LARGE, *STAGES]),
    "split, fsdp x tensor on GPU": ("h100:1x8", [*LARGE, "mesh.fsdp=4", "mesh.tensor=2"]),
    "split, stages on GPU": ("h100:1x8", [*LARGE, *STAGES]),
}  # fmt: skip
# Those of test_plan_memory.py.
WIDER = [
    "model.embed_dim=256", "model.head_dim=64", "model.mlp_dim=704", "precision.compute=bfloat16",
]  # fmt: skip
PEAKS = {
    **{
        name: ("cpu:8", [])
        for name in ("data", "fsdp", "zero2", "tensor", "context", "pipeline", "expert")
    },
    "hsdp": ("cpu:8", [*WIDER, FULL, UNTIED]),
    "multislice": ("cpu:8", [*WIDER, "remat.policy=dots"]),
    "fsdp on TPU": ("v5e:2x4", []),
    "tensor on GPU": ("h100:1x8", []),
}
REFUSED = "refused on TPU"
TARGETS = ("cpu:8", "v5e:2x4", "h100:1x8")

SOURCES: dict[str, Source] = {
    **{
        name: Source(f"cpu:{devices}", LLAMA, (UNTIED, *overrides))
        for name, (devices, overrides) in LAYOUTS.items()
    },
    **{name: Source(to, LLAMA, (*MIDDLE, *more)) for name, (to, more) in ABSENT.items()},
    **{name: Source(to, LLAMA, (*SPLIT, *more)) for name, (to, more) in SPLITS.items()},
    **{
        f"layout {name}": Source(to, f"configs/layouts/{name.split()[0]}.yaml", tuple(more))
        for name, (to, more) in PEAKS.items()
    },
    REFUSED: Source(
        "v5e:2x4", LLAMA,
        ("mesh.fsdp=8", "batch.sequences=40000", "batch.sequence_length=256"),
    ),
    **{f"known {name}, {to}": Source(to, name) for to in TARGETS for name in KNOWN},
}  # fmt: skip


def is_known(source: Source) -> bool:
    """Whether it is a program of known_programs.py, and not a train step."""
    return source.path in KNOWN


def trace(source: Source, devices: list) -> jax.stages.Traced:
    """The program on shapes only."""
    if is_known(source):
        return trace_known(source.path, devices)
    return trace_train_step(source.config, make_program(source.config, devices))


def devices(target: Target) -> list:
    """What the compiler of a target compiles for; of CPUs the first of all that there are."""
    return jax.devices()[: target.size] if target.platform == "cpu" else target.devices()


@functools.cache
def program(name: str) -> Program:
    """The train step of a record, its mesh and layout, without its devices."""
    source = SOURCES[name]
    return make_program(source.config, parse_target(source.target).absent_devices())


def path(name: str, suffix: str, folder: Path = FOLDER) -> Path:
    """A file of a record."""
    stem = name.replace(", ", "-").replace(" ", "-").replace(":", "-").replace("=", "")
    return folder / f"{stem}.{suffix}.xz"


def read_text(name: str, suffix: str, folder: Path = FOLDER) -> str:
    """A file of a record, unpacked."""
    return lzma.decompress(path(name, suffix, folder).read_bytes()).decode()


def read_manifest(folder: Path = FOLDER) -> dict:
    """Record -> its source, date, versions and the numbers of its compiler."""
    file = folder / "manifest.json"
    return json.loads(file.read_text()) if file.exists() else {}


@functools.cache
def record(name: str, folder: Path = FOLDER) -> Record:
    """A compiled program as it was recorded."""
    row = read_manifest(folder)[name]
    memory, text = Memory(**row["memory"]), read_text(name, "hlo", folder)
    return Record(text, memory, row["refusal"], row["warnings"])


@functools.cache
def module(name: str, folder: Path = FOLDER) -> xla.Module:
    """The text of a record as data."""
    return xla.parse(record(name, folder).text)


@functools.cache
def report(name: str, folder: Path = FOLDER) -> dict:
    """What the planner reads off a recorded train step: compiled.py."""
    source, found = SOURCES[name], record(name, folder)
    target = parse_target(source.target)
    return compiled.read(source.config, program(name), target, found.memory, found.text)


def describe_trace(source: Source) -> list[str]:
    """What a program computes: how often which primitive makes which arrays of which.

    Names and order of the lines of its source are not in it, so that moving code changes nothing.
    """
    traced = trace(source, parse_target(source.target).absent_devices())
    found: Counter = Counter()
    _count(traced.jaxpr.jaxpr, 1, found)
    donated = sum(leaf.donated for leaf in jax.tree.leaves(traced.args_info))
    return [f"donated {donated}", *sorted(f"{line} {times}" for line, times in found.items())]


def _count(jaxpr, times: int, found: Counter) -> None:
    for each in jaxpr.eqns:
        inner = [_open(value) for value in each.params.values()]
        inner = [one for part in inner for one in part]
        if each.primitive.name not in ("jit", "pjit", "closed_call", "core_call"):
            kinds = [" ".join(str(v.aval) for v in vs) for vs in (each.invars, each.outvars)]
            found[f"{each.primitive.name} {kinds[0]} -> {kinds[1]}"] += times
        for one in inner:
            _count(one, times * each.params.get("length", 1), found)


def _open(value) -> list:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [one for part in value for one in _open(part)]
    jaxpr = getattr(value, "jaxpr", value)
    return [jaxpr] if hasattr(jaxpr, "eqns") else []
