import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from solvers.terms import Columns, LowRank, Spatial
from unified_approx import description, storage, zoo
from unified_approx.assemble import Identity
from unified_approx.cost import network_cost
from unified_approx.description import Network
from unified_approx.im2col import Geometry
from unified_approx.layers import FactoredConv, FactoredLinear, geometry_of
from unified_approx.storage import load, read_header, save, serialize

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class Net(nnx.Module):
    """A convolution, a batch norm, a convolution used twice, dropout, a dense layer."""

    def __init__(self, width=6, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, rngs=rngs)
        self.shared = nnx.Dict(a=nnx.Conv(width, width, (3, 3), rngs=rngs))
        self.again = self.shared["a"]
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        x = nnx.relu(self.again(nnx.relu(self.shared["a"](x))))
        return self.fc(self.dropout(x.mean((1, 2))))


def abstract(width=6):
    model = nnx.eval_shape(lambda: Net(width))
    model.eval()
    return model


def filled(width=6):
    model = abstract(width)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    nnx.update(model, jax.tree.map(lambda s: jnp.asarray(np.abs(normal(*s.shape)), s.dtype), state))
    description._fill_generators(model)
    return model


def compressed(param_dtype="float32"):
    """Net with a factored shared layer, a factored dense layer, and the batch norm gone."""
    model: Any = filled()
    model.bn = Identity()
    g = geometry_of(model.shared["a"])
    some = np.asarray([1, 4, 5, 17, 30, 31, 32, 50], np.int32)
    rest = np.setdiff1d(np.arange(54), some).astype(np.int32)
    terms = [Columns(normal(6, 8), some), LowRank(normal(4, 2), normal(2, 46), rest, np.asarray([5, 0], np.int32))]
    shared = FactoredConv.from_terms(
        terms, normal(6), g, execution="factored:patches+channels", param_dtype=param_dtype
    )
    model.shared["a"] = shared
    model.again = shared
    model.conv = FactoredConv.from_terms(
        [Spatial(normal(2, 9), normal(6, 3, 2))], normal(6), geometry_of(model.conv), execution="matmul"
    )
    model.fc = FactoredLinear.from_terms(
        [Columns(normal(5, 3), np.asarray([0, 1, 2], np.int32))], normal(5), Geometry((), 6, 5)
    )
    return model


X = jnp.asarray(normal(2, 5, 5, 3))
RUN = nnx.jit(lambda model, x: model(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = compressed()
    path = tmp_path_factory.mktemp("storage") / "net.safetensors"
    size = save(path, model, report={"rows": [{"name": "conv", "error": 0.25}]}, metadata={"mean": [0.5]})
    assert size == path.stat().st_size
    return path, model


def test_round_trip_is_bit_identical(saved):
    path, model = saved
    like = filled()
    before = jax.tree.map(jnp.copy, nnx.state(like, nnx.Param))
    again: Any = load(path, like=like)
    np.testing.assert_array_equal(RUN(again, X), RUN(model, X))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    assert again.again is again.shared["a"]
    assert again.again.execution == "factored:patches+channels"
    assert again.conv.execution == "matmul"
    assert isinstance(again.bn, Identity)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(like, nnx.Param)))
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_an_abstract_network_is_enough(saved):
    path, model = saved
    again: Any = load(path, like=abstract())
    again.train()  # the dropout's generator has a key
    assert np.isfinite(RUN(again, X)).all()
    again.eval()
    np.testing.assert_array_equal(RUN(again, X), RUN(model, X))


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16"])
def test_small_dtypes_are_stored_small(tmp_path, param_dtype):
    model = compressed(param_dtype)
    save(tmp_path / "f", model)
    again: Any = load(tmp_path / "f", like=abstract())
    assert again.again.terms[0].values.dtype == param_dtype
    np.testing.assert_array_equal(RUN(again, X), RUN(model, X))
    stored = load_file(tmp_path / "f")
    assert stored["again/terms.0.values"].nbytes == 2 * 48


