"""The published networks that the experiments start from, by file name in the folder of models."""

from pathlib import Path

from flax import nnx

from unified_approx import zoo

FILES = {
    "resnet20": "resnet20-cifar10.safetensors",
    "resnet56": "resnet56-cifar10.safetensors",
    "vgg16": "vgg16-cifar10.safetensors",
    "lenet300": "lenet300-mnist.safetensors",
}


def load(network: str, models: Path) -> nnx.Module:
    """The trained network, from a folder."""
    return zoo.load(network, models / FILES[network])
