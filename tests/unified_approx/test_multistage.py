"""Multi-stage compression on the digits and on tiny networks: steps, ranks, what stays dense, resuming, bad input."""

from dataclasses import replace
from typing import Any

import jax
import networks as nets
import numpy as np
import pytest
from flax import nnx
from networks import Fn, build, conv, flat, linear

import unified_approx as ua
from solvers.factor_sizes import FACTORED
from solvers.factor_sizes import cost as size_of
from solvers.layer import LayerOptions
from solvers.rank_rules import Cheapest, Energy, Evbmf, MaxDrop, Rate
from unified_approx import evaluate, multistage
from unified_approx.cost import network_cost
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.multistage import compressor
from unified_approx.multistage.ranking import factor_positions
from unified_approx.narrow import as_dense

FAST: dict[str, Any] = {"rows": 1024, "progress": lambda e: None}
RECIPE = ua.Recipe(epochs=1, batch_size=64, augment=None, learning_rate=0.01)
LOOSE = Evbmf(least=6)


@pytest.fixture(scope="module")
def staged(digits):
    """Two layers a step, two passes, an epoch between."""
    model, x, y, _, _ = digits
    steps, results = [], []

    def train(result, step):
        results.append((step, result))
        return ua.finetune(result, x, y, RECIPE, original=model).model

    arguments = {"rank_rule": Rate(params=2.0), "layers_per_step": 2, "stages": 2, "keep": ["fc"], "train": train}
    return ua.musco(model, x[:200], on_step=steps.append, **arguments, **FAST), steps, results


def layer_of(model, name):
    return next(layer for path, layer in factored_layers(model).items() if "/".join(map(str, path)) == name)


def test_layers_are_taken_in_turn_and_around_again(digits, staged):
    result, steps, results = staged
    assert [(step.number, step.stage) for step in steps] == [(1, 1), (2, 2), (3, 2)]
    assert [sorted(step.ranks) for step in steps] == [["conv1", "conv2"], ["conv1", "conv3"], ["conv2", "conv3"]]
    assert [step for step, _ in results] == [1, 2, 3]
    sizes = [step.params for step in steps]
    assert sizes == sorted(sizes, reverse=True)
    for name in ("conv2", "conv3"):
        first, second = (step.ranks[name] for step in steps if name in step.ranks)
        assert all(b <= a for a, b in zip(first, second, strict=True))
        shape = layer_of(result.model, name).geometry.matrix_shape
        assert size_of("tucker2", shape, second) <= size_of("tucker2", shape, first) / 2 <= shape.n * shape.p / 4


