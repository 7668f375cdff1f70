"""Sweeps: any executor, one file, resumed where they stopped."""

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_allocation import seconds_by_size
from typer.testing import CliRunner

import unified_approx as ua
from unified_approx import cli, datasets, latency, sweeping, zoo
from unified_approx.allocation import timing
from unified_approx.plots import pareto_front
from unified_approx.sweeping import read_table

FAST = {"form": "columns", "rows": 512, "batch_size": 50}
# Layers whose solution is asked for nowhere, and which take most of the time, stay as they are.
SOLVED = {"rules": [ua.Rule(path="conv3|fc", keep=True)], **FAST}
PENALTIES = {"lambda_sparse": [0.05, 0.2], "lambda_rank": [0.1], **SOLVED}


@pytest.fixture(scope="module")
def digits():
    entry, data = zoo.entry("digits"), datasets.load("digits")
    x, test = (entry.preprocess(images) for images in (data.x_train[:100], data.x_test))
    return zoo.load("digits"), x, (test, np.asarray(data.y_test))


@pytest.fixture(scope="module")
def swept(digits, tmp_path_factory):
    model, x, test = digits
    out = tmp_path_factory.mktemp("sweep") / "s.parquet"
    seen = []
    rows = ua.sweep(model, x, **PENALTIES, test=test, out=out, progress=lambda *event: seen.append(event))
    return out, rows, seen


def test_rows_are_in_the_file_as_they_come(swept):
    out, rows, seen = swept
    assert [done for done, _, _ in seen] == [1, 2]
    assert read_table(out).to_pylist() == rows
    assert [row["lambda_sparse"] for row in rows] == [0.2, 0.05]
    columns = [sum(layer["kept_columns"] for layer in json.loads(row["layers"])) for row in rows]
    assert columns[0] < columns[1]  # the heavier penalty keeps fewer
    assert min(row["cr"] for row in rows) > 1
    assert len(json.loads(rows[0]["layers"])) == 4


def test_a_point_is_what_compress_gives(digits, swept):
    model, x, _ = digits
    alone = ua.compress(model, x, lambda_sparse=0.2, lambda_rank=0.1, progress=lambda e: None, **SOLVED)
    assert swept[1][0]["params"] == alone.report.params


def test_goes_on_where_it_stopped(digits, swept, tmp_path):
    model, x, test = digits
    out = tmp_path / "s.parquet"
    table = read_table(swept[0])
    pq.write_table(table.slice(0, 1), out)
    seen = []
    rows = ua.sweep(model, x, **PENALTIES, test=test, out=out, progress=lambda *e: seen.append(e))
    assert len(seen) == 1
    assert rows[0] == swept[1][0]


def test_any_executor_and_budgets(digits, tmp_path):
    model, x, test = digits
    with ThreadPoolExecutor(2) as pool:
        rows = ua.sweep(
            model, x, budgets=[0.6, ua.Budget(macs=0.3)], test=test, out=tmp_path / "b.parquet", executor=pool,
            networks=tmp_path / "networks", rules=[ua.Rule(path="conv1|fc", keep=True)], **FAST,
        )  # fmt: skip
    assert [row["budget"] for row in rows] == ["params=0.6", "macs=0.3"]
    assert all(row["budget_met"] for row in rows)
    assert ua.load(tmp_path / "networks" / "00001.safetensors") is not None


def test_budgets_of_seconds_and_measured_speed(digits, tmp_path, monkeypatch):
    model, x, test = digits
    for module in (latency, timing):
        monkeypatch.setattr(module, "measure_latency", seconds_by_size)
    arguments = {"rows": 256, "batch_size": 50, "rules": [ua.Rule(path="conv[12]", keep=True)]}
    arguments |= {"budgets": [ua.Budget(latency=0.8), 0.6], "test": test, "out": tmp_path / "t.parquet"}
    rows = ua.sweep(model, x, timed=True, **arguments)
    assert len(list(tmp_path.glob("t-*-sensitivity*.json"))) == 2  # with seconds, and without
    assert [row["budget"] for row in rows] == ["latency=0.8", "params=0.6"]
    assert all(row["budget_met"] for row in rows)
    assert 1.25 <= rows[0]["speedup"] < 1.6
    assert read_table(tmp_path / "t.parquet").to_pylist() == rows
    monkeypatch.setattr(sweeping, "_solve", None)  # nothing is left to do
    assert ua.sweep(model, x, timed=True, **arguments) == rows


