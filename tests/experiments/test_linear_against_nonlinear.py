"""Linear against nonlinear fits: what is measured, and that finished rows are not made again."""

import json

import jax.numpy as jnp
import linear_against_nonlinear as experiment
import numpy as np
import pytest

from solvers.reconstruction import LayerProblem, relative_error
from unified_approx.results import read_rows

SCALE = experiment.Scale(
    calibration=60, choosing=20, test=20, rows_per_feature=4, fractions=(0.1, 0.5), steps=4, layers=1
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear_against_nonlinear")
    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "QUICK", SCALE)
    file = folder / "rows.json"
    where = {"data": None, "models": None, "work_dir": folder, "json_file": file, "quick": True}
    yield experiment.run("digits", **where), file, where
    patch.undo()


def test_split_errors_are_those_of_either_kind_of_output():
    rng = np.random.default_rng(0)
    x, m, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((50, 6), (4, 6), (4,)))
    y = jnp.maximum(x @ m.T + bias, 0)
    problem = LayerProblem(x=x, y=y, bias=bias)
    other = m + 0.3
    positive, zero = experiment.split_errors(problem, other, bias)
    gap, energy = (y - jnp.maximum(x @ other.T + bias, 0)) ** 2, jnp.sum(y * y)
    np.testing.assert_allclose(positive, jnp.sum(gap[y > 0]) / energy, rtol=1e-5)
    np.testing.assert_allclose(zero, jnp.sum(gap[y == 0]) / energy, rtol=1e-5)
    np.testing.assert_allclose(positive + zero, relative_error(problem, other), rtol=1e-5)


def test_rows_hold_both_fits_of_every_size(run):
    rows, file, _ = run
    keys = [(r["part"], r["size"], r["fit"]) for r in rows]
    ranks, kept = (6, 32), (29, 144)
    sizes = [("low_rank", r) for r in ranks] + [("columns", k) for k in kept]
    assert keys == [(*size, fit) for size in sizes for fit in ("linear", "nonlinear")]
    linear = {key[:2]: row["error"] for key, row in zip(keys, rows, strict=True) if key[2] == "linear"}
    assert linear["low_rank", 32] < linear["low_rank", 6] < 1
    assert linear["columns", 144] < linear["columns", 29] < 1
    assert all(ratio < 1.05 for ratio in experiment.gains(rows).values())
    stored = json.loads(file.read_text())
    assert stored["quick"]
    assert read_rows(file) == rows
    assert stored["checks"]["largest_ratio"]["value"] == max(experiment.gains(rows).values())


def test_finished_rows_are_read_and_missing_ones_made(run, monkeypatch):
    rows, _, where = run
    work = where["work_dir"] / "digits-quick-0"
    made = []
    fit_both = experiment.fit_both
    monkeypatch.setattr(experiment, "fit_both", lambda *a: made.append(a[1:3]) or fit_both(*a))
    assert experiment.run("digits", **where) == rows
    assert made == []
    (work / "all.json").unlink()
    (work / "columns-conv2-29.json").unlink()
    assert experiment.run("digits", **where) == rows
    assert made == [("columns", 29)]


def test_picture(run, tmp_path):
    file = experiment.picture(run[0], tmp_path / "picture.png")
    assert file.read_bytes().startswith(b"\x89PNG")
