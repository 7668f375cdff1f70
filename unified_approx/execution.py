"""Running a graph piecewise: only the missing operations, keeping only what is still needed."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import jax
from jaxtyping import Array, Shaped

from unified_approx.graph import Graph, Op, Value


class Execution:
    """One network on all chunks of the data, each chunk as far as it was asked for.

    Attributes:
        ops: the graph's, or what replaced them.
        num_runs: how often each of the ops ran on each chunk.
        stored: numbers of the values that each chunk holds.
    """

    def __init__(self, graph: Graph, chunks: Iterable[Sequence[Shaped[Array, "..."]]]):
        """Start with nothing but the data: for each chunk the leaves of the arguments."""
        self.ops = list(graph.ops)
        self.num_runs = [0] * len(self.ops)
        self._graph = graph
        self._chunks = [dict(zip(graph.inputs, leaves, strict=True)) for leaves in chunks]
        self.stored = set(graph.inputs)

    def override(self, number: int, source: int, function: Callable[[Value], Value]) -> None:
        """From now on compute the value `number` as function(value `source`), an earlier one."""
        index = self._graph.producer[number]
        self.ops[index] = Op("override", (source,), (number,), {}, lambda x: [function(x)])

    def dependents(self, numbers: Collection[int]) -> set[int]:
        """`numbers` and everything that is computed from them."""
        out = set(numbers)
        for op in self.ops:
            if not out.isdisjoint(op.inputs):
                out.update(op.outputs)
        return out

    def compute(
        self, targets: Collection[int], later: Collection[int], volatile: Collection[int] = ()
    ) -> Iterator[Mapping[int, Value]]:
        """The values of `targets`, chunk by chunk. The iterator must be exhausted.

        Args:
            targets: numbers of the values to return.
            later: numbers of the values that will be asked for afterwards: what they need is kept, the rest freed.
            volatile: values that are about to change and must not be kept; they are computed again when asked for.
        """
        plan, _ = self._plan(self.stored, targets)
        made = self.stored.union(*(self.ops[i].outputs for i in plan))
        _, kept = self._plan(made.difference(volatile), later)
        release = self._release(plan, made, kept.union(targets))
        for chunk in self._chunks:
            for v in self.stored.difference(release, kept, targets):
                del chunk[v]
            yield self._run(chunk, plan, release, targets)
            for v in set(chunk).difference(kept):
                del chunk[v]
            jax.block_until_ready(list(chunk.values()))  # dispatch is asynchronous: bound what is in flight
        for i in plan:
            self.num_runs[i] += 1
        self.stored = kept

    def _plan(self, have: Collection[int], targets: Iterable[int]) -> tuple[list[int], set[int]]:
        """The ops to run for `targets`, in order, and the values among `have` that they start from."""
        ops, start, visited, stack = set(), set(), set(), list(targets)
        while stack:
            v = stack.pop()
            if v in visited or self._graph.is_constant(v):
                continue
            visited.add(v)
            if v in have:
                start.add(v)
            elif (index := self._graph.producer[v]) not in ops:
                ops.add(index)
                stack.extend(self.ops[index].inputs)
        return sorted(ops), start

    def _release(self, plan: Sequence[int], made: Collection[int], wanted: Collection[int]) -> dict[int, int]:
        """For each value that is not wanted afterwards the position in the plan after which it can go."""
        last = {}
        for position, index in enumerate(plan):
            for v in (*self.ops[index].inputs, *self.ops[index].outputs):
                if v in made and v not in wanted:
                    last[v] = position
        return last

    def _run(
        self, chunk: dict[int, Value], plan: Sequence[int], release: Mapping[int, int], targets: Collection[int]
    ) -> dict[int, Value]:
        at: dict[int, list[int]] = {}
        for v, position in release.items():
            at.setdefault(position, []).append(v)
        for position, index in enumerate(plan):
            op = self.ops[index]
            read = [self._graph.constant(v) if self._graph.is_constant(v) else chunk[v] for v in op.inputs]
            chunk.update(zip(op.outputs, op.function(*read), strict=True))
            del read
            for v in at.get(position, ()):
                chunk.pop(v)
        return {v: self._graph.constant(v) if self._graph.is_constant(v) else chunk[v] for v in targets}
