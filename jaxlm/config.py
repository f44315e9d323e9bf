"""A run as data: frozen dataclasses, one documented field per key, loaded from YAML.

Every field carries its meaning with its unit, its legal values, and what changing it alters:
  recompiles   the train step is compiled anew
  checkpoint   a checkpoint written before the change cannot be restored
  numbers      losses change (beyond rounding)
  data         the order or content of the sample stream changes
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxlm.keys import REQUIRED, UserError, check_text, key, section
from jaxlm.keys_outer import Outer, Privacy

__all__ = ["REQUIRED", "UserError", "check_text", "key", "section"]  # keys.py's, by this name too

AXES = ("replica", "stage", "data", "fsdp", "context", "expert", "tensor")
# Array dimensions that `rules` and `storage` may name; see sharding.py for their default axes.
DIMS = (
    "batch", "seq", "residual_seq", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab",
    "experts", "layers", "parts", "norm", "positions", "cache_batch", "cache_seq", "cache_kv_heads",
)  # fmt: skip
# Default axes of each dimension, in use (RULES) and further ones at rest (STORAGE, less those that
# the same weight already uses); a dimension that is not listed is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "seq": ("context",),
    "residual_seq": ("context", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor", "stage"),
    "experts": ("expert",),
    "layers": ("stage",),
    "cache_batch": ("replica", "data", "fsdp", "expert"),
    "cache_kv_heads": ("tensor",),
}
STORAGE: dict[str, tuple[str, ...]] = {"embed": ("fsdp", "context", "expert")}
MODELS = Path(__file__).parent / "models"
SHARED = ("__init__", "config_json", "decoder", "experts", "layers", "moe")  # of those, no families
FAMILIES = tuple(sorted(file.stem for file in MODELS.glob("*.py") if file.stem not in SHARED))


@section
class Run:
    """Where a run keeps everything it writes."""

    dir: str = key("", "run directory; empty: runs/<name>", path=True)


@section
class Devices:
    """Which devices, and how the processes of a multi-host run find each other."""

    simulate: int = key(
        0, "CPU devices per process to simulate; 0: the real ones", minimum=0, maximum=4096
    )
    coordinator: str = key("", "host:port of process 0; empty: from Slurm, Cloud TPU or Open MPI")
    num_processes: int = key(0, "processes in the job; 0: from the launcher", minimum=0)
    process_id: int = key(0, "index of this process, with devices.coordinator", minimum=0)


@section
class Mesh:
    """Devices along each mesh axis; one axis may be -1 and takes the devices that are left.

    `mesh: auto` leaves the choice to the planner.
    """

    replica: int = key(1, "copies whose parameters may differ (local SGD)", changes="recompiles")
    stage: int = key(1, "pipeline stages", changes="recompiles")
    data: int = key(1, "data parallel: parameters replicated", changes="recompiles")
    fsdp: int = key(1, "data parallel: parameters sharded at rest", changes="recompiles")
    context: int = key(1, "the sequence is split over these devices", changes="recompiles")
    expert: int = key(1, "experts are split over these devices", changes="recompiles")
    tensor: int = key(1, "heads, mlp and vocabulary are split", changes="recompiles")
    dcn: dict[str, int] = key(
        {},
        "axis -> its factor that runs across slices or hosts, e.g. {data: 4}; divides that axis",
        changes="recompiles",
    )
    auto: bool = key(
        False, "the planner chooses the axes for the devices that are there; written mesh: auto",
        changes="recompiles",
    )  # fmt: skip


@section
class Model:
    """Dimensions that every family has; a family's own keys are in jaxlm/models/<family>.py."""

    family: str = key(REQUIRED, "model family", choices=FAMILIES, changes="recompiles checkpoint")
    num_layers: int = key(
        REQUIRED, "decoder blocks", minimum=1, changes="recompiles checkpoint numbers"
    )
    embed_dim: int = key(
        REQUIRED, "width of the residual stream", minimum=1,
        changes="recompiles checkpoint numbers", dim="embed norm",
    )  # fmt: skip
    num_heads: int = key(
        REQUIRED, "query heads", minimum=1, changes="recompiles checkpoint numbers"
    )
    num_kv_heads: int = key(
        REQUIRED,
        "key/value heads; num_heads is a multiple of it",
        minimum=1,
        changes="recompiles checkpoint numbers",
    )
    head_dim: int = key(
        REQUIRED, "width of one head", minimum=1, changes="recompiles checkpoint numbers",
        dim="head_dim",
    )  # fmt: skip
    mlp_dim: int = key(
        REQUIRED, "hidden width of the MLP", minimum=1, changes="recompiles checkpoint numbers",
        dim="mlp",
    )  # fmt: skip
    vocab_size: int = key(
        REQUIRED, "tokens in the vocabulary", minimum=2, changes="recompiles checkpoint numbers"
    )
    vocab_multiple: int = key(
        128,
        "the embedding is padded to a multiple of this; padding is never sampled or exported",
        minimum=1,
        changes="recompiles checkpoint",
    )
    tie_embeddings: bool = key(
        False, "the head is the embedding", changes="recompiles checkpoint numbers"
    )
    norm_epsilon: float = key(
        1e-5, "added to the variance in norms", minimum=0.0, changes="recompiles numbers"
    )
    qk_norm: bool = key(
        False, "RMSNorm on queries and keys, per head", changes="recompiles checkpoint numbers"
    )
    attention_softcap: float = key(
        0.0, "scores = c*tanh(scores/c); 0: off", minimum=0.0, changes="recompiles numbers"
    )
    sliding_window: int = key(
        0, "tokens that a query sees, itself included; 0: all before it", minimum=0,
        changes="recompiles numbers",
    )  # fmt: skip
    logit_softcap: float = key(
        0.0, "logits = c*tanh(logits/c); 0: off", minimum=0.0, changes="recompiles numbers"
    )
    init_std: float = key(
        0.02, "standard deviation of initial weights", minimum=0.0, changes="numbers"
    )

    @property
    def microbatches_change_numbers(self) -> bool:
        """Whether a loss is of a microbatch as a whole, and not a sum over tokens.

        Then losses depend on batch.microbatches beyond rounding.
        """
        return False

    @property
    def learned_positions(self) -> int:
        """Length of the table of learned positions, tokens; 0: there is none."""
        return 0

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by, in the compute type, where they enter the model."""
        return 1.0

    @property
    def expert_share(self) -> float:
        """The part of a layer's experts that a token is sent to."""
        return 1.0

    def shrunk(self, small: dict[str, Any], length: int) -> dict[str, Any]:
        """Keys that a small copy of the model needs beside `small`, for texts of this length.

        Those whose effect depends on a size, so that it still happens (shrink.py).
        """
        return {}


