"""Many calibration images within bounded memory: all of them only for the layers that need them.

A layer on large images gives thousands of rows per image, one on 2x2 images four. So the first layers are observed on
a core of the images; the rest go through the network, batch by batch, when the first layer asks for more rows than the
core has.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from unified_approx import calibration as examples
from unified_approx.capture import Capture, Skipped
from unified_approx.sites import LayerSite, Observation, Path

_CORE = (1800, 600)  # images that every layer sees: fitted, held out


class Streams:
    """`Capture` of a core of the images, and of the others from the first layer on that needs them.

    Attributes:
        sites: as a capture's.
        skipped: as a capture's.
        example: the first batch.
        batches: of the core.
    """

    def __init__(self, model: nnx.Module, data: Any, held_out_from: int, batch_size: int, call: Callable[..., Any]):
        """Trace the network on the core.

        Args:
            model: the network.
            data: examples.
            held_out_from: examples with this number and above are held out.
            batch_size: examples that go through the network at a time.
            call: how the network is called.
        """
        count = examples.count(data)
        fitted, held = np.arange(held_out_from), np.arange(held_out_from, count)
        self._core = np.concatenate([fitted[: _CORE[0]], held[: _CORE[1]]])
        self._others = np.concatenate([fitted[_CORE[0] :], held[_CORE[1] :]])
        self._model, self._data, self._size, self._call = model, data, min(batch_size, len(self._core)), call
        self._held_out_from = held_out_from
        self.batches = self._batches(self._core)
        self.example = self.batches[0]
        self._first = self._capture(self.batches)
        self._rest: Capture | None = None
        self._changes: list[tuple[LayerSite, tuple[Any, Any] | None]] = []
        self.sites: list[LayerSite] = self._first.sites
        self.skipped: list[Skipped] = self._first.skipped

    def _batches(self, numbers: Int[np.ndarray, " n"]) -> list[Any]:
        return examples.split(jax.tree.map(lambda a: a[numbers], self._data), self._size)

    def _capture(self, batches: list[Any]) -> Capture:
        return Capture(self._model, [(batch,) for batch in batches], call=self._call)

    def again(self) -> "Streams":
        """The same images and network from the first layer on, nothing replaced."""
        return Streams(self._model, self._data, self._held_out_from, self._size, self._call)

    def output_spatial(self, site: LayerSite) -> tuple[int, ...]:
        """The shape of one image of the layer's output, without the channels."""
        return self._first.output_spatial(site)

    def input_shape(self, site: LayerSite) -> tuple[int, ...]:
        """Shape of what one call of the layer sees of one batch."""
        return self._first.input_shape(site)

    def observe(self, site: LayerSite, rows: int) -> Observation:
        """What the layer sees and should answer, on the core, or on all images if the core has fewer than `rows` rows.

        Image numbers are those of the data.
        """
        seen = _numbered(self._first.observe(site), self._core)
        fitted = min(self._held_out_from, _CORE[0])
        if not len(self._others) or fitted * prod(self.output_spatial(site)) * site.num_calls >= rows:
            return seen
        more = self._others_now()
        return _joined(seen, _numbered(more.observe(_same(more, site.path)), self._others))

    def replace(self, site: LayerSite, matrix: Float[Any, "n p"], bias: Float[Any, " n"]) -> None:
        """As `Capture.replace`."""
        self._first.replace(site, matrix, bias)
        self._change(site, (matrix, bias))

    def keep(self, site: LayerSite) -> None:
        """As `Capture.keep`."""
        self._first.keep(site)
        self._change(site, None)

    def outputs(self) -> tuple[Any, Any]:
        """Of the original and the compressed network, on the core."""
        return self._first.outputs()

    def _change(self, site: LayerSite, new: tuple[Any, Any] | None) -> None:
        if self._rest is None:
            self._changes.append((site, new))
        else:
            _apply(self._rest, site.path, new)

    def _others_now(self) -> Capture:
        """The capture of the other images, made at its first use, with all that was replaced so far."""
        if self._rest is None:
            self._rest = self._capture(self._batches(self._others))
            for site, new in self._changes:
                _apply(self._rest, site.path, new)
            self._changes.clear()
        return self._rest


def _same(capture: Capture, path: Path) -> LayerSite:
    return next(site for site in capture.sites if site.path == path)


def _apply(capture: Capture, path: Path, new: tuple[Any, Any] | None) -> None:
    if new is None:
        capture.keep(_same(capture, path))
    else:
        capture.replace(_same(capture, path), *new)


def _numbered(seen: Observation, numbers: Int[np.ndarray, " images"]) -> Observation:
    return Observation(seen.x, seen.response, seen.offset, numbers[seen.image_index])


def _joined(a: Observation, b: Observation) -> Observation:
    def both(x: Any, y: Any) -> Any:
        return None if x is None else np.concatenate([x, y])

    index = np.concatenate([a.image_index, b.image_index])
    return Observation(both(a.x, b.x), both(a.response, b.response), both(a.offset, b.offset), index)
