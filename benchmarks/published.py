"""Three published results of MaxText against plans of the same model, batch, mesh and remat here.

    python benchmarks/published.py [NAME ...]

Published: MaxText's table of tuned models (maxtext.readthedocs.io, reference/models/tiering); batch
and remat: its scripts (configs/v5p/llama2_70b.sh, benchmarks/maxtext_trillium_model_configs.py). No
constant of the planner is fitted to these. Needs the extra plan-tpu; minutes for each row.
"""

import sys
from pathlib import Path

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import plan

LLAMA2_70B = [
    "mesh.fsdp=256", "mesh.tensor=1", "batch.sequence_length=4096", "model.vocab_size=32000",
    "model.rope_theta=10000", "loss.chunks=8",
]  # fmt: skip
SAME = ["precision.reduce=bfloat16", "data.segments=false", "remat.policy=names"]
QKV, ALL = "[query,key,value]", "[query,key,value,attention]"
ROWS = {  # name -> config, target, published tokens/s/chip, overrides
    # save_dot_except_mlpwi, 4 sequences a chip
    "Llama2-70B v5p": (
        "llama3-70b", "v5p:4x8x8", 692,
        [*LLAMA2_70B, "batch.sequences=1024", f"remat.names={ALL}"],
    ),
    # query, key, value and the attention's output in host memory, 4 sequences a chip
    "Llama3.1-8B v6e": (
        "llama3-8b", "v6e:16x16", 7207,
        ["mesh.fsdp=256", "batch.sequences=1024", f"remat.names={ALL}", f"remat.offload={ALL}"],
    ),
    # qkv_proj_offloaded, 3 sequences a chip
    "Llama2-70B v6e": (
        "llama3-70b", "v6e:16x16", 900,
        [*LLAMA2_70B, "batch.sequences=768", f"remat.names={QKV}", f"remat.offload={QKV}"],
    ),
}  # fmt: skip


def main() -> None:
    print("| point | published, tokens/s/chip | compiled | traced | peak GB, compiled, traced |")
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or ROWS:
        config_name, target, published, overrides = ROWS[name]
        path = Path(__file__).parent.parent / "configs" / f"{config_name}.yaml"
        config = configfile.load(path, [*SAME, *overrides])
        made = [
            plan.make_plan(config, parse_target(target), analytic) for analytic in (False, True)
        ]
        rates = [one.tokens / one.time.seconds / one.target.chips for one in made]
        shown = " | ".join(f"{rate:,.0f} ({rate / published - 1:+.1%})" for rate in rates)
        peaks = ", ".join(f"{one.cost.peak / 1e9:.1f}" for one in made)
        print(f"| {name} | {published:,} | {shown} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
