"""The tables of the LC algorithm: what they measure, how they are summed up, and that finished rows stay."""

import dataclasses
import json

import lc_cifar
import lc_lenet300 as table
import numpy as np
import pytest
from typer.testing import CliRunner

from solvers.compressions import AdaptiveCodebook, Additive, LowRank, OneOf, PruneGroups, PruneL0, RankSelection
from unified_approx import zoo
from unified_approx.pieces import parameters_of
from unified_approx.report import LayerRow
from unified_approx.results import read_rows
from unified_approx.sites import path_name


@pytest.fixture(scope="module")
def lenet(tmp_path_factory, data_dir, models_dir):
    folder = tmp_path_factory.mktemp("lc")
    where = ["--data", str(data_dir), "--models", str(models_dir), "--work-dir", str(folder / "work")]
    arguments = [*where, "--json", str(folder / "r.json"), "--row", "mixed", "--row", "sparse_low_rank"]
    app = table.typer.Typer()
    app.command()(table.main)
    run = lambda *more: CliRunner().invoke(app, [*arguments, "--quick", "--seeds", "1", *more])  # noqa: E731
    done = run()
    assert done.exit_code == 0, done.output
    return run, folder / "r.json"


def test_rows_and_their_summary(lenet):
    rows = read_rows(lenet[1])
    own, lines = [row for row in rows if "history" in row], [row for row in rows if row["part"] == "summary"]
    assert [row["name"] for row in own] == ["mixed", "sparse_low_rank"] == [line["name"] for line in lines]
    for row in own:
        assert row["error"] == pytest.approx(100 - row["accuracy"])
        assert row["bits"] / 8 < row["file_bytes"] < row["bits"] / 8 + 10_000
        assert len(row["history"]) == 1 + table.QUICK_STEPS
    assert own[0]["info"] == [{"kept": 5000}, {"rank": 10}, own[0]["info"][2]]
    assert own[1]["macs_ratio"] > 5
    assert [row["learning_rate"] for row in own] == [0.05, 0.05]


def test_seconds_are_those_of_all_rows(lenet):
    """Whichever run made them: the fixture's second run makes none."""
    found = json.loads(lenet[1].read_text())
    total = sum(row["seconds"] for row in found["rows"] if "history" in row)
    assert found["seconds"] == pytest.approx(total, abs=2e-3)
    assert found["checks"]["seconds"] == {
        "value": pytest.approx(total),
        "relation": "<=",
        "target": 10800,
        "holds": True,
    }


def test_the_recipe_is_the_published_one_but_for_the_length():
    """`examples/lenet300/lenet300.py` of LC-model-compression."""
    rates = {"quantize_all": 0.09, "quantize_two": 0.09, "prune": 0.1, "additive": 0.09, "mixed": 0.05}
    rates |= {"rank_selection": 0.1}
    assert {name: table.CASES[name].learning_rate for name in rates} == rates
    assert table.CASES["additive"].tasks == "fc.=joint(prune(0.01)+quantize(2))"
    schedule = table.schedule_of(table.CASES["prune"], 0, False)
    assert (schedule.epochs, schedule.first_epochs, schedule.batch_size, schedule.decay) == (7, 14, 256, 0.98)


def test_rows_of_another_recipe_are_made_again(lenet, monkeypatch):
    run, _ = lenet
    case = dataclasses.replace(table.CASES["mixed"], learning_rate=0.04)
    monkeypatch.setitem(table.CASES, "mixed", case)
    monkeypatch.setattr(table, "row_of", None)
    assert run("--row", "mixed").exit_code == 1


def test_finished_rows_are_not_made_again(lenet, monkeypatch):
    run, file = lenet
    before = read_rows(file)
    monkeypatch.setattr(table, "row_of", None)
    assert run().exit_code == 0
    assert read_rows(file) == before


def test_a_wrong_row_is_named(lenet):
    done = lenet[0]("--row", "half")
    assert done.exit_code == 2
    assert "half" in done.output


def test_means_are_judged_by_the_published_errors():
    common = {"cr": 4.0, "bits": 8, "file_bytes": 2, "seconds": 1.0, "budget": "b"}
    rows = [{**common, "name": "prune", "error": e, "published_error": 2.18} for e in (2.0, 2.2, 2.4)]
    rows += [{**common, "name": "mixed", "error": 1.0, "published_error": 2.13}]
    rows += [{**common, "name": "low_rank", "error": 1.0, "published_error": None}]
    lines = table.summary(rows)
    assert [(line["name"], line["seeds"]) for line in lines] == [("prune", 3), ("mixed", 1), ("low_rank", 1)]
    assert lines[0]["error"] == pytest.approx(2.2)
    assert lines[0]["std"] == pytest.approx(0.2)
    assert {name: check["holds"] for name, check in table.checks_of(lines).items()} == {
        "prune": False,
        "mixed": True,
        "seconds": True,
    }


def test_forms_of_the_cifar_rows():
    model, x = zoo.create("resnet20"), np.zeros((0, 32, 32, 3), np.float32)
    asked = {"alpha": 1e-9, "budget": "macs=0.5", "share": 0.3, "k": 8}
    tasks = {form: lc_cifar.Asked(form, **asked).tasks(model, x, 0) for form in ("prune", "quantize")}
    assert [task.compression for task in tasks["prune"]] == [PruneL0(0.3)]
    assert [task.compression for task in tasks["quantize"]] == [AdaptiveCodebook(8)]


def test_selected_ranks_are_priced_and_leave_first_and_last_layer_alone():
    model = zoo.create("resnet20")
    asked = lc_cifar.Asked("select_rank", 1e-9, "macs=0.5", 0.3, 8)
    tasks = asked.tasks(model, np.zeros((2, 32, 32, 3), np.float32), 0)
    assert len(tasks) == 18
    for task in tasks:
        assert isinstance(task.compression, OneOf)
        assert all(isinstance(part, RankSelection) for part in task.compression.parts)
        assert task.norm_after
    kernels = {path_name(path): value for path, value in parameters_of(model).items()}
    for task in tasks:  # errors are relative to the layer: its price grows with its weights
        size = float(np.sum(np.asarray(kernels[task.path.replace("\\", "")]) ** 2))
        assert [part.alpha for part in task.compression.parts] == pytest.approx([1e-9 * size] * 2, rel=1e-5)


def test_sparse_and_low_rank_is_compared_with_selected_ranks(tmp_path):
    row, file = {"drop": 0.4, "macs_ratio": 1.9}, tmp_path / "lc-resnet20-select_rank.json"
    assert lc_cifar.compared(row, file, False) == {}
    file.write_text(json.dumps({"rows": [{"drop": 0.5, "macs_ratio": 2.0}]}))
    assert lc_cifar.compared(row, file, True) == {}
    checks = lc_cifar.compared(row, file, False)
    assert {name: own["holds"] for name, own in checks.items()} == {
        "drop_against_select_rank": True,
        "macs_ratio_against_select_rank": False,
    }


def test_as_much_of_both_parts_as_a_layer_was_given():
    def form(columns, rank):
        return lc_cifar._form_of(
            LayerRow(name="a", kind="conv", shape=(4, 9), status="compressed", kept_columns=columns, rank=rank)
        )

    assert form(3, 2) == Additive((LowRank(2), PruneGroups(3)))
    assert form(3, 0) == PruneGroups(3)
    assert form(0, 2) == LowRank(2)
    assert form(0, 0) is None
