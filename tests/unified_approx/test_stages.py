"""Compression in stages on the digits: budgets count from the original, the result is a network like any other."""

import numpy as np
import pytest

import unified_approx as ua
from unified_approx import evaluate
from unified_approx.cost import network_cost
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.narrow import as_dense
from unified_approx.stages import compress_again

FAST = {"form": "columns", "allocation": "uniform", "rows": 1024, "progress": lambda e: None}
RECIPE = ua.Recipe(epochs=1, batch_size=64, augment=None, learning_rate=0.01)
BUDGETS = (ua.Budget(params=0.4), ua.Budget(params=0.1))


@pytest.fixture(scope="module")
def staged(digits):
    model, x, y, _, _ = digits
    seen = []

    def train(result, stage):
        seen.append((stage, result))
        return ua.finetune(result, x, y, RECIPE, original=model).model

    return ua.compress_in_stages(model, x[:200], BUDGETS, train, **FAST), seen


def test_dense_layers_compute_what_the_factored_ones_do(digits, staged):
    result, test = staged[0], digits[3]
    dense = as_dense(result.model)
    assert not factored_layers(dense)
    np.testing.assert_allclose(evaluate.predict(dense, test), evaluate.predict(result.model, test), atol=1e-3)


def test_every_stage_is_smaller_and_the_report_counts_from_the_original(digits, staged):
    model, x, _, test, labels = digits
    result, seen = staged
    original = network_cost(model, x[:2])
    sizes = [network_cost(each.model, x[:2]) for _, each in seen]
    assert [stage for stage, _ in seen] == [0, 1]
    for budget, size in zip(BUDGETS, sizes, strict=True):
        assert size.params + size.index_bits / 32 <= budget.params * original.params
    assert result.report.original_params == original.params
    assert result.report.params == network_cost(result.model, x[:2]).params
    assert {row.name: row.original_params for row in result.report.layers} == {
        row.name: row.original_params for row in seen[0][1].report.layers
    }
    assert evaluate.accuracy(result.model, test, labels) > evaluate.accuracy(seen[1][1].model, test, labels)


def test_a_layer_that_a_stage_leaves_keeps_its_factors_and_the_report_counts_them(digits):
    model, x = digits[0], digits[1][:200]
    low = ua.compress(model, x, budget=ua.Budget(params=0.3), **{**FAST, "form": "low_rank"}).model
    only = [ua.Rule(path="conv3", form="columns", budget=ua.Budget(params=0.7), group="channel")]
    again = compress_again(low, x, rules=[*only, ua.Rule(path=".*", keep=True)], **FAST)
    assert [term.kind for term in again.model.conv2.terms] == ["low_rank"]
    assert again.model.conv2.geometry.c_out < low.conv2.geometry.c_out  # conv3 reads few of its channels
    cost = network_cost(again.model, x[:2])
    assert (again.report.params, again.report.macs) == (cost.params, cost.macs)
    rows = {row.name: row for row in again.report.layers}
    assert rows["conv2"].params < rows["conv2"].original_params / 2
    assert again.model.conv2.replaces.c_out == model.conv2.out_features


def test_saved_and_loaded(digits, staged, tmp_path):
    result, test = staged[0], digits[3]
    result.save(tmp_path / "n.safetensors")
    loaded = ua.load(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(evaluate.predict(loaded, test), evaluate.predict(result.model, test))
    assert all(isinstance(layer, Factored) for layer in factored_layers(loaded).values())


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "budgets: empty"),
        ([ua.Budget(params=0.4), ua.Budget(params=0.4)], "params=0.4 is not tighter than params=0.4"),
        ([ua.Budget(params=0.4), ua.Budget(macs=0.2)], "in the same limits"),
        ([ua.Budget(max_drop=1.0)], "stages take params"),
    ],
)
def test_bad_budgets(digits, budgets, message):
    with pytest.raises(ValueError, match=message):
        ua.compress_in_stages(digits[0], digits[1], budgets, lambda result, stage: result.model)


def test_a_table_cannot_serve_several_stages(digits):
    table = ua.sensitivity(digits[0], digits[1][:50], rows=256, progress=lambda e: None)
    with pytest.raises(ValueError, match="sensitivity: every stage measures its own network"):
        ua.compress_in_stages(digits[0], digits[1], BUDGETS, lambda result, stage: result.model, sensitivity=table)
