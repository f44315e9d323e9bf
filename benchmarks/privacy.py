"""What privacy costs: the step of DP-SGD against the ordinary step, memory and time.

    python benchmarks/privacy.py [NAME ...]

Both steps are compiled for hardware that is not here. Needs the extras plan-tpu and plan-gpu;
minutes for each row. A NAME picks rows whose title holds it.
"""

import sys
from pathlib import Path

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import plan

CONFIGS = Path(__file__).parent.parent / "configs"
PRIVATE = ["privacy.clip_norm=1", "privacy.noise_multiplier=1"]
WIDE = [  # 136 M parameters
    "model.num_layers=6", "model.embed_dim=1024", "model.num_heads=8", "model.num_kv_heads=4",
    "model.head_dim=128", "model.mlp_dim=2816", "model.vocab_size=32000", "batch.sequences=32",
    "batch.sequence_length=1024", "precision.compute=bfloat16", "loss.chunks=4", "mesh.fsdp=8",
    "mesh.tensor=1",
]  # fmt: skip
TENSOR = ["mesh.fsdp=4", "mesh.tensor=2"]
TPU, GPU = "v5e:2x4", "h100:1x8"
ROWS = {  # name -> config, target, overrides
    "TPU, tied, full": ("layouts/fsdp", TPU, [*WIDE, "remat.policy=full"]),
    "TPU, tied, none": ("layouts/fsdp", TPU, [*WIDE, "remat.policy=none"]),
    "TPU, untied, fsdp x tensor": (
        "layouts/tensor", TPU, [*WIDE, *TENSOR, "model.tie_embeddings=false", "remat.policy=full"],
    ),
    "GPU, tied, full": ("layouts/fsdp", GPU, [*WIDE, "remat.policy=full"]),
    "GPU, tied, none": ("layouts/fsdp", GPU, [*WIDE, "remat.policy=none"]),
    "GPU, untied, fsdp x tensor": (
        "layouts/tensor", GPU, [*WIDE, *TENSOR, "model.tie_embeddings=false", "remat.policy=full"],
    ),
    "GPU, Llama-3-8B": ("llama3-8b", GPU, ["batch.sequences=16"]),
}  # fmt: skip


def main() -> None:
    print("| row | target | peak GB: ordinary, private | compiled time | traced time |")
    print("|---|---|---|---|---|")
    for name, (config_name, target, overrides) in ROWS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        path = CONFIGS / f"{config_name}.yaml"
        configs = [configfile.load(path, [*overrides, *more]) for more in ([], PRIVATE)]
        compiled, traced = (
            [plan.make_plan(config, parse_target(target), analytic) for config in configs]
            for analytic in (False, True)
        )
        peaks = [one.cost.peak / 1e9 for one in compiled]
        times = [pair[1].time.seconds / pair[0].time.seconds for pair in (compiled, traced)]
        print(
            f"| {name} | {target} | {peaks[0]:.2f}, {peaks[1]:.2f} ({peaks[1] / peaks[0]:.2f}) "
            f"| {compiled[1].time.seconds * 1e3:.1f} ms ({times[0]:.2f}) | {times[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
