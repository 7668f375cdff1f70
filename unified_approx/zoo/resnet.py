"""Residual networks for CIFAR-10.

He et al., Deep Residual Learning for Image Recognition (2016), section 4.2: 6n + 2 layers, three stages of n blocks
with 16, 32 and 64 channels, and shortcuts without parameters (their option A), or projections between the stages (B).
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_ONE = ((1, 1), (1, 1))  # explicit: with stride 2 "SAME" would pad on one side only


def _conv3x3(c_in: int, c_out: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(c_in, c_out, (3, 3), strides=stride, padding=_ONE, use_bias=False, rngs=rngs)


class Block(nnx.Module):
    """Two 3×3 convolutions and a shortcut: every `stride`-th pixel, new channels zero, evenly on both sides.

    With `projection` a 1×1 convolution `shortcut` and a norm `bn_shortcut` where the shape changes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, projection: bool = False, *, rngs: nnx.Rngs):
        self.stride = stride
        self.pad = (c_out - c_in) // 2
        self.conv1 = _conv3x3(c_in, c_out, stride, rngs)
        self.bn1 = nnx.BatchNorm(c_out, rngs=rngs)
        self.conv2 = _conv3x3(c_out, c_out, 1, rngs)
        self.bn2 = nnx.BatchNorm(c_out, rngs=rngs)
        self.projects = projection and (stride > 1 or c_out != c_in)
        if self.projects:
            self.shortcut = nnx.Conv(c_in, c_out, (1, 1), strides=stride, padding="VALID", use_bias=False, rngs=rngs)
            self.bn_shortcut = nnx.BatchNorm(c_out, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The block's response, after its last ReLU."""
        shortcut = x
        if self.projects:
            shortcut = self.bn_shortcut(self.shortcut(x))
        elif self.stride > 1 or self.pad:
            shortcut = x[:, :: self.stride, :: self.stride]
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (self.pad, self.pad)))
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet(nnx.Module):
    """CIFAR ResNet of 6 · `blocks_per_stage` + 2 layers: `conv1`, `bn1`, `blocks/i`, `fc`."""

    def __init__(self, blocks_per_stage: int, projection: bool = False, *, num_classes: int = 10, rngs: nnx.Rngs):
        self.projection = projection
        self.conv1 = _conv3x3(3, 16, 1, rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        blocks, c_in = [], 16
        for stage, c_out in enumerate((16, 32, 64)):
            for i in range(blocks_per_stage):
                blocks.append(Block(c_in, c_out, 2 if stage and not i else 1, projection, rngs=rngs))
                c_in = c_out
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """Logits."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))


def make_resnet(blocks_per_stage: int) -> Callable[..., ResNet]:
    """A factory for the registry."""

    def make(projection: bool = False) -> ResNet:
        return ResNet(blocks_per_stage, projection, rngs=nnx.Rngs(0))

    return make


def torch_names(blocks_per_stage: int) -> Callable[[str], str]:
    """Names of github akamaster/pytorch_resnet_cifar10: blocks/4/conv1 -> layer2.1.conv1, fc -> linear."""
    shortcut = {"shortcut": ("shortcut", "0"), "bn_shortcut": ("shortcut", "1")}

    def name(path: str) -> str:
        if not path.startswith("blocks/"):
            return "linear" if path == "fc" else path
        _, i, *rest = path.split("/")
        stage, block = divmod(int(i), blocks_per_stage)
        return ".".join((f"layer{stage + 1}", str(block), *(part for r in rest for part in shortcut.get(r, (r,)))))

    return name
