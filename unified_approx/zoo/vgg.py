"""VGG-16 for CIFAR-10.

Simonyan and Zisserman, Very Deep Convolutional Networks (2015), configuration D, with batch norm after every
convolution and one linear layer 512 -> 10 in place of the three.
"""

from flax import nnx
from jaxtyping import Array, Float

_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOL_AFTER = (1, 3, 6, 9, 12)


class Vgg16(nnx.Module):
    """Thirteen 3×3 convolutions `convs/i` without bias, batch norms `norms/i`, and `fc`."""

    def __init__(self, *, num_classes: int = 10, rngs: nnx.Rngs):
        pairs = list(zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True))
        self.convs = nnx.List([nnx.Conv(i, o, (3, 3), padding="SAME", use_bias=False, rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([nnx.BatchNorm(o, rngs=rngs) for o in _WIDTHS])
        self.fc = nnx.Linear(_WIDTHS[-1], num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b 32 32 3"]) -> Float[Array, "b classes"]:
        """Logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(norm(conv(x)))
            if i in _POOL_AFTER:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.fc(x.reshape(x.shape[0], -1))


def make_vgg16() -> Vgg16:
    """The registry's factory."""
    return Vgg16(rngs=nnx.Rngs(0))


def torch_names() -> dict[str, str]:
    """Torchvision's names: features.N numbers convolution, norm, ReLU and pooling one after the other."""
    names, n = {"fc": "classifier"}, 0
    for i in range(len(_WIDTHS)):
        names |= {f"convs/{i}": f"features.{n}", f"norms/{i}": f"features.{n + 1}"}
        n += 4 if i in _POOL_AFTER else 3
    return names
