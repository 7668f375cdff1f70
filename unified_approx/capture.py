"""Runs a network on calibration data and hands out one layer at a time: what it sees, what is wanted of it.

The original network and the one compressed so far go forward in lock step. For each layer, in execution order, the
input comes from the compressed network and the target from the original, so that a layer's solve can make up for the
errors of those before it. Every operation of the original runs once; only what is still needed is kept.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.assemble import modules
from unified_approx.calling import forward
from unified_approx.discover import Call, find_layers
from unified_approx.execution import Execution
from unified_approx.graph import Graph, trace
from unified_approx.sites import LayerSite, Observation, Path, Skipped, path_name

__all__ = ["Capture", "LayerSite", "Observation", "Path", "Skipped"]


class Capture:
    """A network on calibration data, one layer at a time.

    The typical loop observes each site, solves, and replaces it; sites may be left out. Memory: the calibration
    inputs, the values that the rest of either network still needs, and one observation. Each chunk is one batch.

    Attributes:
        sites: the layers that can be replaced, in execution order.
        skipped: the modules with weights that cannot, with the reason.
        num_images: calibration images.
        original: the original network's execution.
        compressed: the execution of the network compressed so far.
    """

    def __init__(self, model: nnx.Module, batches: Iterable[Any], *, call: Callable[..., Any] = forward):
        """Trace the network and find its layers. The model is cloned and set to evaluation mode; it is not changed.

        Args:
            model: the network.
            batches: the arguments of each call, as a tuple of (nested) arrays whose first axes all run over the
                same images. All batches have the size of the first, 100 to 250 images say; the last may be smaller.
            call: how the network is called.

        Raises:
            ValueError: no batches, arrays that do not share their first axis, batches of different sizes or shapes, or
                a batch normalisation in training mode.
        """
        model = nnx.clone(model)
        model.eval()
        chunks, tree, sizes = _check_batches(list(batches))
        self._batch_size, self.num_images = sizes[0], sum(sizes)
        self._graph: Graph = trace(model, jax.tree.unflatten(tree, chunks[0]), call)
        found, self.skipped = find_layers(self._graph, model, self._batch_size)
        self.sites = [site for site, _ in found]
        self._calls = {site.path: calls for site, calls in found}
        self._position = {site.path: i for i, site in enumerate(self.sites)}
        self._modules = {path: type(m).__name__ for path, m in modules(model).items()}
        self._settled: set[Path] = set()
        self._next = 0
        self.original = Execution(self._graph, chunks)
        self.compressed = Execution(self._graph, chunks)

    def find(self, path: Path | str) -> LayerSite | Skipped:
        """The layer at a path, any of its paths if it is shared, or why it is none.

        Args:
            path: as a tuple, or as one string with "/" between the parts.

        Raises:
            ValueError: the network has no such module.
        """
        name = path if isinstance(path, str) else path_name(path)
        for entry in (*self.sites, *(s for s in self.skipped if s.path in self._modules)):
            paths = entry.homes if isinstance(entry, LayerSite) else (entry.path,)
            if name in map(path_name, paths):
                return entry
        for known, kind in self._modules.items():
            if name == path_name(known):
                return Skipped(known, kind, "not a convolution or dense layer")
        layers = ", ".join(site.name for site in self.sites)
        raise ValueError(f"path: the network has no module {name!r}; layers are: {layers}")

    def input_shape(self, site: LayerSite) -> tuple[int, ...]:
        """Shape of what one call of the layer sees of one batch: the rows of x, its spatial axes, its channels."""
        self._check(site)
        return tuple(self._graph.avals[self._calls[site.path][0].x].shape)

    def output_spatial(self, site: LayerSite) -> tuple[int, ...]:
        """The shape of one image of the layer's output, without the channels."""
        self._check(site)
        return self._graph.avals[self._calls[site.path][0].epilogue.output].shape[1:-1]

    def observe(self, site: LayerSite) -> Observation:
        """What the layer sees in the network compressed so far, and what the original makes of it.

        Earlier sites that were neither replaced nor kept count as kept from here on.

        Raises:
            ValueError: the site, or one after it, was observed before, or it was replaced or kept already.
        """
        position = self._check(site)
        if position < self._next or site.path in self._settled:
            raise ValueError(
                f"site: {site.name!r} is observed out of execution order; observe before replacing, in order"
            )
        self._next = position + 1
        self._settled.update(s.path for s in self.sites[:position])
        calls = self._calls[site.path]
        shapes = [self._graph.avals[v].shape for v in (calls[0].x, calls[0].epilogue.output)]
        per_image = shapes[1][0] // self._batch_size
        x, response, offset = (
            np.empty((len(calls), self.num_images * per_image, *s[1:]), np.float32) for s in (*shapes, shapes[1])
        )
        self._collect_original(calls, response)
        self._collect_compressed(calls, x, offset)
        index = np.tile(np.repeat(np.arange(self.num_images), per_image), len(calls))

        def rows(a: np.ndarray) -> np.ndarray:
            return a.reshape(-1, *a.shape[2:])

        return Observation(rows(x), rows(response), rows(offset) if site.has_offset else None, index)

    def replace(self, site: LayerSite, matrix: Float[Any, "n p"], bias: Float[Any, " n"]) -> None:
        """From now on the compressed network has z = x matrix' + bias here: scale and shift are contained in them.

        Channels that the network itself multiplies by zero afterwards (`outer_scale`) stay at `outer_shift`, which is
        all that a replacement module can reach.

        Raises:
            ValueError: the matrix or bias does not fit, or the layer was replaced or kept before.
        """
        self._settle(site)
        shape = site.geometry.matrix_shape
        if matrix.shape != (shape.n, shape.p) or bias.shape != (shape.n,):
            self._settled.discard(site.path)
            raise ValueError(
                f"matrix, bias: shapes {matrix.shape}, {bias.shape} do not fit layer {site.name!r};"
                f" ({shape.n}, {shape.p}) and ({shape.n},) do"
            )
        alive = site.outer_scale != 0
        kernel = jnp.asarray(np.asarray(matrix) * alive[:, None], jnp.float32)
        kernel = kernel.T.reshape(*shape.window, shape.c_in, shape.n)
        constant = jnp.asarray(np.where(alive, np.asarray(bias), site.outer_shift), jnp.float32)
        for call in self._calls[site.path]:
            function = partial(_layer, call, self._graph.avals[call.epilogue.z], kernel, constant)
            self.compressed.override(call.epilogue.z, call.x, function)

    def keep(self, site: LayerSite) -> None:
        """Leave the layer as it is.

        Raises:
            ValueError: the layer was replaced or kept before.
        """
        self._settle(site)

    def outputs(self) -> tuple[Any, Any]:
        """The outputs of the original network and of the network compressed so far, on all calibration images.

        Each leaf is a NumPy array with the batches' values one after the other, as the network nests them; a leaf
        whose first axis does not run over images has the batches on a new first axis.
        """
        targets = self._graph.outputs
        original = self.original.compute(targets, self._later_original(self._next))
        compressed = self.compressed.compute(targets, self._later_compressed(), self._volatile())
        sizes = self._batch_size, self.num_images
        return _join(self._graph, original, *sizes), _join(self._graph, compressed, *sizes)

    def _check(self, site: LayerSite) -> int:
        position = self._position.get(site.path)
        if position is None or self.sites[position] is not site:
            raise ValueError(f"site: {site.name!r} is not one of this capture's sites")
        return position

    def _settle(self, site: LayerSite) -> None:
        self._check(site)
        if site.path in self._settled:
            raise ValueError(
                f"site: {site.name!r} was replaced or kept already (or a later layer was observed, which keeps it)"
            )
        self._settled.add(site.path)

    def _unsettled_calls(self) -> list[Call]:
        return [c for s in self.sites if s.path not in self._settled for c in self._calls[s.path]]

    def _later_original(self, position: int) -> list[int]:
        sites = self.sites[position:]
        return [*self._graph.outputs, *(c.epilogue.h for s in sites for c in self._calls[s.path])]

    def _later_compressed(self) -> list[int]:
        values = [v for c in self._unsettled_calls() for v in (c.x, *(o for o, _ in c.epilogue.offsets))]
        return [*self._graph.outputs, *values]

    def _volatile(self) -> set[int]:
        """What depends on layers that may still be replaced."""
        return self.compressed.dependents([c.epilogue.output for c in self._unsettled_calls()])

    def _collect_original(self, calls: Sequence[Call], response: np.ndarray) -> None:
        targets = [c.epilogue.h for c in calls]
        for k, values in enumerate(self.original.compute(targets, self._later_original(self._next))):
            for i, call in enumerate(calls):
                self._store(response[i], k, values[call.epilogue.h])

    def _collect_compressed(self, calls: Sequence[Call], x: np.ndarray, offset: np.ndarray) -> None:
        targets = {v for c in calls for v in (c.x, *(o for o, _ in c.epilogue.offsets))}
        for k, values in enumerate(self.compressed.compute(targets, self._later_compressed(), self._volatile())):
            for i, call in enumerate(calls):
                self._store(x[i], k, values[call.x])
                if len(calls) > 1 or call.epilogue.offsets:
                    zero = np.zeros(self._graph.avals[call.epilogue.h].shape, np.float32)
                    terms = (np.asarray(values[o], np.float32) * sign for o, sign in call.epilogue.offsets)
                    self._store(offset[i], k, sum(terms, zero))

    def _store(self, out: np.ndarray, chunk: int, value: Any) -> None:
        """Write one chunk's rows to their place; the rows of padding images are dropped."""
        per_image = len(out) // self.num_images
        start = chunk * self._batch_size * per_image
        part = out[start : start + self._batch_size * per_image]
        # Between a layer's output and its response only reshapes happen that keep the order of the rows.
        part[...] = np.asarray(value).reshape(-1, *out.shape[1:])[: len(part)]


