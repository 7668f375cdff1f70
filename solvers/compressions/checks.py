"""Arguments of compressions."""

import numpy as np
from jaxtyping import ArrayLike, Float


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
    """Raise a ValueError for a negative number or NaN."""
    if not value >= 0:
        raise ValueError(f"{name}: {value!r}; give a number >= 0")


def check_float_format(name: str, bits: int) -> None:
    """Raise a ValueError for what is not a floating-point format."""
    if bits not in (16, 32):
        raise ValueError(f"{name}: {bits!r} bits a value; give 32, or 16 for float16")


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
