"""What the command line's words stand for: a network by name or factory, and the images it is for."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float32, Int, Shaped

from unified_approx import datasets, zoo

_LARGEST = {"digits": 16.0}  # pixel value; 255 elsewhere


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as a network takes it.

    Attributes:
        x_train: inputs.
        x_test: inputs.
        y_test: labels.
        y_train: labels.
    """

    x_train: Float32[np.ndarray, "train ..."]
    x_test: Float32[np.ndarray, "test ..."]
    y_test: Int[np.ndarray, " test"]
    y_train: Int[np.ndarray, " train"]


def is_factory(network: str) -> bool:
    """Whether the word is `package.module:factory` and not a name of the zoo."""
    return ":" in network


def factory(network: str) -> Callable[[], Any]:
    """The function that `package.module:factory` names; the current folder is searched too.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, _, name = network.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"NETWORK: {network!r} cannot be imported ({error}); give a name of the zoo ({', '.join(zoo.names())}) or "
            "package.module:factory"
        ) from error
    if not callable(function):
        raise ValueError(f"NETWORK: {network!r} is a {type(function).__name__}; give a function that makes the network")
    return function


def _made(network: str) -> nnx.Module:
    model = factory(network)()
    if not isinstance(model, nnx.Module):
        raise ValueError(f"NETWORK: {network!r} returned a {type(model).__name__}; it must return a Flax NNX module")
    return model


def load_network(network: str, weights: Path | None) -> nnx.Module:
    """A trained network in evaluation mode.

    Args:
        network: a name of the zoo, or `package.module:factory`, a function without arguments.
        weights: safetensors file in PyTorch's names and layouts. None takes what comes with the package, or what the
            factory itself put into the network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown network, no weights, or weights that do not fit.
    """
    if not is_factory(network):
        if weights is None and zoo.entry(network).weights is None:
            raise ValueError(f"--weights: {network} has no weights in the package; give --weights FILE.safetensors")
        return zoo.load(network, weights)
    model = _made(network)
    if weights is not None:
        try:
            zoo.load_torch_layout(model, zoo.read_safetensors(weights))
        except ValueError as error:
            raise ValueError(f"--weights: {weights} does not fit {network}: {error}") from error
    model.eval()
    return model


def blank_network(network: str) -> nnx.Module:
    """A network of the right structure, whatever its weights.

    Raises:
        ValueError: unknown network.
    """
    return _made(network) if is_factory(network) else zoo.create(network)


def load_images(network: str, data: Path | None, dataset: str | None) -> Images:
    """Training and test images as the network takes them.

    Args:
        network: as for `load_network`.
        data: folder of the npz files; None as for `datasets.load`.
        dataset: name of a data set, or of an npz file (in `data`, or a path of its own). A network of the zoo knows
            its own and the normalization that belongs to it. For a factory it must be given: floating point arrays are
            passed on as they are, integer images are scaled to [0, 1] and, if they are grey, given one channel.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no data set is named for a factory, or its file is not what it should be.
    """
    if is_factory(network):
        return _custom(dataset, data)
    entry = zoo.entry(network)
    if dataset not in (None, entry.dataset):
        raise ValueError(f"--dataset: {network} is for {entry.dataset}, not {dataset!r}; leave --dataset out")
    if entry.dataset not in datasets.names():
        raise ValueError(
            f"NETWORK: {network} is for {entry.dataset}, which does not fit into memory at once; compress it from "
            "Python, with images from unified_approx.image_folder.open_folder"
        )
    found = datasets.load(entry.dataset, data)
    x_train, x_test = (entry.preprocess(x, found) for x in (found.x_train, found.x_test))
    return Images(x_train, x_test, found.y_test, found.y_train)


def _custom(dataset: str | None, data: Path | None) -> Images:
    if dataset is None:
        known = ", ".join(datasets.names())
        raise ValueError(f"--dataset: none given for a factory; name one of {known}, or an npz file in the data folder")
    if dataset in datasets.names():
        found = datasets.load(dataset, data)
        largest = _LARGEST.get(dataset, 255.0)
        train, test = (_scaled(x, largest) for x in (found.x_train, found.x_test))
        return Images(train, test, found.y_test, found.y_train)
    path = _npz(dataset, data)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"--dataset: {path} does not hold x_train, y_train, x_test, y_test ({error})") from error
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    for name, x in (("y_test", x_test), ("y_train", x_train)):
        y = arrays[name]
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"--dataset: {name} is {y.dtype} {y.shape} in {path}; give one integer per image")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"--dataset: x_train is {x_train.shape}, x_test {x_test.shape} in {path}; shapes must agree")
    if not np.isfinite(x_test).all():
        raise ValueError(f"--dataset: x_test holds NaN or infinite values in {path}; clean the data first")
    return Images(_scaled(x_train, 255.0), _scaled(x_test, 255.0), arrays["y_test"], arrays["y_train"])


def _npz(dataset: str, data: Path | None) -> Path:
    name = dataset if dataset.endswith(".npz") else f"{dataset}.npz"
    places = [Path(name), *([data / name] if data is not None else [])]
    for place in reversed(places):
        if place.is_file():
            return place
    raise FileNotFoundError(f"--dataset: there is no {' or '.join(map(str, places))}; give the path of an npz file")


def _scaled(x: Shaped[Any, "n ..."], largest: float) -> Float32[np.ndarray, "n ..."]:
    if not np.issubdtype(x.dtype, np.integer):
        return x.astype(np.float32)
    images = x.astype(np.float32) / np.float32(largest)
    return images[..., None] if images.ndim == 3 else images


def calibration_indices(available: int, count: int, seed: int) -> Int[np.ndarray, " count"]:
    """Which training images to calibrate on: `count` of them (all, if there are fewer), the same for the same seed.

    Raises:
        ValueError: fewer than 2.
    """
    if count < 2:
        raise ValueError(f"--calibration: {count} images; give at least 2, since some are held out")
    return np.random.default_rng(seed).permutation(available)[:count]
