"""A quadratic model of a network's loss at its trained weights, made once from data and kept in a file.

Later compressions (`fast_lc`) need neither data nor labels, only the network and that file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from solvers.kronecker import KroneckerTaylor, kronecker
from solvers.output_loss import LOSSES
from solvers.taylor import Taylor
from unified_approx.calling import Call, forward
from unified_approx.files import replacing
from unified_approx.learning_compression import curvature as curvatures
from unified_approx.pieces import parameters_of, with_values
from unified_approx.sites import Path, path_name
from unified_approx.work_dir import fingerprint

HESSIAN = "hessian"
KINDS = (curvatures.GAUSS_NEWTON, curvatures.MONTE_CARLO, curvatures.FISHER, curvatures.NONE, HESSIAN)
STRUCTURES = ("diagonal", "kronecker")
_LARGEST_HESSIAN = 2000
_KEY, _FORMAT = "unified_approx_taylor", 1

Part = Taylor | KroneckerTaylor


@dataclass(frozen=True, eq=False)
class NetworkTaylor:
    """The model: one part for each parameter, independent of each other.

    Attributes:
        parts: by the parameter's path; those of kernels in Kronecker form see them as (p, n) matrices.
        loss: mean loss at the weights; 0 without labels.
        origin: how it was made: curvature, structure, loss, examples, samples, seed.
        fingerprint: of the network whose weights these are.
    """

    parts: Mapping[Path, Part]
    loss: float
    origin: Mapping[str, Any]
    fingerprint: str

    def value(self, values: Mapping[Path, Float[Array, "..."]]) -> Float[Array, ""]:
        """What these parameters add to the loss; those that are not given stay as they are."""
        each = (self.parts[path].value(value.reshape(self.parts[path].w.shape)) for path, value in values.items())
        return sum(each, start=jnp.zeros(()))

    def map(self, change: Callable[[Part], Part]) -> "NetworkTaylor":
        """The same with every part changed."""
        return replace(self, parts={path: change(part) for path, part in self.parts.items()})

    def save(self, path: str | PathLike[str]) -> int:
        """Write one safetensors file without the weights; returns its size in bytes."""
        tensors = {}
        for where, part in self.parts.items():
            fields = {name: value for name, value in vars(part).items() if name != "w"}
            tensors |= {f"{path_name(where)}:{name}": np.ascontiguousarray(value) for name, value in fields.items()}
        header = {"format": _FORMAT, "loss": self.loss, "origin": dict(self.origin), "fingerprint": self.fingerprint}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={_KEY: json.dumps(header)})
        return FilePath(path).stat().st_size


def taylor_of(
    model: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Shaped[np.ndarray | Array, "labels ..."] | None = None,
    *,
    curvature: str = curvatures.GAUSS_NEWTON,
    structure: str = "diagonal",
    loss: str = "cross_entropy",
    samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    call: Call = forward,
    progress: Callable[[int, int], None] | None = None,
) -> NetworkTaylor:
    """Expand the mean loss of a network to second order at its weights.

    Memory: what a backward pass of one batch stores, a few arrays of the size of the network, and one example's
    gradient of the largest layer with its patches; for layers of s <= 8 output positions (dense ones have one) the
    patches of a batch times (s + 1) / 2. The Kronecker structure needs the patches of a batch, and p^2 + n^2 values for
    an (n, p) kernel. Time: a backward pass over the data for each output of the network ("gauss_newton"), for each
    sample ("monte_carlo"), or one.

    Args:
        model: any NNX network whose outputs are (examples, ...); a clone in evaluation mode is run.
        x: examples as the network takes them.
        y: labels, or targets of a squared error; None takes the gradient for zero.
        curvature: "gauss_newton": exact; "monte_carlo": the same by sampled labels; "fisher": the empirical Fisher
            matrix, of squared gradients; "none": first order; "hessian": the Hessian's own diagonal, of small networks.
        structure: "diagonal", or "kronecker" for the kernels of dense and convolutional layers.
        loss: "cross_entropy", or "squared_error": 1/2 ||output - y||^2.
        samples: labels drawn for each example, for "monte_carlo".
        batch_size: examples at once.
        seed: of the labels drawn.
        call: how the network is called.
        progress: called with (examples seen, examples) after every batch.

    Raises:
        ValueError: an argument out of range, labels that do not fit, or a loss that is not finite.
    """
    own = _evaluating(model)
    _check_options(curvature, structure, loss, samples, batch_size, y is not None)
    examples = np.asarray(x)
    outputs = _count_outputs(own, examples, call)
    targets = None if y is None else _targets(y, loss, outputs, len(examples))
    batch = min(batch_size, len(examples))
    if curvature == HESSIAN:
        passes, h = curvatures.NONE, _split(own, jnp.diag(hessian(own, examples, targets, loss=loss, call=call)))
    else:
        passes, h = curvature, None
    options = {"curvature": passes, "samples": samples, "factors": structure == "kronecker"}
    program, state = curvatures.prepare(own, jnp.asarray(examples[:batch]), call=call, loss=LOSSES[loss], **options)
    sums = curvatures.accumulate(program, state, examples, targets, batch, seed, progress)
    mean = jax.tree.map(lambda a: a / len(examples), sums) | ({} if h is None else {"h": h})
    if not np.isfinite(float(mean["loss"])):
        raise ValueError(f"model: its loss on these examples is {float(mean['loss'])}; look at weights and inputs")
    origin = {"curvature": curvature, "structure": structure, "loss": loss, "examples": len(examples)}
    origin |= {"samples": samples, "seed": seed, "labels": y is not None}
    parts = {path: _part(path, value, mean) for path, value in parameters_of(model).items()}
    return NetworkTaylor(parts, float(mean["loss"]), origin, fingerprint({}, model, None))


def _evaluating(model: nnx.Module) -> nnx.Module:
    own = nnx.clone(model)
    own.eval()
    return own


def _part(path: Path, w: Array, mean: Mapping[str, Any]) -> Part:
    g = mean["g"][path]
    if path not in mean["outputs"]:
        return Taylor(w, g, mean["h"][path])
    as_matrix = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return kronecker(as_matrix(w), as_matrix(g), mean["inputs"][path], mean["outputs"][path])


def _check_options(curvature: str, structure: str, loss: str, samples: int, batch_size: int, labels: bool) -> None:
    chosen = {"curvature": (curvature, KINDS), "structure": (structure, STRUCTURES), "loss": (loss, tuple(LOSSES))}
    for name, (value, known) in chosen.items():
        if value not in known:
            raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)}")
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; give at least 1")
    if not labels and curvature in (curvatures.FISHER, curvatures.NONE, HESSIAN):
        raise ValueError(f"y: None, but curvature={curvature!r} needs labels; gauss_newton and monte_carlo do not")
    if structure == "kronecker" and curvature in (curvatures.NONE, HESSIAN):
        raise ValueError(
            f"structure: 'kronecker' with curvature={curvature!r}; give gauss_newton, monte_carlo or fisher"
        )


def _count_outputs(model: nnx.Module, x: np.ndarray, call: Call) -> int:
    if not len(x):
        raise ValueError("x: no examples; give at least one")
    graphdef, state = nnx.split(model)  # a closure over the module would fail with nnx.jit or nnx.remat inside
    z = jax.eval_shape(lambda state, one: call(nnx.merge(graphdef, state), one), state, jnp.asarray(x[:1]))
    if not hasattr(z, "shape") or len(z.shape) < 2 or z.shape[0] != 1:
        raise ValueError(
            "call: the network must give one array (examples, ...); pick it out with call=lambda model, x: ..."
        )
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ValueError(f"call: the network gives {z.dtype}; give its floating-point outputs, before any argmax")
    return prod(z.shape[1:])


def _targets(y: Any, loss: str, outputs: int, examples: int) -> np.ndarray:
    """Labels as integers, or targets as (examples, outputs)."""
    targets = np.asarray(y)
    if loss == "squared_error":
        if targets.size != examples * outputs or len(targets) != examples:
            raise ValueError(f"y: of shape {targets.shape}; give {outputs} numbers for each of the {examples} examples")
        return targets.reshape(examples, outputs).astype(np.float32)
    if targets.shape != (examples,) or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"y: {targets.dtype} of shape {targets.shape}; give one integer label for each of the {examples} examples"
        )
    if targets.min() < 0 or targets.max() >= outputs:
        raise ValueError(f"y: labels from {targets.min()} to {targets.max()} for {outputs} outputs; count from 0")
    return targets


def hessian(
    model: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Shaped[np.ndarray | Array, "labels ..."] | None,
    *,
    loss: str = "cross_entropy",
    call: Call = forward,
) -> Float[Array, "d d"]:
    """The full Hessian of the mean loss, over all parameters in the order of `parameters_of`; for small networks.

    Raises:
        ValueError: more than 2,000 parameters, or labels that do not fit.
    """
    own, values = _evaluating(model), parameters_of(model)
    total = sum(value.size for value in values.values())
    if total > _LARGEST_HESSIAN:
        raise ValueError(f"curvature: 'hessian' of {total} parameters; it is for at most {_LARGEST_HESSIAN}")
    data = jnp.asarray(x)
    targets = jnp.asarray(_targets(y, loss, _count_outputs(own, np.asarray(x), call), len(data)))

    def mean_loss(vector: Float[Array, " d"]) -> Float[Array, ""]:
        z = call(with_values(own, _split(own, vector)), data).reshape(len(data), -1)
        return jnp.mean(LOSSES[loss].values(z, targets))

    return jax.jit(jax.hessian(mean_loss))(jnp.concatenate([value.reshape(-1) for value in values.values()]))


def _split(model: nnx.Module, vector: Float[Array, " d"]) -> dict[Path, Array]:
    """A vector over all parameters, as parameters."""
    values, found, start = parameters_of(model), {}, 0
    for path, value in values.items():
        found[path] = vector[start : start + value.size].reshape(value.shape)
        start += value.size
    return found


def load_taylor(path: str | PathLike[str], model: nnx.Module) -> NetworkTaylor:
    """What `NetworkTaylor.save` wrote, for the same network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or of another kind, or made for a network with other weights.
    """
    if not FilePath(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} is no whole file of a quadratic model ({error!r}); make it again") from error
    if header["format"] > _FORMAT:
        raise ValueError(f"path: {path} has format {header['format']}, this version reads {_FORMAT}; upgrade")
    if header["fingerprint"] != fingerprint({}, model, None):
        raise ValueError(f"path: {path} was made for a network with other weights; give that one, or make it again")
    parts = {where: _loaded(value, path_name(where), tensors) for where, value in parameters_of(model).items()}
    return NetworkTaylor(parts, header["loss"], header["origin"], header["fingerprint"])


def _loaded(w: Array, name: str, tensors: Mapping[str, np.ndarray]) -> Part:
    own = {key.rpartition(":")[2]: jnp.asarray(a) for key, a in tensors.items() if key.rpartition(":")[0] == name}
    if "left" in own:
        return KroneckerTaylor(w.reshape(-1, w.shape[-1]), **own)
    return Taylor(w, **own)
