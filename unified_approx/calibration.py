"""Calibration data in any of the forms users have it, as equal batches on the host."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

Batch = PyTree[np.ndarray]
Given = PyTree[Shaped[np.ndarray | Array, "..."]]


def _leading(tree: Given) -> int:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError("calibration: a batch holds no arrays; give an array, or batches of arrays")
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"calibration: the arrays of a batch have different first axes ({sorted(map(str, sizes))}); "
            "the first axis must count the examples in all of them"
        )
    return sizes.pop()  # type: ignore[return-value]


def _checked(leaf: Any, index: int) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype == object:
        raise ValueError(f"calibration: array {index} has dtype object; give numeric arrays")
    if np.issubdtype(array.dtype, np.floating):
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise ValueError(f"calibration: array {index} holds {bad} NaN or infinite values; clean the data first")
        if array.dtype == np.float64:
            array = array.astype(np.float32)
    return array


def gather(calibration: PyTree | Iterable[PyTree] | Callable[[], Iterable[PyTree]]) -> Batch:
    """All examples as one pytree of NumPy arrays.

    Args:
        calibration: an array; a dict or tuple of arrays with one example axis; a list, generator or other iterable of
            such batches; or a function that returns one.

    Raises:
        ValueError: empty, ragged, not numeric, or not finite.
    """
    data = calibration() if callable(calibration) else calibration
    is_single = hasattr(data, "shape") or isinstance(data, dict | tuple)
    batches = [data] if is_single else list(data)  # type: ignore[arg-type]
    if not batches:
        raise ValueError("calibration: no batches; give at least one example")
    first = jax.tree.structure(batches[0])
    for i, batch in enumerate(batches):
        _leading(batch)
        if jax.tree.structure(batch) != first:
            raise ValueError(f"calibration: batch {i} is structured as {jax.tree.structure(batch)}, batch 0 as {first}")
    columns = [
        np.concatenate([np.asarray(leaf) for leaf in column])
        for column in zip(*map(jax.tree.leaves, batches), strict=True)
    ]
    arrays = [_checked(column, i) for i, column in enumerate(columns)]
    if len(arrays[0]) == 0:
        raise ValueError("calibration: it is empty (0 examples); give at least one example")
    return jax.tree.unflatten(first, arrays)


def count(data: Given) -> int:
    """Number of examples."""
    return _leading(data)


def split(data: Batch, size: int) -> list[Batch]:
    """Consecutive batches of `size` examples; the last may be smaller."""
    total = count(data)
    starts = range(0, total, size)
    return [jax.tree.map(lambda a, i=i: a[i : i + size], data) for i in starts]
