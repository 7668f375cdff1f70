"""Weights in PyTorch's names and layouts, into and out of any Flax NNX network.

PyTorch stores a convolution's kernel as (out, in, *window), Flax as (*window, in, out); a dense layer as (out, in),
Flax as (in, out). A dense layer that reads a flattened feature map needs one thing more: PyTorch flattens
(channels, height, width), Flax (height, width, channels), so its input features are in another order. That cannot be
seen from the weights: name such layers in `flatten`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

Names = Mapping[str, str] | Callable[[str], str]
Flatten = Mapping[str, tuple[int, int, int | None]]

_COUNTER = "num_batches_tracked"  # PyTorch's batch norm stores it; it is not a weight
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LEAVES: dict[type[nnx.Module], dict[str, str]] = {
    nnx.Conv: {"kernel": "weight", "bias": "bias"},
    nnx.Linear: {"kernel": "weight", "bias": "bias"},
    nnx.Embed: {"embedding": "weight"},
    nnx.BatchNorm: _NORM,
    nnx.LayerNorm: _NORM,
    nnx.GroupNorm: _NORM,
    nnx.RMSNorm: _NORM,
}


def dotted(path: str) -> str:
    """The default name of a module in a PyTorch file: `blocks/0/conv1` is `blocks.0.conv1`."""
    return path.replace("/", ".")


def read_safetensors(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in the safetensors format, or is incomplete.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist (or is a folder): give the path of a .safetensors")
    try:
        with safe_open(path, "np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): download or copy it again, "
            "or convert it with safetensors.torch.save_file"
        ) from error


@dataclass(frozen=True)
class _Slot:
    """One variable of the network and its tensor: tensor = variable.reshape(view).transpose(axes).reshape(shape)."""

    path: tuple[Any, ...]
    variable: nnx.Variable
    key: str
    view: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(self.view).transpose(self.axes).reshape(self.shape))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        viewed = tensor.reshape([self.view[a] for a in self.axes])
        return viewed.transpose(np.argsort(self.axes)).reshape(self.variable.shape)


def _owner(model: nnx.Module, path: tuple[Any, ...]) -> Any:
    def child(node: Any, part: Any) -> Any:
        attribute = isinstance(part, str) and not isinstance(node, dict | nnx.Dict)
        return getattr(node, part) if attribute else node[part]

    return reduce(child, path[:-1], model)


def _leaf(owner: Any, module: str, leaf: str) -> str:
    """Name of one variable within its module in a PyTorch file."""
    table = next((table for kind, table in _LEAVES.items() if isinstance(owner, kind)), None)
    if table is not None and leaf in table:
        return table[leaf]
    if table is None and not type(owner).__module__.startswith("flax.nnx.nn."):
        return leaf  # a module of the user's: its own arrays are taken as they are
    raise ValueError(
        f"{module or 'model'}: the PyTorch layout of {leaf!r} in a {type(owner).__name__} is not known; "
        "supported are Conv, Linear, Embed and the norms: assign this layer's weights by hand"
    )


def _flattened(owner: Any, module: str, given: tuple[int, int, int | None] | None) -> tuple[int, int, int] | None:
    """The (height, width, channels) that a dense layer reads, channels filled in; None if it reads no feature map."""
    if given is None:
        return None
    dense = isinstance(owner, nnx.Linear)
    height, width, channels = given
    if channels is None and dense:
        channels = owner.in_features // (height * width)
    if not dense or channels is None or height * width * channels != owner.in_features:
        inputs = f" of {owner.in_features} inputs" if dense else ""
        raise ValueError(
            f"flatten[{module!r}] is {given}, but {module} is a {type(owner).__name__}{inputs}: give the (height, "
            "width, channels) of the feature map that a Linear reads"
        )
    return height, width, channels


def _layout(
    owner: Any, leaf: str, shape: tuple[int, ...], hwc: tuple[int, int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(view, axes, shape) of a slot, see `_Slot`."""
    if leaf != "kernel" or not isinstance(owner, nnx.Conv | nnx.Linear):
        return shape, tuple(range(len(shape))), shape
    if hwc is not None:
        return (*hwc, shape[-1]), (3, 2, 0, 1), shape[::-1]
    rank = len(shape)
    axes = (rank - 1, rank - 2, *range(rank - 2))
    return shape, axes, tuple(shape[a] for a in axes)


