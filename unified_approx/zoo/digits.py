"""A small convolutional network for scikit-learn's 8×8 digits, trained by `experiments/train_digits.py`."""

from collections.abc import Callable
from pathlib import Path

from flax import nnx
from jaxtyping import Array, Float

WEIGHTS = Path(__file__).with_name("digits.safetensors")
FLATTEN = {"fc": (4, 4, 64)}


class DigitsNet(nnx.Module):
    """Three 3×3 convolutions with ReLU, one pooling, one dense layer; 65,994 parameters without batch norm.

    Paths: `conv1` (1 -> 32), `conv2` (32 -> 64), 2×2 max pooling, `conv3` (64 -> 64), `fc` (1024 -> 10); with batch
    norm also `bn1`, `bn2`, `bn3`.

    Args:
        batch_norm: a batch norm after each convolution, which then has no bias. The packaged weights have none.
        num_classes: outputs.
        rngs: keys of the initialisers.
    """

    def __init__(self, batch_norm: bool = False, *, num_classes: int = 10, rngs: nnx.Rngs):
        def conv(c_in: int, c_out: int) -> nnx.Conv:
            return nnx.Conv(c_in, c_out, (3, 3), padding="SAME", use_bias=not batch_norm, rngs=rngs)

        self.batch_norm = batch_norm
        self.conv1, self.conv2, self.conv3 = conv(1, 32), conv(32, 64), conv(64, 64)
        if batch_norm:
            self.bn1, self.bn2, self.bn3 = (nnx.BatchNorm(c, rngs=rngs) for c in (32, 64, 64))
        self.fc = nnx.Linear(4 * 4 * 64, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b 8 8 1"]) -> Float[Array, "b classes"]:
        """Logits."""
        norms: list[Callable[[Array], Array]] = [lambda z: z] * 3
        if self.batch_norm:
            norms = [self.bn1, self.bn2, self.bn3]
        x = nnx.relu(norms[0](self.conv1(x)))
        x = nnx.relu(norms[1](self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(norms[2](self.conv3(x)))
        return self.fc(x.reshape(x.shape[0], -1))


def make_digits(batch_norm: bool = False) -> DigitsNet:
    """The registry's factory."""
    return DigitsNet(batch_norm, rngs=nnx.Rngs(0))
