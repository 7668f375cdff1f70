"""The front door on the packaged digits network: budgets, penalties, rules, resuming, and bad input."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import unified_approx as ua
from solvers import layer, refine
from unified_approx import datasets, evaluate, latency, zoo
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.sampling import default_rows

SMALL = {"rows": 2048, "batch_size": 100, "allocation": "uniform"}
COLUMNS = {**SMALL, "form": "columns"}


@pytest.fixture(scope="module")
def digits():
    data = datasets.load("digits")
    entry = zoo.entry("digits")
    return zoo.load("digits"), entry.preprocess(data.x_train[:300]), entry.preprocess(data.x_test), data.y_test


@pytest.fixture(scope="module")
def half(digits):
    model, images, _, _ = digits
    events = []
    result = ua.compress(model, images, budget=ua.Budget(params=0.5), progress=events.append, **SMALL)
    return result, events


@pytest.fixture(scope="module")
def columns(digits):
    arguments = {"budget": ua.Budget(params=0.5), "progress": lambda e: None, **COLUMNS}
    return ua.compress(digits[0], digits[1], **arguments)


def test_half_of_the_parameters_keeps_the_accuracy(digits, half):
    model, _, test, labels = digits
    result, _ = half
    assert result.budget_met
    assert result.report.selected_fraction <= 0.5
    assert result.report.params_ratio > 1.9
    assert evaluate.accuracy(result.model, test, labels) > evaluate.accuracy(model, test, labels) - 2.0


def test_report_has_a_row_per_layer_and_its_figures_agree_with_the_network(digits, half):
    result, events = half
    rows = result.report.layers
    assert [row.status for row in rows] == ["compressed"] * len(rows)
    for row in rows:
        module = result.model
        for key in row.name.split("/"):
            module = module[int(key)] if key.isdigit() else getattr(module, key)
        assert isinstance(module, Factored)
        stored = sum(t.size for name, t in module.tensors().items() if np.issubdtype(t.dtype, np.floating))
        assert stored - (row.shape[0] - row.removed_channels) == row.params  # bias apart
        assert row.form in row.candidates
        assert row.candidates[row.form]["error"] == min(c["error"] for c in row.candidates.values())
        assert "admm" in row.candidates
        assert 0 < row.error_after_held_out < 0.5
        assert row.params + row.index_bits / 32 <= 0.5 * row.original_params
        assert row.macs < row.original_macs
    assert [e.name for e in events if e.row is not None] == [row.name for row in rows]
    assert result.report.params == sum(v[...].size for _, v in nnx.to_flat_state(nnx.state(result.model, nnx.Param)))


def test_same_seed_gives_the_same_network_and_the_model_is_untouched(digits, columns):
    model, images, _, _ = digits
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    again = ua.compress(model, images, budget=ua.Budget(params=0.5), progress=lambda e: None, **COLUMNS)
    for old, new in zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (columns, again)), strict=True):
        np.testing.assert_array_equal(old, new)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_one_compilation_per_shape(digits):
    """Another budget and other data of the same shapes compile neither the refinement nor the statistics again."""
    model, images, _, _ = digits
    ua.compress(model, images, budget=ua.Budget(params=0.4), progress=lambda e: None, **COLUMNS)
    before = refine._cache_size()
    ua.compress(model, images + 0.01, budget=ua.Budget(params=0.35), progress=lambda e: None, seed=3, **COLUMNS)
    assert refine._cache_size() == before


def test_penalties_instead_of_a_budget(digits):
    model, images, test, labels = digits
    result = ua.compress(model, images, lambda_sparse=0.03, lambda_rank=0.03, progress=lambda e: None, **SMALL)
    assert result.budget_met is None
    assert {row.form for row in result.report.layers if row.status == "compressed"} == {"admm"}
    assert evaluate.accuracy(result.model, test, labels) > 80


def test_whole_channels_and_single_forms(digits):
    model, images, _, _ = digits
    rules = (ua.Rule(path=".*", group="channel", form="columns"),)
    result = ua.compress(model, images, budget=ua.Budget(params=0.6), rules=rules, progress=lambda e: None, **SMALL)
    row = next(r for r in result.report.layers if r.kind == "conv" and r.shape[1] > 9)
    assert row.form == "columns"
    assert row.kept_columns % 9 == 0


def test_rules_keep_and_override(digits):
    model, images, _, _ = digits
    first = ua.plan(model, images, budget=ua.Budget(params=0.5)).layers[0]["name"]
    rules = (ua.Rule(path=first, keep=True), ua.Rule(path=".*", budget=ua.Budget(params=0.8)))
    planned = ua.plan(model, images, budget=ua.Budget(params=0.5), rules=rules)
    assert planned.kept == (first,)
    assert all(r["values"] == pytest.approx(0.8 * np.prod(r["shape"])) for r in planned.layers)
    keep = {"rules": rules[:1], "allocation": "uniform"}
    least = ua.plan(model, images, budget=ua.Budget(params=0.9), **keep).minimum_params
    with pytest.raises(ValueError, match=f"the smallest that can be reached, params={least:.4f}"):
        ua.plan(model, images, budget=ua.Budget(params=least * 0.999), **keep)
    assert planned.seconds > 0
    assert planned.memory_mb > 0


CALIBRATION = {
    "array": lambda x: x,
    "list of batches": lambda x: [x[:100], x[100:150]],
    "generator": lambda x: (x[i : i + 50] for i in range(0, 150, 50)),
    "function": lambda x: lambda: [x[:150]],
    "jax array": lambda x: jnp.asarray(x[:150]),
}


def test_ranks_by_rules(digits, tmp_path):
    """Manual ranks; data-free too; saved and loaded. musco-pytorch gives unlisted layers rank 0."""
    model, images, test, _ = digits
    rules = (
        ua.Rule(path="conv2", form="tucker2", ranks=(12, 9)),
        ua.Rule(path="conv3", form="cp3", ranks=(20,)),
        ua.Rule(path=".*", keep=True),
    )
    results = {}
    for aware in (True, False):
        options = layer.LayerOptions(data_aware=aware)
        results[aware] = ua.compress(model, images, rules=rules, options=options, progress=lambda e: None, **SMALL)
    rows = {row.name: row for row in results[True].report.layers}
    assert [rows[name].status for name in ("conv1", "conv2", "conv3", "fc")] == [
        "kept",
        "compressed",
        "compressed",
        "kept",
    ]
    n, c_in = rows["conv2"].shape[0], rows["conv2"].shape[1] // 9
    assert (rows["conv2"].form, rows["conv2"].rank) == ("tucker2", 12)
    assert rows["conv2"].params == 9 * c_in + 12 * 9 * 9 + 12 * n
    assert results[True].budget_met
    plain = {row.name: row for row in results[False].report.layers}
    assert all(rows[name].error_after_held_out < plain[name].error_after_held_out for name in ("conv2", "conv3"))
    results[True].save(tmp_path / "n.safetensors")
    loaded = ua.load(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(evaluate.predict(loaded, test), evaluate.predict(results[True].model, test))


@pytest.mark.parametrize("form", CALIBRATION)
def test_calibration_in_every_form(digits, form):
    model, images, _, _ = digits
    assert ua.plan(model, CALIBRATION[form](images), budget=ua.Budget(params=0.5)).layers


def test_nested_inputs(digits):
    model, images, _, _ = digits
    batch = {"image": images, "scale": np.ones((len(images), 1, 1, 1), np.float32)}
    planned = ua.plan(model, batch, budget=ua.Budget(params=0.5), call=lambda m, b: m(b["image"] * b["scale"]))
    assert planned.layers


def nan_weights():
    model = zoo.create("digits")
    path, leaf = next(iter(nnx.to_flat_state(nnx.state(model, nnx.Param))))
    leaf[...] = jnp.full(leaf[...].shape, jnp.nan)
    return model


class Nothing(nnx.Module):
    def __call__(self, x):
        return x.mean(axis=(1, 2))


BAD = [
    ({"budget": None}, "budget: none given"),
    ({"lambda_sparse": 0.1}, "not both"),
    ({"budget": None, "lambda_sparse": -0.1, "lambda_rank": 0.1}, "lambda_sparse: -0.1"),
    ({"budget": None, "lambda_sparse": 0.1}, "none given"),
    ({"budget": ua.Budget(params=0.0001)}, "already take 0.0026"),
    ({"calibration": np.zeros((0, 8, 8, 1), np.float32)}, "empty"),
    ({"calibration": []}, "no batches"),
    ({"calibration": np.full((10, 8, 8, 1), np.nan, np.float32)}, "NaN"),
    ({"calibration": np.zeros((1, 8, 8, 1), np.float32)}, "at least 2"),
    ({"calibration": {"a": np.zeros((4, 2)), "b": np.zeros((5, 2))}}, "different first axes"),
    ({"calibration": [np.zeros((4, 8, 8, 1)), {"a": np.zeros((4, 8, 8, 1))}]}, "structured as"),
    ({"rules": [ua.Rule(path="nothing", keep=True)]}, "matches no layer"),
    ({"rules": [ua.Rule(path="(", keep=True)]}, "not a regular expression"),
    ({"rules": [ua.Rule(path=".*", keep=True)]}, "no layer to compress"),
    ({"form": "magic"}, "form: 'magic'"),
    ({"budget": None, "rules": [ua.Rule(path=".*", form="low_rank", ranks=(99,))]}, "layer 'conv1': ranks: (99,)"),
    ({"group": "row"}, "group: 'row'"),
    ({"held_out": 1.5}, "held_out: 1.5"),
    ({"rows": 0}, "rows: 0"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"model": nan_weights}, "NaN or infinite"),
    ({"model": Nothing}, "no layer that can be compressed"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(digits, change, message):
    change = dict(change)
    model = change.pop("model")() if "model" in change else digits[0]
    arguments = {"budget": ua.Budget(params=0.5), "calibration": digits[1][:20], **change}
    calibration = arguments.pop("calibration")
    with pytest.raises(ValueError, match=re.escape(message)):
        ua.compress(model, calibration, progress=lambda e: None, **arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_budgets_outside_the_unit_interval(value):
    with pytest.raises(ValueError, match="not a fraction"):
        ua.Budget(params=value)
    with pytest.raises(ValueError, match="not understood"):
        ua.Budget.parse(f"size={value}")


def test_fewer_rows_than_features_is_solved_with_a_warning(digits):
    model, images, test, labels = digits
    result = ua.compress(
        model, images, budget=ua.Budget(params=0.7), progress=lambda e: None, **{**COLUMNS, "rows": 64}
    )
    assert any("ridge" in w for w in result.report.warnings)
    assert np.isfinite(evaluate.predict(result.model, test)).all()


def test_a_diverging_layer_stays_dense_and_the_rest_goes_on(digits, monkeypatch):
    model, images, _, _ = digits
    from unified_approx import run

    calls = []

    def solve(problem, *args, **kwargs):
        calls.append(problem)
        broken = replace(problem, y=problem.y * jnp.nan, response=problem.response * jnp.nan)
        return layer.solve(broken if len(calls) == 2 else problem, *args, **kwargs)

    monkeypatch.setattr(run, "solve", solve)
    result = ua.compress(model, images, budget=ua.Budget(params=0.5), progress=lambda e: None, **COLUMNS)
    assert [row.status for row in result.report.layers][:3] == ["compressed", "diverged", "compressed"]
    assert not result.budget_met


KILLED = """
import os, sys
import unified_approx as ua
from unified_approx import datasets, zoo
images = zoo.entry("digits").preprocess(datasets.load("digits").x_train[:300])
def die(event):
    if event.row is not None and event.index == 1:
        os._exit(9)
