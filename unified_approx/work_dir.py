"""Solved layers on disk, one file each, so that a killed run resumes at the next layer."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from solvers.terms import Term
from unified_approx.allocation.sensitivity import Sensitivity
from unified_approx.files import claim, fingerprint_of, replacing
from unified_approx.layers import KINDS, layer_class

_SENSITIVITY = "sensitivity.json"
_ALLOCATION = "allocation.json"


def fingerprint(settings: dict[str, Any], model: nnx.Module, data: PyTree) -> str:
    """SHA-256 of the settings, the weights and the data: two runs agree on it only if they would do the same."""
    words = json.dumps(settings, sort_keys=True, default=repr).encode()
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return fingerprint_of(np.frombuffer(words, np.uint8), weights, data)


class WorkDir:
    """A folder of solved layers that belongs to one run."""

    def __init__(self, path: str | PathLike[str], run: str) -> None:
        self.path = claim(path, "work_dir", {"weights, data or settings": run})

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:04d}.safetensors"

    def store(self, index: int, terms: tuple[Term, ...], bias: np.ndarray, row: dict[str, Any]) -> None:
        """Write one solved layer; it is there whole or not at all."""
        tensors = {"bias": np.ascontiguousarray(bias)}
        for i, term in enumerate(terms):
            tensors |= {f"{i}.{name}": np.ascontiguousarray(value) for name, value in vars(term).items()}
        header = {"kinds": [layer_class(term).kind for term in terms], "row": row}
        with replacing(self._file(index)) as partial:
            save_file(tensors, partial, metadata={"layer": json.dumps(header)})

    def keep_allocation(self, allocation: dict[str, Any], table: Sensitivity | None) -> None:
        """Write what each layer was asked for, and the table that decided.

        Timings differ from run to run: a run that goes on must not ask for other sizes than it began with.
        """
        if table is not None:
            table.save(self.path / _SENSITIVITY)
        with replacing(self.path / _ALLOCATION) as partial:
            partial.write_text(json.dumps(allocation, indent=1))

    def allocation(self) -> dict[str, Any] | None:
        """What `keep_allocation` wrote, or None."""
        path = self.path / _ALLOCATION
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"work_dir: {path} is damaged ({error}); delete the folder to start anew") from error

    def sensitivity(self) -> Sensitivity | None:
        """The table, or None if it has not been measured yet."""
        path = self.path / _SENSITIVITY
        return Sensitivity.load(path) if path.exists() else None

    def fetch(self, index: int) -> tuple[tuple[Term, ...], np.ndarray, dict[str, Any]] | None:
        """A stored layer (terms, bias, report row), or None if it has not been solved yet."""
        path = self._file(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["layer"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"work_dir: {path} is damaged ({error}); delete that file to solve the layer anew"
            ) from error
        terms = []
        for i, kind in enumerate(header["kinds"]):
            prefix = f"{i}."
            fields = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            terms.append(KINDS[kind].term_type(**fields))
        return tuple(terms), tensors["bias"], header["row"]
