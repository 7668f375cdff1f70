"""The state of a multi-stage compression on disk: the network, the history, the report's rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from flax import nnx

from unified_approx.files import claim, replacing
from unified_approx.multistage.options import Step
from unified_approx.report import LayerRow
from unified_approx.storage import load, save

_STATE = "state.json"


@dataclass(frozen=True)
class State:
    """Where a compression stands.

    Attributes:
        model: the network.
        history: of the steps so far.
        trained: number of the step after which the network was trained last.
        rows: of the report, by layer.
    """

    model: nnx.Module
    history: Sequence[Step]
    trained: int
    rows: Mapping[str, LayerRow]


class Store:
    """A folder that belongs to one compression."""

    def __init__(self, path: str | PathLike[str], identity: str) -> None:
        """Make the folder, or see that it is this run's.

        Raises:
            ValueError: it holds other files, or another run.
        """
        self._folder = claim(path, "work_dir", {"weights, data or settings": identity})

    def layers_of(self, step: int) -> Path:
        """The folder for the solved layers of a step."""
        return self._folder / f"step-{step:04d}"

    def save(self, state: State) -> None:
        """Write the state; it is there whole, or that of before is."""
        name = f"network-{len(state.history):04d}-{state.trained:04d}.safetensors"
        save(self._folder / name, state.model)
        written = {
            "network": name,
            "trained": state.trained,
            "history": [asdict(step) for step in state.history],
            "rows": {layer: asdict(row) for layer, row in state.rows.items()},
        }
        with replacing(self._folder / _STATE) as partial:
            partial.write_text(json.dumps(written))
        for other in self._folder.glob("network-*.safetensors"):
            if other.name != name:
                other.unlink()

    def load(self, original: nnx.Module) -> State | None:
        """What was saved last; None if nothing was.

        Args:
            original: the network before compression.

        Raises:
            ValueError: the state is damaged.
        """
        file = self._folder / _STATE
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text())
            steps = [
                {**line, "ranks": {n: tuple(r) for n, r in line["ranks"].items()}, "warnings": tuple(line["warnings"])}
                for line in found["history"]
            ]
            rows = {name: LayerRow(**{**row, "shape": tuple(row["shape"])}) for name, row in found["rows"].items()}
            network = self._folder / str(found["network"])
            return State(load(network, like=original), [Step(**step) for step in steps], int(found["trained"]), rows)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise ValueError(f"work_dir: {file} is damaged ({error}); give a new folder") from error
