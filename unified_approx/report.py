"""What a compression did, layer by layer, as plain rows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the network.

    Attributes:
        name: path of the layer, joined by slashes.
        kind: "conv" or "linear".
        shape: (n, p) of its matrix.
        status: "compressed", "kept" (by rule, or because nothing smaller was asked for), "diverged" (left dense)
            or "skipped" (cannot be compressed).
        reason: why, where the status needs one.
        form: the winning form.
        candidates: for each form that was tried, its cost and errors on held-out rows.
        kept_columns: columns of the sparse part.
        rank: rank of the low-rank part.
        params: stored values; `original_params` before.
        index_bits: bits of the stored indices.
        error_before: relative squared error before the activation on calibration rows, with `..._held_out` beside it.
        error_after: the same after the activation.
        iterations: passes over the data in the refinement, plus ADMM steps of the winning form.
        solve_status: status of the layer's solver.
        rows: calibration rows (sampled output positions) used.
        removed_channels: output channels that were removed because nothing reads them; `shape` still counts them.
        seconds: wall time of the layer.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    status: str
    reason: str = ""
    form: str = "dense"
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept_columns: int = 0
    rank: int = 0
    params: int = 0
    original_params: int = 0
    index_bits: int = 0
    macs: int = 0
    original_macs: int = 0
    error_before: float | None = None
    error_before_held_out: float | None = None
    error_after: float | None = None
    error_after_held_out: float | None = None
    iterations: int = 0
    solve_status: str = ""
    rows: int = 0
    removed_channels: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """All layers and the totals.

    Attributes:
        layers: one row per layer, in network order, skipped layers last.
        budget: what was asked for, as text.
        budget_met: whether the selected layers keep no more than the budget; None when penalties were given.
        params: stored values of the whole network; `original_params` before (batch norm folded).
        bits: bits stored for the whole network, indices included; `original_bits` before.
        macs: multiply-adds per example; `original_macs` before.
        seconds: wall time of the run.
        seed: of the sampled positions.
        warnings: what the user should know.
        drop: points of accuracy lost on the held-out examples, where `Budget(max_drop=...)` was asked for.
    """

    layers: tuple[LayerRow, ...]
    budget: str
    budget_met: bool | None
    params: int
    original_params: int
    bits: int
    original_bits: int
    macs: int
    original_macs: int
    seconds: float
    seed: int
    warnings: tuple[str, ...] = ()
    drop: float | None = None

    @property
    def params_ratio(self) -> float:
        """Original / compressed stored values, whole network."""
        return self.original_params / self.params

    @property
    def cr(self) -> float:
        """Original / compressed bits, indices included, whole network."""
        return self.original_bits / self.bits

    @property
    def macs_ratio(self) -> float:
        """Original / compressed multiply-adds, whole network."""
        return self.original_macs / self.macs

    @property
    def selected_fraction(self) -> float:
        """Stored cost of the compressed layers, indices included, as a fraction of the original."""
        chosen = [row for row in self.layers if row.status in ("compressed", "diverged")]
        original = sum(row.original_params for row in chosen)
        return sum(row.params + row.index_bits / 32 for row in chosen) / original if original else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ratios = {"params_ratio": self.params_ratio, "cr": self.cr, "macs_ratio": self.macs_ratio}
        return {**asdict(self), **ratios, "selected_fraction": self.selected_fraction}

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"{self.budget}: parameters ÷ {self.params_ratio:.2f}, MACs ÷ {self.macs_ratio:.2f}")
        for heading in ("layer", "n × p", "form", "columns", "rank", "params", "error held out", "s"):
            table.add_column(heading, justify="left" if heading in ("layer", "form") else "right")
        for row in self.layers:
            error = "" if row.error_after_held_out is None else f"{row.error_after_held_out:.4f}"
            form = row.form if row.status == "compressed" else f"{row.status}: {row.reason}"
            share = f"{row.params / row.original_params:.0%}" if row.original_params else ""
            columns, rank = str(row.kept_columns or ""), str(row.rank or "")
            less = f" - {row.removed_channels}" if row.removed_channels else ""
            shape = f"{row.shape[0]}{less} × {row.shape[1]}" if row.shape[0] else ""
            table.add_row(row.name, shape, form, columns, rank, share, error, f"{row.seconds:.1f}")
        return table


@dataclass(frozen=True)
class ProgressEvent:
    """What a progress callback receives: before a layer (row None) and after it (its row)."""

    index: int
    total: int
    name: str
    shape: tuple[int, int]
    row: LayerRow | None


def measuring(index: int, total: int, name: str) -> ProgressEvent:
    """The event before a layer's sensitivity is measured."""
    return ProgressEvent(index, total, f"sensitivity of {name}", (0, 0), None)


ProgressCallback = Callable[[ProgressEvent], None]


class ProgressBar:
    """A bar per run that says what is being solved; writes nothing when standard error is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("compress")

    def __call__(self, event: ProgressEvent) -> None:
        """Show one event."""
        if not self._bar.live.is_started:
            self._bar.start()
        what = f"{event.name} ({event.shape[0]} × {event.shape[1]})" if event.shape[0] else event.name
        done = event.index + (event.row is not None)
        self._bar.update(self._task, total=event.total, completed=done, description=what)
        if done == event.total:
            self._bar.stop()
