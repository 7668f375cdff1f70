"""What comes after LC: smaller layers, coded files, training of what is stored, reports."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from typer.testing import CliRunner

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Compression,
    Each,
    Half,
    LowRank,
    PruneGroups,
    PruneL0,
    PruneQuantize,
    RankSelection,
    ScaledTernary,
    binary,
)
from solvers.prox import CHANNELS, ROWS
from unified_approx import cli, evaluate, storage
from unified_approx.coding import decode
from unified_approx.cost import network_cost
from unified_approx.description import arrays_of, describe
from unified_approx.layers import FactoredConv, FactoredLinear
from unified_approx.learning_compression import Task, finetune_compressed, lc
from unified_approx.learning_compression.report import form_name, reported
from unified_approx.learning_compression.result import LcResult
from unified_approx.packing import container, symbols
from unified_approx.packing.accounting import bits_by_stage
from unified_approx.pieces import parameters_of
from unified_approx.training import Recipe


def compressed(model, *tasks) -> LcResult:
    """Direct compression: an L step that does nothing."""
    return lc(model, tasks, lambda network, penalty, step: network, [1.0])


TASKS = {
    "low rank, both schemes": [
        Task(path="conv2", compression=LowRank(5)),
        Task(path="conv3", compression=LowRank(5, "spatial")),
        Task(path="fc", compression=LowRank(3)),
    ],
    "float16": [
        Task(path="conv2", compression=LowRank(5, value_bits=16)),
        Task(path="fc", compression=PruneL0(700, 16)),
    ],
    "float16 in sums and choices": [
        Task(path="conv2", compression=Additive((PruneGroups(9), LowRank(2, value_bits=16)))),
        Task(path="conv3", compression=RankSelection(8e-3, scheme="auto", value_bits=16)),
    ],
    "channels and columns": [
        Task(path="conv2", compression=PruneGroups(9, CHANNELS)),
        Task(path="conv3", compression=PruneGroups(0.3)),
        Task(path="fc", compression=Additive((PruneGroups(100), LowRank(2)))),
    ],
    "selected ranks": [Task(path="conv[23]", compression=RankSelection(8e-3, scheme="auto"))],
    "streams": [
        Task(path="conv1", compression=ScaledTernary()),
        Task(path="conv2", compression=PruneGroups(7, ROWS)),
        Task(path="conv3", compression=PruneQuantize(0.1, 8)),
        Task(path="fc", compression=Additive((AdaptiveCodebook(2), PruneL0(50), LowRank(1)))),
    ],
    "joint streams": [
        Task(path="conv[23]|fc", compression=AdaptiveCodebook(3), view="vector", joint=True),
        Task(path="conv1/bias", compression=PruneL0(4)),
    ],
    "joint sum": [
        Task(
            path="conv[23]",
            compression=Additive((AdaptiveCodebook(2), Each((LowRank(1), LowRank(1, "spatial"))))),
            view="vector",
            joint=True,
        )
    ],
}


@pytest.mark.parametrize("name", TASKS)
def test_a_file_gives_the_network_back_and_takes_the_bits_that_are_counted(digits, tmp_path, name):
    model, test = digits[0], digits[3]
    result = compressed(model, *TASKS[name])
    size = result.save(tmp_path / "n.safetensors")
    loaded = storage.load(tmp_path / "n.safetensors")
    small, coded = result.parts()
    np.testing.assert_array_equal(evaluate.predict(loaded, test), evaluate.predict(small, test))
    np.testing.assert_allclose(evaluate.predict(small, test), evaluate.predict(result.model, test), atol=2e-4)
    tensors = load_file(tmp_path / "n.safetensors")
    streams = [tensors[f"coded.{i}"] for i in range(len(coded))]
    rest = sum(array.nbytes for key, array in tensors.items() if not key.startswith("coded."))
    own = {id(stream.piece): stream for stream in coded}
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        if id(piece) in own:  # bits by formula are those of the file
            assert own[id(piece)].stream.nbytes == math.ceil(piece.compression.bits(theta) / 8)
    values = sum(stream.nbytes for stream in streams) + rest
    assert values == pytest.approx(result.bits / 8, rel=1e-2, abs=40)  # ranks and indices of columns apart
    assert size < values + 8000
    for stream in coded:
        again = decode(stream.entry(), stream.stream)
        for path, value in again.items():
            np.testing.assert_array_equal(value, parameters_of(small)[path])


@pytest.mark.parametrize(
    "name", ["low rank, both schemes", "channels and columns", "selected ranks", "float16 in sums and choices"]
)
def test_layers_are_smaller(digits, name):
    model, x = digits[0], digits[3][:2]
    result = compressed(model, *TASKS[name])
    small = result.rebuilt()
    for piece in result.pieces:
        layer = getattr(small, piece.name)
        assert isinstance(layer, FactoredConv | FactoredLinear)
        assert layer.geometry.matrix_shape == piece.layers[0]
    before, after = network_cost(model, x), network_cost(small, x)
    assert after.params < before.params
    assert after.macs < before.macs
    report = reported(model, result, x, "a budget").report
    assert (report.params, report.macs) == (after.params, after.macs)
    halves = sum(own.piece.size for own in result.parts()[1] if isinstance(own.piece.compression, Half))
    assert (halves > 0) == ("float16" in name)
    assert report.bits == after.bits - 16 * halves
    assert [row.name for row in report.layers] == [piece.name for piece in result.pieces]
    assert all(row.params < row.original_params for row in report.layers)


def test_a_rank_above_break_even_is_stored_dense(digits):
    result = compressed(digits[0], Task(path="conv3", compression=LowRank(60)))
    assert isinstance(result.rebuilt().conv3, nnx.Conv)
    np.testing.assert_array_equal(result.rebuilt().conv3.kernel[...], result.model.conv3.kernel[...])


def test_rank_0_is_a_layer_of_its_bias(digits):
    small = compressed(digits[0], Task(path="conv3", compression=LowRank(0))).rebuilt()
    assert not len(small.conv3.terms)
    x = jnp.ones((1, 8, 8, 64))
    np.testing.assert_allclose(small.conv3(x), jnp.broadcast_to(digits[0].conv3.bias[...], (1, 8, 8, 64)))


class Shared(nnx.Module):
    """One layer at two places, and one with groups."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.b = self.a
        self.grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.grouped(self.b(self.a(x)))


