import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from unified_approx.results import check, network_row, peak_rss_mb, saved_network_row, versions, write_results

FIELDS = {
    "network", "method", "budget", "finetune_epochs", "reference_accuracy", "accuracy", "drop", "std", "seeds",
    "params_ratio", "cr", "macs_ratio", "bytes_ratio", "speedup", "speedup_batch1", "file_bytes",
}  # fmt: skip


def row(**changes):
    fixed = {"network": "resnet20", "method": "admm", "budget": "params=0.5", "reference_accuracy": 91.7}
    return network_row(**{**fixed, "accuracy": 90.4, "params_ratio": 2.0, "cr": 1.9, "macs_ratio": 2.1, **changes})


def test_a_row_has_the_fields_of_the_schema_and_the_drop_is_against_the_better_reference():
    plain = row()
    assert set(plain) == FIELDS
    assert plain["drop"] == pytest.approx(1.3)
    assert plain["speedup"] is None
    trained = row(reference_finetuned_accuracy=92.0, finetune_epochs=2, name="x")
    assert set(trained) == FIELDS | {"reference_finetuned_accuracy", "name"}
    assert trained["drop"] == pytest.approx(1.6)
    assert row(reference_finetuned_accuracy=91.0)["drop"] == pytest.approx(1.3)
    assert row(reference_accuracy=None)["drop"] is None
    assert row(accuracy=None)["drop"] is None


def test_row_of_a_saved_network():
    report = {"budget": "params=0.5", "params_ratio": 2.0, "cr": 1.9, "macs_ratio": 2.1}
    assert saved_network_row("resnet20", 90.4, 123, report) == row(reference_accuracy=None, file_bytes=123)
    bare = saved_network_row("resnet20", 90.4, 123, None)
    assert set(bare) == FIELDS
    assert bare["cr"] is None


@pytest.mark.parametrize(
    ("value", "relation", "target", "holds"),
    [
        (2, ">=", 2, True), (1, ">=", 2, False), (2, ">", 2, False), (1, "<", 2, True), (2, "<=", 1, False),
        (1, "==", 1, True), (math.nan, "<=", 1, False),
    ],
)  # fmt: skip
def test_check(value, relation, target, holds):
    found = check(value, relation, target)
    assert found["holds"] is holds
    assert found["relation"] == relation


def test_check_refuses_an_unknown_relation():
    with pytest.raises(ValueError, match="'~' is unknown; use one of >="):
        check(1, "~", 1)


def test_the_file_has_the_schema(tmp_path):
    checks = {"accuracy": check(90.4, ">=", 90.0)}
    more = {"layers": [{"shape": (2, 3), "error": math.nan, "rank": np.int64(2), "curve": jnp.arange(2.0)}]}
    path = write_results(
        tmp_path / "new" / "r.json", "cmd", [row()], checks, seconds=1.23456, seed=3, repeat_row=True, **more
    )
    found = json.loads(path.read_text())
    top = {"command", "versions", "seed", "seconds", "peak_rss_mb", "rows", "checks", "layers"}
    assert set(found) == top | FIELDS
    assert {k: found[k] for k in FIELDS} == found["rows"][0] == row()
    assert (found["command"], found["seed"], found["seconds"]) == ("cmd", 3, 1.235)
    assert found["checks"]["accuracy"] == {"value": 90.4, "relation": ">=", "target": 90.0, "holds": True}
    assert found["layers"] == [{"shape": [2, 3], "error": None, "rank": 2, "curve": [0.0, 1.0]}]
    assert set(found["versions"]) == {"jax", "jaxlib", "flax", "numpy", "unified_approx"}
    assert found["versions"]["numpy"] == np.__version__ == versions()["numpy"]
    assert 20 < found["peak_rss_mb"] <= peak_rss_mb() < 100_000
    assert list(path.parent.iterdir()) == [path]


def test_a_quick_run_never_replaces_a_full_one(tmp_path):
    path = tmp_path / "r.json"

    def write(seed, quick):
        return write_results(path, "cmd", [row(), row()], seconds=1, seed=seed, quick=quick)

    assert write(1, True) == path  # nothing there yet
    assert json.loads(path.read_text())["quick"] is True
    assert write(2, True) == path  # a quick one may go
    assert write(3, False) == path
    full = path.read_text()
    assert "quick" not in json.loads(full)
    beside = write(4, True)
    assert beside == tmp_path / "r.quick.json"
    assert json.loads(beside.read_text())["seed"] == 4
    assert path.read_text() == full
    path.write_text("not JSON")  # unknown, so it might be somebody's
    assert write(5, True) == beside
    assert path.read_text() == "not JSON"


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="there are 2 rows"):
        write_results(tmp_path / "r.json", "cmd", [row(), row()], seconds=1, seed=0, repeat_row=True)
    with pytest.raises(ValueError, match="is a folder"):
        write_results(tmp_path, "cmd", [row()], seconds=1, seed=0)
    with pytest.raises(ValueError, match="'seed' is a field of every result file"):
        write_results(tmp_path / "r.json", "cmd", [row(seed=1)], seconds=1, seed=0, repeat_row=True)
    assert not list(tmp_path.iterdir())
