"""Calibrate on five runs of this machine's CPU, and predict five others.

    python benchmarks/calibration.py DIR

Runs are of the quickstart's corpus, 16 steps each, on simulated devices; they go to DIR, and what
is there is not run again. Step times: the median that `train` measured, against the traced step
with the efficiencies fitted to the first five. Memory: what the compiler assigned (CPU devices keep
no count), against the trace. Run it on an idle machine: it takes a few minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import calibrate, compiled, cost, estimate, roofline

WIDE = ["model.embed_dim=256", "model.num_heads=8", "model.num_kv_heads=4", "model.mlp_dim=704"]
LONG = ["batch.sequence_length=256", "batch.sequences=8"]
FITTED = {  # name -> devices, overrides
    "one": (1, []),
    "data": (4, ["mesh.data=4"]),
    "fsdp, wide": (8, [*WIDE, "mesh.data=1", "mesh.fsdp=8"]),
    "tensor": (4, ["mesh.data=2", "mesh.tensor=2", "remat.policy=full"]),
    "deep, long": (2, [*LONG, "model.num_layers=8", "mesh.data=1", "mesh.fsdp=2"]),
}
PREDICTED = {
    "wide": (1, WIDE),
    "fsdp": (4, ["mesh.data=1", "mesh.fsdp=4", "remat.policy=full"]),
    "wide, long": (2, [*WIDE, *LONG, "mesh.data=2"]),
    "fsdp x tensor": (8, [*WIDE, "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"]),
    "deep, microbatches": (2, ["model.num_layers=8", "batch.microbatches=2", "mesh.data=2"]),
}
SHORT = ["steps=16", "eval.every=0", "eval.batches=1", "sample.every=0", "checkpoint.every=0"]
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main() -> None:
    out = Path(sys.argv[1])
    for name, (devices, overrides) in (FITTED | PREDICTED).items():
        if not (out / name / "metrics.jsonl").exists():
            command = [sys.executable, "-m", "jaxlm", "train", str(QUICKSTART), *SHORT, *overrides]
            run = [f"devices.simulate={devices}", f"run.dir={out / name}"]
            subprocess.run([*command, *run], check=True, stdout=subprocess.DEVNULL)
    load = lambda name: configfile.load(out / name / "config.yaml", [f"plan.cache={out / 'cache'}"])
    calibrate.calibrate([(str(out / name), load(name)) for name in FITTED])
    print("| run | measured, ms | predicted | compiled, MB | predicted |")
    print("|---|---|---|---|---|")
    for name, (devices, _) in (FITTED | PREDICTED).items():
        config, target = load(name), parse_target(f"cpu:{devices}")
        guess = estimate.of_config(config, target)
        seconds = calibrate.read_measurement(out / name)[calibrate.MEASURED]
        peak = cost.from_json(compiled.measure(config, target)["cost"]).peak
        shown = f"{guess.time.seconds * 1e3:.0f} ({guess.time.seconds / seconds - 1:+.0%})"
        memory = f"{guess.cost.peak / 1e6:.0f} ({guess.cost.peak / peak - 1:+.0%})"
        label = name if name in PREDICTED else f"{name} (fitted)"
        print(
            f"| {label} | {seconds * 1e3:.0f} | {shown} | {peak / 1e6:.0f} | {memory} |", flush=True
        )
    known = roofline.load(out / "cache" / "efficiencies.json")
    print(json.dumps({kind: {n: e.value for n, e in rows.items()} for kind, rows in known.items()}))


if __name__ == "__main__":
    main()