@section
class Attention:
    """The attention kernel."""

    backend: str = key(
        "auto",
        "auto picks from the mesh's device kind and logs why",
        choices=("auto", "xla", "chunked", "cudnn", "splash"),
        changes="recompiles",
    )
    chunk: int = key(
        256, "queries per chunk of chunked, ring and all_gather, tokens", minimum=1,
        changes="recompiles",
    )  # fmt: skip
    context: str = key(
        "ring",
        "of a split sequence: keys go round | are gathered | whole sequences of fewer heads",
        choices=("ring", "all_gather", "all_to_all"), changes="recompiles",
    )  # fmt: skip


@section
class Batch:
    """The global batch of one optimizer step; nothing here is per device."""

    sequences: int = key(
        REQUIRED, "sequences per step", minimum=1, changes="recompiles numbers data"
    )
    sequence_length: int = key(
        REQUIRED, "tokens per sequence", minimum=2, changes="recompiles numbers data"
    )
    microbatches: int = key(
        1, "the batch is processed in this many parts, one after another", minimum=1,
        changes="recompiles numbers",
        numbers_where="experts have model.balance=loss and model.balance_coefficient above 0: "
        "each part evens its own load",
    )  # fmt: skip


@section
class Pipeline:
    """The schedule of the pipeline: one forward, one backward (mesh.stage, batch.microbatches)."""

    repeats: int = key(
        1, "chunks of layers that each stage has; above 1 the bubble is smaller by this factor, "
        "and more is sent (interleaved schedule)", minimum=1, changes="recompiles",
    )  # fmt: skip


@section
class Precision:
    """Parameters and optimizer state are always float32."""

    compute: str = key(
        "bfloat16", "matmuls and activations", choices=("bfloat16", "float32"),
        changes="recompiles numbers",
    )  # fmt: skip
    reduce: str = key(
        "float32", "sums of gradients over devices; compute bfloat16 allows both",
        choices=("bfloat16", "float32"), changes="recompiles numbers",
    )  # fmt: skip


