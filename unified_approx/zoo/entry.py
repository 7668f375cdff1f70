"""What the zoo knows of a network besides its class: input, classes, normalization, names of published weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Shaped

from unified_approx.datasets import Dataset
from unified_approx.zoo.torch_layout import Flatten, Names, dotted


@dataclass(frozen=True, eq=False)
class Normalization:
    """images -> (images / scale - mean) / std in float32, `mean` and `std` broadcast over an NHWC batch.

    Attributes:
        scale: the largest raw pixel value.
        mean: (c,) per channel or (h, w, c) per pixel, in units of images / scale.
        std: likewise.
    """

    scale: float
    mean: Float32[np.ndarray, "*mean"]
    std: Float32[np.ndarray, "*std"]

    def __call__(self, images: Shaped[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n h w c"]:
        """Normalize raw images."""
        out = images.astype(np.float32) / np.float32(self.scale)
        out -= self.mean
        out /= self.std
        return out

    def on_device(self, images: Shaped[Array, "n h w c"]) -> Float32[Array, "n h w c"]:
        """The same for a batch of a compiled program."""
        return (images.astype(np.float32) / np.float32(self.scale) - self.mean) / self.std


def channel_normalization(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Dataset | None], Normalization]:
    """A normalization with one mean and one standard deviation per channel, which needs no data set."""
    fixed = Normalization(scale, np.asarray(mean, np.float32), np.asarray(std, np.float32))
    return lambda dataset: fixed


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One row of the zoo.

    Attributes:
        name: what users type.
        make: `make(**options)` builds the network; cheap under `nnx.eval_shape`, slow when run eagerly.
        input_shape: (h, w, c) of one input.
        num_classes: outputs.
        dataset: name of the data set the network is for, see `unified_approx.datasets`; "imagenet" is a folder of
            images, see `unified_approx.image_folder`.
        normalization: the network's normalization, given the data set (None where it is not needed).
        torch_names: module paths -> names in the published weights, see `load_torch_layout`.
        flatten: dense layers after a flattened feature map, see `load_torch_layout`.
        ignored: what published weights hold besides, see `load_torch_layout`.
        weights: weights that come with the package, None if there are none.
    """

    name: str
    make: Callable[..., nnx.Module]
    input_shape: tuple[int, int, int]
    num_classes: int
    dataset: str
    normalization: Callable[[Dataset | None], Normalization]
    torch_names: Names = dotted
    flatten: Flatten = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    weights: Path | None = None

    def preprocess(
        self, images: Shaped[np.ndarray, "..."], dataset: Dataset | None = None
    ) -> Float32[np.ndarray, "n h w c"]:
        """Raw images -> what the network takes: float32, NHWC, normalized.

        Args:
            images: (n, h, w, c), or (n, h, w) for grey images; uint8, or floating point in the same units (0 to 255;
                0 to 16 for the digits), not yet divided.
            dataset: the data set whose training images the normalization is made from; only the MNIST networks,
                which subtract the mean training image, need it.

        Raises:
            ValueError: wrong shape or dtype, or the data set is missing.
        """
        h, w, c = self.input_shape
        grey = c == 1 and images.shape[1:] == (h, w)
        if not grey and images.shape[1:] != self.input_shape:
            raise ValueError(f"images have shape {images.shape}, but {self.name} takes (n, {h}, {w}, {c}): resize them")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images have dtype {images.dtype}, expected uint8 or a floating point type: convert them")
        return self.normalization(dataset)(images.reshape(-1, h, w, c))
