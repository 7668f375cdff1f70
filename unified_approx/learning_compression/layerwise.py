"""One layer by the LC algorithm: its L step is the M step of the ADMM core, its C step any compression.

With the sum of `PenaltyGroups` and `PenaltyNuclear`, a constant mu and multipliers this is the alternation of
`solvers.admm` with both parts in one block.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from solvers.compressions import Compression
from solvers.m_step import MajorizeMinimize, MStep
from solvers.reconstruction import LayerProblem, loss, validate
from solvers.terms import MatrixShape
from unified_approx.im2col import kernel_to_matrix
from unified_approx.learning_compression.algorithm import lc
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.result import LcResult, Step
from unified_approx.learning_compression.tasks import Task
from unified_approx.pieces import parameters_of, with_values
from unified_approx.sites import Path


class LayerLStep:
    """An L step that lowers one layer's reconstruction error, for a single task: that layer's kernel as a matrix."""

    def __init__(
        self,
        problem: LayerProblem,
        m_step: MStep = MajorizeMinimize(),  # noqa: B008
        iterations: int = 10,
        path: Path = ("kernel",),
    ):
        """What is computed once.

        Args:
            problem: of the layer.
            m_step: `MajorizeMinimize`, `ExactLinear` or `Sgd`.
            iterations: of the M step in each L step; one is exact for a layer without activation.
            path: of the kernel in the network.

        Raises:
            ValueError: a problem that is not one, an M step that does not fit it, or no iterations.
        """
        validate(problem)
        m_step.check(problem)
        if iterations < 1:
            raise ValueError(f"iterations: {iterations}; give at least 1")
        self._problem, self._m_step, self._iterations, self._path = problem, m_step, iterations, path
        self._prepared = m_step.prepare(problem)

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """See `LStep`."""
        (piece,), (target,) = penalty.pieces, penalty.targets
        m = piece.pack(parameters_of(model))
        arguments = (self._problem, self._prepared, m, target, penalty.mu, jax.random.key(step))
        return with_values(model, piece.unpack(_minimize(self._m_step, self._iterations, *arguments)))

    def measure(self, model: nnx.Module) -> float:
        """The layer's loss, see `solvers.reconstruction`."""
        return float(loss(self._problem, kernel_to_matrix(parameters_of(model)[self._path])))


@partial(jax.jit, static_argnums=(0, 1))
def _minimize(
    m_step: MStep,
    iterations: int,
    problem: LayerProblem,
    prepared: object,
    m: Float[Array, "n p"],
    target: Float[Array, "n p"],
    mu: Float[Array, ""],
    key: Array,
) -> Float[Array, "n p"]:
    mu = mu.astype(m.dtype)
    state = m_step.init(problem, prepared, m, key, mu)
    return lax.fori_loop(0, iterations, lambda _, s: m_step.step(problem, prepared, s, target, mu), state).m


def compress_layer(
    problem: LayerProblem,
    w: Float[Array, "n p"],
    compression: Compression,
    mu_schedule: Sequence[float],
    *,
    shape: MatrixShape | None = None,
    m_step: MStep = MajorizeMinimize(),  # noqa: B008
    iterations: int = 10,
    augmented: bool = True,
    progress: Callable[[Step], None] | None = None,
) -> LcResult:
    """min L(m) + penalty(theta) subject to m = Delta(theta), for one layer.

    Args:
        problem: the layer.
        w: its matrix, where it starts.
        compression: of the matrix.
        mu_schedule: as for `lc`, in the units of the loss; its curvature is about 1 / p for features of equal energy.
        shape: of the layer, for compressions that ask for windows or channels; None: a dense layer.
        m_step: of the L step.
        iterations: of the M step in each L step.
        augmented: keep multipliers.
        progress: called after every step.

    Returns:
        As `lc`; `thetas[0]` is the compressed matrix, `model` a layer with its weights.

    Raises:
        ValueError: as `lc` and `LayerLStep`.
    """
    known = shape or MatrixShape((), w.shape[1], w.shape[0])
    kernel = jnp.asarray(w).T.reshape(*known.window, known.c_in, known.c_out)
    own: nnx.Module = nnx.eval_shape(lambda: _layer(known))
    model = with_values(own, {("kernel",): kernel})
    l_step = LayerLStep(problem, m_step, iterations)
    task = Task(path="kernel", compression=compression)
    return lc(model, [task], l_step, mu_schedule, augmented=augmented, progress=progress)


def _layer(shape: MatrixShape) -> nnx.Module:
    if not shape.window:
        return nnx.Linear(shape.c_in, shape.c_out, use_bias=False, rngs=nnx.Rngs(0))
    return nnx.Conv(shape.c_in, shape.c_out, shape.window, use_bias=False, rngs=nnx.Rngs(0))
