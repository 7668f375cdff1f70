"""The command `lc` on the packaged digits network."""

import json

import pytest
from typer.testing import CliRunner

from unified_approx import cli, datasets, evaluate, learning_compression, storage, zoo

TASKS = "conv[23]=low_rank(6,scheme=auto),fc=prune(0.1)+quantize(2)"
QUICK = ["--mu", "0.01", "--mu-factor", "1.8", "--steps", "3", "--epochs", "1", "--batch-size", "64"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lc")
    out, json_file = folder / "small.safetensors", folder / "row.json"
    files = ["--checkpoint-dir", folder / "c", "--out", out, "--json", json_file]
    result = run("lc", "digits", "--tasks", TASKS, *QUICK, *files, "--finetune", 1, "--debug")
    assert result.exit_code == 0, result.output
    return folder, json.loads(json_file.read_text()), result


def test_it_writes_the_network_a_row_and_the_history(compressed):
    folder, found, result = compressed
    out, row = folder / "small.safetensors", found["rows"][0]
    assert (row["network"], row["method"], row["budget"], row["finetune_epochs"]) == ("digits", "lc", TASKS, 1)
    assert row["file_bytes"] == out.stat().st_size
    assert row["cr"] > 8
    assert row["macs_ratio"] > 5
    assert [line["step"] for line in found["history"]] == [0, 1, 2, 3]
    assert found["history"][3]["info"][0] == {"rank": 6}
    assert found["command"].startswith(f"unified-approx lc digits --tasks '{TASKS}' --mu 0.01 --mu-factor 1.8")
    data = datasets.load("digits")
    x = zoo.entry("digits").preprocess(data.x_test)
    assert row["accuracy"] == evaluate.accuracy(storage.load(out), x, data.y_test)
    for text in ("step 3/3: mu 0.0324, loss", "low_rank", "prune + quantize", "accuracy on the test images"):
        assert text in result.stdout


def test_evaluate_and_info_read_its_file(compressed, tmp_path):
    folder, found, _ = compressed
    result = run("evaluate", folder / "small.safetensors", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    again = json.loads((tmp_path / "e.json").read_text())
    assert {name: again[name] for name in ("method", "accuracy", "cr")} == {
        name: found["rows"][0][name] for name in ("method", "accuracy", "cr")
    }
    shown = run("info", folder / "small.safetensors").stdout
    for text in (TASKS, "FactoredConv", "spatial", "stored as bits: fc"):
        assert text in shown


def test_a_run_goes_on_from_its_checkpoints_only(compressed):
    folder, found, _ = compressed
    again = run("lc", "digits", "--tasks", TASKS, *QUICK, "--checkpoint-dir", folder / "c")
    assert again.exit_code == 0, again.output
    assert "step 3/3" not in again.stdout  # nothing was left to do
    other = run("lc", "digits", "--tasks", "fc=prune(3)", *QUICK, "--checkpoint-dir", folder / "c")
    assert other.exit_code == 2
    assert "belongs to another run (its tasks differs)" in other.stderr


def test_a_diverged_run_writes_the_best_until_then(tmp_path):
    out, json_file = tmp_path / "n.safetensors", tmp_path / "row.json"
    rate = ["--learning-rate", "1e30", "--mu", "1e-38", "--steps", "1", "--epochs", "1"]
    result = run("lc", "digits", "--tasks", "fc=prune(0.5)", *rate, "--out", out, "--json", json_file, "--finetune", 2)
    assert result.exit_code == 1
    assert "l_step: step 1" in result.stderr
    assert "lower the learning rate" in result.stderr
    assert zoo.create("digits").fc.kernel.shape == storage.load(out).fc.kernel.shape
    assert json.loads(json_file.read_text())["rows"][0]["finetune_epochs"] == 0


def test_what_is_said_of_the_rates_arrives(monkeypatch, tmp_path):
    seen = []

    class Seen(Exception):
        pass

    def stop(result, x, y, recipe):
        seen.append(recipe)
        raise Seen

    def l_step(x, y, schedule, **more):
        seen.append(schedule)
        return lambda model, penalty, step: model

    monkeypatch.setattr(learning_compression, "SgdLStep", l_step)
    monkeypatch.setattr(learning_compression, "finetune_compressed", stop)
    rates = ["--restart", "--momentum", 0.5, "--decay", 0.9, "--finetune", 1, "--finetune-rate", 0.003]
    result = run("lc", "digits", "--tasks", "fc=prune(0.5)", "--steps", 1, *rates, "--debug")
    assert isinstance(result.exception, Seen)
    schedule, recipe = seen
    assert (schedule.restart, schedule.momentum, schedule.decay) == (True, 0.5, 0.9)
    assert (recipe.epochs, recipe.learning_rate) == (1, 0.003)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "conv9=prune(3)"], "'conv9' names no layer and no parameter; there are: conv1"),
        (["--tasks", "fc=prine(3)"], "--tasks: 'prine' is unknown"),
        (["--tasks", "fc=prune(3)", "--mu-factor", "0.5"], "factor >= 1"),
        (["--tasks", "fc=prune(3)", "--epochs", "0"], "epochs: 0"),
        (["--tasks", "fc=prune(3)", "--finetune", "-1"], "--finetune: -1"),
        (["--tasks", "fc=prune(3)", "--finetune-rate", "0"], "--finetune-rate: 0"),
        (["--tasks", "fc=prune(3)", "--momentum", "1"], "momentum: 1.0"),
        (["--tasks", "fc=low_rank(99)"], "tasks: fc: rank: 99"),
        (["--tasks", "fc=prune(3)", "--out", "."], "--out: . is a folder"),
    ],
)
def test_bad_usage(arguments, message):
    result = run("lc", "digits", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
