"""The network with any one layer's matrix exchanged, in one compiled forward pass."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from unified_approx.distances import floating, is_logits, output_distance
from unified_approx.sites import Path
from unified_approx.tiny import as_products

Flat = Mapping[tuple[Any, ...], Any]


@partial(jax.jit, static_argnums=(0, 1))
def _forward(call: Callable[..., Any], graphdef: Any, state: Any, batch: Any) -> Any:
    return as_products(lambda state, batch: call(nnx.merge(graphdef, state), batch))(state, batch)


_distance = jax.jit(output_distance)


@partial(jax.jit, static_argnums=(0, 1))
def _derivative(call: Callable[..., Any], graphdef: Any, flat: Any, change: Any, batch: Any) -> list[Array]:
    """Derivative of the floating outputs along a change of the variables."""

    def outputs(values: Any) -> list[Array]:
        state = nnx.from_flat_state({key: v.replace(values[key]) if key in values else v for key, v in flat.items()})
        return floating(call(nnx.merge(graphdef, state), batch))

    base = {key: flat[key][...] for key in change}
    return jax.jvp(as_products(outputs), (base,), (change,))[1]


@jax.jit
def _metric(reference: Array, along: Array) -> Float[Array, ""]:
    """Second-order term of `_distance`."""
    if is_logits(reference):
        p = jax.nn.softmax(reference)
        return jnp.sum(0.5 * (jnp.sum(p * along**2, axis=1) - jnp.sum(p * along, axis=1) ** 2))
    return _distance(reference, reference + along)


class Probe:
    """The folded network, every layer a dense kernel and a bias, on a few batches of examples."""

    def __init__(self, model: nnx.Module, batches: Iterable[PyTree], call: Callable[..., Any]):
        """Run the network as it is, for reference.

        Args:
            model: every layer that will be exchanged is a `Factored` of one dense term, in evaluation mode.
            batches: examples, all of one size.
            call: how the network is called.
        """
        self._graphdef, state = nnx.split(model)
        self._flat: dict[tuple[Any, ...], Any] = dict(nnx.to_flat_state(state))
        self._call = call
        self._batches = [jax.device_put(batch) for batch in batches]
        self._count = sum(np.shape(jax.tree.leaves(batch)[0])[0] for batch in self._batches)
        self._reference = [self._outputs(self._flat, batch) for batch in self._batches]

    def _outputs(self, flat: Flat, batch: PyTree) -> list[Array]:
        state = nnx.from_flat_state(flat)
        return floating(_forward(self._call, self._graphdef, state, batch))

    def loss(self, path: Path, layer: nnx.Module) -> float:
        """Mean distance of the outputs from the reference's, in nats, with `layer` at `path`."""
        own = {(*path, *key): value for key, value in nnx.to_flat_state(nnx.state(layer))}
        missing = set(own) - set(self._flat)
        if missing:
            raise ValueError(f"path: {path} holds no layer of this structure (no variable {sorted(missing)[0]})")
        flat = {**self._flat, **own}
        total = 0.0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            out = self._outputs(flat, batch)
            total += float(sum(_distance(a, b) for a, b in zip(reference, out, strict=True)))
        return total / self._count

    def fisher(self, path: Path, layer: nnx.Module) -> float:
        """The same to second order: half of the change of the weights in the metric of the Fisher information.

        J is the derivative of the logits along the change, p the original's probabilities: the mean of
        1/2 (sum_c p_c J_c^2 - (sum_c p_c J_c)^2), from one forward-mode pass. Outputs that are no logits count the
        relative square of J.
        """
        own = {(*path, *key): value for key, value in nnx.to_flat_state(nnx.state(layer))}
        change = {
            key: own[key][...] - value[...] if key in own else jnp.zeros_like(value[...])
            for key, value in self._flat.items()
            if jnp.issubdtype(value[...].dtype, jnp.floating)
        }
        total = 0.0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            along = _derivative(self._call, self._graphdef, self._flat, change, batch)
            total += float(sum(_metric(a, j) for a, j in zip(reference, along, strict=True)))
        return total / self._count
