"""What the experiments that compare methods conclude from their rows, and what they draw."""

import deep_curves
import musco
import numpy as np
import pytest


def staged(network, once, staged, macs=2.5):
    fields = {"part": "stages", "network": network}
    first = {**fields, "name": "one shot", "accuracy": once, "macs_ratio": 2.5}
    return [first, {**fields, "name": "2 stages", "accuracy": staged, "macs_ratio": macs}]


def fitted(decomposition, *accuracies):
    return [
        {"part": "fits", "decomposition": decomposition, "fit": fit, "accuracy": accuracy}
        for fit, accuracy in zip(musco.FITS, accuracies, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], {}),
        (staged("vgg16", 90.0, 90.5)[:1], {}),
        (
            staged("resnet20", 90.0, 90.5, 2.52),
            {
                "resnet20: points that stages gain": (pytest.approx(0.5), True),
                "resnet20: multiply-adds apart": (pytest.approx(0.008), True),
            },
        ),
        (
            staged("vgg16", 90.0, 89.0, 2.3),
            {
                "vgg16: points that stages gain": (pytest.approx(-1.0), False),
                "vgg16: multiply-adds apart": (pytest.approx(0.08), False),
            },
        ),
        (fitted("cp3", 50.0, 80.0, 81.0), {"cp3: points that the data gain": (pytest.approx(31.0), True)}),
    ],
)
def test_checks_of_musco(rows, expected):
    assert {name: (found["value"], found["holds"]) for name, found in musco.checks_of(rows).items()} == expected


def test_every_part_with_rows_is_drawn(tmp_path):
    edges = np.linspace(-0.3, 0.3, 4).tolist()
    rows = [
        {"part": "histograms", "network": network, "name": stage, "edges": edges, "counts": [1, 2, 3]}
        for network in ("lenet300", "lenet5")
        for stage in ("reference", "pruned_published", "shared_published")
    ]
    rows += [{"part": "sparsity", "name": "pruned", "kept": kept, "error": 2 / kept} for kept in (0.5, 0.1)]
    drawn = deep_curves.draw(rows, tmp_path)
    assert [path.name for path in drawn] == ["deep_histograms.png", "deep_sparsity.png"]
    assert all(path.stat().st_size > 2000 for path in drawn)
