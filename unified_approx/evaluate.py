"""What a network answers, how often it is right, and how far two networks agree."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from unified_approx.calling import Call, forward
from unified_approx.tiny import as_products

AnyArray = Array | np.ndarray


@partial(jax.jit, static_argnames=("graphdef", "call"))
def _run(graphdef: Any, state: Any, x: Array, call: Call) -> Any:
    return as_products(lambda state, x: call(nnx.merge(graphdef, state), x))(state, x)


@partial(jax.jit, static_argnames=("graphdef", "call"), compiler_options={"xla_backend_optimization_level": 0})
def _run_once(graphdef: Any, state: Any, batch: Any, call: Call) -> Any:
    return as_products(lambda state, batch: call(nnx.merge(graphdef, state), batch))(state, batch)


def outputs_once(model: nnx.Module, batch: Any, *, call: Call = forward) -> list[Any]:
    """The leaves of a network's output on one batch; compiled in a hurry, for batches that are run once.

    Args:
        model: any NNX module; a clone in evaluation mode is run.
        batch: (nested) arrays.
        call: `call(model, batch)`.
    """
    clone = nnx.clone(model)
    clone.eval()
    return jax.tree.leaves(_run_once(*nnx.split(clone), jax.device_put(batch), call))


def _prepare(model: nnx.Module, x: AnyArray, batch_size: int, call: Call) -> tuple[Callable[[Array], Any], int, int]:
    """(the jitted network on one batch, batch size, outputs); checks everything that needs no computation."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: give an integer >= 1")
    if not x.ndim or not len(x):
        raise ValueError(f"x has shape {x.shape}: give at least one image")
    model = nnx.clone(model)
    model.eval()
    run = partial(_run, *nnx.split(model), call=call)
    size = min(batch_size, len(x))
    out = jax.eval_shape(run, jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype))
    if not isinstance(out, jax.ShapeDtypeStruct) or len(out.shape) != 2 or out.shape[0] != size:
        raise ValueError(f"the network gives {out}, expected logits ({size}, classes): choose them with call=")
    return run, size, out.shape[1]


def _logits(run: Callable[[Array], Any], x: AnyArray, size: int) -> np.ndarray:
    parts = []
    for start in range(0, len(x), size):
        batch = jnp.asarray(x[start : start + size])
        real = len(batch)
        if real < size:  # repeats the first image, so that every batch has the compiled shape
            batch = jnp.concatenate([batch, jnp.repeat(batch[:1], size - real, axis=0)])
        parts.append(np.asarray(run(batch), np.float32)[:real])
    return np.concatenate(parts)


def predict(
    model: nnx.Module, x: Shaped[AnyArray, "..."], batch_size: int = 256, *, call: Call = forward
) -> Float32[np.ndarray, "n classes"]:
    """Logits of a network on preprocessed inputs, batch by batch; one compilation per network structure and batch size.

    Args:
        model: any NNX module; a clone in evaluation mode is run, the module itself is left as it is.
        x: inputs, (n, ...).
        batch_size: images per call.
        call: `call(model, batch)` gives the logits, for networks that are not called as `model(batch)`. Give the same
            function each time: a new lambda compiles anew.

    Raises:
        ValueError: no input, batch size below 1, or an output that is not (batch, classes).
    """
    run, size, _ = _prepare(model, x, batch_size, call)
    return _logits(run, x, size)


def accuracy(
    model: nnx.Module,
    x: Shaped[AnyArray, "..."],
    y: Shaped[AnyArray, "..."],
    batch_size: int = 256,
    *,
    call: Call = forward,
) -> float:
    """Percentage of inputs whose largest logit is at their label.

    Args:
        model: as in `predict`.
        x: as in `predict`.
        y: labels, (n,), integers from 0 to classes - 1.
        batch_size: as in `predict`.
        call: as in `predict`.

    Raises:
        ValueError: as in `predict`; labels of a wrong dtype, shape or range. Raised before anything is computed.
    """
    run, size, classes = _prepare(model, x, batch_size, call)
    labels = np.asarray(y)
    if labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"y is {labels.dtype} {labels.shape}, expected one integer label for each of {len(x)} images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"y has labels from {labels.min()} to {labels.max()}, but the network has outputs 0 to {classes - 1}: "
            "wrong data set, or labels that do not start at 0"
        )
    return 100.0 * float(np.mean(np.argmax(_logits(run, x, size), axis=1) == labels))


def accuracy_of_batches(
    model: nnx.Module,
    batches: Iterable[tuple[Shaped[AnyArray, "..."], Shaped[AnyArray, "..."]]],
    *,
    call: Call = forward,
) -> float:
    """`accuracy` over batches (inputs, labels) that are made one at a time, for data that does not fit into memory.

    Args:
        model: as in `predict`.
        batches: best all of one size: each size compiles once.
        call: as in `predict`.

    Raises:
        ValueError: as in `accuracy`; no batches.
    """
    count, correct = 0, 0.0
    for x, y in batches:
        correct += accuracy(model, x, y, len(x) or 1, call=call) * len(x)
        count += len(x)
    if not count:
        raise ValueError("batches: there are none; give at least one")
    return correct / count


def agreement(reference: Float[AnyArray, "..."], logits: Float[AnyArray, "..."]) -> dict[str, float]:
    """How far a network's answers agree with a reference's, without labels.

    Args:
        reference: logits of the reference (the original network), (n, classes).
        logits: logits of the other one on the same inputs, (n, classes).

    Returns:
        `kl`: mean over the inputs of sum_c p_c log(p_c / q_c), in nats, p = softmax(reference), q = softmax(logits);
        `top1`: percentage of the inputs with the same largest logit.

    Raises:
        ValueError: no inputs, or logits of different shapes.
    """
    if reference.ndim != 2 or not len(reference) or reference.shape != logits.shape:
        raise ValueError(f"reference is {reference.shape}, logits {logits.shape}: give both as (n, classes), n > 0")
    log_p, log_q = (_log_softmax(np.asarray(z, np.float64)) for z in (reference, logits))
    kl = np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
    same = np.argmax(log_p, axis=1) == np.argmax(log_q, axis=1)
    return {"kl": float(kl), "top1": 100.0 * float(np.mean(same))}


def _log_softmax(z: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
