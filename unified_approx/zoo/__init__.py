"""Networks by name: the ones of the literature, and how to bring one's own weights in."""

from unified_approx.zoo.alexnet import AlexNet
from unified_approx.zoo.digits import DigitsNet
from unified_approx.zoo.entry import Normalization, ZooEntry
from unified_approx.zoo.googlenet import GoogLeNet
from unified_approx.zoo.initialise import he_normal
from unified_approx.zoo.lenet import LeNet5, LeNet300
from unified_approx.zoo.nin import NetworkInNetwork
from unified_approx.zoo.registry import create, entry, load, names
from unified_approx.zoo.resnet import ResNet
from unified_approx.zoo.torch_layout import load_torch_layout, read_safetensors, torch_tensors
from unified_approx.zoo.vgg import Vgg

__all__ = [
    "AlexNet",
    "DigitsNet",
    "GoogLeNet",
    "LeNet300",
    "LeNet5",
    "NetworkInNetwork",
    "Normalization",
    "ResNet",
    "Vgg",
    "ZooEntry",
    "create",
    "entry",
    "he_normal",
    "load",
    "load_torch_layout",
    "names",
    "read_safetensors",
    "torch_tensors",
]
