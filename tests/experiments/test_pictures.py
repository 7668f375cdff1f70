"""The notebooks' pictures."""

import io

import numpy as np
from pictures import penalty_maps, show
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
