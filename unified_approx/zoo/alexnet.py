"""AlexNet for ImageNet, in the single-tower version that torchvision publishes.

Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks (2014), after Krizhevsky, Sutskever and
Hinton (2012): no groups, no response normalization, 61,100,840 parameters.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.zoo.pooling import adaptive_mean_pool
from unified_approx.zoo.widths import scaled_width

_SIDE = 6  # of the feature map that the dense layers read
FLATTEN = {"fc6": (_SIDE, _SIDE, None)}  # PyTorch flattens channels first
TORCH_NAMES = {
    **{f"conv{i + 1}": f"features.{n}" for i, n in enumerate((0, 3, 6, 8, 10))},
    **{f"fc{i + 6}": f"classifier.{n}" for i, n in enumerate((1, 4, 6))},
}


class AlexNet(nnx.Module):
    """Convolutions `conv1` to `conv5` (64, 192, 384, 256, 256 channels), dense layers `fc6`, `fc7` (4096), `fc8`.

    Images of any size from 63 pixels: the last feature map is averaged to 6×6.

    Args:
        num_classes: outputs.
        width: factor on all hidden channels and features.
        dropout: rate before `fc6` and `fc7` in training mode, which then needs `rngs` in every call; published: 0.5.
        rngs: keys of the initialisers.

    Raises:
        ValueError: `width` is not positive.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.0, *, rngs: nnx.Rngs):
        c1, c2, c3, c4, c5, hidden = (scaled_width(c, width) for c in (64, 192, 384, 256, 256, 4096))

        def conv(c_in: int, c_out: int, k: int, padding: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(c_in, c_out, (k, k), stride, padding=((padding, padding),) * 2, rngs=rngs)

        self.conv1, self.conv2 = conv(3, c1, 11, 2, 4), conv(c1, c2, 5, 2)
        self.conv3, self.conv4, self.conv5 = conv(c2, c3, 3, 1), conv(c3, c4, 3, 1), conv(c4, c5, 3, 1)
        self.fc6 = nnx.Linear(_SIDE * _SIDE * c5, hidden, rngs=rngs)
        self.fc7 = nnx.Linear(hidden, hidden, rngs=rngs)
        self.fc8 = nnx.Linear(hidden, num_classes, rngs=rngs)
        self.drop = nnx.Dropout(dropout)
        self.num_classes, self.width, self.dropout = num_classes, width, dropout

    def __call__(
        self, x: Float[Array, "b h w 3"], rngs: nnx.Rngs | jax.Array | None = None
    ) -> Float[Array, "b classes"]:
        """Logits; `rngs` only for dropout in training mode."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (3, 3), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (3, 3), (2, 2))
        x = nnx.relu(self.conv4(nnx.relu(self.conv3(x))))
        x = nnx.max_pool(nnx.relu(self.conv5(x)), (3, 3), (2, 2))
        x = adaptive_mean_pool(x, _SIDE).reshape(x.shape[0], -1)
        x = nnx.relu(self.fc6(self.drop(x, rngs=rngs)))
        x = nnx.relu(self.fc7(self.drop(x, rngs=rngs)))
        return self.fc8(x)


def make_alexnet(num_classes: int = 1000, width: float = 1.0, dropout: float = 0.0) -> AlexNet:
    """The registry's factory."""
    return AlexNet(num_classes, width, dropout, rngs=nnx.Rngs(0))
