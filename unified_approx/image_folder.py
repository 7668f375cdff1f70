"""Photographs in one folder per class, as ImageNet is usually unpacked: decoded, resized and cropped when asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def resize_and_crop(image: Image.Image, resize: int = 256, crop: int = 224) -> UInt8[np.ndarray, "crop crop 3"]:
    """The shorter side resized (bilinear, antialiased), then the centre cut out: torchvision's evaluation transform.

    Args:
        image: of any mode; it is converted to RGB.
        resize: pixels of the shorter side afterwards.
        crop: pixels of both sides of the result.

    Raises:
        ValueError: `crop` is larger than `resize`, or below 1.
    """
    if not 1 <= crop <= resize:
        raise ValueError(
            f"crop={crop}, resize={resize}: the crop must be at least 1 pixel and at most the resized side"
        )
    width, height = image.size
    short = min(width, height)
    size = (resize * width // short, resize * height // short)
    resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images below `root/<class>/`, not yet read. Label i is the i-th class name in sorted order.

    For ImageNet's folders (`n01440764`, ...) that is the order of torchvision's weights.

    Attributes:
        classes: names of the folders, sorted.
        files: one path per image, class by class, sorted.
        labels: one per image.
        resize: see `resize_and_crop`.
        crop: likewise.
    """

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: Int32[np.ndarray, " images"]
    resize: int = 256
    crop: int = 224

    def __len__(self) -> int:
        return len(self.files)

    def choose(self, count: int, seed: int) -> "ImageFolder":
        """`count` images (all, if there are fewer) drawn without replacement, in random order."""
        return self.select(np.random.default_rng(seed).permutation(len(self))[:count])

    def select(self, indices: Sequence[int] | Int[np.ndarray, " chosen"]) -> "ImageFolder":
        """The images at some positions, with the same classes."""
        files = tuple(self.files[i] for i in indices)
        return ImageFolder(self.classes, files, self.labels[np.asarray(indices, int)], self.resize, self.crop)

    def images(self) -> UInt8[np.ndarray, "images crop crop 3"]:
        """All of them, decoded: 3 crop^2 bytes each.

        Raises:
            ValueError: an image cannot be decoded.
        """
        out = np.empty((len(self), self.crop, self.crop, 3), np.uint8)
        for i, file in enumerate(self.files):
            out[i] = self._decode(file)
        return out

    def batches(
        self, size: int
    ) -> Iterator[tuple[UInt8[np.ndarray, "batch crop crop 3"], Int32[np.ndarray, " batch"]]]:
        """(images, labels) of `size` images after the other, decoded one batch at a time; the last may be smaller.

        Raises:
            ValueError: `size` below 1, or an image cannot be decoded.
        """
        if size < 1:
            raise ValueError(f"size: {size} images in a batch; give at least 1")
        for start in range(0, len(self), size):
            part = self.select(range(start, min(start + size, len(self))))
            yield part.images(), part.labels

    def _decode(self, file: Path) -> UInt8[np.ndarray, "crop crop 3"]:
        try:
            with Image.open(file) as image:
                return resize_and_crop(image, self.resize, self.crop)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is not a readable image ({error}): copy it again, or delete it") from error


def open_folder(root: str | Path, *, classes: int | None = None, resize: int = 256, crop: int = 224) -> ImageFolder:
    """Lists the images of a folder with one folder per class (torchvision's ImageFolder); nothing is decoded.

    Args:
        root: such as `imagenet/val`, which holds `n01440764/ILSVRC2012_val_00000293.JPEG` and so on.
        classes: how many classes there must be.
        resize: see `resize_and_crop`.
        crop: likewise.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no folders, another number of them than `classes`, or one without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {root}; give one with a folder of images per class")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    layout = f"{root}/<class>/<image>.JPEG, such as {root}/n01440764/ILSVRC2012_val_00000293.JPEG"
    if not folders:
        raise ValueError(f"root: {root} has no folders; the images must be laid out as {layout}")
    if classes is not None and len(folders) != classes:
        raise ValueError(
            f"root: {root} has {len(folders)} folders, expected one for each of {classes} classes: {layout}"
        )
    files = [sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) for folder in folders]
    if empty := [folder for folder, found in zip(folders, files, strict=True) if not found]:
        raise ValueError(f"root: {empty[0]} holds no images ({', '.join(SUFFIXES)}); expected {layout}")
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(found) for found in files])
    names = tuple(folder.name for folder in folders)
    return ImageFolder(names, tuple(file for found in files for file in found), labels, resize, crop)


def enlarged(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n side side 3"]:
    """Small images resized (bilinear) to side × side pixels: stand-ins for photographs of that size."""
    size = (side, side)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images])