def _join(graph: Graph, chunks: Iterable[Any], batch_size: int, num_images: int) -> Any:
    """The outputs of all chunks, one after the other, without the padding images."""
    parts = [[np.asarray(values[v]) for v in graph.outputs] for values in chunks]
    leaves = []
    for leaf in zip(*parts, strict=True):
        rows = leaf[0].shape[0] if leaf[0].ndim else 0
        if rows and rows % batch_size == 0:
            leaves.append(np.concatenate(leaf)[: num_images * (rows // batch_size)])
        else:
            leaves.append(np.stack(leaf))
    return jax.tree.unflatten(graph.out_tree, leaves)


def _layer(call: Call, z: Any, kernel: Float[Array, "..."], bias: Float[Array, " n"], x: Array) -> Array:
    """The replaced layer: the convolution or product that the network does, then the new bias; shaped as z."""
    dtype = call.op.params.get("preferred_element_type") or x.dtype
    out = call.op.function(x, kernel.astype(x.dtype))[0] + bias.astype(dtype)
    return out.reshape(z.shape).astype(z.dtype)


def _check_batches(batches: Sequence[Any]) -> tuple[list[list[Array]], Any, list[int]]:
    """The leaves of each batch, padded to the first one's size, how they nest, and the number of images of each."""
    if not batches:
        raise ValueError("batches: empty; give at least one tuple of arguments")
    for batch in batches:
        if not isinstance(batch, tuple) or not jax.tree.leaves(batch):
            raise ValueError(f"batches: each must be a tuple of arguments, got {type(batch).__name__}; write (images,)")
    tree = jax.tree.structure(batches[0])
    chunks, sizes = [], []
    for k, batch in enumerate(batches):
        leaves = [jnp.asarray(a) for a in jax.tree.leaves(batch)]
        lengths = {a.shape[:1] for a in leaves}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                f"batches: the first axes of batch {k}'s arrays must all run over the same images, got"
                f" {sorted(lengths)}; give other arguments through `call`"
            )
        sizes.append(leaves[0].shape[0])
        shapes = [(a.shape[1:], a.dtype) for a in leaves]
        if jax.tree.structure(batch) != tree or (k and shapes != [(a.shape[1:], a.dtype) for a in chunks[0]]):
            raise ValueError(f"batches: batch {k} differs from the first in structure, shapes or dtypes")
        if sizes[k] > sizes[0] or (sizes[k] < sizes[0] and k < len(batches) - 1):
            raise ValueError(
                f"batches: batch {k} has {sizes[k]} images, the first {sizes[0]}; only the last may have fewer"
            )
        missing = sizes[0] - sizes[k]
        chunks.append([jnp.concatenate([a, jnp.repeat(a[-1:], missing, axis=0)]) if missing else a for a in leaves])
    return chunks, tree, sizes
