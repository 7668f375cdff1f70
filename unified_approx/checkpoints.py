"""Checkpoints of training runs, written by Orbax."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from unified_approx.files import claim, replacing

_KEPT = 2


class Checkpoints:
    """A folder of checkpoints that belongs to one training run."""

    def __init__(self, path: str | PathLike[str], identity: dict[str, Any], start: Sequence[float] = ()):
        """Open or create the folder.

        Args:
            path: of the folder.
            identity: of the run; must be the same.
            start: numbers that tell where the run started; must be nearly the same.

        Raises:
            ValueError: the folder holds other files, or the checkpoints of another run.
        """
        folder = claim(path, "checkpoint_dir", identity).absolute()
        _check_start(folder / "start.json", list(start))
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder / "steps", options=options)

    def save(self, number: int, state: PyTree, history: list[dict[str, Any]]) -> None:
        """Write one checkpoint; it is there whole or not at all."""
        arrays = {str(i): _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        lines = ocp.args.JsonSave({"epochs": history})
        self._manager.save(number, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), history=lines))
        self._manager.wait_until_finished()

    def latest(self, like: PyTree) -> dict[str, Any] | None:
        """The last checkpoint in the structure of `like`, with its "history"; None if there is none."""
        number = self._manager.latest_step()
        if number is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        arrays = {str(i): _plain(leaf) for i, leaf in enumerate(leaves)}
        found = self._manager.restore(
            number, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays), history=ocp.args.JsonRestore())
        )
        restored = [_as(leaf, found["state"][str(i)]) for i, leaf in enumerate(leaves)]
        return {**jax.tree.unflatten(structure, restored), "history": found["history"]["epochs"]}


def _check_start(file: Path, start: list[float]) -> None:
    if not file.exists():
        with replacing(file) as partial:
            partial.write_text(json.dumps(start))
        return
    found = json.loads(file.read_text())
    if len(found) != len(start) or not np.allclose(found, start, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"checkpoint_dir: {file.parent} belongs to another run (its weights differ); give a new folder, or start "
            "from the same networks"
        )


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as(leaf: Any, value: np.ndarray) -> jax.Array:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jax.numpy.asarray(value))
    return jax.numpy.asarray(value, leaf.dtype)
