"""Validation loss on tinyshakespeare in nanoGPT's CPU setting, mean over three seeds.

    python benchmarks/tinyshakespeare.py input.txt        # prints one line a seed, then the mean

input.txt is the 1,115,394 characters of tinyshakespeare. The loss is over the whole validation
split (the last tenth), in windows of 64. nanoGPT publishes 1.88 for this setting,
there with learning rate 1e-3 (here 4e-3) and over random windows.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PUBLISHED = 1.88
CONFIG = Path(__file__).parent.parent / "configs" / "tinyshakespeare.yaml"


def jaxlm(*arguments: object) -> None:
    """Run a jaxlm command, quietly."""
    command = [sys.executable, "-m", "jaxlm", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def validation_loss(data: Path, run_dir: Path, seed: int) -> float:
    """Train with one seed; the loss of the last evaluation."""
    jaxlm("train", CONFIG, f"data.path={data}", f"run.dir={run_dir}", f"seed={seed}")
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [r["eval/loss"] for r in records if "eval/loss" in r][-1]


def main() -> int:
    """Exit 0 if the mean is at most the published loss."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        cut = ["--split-within", "--validation-fraction", "0.1"]
        jaxlm("data", "prepare", "--out", data, "--tokenizer", "characters", *cut, sys.argv[1])
        losses = []
        for seed in (0, 1, 2):
            losses.append(validation_loss(data, Path(scratch) / str(seed), seed))
            print(f"seed {seed}: {losses[-1]:.4f}", flush=True)
    mean = sum(losses) / len(losses)
    print(f"mean {mean:.4f}, published {PUBLISHED}")
    return int(mean > PUBLISHED)


if __name__ == "__main__":
    raise SystemExit(main())
