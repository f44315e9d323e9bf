"""The peak of memory by the trace of a step against the compilers', on three platforms.

    python benchmarks/memory.py [NAME ...]

Compiles every row in a process of its own, minutes altogether on CPU and an hour on all three; a
NAME picks rows whose title holds it. Needs the extras plan-tpu and plan-gpu. Rows that are not
`wider` say nothing on TPU: all that such a small step computes stays in on-chip memory there.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import estimate
from jaxlm.program import make_program, trace_train_step
from jaxlm.xla import compiler_peak

LAYOUTS = Path(__file__).parent.parent / "configs" / "layouts"
TARGETS = ("cpu:8", "v5e:2x4", "h100:1x8")
WIDER = [
    "model.num_layers=6", "model.embed_dim=1024", "model.num_heads=8", "model.num_kv_heads=4",
    "model.head_dim=128", "model.mlp_dim=2816", "model.vocab_size=32000",
    "model.tie_embeddings=false", "batch.sequences=32", "batch.sequence_length=1024",
    "precision.compute=bfloat16", "remat.policy=full", "loss.chunks=4",
]  # fmt: skip
GPT2 = ["model.family=gpt2", "model.num_kv_heads=8", "model.mlp_dim=4096"]
QWEN = ["model.family=qwen3_moe", "model.num_experts=16", "model.expert_mlp_dim=512"]
GEMMA = ["model.family=gemma", "model.tie_embeddings=true", "model.sliding_window=256"]
GEMMA += ["model.locals_per_global=2"]
QWEN2 = ["model.family=qwen", "model.qk_norm=false", "model.qkv_biases=true"]
VARIANTS = {  # of the wider model: name -> layout, overrides
    "wider fsdp": ("fsdp", []),
    "wider fsdp, remat none": ("fsdp", ["remat.policy=none"]),
    "wider fsdp, remat dots": ("fsdp", ["remat.policy=dots"]),
    "wider fsdp, remat names": ("fsdp", ["remat.policy=names", "remat.names=[attention,mlp]"]),
    "wider fsdp, head whole": ("fsdp", ["loss.chunks=1"]),
    "wider fsdp, 4 microbatches": ("fsdp", ["batch.microbatches=4"]),
    "wider fsdp, sums in bfloat16": ("fsdp", ["precision.reduce=bfloat16"]),
    "wider fsdp, 2048 tokens": ("fsdp", ["batch.sequence_length=2048"]),
    "wider fsdp, adafactor": ("fsdp", ["optimizer.name=adafactor"]),
    "wider fsdp, lion": ("fsdp", ["optimizer.name=lion"]),
    "wider fsdp, muon": ("fsdp", ["optimizer.name=muon"]),
    "wider data": ("data", []),
    "wider hsdp": ("hsdp", []),
    "wider zero2": ("zero2", []),
    "wider multislice": ("multislice", []),
    "wider tensor": ("tensor", []),
    "wider context": ("context", []),
    "wider context, all_gather": ("context", ["attention.context=all_gather"]),
    "wider context, all_to_all": ("context", ["attention.context=all_to_all"]),
    "wider pipeline": ("pipeline", []),
    "wider pipeline, remat none": ("pipeline", ["remat.policy=none"]),
    "wider pipeline, 3 repeats": ("pipeline", ["pipeline.repeats=3"]),
    "wider everything": ("everything", []),
    "wider expert": ("expert", ["model.expert_mlp_dim=1408"]),
    "wider expert, qwen3_moe": ("expert", [*QWEN, "model.experts_per_token=4"]),
    "wider fsdp, gpt2": ("fsdp", GPT2),
    "wider fsdp, gemma": ("fsdp", GEMMA),
    "wider tensor, gemma, remat dots": ("tensor", [*GEMMA, "remat.policy=dots"]),
    "wider pipeline, gemma": ("pipeline", GEMMA),
    "wider fsdp, qwen": ("fsdp", ["model.family=qwen"]),
    "wider hsdp, qwen, remat none": ("hsdp", ["model.family=qwen", "remat.policy=none"]),
    "wider context, qwen2": ("context", QWEN2),
}
# Islands run the step of another layout on each, and merges (benchmarks/README.md).
NAMES = sorted({path.stem for path in LAYOUTS.glob("*.yaml")} - {"islands"})
ROWS = {name: (name, []) for name in NAMES} | {
    name: (layout, [*WIDER, *more]) for name, (layout, more) in VARIANTS.items()
}


def measure(layout: str, target: str, overrides: list[str]) -> dict:
    """Both peaks, and the classes by the trace, of one row."""
    config = configfile.load(LAYOUTS / f"{layout}.yaml", overrides)
    hardware = parse_target(target)
    program = make_program(config, hardware.devices())
    found = trace_train_step(config, program).lower().compile().memory_analysis()
    assert found is not None
    return {
        "compiled": compiler_peak(found)[0],
        "trace": estimate.of_config(config, hardware).cost.memory,
    }


def show(name: str, target: str) -> float:
    """Print one row of the table; the ratio, or nan where the compiler failed."""
    layout, overrides = ROWS[name]
    command = [sys.executable, __file__, "--measure", layout, target, *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
        print(f"| {name} | {target} | failed: {why} | | |", flush=True)
        return float("nan")
    row = json.loads(done.stdout.splitlines()[-1])
    got = sum(row["trace"].values())
    largest = sorted(row["trace"].items(), key=lambda item: -item[1])[:4]
    classes = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in largest)
    ratio = got / row["compiled"]
    print(
        f"| {name} | {target} | {row['compiled'] / 1e6:.1f} | {got / 1e6:.1f} | {ratio:.2f} "
        f"| {classes} |",
        flush=True,
    )
    return ratio


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4:])))
        return
    chosen = [name for name in ROWS if not sys.argv[1:] or any(a in name for a in sys.argv[1:])]
    print("| configuration | target | compiled, MB | trace, MB | ratio | largest classes |")
    print("|---|---|---|---|---|---|")
    ratios = [show(name, target) for target, name in itertools.product(TARGETS, chosen)]
    close = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f"\n{close} of {len(ratios)} within 15 %")


if __name__ == "__main__":
    main()
