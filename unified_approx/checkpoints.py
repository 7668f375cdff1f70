"""Checkpoints of training runs, written by Orbax."""

from os import PathLike
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from unified_approx.files import claim

_KEPT = 2


class Checkpoints:
    """A folder of checkpoints that belongs to one training run."""

    def __init__(self, path: str | PathLike[str], identity: dict[str, Any]):
        """Open or create the folder.

        Raises:
            ValueError: the folder holds other files, or the checkpoints of another run.
        """
        folder = claim(path, "checkpoint_dir", identity).absolute()
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


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as(leaf: Any, value: np.ndarray) -> jax.Array:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jax.numpy.asarray(value))
    return jax.numpy.asarray(value, leaf.dtype)
