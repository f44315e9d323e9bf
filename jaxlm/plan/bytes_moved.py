"""Bytes to and from device memory and host memory in a step, by formulas."""

from __future__ import annotations

import dataclasses
import math

from jaxlm import config as cfg
from jaxlm.models import moe
from jaxlm.plan.habits import HABITS, WIDE
from jaxlm.plan.step import Step, visited


def hbm_bytes(step: Step, saved: float) -> float:
    """Device memory read and written: weights in each pass, activations, logits, the optimizer.

    `saved`: bytes that a microbatch keeps for its backward pass, written and read.
    """
    layout, config, m = step.layout, step.config, step.config.model
    count = config.batch.microbatches
    rest = used = 0.0
    for name, dims in step.structure.dims.items():
        elements = math.prod(step.structure.shapes[name])
        entries = layout.spec(dims)
        axes = {a for e in entries for a in ((e,) if isinstance(e, str) else e or ())}
        used += elements / math.prod(step.sizes[a] for a in axes)
        rest += elements / math.prod(step.sizes[a] for a in layout.stored_axes(dims))
    states = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 0.1}[config.optimizer.name]
    optimizer = rest * WIDE * (3 + 2 * states)  # gradient and weight read, weight written
    again = 1.0 if step.policy == "full" else 0.5 if step.policy != "none" else 0.0
    touches = _TOUCHES[step.target.platform]
    weights = used * step.width * (3 + again + (step.stages > 1)) * count
    # Gradients are written; where microbatches add up, read with their sum, which is written.
    weights += rest * WIDE * (1 if count == 1 else touches.sums * count)
    L = m.num_layers / step.stages * step.bubble
    layer = step.tokens * L * step.width * _layer_elements(step, touches, again)
    rows = cfg.padded_vocab(m) / layout.size("vocab")
    head = step.tokens * rows * (3 * WIDE + 3 * step.width)
    if config.loss.chunks > 1:  # each adds to the sum of the table's gradients
        head += config.loss.chunks * count * rows * m.embed_dim * WIDE * touches.table
    return optimizer + weights + layer + head + touches.saved * saved * count * step.bubble


@dataclasses.dataclass(frozen=True)
class _Touches:
    """How often compiled programs touch an array, as those of benchmarks/ranking.py show."""

    activations: float = 1  # of those of a pass: XLA:GPU keeps some of them in float32
    scores: float = 4  # in a pass: of plain attention, in float32
    masked: float = 0  # in a pass: copies of rows for the dense products of experts (habits.py)
    sums: float = 4  # of gradients in a microbatch; XLA:GPU makes zeros, stacks, and copies them
    table: float = 2  # of the head's gradients in a chunk; XLA:GPU adds in a kernel of its own
    saved: float = 2  # of what is kept for the backward pass; XLA:GPU writes zeros first


_TOUCHES = {
    "tpu": _Touches(),
    "gpu": _Touches(activations=1.5, scores=2.5, masked=1, sums=8, table=4, saved=3),
    "cpu": _Touches(),
}


def _layer_elements(step: Step, touches: _Touches, again: float) -> float:
    """Elements that a layer reads and writes for a token, in all passes."""
    layout, config, m = step.layout, step.config, step.config.model
    heads = m.num_heads / layout.size("heads") + 2 * m.num_kv_heads / layout.size("kv_heads")
    hidden = m.mlp_dim / layout.size("mlp")
    masked = 0.0
    if isinstance(m, moe.Config):
        split = layout.size("mlp")
        hidden = (m.experts_per_token * m.expert_mlp_dim + m.shared_expert_dim) / split
        hidden += 2 * m.experts_per_token * m.embed_dim
        if m.dispatch == "dropless":
            wide, narrow = HABITS[step.target.platform].masked
            masked = wide * m.expert_mlp_dim / split + narrow * m.embed_dim
            masked *= touches.masked * moe.product_rows(
                m, step.config.batch.sequence_length, step.layout
            )
    residual = layout.size("residual_seq") / layout.size("seq")
    # A pass reads and writes: the residual stream eight times, heads four, the MLP's hidden five.
    activations = 8 * m.embed_dim / residual + 2 * m.embed_dim + 4 * heads * m.head_dim + 5 * hidden
    # The passes of _flops: pipelines run forward once more, chunks and pieces make scores again.
    passes = 2 + step.forwards() + again
    elements = (touches.activations * activations + masked) * passes
    backend = layout.attention.backend
    if backend in ("xla", "chunked", "ring", "all_gather"):
        length = config.batch.sequence_length
        shown = visited(layout, m, length)
        if backend == "xla":
            length /= layout.size("seq")
        scores = m.num_heads / layout.size("heads") * length * shown * WIDE / step.width
        passes = 2 + step.forwards() + step.again("attention") + (backend != "xla")
        elements += touches.scores * scores * passes
    return elements


def host_bytes(step: Step) -> float:
    """Activations that are kept in host memory: there, and back."""
    m, layout = step.config.model, step.layout
    heads = m.num_heads / layout.size("heads") * m.head_dim
    kv = m.num_kv_heads / layout.size("kv_heads") * m.head_dim
    hidden = m.mlp_dim / layout.size("mlp") * (1 if m.family == "gpt2" else 2)
    sizes = {"query": heads, "key": kv, "value": kv, "attention": heads, "mlp": hidden}
    elements = sum(sizes[name] for name in step.config.remat.offload)
    return 2 * step.tokens * m.num_layers / step.stages * step.width * elements
