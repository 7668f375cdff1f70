"""The trainer learns, and writes what the zoo reads."""

import json

import train_reference

from unified_approx import datasets, evaluate, zoo


def test_learns_and_writes_weights_that_the_zoo_reads(data_dir, tmp_path):
    out, found = tmp_path / "w.safetensors", tmp_path / "r.json"
    train_reference.main(
        network="lenet300", out=out, epochs=2, count=2000, learning_rate=0.05, data=data_dir,
        work_dir=tmp_path / "work", json_file=found,
    )  # fmt: skip
    images, entry = datasets.load("mnist", data_dir), zoo.entry("lenet300")
    accuracy = evaluate.accuracy(zoo.load("lenet300", out), entry.preprocess(images.x_test, images), images.y_test)
    assert accuracy == json.loads(found.read_text())["rows"][0]["accuracy"]
    assert accuracy > 80
