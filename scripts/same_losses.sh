#!/usr/bin/env bash
# Shows that the working tree computes the very losses of another commit, bit for bit, on this
# machine: scripts/same_losses.sh [COMMIT] (default HEAD~1). For refactors, which change no numbers.
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
commit=$(git rev-parse "${1:-HEAD~1}")
scratch=$(mktemp -d)
trap 'git worktree remove --force "$scratch/there"; rm -rf "$scratch"' EXIT
git worktree add --quiet --detach "$scratch/there" "$commit"
python=$PWD/$venv/bin/python here=$PWD
printf 'all work and no play makes a dull mesh\n%.0s' {1..200} > "$scratch/text.txt"
"$python" -m jaxlm data prepare --out "$scratch/data" --tokenizer bytes --split-within \
    --validation-fraction 0.2 "$scratch/text.txt" > "$scratch/log"
losses() { # TREE FAMILY MESH...
    local tree=$1 family=$2 run=$scratch/$RANDOM
    (cd "$tree" && PYTHONPATH=$tree "$python" -m jaxlm train "$here/tests/configs/$family.yaml" \
        run.dir="$run" data.path="$scratch/data" devices.simulate=8 "${@:3}") >> "$scratch/log" 2>&1 ||
        { tail -5 "$scratch/log" >&2; exit 1; }
    "$python" -c 'import json, sys
for line in open(sys.argv[1]):
    r = json.loads(line); print(r["step"], r.get("loss", r.get("eval/loss")), r.get("grad_norm"))' \
        "$run/metrics.jsonl"
}
while read -r family mesh; do
    # shellcheck disable=SC2086  # a mesh is several words
    losses "$here" "$family" $mesh > "$scratch/here.txt"
    losses "$scratch/there" "$family" $mesh > "$scratch/there.txt"
    cmp "$scratch/here.txt" "$scratch/there.txt" ||
        { echo "$family, $mesh: other losses than ${commit:0:9}"; exit 1; }
    echo "$family, $mesh: the losses of ${commit:0:9}"
done <<'RUNS'
llama mesh.data=2 mesh.fsdp=2 mesh.tensor=2
llama mesh.data=8
llama mesh.stage=2 mesh.data=2 mesh.tensor=2 batch.microbatches=4
llama mesh.context=2 mesh.fsdp=2 mesh.tensor=2
gpt2 mesh.data=2 mesh.fsdp=2 mesh.tensor=2
gpt2 mesh.data=8
gpt2 mesh.stage=2 mesh.context=2 mesh.fsdp=2
mixtral mesh.data=2 mesh.expert=2 mesh.tensor=2
mixtral mesh.stage=2 mesh.expert=2 mesh.context=2 remat.policy=full
qwen3_moe mesh.fsdp=2 mesh.expert=2 mesh.tensor=2 batch.microbatches=2
RUNS
