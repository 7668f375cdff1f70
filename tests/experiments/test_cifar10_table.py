"""The table's experiment, on a few images and one block."""

import json

import cifar10_table


def test_a_row_says_what_was_done(data_dir, models_dir, tmp_path):
    out = tmp_path / "row.json"
    cifar10_table.main(
        network="resnet20", budget="macs=0.99", allocation="uniform", form="columns", calibration=64, quick=True,
        keep=["conv1", "fc", "blocks/[1-8]/.*"], epochs=1, batch_norms=False, data=data_dir, models=models_dir,
        work_dir=tmp_path / "work", json_file=out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    row = found["rows"][0]
    assert found["quick"]
    assert row["finetune_epochs"] == 1
    assert row["labels"]
    assert row["drop"] == max(row["reference_accuracy"], row["reference_finetuned_accuracy"]) - row["accuracy"]
    assert "--epochs 1" in found["command"]
    assert row["macs_ratio"] > 1.0
    assert row["accuracy"] > 70
