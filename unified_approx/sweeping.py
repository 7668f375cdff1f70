"""Many compressions of one network, on any executor, into one Parquet file."""

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jaxtyping import Array, Int, Shaped

from unified_approx import calibration as examples
from unified_approx.allocation import Sensitivity
from unified_approx.budget import Budget
from unified_approx.calling import forward
from unified_approx.evaluate import accuracy
from unified_approx.files import replacing
from unified_approx.latency import batch_of, beside_fastest_dense, fastest
from unified_approx.pipeline import compress, sensitivity
from unified_approx.work_dir import fingerprint

Warm = Mapping[str, np.ndarray]
_ATTEMPTS = 3  # of one point whose worker died
_IDENTITY = b"unified-approx sweep"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One compression of a sweep.

    Attributes:
        index: its place in the sweep.
        path: points of one path start from one another, in order.
        budget: as text, or None.
        lambda_sparse: fraction of the maximum, or None.
        lambda_rank: likewise.
    """

    index: int
    path: int
    budget: str | None = None
    lambda_sparse: float | None = None
    lambda_rank: float | None = None

    @property
    def limits_seconds(self) -> bool:
        """Whether its budget limits seconds."""
        return self.budget is not None and Budget.parse(self.budget).latency is not None

    def target(self) -> dict[str, Any]:
        """As arguments of `compress`."""
        if self.budget is not None:
            return {"budget": Budget.parse(self.budget)}
        return {"lambda_sparse": self.lambda_sparse, "lambda_rank": self.lambda_rank}


@dataclass(frozen=True)
class _Job:
    """All that a worker needs besides the point: sent along with every task, so that any worker can take any."""

    graphdef: Any
    state: Any
    data: Any
    test: tuple[np.ndarray, np.ndarray] | None
    arguments: Mapping[str, Any]
    tables: Mapping[bool, Sensitivity]  # with seconds, and without
    networks: Path | None
    timed: bool


def _points(
    budgets: Sequence[Budget | float] | None,
    lambda_sparse: Sequence[float] | None,
    lambda_rank: Sequence[float] | None,
) -> list[Point]:
    if (budgets is None) == (lambda_sparse is None) or (lambda_sparse is None) != (lambda_rank is None):
        raise ValueError("budgets, lambda_sparse, lambda_rank: give budgets, or both lists of penalties")
    if budgets is not None:
        texts = [(b if isinstance(b, Budget) else Budget(params=b)).describe() for b in budgets]
        points = [Point(index=i, path=i, budget=text) for i, text in enumerate(texts)]
    else:
        assert lambda_sparse is not None
        assert lambda_rank is not None
        # Along a path the sparse penalty falls: solutions change little from one point to the next.
        pairs = itertools.product(enumerate(lambda_rank), sorted(lambda_sparse, reverse=True))
        points = [
            Point(index=i, path=path, lambda_sparse=sparse, lambda_rank=rank)
            for i, ((path, rank), sparse) in enumerate(pairs)
        ]
    if not points:
        raise ValueError("budgets, lambda_sparse, lambda_rank: the lists are empty; give at least one point")
    return points


def _solve(job: _Job, point: Point, warm: Warm | None) -> tuple[dict[str, Any], Warm]:
    """One point; runs in a worker."""
    model = nnx.merge(job.graphdef, jax.tree.map(jnp.asarray, job.state))
    start = time.perf_counter()
    arguments = {**job.arguments, **point.target(), "start": warm}
    arguments["sensitivity"] = job.tables.get(point.limits_seconds)
    result = compress(model, job.data, progress=lambda event: None, **arguments)
    report = result.report
    row = {
        "index": point.index,
        "path": point.path,
        "budget": point.budget,
        "lambda_sparse": point.lambda_sparse,
        "lambda_rank": point.lambda_rank,
        "accuracy": None if job.test is None else accuracy(result.model, *job.test),
        "params_ratio": report.params_ratio,
        "cr": report.cr,
        "macs_ratio": report.macs_ratio,
        "params": report.params,
        "bits": report.bits,
        "macs": report.macs,
        "budget_met": report.budget_met,
        "seconds": time.perf_counter() - start,
        "speedup": _speedup(model, result.model, job) if job.timed else None,
        "layers": json.dumps(report.to_dict()["layers"]),
    }
    if job.networks is not None:
        result.save(_network_file(job.networks, point.index))
    return row, {} if point.budget is not None else result.matrices


def _network_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def _is_whole(row: Mapping[str, Any], timed: bool, folder: Path | None) -> bool:
    """Whether a finished point has all that is asked for now."""
    saved = folder is None or _network_file(folder, row["index"]).exists()
    return saved and not (timed and row["speedup"] is None)


def _tables(
    model: nnx.Module,
    data: Any,
    left: Sequence[Point],
    given: Sensitivity | None,
    arguments: Mapping[str, Any],
    file: "SweepFile",
) -> dict[bool, Sensitivity]:
    """The sensitivity tables that the points which are left need, with seconds and without; kept beside the file."""
    if given is not None:
        return {False: given, True: given}
    if arguments.get("allocation", "kl") == "uniform":
        return {}
    found = {}
    for timed in {point.limits_seconds for point in left}:
        path = file.beside(f"sensitivity{'-timed' if timed else ''}.json")
        if not path.exists():
            named = {k: v for k, v in arguments.items() if k in _OF_TABLE}
            method = {"method": arguments["allocation"]} if "allocation" in arguments else {}
            sensitivity(model, data, progress=lambda event: None, timed=timed, **named, **method).save(path)
        found[timed] = Sensitivity.load(path)
    return found


def _speedup(original: nnx.Module, compressed: nnx.Module, job: _Job) -> float:
    """Both in their fastest forms, interleaved, on batches of 64."""
    call, batch = job.arguments.get("call") or forward, batch_of(job.data)
    times = beside_fastest_dense(original, fastest(compressed, batch, call=call), batch, call=call)
    return times["original"] / times["compressed"]


_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("path", pa.int64()),
        ("budget", pa.string()),
        ("lambda_sparse", pa.float64()),
        ("lambda_rank", pa.float64()),
        *((name, pa.float64()) for name in ("accuracy", "params_ratio", "cr", "macs_ratio")),
        *((name, pa.int64()) for name in ("params", "bits", "macs")),
        ("budget_met", pa.bool_()),
        ("seconds", pa.float64()),
        ("speedup", pa.float64()),
        ("layers", pa.string()),
    ]
)


class SweepFile:
    """The finished points of one sweep, as a Parquet file that is replaced whole each time a point is done."""

    def __init__(self, path: str | PathLike[str], identity: str):
        """Open a sweep's file, or start one.

        Raises:
            ValueError: the file is of another sweep, or is no Parquet file of a sweep.
        """
        self.path, self._identity = Path(path), identity
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            table = read_table(self.path)
            if table.schema.metadata.get(_IDENTITY) != identity.encode():
                raise ValueError(
                    f"out: {path} belongs to another sweep (other weights, data or points); give a new file name"
                )
            self.rows = {row["index"]: row for row in table.to_pylist()}

    def beside(self, name: str) -> Path:
        """A file of this sweep and no other, beside its table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.with_name(f"{self.path.stem}-{self._identity[:12]}-{name}")

    def add(self, row: dict[str, Any]) -> None:
        """Add one point."""
        self.rows[row["index"]] = row
        rows = [self.rows[i] for i in sorted(self.rows)]
        schema = _SCHEMA.with_metadata({_IDENTITY: self._identity.encode()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)


def read_table(path: str | PathLike[str]) -> pa.Table:
    """The table of a sweep's file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not written by a sweep.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no Parquet file, or a damaged one ({error}); delete it to start anew") from error
    if _IDENTITY not in (table.schema.metadata or {}):
        raise ValueError(f"{path} was not written by a sweep; give the file that `sweep` wrote")
    return table


def sweep(
    model: nnx.Module,
    calibration: Any,
    *,
    budgets: Sequence[Budget | float] | None = None,
    lambda_sparse: Sequence[float] | None = None,
    lambda_rank: Sequence[float] | None = None,
    test: tuple[Shaped[np.ndarray | Array, "n ..."], Int[np.ndarray | Array, " n"]] | None = None,
    out: str | PathLike[str] = "sweep.parquet",
    networks: str | PathLike[str] | None = None,
    timed: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Compress a network at every point; finished points are in `out` at once, and a killed sweep goes on from them.

    Penalties make one path for each `lambda_rank`, along which `lambda_sparse` falls and each point starts from the
    matrices of the one before; paths run side by side. Budgets share one sensitivity table.

    Args:
        model: the network.
        calibration: as `compress` takes it.
        budgets: `Budget`s, or fractions of the parameters.
        lambda_sparse: fractions of the maximum.
        lambda_rank: fractions of the maximum.
        test: (x, y) to measure accuracy on.
        out: Parquet file, one row per point, `layers` as JSON.
        networks: folder for the compressed networks; they are not kept by default.
        timed: measure each network's speed against the original in its fastest dense form, on the worker that made it;
            one worker at a time on a machine gives figures that mean something.
        executor: any `concurrent.futures.Executor`, for example a process pool or dask's `Client.get_executor()`; one
            thread of this process by default. A point whose worker dies is tried again twice.
        progress: called with (done, total, row).
        **arguments: of `compress`, the same for all points; not `work_dir`, since finished points are kept in `out`.

    Returns:
        The rows, in the order of the points.

    Raises:
        ValueError: contradictory or empty lists, a file of another sweep, or what `compress` raises.
        RuntimeError: the executor died, or a point failed again and again; finished points are kept, and the same call
            with another executor goes on.
    """
    points = _points(budgets, lambda_sparse, lambda_rank)
    if reserved := [name for name in ("work_dir", "start", "progress", "budget") if name in arguments]:
        raise ValueError(
            f"{reserved[0]}: a sweep gives each point its own and keeps finished points in `out`; leave it out"
        )
    data = examples.gather(calibration)
    known = None if test is None else (np.asarray(test[0]), np.asarray(test[1]))
    file = SweepFile(out, _identity(model, (data, known), points, arguments))
    for point in points:
        point.target()  # bad penalties show before any work
    folder = None if networks is None else Path(networks).absolute()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    done = {i for i, row in file.rows.items() if _is_whole(row, timed, folder)}
    given = arguments.pop("sensitivity", None)
    left = [point for point in points if point.index not in done]
    tables = _tables(model, data, left, given, arguments, file) if budgets is not None else {}
    graphdef, state = nnx.split(model)
    job = _Job(graphdef, jax.tree.map(np.asarray, state), data, known, arguments, tables, folder, timed)
    own = ThreadPoolExecutor(max_workers=1) if executor is None else None
    try:
        for row in _run(job, points, done, executor or own):  # pyright: ignore[reportArgumentType]
            file.add(row)
            done.add(row["index"])
            if progress is not None:
                progress(len(done), len(points), row)
    except _LostError as lost:
        raise RuntimeError(
            f"executor: {lost} ({lost.__cause__!r}); {len(file.rows)} of {len(points)} points are in {out}: call again "
            "with a new executor to go on"
        ) from lost.__cause__
    finally:
        if own is not None:
            own.shutdown(cancel_futures=True)
    return [file.rows[point.index] for point in points]


_OF_TABLE = ("rules", "form", "group", "options", "round_to", "rows", "held_out", "seed", "batch_size", "call")


class _LostError(Exception):
    """The executor lost a point; its cause says how."""


class _Work(NamedTuple):
    """A point that a worker has."""

    point: Point
    warm: Warm | None
    attempt: int


def _run(job: _Job, points: Sequence[Point], done: Collection[int], executor: Executor) -> Iterator[dict[str, Any]]:
    """Rows as they are finished; each path has one point at a time in work.

    A point whose worker died is tried again. What `compress` refuses, and the loss of the executor, is raised when all
    points that were in work are done.
    """
    queues = {path: list(group) for path, group in itertools.groupby(points, key=lambda p: p.path)}
    running: dict[Future[Any], _Work] = {}
    stopped: Exception | None = None

    def stop(error: Exception) -> None:
        nonlocal stopped
        stopped = stopped or error
        for waiting in [future for future in running if future.cancel()]:
            running.pop(waiting)

    def submit(work: _Work) -> None:
        try:
            running[executor.submit(_solve, job, work.point, work.warm)] = work
        except RuntimeError as error:  # broken, or shut down
            stop(_lost("it takes no work", error))

    def submit_next(path: int, warm: Warm | None) -> None:
        while queues[path] and queues[path][0].index in done:
            queues[path].pop(0)  # the matrices of points from an earlier run are gone: the path starts cold here
        if queues[path] and stopped is None:
            submit(_Work(queues[path].pop(0), warm, 1))

    for path in queues:
        submit_next(path, None)
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            if (work := running.pop(future, None)) is None:
                continue  # cancelled since
            error = _error_of(future)
            if error is None:
                row, warm = future.result()
                yield row
                submit_next(work.point.path, warm or None)
            elif isinstance(error, ValueError):
                stop(error)
            elif isinstance(error, BrokenExecutor | CancelledError):
                stop(_lost("it died", error))
            elif work.attempt == _ATTEMPTS:
                stop(_lost(f"point {work.point.index} failed {_ATTEMPTS} times", error))
            elif stopped is None:
                submit(work._replace(attempt=work.attempt + 1))
    if stopped is not None:
        raise stopped


def _lost(how: str, cause: BaseException) -> _LostError:
    error = _LostError(how)
    error.__cause__ = cause
    return error


def _error_of(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:
        return error


def _identity(model: nnx.Module, data: Any, points: Sequence[Point], arguments: Mapping[str, Any]) -> str:
    arrays = {k: np.asarray(v) for k, v in arguments.items() if isinstance(v, np.ndarray | Array)}
    others = {k: repr(v) for k, v in arguments.items() if k != "call" and k not in arrays}
    return fingerprint({"points": [repr(p) for p in points], **others}, model, (data, arrays))
