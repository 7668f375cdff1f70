"""GoogLeNet for ImageNet, as torchvision publishes it.

Szegedy et al., Going Deeper with Convolutions (2015), with batch norm in place of biases and, as in torchvision,
3×3 convolutions where the paper has 5×5. 6,624,904 parameters; the two auxiliary heads, which only help training, are
not part of the network.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.zoo.pooling import ceil_max_pool
from unified_approx.zoo.widths import scaled_width

_STEM = (64, 64, 192)
# Channels of branch 1; of both convolutions of branch 2; of branch 3; of branch 4.
_BLOCKS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
_POOL_AFTER = {"inception3b": 3, "inception4e": 2}  # window of the pooling with stride 2 that follows

AUXILIARY = ("aux1.", "aux2.")  # heads in published files that this network does not have


class BasicConv(nnx.Module):
    """Convolution `conv` without bias, batch norm `bn`, ReLU."""

    def __init__(self, c_in: int, c_out: int, k: int, stride: int = 1, *, rngs: nnx.Rngs):
        padding = ((k // 2, k // 2),) * 2
        self.conv = nnx.Conv(c_in, c_out, (k, k), stride, padding=padding, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(c_out, epsilon=1e-3, momentum=0.9, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The response after the ReLU."""
        return nnx.relu(self.bn(self.conv(x)))


class Inception(nnx.Module):
    """Four branches side by side: 1×1; 1×1 and 3×3, twice; 3×3 max pooling and 1×1. Their channels are concatenated."""

    def __init__(self, c_in: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        one, reduce2, two, reduce3, three, four = widths
        conv = partial(BasicConv, rngs=rngs)
        self.branch1 = conv(c_in, one, 1)
        self.branch2 = nnx.List([conv(c_in, reduce2, 1), conv(reduce2, two, 3)])
        self.branch3 = nnx.List([conv(c_in, reduce3, 1), conv(reduce3, three, 3)])
        self.branch4 = conv(c_in, four, 1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """The branches' responses, in order."""
        second, third = (branch[1](branch[0](x)) for branch in (self.branch2, self.branch3))
        return jnp.concatenate([self.branch1(x), second, third, self.branch4(ceil_max_pool(x, 3, 1, 1))], axis=-1)


class GoogLeNet(nnx.Module):
    """`conv1` to `conv3`, nine blocks `inception3a` to `inception5b`, global mean, `fc`.

    Args:
        num_classes: outputs.
        width: factor on all channels.
        dropout: rate before `fc` in training mode, which then needs `rngs` in every call; published: 0.2.
        rngs: keys of the initialisers.

    Raises:
        ValueError: `width` is not positive.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.0, *, rngs: nnx.Rngs):
        first, second, channels = (scaled_width(c, width) for c in _STEM)
        self.conv1 = BasicConv(3, first, 7, 2, rngs=rngs)
        self.conv2 = BasicConv(first, second, 1, rngs=rngs)
        self.conv3 = BasicConv(second, channels, 3, rngs=rngs)
        for name, published in _BLOCKS.items():
            widths = tuple(scaled_width(c, width) for c in published)
            setattr(self, name, Inception(channels, widths, rngs=rngs))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.fc = nnx.Linear(channels, num_classes, rngs=rngs)
        self.drop = nnx.Dropout(dropout)
        self.num_classes, self.width, self.dropout = num_classes, width, dropout

    def __call__(
        self, x: Float[Array, "b h w 3"], rngs: nnx.Rngs | jax.Array | None = None
    ) -> Float[Array, "b classes"]:
        """Logits; `rngs` only for dropout in training mode."""
        x = ceil_max_pool(self.conv1(x), 3, 2)
        x = ceil_max_pool(self.conv3(self.conv2(x)), 3, 2)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
            if name in _POOL_AFTER:
                x = ceil_max_pool(x, _POOL_AFTER[name], 2)
        return self.fc(self.drop(jnp.mean(x, axis=(1, 2)), rngs=rngs))


def make_googlenet(num_classes: int = 1000, width: float = 1.0, dropout: float = 0.0) -> GoogLeNet:
    """The registry's factory."""
    return GoogLeNet(num_classes, width, dropout, rngs=nnx.Rngs(0))


def torch_names(path: str) -> str:
    """Torchvision's names: inception3a/branch4/conv -> inception3a.branch4.1.conv."""
    return path.replace("/branch4/", "/branch4/1/").replace("/", ".")