ua.compress(zoo.load("digits"), images, budget=ua.Budget(params=0.5), rows=2048, batch_size=100, allocation="uniform",
            form="columns", progress=die, work_dir=sys.argv[1])
"""


def test_a_killed_run_resumes_and_ends_with_the_same_network(digits, columns, tmp_path):
    model, images, _, _ = digits
    work = tmp_path / "work"
    assert subprocess.run([sys.executable, "-c", KILLED, str(work)], check=False).returncode == 9
    stored = sorted(p.name for p in work.glob("layer-*"))
    assert stored == ["layer-0000.safetensors", "layer-0001.safetensors"]
    times = {p: (work / p).stat().st_mtime_ns for p in stored}
    arguments = {"budget": ua.Budget(params=0.5), "progress": lambda e: None, **COLUMNS}
    resumed = ua.compress(model, images, work_dir=work, **arguments)
    assert {p: (work / p).stat().st_mtime_ns for p in stored} == times
    for old, new in zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (columns, resumed)), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(ValueError, match="another run"):
        ua.compress(model, images, work_dir=work, **{**arguments, "budget": ua.Budget(params=0.6)})
    (work / "layer-0002.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="damaged"):
        ua.compress(model, images, work_dir=work, **arguments)
    (work / "run.json").write_text("rubbish")
    with pytest.raises(ValueError, match="cannot be read"):
        ua.compress(model, images, work_dir=work, **arguments)
    with pytest.raises(ValueError, match="not empty"):
        ua.compress(model, images, work_dir=Path(__file__).parent, **arguments)


def test_default_rows():
    assert default_rows(576, 10**6) == 57344
    assert default_rows(144, 10**6) == 32768
    assert default_rows(300, 1800) == 1800
    assert default_rows(9216, 10**6) * 9216 <= 2**28


def test_lazy_package():
    assert "compress" in dir(ua)
    with pytest.raises(AttributeError, match="no attribute"):
        ua.nothing  # noqa: B018


def test_executions_that_are_fastest_as_a_whole(monkeypatch):
    """A clock that likes patches times matrix: every layer, dense or not, ends in that form."""

    def clock(candidates, *inputs, call=None, rounds=20):
        forms = {
            name: m.execution if isinstance(m, Factored) else str(_executions(m)) for name, m in candidates.items()
        }
        return {name: 1.0 if "matmul" in form else 2.0 for name, form in forms.items()}

    monkeypatch.setattr(latency, "measure_latency", clock)
    images = zoo.entry("digits").preprocess(datasets.load("digits").x_train[:60])
    rules = [ua.Rule(path="conv2", budget=ua.Budget(params=0.5)), ua.Rule(path=".*", keep=True)]
    arguments = {"rules": rules, "form": "columns", "rows": 256, "progress": lambda event: None}
    result = ua.compress(zoo.load("digits"), images, execution="fastest", **arguments)
    assert _executions(result.model) == {"conv1": "matmul", "conv2": "matmul", "conv3": "matmul"}
    row = next(row for row in result.report.layers if row.name == "conv2")
    assert "runs as one dense layer, which is faster here" in row.reason
    assert result.report.macs < result.report.original_macs  # of the factors, which the budget counts
    plain = ua.compress(zoo.load("digits"), images, **arguments)
    assert "matmul" not in _executions(plain.model).values()
    np.testing.assert_allclose(evaluate.predict(result.model, images), evaluate.predict(plain.model, images), atol=1e-3)


def _executions(model):
    return {"/".join(path): layer.execution for path, layer in factored_layers(model).items()}
