"""Device memory of a traced step: which values are in memory, and when.

The rule of what is written: products, collectives, loops, kernels, gathers, scatters, sorts and
sums are; elementwise operations, casts, views and broadcasts are parts of what reads them (a
fusion), unless a reader needs its operand in memory, or they are a result. A written value lives
from the operation that makes it to the last that reads it, itself or through fused ones.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxlm.plan.facts import Facts
from jaxlm.plan.walk import Body, Op, Sizes
from jaxlm.plan.work import communicates, is_product

LOOPS = {"scan", "while", "cond"}
# Their operands are in memory, and so are their results.
ARRAYS = LOOPS | {
    "dot_general", "ragged_dot_general", "pallas_call", "custom_call", "gather",
    "scatter", "scatter-add", "sort", "cumsum", "top_k", "ppermute", "all_gather", "psum",
    "reduce_scatter", "all_to_all", "ragged_all_to_all", "conv_general_dilated", "ffi_call",
    "custom_vmap_call", "psum_invariant", "all_gather_invariant", "cumlogsumexp", "cummax",
    "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper",
    "dynamic_update_slice", "device_put",
}  # fmt: skip


Readers = dict[int, list[Op]]  # of an operation, by its id


class Memory:
    """The largest sum of live values of a body, and which they are.

    What the body starts with lies outside of it, and is not counted; nor is a result that can take
    the place of what it replaces (`pairs`: what a loop carries, donated arguments). Where `sizes`
    are of many meshes, sums are arrays, and `live` is that of one of them.
    """

    def __init__(
        self, body: Body, sizes: Sizes, facts: Facts, pairs: dict[int, int],
        slices: Iterable[int] = (), repeats: bool = False,
    ) -> None:  # fmt: skip
        self.body, self.sizes, self.facts, self.pairs = body, sizes, facts, pairs
        self.made = {v: op for op in body.ops for v in op.outputs}
        self.slices = set(slices)  # of stacked arrays: parts of what reads them
        self.outer = set(body.inputs) - self.slices
        self.arrays = {id(op) for op in body.ops if self._is_whole(op)}
        self.known: dict[int, Any] = {}  # bytes of values
        self.kept = self._kept()
        self.memo: dict[int, frozenset[int]] = {}
        self.inner: dict[int, list[Memory]] = {}  # of loops
        self.until: dict[int, Op] = {}  # written value -> the last that reads it
        self.peak, self.live = self._run()
        if repeats:
            self.peak += self._zeros()

    def moved(self) -> Iterator[tuple[Op, Any]]:
        """(operation, bytes that it reads from and writes to memory) of what is no loop."""
        for op in self.body.ops:
            if op.name in LOOPS or not (self.whole(op) or any(v in self.kept for v in op.outputs)):
                continue
            reads = {root for v in op.inputs if v is not None for root in self.roots(v)}
            if op.name in ("gather", "dynamic_slice"):  # only the rows that it takes are read
                reads = set()
            written = sum(self.size(v) for v in op.outputs)
            if op.name in ("dynamic_update_slice", "scatter-add", "scatter") and op.inputs[-1]:
                written, reads = 3 * self.size(op.inputs[-1]), set()
                if op.name == "dynamic_update_slice" and op.inputs[1] is not None:
                    written = 2 * self.size(op.inputs[1])
            yield op, written + sum(map(self.size, reads))

    def all_until(self) -> dict[int, Op]:
        """`until`, of the bodies of loops as well."""
        found = dict(self.until)
        for inner in itertools.chain(*self.inner.values()):
            found |= inner.all_until()
        return found

    def size(self, number: int) -> Any:
        """Bytes of a value."""
        if number not in self.known:
            self.known[number] = self.facts.bytes(self.body.arrays[number], self.sizes)
        return self.known[number]

    def whole(self, op: Op) -> bool:
        """Whether its operands and results are arrays in memory."""
        return id(op) in self.arrays

    def _is_whole(self, op: Op) -> bool:
        if op.name == "dot_general":  # else elementwise work, or a sum of it
            return is_product(self.body, op, self.sizes)
        if op.name == "reshard":
            return communicates(self.body, op, self.sizes)
        return op.name in ARRAYS

    def sums(self, op: Op) -> bool:
        """Whether it adds up what is computed elementwise."""
        if op.name == "dot_general":
            return not self.whole(op) and bool(op.params["dimension_numbers"][0][0])
        return op.name.startswith(("reduce_", "arg"))

    def _kept(self) -> set[int]:
        kept = {v for v in self.body.outputs if v is not None}
        for op in self.body.ops:
            if self.whole(op):
                kept.update(self._shown(v) for v in op.inputs if v is not None)
            if self.whole(op) or self.sums(op):
                kept.update(op.outputs)
        if self.facts.once:
            readers = collections.Counter(v for op in self.body.ops for v in set(op.inputs))
            for op in self.body.ops:
                if op.name not in VIEWS:
                    kept.update(v for v in op.outputs if readers[v] > 1)
        return kept

    def _is_constant(self, op: Op) -> bool:
        """Whether what an operation makes depends on nothing."""
        return not self.whole(op) and not any(self.roots(v) for v in op.inputs if v is not None)

    def _shown(self, number: int) -> int:
        """What a chain of views shows: it needs no memory of its own."""
        while (op := self.made.get(number)) and op.name in VIEWS and not self.whole(op):
            if op.inputs[0] is None:
                break
            number = op.inputs[0]
        return number

    def roots(self, number: int) -> frozenset[int]:
        """The written values that a value is computed from."""
        if number in self.kept or number in self.outer:
            return frozenset((number,))
        if number not in self.memo:
            op = self.made.get(number)
            parts = [] if op is None else [self.roots(v) for v in op.inputs if v is not None]
            self.memo[number] = frozenset().union(*parts)
        return self.memo[number]

    def _run(self) -> tuple[Any, dict[int, Any]]:
        ops, last, first = self._order(), {}, {}
        for k, op in enumerate(ops):
            for root in {root for v in op.inputs if v is not None for root in self.roots(v)}:
                last[root] = k
                first.setdefault(root, k)
        end = len(ops)
        results = {v for v in self.body.outputs if v is not None}
        last |= dict.fromkeys(results, end)
        births, deaths = collections.defaultdict(list), collections.defaultdict(list)
        for v in self.slices & self.kept & first.keys():
            births[first[v]].append(v)
        for k, op in enumerate(ops):
            for v in op.outputs:
                if v in self.kept and v in last and not self._in_place(v, k, op, last):
                    late = not self.whole(op) and v not in results
                    late = late and self.facts.order != "early"
                    if self.facts.sinks and v not in results and self._is_constant(op):
                        continue
                    births[first[v] if late else k].append(v)
        for v, k in last.items():
            deaths[k].append(v)
        self.until = {v: ops[k] for v, k in last.items() if k < end}
        live: dict[int, Any] = {}
        peak, best, total = 0.0, {}, 0.0
        for k, op in enumerate(ops):
            inner, inside = self._inside(op)
            new = {v: self.size(v) for v in births[k] if v not in live}
            live |= new
            total = total + sum(new.values())
            shared = self._shared(op, births[k], deaths[k], live)
            now = total - sum(live[v] for v in shared) + inner
            if np.any(now > peak):
                peak = np.maximum(now, peak)
                best = {v: size for v, size in live.items() if v not in shared} | inside
            total = total - sum(live.pop(v, 0.0) for v in deaths[k])
        return peak, best

    def _order(self) -> list[Op]:
        """The operations that write, in the order in which they run."""
        ops = [op for op in self.body.ops if self.whole(op) or self.kept & set(op.outputs)]
        if self.facts.order == "traced":
            return ops
        makers = {}
        for op in ops:
            roots = {root for v in op.inputs if v is not None for root in self.roots(v)}
            makers[id(op)] = {id(self.made[root]) for root in roots if root in self.made}
        readers = collections.defaultdict(list)
        for op in ops:
            for maker in makers[id(op)]:
                readers[maker].append(op)
        order = self._early if self.facts.order == "early" else self._late
        return order(ops, makers, readers)

    def _early(self, ops: list[Op], makers: dict[int, set[int]], readers: Readers) -> list[Op]:
        """First come, first served."""
        waits = {id(op): len(makers[id(op)]) for op in ops}
        queue = [op for op in ops if not waits[id(op)]]
        for op in queue:  # grows
            for reader in readers[id(op)]:
                waits[id(reader)] -= 1
                if not waits[id(reader)]:
                    queue.append(reader)
        return queue

    def _late(self, ops: list[Op], makers: dict[int, set[int]], readers: Readers) -> list[Op]:
        """As traced, but what makes more than it frees runs right before its first reader."""
        last = {
            root: op for op in ops for v in op.inputs if v is not None for root in self.roots(v)
        }
        freed = collections.Counter()
        for root, op in last.items():
            freed[id(op)] += self.size(root) if root in self.made else 0
        results, keys = set(self.body.outputs), {}
        for k, op in reversed(list(enumerate(ops))):
            grows = sum(map(self.size, op.outputs)) - freed[id(op)]
            if (
                op.name in LOOPS
                or results & set(op.outputs)
                or not readers[id(op)]
                or np.any(grows <= 0)
            ):
                keys[id(op)] = (k, math.inf)
            else:  # after all that is moved there too, and comes before it in the trace
                keys[id(op)] = (*min(keys[id(one)] for one in readers[id(op)])[:-1], k, math.inf)
        return sorted(ops, key=lambda op: keys[id(op)])

    def _zeros(self) -> Any:
        """What mapped loops in a loop stack starts as zeros, which the outer one holds.

        Equal ones are one. Seen in programs of all platforms under vmap, and only there.
        """
        kinds = {}
        for op in self.body.ops:
            if op.name == "scan" and "vmap(" in op.scope:
                for v in op.outputs[op.params["num_carry"] :]:
                    array = self.body.arrays[v]
                    kinds[str(array.local(self.sizes)), array.width] = self.size(v)
        return sum(kinds.values())

    def children(self, op: Op) -> Iterator[Memory]:
        """The bodies of a loop."""
        for body in op.bodies:
            pairs, slices = {}, []
            if op.name == "scan":
                consts, carried = op.params["num_consts"], op.params["num_carry"]
                slices = body.inputs[consts + carried :]
                carries = zip(body.outputs, body.inputs[consts:], strict=False)
                pairs = {out: v for out, v in list(carries)[:carried] if out is not None}
            repeats = op.name == "scan" and op.params["length"] != 1
            yield Memory(body, self.sizes, self.facts, pairs, slices, repeats)

    def _inside(self, op: Op) -> tuple[Any, dict[int, Any]]:
        """The peak of what a loop holds beside its operands and results."""
        inner, inside = 0.0, {}
        if op.name == "ragged_dot_general" and self.facts.masks and None not in op.inputs:
            groups = math.prod(self.body.arrays[op.inputs[2]].local(self.sizes))
            inner = groups * self.size(self._shown(op.inputs[0]))
        self.inner[id(op)] = list(self.children(op))
        for found in self.inner[id(op)]:
            if np.any(found.peak >= inner):
                inner, inside = np.maximum(found.peak, inner), found.live

        return inner, inside

    def _in_place(self, number: int, k: int, op: Op, last: dict[int, int]) -> bool:
        """Whether a result lies where the operand that it replaces was, which is read no more."""
        if number not in self.pairs:
            return False
        until = last.get(self.pairs[number], -1)
        return until < k or (until == k and self._overwrites(op))

    def _overwrites(self, op: Op) -> bool:
        """Whether an operation can write where it reads."""
        return not self.whole(op) or op.name in IN_PLACE

    def _shared(self, op: Op, made: list[int], dying: list[int], live: dict[int, Any]) -> set[int]:
        """The results that lie where an operand was that nobody reads any more."""
        if not dying or not made or not self._overwrites(op):
            return set()
        key = lambda v: np.asarray(live.get(v, 0.0), float).tobytes()
        free = collections.Counter(key(v) for v in dying if v not in op.outputs)
        found = set()
        for v in made:
            if v in op.outputs and free[key(v)] > 0:
                free[key(v)] -= 1
                found.add(v)
        return found


IN_PLACE = LOOPS | {"scatter", "scatter-add", "dynamic_update_slice"}
VIEWS = {
    "reshape", "transpose", "squeeze", "expand_dims", "retype", "reshard", "name", "copy",
    "stop_gradient", "optimization_barrier",
}  # fmt: skip
