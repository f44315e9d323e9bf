"""Compile one real configuration per layout for hardware that is not there, and print a table.

    python benchmarks/layouts.py [NAME ...]

Peak memory is the compiler's, per device; collectives are their results, GiB per device and step.
Needs the extras plan-tpu and plan-gpu; minutes for each row.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

from jaxlm.hardware.chips import KINDS

ROWS = {  # name -> config, target, device kind, overrides
    "8B fsdp": ("llama3-8b", "v6e:4x4", "tpu v6", [
        "mesh.fsdp=16", "batch.sequences=64", "batch.microbatches=2",
    ]),
    "70B fsdp x tensor": ("llama3-70b", "v5p:8x8x8", "tpu v5", [
        "mesh.fsdp=128", "mesh.tensor=4", "batch.sequences=512", "batch.microbatches=2",
    ]),
    "8B context": ("llama3-8b", "h100:1x8", "h100", [
        "mesh.fsdp=1", "mesh.context=8", "batch.sequences=4", "batch.sequence_length=131072",
        "batch.microbatches=4", "loss.chunks=16",
    ]),
    "Mixtral-8x7B fsdp x expert": ("mixtral-8x7b", "v5p:4x4x8", "tpu v5", [
        "mesh.fsdp=16", "mesh.expert=8",
    ]),
    "405B stage x tensor x fsdp": ("llama3-405b", "h100:64x8", "h100", [
        "mesh.stage=2", "mesh.fsdp=32", "mesh.tensor=8", "batch.sequences=2048",
        "batch.microbatches=64",
    ]),
}  # fmt: skip


def compile_row(name: str) -> str:
    """One row of the table; the compiler runs in a process of its own."""
    config, target, kind, overrides = ROWS[name]
    path = Path(__file__).parent.parent / "configs" / f"{config}.yaml"
    command = [
        sys.executable,
        "-m",
        "jaxlm.plan.compiled",
        str(path),
        "--target",
        target,
        *overrides,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"| {name} | {target} | failed: {done.stderr.strip().splitlines()[-1][:200]} | | | |"
    report = json.loads(done.stdout.splitlines()[-1])
    total = collections.Counter()
    for row in report["collectives"]:
        total[f"{row['kind']} over {', '.join(row['axes'])}"] += row["step_bytes"]
    memory = next(facts.hbm_bytes for pattern, facts in KINDS if pattern in kind)
    shown = "; ".join(f"{what} {size / 2**30:.2f}" for what, size in total.most_common(5))
    return (
        f"| {name} | {target} | {' '.join(overrides)} "
        f"| {report['peak_bytes'] / 1e9:.1f} of {memory / 1e9:.0f} | {shown} "
        f"| {report['compile_seconds']:.0f} |"
    )


def main() -> None:
    print("| configuration | target | settings | peak, GB | collectives, GiB | compile, s |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ROWS:
        print(compile_row(name), flush=True)


if __name__ == "__main__":
    main()
