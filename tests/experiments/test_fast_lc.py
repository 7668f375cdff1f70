"""The fast LC experiment: what it measures, what it checks, and that finished rows are not made again."""

import fast_lc as experiment
import pytest

from unified_approx.results import read_rows

CASE = experiment.Case("fc.", (0.3,), (4,), (experiment.DIRECT, experiment.DIAGONAL), "fisher", 200, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, models_dir):
    folder = tmp_path_factory.mktemp("fast_lc")
    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "QUICK", {"lenet300": CASE})
    where = {"data": data_dir, "models": models_dir, "work_dir": folder, "json_file": folder / "r.json", "quick": True}
    yield experiment.run(["lenet300"], **where), where
    patch.undo()


def test_rows_hold_every_approach_at_every_budget(run):
    rows, where = run
    own = [row for row in rows if row["approach"] != experiment.LC]
    budgets = ("prune=0.3", "quantize=4")
    assert [(r["approach"], r["budget"]) for r in own] == [(a, b) for a in CASE.approaches for b in budgets]
    for row in own:
        assert row["error"] == pytest.approx(100 - row["accuracy"])
        assert 2.5 < row["cr"] < 17
        assert (row["predicted"] is None) == (row["approach"] == experiment.DIRECT)
    assert read_rows(where["json_file"]) == rows


def test_finished_rows_are_not_made_again(run, monkeypatch):
    rows, where = run
    monkeypatch.setattr(experiment, "row_of", None)
    assert experiment.run(["lenet300"], **where) == rows


def test_checks_compare_what_was_measured():
    errors = {"direct": 9.0, "diagonal": 10.0, "kronecker": 3.0, "lc": 2.0}
    rows = [{"network": "lenet300", "budget": "prune=0.1", "approach": a, "error": e} for a, e in errors.items()]
    rows.append({"network": "vgg16", "budget": "prune=0.1", "approach": "diagonal", "error": 9.0, "seconds": 0.5})
    checks = experiment.checks_of(rows)
    assert {name for name, check in checks.items() if not check["holds"]} == {
        "lenet300_prune=0.1_diagonal_against_direct"
    }
    assert checks["vgg16_prune=0.1_seconds"]["holds"]
    assert checks["lenet300_prune=0.1_kronecker_against_lc"]["relation"] == ">="
    assert len(checks) == 6
