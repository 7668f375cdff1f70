"""The packed container: bit-exact, as small as entropy allows, and an error for whatever is wrong."""

import tracemalloc

import hypothesis
import hypothesis.extra.numpy as arrays_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fuzz_packed import damaged, described_in, repacked, with_checksums
from hypothesis import strategies

from solvers.compressions.bits import position_bits
from solvers.terms import Codebook
from unified_approx import load, pack, storage, zoo
from unified_approx.description import arrays_of as arrays_of_model
from unified_approx.im2col import Geometry
from unified_approx.layers import FactoredLinear
from unified_approx.packing import arrays, container, huffman, symbols
from unified_approx.packing.accounting import bits_by_stage
from unified_approx.packing.arrays import DTYPES, ArrayType

RNG = np.random.default_rng(0)
QUICKLY = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def pruned(*shape, kept=0.1):
    values = normal(*shape)
    return np.where(RNG.random(shape) < kept, values, 0).astype(np.float32)


def shared(*shape, bits=4):
    return normal(2**bits)[RNG.integers(0, 2**bits, shape)]


def same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.tobytes() == right.tobytes()


def round_trip(array, coder="ans"):
    data = arrays.encode(array, coder)
    same(arrays.decode(data, ArrayType.of(array)), array)
    return data


ARRAYS = {
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float32),
    "all zero": np.zeros((7, 9), np.float32),
    "negative zeros": np.full(5, -0.0, np.float32),
    "one value": np.full(1000, 0.1, np.float32),
    "infinities": np.array([np.inf, -np.inf, 0, 1e-45], np.float32),
    "a huge gap": np.concatenate([np.zeros(3_000_000, np.float32), np.ones(1, np.float32)]),
    "weights": normal(50, 40),
    "pruned": pruned(100, 30),
    "shared": shared(100, 30),
    "pruned and shared": np.where(RNG.random((90, 90)) < 0.1, shared(90, 90), 0),
    "some rows empty": np.where(RNG.random((90, 300)) < RNG.random((90, 1)) ** 5, shared(90, 300), 0),
    "a codebook and corrections": shared(100, 100, bits=1) + pruned(100, 100, kept=0.01),
    "kept columns": np.sort(RNG.choice(4608, 900, replace=False)).astype(np.int32),
    "a range": np.arange(512, dtype=np.int32),
    "bfloat16": np.asarray(jnp.asarray(normal(20, 20), jnp.bfloat16)),
    "truth": RNG.random(300) < 0.2,
    "counter": np.array(7, np.uint32),
}


@pytest.mark.parametrize("coder", symbols.CODERS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back_bit_for_bit(name, coder):
    round_trip(ARRAYS[name], coder)


@QUICKLY
@hypothesis.given(
    array=strategies.sampled_from([d for d in DTYPES if d != "bfloat16"]).flatmap(
        lambda dtype: arrays_of.arrays(
            dtype,
            arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12),
            elements=arrays_of.from_dtype(np.dtype(dtype), **({"allow_nan": False} if "float" in dtype else {})),
        )
    ),
    coder=strategies.sampled_from(symbols.CODERS),
)
def test_any_array_comes_back(array, coder):
    round_trip(array, coder)


@QUICKLY
@hypothesis.given(
    bits=strategies.integers(1, 16), count=strategies.integers(1, 3000), seed=strategies.integers(0, 2**32 - 1)
)
def test_codes_of_any_width_and_any_skew_come_back(bits, count, seed):
    rng = np.random.default_rng(seed)
    skew = rng.random() * 4
    codes = np.floor(2**bits * rng.random(count) ** (1 + skew)).astype(np.int64)
    for coder in symbols.CODERS:
        np.testing.assert_array_equal(symbols.decode(symbols.encode(codes, coder), count), codes)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="weights: array: it has NaN"):
        container.dump({}, {"weights": np.array([1, np.nan], np.float32)})


def test_a_type_that_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match="weights: .*complex64"):
        container.dump({}, {"weights": np.zeros(2, np.complex64)})


@pytest.mark.parametrize("coder", symbols.CODERS)
@pytest.mark.parametrize("alphabet", [2, 3, 16, 200, 4096])
@pytest.mark.parametrize("skew", [1.0, 2.0, 5.0])
def test_streams_are_as_short_as_their_entropy(coder, alphabet, skew):
    codes = np.floor(alphabet * RNG.random(150_000) ** skew).astype(np.int64)
    bits = 8 * len(symbols.encode(codes, coder))
    limit = 1.02 * symbols.entropy(codes)
    if coder == "huffman":  # a whole number of bits for each symbol: up to one too many
        limit += 0.6 * len(codes)
    assert symbols.entropy(codes) <= bits <= limit


def test_huffman_words_are_the_best_of_a_whole_number_of_bits():
    counts = np.array([45, 13, 12, 16, 9, 5, 0])
    assert huffman.code_lengths(counts).tolist() == [1, 3, 3, 3, 4, 4, 0]
    words = huffman.code_words(huffman.code_lengths(counts))
    text = [f"{w:0{n}b}" for w, n in zip(words, huffman.code_lengths(counts), strict=True) if n]
    assert not any(a != b and b.startswith(a) for a in text for b in text)


