"""AlexNet and GoogLeNet against PyTorch's conventions, spelled out in NumPy (NCHW), and in a compression."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file

import unified_approx as ua
from solvers.activation import IDENTITY, RELU
from solvers.layer import LayerOptions
from solvers.refine import RefineOptions
from unified_approx import evaluate, resolve, zoo
from unified_approx.capture import Capture
from unified_approx.zoo.pooling import adaptive_mean_pool, ceil_max_pool

# --- the poolings ---


def torch_max_pool(x, window, stride, padding=0, *, ceil):
    """PyTorch's MaxPool2d on NCHW, one window after the other."""
    places = []
    for size in x.shape[2:]:
        last = (
            size + padding if ceil else size + 2 * padding - window + 1
        )  # windows start before this, padding included
        count = 1 + (-(-(size + 2 * padding - window) // stride) if ceil else (size + 2 * padding - window) // stride)
        starts = [i * stride - padding for i in range(count) if not ceil or i * stride < last]
        places.append([slice(max(0, s), min(size, s + window)) for s in starts])
    rows = [[x[:, :, i, j].max(axis=(2, 3)) for j in places[1]] for i in places[0]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 0), (2, 2, 0), (3, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("sides", [(3, 4), (5, 6), (7, 8)])
def test_ceil_max_pool_is_pytorchs(window, stride, padding, sides):
    x = (
        np.random.default_rng(0).standard_normal((2, 3, *sides)).astype(np.float32) - 5
    )  # negative: padding must not win
    found = ceil_max_pool(jnp.asarray(x.transpose(0, 2, 3, 1)), window, stride, padding).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, torch_max_pool(x, window, stride, padding, ceil=True))


def test_adaptive_mean_pool():
    x = jnp.arange(10.0).reshape(1, 5, 2, 1)
    rows = np.asarray(adaptive_mean_pool(x, 2))[0, :, :, 0]
    np.testing.assert_allclose(rows, [[2, 3], [6, 7]])  # rows 0 to 2 and 2 to 4; columns stay
    wide = np.asarray(adaptive_mean_pool(x, 6))
    assert wide.shape == (1, 6, 6, 1)
    np.testing.assert_allclose(wide[0, :, 0, 0], [0, 1, 3, 5, 7, 8])  # floor(5 i / 6) to ceil(5 (i + 1) / 6)
    np.testing.assert_array_equal(adaptive_mean_pool(x[:, :2], 2), x[:, :2])


# --- the layouts ---


def torch_conv(x, kernel, bias=None, *, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, kernel.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    out = np.einsum("bcijuv,ocuv->boij", windows, kernel)
    return out if bias is None else out + bias[:, None, None]


def torch_alexnet(t, x):
    def conv(x, n, **where):
        return np.maximum(torch_conv(x, t[f"features.{n}.weight"], t[f"features.{n}.bias"], **where), 0)

    x = torch_max_pool(conv(x, 0, stride=4, padding=2), 3, 2, ceil=False)
    x = torch_max_pool(conv(x, 3, padding=2), 3, 2, ceil=False)
    x = conv(conv(conv(x, 6, padding=1), 8, padding=1), 10, padding=1)
    x = torch_max_pool(x, 3, 2, ceil=False)
    assert x.shape[2:] == (6, 6)
    x = x.reshape(len(x), -1)
    for n in (1, 4):
        x = np.maximum(x @ t[f"classifier.{n}.weight"].T + t[f"classifier.{n}.bias"], 0)
    return x @ t["classifier.6.weight"].T + t["classifier.6.bias"]


def torch_googlenet(t, x):
    def basic(x, name, **where):
        x = torch_conv(x, t[f"{name}.conv.weight"], **where)
        scale, shift, mean, var = (
            t[f"{name}.bn.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return np.maximum((x - mean) / np.sqrt(var + 1e-3) * scale + shift, 0)

    def inception(x, name):
        branches = [
            basic(x, f"{name}.branch1"),
            basic(basic(x, f"{name}.branch2.0"), f"{name}.branch2.1", padding=1),
            basic(basic(x, f"{name}.branch3.0"), f"{name}.branch3.1", padding=1),
            basic(torch_max_pool(x, 3, 1, 1, ceil=True), f"{name}.branch4.1"),
        ]
        return np.concatenate(branches, axis=1)

    x = torch_max_pool(basic(x, "conv1", stride=2, padding=3), 3, 2, ceil=True)
    x = torch_max_pool(basic(basic(x, "conv2"), "conv3", padding=1), 3, 2, ceil=True)
    x = torch_max_pool(inception(inception(x, "inception3a"), "inception3b"), 3, 2, ceil=True)
    for letter in "abcde":
        x = inception(x, f"inception4{letter}")
    x = torch_max_pool(x, 2, 2, ceil=True)
    x = inception(inception(x, "inception5a"), "inception5b").mean(axis=(2, 3))
    return x @ t["fc.weight"].T + t["fc.bias"]


FORWARD = {"alexnet": (torch_alexnet, 223), "googlenet": (torch_googlenet, 60)}
PUBLISHED = {"alexnet": 61_100_840, "googlenet": 6_624_904}
OPTIONS = {"width": 1 / 16, "num_classes": 11}


def torch_file(name):
    """Random tensors under the names and shapes of a narrow network; statistics of batch norms of both signs."""
    entry, rng = zoo.entry(name), np.random.default_rng(0)
    shapes = zoo.torch_tensors(zoo.create(name, **OPTIONS), entry.torch_names, entry.flatten)
    tensors = {}
    for key, like in shapes.items():
        value = rng.standard_normal(like.shape) * (1.4 / np.sqrt(np.prod(like.shape[1:])) if like.ndim > 1 else 0.3)
        if key.endswith("running_var"):
            value = rng.uniform(0.5, 2, like.shape)
        elif key.endswith("bn.weight"):
            value = 1 + value
        tensors[key] = value.astype(np.float32)
    return tensors


@pytest.mark.parametrize("name", FORWARD)
def test_a_torchvision_file_computes_what_torchvision_computes(name, tmp_path):
    forward, side = FORWARD[name]
    tensors = torch_file(name)
    save_file(tensors | {"x.num_batches_tracked": np.asarray(3)}, tmp_path / "weights.safetensors")
    model = zoo.load(name, tmp_path / "weights.safetensors", **OPTIONS)
    x = np.random.default_rng(1).standard_normal((2, 3, side, side)).astype(np.float32)
    expected = forward(tensors, x)
    found = evaluate.predict(model, x.transpose(0, 2, 3, 1))
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    entry = zoo.entry(name)
    back = zoo.torch_tensors(model, entry.torch_names, entry.flatten)
    assert set(back) == set(tensors)
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key])


def torchvision_keys(name):
    """Names in torchvision's files, from the source of its networks."""
    if name == "alexnet":
        modules = [*(f"features.{n}" for n in (0, 3, 6, 8, 10)), *(f"classifier.{n}" for n in (1, 4, 6))]
        return {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    blocks = [f"inception{b}" for b in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    branches = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
    basics = ["conv1", "conv2", "conv3", *(f"{block}.{branch}" for block in blocks for branch in branches)]
    leaves = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return {f"{basic}.{leaf}" for basic in basics for leaf in leaves} | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", FORWARD)
def test_names_are_torchvisions(name):
    assert set(torch_file(name)) == torchvision_keys(name)


def test_auxiliary_heads_are_ignored_and_nothing_else(tmp_path):
    tensors = torch_file("googlenet")
    heads = {"aux1.conv.conv.weight": np.zeros((8, 32, 1, 1), np.float32), "aux2.fc2.bias": np.zeros(11, np.float32)}
    save_file(tensors | heads, tmp_path / "with.safetensors")
    assert isinstance(zoo.load("googlenet", tmp_path / "with.safetensors", **OPTIONS), zoo.GoogLeNet)
    save_file(tensors | {"aux3.fc.bias": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="1 tensors belong to no layer of the network.*aux3"):
        zoo.load("googlenet", tmp_path / "other.safetensors", **OPTIONS)


def test_normalizations():
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    alexnet, googlenet = (zoo.entry(name).preprocess(images) for name in FORWARD)
    np.testing.assert_allclose(alexnet[..., 1], (images[..., 1] / 255 - 0.456) / 0.224, atol=1e-5)
    # torchvision's transform_input, applied to the normalized image.
    np.testing.assert_allclose(googlenet[..., 1], alexnet[..., 1] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5, atol=1e-5)


@pytest.mark.parametrize("name", FORWARD)
def test_width(name):
    with pytest.raises(ValueError, match="width is 0.0"):
        zoo.create(name, width=0.0)
    model = nnx.eval_shape(lambda: zoo.entry(name).make(width=2.0))
    assert 3.5 < sum(v.size for v in jax.tree.leaves(nnx.state(model, nnx.Param))) / PUBLISHED[name] < 4


def test_dropout_only_when_training():
    model = zoo.create("alexnet", width=1 / 32, num_classes=5, dropout=0.5)
    x = jnp.asarray(images(2, 64))
    still = np.asarray(model(x))
    model.train()
    rngs = nnx.Rngs(dropout=1)
    assert not np.array_equal(model(x, rngs), model(x, rngs))
    model.eval()
    np.testing.assert_array_equal(model(x), still)


def test_googlenets_dropout_takes_its_keys_from_the_call():
    model = zoo.create("googlenet", width=1 / 32, num_classes=5, dropout=0.2)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model.train()
    with pytest.raises(ValueError, match="rngs"):
        nnx.eval_shape(lambda m, x: m(x), model, x)
    assert nnx.eval_shape(lambda m, x: m(x, nnx.Rngs(0)), model, x).shape == (2, 5)


def test_the_command_line_says_how_to_get_at_the_images():
    with pytest.raises(ValueError, match="alexnet is for imagenet.*unified_approx.image_folder.open_folder"):
        resolve.load_images("alexnet", None, None)


# --- in a compression ---


def narrow(name):
    return zoo.create(name, width=1 / 16, num_classes=5)


def images(count, side):
    return np.random.default_rng(0).standard_normal((count, side, side, 3)).astype(np.float32)


def test_every_layer_of_googlenet_is_found_with_its_norm_and_relu():
    capture = Capture(narrow("googlenet"), [(images(2, 32),)])
    assert not capture.skipped
    assert len(capture.sites) == 58
    *convolutions, last = capture.sites
    assert all(site.activation == RELU and site.norm == (*site.path[:-1], "bn") for site in convolutions)
    assert all(np.all(site.outer_scale == 1) and not site.has_offset for site in capture.sites)
    assert (last.name, last.activation) == ("fc", IDENTITY)
    names = {re.sub("/conv$", "", site.name) for site in convolutions}
    branches = {"branch1", "branch2/0", "branch2/1", "branch3/0", "branch3/1", "branch4"}
    assert {name.partition("/")[2] for name in names if name.startswith("inception")} == branches


def test_every_layer_of_alexnet_is_found():
    capture = Capture(narrow("alexnet"), [(images(2, 64),)])
    assert [site.name for site in capture.sites] == [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]
    assert [site.activation for site in capture.sites] == [RELU] * 7 + [IDENTITY]
    assert not capture.skipped


def test_compressed_googlenet_answers_like_the_original():
    model, x = narrow("googlenet"), images(24, 32)
    options = LayerOptions(form=("columns", "low_rank"), refine=RefineOptions(steps=2, pull_steps=1))
    chosen = "inception3a/branch4/conv|inception3a/branch2/1/conv|inception5b/branch1/conv"
    rules = [ua.Rule(path=chosen, budget=ua.Budget(params=0.6)), ua.Rule(path=".*", keep=True)]
    result = ua.compress(model, x, rules=rules, options=options, rows=512)
    done = {row.name for row in result.report.layers if row.status == "compressed"}
    assert done == set(chosen.split("|"))
    assert result.budget_met
    assert all(row.params <= 0.6 * row.original_params for row in result.report.layers if row.name in done)
    reference, found = (evaluate.predict(m, x) for m in (model, result.model))
    assert np.linalg.norm(found - reference) < 0.5 * np.linalg.norm(reference - reference.mean(0))
