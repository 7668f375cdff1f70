"""A quadratic model whose Hessian is a Kronecker product: diagonal in a basis of its own.

Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature, section 3; for
convolutions Grosse & Martens (2016): the Hessian of a layer's matrix is close to E[x x'] (x) E[d d'], with x the
layer's inputs and d the derivatives at its outputs. Unlike a diagonal it knows that inputs are correlated, so that the
weights that stay can make up for those that go.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerTaylor:
    """sum g (x - w) + 1/2 sum h (left' (x - w) right)^2, a `solvers.taylor.Quadratic`.

    Attributes:
        w: (p, n), trained weights, inputs first.
        g: (p, n), gradient.
        left: (p, p), eigenvectors on the side of the inputs.
        right: (n, n), on the side of the outputs.
        h: (p, n), eigenvalues, none negative.
    """

    w: Float[Array, "p n"]
    g: Float[Array, "p n"]
    left: Float[Array, "p p"]
    right: Float[Array, "n n"]
    h: Float[Array, "p n"]

    def value(self, w: Float[Array, "p n"]) -> Float[Array, ""]:
        """See `Quadratic.value`."""
        change = w - self.w
        return jnp.sum(self.g * change) + jnp.sum(self.h / 2 * self._rotate(change) ** 2)

    def l_step(self, target: Float[Array, "p n"], mu: Float[ArrayLike, ""]) -> Float[Array, "p n"]:
        """See `Quadratic.l_step`: that of `Taylor`, in the basis."""
        mu = jnp.asarray(mu, self.w.dtype)
        pull = self._rotate(mu * (target - self.w) - self.g)
        return self.w + self.left @ (pull / (self.h + mu)) @ self.right.T

    def minimum(self) -> Float[Array, "p n"]:
        """w - H^-1 g; where h is 0, in the basis, nothing moves."""
        step = jnp.where(self.h > 0, self._rotate(self.g) / jnp.where(self.h > 0, self.h, 1), 0)
        return self.w - self.left @ step @ self.right.T

    def curvature(self) -> Float[Array, "p n"]:
        """The eigenvalues."""
        return self.h

    def damped(self, amount: Float[ArrayLike, ""]) -> "KroneckerTaylor":
        """With a multiple of the identity added to the Hessian."""
        return replace(self, h=self.h + jnp.asarray(amount, self.h.dtype))

    def without_gradient(self) -> "KroneckerTaylor":
        """With g = 0."""
        return replace(self, g=jnp.zeros_like(self.g))

    def _rotate(self, change: Float[Array, "p n"]) -> Float[Array, "p n"]:
        return self.left.T @ change @ self.right


def kronecker(
    w: Float[Array, "p n"], g: Float[Array, "p n"], inputs: Float[Array, "p p"], outputs: Float[Array, "n n"]
) -> KroneckerTaylor:
    """The model with Hessian inputs (x) outputs.

    Args:
        w: trained weights, inputs first.
        g: gradient.
        inputs: E[x x'], positive semidefinite.
        outputs: E[d d'], likewise.
    """
    (a, left), (b, right) = jnp.linalg.eigh(inputs), jnp.linalg.eigh(outputs)
    return KroneckerTaylor(w, g, left, right, jnp.maximum(a, 0)[:, None] * jnp.maximum(b, 0)[None, :])
