"""The experiments of Deep Compression and its files, in their short forms."""

import json

import bench_vbmf
import deep_compression
import fuzz_packed
import numpy as np
import pytest
from typer.testing import CliRunner

from solvers.vbmf import evbmf


def test_the_pipeline_makes_smaller_and_smaller_files_and_resumes(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"data": data_dir, "network": ["lenet300"], "quick": True, "json_file": tmp_path / "rows.json"}
    deep_compression.main(**arguments, work_dir=tmp_path / "work")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    sizes = [rows[name]["file_bytes"] for name in ("reference", "pruned_published", "shared_published")]
    assert sizes[0] > 4 * sizes[1] > 4 * 1.5 * sizes[2]
    assert rows["shared_smaller"]["kept"] == rows["pruned_smaller"]["kept"] == pytest.approx(0.0411, abs=1e-3)
    assert all(row["huffman_bytes"] >= 0.99 * row["file_bytes"] for row in rows.values())

    def fail(*_):
        raise AssertionError("a finished stage was made again")

    monkeypatch.setattr(deep_compression.Pipeline, "_measured", fail)
    deep_compression.main(**arguments, work_dir=tmp_path / "work")


def test_fuzzed_files_are_counted(tmp_path):
    fuzz_packed.main(files=90, seed=1, json_file=tmp_path / "fuzz.json")
    found = json.loads((tmp_path / "fuzz.json").read_text())
    row = found["rows"][0]
    assert sum(row.get(f"{kind}: {what}", 0) for kind in fuzz_packed.KINDS for what in ("read", "refused")) == 90
    assert not found["checks"]["files"]["holds"]
    assert found["checks"]["wrong values"]["holds"]
    assert found["checks"]["unclear messages"]["holds"]


def test_another_implementation_is_run_beside_ours(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text('import numpy as np\ndef EVBMF(y):\n    return None, np.eye(2), None, {"sigma2": 0.5}\n')
    matrix = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    assert bench_vbmf.peer_of(peer)(matrix) == (2, 0.5)
    found = bench_vbmf.compared(matrix, 0.5)
    assert found["rank_at_peer_noise"] == evbmf(matrix, 0.5).rank
    assert found["free_energy_gain"] >= 0


def test_unknown_networks_are_named():
    import typer

    app = typer.Typer()
    app.command()(deep_compression.main)
    result = CliRunner().invoke(app, ["--network", "vgg16"])
    assert result.exit_code == 2
    assert "'vgg16' is unknown; there are lenet300, lenet5" in " ".join(result.output.replace("│", " ").split())