def test_shared_layers_are_replaced_everywhere_and_groups_stay(tmp_path):
    model = Shared()
    result = compressed(model, Task(path="a|grouped", compression=LowRank(1)))
    small = result.rebuilt()
    assert isinstance(small.a, FactoredConv)
    assert small.a is small.b
    assert isinstance(small.grouped, nnx.Conv)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 4)), jnp.float32)
    np.testing.assert_allclose(small(x), result.model(x), atol=1e-5)
    result.save(tmp_path / "n.safetensors")
    loaded = storage.load(tmp_path / "n.safetensors", like=Shared())
    np.testing.assert_array_equal(loaded(x), small(x))


def test_a_form_nobody_else_knows_is_stored_as_values(digits, tmp_path):
    class Own(PruneL0):
        pass

    result = compressed(digits[0], Task(path="fc", compression=Own(50)))
    assert not result.parts()[1]
    result.save(tmp_path / "n.safetensors")
    loaded = storage.load(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(loaded.fc.kernel[...], result.model.fc.kernel[...])


def test_damaged_streams_are_refused(digits):
    stream = compressed(digits[0], Task(path="fc", compression=AdaptiveCodebook(2))).parts()[1][0]
    with pytest.raises(ValueError, match="the stream is damaged"):
        decode(stream.entry(), stream.stream[:-9])
    with pytest.raises(ValueError, match="bits too many for 'fc'"):
        decode(stream.entry(), np.concatenate([stream.stream, np.zeros(3, np.uint8)]))
    with pytest.raises(ValueError, match="is no compression of this version"):
        decode({**stream.entry(), "compression": {"kind": "Newer"}}, stream.stream)


SUM = Task(path="conv3", compression=Additive((LowRank(2), PruneL0(600))))


@pytest.mark.parametrize("coder", symbols.CODERS)
def test_sums_without_layers_of_their_own_are_packed_as_their_streams(digits, tmp_path, coder):
    result = compressed(digits[0], SUM, Task(path="fc", compression=PruneQuantize(0.1, 8)))
    model, coded = result.parts()
    plain = storage.pack(tmp_path / "plain.uapk", model, coder=coder)
    size = storage.pack(tmp_path / "n.uapk", model, coded=coded, coder=coder)
    assert size < min(plain, 1.02 * result.bits / 8 + 1000)
    loaded, kept = storage.load_coded(tmp_path / "n.uapk")
    assert [stream.piece.name for stream in kept] == ["conv3"]  # the codebook of fc packs smaller than its stream
    for path, value in parameters_of(model).items():
        np.testing.assert_array_equal(parameters_of(loaded)[path], value)
    data = (tmp_path / "n.uapk").read_bytes()
    lines = {line.name: line for line in bits_by_stage(container.parse(data), loaded)}
    assert lines["conv3"].weights == 9 * 64 * 64 + 64
    assert lines["conv3"].coded == pytest.approx(8 * coded[0].stream.nbytes + 32 * 64, rel=0.1)


def test_the_command_line_packs_and_unpacks_streams(digits, tmp_path):
    result = compressed(digits[0], SUM)
    plain, packed, again = (tmp_path / f"n{i}.safetensors" for i in range(3))
    result.save(plain)
    for command, source, target in (("pack", plain, packed), ("unpack", packed, again)):
        done = CliRunner().invoke(cli.app, [command, str(source), "--out", str(target)])
        assert done.exit_code == 0, done.output
    assert packed.stat().st_size < plain.stat().st_size
    for path, value in parameters_of(storage.load(plain)).items():
        np.testing.assert_array_equal(parameters_of(storage.load(again))[path], value)


_HUGE = {"kind": "MatrixShape", "window": [], "c_in": 2**40, "n": 2**40}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None),
        ("compression", None),
        ("compression", 3),
        ("compression", {"kind": "LowRank", "rank": "a"}),
        ("compression", {"kind": "Each", "parts": [{"kind": "PruneL0", "kept": 3}], "layers": [_HUGE]}),
        ("compression", {"kind": "Additive", "parts": 100 * [{"kind": "PruneL0", "kept": 3}]}),
        ("paths", [["conv9", "kernel"]]),
        ("paths", [["conv3", "kernel"], ["fc", "kernel"]]),
        ("shapes", [[2**30, 2**30]]),
        ("shapes", [[3, 3, 64, 63]]),
        ("kernels", []),
        ("matrix", False),
    ],
    ids=str,
)
def test_hostile_entries_of_streams_are_refused(digits, tmp_path, field, value):
    model, (stream,) = compressed(digits[0], SUM).parts()
    entry = {**stream.entry(), field: value}
    if value is None:
        del entry[field]
    header = {**describe(model), "coded": [entry]}
    file = tmp_path / "n.uapk"
    file.write_bytes(container.dump(header, {**arrays_of(model), "coded.0": stream.stream}))
    tracemalloc.start()
    with pytest.raises(ValueError, match="path: the streams of .* cannot be decoded"):
        storage.load(file)
    assert tracemalloc.get_traced_memory()[1] < 3e7
    tracemalloc.stop()


