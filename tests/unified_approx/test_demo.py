"""The demo with little data and few steps; the same code as the real one."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from solvers.penalties import split_band
from unified_approx import cli, datasets, demo, evaluate, storage, zoo

SMALL = demo.Settings(
    images=60,
    rows=512,
    max_steps=30,
    budget=0.85,
    budgets=(0.8,),
    penalties=(0.2, 0.1),
    rounds=2,
    keep=("conv1", "conv3", "fc"),
    last_start=0.0,
)
PICTURES = ["approximation", "convergence", "singular_values", "column_norms", "accuracy_against_params"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=160)
    row = demo.run(out / "new", out / "demo.json", console=console, settings=SMALL)
    return out, row, json.loads((out / "demo.json").read_text()), console.file.getvalue()


def test_writes_every_picture(done):
    out, _, found, text = done
    assert found["pictures"] == [f"{name}.png" for name in PICTURES]
    for name in found["pictures"]:
        pixels = imread(out / "new" / name)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.05
        assert name in text


def test_both_m_steps_solve_the_same_problem(done):
    _, _, found, text = done
    mm, sgd = found["m_steps"]
    assert (mm["m_step"], sgd["m_step"]) == ("mm", "sgd")
    for one in (mm, sgd):
        assert one["seconds"] > 0
        assert one["compile_seconds"] > 0
        assert 0 < one["iterations"] <= SMALL.max_steps
        assert 0 < one["error_after_held_out"] < 1
    assert mm["objective"] <= sgd["objective"]  # no learning rate, and further after as many iterations
    assert "majorise-minimise" in text
    assert "SGD" in text


def test_results_follow_the_schema_and_the_file_gives_the_same_accuracy(done):
    out, row, found, text = done
    assert found["rows"] == [row]
    assert {name: found[name] for name in row} == row
    assert (row["network"], row["method"], row["budget"], row["seeds"]) == ("digits", "admm", "params=0.85", 1)
    assert found["checks"]["loaded_accuracy"]["holds"] is True
    assert set(found["checks"]) == {"loaded_accuracy", "drop", "seconds"}
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "conv3", "fc"]
    data = datasets.load("digits")
    x = zoo.entry("digits").preprocess(data.x_test)
    saved = out / "new" / demo.FILE_NAME
    assert row["file_bytes"] == saved.stat().st_size
    assert evaluate.accuracy(storage.load(saved), x, data.y_test) == row["accuracy"]
    assert row["reference_accuracy"] == evaluate.accuracy(zoo.load("digits"), x, data.y_test) > 98
    assert f"{row['accuracy']:.2f}" in text


def test_the_last_picture_stops_in_time_but_has_a_point_of_each_curve(done):
    _, _, found, text = done
    by_budget, by_penalty = found["curves"]
    assert len(by_budget["params"]) == len(by_penalty["params"]) == 1
    assert "left out, to be done in time: 2 of 3 points" in text
    assert by_budget["accuracy"] == [found["accuracy"]]


def test_penalties_lie_in_the_band_where_both_parts_can_be_non_zero():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(abs(rng.standard_normal(s)), jnp.float32) for s in ((50, 18), (50, 4)))
    problem = demo.LayerProblem(x=x, y=y, bias=jnp.zeros(4))
    low, high = split_band((4, 18))
    for band in (0.0, 0.35, 1.0):
        penalty = demo._penalty(problem, (4, 18), demo.Settings(band=band))
        ratio = float(penalty.lambda_rank / penalty.lambda_sparse)
        assert ratio == pytest.approx(low * (high / low) ** band, rel=1e-5)


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "is a file; give the name of a folder" in result.stderr


def test_the_command_hands_its_arguments_on(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda out, json_file, **more: seen.update(more, out=out, json=json_file))
    result = CliRunner().invoke(
        cli.app, ["demo", "--out", str(tmp_path / "o"), "--json", str(tmp_path / "j" / "r.json")]
    )
    assert result.exit_code == 0, result.output
    assert (seen["out"], seen["json"]) == (tmp_path / "o", tmp_path / "j" / "r.json")
    assert seen["command"] == f"unified-approx demo --out {tmp_path / 'o'} --json {tmp_path / 'j' / 'r.json'}"
    assert seen["started"] > 0
