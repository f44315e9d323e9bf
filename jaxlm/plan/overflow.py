"""A train step that its compiler refuses, because a device has too little memory for it.

libtpu stops where the scheduled program needs more than there is. Its message has the sum alone,
but the schedule that it gave up on can be dumped: that is read as a compiled program is.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Written as Compiled.as_text writes it.
DUMP: dict[str, str | bool] = {
    "xla_dump_hlo_as_text": True, "xla_syntax_sugar_async_ops": True, "xla_dump_compact_gte": False,
}  # fmt: skip
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)"
# What the versions of libtpu say: (needed, available); of two needs the sum.
MESSAGES = (
    rf"temporaries \({_SIZE}B?\) exceeds available HBM \({_SIZE}B?\)",
    rf"memory space hbm\. Used {_SIZE}B? of {_SIZE}B? hbm",
    rf"TensorCore Hbm usage: {_SIZE}B?, SparseCore Hbm usage:? {_SIZE}B?, "
    rf"exceeding available bytes: {_SIZE}B?",
    rf"enough device memory\. Requires {_SIZE}B?, has {_SIZE}B? available",
)


class Refusal(NamedTuple):
    """What the compiler says of a program that does not fit; bytes of one device."""

    needed_bytes: float
    available_bytes: float
    message: str  # its words, in one line


class Memory(NamedTuple):
    """Stands in for `compiled.memory_analysis()`, which a refused program does not have."""

    peak_memory_in_bytes: float
    temp_size_in_bytes: float
    argument_size_in_bytes: float = 0.0
    output_size_in_bytes: float = 0.0
    alias_size_in_bytes: float = 0.0
    generated_code_size_in_bytes: float = 0.0


def read_message(message: str) -> Refusal | None:
    """The refusal in a compiler's message; None where it is about anything else, as VMEM."""
    words = " ".join(message.split())
    for pattern in MESSAGES:
        if found := re.search(pattern, words):
            parts = found.groups()
            amounts = [
                float(number) * UNITS[unit]
                for number, unit in zip(parts[::2], parts[1::2], strict=True)
            ]
            return Refusal(sum(amounts[:-1]), amounts[-1], words)
    return None


def explain(lowered: jax.stages.Lowered, error: RuntimeError) -> tuple[Refusal, Memory, str]:
    """The refusal, its memory, and the text of the program that was refused (empty: none is left).

    Compiles once more, with a dump. Raises the error where it is not about a device's memory.
    """
    refusal = read_message(str(error))
    if refusal is None:
        raise error
    with tempfile.TemporaryDirectory(prefix="jaxlm-plan-") as folder:
        options: dict[str, Any] = DUMP | {"xla_dump_to": folder}
        try:
            lowered.compile(options)
        except jax.errors.JaxRuntimeError:
            pass  # as before
        found = sorted(Path(folder).glob("*after_optimizations.txt"))
        text = found[-1].read_text() if found else ""
    return refusal, Memory(refusal.needed_bytes, refusal.needed_bytes), text
