"""Results as JSON: one schema for the command line and the experiments."""

import json
import math
import operator
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unified_approx.files import replacing

Number = int | float

_PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "numpy": "numpy",
    "unified_approx": "unified-approx",
}
_RELATIONS: dict[str, Callable[[Number, Number], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None for a package that is not installed as one."""
    found: dict[str, str | None] = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)  # macOS counts bytes, Linux KiB


def check(value: Number, relation: str, target: Number) -> dict[str, Any]:
    """A measured value against its target: {"value", "relation", "target", "holds"}.

    Args:
        value: as measured; NaN never holds.
        relation: one of >=, <=, >, <, ==.
        target: what was aimed at.

    Raises:
        ValueError: an unknown relation.
    """
    if relation not in _RELATIONS:
        raise ValueError(f"relation: {relation!r} is unknown; use one of {' '.join(_RELATIONS)}")
    return {"value": value, "relation": relation, "target": target, "holds": bool(_RELATIONS[relation](value, target))}


def network_row(
    *,
    network: str,
    method: str,
    budget: str,
    reference_accuracy: Number | None,
    accuracy: Number | None,
    params_ratio: Number | None,
    cr: Number | None,
    macs_ratio: Number | None,
    bytes_ratio: Number | None = None,
    file_bytes: int | None = None,
    speedup: Number | None = None,
    speedup_batch1: Number | None = None,
    finetune_epochs: int = 0,
    reference_finetuned_accuracy: Number | None = None,
    std: Number = 0.0,
    seeds: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """One compressed network as a row of results. Ratios are original / compressed, None where not measured.

    Args:
        network: name.
        method: "admm", "lc", "fast_lc", "musco" or "deep_compression".
        budget: what was asked for, as text: `params=0.5`.
        reference_accuracy: of the original, in percent, on the same images in the same run; None if it did not run.
        accuracy: of the compressed network, in percent; the mean over the seeds; None where there are no labels.
        params_ratio: stored values.
        cr: stored bits, indices included; the original has its batch norms folded and is float32.
        macs_ratio: multiply-adds.
        bytes_ratio: files on disk.
        file_bytes: of the compressed network's file.
        speedup: measured, at batch 64, against the faster dense form of the original.
        speedup_batch1: the same at batch 1.
        finetune_epochs: 0 for none.
        reference_finetuned_accuracy: of the original trained on with the same recipe, in percent.
        std: standard deviation of `accuracy` over the seeds, in points; 0 for one seed.
        seeds: number of runs.
        **more: further fields of this row.

    Returns:
        The fields above, and `drop`: the better reference accuracy minus `accuracy`, in points.
    """
    references = [a for a in (reference_accuracy, reference_finetuned_accuracy) if a is not None]
    row = {
        "network": network,
        "method": method,
        "budget": budget,
        "finetune_epochs": finetune_epochs,
        "reference_accuracy": reference_accuracy,
        "accuracy": accuracy,
        "drop": max(references) - accuracy if references and accuracy is not None else None,
        "std": std,
        "seeds": seeds,
        "params_ratio": params_ratio,
        "cr": cr,
        "macs_ratio": macs_ratio,
        "bytes_ratio": bytes_ratio,
        "speedup": speedup,
        "speedup_batch1": speedup_batch1,
        "file_bytes": file_bytes,
    }
    if reference_finetuned_accuracy is not None:
        row["reference_finetuned_accuracy"] = reference_finetuned_accuracy
    return {**row, **more}


def saved_network_row(
    network: str, accuracy: Number, file_bytes: int, report: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The row of a network that was read from a file; what only the original could tell is None.

    Args:
        network: name.
        accuracy: in percent.
        file_bytes: of the file.
        report: as stored in the file, None if it holds none.
    """
    known = {} if report is None else report
    return network_row(
        network=network,
        method="none" if report is None else known.get("method", "admm"),
        budget=known.get("budget", ""),
        reference_accuracy=None,
        accuracy=accuracy,
        params_ratio=known.get("params_ratio"),
        cr=known.get("cr"),
        macs_ratio=known.get("macs_ratio"),
        file_bytes=file_bytes,
    )


def write_results(
    path: str | os.PathLike[str],
    command: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seconds: Number,
    seed: int,
    quick: bool = False,
    repeat_row: bool = False,
    **more: Any,
) -> Path:
    """Write one result file, whole or not at all.

    Args:
        path: where to; its folder is made.
        command: the command line that made the results.
        rows: what was measured, one entry a row of the printed table.
        checks: name -> `check(...)`.
        seconds: wall time of the run.
        seed: of the run.
        quick: a reduced run. Its file says so, and it never replaces the file of a full run: if there is one at
            `path`, `<name>.quick.json` beside it is written.
        repeat_row: repeat the fields of the only row at the top level.
        **more: further fields of the top level.

    Returns:
        The file that was written.

    Raises:
        ValueError: `repeat_row` without exactly one row; a path that is a folder; a field that would be written twice.
    """
    if repeat_row and len(rows) != 1:
        raise ValueError(f"repeat_row: there are {len(rows)} rows; it needs exactly one")
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"path: {target} is a folder; give the name of a file")
    if quick and _is_full(target):
        target = target.with_suffix(".quick.json")
    content = {"command": command, "versions": versions(), "seed": seed, "seconds": round(seconds, 3)}
    content |= {"peak_rss_mb": peak_rss_mb(), "rows": list(rows), "checks": dict(checks or {})}
    extra = {**({"quick": True} if quick else {}), **more}
    for fields in (extra, rows[0] if repeat_row else {}):
        if twice := sorted(set(fields) & set(content)):
            raise ValueError(f"{twice[0]!r} is a field of every result file; give it another name")
        content |= fields
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    return target


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a file that `write_results` or a sweep wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither.
    """
    source = Path(path)
    if source.suffix == ".parquet":
        from unified_approx.sweeping import read_table

        return read_table(source).to_pylist()
    try:
        rows = json.loads(source.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is neither a result file nor a sweep's Parquet file ({error!r})") from error
    return [row for row in rows if isinstance(row, dict)]


def _is_full(path: Path) -> bool:
    """Whether the file is there and is not known to come from a quick run."""
    if not path.exists():
        return False
    try:
        return not json.loads(path.read_text()).get("quick", False)
    except (ValueError, AttributeError):
        return True


def _plain(value: Any) -> Any:
    """The value in JSON's types: arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars too
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
