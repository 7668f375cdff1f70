from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def strict_double_precision() -> Iterator[None]:
    """Float64, no implicit change of dtype or rank. A test of float32 switches back with `jax.enable_x64(False)`."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
