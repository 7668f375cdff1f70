"""Rows split over devices: the same results, and programs that never bring the rows together."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from problems import make_problem

from solvers.gram import gram_statistics
from solvers.reconstruction import sum_over_chunks
from solvers.sharding import gathered, put_rows, row_mesh, shard, take_every


@pytest.fixture(scope="module")
def found():
    """What four_devices.py saw."""
    script = Path(__file__).with_name("four_devices.py")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows_are_split_evenly_and_the_remainder_left_out(found):
    assert found["devices"] == 4
    assert found["rows"] == [20_000, [5000] * 4]
    assert found["taken"] == [5000, True]


def test_no_program_brings_the_rows_together(found):
    for name, counts in found["programs"].items():
        assert counts["all-reduce"] > 0, name
        assert counts["all-gather"] == counts["all-to-all"] == counts["collective-permute"] == 0, name
        assert counts["whole"] == 0, name
    assert found["take every"]["all-gather"] == found["take every"]["whole"] == 0


def test_every_pass_gives_what_one_device_gives(found):
    assert set(found["distances"]) >= {"gram", "refine", "admm, mm", "admm, sgd", "admm, exact", "admm, cholesky"}
    for name, distance in found["distances"].items():
        assert distance < 1e-4, name


def test_the_front_door_gives_what_one_device_gives(found):
    assert set(found["front door"]["budget"]["winners"]) <= {"columns", "admm"}
    for name, fits in found["front door"].items():
        assert fits["winners"][0] == fits["winners"][1], name
        assert fits["kept"][0] == fits["kept"][1], name
        assert fits["errors"] < 1e-4, name
        assert fits["matrix"] < 1e-3, name


@pytest.mark.parametrize("d", [10, 300])  # less than a chunk; chunks and a remainder
def test_a_mesh_of_one_sums_the_same(d):
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(d, 3)))
    scale = jax.numpy.arange(3.0)

    def sums(mesh):
        return jax.jit(lambda x: sum_over_chunks(lambda r, _: r.sum(axis=0) * scale, (x, None), 64, mesh=mesh))(x)

    np.testing.assert_allclose(sums(row_mesh(1)), sums(None), rtol=1e-12)
    np.testing.assert_allclose(sums(None), (np.asarray(x) * np.arange(3)).sum(axis=0), rtol=1e-12)


def test_split_problems_keep_what_they_have():
    problem = make_problem(400, offset=True, weights=True)
    split = shard(problem, row_mesh([jax.devices()[0]]))
    assert split.mesh is not None
    for ours, theirs in zip(jax.tree.leaves(replace(split, mesh=None)), jax.tree.leaves(problem), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    stats = gram_statistics(problem)
    assert gathered(stats).gram is stats.gram
    for rows in (problem, split):
        np.testing.assert_array_equal(take_every(rows, 3, 100).offset, problem.offset[:300:3])


def test_few_rows_stay_whole():
    problem = make_problem(100)
    assert shard(problem, row_mesh(1)) is problem
    assert put_rows(np.ones((5, 2)), None).shape == (5, 2)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices: 0; give at least 1"),
        (-2, "devices: -2; give at least 1"),
        (1000, r"1000 were asked for, but JAX has \d+ .*xla_force_host_platform_device_count=1000"),
        (True, "devices: True; give how many"),
        ([], r"devices: \[\]; give at least one"),
        ([jax.devices()[0]] * 2, "none of them twice"),
    ],
)
def test_devices_that_cannot_be_had(devices, message):
    with pytest.raises(ValueError, match=message):
        row_mesh(devices)
