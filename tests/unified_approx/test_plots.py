from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import unified_approx as ua
from unified_approx import plots
from unified_approx.allocation import Item, LayerMenu

RNG = np.random.default_rng(0)


def drawn(path: Path, colours: int = 20) -> np.ndarray:
    """The picture's pixels, after checking that there is one."""
    pixels = imread(path)
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 600
    assert len(np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > colours
    return pixels[..., :3]


def table(count):
    items = [Item(form="columns", size=k, values=3.0 * k, macs=1.0, error=1 / k, loss=1 / k) for k in range(1, 9)]
    items.append(Item(form="dense", size=9, values=27.0, macs=1.0, error=0.0))
    menus = tuple(LayerMenu(name=f"conv{i}", shape=(3, 9), positions=1, items=tuple(items)) for i in range(count))
    return ua.Sensitivity(identity="", method="kl", menus=menus, measured=((),) * count, seconds=1.0)


@pytest.mark.parametrize("count", [3, 40])
def test_sensitivity_shows_every_layer(tmp_path, count):
    path = table(count).plot(tmp_path / "new" / "s.png")
    assert path == tmp_path / "new" / "s.png"
    drawn(path)


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels - rgb).max(axis=-1) < 0.02).any())


@pytest.fixture(scope="module")
def parts():
    w = RNG.standard_normal((12, 40))
    a = w * (RNG.uniform(size=40) < 0.25)
    u, s, v = np.linalg.svd(w - a)
    return w, a, u[:, :3] * s[:3] @ v[:3]


def test_approximation_example_shows_the_four_matrices(tmp_path, parts):
    w, a, b = parts
    path = plots.approximation_example(tmp_path / "new" / "example.png", w, a, b, layer="conv", note="0.1")
    assert path == tmp_path / "new" / "example.png"
    whole = drawn(path)
    without = drawn(plots.approximation_example(tmp_path / "zero.png", w, np.zeros_like(a), np.zeros_like(b)))
    quarter = slice(whole.shape[0] // 4, whole.shape[0])  # below the original
    assert np.abs(whole[quarter] - 1).sum() > 1.2 * np.abs(without[quarter] - 1).sum()


def test_approximation_example_of_a_zero_matrix(tmp_path):
    zero = np.zeros((4, 6))
    drawn(plots.approximation_example(tmp_path / "zero.png", zero, zero, zero))


def test_convergence_draws_every_trace_and_skips_what_was_not_judged(tmp_path):
    steps = np.arange(1, 31)
    objective = np.where(steps % 5 == 0, 1 / steps, np.nan)
    traces = [plots.Trace(name, jnp.asarray(objective), 1.0 / steps**2, 2.0 / steps) for name in ("mm", "sgd")]
    one = drawn(plots.convergence(tmp_path / "one.png", traces[:1]))
    both = drawn(plots.convergence(tmp_path / "both.png", traces, title="two"))
    assert has_colour(one, plots.BLUE)
    assert not has_colour(one, plots.VERMILLION)
    assert has_colour(both, plots.VERMILLION)


def test_singular_values_and_columns(tmp_path, parts):
    w, a, b = parts
    values = drawn(plots.singular_values(tmp_path / "values.png", w, b, layer="conv"))
    assert has_colour(values, plots.VERMILLION)
    none = drawn(plots.singular_values(tmp_path / "none.png", w, np.zeros_like(b)))
    assert (values != none).any()
    kept = np.any(a != 0, axis=0)
    columns = drawn(plots.column_norms(tmp_path / "columns.png", w, jnp.asarray(kept), layer="conv"), colours=5)
    assert has_colour(columns, plots.BLUE)
    assert (plots.column_norms(tmp_path / "empty.png", w, np.zeros(40, bool))).stat().st_size > 5000


def test_accuracy_against_params(tmp_path):
    curves = [plots.Curve("best", [3e4, 1e4], [99.0, 95.0]), plots.Curve("paper", [2e4, 1e4], [97.0, 91.0])]
    pixels = drawn(plots.accuracy_against_params(tmp_path / "a.png", curves, original=(6e4, 99.8), title="digits"))
    assert has_colour(pixels, plots.BLUE)
    assert has_colour(pixels, plots.VERMILLION)


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_other_formats(tmp_path, parts, suffix):
    path = plots.singular_values(tmp_path / f"values.{suffix}", parts[0], parts[2])
    assert path.read_bytes()[:5] in (b"%PDF-", b"<?xml")
