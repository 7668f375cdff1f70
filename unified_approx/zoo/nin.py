"""Network in Network for CIFAR-10.

Lin, Chen and Yan, Network in Network (2014), with the layer sizes of the authors' Caffe model: three convolutions,
each followed by two 1×1 ones, and global average pooling in place of dense layers. No dropout.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class NetworkInNetwork(nnx.Module):
    """`conv1 cccp1 cccp2`, pool, `conv2 cccp3 cccp4`, pool, `conv3 cccp5 cccp6`, global mean."""

    def __init__(self, *, num_classes: int = 10, rngs: nnx.Rngs):
        def conv(c_in: int, c_out: int, k: int) -> nnx.Conv:
            return nnx.Conv(c_in, c_out, (k, k), padding="SAME", rngs=rngs)

        self.conv1, self.cccp1, self.cccp2 = conv(3, 192, 5), conv(192, 160, 1), conv(160, 96, 1)
        self.conv2, self.cccp3, self.cccp4 = conv(96, 192, 5), conv(192, 192, 1), conv(192, 192, 1)
        self.conv3, self.cccp5, self.cccp6 = conv(192, 192, 3), conv(192, 192, 1), conv(192, num_classes, 1)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """Logits: the means of the last feature maps, which are non-negative."""
        for layer in (self.conv1, self.cccp1, self.cccp2):
            x = nnx.relu(layer(x))
        x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for layer in (self.conv2, self.cccp3, self.cccp4):
            x = nnx.relu(layer(x))
        x = nnx.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False).astype(x.dtype)  # float64 under x64
        for layer in (self.conv3, self.cccp5, self.cccp6):
            x = nnx.relu(layer(x))
        return jnp.mean(x, axis=(1, 2))


def make_nin() -> NetworkInNetwork:
    """The registry's factory."""
    return NetworkInNetwork(rngs=nnx.Rngs(0))
