"""Files that are there whole or not at all, and folders that belong to one run."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

_MANIFEST = "run.json"


def fingerprint_of(*trees: PyTree) -> str:
    """SHA-256 of all arrays, with their shapes and types."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@contextmanager
def replacing(target: str | PathLike[str]) -> Iterator[Path]:
    """A file beside `target` to write to; it takes the target's place when the block ends without an error."""
    final = Path(target)
    partial = final.with_name(final.name + ".partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(final)


def claim(folder: str | PathLike[str], argument: str, identity: dict[str, Any]) -> Path:
    """Make a folder that belongs to one run, or see that it is that run's.

    Args:
        folder: new, empty, or claimed before.
        argument: its name in the caller's signature, for the errors.
        identity: of the run, JSON-able.

    Raises:
        ValueError: the folder holds other files, another run's, or a damaged manifest.
    """
    path, wanted = Path(folder), json.loads(json.dumps(identity))
    path.mkdir(parents=True, exist_ok=True)
    manifest = path / _MANIFEST
    if not manifest.exists():
        if any(path.iterdir()):
            raise ValueError(f"{argument}: {path} is not empty and holds no {_MANIFEST}; give a new folder")
        with replacing(manifest) as partial:
            partial.write_text(json.dumps(wanted))
        return path
    try:
        found = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument}: {manifest} cannot be read ({error}); delete the folder") from error
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{argument}: {path} belongs to another run (its {different[0]} differs); give a new folder, or repeat "
            "that run's arguments"
        )
    return path
