"""The original and the compressed network side by side: accuracy, size, multiply-adds, measured time."""

import tempfile
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int
from rich.table import Table

from unified_approx.assemble import get
from unified_approx.cost import layer_calls
from unified_approx.evaluate import accuracy
from unified_approx.latency import BATCH, batch_of, beside_fastest_dense, fastest, fastest_dense, measure_latency
from unified_approx.macs import LayerCall, factored_layers
from unified_approx.report import Report
from unified_approx.results import network_row
from unified_approx.sites import path_name
from unified_approx.storage import save


@runtime_checkable
class Compressed(Protocol):
    """What is compared: `Result`, and what other methods return."""

    @property
    def model(self) -> nnx.Module:
        """The compressed network."""
        ...

    @property
    def report(self) -> Report:
        """Layers and totals."""
        ...

    def save(self, path: str | PathLike[str]) -> int:
        """Write one file; returns its size in bytes."""
        ...


Some = TypeVar("Some", bound=Compressed)


def with_fastest_executions(result: Some, x: Float32[np.ndarray, "n ..."], rounds: int = 10) -> Some:
    """The same result, each layer in the form that is fastest here on batches of 64."""
    model = fastest(result.model, batch_of(x), rounds=rounds)
    return replace(cast(Any, result), model=model)


def latencies(
    original: nnx.Module, compressed: nnx.Module, x: Float32[np.ndarray, "n ..."], rounds: int = 20
) -> dict[str, float]:
    """Milliseconds per batch, medians of interleaved runs (A B A B): the original in its fastest dense form.

    Args:
        original: network.
        compressed: network.
        x: images.
        rounds: runs of each.

    Returns:
        `original_ms`, `compressed_ms` at batch 64, `original_ms_batch1`, `compressed_ms_batch1` at batch 1.
    """
    found = {}
    for size, suffix in ((BATCH, ""), (1, "_batch1")):
        batch = batch_of(x, size)
        seconds = beside_fastest_dense(original, compressed, batch, rounds=rounds)
        found |= {f"{name}_ms{suffix}": 1e3 * value for name, value in seconds.items()}
    return found


def layer_latencies(
    original: nnx.Module,
    compressed: nnx.Module,
    x: Float32[np.ndarray, "n ..."],
    rounds: int = 10,
    batch_size: int = BATCH,
) -> dict[str, dict[str, float]]:
    """Milliseconds of every factored layer by itself beside the original layer in its faster dense form, interleaved.

    Each layer runs on random inputs of the shape that it sees in its own network, where channels that nothing reads may
    be gone; the batch norm that a factored layer has taken over is not counted for the original. Layers of equal
    structure are measured once.

    Args:
        original: network.
        compressed: the same with factored layers, their executions chosen.
        x: images.
        rounds: runs of each.
        batch_size: images at a time.

    Returns:
        By layer name `original_ms`, `compressed_ms` and their ratio `speedup`, for all calls in one forward pass.
    """
    batch = batch_of(x, batch_size)
    dense, _ = fastest_dense(original, batch, rounds=max(1, rounds // 2))
    before, after, known, found = layer_calls(original, batch), layer_calls(compressed, batch), {}, {}
    for path, layer in factored_layers(compressed).items():
        pair = {"original": get(dense, path), "compressed": layer}
        total = dict.fromkeys(pair, 0.0)
        for calls in zip(before.get(path, ()), after.get(path, ()), strict=True):
            key = (*(call.input_shape for call in calls), *(_structure(module) for module in pair.values()))
            if key not in known:
                seen = {name: _Reading(module, i) for i, (name, module) in enumerate(pair.items())}
                known[key] = measure_latency(seen, *map(_random_input, calls), rounds=rounds)
            total = {name: total[name] + 1e3 * known[key][name] for name in pair}
        times = {f"{name}_ms": value for name, value in total.items()}
        if total["compressed"]:
            found[path_name(path)] = {**times, "speedup": total["original"] / total["compressed"]}
    return found


class _Reading(nnx.Module):
    """A layer that reads one of several inputs, so that layers of different inputs can be timed side by side."""

    def __init__(self, layer: nnx.Module, which: int):
        self.layer, self.which = layer, which

    def __call__(self, *inputs: Any) -> Any:
        layer: Any = self.layer
        return layer(inputs[self.which])


def _random_input(call: LayerCall) -> Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(call.input_shape), call.input_dtype)


def _structure(module: nnx.Module) -> tuple[Any, ...]:
    graphdef, state = nnx.split(module)
    return graphdef, tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))


