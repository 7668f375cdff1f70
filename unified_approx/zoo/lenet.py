"""LeNets for MNIST, in the two sizes that the compression literature uses.

LeNet-300-100: LeCun et al., Gradient-Based Learning Applied to Document Recognition (1998), section III.
LeNet-5: the version of Caffe's examples (20-50-500-10, 431,080 parameters), with a ReLU after each convolution.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.datasets import Dataset
from unified_approx.zoo.entry import Normalization

_ACTIVATIONS = {"tanh": jnp.tanh, "relu": nnx.relu}


class LeNet300(nnx.Module):
    """Dense layers `fc1` (784 -> 300), `fc2` (300 -> 100), `fc3` (100 -> 10).

    Args:
        activation: "tanh" (the published weights) or "relu".
        num_classes: outputs.
        rngs: keys of the initialisers.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(self, activation: str = "tanh", *, num_classes: int = 10, rngs: nnx.Rngs):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: choose one of {sorted(_ACTIVATIONS)}")
        self.activation = activation
        self.fc1 = nnx.Linear(784, 300, rngs=rngs)
        self.fc2 = nnx.Linear(300, 100, rngs=rngs)
        self.fc3 = nnx.Linear(100, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b 28 28 1"]) -> Float[Array, "b classes"]:
        """Logits."""
        r = _ACTIVATIONS[self.activation]
        x = r(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc3(r(self.fc2(x)))


class LeNet5(nnx.Module):
    """5×5 convolutions `conv1` (20 channels) and `conv2` (50), each with 2×2 max pooling, then `fc1` (500), `fc2`."""

    def __init__(self, *, num_classes: int = 10, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 50, 500, rngs=rngs)
        self.fc2 = nnx.Linear(500, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b 28 28 1"]) -> Float[Array, "b classes"]:
        """Logits."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


def make_lenet300(activation: str = "tanh") -> LeNet300:
    """The registry's factory."""
    return LeNet300(activation, rngs=nnx.Rngs(0))


def make_lenet5() -> LeNet5:
    """The registry's factory."""
    return LeNet5(rngs=nnx.Rngs(0))


# The names of github UCMerced-ML/LC-model-compression, examples/lenet300.
LENET300_NAMES = {"fc1": "compressible_0", "fc2": "compressible_1", "fc3": "compressible_2"}


def minus_mean_image(dataset: Dataset | None) -> Normalization:
    """x/255 minus the mean training image.

    Raises:
        ValueError: no data set.
    """
    if dataset is None:
        raise ValueError(
            "dataset is None, but this network's inputs have the mean training image subtracted: "
            "pass dataset=unified_approx.datasets.load('mnist')"
        )
    mean = np.asarray(np.mean(dataset.x_train, axis=0, dtype=np.float64) / 255, np.float32)
    return Normalization(255.0, mean[..., None], np.ones(1, np.float32))