def test_header_says_what_is_in_the_file(saved):
    header = read_header(saved[0])
    assert header["format"] == storage.FORMAT
    assert header["network"] is None
    assert header["report"] == {"rows": [{"name": "conv", "error": 0.25}]}
    assert header["metadata"] == {"mean": [0.5]}
    assert {tuple(map(tuple, entry["homes"])) for entry in header["modules"] if entry["kind"] == "FactoredConv"} == {
        (("conv",),),
        (("again",), ("shared", "a")),
    }
    assert set(header["versions"]) >= {"jax", "flax"}


def test_file_is_as_large_as_the_bits_claim():
    n, p, k = 64, 576, 288
    indices = np.sort(RNG.choice(p, k, replace=False)).astype(np.int32)
    layer = FactoredConv.from_terms([Columns(normal(n, k), indices)], normal(n), Geometry((3, 3), 64, 64, (), "SAME"))
    claimed = network_cost(layer, jnp.ones((1, 4, 4, 64))).bits // 8
    written = len(serialize(layer))
    assert claimed <= written < 1.02 * claimed
    stored, encoding = storage._encode(indices)
    assert encoding == {"form": "bitmap"}
    assert stored.nbytes <= p // 8


@pytest.mark.parametrize(
    ("indices", "form", "num_bytes"),
    [
        (np.arange(40), "range", 0),
        ([], "range", 0),
        ([3, 4, 6, 7, 8, 10, 12], "bitmap", 2),
        ([5, 2000], "integers", 4),
        ([7, 3, 5], "integers", 3),
        ([1, 70_000], "integers", 8),
    ],
)
def test_indices_are_stored_compactly(indices, form, num_bytes):
    array = np.asarray(indices, np.int32)
    stored, encoding = storage._encode(array)
    assert encoding is not None
    assert encoding["form"] == form
    assert stored.nbytes == num_bytes
    back = storage._decode(stored, json.loads(json.dumps(encoding)))
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, array)


def test_other_integers_are_left_alone():
    for array in (np.asarray([-1, 3], np.int32), np.asarray([[1, 2]], np.int32), np.asarray(4, np.int32)):
        stored, encoding = storage._encode(array)
        assert encoding is None
        assert stored.shape == array.shape
        np.testing.assert_array_equal(stored, array)


def test_zoo_network_loads_by_itself_in_a_new_process(tmp_path):
    model: Any = zoo.create("lenet300", activation="relu", seed=1)
    columns = np.arange(0, 300, 2, dtype=np.int32)
    model.fc2 = FactoredLinear.from_terms([Columns(normal(100, 150), columns)], normal(100), Geometry((), 300, 100))
    path = tmp_path / "lenet.safetensors"
    save(path, model)
    assert read_header(path)["network"] == {"name": "lenet300", "options": {"activation": "relu"}}
    x = normal(3, 28, 28, 1)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np\nfrom unified_approx.storage import load\nfrom flax import nnx\n"
        "y = nnx.jit(lambda m, x: m(x))(load(sys.argv[1]), np.load(sys.argv[2]))\nnp.save(sys.argv[3], y)"
    )
    root = Path(storage.__file__).parents[1]
    files = [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=root, env=None)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), RUN(model, x))


def test_a_network_that_is_not_quite_the_zoos_is_not_taken_for_it():
    model: Any = zoo.create("lenet300")
    model.activation = "relu"
    assert description._find_in_zoo(model) == Network("lenet300", {"activation": "relu"})
    model.fc1.use_bias = False
    assert description._find_in_zoo(model) is None
    assert description._find_in_zoo(compressed()) is None


def test_single_layer_network(tmp_path):
    layer = FactoredLinear.from_terms(
        [Columns(normal(5, 3), np.asarray([0, 2, 5], np.int32))], normal(5), Geometry((), 6, 5)
    )
    save(tmp_path / "f", layer)
    again: Any = load(tmp_path / "f", like=nnx.eval_shape(lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0))))
    np.testing.assert_array_equal(again(jnp.ones((2, 6))), layer(jnp.ones((2, 6))))