def test_the_result_is_that_of_compress(digits, staged, tmp_path):
    model, x, _, test, labels = digits
    result, steps, _ = staged
    after, before = network_cost(result.model, x[:2]), network_cost(model, x[:2])
    report = result.report
    assert (report.params, report.macs) == (after.params, after.macs) == (steps[-1].params, steps[-1].macs)
    assert (report.original_params, report.original_macs) == (before.params, before.macs)
    assert {row.name: row.status for row in report.layers}.pop("fc") == "kept"
    smaller = [row for row in report.layers if row.status == "compressed"]
    assert [row.name for row in smaller] == ["conv1", "conv2", "conv3"]
    assert all(row.params < row.original_params and row.error_after_held_out is not None for row in smaller)
    assert evaluate.accuracy(result.model, test, labels) > 85
    result.save(tmp_path / "n.safetensors")
    loaded = ua.load(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(evaluate.predict(loaded, test), evaluate.predict(result.model, test))


def test_step_by_step_by_the_user(digits):
    model, x, _, _, _ = digits
    options = ua.MuscoOptions(
        rank_rule=LOOSE, decomposition="cp3", layers_per_step=3, keep=["conv1"], ranks={"conv3": (12,)}
    )
    compressor = ua.Musco(model, x[:200], options, **FAST)
    assert compressor.names == ["conv2", "conv3", "fc"]
    assert compressor.ranks == {"conv2": None, "conv3": None, "fc": None}
    while not compressor.done:
        step = compressor.compression_step()
        assert compressor.awaits_training
        compressor.model = nnx.clone(compressor.model)
        assert not compressor.awaits_training
    assert compressor.ranks["conv3"] == step.ranks["conv3"] == (12,)
    kinds = {name: layer_of(compressor.model, name).terms[0].kind for name in ("conv2", "conv3", "fc")}
    assert kinds == {"conv2": "cp3", "conv3": "cp3", "fc": "low_rank"}
    assert not isinstance(compressor.model.conv1, Factored)
    assert "step 1 of at most 1, parameters ÷" in repr(compressor)
    with pytest.raises(ValueError, match="all is done after 1 steps"):
        compressor.compression_step()
    with pytest.raises(ValueError, match="other shapes than the compressor's"):
        compressor.model = model


def test_only_listed_layers_without_a_rule(digits):
    """musco-pytorch gives layers that are not listed rank 0."""
    model, x, _, test, _ = digits
    result = ua.musco(model, x[:200], rank_rule=None, ranks={"conv2": (20, 16), "fc": None}, **FAST)
    assert {row.name: row.status for row in result.report.layers} == {
        "conv1": "kept", "conv2": "compressed", "conv3": "kept", "fc": "kept",
    }  # fmt: skip
    assert layer_of(result.model, "conv2").terms[0].ranks == (20, 16)


def test_stops_when_the_target_is_reached_or_the_ranks_have_settled(digits):
    model, x, _, _, _ = digits
    steps = []
    half = ua.Budget(params=0.6)
    rule = {"rank_rule": Rate(params=2.0), "layers_per_step": 1, "stages": 3}
    result = ua.musco(model, x[:200], target=half, on_step=steps.append, **rule, **FAST)
    assert result.budget_met
    assert len(steps) < 12
    assert steps[-1].params <= 0.6 * result.report.original_params < steps[-2].params
    settled = []
    ua.musco(model, x[:200], rank_rule=None, ranks={"fc": (8,)}, stages=9, on_step=settled.append, **FAST)
    assert [bool(step.ranks) for step in settled] == [True, False]
    assert settled[1].notes == {"fc": "the ranks have settled"}


def test_a_layer_that_would_grow_stays_dense_and_grouped_ones_are_listed():
    model = build(
        lambda: Fn(
            lambda m, x: m.b(flat(nnx.relu(m.g(nnx.relu(m.a(x)))))),
            a=conv(3, 4),
            g=conv(4, 4, feature_group_count=2),
            b=linear(256, 3),
        )
    )
    x = np.random.default_rng(0).standard_normal((20, 8, 8, 3)).astype(np.float32)
    result = ua.musco(model, x, rank_rule=Evbmf(weakening=0.1, noise=1e-12, least=1), **FAST)
    rows = {row.name: row for row in result.report.layers}
    assert (rows["g"].status, rows["g"].reason) == ("skipped", "grouped convolution")
    assert rows["a"].status == "kept"
    assert "full rank" in rows["a"].reason
    assert result.report.params == result.report.original_params


def test_what_follows_is_folded_and_shortcuts_count():
    """A small ResNet with batch norms, strided and dilated layers among them; the network answers as solved."""
    model = build(lambda: nets.resnet(True))
    x = np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype(np.float32)
    result = ua.musco(model, x, rank_rule=Energy(kept=0.97), decomposition="cp3", keep=["fc"], stages=2, **FAST)
    assert not [w for w in result.report.warnings if "differ" in w]
    assert factored_layers(result.model)
    reference, found = (evaluate.predict(each, x) for each in (model, result.model))
    assert np.linalg.norm(found - reference) < 0.5 * np.linalg.norm(reference)


def test_dilation_and_biases_survive_a_second_pass_of_cp4():
    """musco-pytorch drops the first, and reads the second from the wrong layer."""
    parts = {"a": conv(3, 8, kernel_dilation=2), "b": conv(8, 10, strides=2), "c": linear(160, 3)}
    model = build(lambda: Fn(lambda m, x: m.c(flat(nnx.relu(m.b(nnx.relu(m.a(x)))))), **parts))
    x = np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype(np.float32)
    arguments = {"decomposition": "cp4", "data_aware": False, "keep": ["c"], **FAST}
    network = model
    for ranks in ({"a": (9,), "b": (16,)}, {"a": (7,), "b": (12,)}):
        result = ua.musco(network, x, rank_rule=None, ranks=ranks, **arguments)
        network = as_dense(result.model)
    for name in ("a", "b"):
        layer, original = layer_of(result.model, name), getattr(model, name)
        assert layer.terms[0].kind == "cp4"
        assert (layer.geometry.dilation, layer.geometry.strides) == {"a": ((2, 2), (1, 1)), "b": ((1, 1), (2, 2))}[name]
        np.testing.assert_allclose(layer.bias[...], original.bias[...], atol=1e-6)
        dense = nnx.clone(original)
        dense.kernel[...] = layer.kernel()
        values = jax.random.normal(jax.random.key(1), (2, 8, 8, original.in_features))
        np.testing.assert_allclose(layer(values), dense(values), atol=1e-4)


@pytest.mark.parametrize("rule", [Energy(kept=0.8), Cheapest(alpha=2e-5), MaxDrop(points=2.0, by="error")])
def test_rules_that_look_at_data(digits, rule):
    model, x, y, test, labels = digits
    result = ua.musco(model, x[:200], rank_rule=rule, decomposition="spatial", keep=["conv1"], labels=y[:200], **FAST)
    assert result.report.params < result.report.original_params
    assert evaluate.accuracy(result.model, test, labels) > 50


def test_data_aware_is_better_than_the_weights_alone(digits):
    model, x, _, test, _ = digits
    found = {}
    for aware in (True, False):
        arguments = {"rank_rule": Rate(params=3.0), "data_aware": aware, "keep": ["conv1", "fc"], **FAST}
        found[aware] = ua.musco(model, x[:200], **arguments)
    kl = {
        a: evaluate.agreement(evaluate.predict(model, test), evaluate.predict(r.model, test))["kl"]
        for a, r in found.items()
    }
    assert kl[True] < 0.7 * kl[False]


def test_recompression_by_the_matrix_never_loses_to_recompressing_the_core(digits):
    """Data-free second stage against the published one: the core decomposed again, outer factors merged."""
    network, x, layers = digits[0], digits[1][:200], []
    for ranks in ((24, 20), (10, 8)):
        result = ua.musco(network, x, rank_rule=None, ranks={"conv3": ranks}, data_aware=False, **FAST)
        layers.append(layer_of(result.model, "conv3"))
        network = as_dense(result.model)  # as every stage begins
    first, second = layers
    shape = first.geometry.matrix_shape
    whole, found = (layer.terms[0].term().matrix(shape).astype(np.float64) for layer in (first, second))
    term = first.terms[0].term()
    core = np.asarray(term.core, np.float64)
    outer = np.linalg.svd(core.reshape(len(core), -1), full_matrices=False)[0][:, :10]
    inner = np.linalg.svd(np.moveaxis(core, 2, 0).reshape(core.shape[2], -1), full_matrices=False)[0][:, :8]
    small = np.einsum("asb,ac,bd->csd", core, outer, inner)
    published = np.einsum("oa,asb,bc->osc", term.last @ outer, small, inner.T @ term.first).reshape(whole.shape)
    assert np.linalg.norm(found - whole) <= np.linalg.norm(published - whole) * (1 + 1e-6)


class Killed(Exception):
    pass


def test_a_killed_run_resumes_and_ends_with_the_same_network(digits, tmp_path):
    model, x, y, _, _ = digits
    trained = []

    def train(result, step):
        trained.append(step)
        return ua.finetune(result, x[:256], y[:256], RECIPE).model

    arguments = {"rank_rule": Rate(params=2.0), "layers_per_step": 2, "keep": ["conv1"], "train": train, **FAST}
    whole = ua.musco(model, x[:200], **arguments)

    def dies(result, step):
        if step == 2:
            raise Killed
        return train(result, step)

    with pytest.raises(Killed):
        ua.musco(model, x[:200], work_dir=tmp_path, **{**arguments, "train": dies})
    trained.clear()
    again = ua.musco(model, x[:200], work_dir=tmp_path, **arguments)
    assert trained == [2]
    for a, b in zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (whole, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.report.params == whole.report.params
    with pytest.raises(ValueError, match="belongs to another run"):
        ua.musco(model, x[:200], work_dir=tmp_path, **{**arguments, "stages": 2})
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        ua.musco(model, x[:200], work_dir=tmp_path, **arguments)


def test_a_network_that_is_factored_already_is_factored_anew(digits, tmp_path):
    model, x, _, _, _ = digits
    arguments: dict[str, Any] = {"keep": ["conv1", "fc"], **FAST}
    first = ua.musco(model, x[:200], rank_rule=Rate(params=2.0), **arguments)
    again = ua.musco(first.model, x[:200], rank_rule=Rate(params=2.0), work_dir=tmp_path, **arguments)
    rows = {row.name: row for row in again.report.layers}
    assert again.report.original_params == first.report.params
    for name in ("conv2", "conv3"):
        old, new = (layer_of(result.model, name).terms[0] for result in (first, again))
        assert sum(new.ranks) < sum(old.ranks)
        assert rows[name].status == "compressed"
        assert rows[name].params <= rows[name].original_params / 2
    resumed = ua.musco(first.model, x[:200], rank_rule=Rate(params=2.0), work_dir=tmp_path, **arguments)
    assert resumed.report.params == again.report.params
    with pytest.raises(ValueError, match="belongs to another run"):
        ua.musco(first.model, x[:200], rank_rule=Rate(params=2.0), work_dir=tmp_path, labels=np.zeros(200), **arguments)


@pytest.mark.parametrize("rule", [Rate(params=1.3), Evbmf(weakening=0.5, least=2, noise=1e-3)])
def test_layers_that_lost_channels_are_taken_as_they_are_by_then(rule):
    """Nothing reads some channels of a, so that b and c are narrower after the first step."""

    def make():
        parts = {"a": conv(3, 12), "b": conv(12, 12), "c": conv(12, 12), "d": linear(12 * 64, 3)}
        net = build(lambda: Fn(lambda m, x: m.d(flat(nnx.relu(m.c(nnx.relu(m.b(nnx.relu(m.a(x)))))))), **parts))
        for name in ("b", "c"):
            layer = getattr(net, name)
            layer.kernel[...] = layer.kernel[...].at[:, :, 3:6].set(0)
        return net

    x = np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype(np.float32)
    steps = []
    arguments: dict[str, Any] = {"rank_rule": rule, "data_aware": False, "layers_per_step": 1, "keep": ["d"]}
    result = ua.musco(make(), x, on_step=steps.append, ranks={"c": (12, 12)}, stages=2, **arguments, **FAST)
    assert len(steps) >= 3
    assert evaluate.predict(result.model, x).shape == (40, 3)
    assert all(geometry.c_in in (3, 9) for geometry in (m.geometry for m in factored_layers(result.model).values()))


def test_warnings_of_all_steps_are_in_the_report(digits, monkeypatch):
    model, x, _, _, _ = digits
    solve, texts = compressor.compress_again, iter(["once", "twice", "twice"])

    def warns(*args, **arguments):
        result = solve(*args, **arguments)
        return replace(result, report=replace(result.report, warnings=(next(texts),)))

    monkeypatch.setattr(compressor, "compress_again", warns)
    result = ua.musco(model, x[:200], rank_rule=Rate(params=2.0), layers_per_step=1, keep=["conv1"], **FAST)
    assert result.report.warnings == ("once", "twice")


def test_positions_are_those_that_the_layers_count(digits):
    model, x, _, _, _ = digits
    for form in FACTORED:
        ranks = (6, 5) if form == "tucker2" else (6,)
        rules = [ua.Rule(path="conv2", form=form, ranks=ranks), ua.Rule(path=".*", keep=True)]
        options = LayerOptions(gauge=False, data_aware=False)
        result = ua.compress(model, x[:40], rules=rules, options=options, **FAST)
        layer = layer_of(result.model, "conv2")
        spatial = (8, 8)
        positions = factor_positions(form, layer.geometry, spatial)
        assert layer.factored_macs(spatial) == size_of(form, layer.geometry.matrix_shape, ranks, positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_rule": None}, "rank_rule: None"),
        ({"decomposition": "wavelet"}, "decomposition: 'wavelet'"),
        ({"layers_per_step": 0}, "layers_per_step: 0"),
        ({"stages": 0}, "stages: 0"),
        ({"round_to": 0}, "round_to: 0"),
        ({"ranks": {"conv9": (3,)}}, "no layer 'conv9' can be compressed; layers are: conv1"),
        ({"ranks": {"conv2": (3,)}}, r"give \(outputs, inputs\)"),
        ({"ranks": {"fc": (0,)}}, "at least 1"),
        ({"keep": ["nothing"]}, "keep: 'nothing' matches no layer"),
        ({"keep": ["("]}, "not a regular expression"),
        ({"keep": [".*"]}, "no layer to compress"),
        ({"target": ua.Budget(max_drop=1.0)}, "target: max_drop=1"),
        ({"rank_rule": MaxDrop()}, "labels: MaxDrop measures accuracy"),
        ({"rank_rule": MaxDrop(), "labels": np.zeros(3, int)}, "one label for each of 40"),
        ({"rank_rule": Cheapest(alpha=1e-5), "decomposition": "cp3"}, "no formula for cp3"),
    ],
)
def test_bad_input_is_named(digits, change, message):
    with pytest.raises(ValueError, match=message):
        ua.musco(digits[0], digits[1][:40], **{**FAST, **change})


def test_the_function_is_not_hidden_by_its_package():
    assert callable(ua.musco)
    assert multistage.musco is ua.musco