def test_huffman_words_are_no_longer_than_the_table():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() == huffman.LONGEST
    assert huffman.is_complete(lengths)


def test_gaps_are_counted_as_their_entropy():
    """Positions of 10 % of the weights take H(0.1) = 0.469 bits a weight, and values theirs."""
    array = pruned(1000, 1000)
    bits = 8 * len(round_trip(array)) / array.size
    kept = np.count_nonzero(array)
    assert bits < 1.02 * (0.469 + 32 * kept / array.size)
    few = np.where(array != 0, shared(1000, 1000, bits=4), 0)
    assert 8 * len(round_trip(few)) / few.size < 1.02 * (0.469 + 4 * kept / array.size)


@pytest.mark.parametrize(
    ("name", "way", "most"),
    [
        ("all zero", "sparse", 6),
        ("weights", "planes", 6800),
        ("shared", "book", 1600),
        ("a codebook and corrections", "table", 1800),
        ("some rows empty", "grid", 4300),
        ("kept columns", "differences", 460),
        ("scalar", "raw", 5),
    ],
)
def test_the_shortest_way_is_chosen(name, way, most):
    data = arrays.encode(ARRAYS[name])
    assert arrays.way_of(data) == way
    assert len(data) <= most


TENSORS = {name: ARRAYS[name] for name in ("pruned", "shared", "kept columns", "weights", "some rows empty")}


def test_a_file_comes_back():
    found = container.parse(container.dump({"a": [1, None]}, TENSORS))
    assert found.header == {"a": [1, None]}
    for name, array in found.arrays().items():
        same(array, TENSORS[name])


def read(data):
    """The arrays, or None and what the error says."""
    try:
        return container.parse(data, largest=10**6).arrays(), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("coder", symbols.CODERS)
@pytest.mark.parametrize("mended", [False, True], ids=["as damaged", "with checksums that fit"])
def test_damaged_files_are_refused_or_read_as_they_are(coder, mended):
    """Without a checksum that fits, never a wrong value; with one, never anything but an error or an array."""
    whole, rng = container.dump({"network": None}, TENSORS, coder), np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        data = damaged(whole, rng)
        data = with_checksums(data) if mended else data
        found, message = read(data)
        refused += found is None
        if found is None:
            assert message.startswith(("path: ", "largest: "))
        elif not mended:
            for name, array in found.items():
                same(array, TENSORS[name])
    assert refused > (100 if mended else 290)


def test_a_file_that_would_take_more_memory_than_allowed_is_refused_before_it_does():
    bomb = container.dump({}, {"zeros": np.zeros(10**6, np.float32)})
    assert len(bomb) < 200
    described, body = described_in(bomb)
    described["arrays"][0][2] = [2**60]
    tracemalloc.start()
    with pytest.raises(ValueError, match="largest: the arrays take"):
        container.parse(repacked(described, body))
    with pytest.raises(ValueError, match="largest: the arrays take 4,000,000 bytes, 1,000 are allowed"):
        container.parse(bomb, largest=1000)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


HUNGRY = {
    "gaps": np.where(RNG.random(10**6) < 0.69, RNG.integers(1, 255, 10**6), 0).astype(np.uint8),
    "bits": RNG.integers(0, 32, 10**6).astype(np.uint8),
    "codebook": np.where(RNG.random(10**6) < 0.3, 7, RNG.integers(0, 9, 10**6)).astype(np.uint8),
}


@pytest.mark.parametrize("coder", symbols.CODERS)
@pytest.mark.parametrize("name", HUNGRY)
def test_decoding_takes_little_memory(name, coder):
    array = HUNGRY[name]
    data = round_trip(array, coder)
    tracemalloc.start()
    arrays.decode(data, ArrayType.of(array))
    assert tracemalloc.get_traced_memory()[1] < 10 * array.nbytes + 2**21
    tracemalloc.stop()


