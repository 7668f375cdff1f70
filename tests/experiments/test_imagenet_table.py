"""The table at ImageNet size, on a narrow network and few small images."""

import json

import imagenet_table
import pytest
import typer


def test_a_row_without_imagenet_says_what_is_missing(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_table, "in_own_process", imagenet_table.one_network)
    out = tmp_path / "table.json"
    imagenet_table.main(network=["alexnet"], quick=True, data=data_dir, work_dir=tmp_path / "work", json_file=out)
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert found["quick"]
    assert [row[name] for name in imagenet_table.NOT_MEASURED] == [None] * 4
    assert row["not_measured"] == list(imagenet_table.NOT_MEASURED)
    assert row["filled_by"].startswith("python experiments/imagenet_table.py --network alexnet --budget macs=0.85")
    assert row["macs_ratio"] >= 1 / 0.85
    assert row["speedup"] > 0
    layers = {layer["name"]: layer for layer in row["layers"]}
    assert len(layers) == 8
    assert any(layer["status"] == "compressed" and layer["original_ms"] > 0 for layer in layers.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": "here"}, "--images and --weights go together"),
        ({"network": ["alexnet", "resnet20"]}, "'resnet20' is unknown"),
    ],
)
def test_what_cannot_be_run_is_refused(wrong, message):
    with pytest.raises(typer.BadParameter, match=message):
        imagenet_table.main(**wrong)
