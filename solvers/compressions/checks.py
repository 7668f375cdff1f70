"""Arguments of compressions."""

from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers.terms import MatrixShape

FLOAT16_LARGEST = 65504.0


def check_amount(name: str, value: int | float, what: str) -> None:
    """Raise a ValueError for what is neither a number nor a fraction of `what`."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 <= value <= 1):
        raise ValueError(f"{name}: {value!r} is no number of {what}; give a whole number >= 0, or a fraction up to 1.0")


def count_of(name: str, amount: int | float, total: int, what: str) -> int:
    """A number of `what`, given as such or as a fraction of `total`.

    Raises:
        ValueError: more than there are.
    """
    count = amount if isinstance(amount, int) else round(amount * total)
    if count > total:
        raise ValueError(f"{name}: {count} of {total} {what}; give at most that many")
    return count


def check_weight(name: str, value: float) -> None:
    """Raise a ValueError for a negative number, infinity or NaN."""
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {value!r}; give a finite number >= 0")


def is_whole(value: Any) -> bool:
    """Whether it is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError for what is no whole number of at least that size."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name}: {value!r}; give a whole number of at least {least}")


def check_exponents(**named: int) -> None:
    """Raise a ValueError for a power of two that is no whole number, or beyond float32."""
    for name, value in named.items():
        if not is_whole(value) or abs(value) > 126:
            raise ValueError(f"{name}: {value!r}; give a whole number from -126 to 126")


def check_numbers(name: str, values: tuple[float, ...]) -> None:
    """Raise a ValueError for what are not all finite numbers."""
    wrong = [value for value in values if not isinstance(value, Real) or not isfinite(value)]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]!r} is no finite number")


def check_matrix(what: str, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> None:
    """Raise a ValueError for weights that are not those of one layer as a matrix."""
    if target.ndim == 2 and len(layers) == 1:
        return
    if len(layers) == 1 and layers[0].n == 1:
        raise ValueError(
            f"{what} needs one matrix, not a vector of {target.size} numbers such as a bias; name the layer in place "
            "of its bias, or give a form for single weights, such as PruneL0"
        )
    raise ValueError(f"{what} needs one matrix, not a vector of {len(layers)} layers; give view='matrix', or Each")


def check_float_format(name: str, bits: int) -> None:
    """Raise a ValueError for what is not a floating-point format."""
    if bits not in (16, 32):
        raise ValueError(f"{name}: {bits!r} bits a value; give 32, or 16 for float16")


def check_fits(bits: int, target: Float[ArrayLike, "..."]) -> None:
    """Raise a ValueError for weights that are too large for the floating-point format."""
    largest = float(np.max(np.abs(np.asarray(target)), initial=0))
    if bits == 16 and largest > FLOAT16_LARGEST:
        raise ValueError(f"float16: the largest weight is {largest:g}, the format ends at 65504; give 32 bits a value")


def check_k(k: int) -> None:
    """Raise a ValueError for what is not a size of a codebook."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: {k!r} values; give a whole number >= 1")


def check_distinct(k: int, values: Float[ArrayLike, "..."]) -> None:
    """Raise a ValueError for a codebook of more values than there are distinct weights."""
    distinct = len(np.unique(np.asarray(values)))
    if k > distinct:
        raise ValueError(f"k: {k} values for weights of which {distinct} are distinct; give at most that many")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError for an unknown word."""
    if value not in known:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)}")