def test_a_header_takes_little_memory():
    described, body = described_in(container.dump({}, TENSORS))
    described["header"] = {"a": [[]] * (container.LONGEST_HEADER // 4)}
    data = repacked(described, body)
    tracemalloc.start()
    with pytest.raises(ValueError, match="path: the file is damaged"):
        container.parse(data + b"0")
    assert tracemalloc.get_traced_memory()[1] < 25 * container.LONGEST_HEADER
    tracemalloc.stop()
    with pytest.raises(ValueError, match="metadata: the header takes .* say less"):
        container.dump({"a": "0" * container.LONGEST_HEADER}, {})


def test_large_codebooks_are_found():
    """14 bits of a code, and 32 bits of each of 16384 values, for every weight."""
    array = normal(2**14)[RNG.integers(0, 2**14, 200_000)]
    for coder in symbols.CODERS:
        assert 8 * len(round_trip(array, coder)) / len(array) < 14 + 32 * 2**14 / len(array) + 0.1


def test_a_header_that_inflates_without_end_is_refused():
    described, body = described_in(container.dump({}, TENSORS))
    described["header"] = {"a": "0" * (container.LONGEST_HEADER + 1)}
    with pytest.raises(ValueError, match="path: the file is damaged .*header"):
        container.parse(repacked(described, body))


@pytest.mark.parametrize(
    ("place", "value"),
    [(1, "float128"), (2, [-1]), (2, ["a"]), (2, [1.5]), (3, -4), (3, 10**9), (4, "x"), (0, None)],
)
def test_a_header_that_lies_is_refused(place, value):
    described, body = described_in(container.dump({}, TENSORS))
    described["arrays"][0][place] = value
    if place == 0:
        described["arrays"].append(described["arrays"][0])
    with pytest.raises(ValueError, match="path: the file is damaged"):
        container.parse(repacked(described, body))


@pytest.mark.parametrize(("place", "value"), [(3, float("inf")), (2, [0, 2**62])])
def test_a_header_of_numbers_beyond_all_bounds_is_refused(place, value):
    described, body = described_in(container.dump({}, TENSORS))
    described["arrays"][0][place] = value
    with pytest.raises(ValueError, match="path: the file is damaged"):
        container.parse(repacked(described, body))


_IN_ZOO = {"network": {"name": "digits", "options": {}}}


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"network": "digits", "modules": []},
        {"network": {"name": "digits", "options": {"depth": 3}}, "modules": []},
        {"network": None, "modules": 3},
        {**_IN_ZOO, "modules": [{"kind": "Identity"}]},
    ],
    ids=str,
)
def test_a_sound_file_that_describes_no_network_is_refused(tmp_path, header):
    (tmp_path / "n.uapk").write_bytes(container.dump(header, {}))
    with pytest.raises(ValueError, match=r"(path|like): .*n\.uapk"):
        load(tmp_path / "n.uapk")


def test_networks_larger_than_allowed_are_read_when_asked_for(tmp_path):
    pack(tmp_path / "digits.uapk", zoo.load("digits"))
    storage.save(tmp_path / "digits.safetensors", nnx.merge(*blank_digits()))
    for name, least in (("digits.uapk", 200_000), ("digits.safetensors", 200_000)):
        with pytest.raises(ValueError, match="largest: the arrays"):
            load(tmp_path / name, largest=least)
        load(tmp_path / name, largest=300_000)


def blank_digits():
    """A network whose arrays are stored as nothing: all zeros."""
    graphdef, state = nnx.split(zoo.load("digits"))
    return graphdef, jax.tree.map(jnp.zeros_like, state)


def test_a_newer_version_is_named():
    data = bytearray(container.dump({}, TENSORS))
    data[len(container.MAGIC)] = 9
    with pytest.raises(ValueError, match="version 9.*upgrade"):
        container.parse(bytes(data))


def test_networks_come_back(tmp_path):
    model = zoo.load("digits")
    size = pack(tmp_path / "digits.uapk", model)
    assert size < storage.save(tmp_path / "digits.safetensors", model)
    again = load(tmp_path / "digits.uapk")
    for left, right in zip(_leaves(model), _leaves(again), strict=True):
        same(left, right)
    assert storage.is_packed(tmp_path / "digits.uapk")
    assert storage.read_header(tmp_path / "digits.uapk")["network"]["name"] == "digits"


def _leaves(model):
    return [np.asarray(leaf) for leaf in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))).leaves]


def test_an_unknown_coder_is_named(tmp_path):
    with pytest.raises(ValueError, match="coder: 'zip' is unknown; choose one of ans, huffman"):
        pack(tmp_path / "a.uapk", zoo.load("digits"), coder="zip")
    assert not list(tmp_path.iterdir())


def one_layer(layer):
    """A network of one layer, and its line."""

    class Net(nnx.Module):
        def __init__(self):
            self.layer = layer

    packed = container.parse(container.dump({}, arrays_of_model(Net())))
    return bits_by_stage(packed, Net())[0]


@pytest.mark.parametrize(("low", "width"), [(-4, 3), (0, 2)], ids=["negative", "codes"])
def test_integers_take_the_width_of_their_span(low, width):
    array = RNG.integers(low, 4, (100, 100)).astype(np.int32)
    line = one_layer(nnx.Param(jnp.asarray(array)))
    assert (line.pruned, line.shared) == (32 * array.size, width * array.size)


def test_zeros_of_bfloat16_are_pruned():
    array = jnp.asarray(pruned(100, 100), jnp.bfloat16)
    positions = position_bits(np.asarray(array).reshape(-1) != 0)
    assert one_layer(nnx.Param(array)).pruned == positions + 16 * jnp.count_nonzero(array)


def test_zero_codes_of_a_codebook_layer_are_pruned():
    codes = np.where(RNG.random((64, 200)) < 0.1, RNG.integers(1, 17, (64, 200)), 0)
    term = Codebook(normal(16), codes.astype(np.int32))
    line = one_layer(FactoredLinear.from_terms([term], None, Geometry((), 200, 64)))
    kept = np.count_nonzero(codes)
    positions = position_bits(codes.reshape(-1) != 0)
    assert line.pruned == positions + 32 * kept
    assert line.shared == positions + 4 * kept + 16 * 32
    assert line.coded < line.shared < line.pruned < line.dense
