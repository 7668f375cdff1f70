"""What the sizes of a layer cost on the clock of this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree

from solvers.terms import Columns, Dense, LowRank, MatrixShape, Term
from unified_approx.allocation.menu import Item
from unified_approx.calling import Call
from unified_approx.cost import layer_calls
from unified_approx.latency import Stopwatch, batch_of, fastest, fastest_dense, measure_latency
from unified_approx.layers import Factored, factored_class
from unified_approx.sites import LayerSite, Path

_SHARES = (0.05, 0.2, 0.4, 0.7)  # of the largest size; between them seconds are interpolated


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds per batch on this machine.

    Attributes:
        original: of the original network in its fastest dense form.
        layers: of each layer of it by name, in its faster dense form.
    """

    original: float
    layers: Mapping[str, float]


def sized_terms(form: str, size: int, shape: MatrixShape, seed: int = 0) -> tuple[Term, ...]:
    """Terms of a form and size with arbitrary values: as fast as those that a solve will find.

    Columns are whole input channels, drawn at random: layers that read the same channels seldom choose alike.
    """
    n, p = shape.n, shape.p
    if form == "low_rank":
        return (LowRank(np.ones((n, size), np.float32), np.ones((size, p), np.float32), np.arange(p, dtype=np.int32)),)
    kept = np.random.default_rng(seed).permutation(shape.c_in)[: size * shape.c_in // p]
    columns = np.flatnonzero(np.isin(np.arange(p) % shape.c_in, kept)).astype(np.int32)
    return (Columns(np.ones((n, len(columns)), np.float32), columns),)


class LayerTimer:
    """Times layers of a network at sizes, each in its fastest execution, on batches of 64."""

    def __init__(self, model: nnx.Module, example: PyTree, call: Call, rounds: int = 10):
        """Trace the network and time it as it is, in its fastest dense form.

        Args:
            model: the original.
            example: a batch of examples; repeated or cut to 64.
            call: how the network is called.
            rounds: timed calls of each candidate.
        """
        self.batch = batch_of(example)
        self._dense, _ = fastest_dense(model, self.batch, call=call, rounds=rounds)
        self._calls = layer_calls(model, self.batch, call=call)
        self._stopwatch, self._call, self._rounds = Stopwatch(rounds), call, rounds

    def dense_seconds(self, sites: Sequence[LayerSite]) -> Clock:
        """Of the network and of the given layers, dense."""
        whole = measure_latency({"original": self._dense}, self.batch, call=self._call, rounds=self._rounds)["original"]
        layers = {site.name: min(self._seconds(site, None).values()) for site in sites}
        return Clock(original=whole, layers=layers)

    def against_dense(self, model: nnx.Module) -> tuple[nnx.Module, float]:
        """A network in its fastest executions, and its seconds over those of the original, interleaved runs."""
        fast = fastest(model, self.batch, call=self._call, rounds=self._rounds)
        both = {"original": self._dense, "new": fast}
        found = measure_latency(both, self.batch, call=self._call, rounds=2 * self._rounds)
        return fast, found["new"] / found["original"]

    def timed(self, site: LayerSite, items: Sequence[Item]) -> list[Item]:
        """The items with their seconds: never more than dense, because a layer that gains nothing can be merged."""
        dense = min(self._seconds(site, None).values())
        found: list[Item] = []
        for form in ("columns", "low_rank"):
            own = [item for item in items if item.form == form]
            if not own:
                continue
            sizes = self._sizes(form, site.geometry.matrix_shape, max(item.size for item in own))
            seconds = [min(self._seconds(site, (form, size)).values()) for size in sizes]
            at: Float[np.ndarray, " items"] = np.interp([item.size for item in own], sizes, seconds)
            found += [replace(item, seconds=min(float(t), dense)) for item, t in zip(own, at, strict=True)]
        return found + [replace(item, seconds=dense) for item in items if item.form == "dense"]

    def _sizes(self, form: str, shape: MatrixShape, largest: int) -> list[int]:
        unit = shape.p // shape.c_in if form == "columns" else 1
        return sorted({max(unit, int(s * largest) // unit * unit) for s in _SHARES} | {largest})

    def _seconds(self, site: LayerSite, sized: tuple[str, int] | None) -> dict[str, float]:
        shape = site.geometry.matrix_shape
        if sized is None:
            terms: tuple[Term, ...] = (Dense(np.ones((shape.n, shape.p), np.float32)),)
        else:
            terms = sized_terms(*sized, shape)
        layer: Factored = factored_class(site.geometry).from_terms(terms, None, site.geometry)
        calls = [call for path in self._paths(site) for call in self._calls.get(path, ())]
        return self._stopwatch.choose(site.path, layer, calls).seconds

    def _paths(self, site: LayerSite) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((site.path, *site.homes)))
