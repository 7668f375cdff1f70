"""Layers that note what they see, in a network that takes a push at their outputs: derivatives layer by layer.

The derivative with respect to the push is the derivative at the layer's output; with the layer's input it gives the
gradient of every single example with respect to the layer's parameters. Probes are NNX modules, so they work inside
`nnx.jit` and `nnx.remat`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from solvers.example_gradients import PAIRS_UP_TO, sum_of_squares_by_pairs, sum_of_squares_one_by_one
from unified_approx.assemble import homes, modules, put
from unified_approx.im2col import Geometry, patches
from unified_approx.layers import geometry_of
from unified_approx.sites import Path

INNER = "layer"


class Seen(nnx.Variable):
    """What a probe saw."""


class Push(nnx.Variable):
    """What a probe adds to its layer's output: zeros."""


class Probe(nnx.Module):
    """Stands in for a layer and computes the same."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.seen, self.push = Seen(jnp.zeros(())), Push(jnp.zeros(()))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """What the layer gives, plus the push."""
        y = self.layer(x, *args, **kwargs) + self.push[...]
        self.seen.set_value(_normalized(self.layer, x) if isinstance(self.layer, nnx.BatchNorm) else x)
        self.push.set_value(jnp.zeros_like(y))  # of the shape that a push must have, for whoever asks first
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "__dict__")[INNER], name)


def _normalized(norm: nnx.BatchNorm, x: Array) -> Array:
    return (x - norm.mean[...]) * jax.lax.rsqrt(norm.var[...] + norm.epsilon)


@dataclass(frozen=True)
class Site:
    """A layer with a probe.

    Attributes:
        path: of the layer in the network without probes.
        geometry: of a dense layer or convolution; None for a batch norm.
        vectors: names of its parameters with one value a channel: the bias, a batch norm's scale.
    """

    path: Path
    geometry: Geometry | None
    vectors: tuple[str, ...]

    @property
    def kernel(self) -> Path | None:
        """Path of the kernel, if there is one."""
        return None if self.geometry is None else (*self.path, "kernel")

    @property
    def parameters(self) -> tuple[Path, ...]:
        """Paths of all parameters."""
        return (*(() if self.kernel is None else (self.kernel,)), *((*self.path, name) for name in self.vectors))


def find_sites(model: nnx.Module) -> tuple[Site, ...]:
    """The layers that a probe understands: dense, convolutional without groups, batch norms; each in one place only."""
    found = []
    for path, module in modules(model).items():
        site = _site(path, module)
        if site is not None and path and len(homes(model, path)) == 1:
            found.append(site)
    return tuple(found)


def _site(path: Path, module: Any) -> Site | None:
    vectors = tuple(name for name in ("scale", "bias") if isinstance(getattr(module, name, None), nnx.Variable))
    if type(module) is nnx.BatchNorm:
        return Site(path, None, vectors) if vectors and module.mean is not None else None
    if type(module) not in (nnx.Conv, nnx.Linear):
        return None
    try:
        geometry = geometry_of(module)
    except ValueError:
        return None
    whole = module.kernel.shape == (*geometry.window, geometry.c_in, geometry.c_out)
    return Site(path, geometry, vectors) if whole else None


def with_probes(model: nnx.Module, sites: tuple[Site, ...]) -> nnx.Module:
    """A copy of the network with probes in place of these layers."""
    new = nnx.clone(model)
    for site, layer in [(site, modules(new)[site.path]) for site in sites]:
        put(new, site.path, Probe(layer))
    return new


def strip(path: Path, sites: tuple[Site, ...]) -> Path:
    """A parameter's path in the network without probes."""
    for site in sites:
        n = len(site.path)
        if path[:n] == site.path and path[n : n + 1] == (INNER,):
            return (*site.path, *path[n + 1 :])
    return path


def rows_of(site: Site, x: Float[Array, "b ..."]) -> Float[Array, "b s p"]:
    """The inputs that each output position sees."""
    assert site.geometry is not None
    rows = patches(x, site.geometry) if site.geometry.window else x
    return rows.reshape(x.shape[0], -1, rows.shape[-1])


def squares(
    site: Site, batch: int, seen: Float[Array, "..."], delta: Float[Array, "..."], *, kernel: bool = True
) -> dict[Path, Float[Array, "..."]]:
    """Squared gradients of the parameters, summed over the examples.

    Args:
        site: the layer.
        batch: number of examples: the first axis of `seen` and `delta` counts them, alone or as the slower part.
        seen: what the probe noted.
        delta: derivatives at the layer's output.
        kernel: whether that of the kernel is wanted.
    """
    derivatives = delta.reshape(batch, -1, delta.shape[-1])
    noted = seen.reshape(batch, -1, *seen.shape[1:])
    found: dict[Path, Array] = {}
    for name in site.vectors:
        terms = derivatives if name == "bias" else derivatives * noted.reshape(derivatives.shape)
        found[(*site.path, name)] = jnp.sum(jnp.sum(terms, axis=1) ** 2, axis=0)
    if site.geometry is not None and kernel:
        found[(*site.path, "kernel")] = _squared_kernel(site, noted, derivatives)
    return found


def _squared_kernel(
    site: Site, noted: Float[Array, "b m ..."], delta: Float[Array, "b s n"]
) -> Float[Array, "*window c_in n"]:
    assert site.geometry is not None

    def rows(x: Array) -> Array:
        found = rows_of(site, x)
        return found.reshape(-1, found.shape[-1])

    if delta.shape[1] <= PAIRS_UP_TO:
        total = sum_of_squares_by_pairs(jax.vmap(rows)(noted), delta)
    else:
        total = sum_of_squares_one_by_one(noted, delta, rows)
    return total.reshape(*site.geometry.window, site.geometry.c_in, site.geometry.c_out)