def _slots(model: nnx.Module, names: Names, flatten: Flatten) -> list[_Slot]:
    slots, modules = [], set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        owner, module, leaf = _owner(model, path), "/".join(map(str, path[:-1])), str(path[-1])
        modules.add(module)
        hwc = _flattened(owner, module, flatten.get(module))
        prefix = names(module) if callable(names) else names.get(module, dotted(module))
        key = ".".join(part for part in (prefix, _leaf(owner, module, leaf)) if part)
        slots.append(_Slot(path, variable, key, *_layout(owner, leaf, variable.shape, hwc)))
    for argument, given in (("names", () if callable(names) else names), ("flatten", flatten)):
        if unknown := [module for module in given if module not in modules]:
            raise ValueError(f"{argument}: {unknown[0]!r} is no layer of the network; layers are {sorted(modules)}")
    return slots


def _checked(slot: _Slot, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    where = "/".join(map(str, slot.path))
    if slot.key not in tensors:
        raise ValueError(f"no tensor {slot.key!r}, which {where} needs with shape {slot.shape}: wrong file, or `names`")
    tensor = np.asarray(tensors[slot.key])
    if tensor.shape != slot.shape:
        raise ValueError(f"tensor {slot.key!r} does not fit {where}: expected shape {slot.shape}, found {tensor.shape}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"tensor {slot.key!r} has dtype {tensor.dtype}, expected floating point: dequantize it first")
    if not np.all(np.isfinite(tensor.astype(np.float32))):
        raise ValueError(f"tensor {slot.key!r} has NaN or infinite values (as float32): the file is damaged")
    return tensor


def load_torch_layout(
    model: nnx.Module,
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    names: Names = dotted,
    flatten: Flatten | None = None,
    ignored: tuple[str, ...] = (),
) -> nnx.Module:
    """Copy a PyTorch state dict into a Flax NNX network, in place.

    Every `nnx.Param` and `nnx.BatchStat` of the network is filled; nothing is changed if anything does not fit.
    Convolutions of any rank (grouped too), Linear, Embed and the norms are converted; arrays that a module of the
    user's own holds directly are copied as they are. Tensors are cast to the variable's dtype, so float16 is upcast.

    Args:
        model: the network; one made under `nnx.eval_shape` will do.
        tensors: name -> array, as `read_safetensors` gives them. `num_batches_tracked` is ignored.
        names: path of a module in the network (`blocks/0/conv1`; the root is the empty string) -> its name in
            `tensors` (`layer1.0.conv1`). A mapping may leave out modules whose name is the path with dots.
        flatten: path of each Linear that reads a flattened feature map -> (height, width, channels) of that map.
            Without it the dense layer reads its features in the wrong order, and no check can tell. A map of
            height and width 1 needs no entry. Channels None: as many as the layer's inputs make.
        ignored: beginnings of names of tensors that the network has no use for, such as heads of training only.

    Returns:
        The same network.

    Raises:
        ValueError: a tensor is missing, has another shape, is not finite or is left over; a layer has an unknown
            layout; `names` or `flatten` name a layer that does not exist.
    """
    slots = _slots(model, names, flatten or {})
    checked = [(slot, _checked(slot, tensors)) for slot in slots]
    used = {slot.key for slot in slots}
    rest = (key for key in tensors if key not in used and not key.startswith(ignored))
    if unused := sorted(key for key in rest if key.rpartition(".")[2] != _COUNTER):
        raise ValueError(
            f"{len(unused)} tensors belong to no layer of the network, first {unused[:3]}: another network?"
        )
    filled = [(s.path, s.variable.replace(jnp.asarray(s.from_torch(t), s.variable.dtype))) for s, t in checked]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def torch_tensors(
    model: nnx.Module, names: Names = dotted, flatten: Flatten | None = None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The inverse of `load_torch_layout`: a network's weights under PyTorch's names and in its layouts.

    Args:
        model: the network.
        names: as in `load_torch_layout`.
        flatten: as in `load_torch_layout`.

    Raises:
        ValueError: as in `load_torch_layout`, for layers; two layers with the same name.
    """
    slots = _slots(model, names, flatten or {})
    tensors = {slot.key: slot.to_torch(np.asarray(slot.variable.get_value())) for slot in slots}
    if len(tensors) < len(slots):
        keys = [slot.key for slot in slots]
        raise ValueError(f"names: {next(k for k in keys if keys.count(k) > 1)!r} is given to more than one tensor")
    return tensors
