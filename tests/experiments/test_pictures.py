"""The notebooks' pictures."""

import io

import numpy as np
from pictures import bars, curves, penalty_maps, show, tiles
from PIL import Image


def test_penalty_maps_show_every_panel_smaller_than_the_file(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    labels = {"row_label": "λ₁", "column_label": "λ₂"}
    one = penalty_maps(tmp_path / "one.png", {"a": values}, [0.1, 0.2], [1, 2, 4], **labels)
    two = penalty_maps(tmp_path / "two.png", {"a": values, "b": -values}, [0.1, 0.2], [1, 2, 4], marks=(2,), **labels)
    with Image.open(one) as narrow, Image.open(two) as wide:
        assert wide.width == 2 * narrow.width
    shown = show(two, width=300)
    assert len(shown.data) < two.stat().st_size
    with Image.open(io.BytesIO(shown.data)) as small, Image.open(two) as wide:
        assert small.size == wide.size
        gap = np.asarray(small.convert("RGB")).astype(int) - np.asarray(wide.convert("RGB"))
        assert np.abs(gap).mean() < 2


def test_the_mark_lies_where_its_value_is_on_a_logarithmic_scale(tmp_path):
    labels = {"row_label": "", "column_label": ""}
    file = penalty_maps(tmp_path / "marked.png", {"": np.zeros((1, 3))}, [1], [1, 10, 100], marks=(10,), **labels)
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = np.argwhere(np.abs(pixels - [0xD5, 0x5E, 0x00]).sum(axis=2) < 30)[:, 1]
    frame = np.flatnonzero((pixels.sum(axis=2) < 60).mean(axis=0) > 0.5)
    assert abs(red.mean() - (frame.min() + frame.max()) / 2) < 3


def _colours(file):
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_have_a_panel_each_and_a_legend_where_a_line_has_a_name(tmp_path):
    lines = {"up": np.array([1.0, 10.0, 100.0])}
    one = curves(tmp_path / "one.png", {"a": lines}, [1, 2, 4], step_label="mu")
    nameless = curves(tmp_path / "none.png", {"a": {"": lines["up"]}}, [1, 2, 4], step_label="mu")
    two = curves(tmp_path / "two.png", {"a": lines, "b": lines}, [1, 2, 4], step_label="mu", logarithmic=["b"])
    assert _colours(two).shape[1] == 2 * _colours(one).shape[1]
    assert (_colours(one) != _colours(nameless)).any()
    half = _colours(one).shape[1]
    assert (_colours(two)[:, :half] != _colours(two)[:, half:]).any()  # the other scale


def test_tiles_share_one_scale_of_colours(tmp_path):
    plus = np.ones((2, 4, 4))
    picture = _colours(tiles(tmp_path / "tiles.png", {"strong": plus, "weak": -plus / 8}))
    darkest_blue, darkest_red = ([5, 48, 97], [103, 0, 31])
    assert (picture == darkest_blue).all(axis=-1).any()
    assert not (picture == darkest_red).all(axis=-1).any()


def test_bars_are_stacked_or_over_each_other(tmp_path):
    columns = {"a": {"low": 1.0, "high": 2.0}, "b": {"low": 3.0}}
    stacked = _colours(bars(tmp_path / "stacked.png", {"one": columns}))
    beside = _colours(bars(tmp_path / "beside.png", {"one": columns, "two": columns}))
    over = _colours(bars(tmp_path / "over.png", {"one": columns}, stacked=False))
    blue, orange = [31, 119, 180], [255, 127, 14]
    assert all((stacked == colour).all(axis=-1).sum() > 1000 for colour in (blue, orange))
    assert beside.shape[1] == 2 * stacked.shape[1]
    assert (over != stacked).any()