@section
class Remat:
    """What the backward pass recomputes."""

    policy: str = key(
        "full",
        "none: keep all; full: keep block inputs; dots: keep matmul outputs; names: keep those",
        choices=("none", "full", "dots", "names"),
        changes="recompiles",
    )
    names: tuple[str, ...] = key(
        (), "activations kept with policy names: query key value attention mlp",
        changes="recompiles",
    )  # fmt: skip
    offload: tuple[str, ...] = key(
        (), "of remat.names, those kept in host memory", changes="recompiles"
    )


@section
class Loss:
    """Cross-entropy over the vocabulary."""

    chunks: int = key(
        4, "the head runs over this many pieces of the sequence; divides it", minimum=1,
        changes="recompiles",
    )  # fmt: skip
    z_loss: float = key(
        0.0, "weight of the mean of log(Z)^2 (PaLM, section 5)", minimum=0.0,
        changes="recompiles numbers",
    )  # fmt: skip


@section
class Optimizer:
    """Update rule and learning-rate schedule."""

    name: str = key(
        "adamw", "update rule; sgd has no momentum",
        choices=("adamw", "adafactor", "lion", "muon", "sgd"),
        changes="recompiles checkpoint numbers",
    )  # fmt: skip
    learning_rate: float = key(
        REQUIRED, "peak learning rate", minimum=0.0, changes="recompiles numbers"
    )
    schedule: str = key(
        "cosine", "after warm-up", choices=("constant", "linear", "cosine", "wsd"),
        changes="recompiles numbers",
    )  # fmt: skip
    warmup_steps: int = key(
        0, "linear warm-up, steps", minimum=0, maximum=2**31 - 1, changes="recompiles numbers"
    )
    final_fraction: float = key(
        0.1, "learning rate at the last step, as a fraction of the peak", minimum=0.0, maximum=1.0,
        changes="recompiles numbers",
    )  # fmt: skip
    decay_fraction: float = key(
        0.2, "wsd: the last part of the run that decays, as a fraction of all steps", minimum=0.0,
        maximum=1.0, changes="recompiles numbers",
    )  # fmt: skip
    b1: float = key(
        0.9, "decay of the first moment", minimum=0.0, maximum=1.0, changes="recompiles numbers"
    )
    b2: float = key(
        0.95, "decay of the second moment", minimum=0.0, maximum=1.0, changes="recompiles numbers"
    )
    epsilon: float = key(
        1e-8, "added to the root of the second moment", minimum=0.0, changes="recompiles numbers"
    )
    weight_decay: float = key(
        0.1, "decoupled, times the learning rate; not on norms and biases", minimum=0.0,
        changes="recompiles numbers",
    )  # fmt: skip
    clip_norm: float = key(
        1.0, "gradients are scaled down to this global norm; 0: never", minimum=0.0,
        changes="recompiles numbers",
    )  # fmt: skip
    momentum: float = key(
        0.95, "muon: momentum of the matrices", minimum=0.0, maximum=1.0,
        changes="recompiles numbers",
    )  # fmt: skip
    train: tuple[str, ...] = key(
        ("*",), "parameters to train, as patterns (fnmatch) over their names; the rest is fixed",
        changes="recompiles checkpoint numbers",
    )  # fmt: skip


@section
class Data:
    """Where tokens come from."""

    path: str = key(
        REQUIRED, "directory that `jaxlm data prepare` wrote", changes="numbers data", path=True
    )
    corpus: str = key(
        "none", "built-in corpus, made where data.path is data/<its name> and does not exist",
        choices=("none", "python-stdlib"),
    )  # fmt: skip
    segments: bool = key(True, "attention stays within a document", changes="recompiles numbers")
    prefetch: int = key(4, "batches made ahead of time", minimum=1)


@section
class Checkpoint:
    """What is saved, and for how long."""

    every: int = key(500, "steps between checkpoints; 0: only at the end", minimum=0)
    keep: int = key(2, "newest checkpoints kept", minimum=1)
    start_from: str = key(
        "", "run directory whose newest parameters a new run starts from; empty: from the seed",
        changes="numbers", path=True,
    )  # fmt: skip
    keep_every: int = key(
        0, "checkpoints at multiples of this step are kept for good; 0: none", minimum=0
    )


@section
class Eval:
    """Held-out loss during training."""

    every: int = key(500, "steps between evaluations; 0: only at the end", minimum=0)
    batches: int = key(0, "batches of the validation split; 0: all of it", minimum=0)


