"""The zoo's table, one row a network, and how to get a network from it."""

import inspect
from pathlib import Path
from typing import Any

from flax import nnx

from unified_approx.zoo import alexnet, digits, googlenet, lenet, nin, resnet, vgg
from unified_approx.zoo.entry import ZooEntry, channel_normalization
from unified_approx.zoo.initialise import he_normal
from unified_approx.zoo.torch_layout import load_torch_layout, read_safetensors

_IMAGENET = channel_normalization(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the published ResNets'
_HALF = channel_normalization(
    255.0, (0.5,) * 3, (0.5,) * 3
)  # torchvision's `transform_input`, of its GoogLeNet weights
_CIFAR = channel_normalization(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _cifar(name: str, **fields: Any) -> ZooEntry:
    return ZooEntry(name=name, input_shape=(32, 32, 3), num_classes=10, dataset="cifar10", **fields)


def _resnet(blocks_per_stage: int) -> ZooEntry:
    return _cifar(
        f"resnet{6 * blocks_per_stage + 2}",
        make=resnet.make_resnet(blocks_per_stage),
        normalization=_IMAGENET,
        torch_names=resnet.torch_names(blocks_per_stage),
    )


def _vgg(depth: int, batch_norm: bool) -> ZooEntry:
    return _cifar(
        f"vgg{depth}" if batch_norm else f"vgg{depth}-plain",
        make=vgg.make_vgg(depth, batch_norm),
        normalization=_CIFAR,
        torch_names=vgg.torch_names(depth, batch_norm),
        flatten=vgg.flatten(depth),
    )


def _imagenet(name: str, **fields: Any) -> ZooEntry:
    return ZooEntry(name=name, input_shape=(224, 224, 3), num_classes=1000, dataset="imagenet", **fields)


def _mnist(name: str, **fields: Any) -> ZooEntry:
    fields |= {"input_shape": (28, 28, 1), "num_classes": 10, "dataset": "mnist"}
    return ZooEntry(name=name, normalization=lenet.minus_mean_image, **fields)


_ENTRIES = {
    row.name: row
    for row in (
        *(_resnet(blocks_per_stage) for blocks_per_stage in (3, 5, 7, 9, 18)),
        *(_vgg(depth, batch_norm) for depth in vgg.DEPTHS for batch_norm in (True, False)),
        _cifar("nin", make=nin.make_nin, normalization=_CIFAR),
        _mnist("lenet300", make=lenet.make_lenet300, torch_names=lenet.LENET300_NAMES),
        _mnist("lenet5", make=lenet.make_lenet5, flatten={"fc1": (4, 4, 50)}),
        _imagenet(
            "alexnet",
            make=alexnet.make_alexnet,
            normalization=_IMAGENET,
            torch_names=alexnet.TORCH_NAMES,
            flatten=alexnet.FLATTEN,
        ),
        _imagenet(
            "googlenet",
            make=googlenet.make_googlenet,
            normalization=_HALF,
            torch_names=googlenet.torch_names,
            ignored=googlenet.AUXILIARY,
        ),
        ZooEntry(
            name="digits",
            make=digits.make_digits,
            input_shape=(8, 8, 1),
            num_classes=10,
            dataset="digits",
            normalization=channel_normalization(16.0, (0.0,), (1.0,)),
            flatten=digits.FLATTEN,
            weights=digits.WEIGHTS,
        ),
    )
}


def names() -> tuple[str, ...]:
    """Names of all networks."""
    return tuple(_ENTRIES)


def entry(name: str) -> ZooEntry:
    """The zoo's row of a network.

    Raises:
        ValueError: unknown name.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def _check_options(row: ZooEntry, options: dict[str, Any]) -> None:
    known = inspect.signature(row.make).parameters
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{row.name} has no option {unknown[0]!r}: its options are {', '.join(known) or 'none'}")


def create(name: str, *, seed: int = 0, **options: Any) -> nnx.Module:
    """An untrained network with He-normal weights, in evaluation mode.

    Args:
        name: one of `names()`.
        seed: of the weights.
        **options: `activation` ("tanh" or "relu") of lenet300; `batch_norm` of digits and nin; `projection` (shortcuts
            between stages that are convolved) of ResNets; `num_classes`, `width` (a factor on the channels) and
            `dropout` of alexnet and googlenet.

    Raises:
        ValueError: unknown name or option, negative seed.
    """
    row = entry(name)
    _check_options(row, options)
    return he_normal(lambda: row.make(**options), seed)


def load(name: str, path: str | Path | None = None, **options: Any) -> nnx.Module:
    """A trained network, in evaluation mode, from a safetensors file in PyTorch's names and layouts.

    Args:
        name: one of `names()`.
        path: the file; None for the weights that come with the package (digits).
        **options: as for `create`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown name or option, no packaged weights, or the weights do not fit: the first that does not
            is named.
    """
    row = entry(name)
    _check_options(row, options)
    path = row.weights if path is None else path
    if path is None:
        raise ValueError(f"{name} has no weights in the package: give path=, a safetensors file with its weights")
    model = nnx.eval_shape(lambda: row.make(**options))
    tensors = read_safetensors(path)
    try:
        load_torch_layout(model, tensors, row.torch_names, row.flatten, row.ignored)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from error
    model.eval()
    return model
