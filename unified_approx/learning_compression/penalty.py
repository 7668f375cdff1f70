"""What an L step adds to the loss."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.pieces import Piece, parameters_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalty:
    """mu/2 sum ||w - target||^2 over the compressed parameters. A pytree: another step compiles nothing.

    Attributes:
        mu: its weight.
        targets: Delta(theta) + dual / mu, as each piece's compression sees it.
        pieces: which parameters; static.
    """

    mu: Float[Array, ""]
    targets: tuple[Float[Array, "..."], ...]
    pieces: tuple[Piece, ...] = field(metadata={"static": True})

    def __call__(self, model: nnx.Module) -> Float[Array, ""]:
        """At a network's parameters; differentiable."""
        values = parameters_of(model)
        # Parameter by parameter: targets are taken apart once, outside of the loop, where weights would be joined in
        # every step.
        wanted = (piece.unpack(target) for piece, target in zip(self.pieces, self.targets, strict=True))
        gaps = (jnp.sum((values[path] - value) ** 2) for own in wanted for path, value in own.items())
        return self.mu / 2 * sum(gaps, start=jnp.zeros(()))