def test_a_stream_that_is_not_in_the_file_is_named(digits, tmp_path):
    model, (stream,) = compressed(digits[0], SUM).parts()
    (tmp_path / "n.uapk").write_bytes(container.dump({**describe(model), "coded": [stream.entry()]}, arrays_of(model)))
    with pytest.raises(ValueError, match="lists 'coded.0' and does not hold it"):
        storage.load(tmp_path / "n.uapk")


STRUCTURE = {
    "codebook": (AdaptiveCodebook(3), lambda w: len(np.unique(w)) == 3),
    "pruned": (PruneL0(800), lambda w: np.count_nonzero(w) == 800),
    "pruned, float16": (PruneL0(800, 16), lambda w: np.array_equal(w, w.astype(np.float16).astype(np.float32))),
    "ternary": (ScaledTernary(), lambda w: len(np.unique(np.abs(w))) == 2),
    "low rank": (LowRank(3), lambda w: np.linalg.matrix_rank(w.reshape(-1, w.shape[-1]), 1e-4) == 3),
    "sum": (Additive((AdaptiveCodebook(2), PruneL0(30))), lambda w: len(np.unique(w)) <= 32),
    "dense": (RankSelection(0.0, value_bits=16), lambda w: np.array_equal(w, w.astype(np.float16))),
    "fixed": (binary(), lambda w: set(np.unique(w)) == {-1.0, 1.0}),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_what_is_stored_is_trained_and_keeps_its_structure(digits, tmp_path, name):
    model, x, y, test, labels = digits
    form, holds = STRUCTURE[name]
    before = compressed(model, Task(path="fc", compression=form))
    recipe = Recipe(epochs=2, batch_size=64, learning_rate=0.01, weight_decay=1e-4, augment=None)
    after = finetune_compressed(before, x, y, recipe)

    def loss(network):
        log_p = jax.nn.log_softmax(evaluate.predict(network, x))
        return -float(np.mean(log_p[np.arange(len(y)), y]))

    assert loss(after.model) < loss(before.model)
    assert holds(np.asarray(after.model.fc.kernel[...]))
    assert jax.tree.structure(nnx.state(after.model)) == jax.tree.structure(nnx.state(model))
    assert after.bits == before.bits
    after.save(tmp_path / "n.safetensors")
    loaded = storage.load(tmp_path / "n.safetensors")
    np.testing.assert_allclose(evaluate.predict(loaded, test), evaluate.predict(after.model, test), atol=1e-4)


def test_names_of_forms():
    assert form_name(Additive((AdaptiveCodebook(2), Each((LowRank(1), LowRank(2)))))) == "quantize + low_rank"
    assert issubclass(type(binary()), Compression)
    assert form_name(binary()) == "FixedCodebook"
