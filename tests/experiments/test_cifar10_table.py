"""The table's experiment, on a few images and one block."""

import json

import cifar10_table
import pytest
from cifar10_targets import checks_of


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"network": "resnet20", "macs_ratio": 1.6, "accuracy": 91.6}, {"accuracy": (91.5, True)}),
        ({"network": "resnet20", "macs_ratio": 2.1, "accuracy": 90.9}, {"accuracy": (91.0, False)}),
        ({"network": "resnet20", "macs_ratio": 2.1, "accuracy": 90.0, "form": "columns"}, {}),
        ({"network": "resnet20", "macs_ratio": 2.1, "accuracy": 90.0, "finetune_epochs": 1}, {}),
        (
            {"network": "vgg16", "macs_ratio": 4.0, "speedup": 3.0, "cr": 5.0, "drop": 0.3},
            {"drop": (0.4, True), "speedup": (2.2, True), "speedup/macs_ratio": (0.7, True)},
        ),
    ],
)
def test_a_row_is_held_to_the_hardest_target_that_it_is_small_enough_for(row, expected):
    found = checks_of({"form": "best", "allocation": "kl", "finetune_epochs": 0, "params_ratio": 1.0, "cr": 1.0, **row})
    assert {figure: (check["target"], check["holds"]) for figure, check in found.items()} == expected


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
