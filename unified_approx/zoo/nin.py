"""Network in Network for CIFAR-10.

Lin, Chen and Yan, Network in Network (2014), with the layer sizes of the authors' Caffe model: three convolutions,
each followed by two 1×1 ones, and global average pooling in place of dense layers. No dropout.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class NetworkInNetwork(nnx.Module):
    """`conv1 cccp1 cccp2`, pool, `conv2 cccp3 cccp4`, pool, `conv3 cccp5 cccp6`, global mean.

    Args:
        batch_norm: norms after all convolutions, `norms/i` in their order, in place of biases.
        num_classes: outputs.
        rngs: keys of the initialisers.
    """

    def __init__(self, batch_norm: bool = False, *, num_classes: int = 10, rngs: nnx.Rngs):
        def conv(c_in: int, c_out: int, k: int) -> nnx.Conv:
            return nnx.Conv(c_in, c_out, (k, k), padding="SAME", use_bias=not batch_norm, rngs=rngs)

        self.batch_norm = batch_norm
        self.conv1, self.cccp1, self.cccp2 = conv(3, 192, 5), conv(192, 160, 1), conv(160, 96, 1)
        self.conv2, self.cccp3, self.cccp4 = conv(96, 192, 5), conv(192, 192, 1), conv(192, 192, 1)
        self.conv3, self.cccp5, self.cccp6 = conv(192, 192, 3), conv(192, 192, 1), conv(192, num_classes, 1)
        widths = [layer.out_features for layer in self._layers()] if batch_norm else []
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths])

    def _layers(self) -> tuple[nnx.Conv, ...]:
        first, second = (self.conv1, self.cccp1, self.cccp2), (self.conv2, self.cccp3, self.cccp4)
        return *first, *second, self.conv3, self.cccp5, self.cccp6

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """Logits: the means of the last feature maps, which are non-negative."""
        for i, layer in enumerate(self._layers()):
            if i == 3:
                x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
            if i == 6:  # float64 under x64
                x = nnx.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False).astype(x.dtype)
            x = layer(x)
            x = nnx.relu(self.norms[i](x) if self.batch_norm else x)
        return jnp.mean(x, axis=(1, 2))


def make_nin(batch_norm: bool = False) -> NetworkInNetwork:
    """The registry's factory."""
    return NetworkInNetwork(batch_norm, rngs=nnx.Rngs(0))
