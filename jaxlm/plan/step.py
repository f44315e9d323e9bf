"""Numbers of a step that the formulas share (analytic.py, bytes_moved.py)."""

from __future__ import annotations

import dataclasses
import functools

from jaxlm import config as cfg
from jaxlm.attention import splash
from jaxlm.attention.chunked import SPANS
from jaxlm.attention.compiled import shown_blocks
from jaxlm.hardware.target import Target
from jaxlm.models import layer_windows
from jaxlm.plan.habits import WIDE
from jaxlm.sharding import Layout
from jaxlm.state import Structure


@dataclasses.dataclass(frozen=True)
class Step:
    """The numbers that the formulas share."""

    config: cfg.Config
    layout: Layout
    structure: Structure
    target: Target

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.layout.axes)

    @functools.cached_property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.layout.compute == "bfloat16" else WIDE

    @functools.cached_property
    def wire(self) -> int:
        """Bytes of an activation or weight between devices: XLA on CPU sends float32."""
        return WIDE if self.target.platform == "cpu" else self.width

    @functools.cached_property
    def reduce(self) -> int:
        """Bytes of a gradient on its way between devices."""
        narrow = self.layout.reduce == "bfloat16" and self.target.platform != "cpu"
        return 2 if narrow else WIDE

    @functools.cached_property
    def tokens(self) -> float:
        """Tokens of a device in a step."""
        batch = self.config.batch
        ways = self.layout.size("batch") * self.layout.size("seq")
        return batch.sequences * batch.sequence_length / ways

    @functools.cached_property
    def stages(self) -> int:
        return self.layout.size("layers")

    @functools.cached_property
    def bubble(self) -> float:
        """Ticks of the pipeline for each that works (pipeline/)."""
        if self.stages == 1:
            return 1.0
        work = self.config.batch.microbatches * self.config.pipeline.repeats
        return (work + self.stages - 1) / work

    @property
    def policy(self) -> str:
        return self.config.remat.policy

    def again(self, name: str) -> bool:
        """Whether the backward pass computes this named activation a second time."""
        if self.policy == "names":
            return name not in self.config.remat.names
        kept = ("query", "key", "value", "mlp", "output")
        return self.policy == "full" or (self.policy == "dots" and name not in kept)

    def forwards(self, again: bool = False, needed: bool = True) -> int:
        """Runs of a part of the forward pass: pipelines do one more, to save inputs of layers.

        Where a tick is one layer that one leaves out what is computed again, or is not `needed`.
        """
        deep = self.config.model.num_layers > self.stages * self.config.pipeline.repeats
        return 1 + (self.stages > 1 and (deep or (needed and not again)))


def visited(layout: Layout, m: cfg.Model, length: int) -> float:
    """The part of all scores that an attention backend computes, of queries times keys.

    A mean over layers, since each may have a window of its own.
    """
    windows = layer_windows(m)
    shown = {window: _visited(layout, m, length, window) for window in set(windows)}
    return sum(shown[window] for window in windows) / len(windows)


def _visited(layout: Layout, m: cfg.Model, length: int, window: int) -> float:
    """`visited` of a layer with this window; one that is as long as the row hides nothing."""
    backend, window = layout.attention.backend, window if window < length else 0
    if backend == "splash":
        sizes = splash.block_sizes(length, m.head_dim * 2)
        rows, columns = length // sizes.block_q, length // (sizes.block_kv or length)
        return shown_blocks(rows, columns, length, window)
    if backend == "chunked":
        return _visited_chunks(layout.attention.chunk, length, window)
    if backend == "cudnn":
        return 0.5
    if backend in ("ring", "all_gather"):  # two pieces a device; those that are hidden are skipped
        pieces = 2 * layout.size("seq")
        return shown_blocks(pieces, pieces, length, window)
    return 1.0


def _visited_chunks(chunk: int, length: int, window: int) -> float:
    """Spans of whole chunks of queries, each with the keys from its first window to its end."""
    count = -(-length // chunk)
    size, total = -(-length // count), 0
    bounds = [count * i // SPANS for i in range(SPANS + 1)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        low = max(0, first * size - window + 1) if window else 0
        total += (last - first) * size * (min(last * size, length) - low)
    return total / length**2
