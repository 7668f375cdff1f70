"""Budgets over a whole network: menus, losses, the knapsack, and what comes out."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import unified_approx as ua
from solvers.curves import ErrorCurves, error_curves, fit_columns, fit_rank
from solvers.forms import largest_count
from solvers.gram import gram_statistics, least_squares, linear_error, with_ridge
from solvers.layer import minimum_budget
from solvers.reconstruction import LayerProblem
from solvers.terms import MatrixShape
from unified_approx import datasets, evaluate, latency, zoo
from unified_approx.allocation import Item, LayerMenu, choose, timing
from unified_approx.allocation.assign import total_cost
from unified_approx.allocation.menu import make_items
from unified_approx.allocation.probe import Probe
from unified_approx.allocation.sensitivity import Measured, with_losses
from unified_approx.cost import network_cost
from unified_approx.smallest import Judge, views_of

QUIET = {"progress": lambda event: None}
FAST = {**QUIET, "rows": 1024, "batch_size": 50, "form": "columns"}


@pytest.fixture(scope="module")
def digits():
    entry, data = zoo.entry("digits"), datasets.load("digits")
    x, test = (entry.preprocess(images) for images in (data.x_train[:300], data.x_test))
    return zoo.load("digits"), x, np.asarray(data.y_train[:300]), test, data.y_test


@pytest.fixture(scope="module")
def table(digits):
    return ua.sensitivity(digits[0], digits[1], **{k: v for k, v in FAST.items() if k != "form"})


def statistics(n, p, seed=0):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x = rng.normal(size=(400, p)) @ rng.normal(size=(p, p))
        h = jax.numpy.asarray(x @ rng.normal(size=(n, p)).T)
        problem = LayerProblem(x=jax.numpy.asarray(x), y=h, response=h, bias=jax.numpy.zeros(n))
        stats = with_ridge(gram_statistics(problem), 1e-9)
        return stats, least_squares(stats)


@pytest.mark.parametrize(("n", "p"), [(6, 18), (20, 9)])
def test_curves_are_the_errors_of_the_fits(n, p):
    stats, w = statistics(n, p)
    with jax.enable_x64(True):
        curves = error_curves(stats, w, MatrixShape((3, 3), p // 9, n))
        for k in (0, 1, p // 2, p):
            assert linear_error(stats, fit_columns(stats, curves.order, k)) == pytest.approx(
                curves.columns[k], abs=1e-6
            )
        for r in (0, 1, min(n, p) // 2, min(n, p)):
            assert linear_error(stats, fit_rank(stats, r)) == pytest.approx(curves.low_rank[r], abs=1e-6)


@pytest.mark.parametrize(("n", "p", "members"), [(16, 144, 9), (64, 576, 9), (512, 4608, 9), (10, 64, 1), (6, 18, 1)])
def test_a_solve_gets_as_many_columns_as_the_menu_promised(n, p, members):
    falling = np.linspace(0.99, 0, p + 1)
    curves = ErrorCurves(order=np.arange(p), columns=falling, low_rank=falling[: n + 1], group_size=members)
    shape = MatrixShape((3, 3), p // 9, n) if members == 9 else MatrixShape((), p, n)
    items = make_items(curves, shape, 1, minimum_budget(shape), forms=("columns",))
    for item in items[:-1]:
        fraction = item.values / (n * p)
        assert largest_count(fraction * (n * p), n, p, members) * members == item.size


def test_whole_channels_are_offered_whole():
    stats, w = statistics(6, 18)
    with jax.enable_x64(True):
        order = error_curves(stats, w, MatrixShape((3, 3), 2, 6), "channel").order
    assert len(set(order[:9] % 2)) == 1


def random_menus(count, seed):
    rng = np.random.default_rng(seed)
    menus = []
    for i in range(count):
        values = np.sort(rng.uniform(1, 100, 4))
        losses = np.sort(rng.exponential(size=4))[::-1]
        losses[-1] = 0
        items = tuple(
            Item(form="columns", size=1, values=v, macs=v * (i + 1), error=0.1, loss=x)
            for v, x in zip(values, losses, strict=True)
        )
        menus.append(LayerMenu(name=str(i), shape=(1, 1), positions=i + 1, items=items))
    return menus


@pytest.mark.parametrize("limits", [{"params": 0.5}, {"params": 0.6, "macs": 0.4}, {"macs": 0.7, "bytes": 0.9}])
@pytest.mark.parametrize("seed", range(4))
def test_knapsack_against_all_choices(limits, seed):
    menus = random_menus(5, seed)
    bounds = {name: f * sum(m.items[-1].cost(name) for m in menus) for name, f in limits.items()}
    every = itertools.product(*(m.items for m in menus))
    within = [c for c in every if all(sum(i.cost(name) for i in c) <= bound for name, bound in bounds.items())]
    if not within:
        with pytest.raises(ValueError, match="relax one of them"):
            choose(menus, bounds)
        return
    found = choose(menus, bounds)
    assert all(sum(i.cost(name) for i in found.items) <= bound * (1 + 1e-9) for name, bound in bounds.items())
    assert found.loss == pytest.approx(min(sum(i.loss for i in c) for c in within), rel=1e-3, abs=1e-9)
    assert found.gap <= 1e-3


def test_limits_that_cannot_be_met_together_say_by_how_much():
    def item(values, macs):
        return Item(form="columns", size=1, values=values, macs=macs, error=0.1, loss=0.1)

    menu = LayerMenu(name="a", shape=(1, 10), positions=1, items=(item(1.0, 10.0), item(10.0, 1.0)))
    with pytest.raises(ValueError, match=r"params, macs together.* params times 5\.000, or macs times 5\.000"):
        choose([menu], {"params": 2.0, "macs": 2.0})


@pytest.mark.parametrize("limits", [{"macs": 0.5}, {"params": 0.3, "macs": 0.6}])
def test_the_same_fraction_everywhere_uses_the_budget_up_when_whole_channels_go(digits, limits):
    arguments = {**FAST, "group": "channel", "allocation": "uniform"}
    result = ua.compress(digits[0], digits[1], budget=ua.Budget(**limits), **arguments)
    assert result.budget_met
    before = network_cost(digits[0], digits[1][:2])
    after = network_cost(result.model, digits[1][:2])
    used = {name: total_cost(after, name) / total_cost(before, name) / limits[name] for name in limits}
    assert max(used.values()) > 0.85  # channels that nothing reads went too, and others could stay for that


def test_losses_are_interpolated_and_never_fall_with_the_error():
    items = [Item(form="columns", size=1, values=1.0, macs=1.0, error=e) for e in (0.01, 0.05, 0.1, 0.3, 0.9)]
    items.append(Item(form="dense", size=1, values=9.0, macs=9.0, error=0.0))
    points = [Measured(error=0.02, loss=0.1), Measured(error=0.1, loss=0.4), Measured(error=0.3, loss=0.39)]
    losses = [item.loss for item in with_losses(items, points)]
    assert losses[2] == pytest.approx(0.4)
    assert losses[0] == pytest.approx(0.05)
    assert np.all(np.diff(losses[:5]) >= 0)
    assert losses[5] == 0


def test_probe_measures_the_exchanged_network_and_its_second_order(digits):
    model, x = digits[0], digits[1][:64]
    probe = Probe(model, [x[:32], x[32:]], evaluate.forward)
    assert probe.loss(("conv2",), model.conv2) == pytest.approx(0, abs=1e-6)
    for size, tolerance in ((1e-2, 0.1), (0.5, np.inf)):
        noisy = nnx.clone(model)
        noise = np.random.default_rng(0).normal(size=noisy.conv2.kernel.shape) * size * 0.02
        noisy.conv2.kernel[...] = noisy.conv2.kernel[...] + noise.astype(np.float32)
        expected = evaluate.agreement(evaluate.predict(model, x), evaluate.predict(noisy, x))["kl"]
        assert probe.loss(("conv2",), noisy.conv2) == pytest.approx(expected, rel=1e-2, abs=1e-7)
        assert probe.fisher(("conv2",), noisy.conv2) == pytest.approx(expected, rel=tolerance, abs=1e-6)


def test_table_covers_every_layer_and_survives_a_file(table, tmp_path):
    assert [menu.name for menu in table.menus] == ["conv1", "conv2", "conv3", "fc"]
    for menu, measured in zip(table.menus, table.measured, strict=True):
        assert menu.items[-1].form == "dense"
        assert menu.items[-1].loss == 0
        assert np.all(np.diff([item.values for item in menu.items]) > 0)
        assert measured[-1].loss > measured[0].loss
    table.save(tmp_path / "table.json")
    assert ua.Sensitivity.load(tmp_path / "table.json") == table


def planned_share(planned, table, name):
    """What the layers are asked for, before channels that nothing reads go too, as a share of the original."""
    positions = {menu.name: menu.positions if name == "macs" else 1 for menu in table.menus}
    asked = {row["name"]: row["values"] for row in planned.layers}
    sizes = {menu.name: float(np.prod(menu.shape)) for menu in table.menus}
    total = sum(size * positions[layer] for layer, size in sizes.items())
    return sum(asked.get(layer, size) * positions[layer] for layer, size in sizes.items()) / total


@pytest.mark.parametrize("limits", [{"params": 0.3}, {"macs": 0.3}, {"params": 0.5, "macs": 0.25}, {"bytes": 0.4}])
def test_budgets_are_met_over_the_whole_network(digits, table, limits):
    model, x, _, test, labels = digits
    result = ua.compress(model, x, budget=ua.Budget(**limits), sensitivity=table, **FAST)
    report = result.report
    assert result.budget_met
    reached = {"params": 1 / report.params_ratio, "macs": 1 / report.macs_ratio, "bytes": 1 / report.cr}
    for name, limit in limits.items():
        assert reached[name] <= limit
    planned = ua.plan(model, x, budget=ua.Budget(**limits), sensitivity=table, rows=1024, batch_size=50)
    open_costs = {name: planned_share(planned, table, name) for name in limits}
    assert any(open_costs[name] > 0.85 * limit for name, limit in limits.items())
    assert evaluate.accuracy(result.model, test, labels) > 90


def test_single_columns_in_some_layers_and_whole_channels_in_others(digits):
    model, x, *_ = digits
    rules = [ua.Rule(path="conv2", group="column")]
    result = ua.compress(model, x, budget=ua.Budget(macs=0.4), group="channel", rules=rules, **QUIET, rows=1024)
    assert 0.3 < 1 / result.report.macs_ratio <= 0.4


def test_allocation_beats_the_same_fraction_everywhere(digits, table):
    model, x, _, test, _ = digits
    reference, agreements = evaluate.predict(model, test), {}
    for allocation in ("kl", "uniform"):
        budget = ua.Budget(macs=0.15)
        more = {"sensitivity": table} if allocation == "kl" else {}
        result = ua.compress(model, x, budget=budget, allocation=allocation, **more, **FAST)
        assert result.report.macs_ratio >= 1 / 0.15
        agreements[allocation] = evaluate.agreement(reference, evaluate.predict(result.model, test))["kl"]
    assert agreements["kl"] < 0.7 * agreements["uniform"]


def test_plan_shows_the_allocation(digits, table):
    planned = ua.plan(digits[0], digits[1], budget=ua.Budget(params=0.3), sensitivity=table, rows=1024, batch_size=50)
    assert planned.sensitivity is table
    shares = [row["values"] / np.prod(row["shape"]) for row in planned.layers]
    assert max(shares) > 1.5 * min(shares)


def test_a_loose_budget_leaves_layers_dense_with_the_reason(digits, table):
    result = ua.compress(digits[0], digits[1], budget=ua.Budget(params=0.98), sensitivity=table, **FAST)
    kept = [row for row in result.report.layers if row.status == "kept"]
    assert kept
    assert all("dense pays best" in row.reason for row in kept)


def test_smallest_network_that_keeps_the_accuracy(digits):
    model, x, y, _, _ = digits
    arguments = {"labels": y, "held_out": 0.3, "allocation": "uniform", **FAST}
    result = ua.compress(model, x, budget=ua.Budget(max_drop=5.0), **arguments)
    by_labels = Judge.of(model, x[-90:], y[-90:], evaluate.forward, 0)
    assert by_labels(result.model) == result.report.drop <= 5.0
    by_answers = Judge.of(model, x[-90:], None, evaluate.forward, 0)
    assert by_labels(result.model) <= by_answers(result.model) < 20
    assert by_answers(model) == 0
    assert result.report.budget == "max_drop=5"
    assert result.report.params_ratio > 3


def test_without_labels_the_original_is_what_counts(digits):
    model, x, y, _, _ = digits
    arguments = {"held_out": 0.3, "allocation": "uniform", "budget": ua.Budget(max_drop=20.0), **FAST}
    result = ua.compress(model, x, **arguments)
    assert 0 < result.report.drop <= 20
    assert evaluate.accuracy(result.model, x[-90:], y[-90:]) > 80


def test_images_are_judged_in_shifted_copies():
    rng = np.random.default_rng(0)
    images, vectors = rng.random((5, 16, 8, 2), np.float32), rng.random((5, 16))
    copies = views_of(images, 0)
    assert copies.shape == (20, 16, 8, 2)
    middle = (slice(4, -4), slice(2, -2))  # nothing is shifted by more than 2 rows and 1 column
    for copy, image in zip(copies, np.tile(images, (4, 1, 1, 1)), strict=True):
        patches = [image[i:, j:][:8, :4] for i in range(2, 7) for j in range(1, 4)]
        assert any(np.array_equal(copy[middle], patch) for patch in patches)
    assert views_of(vectors, 0) is vectors


def test_search_for_the_smallest_resumes_and_lets_other_errors_through(digits, tmp_path):
    model, x, y, _, _ = digits
    arguments = {"labels": y, "held_out": 0.3, "allocation": "uniform", "budget": ua.Budget(max_drop=100.0), **FAST}
    result = ua.compress(model, x, work_dir=tmp_path, **arguments)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("layer-*")}
    again = ua.compress(model, x, work_dir=tmp_path, **arguments)
    assert again.report.params == result.report.params < 0.05 * again.report.original_params
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("layer-*")} == files
    with pytest.raises(ValueError, match="give a budget or the two penalties"):
        ua.compress(model, x, lambda_sparse=0.1, lambda_rank=0.1, **arguments)


def test_the_least_that_is_named_can_be_had(digits, table):
    model, x, *_ = digits
    options = {k: v for k, v in FAST.items() if k not in ("form", "progress")} | {"sensitivity": table}
    with pytest.raises(ValueError, match="below the smallest") as refused:
        ua.plan(model, x, budget=ua.Budget(params=0.004), **options)
    least = float(str(refused.value).split("reached, params=")[1].split(";")[0])
    assert 0.004 < least < 0.05
    plan = ua.plan(model, x, budget=ua.Budget(params=1.02 * least), **options)
    assert len(plan.layers) == 4
    assert 0 <= plan.gap <= 1e-3
    assert all(layer["expected_loss"] > 0 and layer["forms"] for layer in plan.layers)


def test_whole_channels_reach_less_than_the_layers_one_by_one(digits):
    """A layer of one channel leaves its producer one row: budgets that no layer alone could pay for are met."""
    model, x, *_ = digits
    share = 9 * (32 * 1 + 64 * 1 + 64 * 1) / network_cost(model, x[:2]).params  # of one channel for each convolution
    result = ua.compress(model, x, budget=ua.Budget(params=0.5 * share), group="channel", **FAST)
    assert result.budget_met


def test_ranks_among_whole_channels(digits):
    arguments = {"form": "low_rank", "group": "channel", "rows": 1024, "batch_size": 50}
    plan = ua.plan(digits[0], digits[1], budget=ua.Budget(params=0.5), **arguments)
    assert plan.sensitivity is not None
    assert {item.form for menu in plan.sensitivity.menus for item in menu.items} == {"low_rank", "dense"}
    assert plan.layers


def test_rules_with_ranks_beside_a_budget_of_macs(digits):
    rule = ua.Rule(path="conv2", form="tucker2", ranks=(8, 8))
    plan = ua.plan(digits[0], digits[1], budget=ua.Budget(macs=0.5), rules=[rule], allocation="uniform")
    assert "conv2" in [layer["name"] for layer in plan.layers]


def test_a_table_without_a_layer_that_is_asked_for(digits):
    model, x, *_ = digits
    fast = {"rows": 1024, "batch_size": 50}
    table = ua.sensitivity(model, x, rules=[ua.Rule(path="conv1|fc", keep=True)], **QUIET, **fast)
    with pytest.raises(ValueError, match="no sizes of layer '(conv1|fc)'"):
        ua.plan(model, x, budget=ua.Budget(params=0.5), sensitivity=table, **fast)


def test_second_order_allocation_from_end_to_end(digits):
    model, x, _, test, labels = digits
    result = ua.compress(model, x, budget=ua.Budget(params=0.4), allocation="fisher", **FAST)
    assert result.budget_met
    assert result.sensitivity.method == "fisher"
    assert evaluate.accuracy(result.model, test, labels) > 90


BAD = [
    ({"budget": ua.Budget(params=0.005)}, "below the smallest that can be reached, params=0.0"),
    ({"budget": ua.Budget(params=0.1), "rules": [ua.Rule(path="conv3", keep=True)]}, "already take 0.5"),
    ({"budget": ua.Budget(max_drop=1.0), "labels": np.zeros(3, int)}, "labels: shape (3,); give one integer label"),
    ({"allocation": "magic"}, "allocation: 'magic' is unknown"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_budgets(digits, table, change, message):
    arguments = {"budget": ua.Budget(params=0.5), "sensitivity": table, **change}
    if "rules" in change:
        arguments.pop("sensitivity")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ua.compress(digits[0], digits[1], **arguments, **FAST)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({}, "limits nothing"), ({"params": 0.5, "max_drop": 1.0}, "contradicts itself"), ({"macs": 2.0}, "macs=2.0")],
)
def test_contradictory_budgets(limits, message):
    with pytest.raises(ValueError, match=message):
        ua.Budget(**limits)


def test_a_table_of_another_network(digits, table):
    other = replace(table, identity="another")
    with pytest.raises(ValueError, match="of another network"):
        ua.compress(digits[0], digits[1], budget=ua.Budget(params=0.5), sensitivity=other, **FAST)


def test_a_damaged_table(tmp_path):
    (tmp_path / "t.json").write_text('{"version": 1, "menus": 3}')
    with pytest.raises(ValueError, match="no sensitivity table"):
        ua.Sensitivity.load(tmp_path / "t.json")


def seconds_by_size(candidates, *inputs, call=None, rounds=20):
    """A clock that knows no noise: a microsecond for every weight, and 10 for every module that holds some."""

    def seconds(module):
        leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
        return 1e-6 * sum(10 + leaf.size for leaf in leaves)

    return {name: seconds(module) for name, module in candidates.items()}


def test_a_budget_of_seconds_uses_what_was_timed(digits, tmp_path, monkeypatch):
    """Forms and sizes come from timings of the layers; the answer to whether it was met from the whole network."""
    model, x, _, test, labels = digits
    for module in (latency, timing):
        monkeypatch.setattr(module, "measure_latency", seconds_by_size)
    table = ua.sensitivity(model, x, timed=True, **{k: v for k, v in FAST.items() if k != "form"})
    assert table.clock is not None
    assert table.clock.original > 0
    for menu in table.menus:
        dense = menu.items[-1].seconds
        assert dense == table.clock.layers[menu.name]
        assert all(0 < item.seconds <= dense for item in menu.items)
    table.save(tmp_path / "timed.json")
    assert ua.Sensitivity.load(tmp_path / "timed.json") == table
    faster = {menu.name: min(item.seconds for item in menu.items) for menu in table.menus}
    least = 1 - sum(table.clock.layers[name] - seconds for name, seconds in faster.items()) / table.clock.original
    budget = ua.Budget(latency=min(1.0, (1 + max(least, 0)) / 2))
    result = ua.compress(model, x, budget=budget, sensitivity=table, **{k: v for k, v in FAST.items() if k != "form"})
    assert result.budget_met
    found = seconds_by_size({"before": model, "after": result.model})
    assert 0.8 * budget.latency < found["after"] / found["before"] <= budget.latency
    assert {row.form for row in result.report.layers if row.status == "compressed"} <= {"columns", "low_rank"}
    assert evaluate.accuracy(result.model, test, labels) > 80
    with pytest.raises(ValueError, match="timed where this run is not"):
        ua.compress(model, x, budget=ua.Budget(params=0.5), sensitivity=table, **FAST)
    with pytest.raises(ValueError, match="knows no seconds"):
        ua.compress(model, x, budget=budget, allocation="uniform", **FAST)