def test_unfit_networks_are_refused_by_name(saved, tmp_path):
    path, _ = saved
    with pytest.raises(ValueError, match="like: .*not hold a network of the zoo"):
        load(path)
    with pytest.raises(ValueError, match=r"do not fit at '.*': saved for Geometry\(.*found Geometry\("):
        load(path, like=abstract(8))
    save(tmp_path / "dense", filled())
    with pytest.raises(ValueError, match=r"'.*' is \(.*\) in the file, \(.*\) in the network"):
        load(tmp_path / "dense", like=abstract(8))
    wrong = filled()
    wrong.conv.bias = nnx.Param(jnp.zeros(6, jnp.int8))
    save(tmp_path / "integers", wrong)
    with pytest.raises(ValueError, match="'conv/bias' is int8 in the file, float32 in the network"):
        load(tmp_path / "integers", like=abstract())
    half = filled()
    half.conv.bias = nnx.Param(jnp.zeros(6, jnp.float16))
    save(tmp_path / "half", half)
    assert load(tmp_path / "half", like=abstract()).conv.bias.dtype == jnp.float16
    bare = abstract()
    bare.conv = nnx.eval_shape(lambda: nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no place for 'conv/bias'"):
        load(tmp_path / "dense", like=bare)
    save(tmp_path / "bare", _without_bias())
    with pytest.raises(ValueError, match="nothing is saved for 'conv/bias'"):
        load(tmp_path / "bare", like=abstract())
    with pytest.raises(ValueError, match="nothing at"):
        load(path, like=nnx.eval_shape(lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0))))


def _without_bias():
    model = filled()
    model.conv = nnx.eval_shape(lambda: nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
    model.conv.kernel = nnx.Param(jnp.ones((3, 3, 3, 6)))
    return model


def rewrite(path, target, change):
    """The file with its JSON header changed and everything else kept."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    outer = json.loads(raw[8 : 8 + size])
    change(outer)
    text = json.dumps(outer).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def change_header(**fields):
    def change(outer):
        header = json.loads(outer["__metadata__"]["unified_approx"])
        header = {key: value for key, value in {**header, **fields}.items() if value != "gone"}
        outer["__metadata__"]["unified_approx"] = json.dumps(header)

    return change


def test_bad_files_are_refused(saved, tmp_path):
    path, _ = saved
    raw, bad = path.read_bytes(), tmp_path / "bad"
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "missing", like=abstract())
    for content in (b"", raw[:100], raw[:-10], b"no safetensors file at all"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            load(bad, like=abstract())
    save_file({"a": np.ones(3)}, bad)
    with pytest.raises(ValueError, match="not written by"):
        load(bad)
    bad.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    with pytest.raises(ValueError, match="corrupted"):
        load(bad, like=abstract())
    assert read_header(bad)["format"] == storage.FORMAT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": storage.FORMAT + 1}, "upgrade unified-approx"),
        ({"format": "new"}, "not written by"),
        ({"sha256": "gone"}, "sha256.* missing"),
        ({"metadata": {"mean": [0.6]}}, "corrupted"),  # the checksum covers the header as well
    ],
)
def test_bad_headers_are_refused(saved, tmp_path, fields, message):
    rewrite(saved[0], tmp_path / "bad", change_header(**fields))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad", like=abstract())


def test_a_damaged_report_is_refused(saved, tmp_path):
    rewrite(saved[0], tmp_path / "bad", change_header(report="AAAA"))
    with pytest.raises(ValueError, match="report"):
        read_header(tmp_path / "bad")


def test_unknown_module_kinds_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="kind 'Tucker'"):
        description._rebuild({"kind": "Tucker", "homes": [["conv"]]}, {})


def test_bad_arguments_are_refused(tmp_path, monkeypatch):
    model = filled()
    with pytest.raises(FileNotFoundError, match="folder"):
        save(tmp_path / "nowhere" / "f", model)
    with pytest.raises(ValueError, match="only what JSON can say"):
        save(tmp_path / "f", model, metadata={"x": np.ones(2)})
    with pytest.raises(ValueError, match="only what JSON can say"):
        save(tmp_path / "f", model, report={"error": float("nan")})
    clash = nnx.Dict({"a": nnx.Dict({"b": nnx.Param(jnp.ones(1))}), "a/b": nnx.Param(jnp.ones(1))})
    with pytest.raises(ValueError, match="two Variables are called 'a/b'"):
        save(tmp_path / "f", clash)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, target = filled(), tmp_path / "f"
    save(target, model)
    before = target.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(target, model, metadata={"new": 1})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