def test_a_point_without_what_is_asked_for_now_is_made_again(tmp_path):
    assert sweeping._is_whole({"index": 0, "speedup": None}, timed=False, folder=None)
    assert not sweeping._is_whole({"index": 0, "speedup": None}, timed=True, folder=None)
    assert not sweeping._is_whole({"index": 0, "speedup": 1.5}, timed=True, folder=tmp_path)
    (tmp_path / "00000.safetensors").touch()
    assert sweeping._is_whole({"index": 0, "speedup": 1.5}, timed=True, folder=tmp_path)


def test_a_point_that_is_refused_costs_no_other(digits, tmp_path):
    model, x, test = digits
    out = tmp_path / "r.parquet"
    arguments = {"budgets": [0.6, 0.004], "test": test, "out": out, "allocation": "uniform", **FAST}
    with pytest.raises(ValueError, match="below the smallest"), ThreadPoolExecutor(2) as pool:
        ua.sweep(model, x, executor=pool, **arguments)
    assert [row["budget"] for row in read_table(out).to_pylist()] == ["params=0.6"]
    with pytest.raises(ValueError, match="another sweep"):
        ua.sweep(model, x, **{**arguments, "test": (test[0][:10], test[1][:10])})
    with pytest.raises(RuntimeError, match="takes no work .*; 1 of 2 points are in"):
        ua.sweep(model, x, executor=pool, **arguments)  # which is shut down


def test_an_executor_that_dies_loses_nothing(digits, tmp_path):
    model, x, test = digits
    out = tmp_path / "d.parquet"
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def kill(done, total, row):
        for pid in list(pool._processes):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match="1 of 2 points are in"):
        ua.sweep(model, x, **PENALTIES, test=test, out=out, executor=pool, progress=kill)
    assert len(ua.sweep(model, x, **PENALTIES, test=test, out=out)) == 2


def test_dask_workers_one_of_which_is_killed(digits, tmp_path):
    distributed = pytest.importorskip("distributed")
    model, x, test = digits
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)

        def kill(done, total, row):
            if done == 1:
                work = client.processing()
                os.kill(pids[max(work, key=lambda worker: len(work[worker]))], signal.SIGKILL)

        points = {**PENALTIES, "lambda_sparse": [0.1, 0.3], "lambda_rank": [0.05, 0.1]}
        out = tmp_path / "k.parquet"
        rows = ua.sweep(model, x, **points, test=test, out=out, executor=client.get_executor(), progress=kill)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "give budgets, or both"),
        ({"budgets": [0.5], "lambda_sparse": [0.1], "lambda_rank": [0.1]}, "give budgets, or both"),
        ({"lambda_sparse": [0.1]}, "give budgets, or both"),
        ({"budgets": []}, "empty"),
        ({"budgets": [1.5]}, "not a fraction"),
        ({"budgets": [0.5], "work_dir": "w"}, "work_dir: a sweep gives each point its own"),
    ],
)
def test_bad_points(digits, tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        ua.sweep(digits[0], digits[1], out=tmp_path / "x.parquet", **points)


def test_files_of_others_are_left_alone(digits, swept, tmp_path):
    model, x, _ = digits
    before = swept[0].read_bytes()
    with pytest.raises(ValueError, match="another sweep"):
        ua.sweep(model, x, budgets=[0.5], out=swept[0])
    assert swept[0].read_bytes() == before
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="damaged"):
        ua.sweep(model, x, budgets=[0.5], out=tmp_path / "text.parquet")


def test_commands(swept, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})

    out, picture = tmp_path / "c.parquet", tmp_path / "p.png"
    arguments = ("--budgets", "params=0.6;params=0.6,macs=0.4", "--allocation", "uniform", "--form", "columns")
    arguments += ("--rows", 256, "--keep", "fc", "--round-to", 2, "--networks", tmp_path / "networks", "--timed")
    done = run("sweep", "digits", *arguments, "--calibration", 100, "--out", out)
    assert done.exit_code == 0, done.output
    assert "2/2" in done.output
    assert len(list((tmp_path / "networks").iterdir())) == 2
    drawn = run("plot", swept[0], out, "--out", picture, "--axis", "macs")
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 10_000
    assert run("plot", out, "--axis", "beauty").exit_code == 2
    assert run("plot", out, "--axis", "speedup", "--out", picture).exit_code == 0
    assert run("plot", swept[0], "--axis", "speedup", "--out", picture).exit_code == 2
    assert run("sweep", "digits", "--budgets", "half").exit_code == 2


def test_pareto_front():
    points = [(1.0, 90.0), (2.0, 89.0), (2.0, 91.0), (3.0, 80.0), (2.5, 80.0)]
    assert pareto_front(points) == [(2.0, 91.0), (3.0, 80.0)]