@section
class Sample:
    """Text generated during training, into samples.jsonl."""

    every: int = key(0, "steps between samples; 0: never", minimum=0)
    prompts: tuple[str, ...] = key(("",), "text to continue; empty: from the start of a document")
    tokens: int = key(64, "tokens to generate for each prompt", minimum=1)
    temperature: float = key(0.8, "0: greedy", minimum=0.0)
    top_k: int = key(0, "sample from the k likeliest tokens; 0: from all", minimum=0)
    top_p: float = key(
        1.0, "sample from the smallest set with this probability", minimum=0.0, maximum=1.0
    )


@section
class Log:
    """Progress and metrics."""

    every: int = key(10, "steps between lines of metrics.jsonl", minimum=1)
    tensorboard: bool = key(False, "also write TensorBoard events (extra: tensorboard)")
    wandb: bool = key(False, "also log to Weights & Biases (extra: wandb)")


@section
class Plan:
    """`jaxlm plan`: the hardware to plan for, and what its search may take."""

    target: str = key(
        "local", "hardware: v6e:16x16, 2*v5p:4x4x4, h100:4x8, cpu:8; local: what is plugged in"
    )
    compile: int = key(4, "candidates of --search that are compiled, the best first", minimum=0)
    timeout: float = key(1800.0, "longest compile of one program, seconds", minimum=1.0)
    memory: float = key(
        0.95, "part of a device's memory that a plan may take; the rest is for the runtime, "
        "fragments and what the estimate misses", minimum=0.1, maximum=1.0,
    )  # fmt: skip
    price: float = key(0.0, "currency per chip and hour; 0: not shown", minimum=0.0)
    cache: str = key(
        "",
        "directory of results (JSON); empty: $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm",
        path=True,
    )


@section
class Config:
    """One run."""

    name: str = key("run", "names the default run directory")
    steps: int = key(REQUIRED, "optimizer steps", minimum=1, maximum=2**31 - 1, changes="numbers")
    seed: int = key(
        0, "initial parameters, sample order, sampling", minimum=0, maximum=2**32 - 1,
        changes="numbers data",
    )  # fmt: skip
    run: Run = key(Run, "run directory")
    devices: Devices = key(Devices, "devices and processes")
    mesh: Mesh = key(Mesh, "devices along each axis")
    rules: dict[str, tuple[str, ...]] = key(
        {}, "array dimension -> mesh axes it is split over in use; replaces the default",
        changes="recompiles",
    )  # fmt: skip
    storage: dict[str, tuple[str, ...]] = key(
        {}, "array dimension -> further axes it is split over at rest; replaces the default",
        changes="recompiles",
    )  # fmt: skip
    gather_at: str = key(
        "layer", "weights are gathered at each layer (ZeRO-3) or once a step (ZeRO-2)",
        choices=("layer", "step"), changes="recompiles",
    )  # fmt: skip
    model: Model = key(REQUIRED, "the model")
    attention: Attention = key(Attention, "attention kernel")
    batch: Batch = key(REQUIRED, "the global batch")
    pipeline: Pipeline = key(Pipeline, "pipeline schedule")
    precision: Precision = key(Precision, "number formats")
    remat: Remat = key(Remat, "rematerialisation")
    loss: Loss = key(Loss, "the loss")
    optimizer: Optimizer = key(REQUIRED, "update rule and schedule")
    data: Data = key(REQUIRED, "token source")
    checkpoint: Checkpoint = key(Checkpoint, "checkpoints")
    eval: Eval = key(Eval, "evaluation")
    sample: Sample = key(Sample, "samples during training")
    log: Log = key(Log, "progress and metrics")
    outer: Outer = key(Outer, "islands across slow links")
    privacy: Privacy = key(Privacy, "differential privacy of rows")
    plan: Plan = key(Plan, "planning")


def run_dir(config: Config) -> Path:
    """The directory that a run writes to."""
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.name


def expand_home(path: str, what: str) -> str:
    """The path with a leading ~ or ~user replaced by that home directory.

    UserError, which starts with `what`, where there is no such user.
    """
    try:
        found = os.path.expanduser(path)
    except ValueError:  # not a name that a user can have
        found = path
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(
            f"{what}={path}: {user} is no user's home directory here; write ./{path} if the name "
            "itself starts with ~"
        )
    return found


def padded_vocab(model: Model) -> int:
    """Rows of the embedding: the vocabulary rounded up to vocab_multiple."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