def file_sizes(original: nnx.Module, result: Compressed, out: Path | None) -> tuple[int, int]:
    """Bytes of the files of both networks, written in the same format; the compressed one's stays at `out`."""
    with tempfile.TemporaryDirectory() as folder:
        before = save(Path(folder) / "original.safetensors", original)
        after = result.save(Path(folder) / "compressed.safetensors" if out is None else out)
    return before, after


def compare(
    network: str,
    original: nnx.Module,
    result: Compressed,
    x_test: Float32[np.ndarray, "n ..."],
    y_test: Int[np.ndarray, " n"],
    *,
    reference_accuracy: float,
    method: str = "admm",
    out: Path | None = None,
    rounds: int = 20,
    **more: Any,
) -> dict[str, Any]:
    """Both networks on the same images in the same process, as a row of results.

    Args:
        network: its name.
        original: the network that was compressed.
        result: of the compression.
        x_test: images.
        y_test: labels.
        reference_accuracy: of the original on these images, in percent: measured before the compression, because that
            is where bad labels show.
        method: as in `network_row`.
        out: where to save the compressed network; it is saved to measure its size in any case.
        rounds: timed runs of each network.
        **more: further fields of the row.
    """
    reached = accuracy(result.model, x_test, y_test)
    before, after = file_sizes(original, result, out)
    times = latencies(original, result.model, x_test, rounds)
    report = result.report
    return network_row(
        network=network,
        method=method,
        budget=report.budget,
        reference_accuracy=reference_accuracy,
        accuracy=reached,
        params_ratio=report.params_ratio,
        cr=report.cr,
        macs_ratio=report.macs_ratio,
        bytes_ratio=before / after,
        file_bytes=after,
        speedup=times["original_ms"] / times["compressed_ms"],
        speedup_batch1=times["original_ms_batch1"] / times["compressed_ms_batch1"],
        **{**times, "original_file_bytes": before, **more},
    )


def layer_rows(result: Compressed) -> list[dict[str, Any]]:
    """The report's rows, JSON-able."""
    return [asdict(row) for row in result.report.layers]


def comparison_table(row: dict[str, Any], result: Compressed) -> Table:
    """For a terminal."""
    report = result.report
    table = Table(title=f"{row['network']}, {row['budget']}")
    for heading in ("", "original", "compressed", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "accuracy on the test images (%)",
        f"{row['reference_accuracy']:.2f}",
        f"{row['accuracy']:.2f}",
        f"{0.0 - row['drop']:+.2f} points",
    )
    for label, before, after, ratio in (
        ("stored values", report.original_params, report.params, row["params_ratio"]),
        ("stored bits, indices included", report.original_bits, report.bits, row["cr"]),
        ("multiply-adds per image", report.original_macs, report.macs, row["macs_ratio"]),
        ("bytes of the file", row["original_file_bytes"], row["file_bytes"], row["bytes_ratio"]),
    ):
        table.add_row(label, f"{before:,}", f"{after:,}", f"÷ {ratio:.2f}")
    for size, suffix in ((BATCH, ""), (1, "_batch1")):
        before, after = row[f"original_ms{suffix}"], row[f"compressed_ms{suffix}"]
        table.add_row(f"ms per batch of {size}", f"{before:.2f}", f"{after:.2f}", f"÷ {before / after:.2f}")
    return table


def speed_sentence(row: dict[str, Any]) -> str:
    """What the clock says, in words."""

    def said(ratio: float) -> str:
        if 0.95 <= ratio <= 1.05:
            return f"as fast as the original (÷ {ratio:.2f})"
        return f"{ratio:.2f} times as fast" if ratio > 1 else f"slower ({ratio:.2f} times the original's speed)"

    return (
        f"Measured against the original in its fastest dense form: at batch 64 {said(row['speedup'])}, "
        f"at batch 1 {said(row['speedup_batch1'])}."
    )
