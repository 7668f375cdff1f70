"""VGG for CIFAR-10.

Simonyan and Zisserman, Very Deep Convolutional Networks (2015), configurations A, B, D and E and a shallow one of three
stages, with one linear layer in place of the three.
"""

from collections.abc import Callable
from itertools import accumulate

from flax import nnx
from jaxtyping import Array, Float

_WIDTHS = (64, 128, 256, 512, 512)
_STAGES = {9: (2, 2, 3), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
DEPTHS = tuple(_STAGES)
"""Of the networks with their three linear layers."""


def _side_after(depth: int) -> int:
    return 32 // 2 ** len(_STAGES[depth])


def _pooled(depth: int) -> set[int]:
    """The convolutions that end a stage."""
    return {count - 1 for count in accumulate(_STAGES[depth])}


class Vgg(nnx.Module):
    """3×3 convolutions `convs/i`, batch norms `norms/i` in place of their biases, 2×2 max pooling, and `fc`.

    Args:
        depth: one of `DEPTHS`.
        batch_norm: False for biases in place of the norms.
        num_classes: outputs.
        rngs: keys of the initialisers.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int = 16, batch_norm: bool = True, *, num_classes: int = 10, rngs: nnx.Rngs):
        if depth not in _STAGES:
            raise ValueError(f"depth is {depth}: choose one of {', '.join(map(str, DEPTHS))}")
        self.depth, self.batch_norm = depth, batch_norm
        widths = [width for width, count in zip(_WIDTHS, _STAGES[depth], strict=False) for _ in range(count)]
        self.convs = nnx.List(
            [
                nnx.Conv(i, o, (3, 3), padding="SAME", use_bias=not batch_norm, rngs=rngs)
                for i, o in zip((3, *widths), widths, strict=False)
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(o, rngs=rngs) for o in widths] if batch_norm else [])
        self.fc = nnx.Linear(widths[-1] * _side_after(depth) ** 2, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b 32 32 3"]) -> Float[Array, "b classes"]:
        """Logits."""
        pooled = _pooled(self.depth)
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = nnx.relu(self.norms[i](x) if self.batch_norm else x)
            if i in pooled:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.fc(x.reshape(x.shape[0], -1))


def make_vgg(depth: int, batch_norm: bool) -> Callable[[], Vgg]:
    """A factory without options, for the registry."""
    return lambda: Vgg(depth, batch_norm, rngs=nnx.Rngs(0))


def torch_names(depth: int, batch_norm: bool) -> Callable[[str], str]:
    """Torchvision's names: features.N numbers convolution, norm (if any), ReLU and pooling one after another."""

    def name(path: str) -> str:
        if path == "fc":
            return "classifier"
        kind, i = path.split("/")
        before = sum(pooled < int(i) for pooled in _pooled(depth))
        return f"features.{(2 + batch_norm) * int(i) + before + (kind == 'norms')}"

    return name


def flatten(depth: int) -> dict[str, tuple[int, int, int | None]]:
    """Where the linear layer reads a feature map of more than one pixel."""
    side = _side_after(depth)
    return {"fc": (side, side, _WIDTHS[len(_STAGES[depth]) - 1])} if side > 1 else {}
