"""From a fitted matrix and its features to exact-size Tucker-2 and CP terms, in float64 on the host."""

import numpy as np
from jaxtyping import Array, Float

from solvers.extract import RANK_TOLERANCE, checked, leading_svd, require_structure
from solvers.tensor_terms import Cp3, Cp4, Tucker2
from solvers.terms import MatrixShape, Term


def extract_tucker2(
    m: Float[np.ndarray | Array, "n p"], first: Float[np.ndarray | Array, "r_in c_in"], rank: int, shape: MatrixShape
) -> tuple[Term, ...]:
    """The term of a matrix whose features are every place of the window times the rows of `first`.

    Neighbouring factors get equal norms, channel by channel. Directions that the matrix does not use are left out.

    Args:
        m: (n, p), of rank `rank` at most.
        first: the inner factor, in any basis.
        rank: channels after the core.
        shape: of the layer.

    Returns:
        One `Tucker2`, none for a matrix of zeros.

    Raises:
        ValueError: m is not finite or not of this structure.
    """
    matrix = checked(m)
    if not matrix.any():
        return ()
    inner = np.linalg.qr(np.asarray(first, np.float64).T)[0].T
    n, few = shape.n, matrix.reshape(shape.n, -1, shape.c_in) @ inner.T
    u, s, v = leading_svd(few.reshape(n, -1), rank)
    kept = min(rank, int(np.sum(s > RANK_TOLERANCE * s[0])))
    root = np.sqrt(s[:kept])
    core = (root[:, None] * v[:kept]).reshape(kept, -1, len(inner))
    norms = np.linalg.norm(core, axis=(0, 1))
    live = norms > RANK_TOLERANCE * norms.max()
    balance = np.sqrt(norms[live])
    term = Tucker2(
        (inner[live] * balance[:, None]).astype(np.float32),
        (core[:, :, live] / balance).astype(np.float32),
        (u[:, :kept] * root).astype(np.float32),
    )
    require_structure(matrix, [term], shape)
    return (term,)


def extract_cp(
    m: Float[np.ndarray | Array, "n p"], factors: tuple[Float[np.ndarray | Array, "r _"], ...], shape: MatrixShape
) -> tuple[Term, ...]:
    """The term of a matrix whose features are the row-wise products of the factors, components of equal norms.

    Args:
        m: (n, p), a combination of the features.
        factors: (filters, first) for `Cp3`, (height, width, first) for `Cp4`, one row per component.
        shape: of the layer.

    Returns:
        One term, none for a matrix of zeros.

    Raises:
        ValueError: m is not finite or not of this structure.
    """
    matrix = checked(m)
    if not matrix.any():
        return ()
    rows = [np.asarray(f, np.float64) for f in factors]
    features = rows[0]
    for factor in rows[1:]:
        features = (features[:, :, None] * factor[:, None, :]).reshape(len(features), -1)
    scale = np.linalg.norm(features, axis=1)
    live = scale > 0
    last = np.zeros((shape.n, len(features)))
    unit = features[live] / scale[live, None]
    # Components may be nearly the same: the shortest combination of them.
    last[:, live] = np.linalg.lstsq(unit.T, matrix.T, rcond=1e-10)[0].T / scale[live]
    live &= last.any(axis=0)
    parts = [last.T[live], *(f[live] for f in rows)]
    norms = [np.linalg.norm(f, axis=1, keepdims=True) for f in parts]
    mean = np.prod(norms, axis=0) ** (1 / len(parts))
    outer, *others = ((f * mean / norm).astype(np.float32) for f, norm in zip(parts, norms, strict=True))
    ends = {"first": others[-1], "last": np.ascontiguousarray(outer.T)}
    term = Cp3(middle=others[0], **ends) if len(others) == 2 else Cp4(height=others[0], width=others[1], **ends)
    require_structure(matrix, [term], shape)
    return (term,)
