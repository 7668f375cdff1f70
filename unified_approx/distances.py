"""How far a network's output is from a reference's, as a sum over the examples of a batch."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


def floating(outputs: PyTree) -> list[Array]:
    """The outputs that have a distance: the floating leaves."""
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def divergence(
    reference: Float[Array, "batch classes"], logits: Float[Array, "batch classes"], temperature: float = 1.0
) -> Float[Array, ""]:
    """Sum of T^2 KL(softmax(reference / T) || softmax(logits / T)), in nats; Hinton et al. (2015)."""
    t = temperature
    each = optax.kl_divergence(jax.nn.log_softmax(logits / t), jax.nn.softmax(reference / t))
    return t * t * jnp.sum(each)


def relative_gap(reference: Float[Array, "batch ..."], out: Float[Array, "batch ..."]) -> Float[Array, ""]:
    """Sum of ||reference - out||^2 / ||reference||^2 per example (absolute where the reference is zero)."""
    axes = tuple(range(1, reference.ndim))
    energy = jnp.sum(reference * reference, axis=axes)
    return jnp.sum(jnp.sum((reference - out) ** 2, axis=axes) / jnp.where(energy > 0, energy, 1))


def is_logits(reference: Float[Array, "batch ..."]) -> bool:
    """Whether an output is taken for logits: (batch, classes) with at least two classes."""
    return reference.ndim == 2 and reference.shape[1] > 1


def output_distance(
    reference: Float[Array, "batch ..."], out: Float[Array, "batch ..."], temperature: float = 1.0
) -> Float[Array, ""]:
    """`divergence` for logits, `relative_gap` for any other output."""
    return divergence(reference, out, temperature) if is_logits(reference) else relative_gap(reference, out)
