"""`compress` with the rows of its layers split over four devices, in a process that has so many."""

import json
import os
import subprocess
import sys

import pytest

import unified_approx as ua
from unified_approx import run, zoo
from unified_approx.settings import make_arguments

FOUR = """
import json
import jax, numpy as np
import unified_approx as ua
from unified_approx import datasets, run, zoo
from solvers import layer
meshes = []
def solve(problem, held_out, *args, **kwargs):
    meshes.append([None if p.mesh is None else p.mesh.size for p in (problem, held_out)])
    assert [len(a.sharding.device_set) for a in (problem.x, held_out.x)] == [m or 1 for m in meshes[-1]]
    return layer.solve(problem, held_out, *args, **kwargs)
run.solve = solve
images = zoo.entry("digits").preprocess(datasets.load("digits").x_train[:300])
half = ua.Rule(path="conv1|conv2", budget=ua.Budget(params=0.5))
common = dict(form="columns", rows=2048, batch_size=100, allocation="uniform",
              rules=[half, ua.Rule(path=".*", keep=True)], progress=lambda e: None)
results = [ua.compress(zoo.load("digits"), images, devices=given, **common) for given in (None, 4, jax.devices()[1:3])]
gaps = [float(np.linalg.norm(r.matrices[k] - m) / np.linalg.norm(m)) for k, m in results[0].matrices.items()
        for r in results[1:]]
print(json.dumps({"gaps": gaps, "meshes": meshes}))
"""


def test_four_devices_give_the_network_of_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", FOUR], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["meshes"] == [[None, None]] * 2 + [[4, 4]] * 2 + [[2, 2]] * 2
    assert len(found["gaps"]) == 4
    assert max(found["gaps"]) < 0.01


@pytest.mark.parametrize("devices", [0, 99, []])
def test_devices_that_cannot_be_had_are_found_before_any_work(monkeypatch, tmp_path, devices):
    monkeypatch.setattr(run, "Streams", None)
    arguments = {"budget": ua.Budget(params=0.5), "devices": devices, "work_dir": tmp_path / "work"}
    with pytest.raises(ValueError, match="devices"):
        ua.compress(zoo.load("digits"), [], **arguments)
    assert not (tmp_path / "work").exists()


def test_one_device_is_the_plain_path_and_no_part_of_the_identity():
    plain, one = (make_arguments(budget=ua.Budget(params=0.5), devices=devices) for devices in (None, 1))
    assert plain.mesh is one.mesh is None
    assert plain.identity() == one.identity()
