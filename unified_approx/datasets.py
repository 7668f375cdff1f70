"""Image data sets: CIFAR-10 and MNIST from files or downloaded, scikit-learn's digits from the library itself."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from jaxtyping import Int32, Shaped, UInt8
from sklearn.datasets import load_digits

ENVIRONMENT = "UNIFIED_APPROX_DATA"
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CLASSES = 10  # of every data set here
_SHAPES = {"cifar10": (32, 32, 3), "mnist": (28, 28), "digits": (8, 8)}
_SOURCES = {
    "cifar10": (
        # The binary version: the one for Python is a pickle, which can run code when read.
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "mnist": (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    ),
}
_DIGITS_TEST = 500


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels as stored; the networks' entries in the zoo know how to normalize them.

    Attributes:
        name: "cifar10", "mnist" or "digits".
        x_train: images, (n, h, w, 3) RGB or (n, h, w) grey; 0 to 255, the digits 0 to 16.
        y_train: labels 0 to 9.
        x_test: likewise.
        y_test: likewise.
    """

    name: str
    x_train: UInt8[np.ndarray, "train *image"]
    y_train: Int32[np.ndarray, " train"]
    x_test: UInt8[np.ndarray, "test *image"]
    y_test: Int32[np.ndarray, " test"]


def names() -> tuple[str, ...]:
    """Names of the data sets."""
    return tuple(_SHAPES)


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name.

    CIFAR-10 and MNIST are read from `<data_dir>/<name>.npz` (keys x_train, y_train, x_test, y_test). Without
    `data_dir` they are looked for in the folder $UNIFIED_APPROX_DATA, and else downloaded once, with a checksum, into
    the user's cache. The digits need no file: 1,297 training and 500 test images, always the same.

    Args:
        name: one of `names()`.
        data_dir: a folder with the npz file; nothing is downloaded if it is given.

    Raises:
        FileNotFoundError: `data_dir` has no such file; the download failed.
        ValueError: unknown name; the file is damaged, or its arrays have a wrong dtype, shape or labels.
    """
    if name not in _SHAPES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(_SHAPES)}")
    if name == "digits":
        return _digits()
    folder = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT)
    path = Path(folder) / f"{name}.npz" if folder else None
    if path is not None and (data_dir is not None or path.is_file()):
        if not path.is_file():
            raise FileNotFoundError(f"data_dir has no {path}: put the file there, or leave data_dir out to download it")
        return _validated(name, _read_npz(path), str(path))
    downloaded = _download(name)
    arrays = _read_cifar_binary(downloaded) if name == "cifar10" else _read_npz(downloaded)
    return _validated(name, arrays, str(downloaded))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an npz archive")
        with file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise ValueError(f"no array {missing[0]!r}, it needs {', '.join(_KEYS)}")
            return {key: file[key] for key in _KEYS}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a readable data set ({error}): delete it and make or download it again"
        ) from error


def _download(name: str) -> Path:
    url, known_hash = _SOURCES[name]
    try:
        return Path(pooch.retrieve(url, known_hash, path=pooch.os_cache("unified-approx")))
    except OSError as error:  # the network's exceptions are OSErrors
        raise FileNotFoundError(
            f"{name}.npz was not found in ${ENVIRONMENT}, and downloading {url} failed ({error}): "
            f"give data_dir=, a folder with {name}.npz"
        ) from error
    except ValueError as error:
        raise ValueError(f"what {url} sent is not the expected file ({error}): try again, or give data_dir=") from error


def _read_cifar_binary(path: Path) -> dict[str, np.ndarray]:
    """The official binary archive: files of records of 1 label byte and 3·32·32 pixel bytes, channel by channel."""
    record = 1 + 3 * 32 * 32
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if member.name.endswith(".bin") and content is not None:
                    parts[Path(member.name).name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete tar.gz archive ({error}): delete it and try again") from error

    def split(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
        for file in files:
            if len(parts.get(file, b"")) % record or not parts.get(file):
                raise ValueError(f"{path}: {file} is missing or incomplete: delete the archive and try again")
        rows = np.frombuffer(b"".join(parts[file] for file in files), np.uint8).reshape(-1, record)
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    x_train, y_train = split([f"data_batch_{i}.bin" for i in range(1, 6)])
    x_test, y_test = split(["test_batch.bin"])
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _validated(name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]], source: str) -> Dataset:
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.shape[1:] != _SHAPES[name] or not len(x):
            raise ValueError(f"{source}: x_{split} is {x.dtype} {x.shape}, expected uint8 (n, *{_SHAPES[name]}), n > 0")
        if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
            raise ValueError(f"{source}: y_{split} is {y.dtype} {y.shape}, expected integers ({len(x)},)")
        if y.min() < 0 or y.max() >= _CLASSES:
            raise ValueError(f"{source}: y_{split} has labels {y.min()} to {y.max()}, expected 0 to {_CLASSES - 1}")
    labels = {key: arrays[key].astype(np.int32) for key in ("y_train", "y_test")}
    images = {key: np.ascontiguousarray(arrays[key]) for key in ("x_train", "x_test")}
    return Dataset(name, images["x_train"], labels["y_train"], images["x_test"], labels["y_test"])


def _digits() -> Dataset:
    data, target = load_digits(return_X_y=True)
    x, y = np.asarray(data).reshape(-1, 8, 8).astype(np.uint8), np.asarray(target)
    # A shuffle that no version of a random generator can change.
    order = sorted(range(len(x)), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    x, y = x[order], y[order]
    train, test = slice(_DIGITS_TEST, None), slice(_DIGITS_TEST)
    arrays = {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
    return _validated("digits", arrays, "scikit-learn's digits")
