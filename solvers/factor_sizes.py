"""What factored forms hold and cost, exactly, and the largest ranks that a limit allows.

A form is a chain of factors. Its cost is a weighted sum of their sizes: with weights of 1 the stored values, with the
output positions of each factor the multiply-adds. Ranks are (r,), for Tucker-2 (outputs, inputs).
"""

from collections.abc import Sequence
from math import prod

import numpy as np
from jaxtyping import Float

from solvers.terms import MatrixShape

FACTORED = ("low_rank", "spatial", "tucker2", "cp3", "cp4")
Ranks = tuple[int, ...]


def refusal(form: str, shape: MatrixShape) -> str:
    """Why a layer cannot take a form; empty if it can.

    Raises:
        ValueError: no such form.
    """
    if form not in FACTORED:
        raise ValueError(f"form: {form!r} is not a factored form; choose one of {', '.join(FACTORED)}")
    if form == "low_rank":
        return ""
    if prod(shape.window) < 2:
        return f"its window {shape.window} has one place: low_rank is all that {form} can be"
    if form in ("spatial", "cp4") and len(shape.window) != 2:
        return f"its window {shape.window} has no height and width, which {form} separates"
    return ""


def factor_sizes(form: str, shape: MatrixShape, ranks: Ranks) -> tuple[int, ...]:
    """Stored values of each factor, in the order in which they run."""
    n, c, places = shape.n, shape.c_in, prod(shape.window)
    r = ranks[0]
    if form == "tucker2":
        r_out, r_in = ranks
        return (r_in * c, r_out * places * r_in, n * r_out)
    if form == "low_rank":
        return (r * shape.p, n * r)
    if form == "spatial":
        return (r * shape.window[1] * c, n * shape.window[0] * r)
    return (r * c, *(r * size for size in ((places,) if form == "cp3" else shape.window)), n * r)


def cost(form: str, shape: MatrixShape, ranks: Ranks, weights: Sequence[float] | None = None) -> float:
    """The weighted sum of the factors' sizes; stored values without weights."""
    sizes = factor_sizes(form, shape, ranks)
    return float(sum(sizes) if weights is None else sum(w * s for w, s in zip(weights, sizes, strict=True)))


def full_ranks(form: str, shape: MatrixShape) -> Ranks:
    """The ranks at which nothing is lost; for CP, where there is no such bound, the last below the dense size."""
    if form == "tucker2":
        return (shape.n, shape.c_in)
    if form == "low_rank":
        return (min(shape.n, shape.p),)
    if form == "spatial":
        return (min(shape.n * shape.window[0], shape.window[1] * shape.c_in),)
    return (max(1, (shape.n * shape.p - 1) // int(cost(form, shape, (1,)))),)


def check_ranks(form: str, shape: MatrixShape, ranks: Ranks) -> None:
    """Raise a ValueError unless the form takes the layer and the ranks are within [1, full].

    CP has no largest rank: more components than values are refused.
    """
    reason = refusal(form, shape)
    if reason:
        raise ValueError(f"ranks: {form} does not fit the layer: {reason}")
    most = (shape.p,) if form.startswith("cp") else full_ranks(form, shape)
    if len(ranks) != len(most) or any(not 1 <= r <= m for r, m in zip(ranks, most, strict=True)):
        expected = "(outputs, inputs)" if form == "tucker2" else "(rank,)"
        raise ValueError(f"ranks: {ranks} for {form}; give {expected}, each at least 1 and at most {most}")


def largest_ranks(
    form: str,
    shape: MatrixShape,
    limit: float,
    tails: tuple[Float[np.ndarray, " outputs_1"], Float[np.ndarray, " inputs_1"]],
    weights: Sequence[float] | None = None,
) -> Ranks | None:
    """The ranks of most use whose cost is at most `limit`, None if not even ranks of 1 fit.

    Args:
        form: of `FACTORED`.
        shape: of the layer.
        limit: on the cost.
        tails: for Tucker-2, energies that are lost with each number of outputs and of inputs: of all pairs that cannot
            grow any more, the one that loses least is taken (the bound of the higher-order SVD).
        weights: of the factors' sizes.
    """
    if form != "tucker2":
        most = full_ranks(form, shape)[0]
        rank = min(int(limit // cost(form, shape, (1,), weights)), most)
        return (rank,) if rank >= 1 else None
    n, c, places = shape.n, shape.c_in, prod(shape.window)
    w = (1.0, 1.0, 1.0) if weights is None else weights
    inputs = np.arange(1, c + 1)
    outputs = np.floor((limit - w[0] * c * inputs) / (w[1] * places * inputs + w[2] * n))
    outputs = np.minimum(outputs, n).astype(int)
    fits = np.flatnonzero(outputs >= 1)
    if not len(fits):
        return None
    lost = tails[0][outputs[fits]] + tails[1][inputs[fits]]
    best = fits[int(np.argmin(lost))]
    return int(outputs[best]), int(inputs[best])


def mode_tails(
    tensor: Float[np.ndarray, "n places c_in"],
) -> tuple[Float[np.ndarray, " outputs_1"], Float[np.ndarray, " inputs_1"]]:
    """Energy left out of the tensor by its leading 0, 1, ... directions of outputs, and of inputs."""
    n, _, c = tensor.shape
    rows, columns = tensor.reshape(n, -1), tensor.reshape(-1, c)
    return tail(np.linalg.eigvalsh(rows @ rows.T)), tail(np.linalg.eigvalsh(columns.T @ columns))


def tail(squares: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m_1"]:
    """Sums of all but the largest 0, 1, ..., m of the values; negative ones are rounding."""
    kept = np.sort(np.maximum(squares, 0))
    return np.concatenate([np.zeros(1), np.cumsum(kept)])[::-1]
