"""Initial weights drawn with NumPy: an eager Flax initialiser compiles one program per layer shape, which is slow."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def he_normal(make: Callable[[], M], seed: int = 0) -> M:
    """Build a network with He-normal kernels, N(0, 2 / fan_in), without running its own initialisers.

    Every other parameter and statistic starts from what its name says: 1 for `scale` and `var`, else 0.

    Args:
        make: builds the network, every parameter an `nnx.Param` or `nnx.BatchStat`; traced, not run.
        seed: of NumPy's generator; >= 0.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: negative seed.

    Reference: He et al., Delving Deep into Rectifiers (2015), equation 10.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}: give an integer >= 0")
    model = nnx.eval_shape(make)
    rng = np.random.default_rng(seed)

    def draw(name: object, shape: tuple[int, ...]) -> np.ndarray:
        if name == "kernel":
            return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        return np.full(shape, 1.0 if name in ("scale", "var") else 0.0, np.float32)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    filled = [(path, v.replace(jnp.asarray(draw(path[-1], v.shape), v.dtype))) for path, v in flat]
    nnx.update(model, nnx.from_flat_state(filled))
    model.eval()
    return model
