"""Putting modules into networks."""

from typing import Any

import jax.numpy as jnp
import networks as nets
import numpy as np
import pytest
from flax import nnx
from networks import Fn, linear

from solvers.activation import RELU
from unified_approx.assemble import Identity, assemble, get, homes, modules, put, shared_modules, unfold
from unified_approx.im2col import Geometry
from unified_approx.sites import LayerSite

VECTORS = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)


def make_site(path: tuple[str | int, ...], **changes: Any) -> LayerSite:
    one, zero = np.ones(3), np.zeros(3)
    fields: dict[str, Any] = {
        "homes": (path,),
        "kind": "linear",
        "geometry": Geometry((), 6, 3),
        "activation": RELU,
        "num_calls": 1,
        "norm": None,
        "scale": one,
        "shift": zero,
        "outer_scale": one,
        "outer_shift": zero,
        "has_offset": False,
    }
    return LayerSite(path=path, **(fields | changes))


PATHS = [
    ("in_list", 1),
    ("in_dict", "first"),
    ("in_tuple", 0),
    ("in_tuple", 1),
    ("nnx_list", 0),
    ("nnx_dict", "a"),
    ("nested", "pair", 1),
]


def containers() -> nnx.Module:
    model = nets.containers()
    model.nested = nnx.data({"pair": (linear(2, 2), linear(2, 2))})  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("path", PATHS)
def test_put_replaces_exactly_one_module_in_any_container(path: tuple[str | int, ...]):
    model = nets.build(containers)
    before = modules(model)
    new = Identity()
    assert put(model, path, new) is model
    after = modules(model)
    assert get(model, path) is new
    assert after.keys() == before.keys()
    assert all(after[p] is before[p] for p in before if p not in (path, ()))
    nnx.merge(*nnx.split(model))  # still a network that flax can take apart


def test_put_at_the_root_gives_the_new_module():
    new = Identity()
    assert put(Identity(), (), new) is new


@pytest.mark.parametrize(
    "path", [("absent",), ("in_list", 7), ("in_dict", "second"), ("in_list", "x"), ("in_list", 0, "y")]
)
def test_a_path_that_does_not_exist_is_an_error(path: tuple[str | int, ...]):
    model = nets.build(nets.containers)
    for function in (lambda: get(model, path), lambda: put(model, path, Identity())):
        with pytest.raises(ValueError, match="the network has nothing at"):
            function()


def test_homes_of_shared_modules():
    model = nets.build(nets.shared)
    assert homes(model, ("layer",)) == homes(model, ("again",)) == (("again",), ("layer",))
    assert homes(model, ("middle",)) == (("middle",),)
    assert shared_modules(model) == [(("again",), ("layer",))]


def test_identity_takes_what_a_batch_norm_takes():
    assert Identity()(VECTORS, True, mask=None) is VECTORS


def test_unfold_inverts_what_the_network_still_applies():
    rng = np.random.default_rng(1)
    matrix, bias = rng.standard_normal((3, 6)), rng.standard_normal(3)
    site = make_site(("a",), outer_scale=np.array([2.0, 0.0, -0.5]), outer_shift=np.array([0.1, 0.2, 0.3]))
    rows, shift = unfold(site, matrix, bias)
    np.testing.assert_allclose((site.outer_scale[:, None] * rows)[[0, 2]], matrix[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose((site.outer_scale * shift + site.outer_shift)[[0, 2]], bias[[0, 2]], rtol=1e-12)
    assert not rows[1].any()
    assert shift[1] == 0
    same = unfold(make_site(("a",)), matrix.astype(np.float32), bias.astype(np.float32))
    assert same[0].dtype == np.float32
    np.testing.assert_array_equal(same[0], matrix.astype(np.float32))


def test_assemble_leaves_the_original_alone_and_keeps_sharing():
    model = nets.build(nets.shared)
    layer: Any = get(model, ("layer",))
    site = make_site(("again",), homes=homes(model, ("again",)))
    new = Identity()
    out = assemble(model, {("again",): new}, [site])
    assert get(out, ("layer",)) is get(out, ("again",)) is new
    assert get(model, ("layer",)) is layer
    assert get(out, ("stem",)) is not get(model, ("stem",))


def test_assemble_folds_a_norm_at_all_its_paths():
    def make() -> nnx.Module:
        bn = nets.norm(3)
        return Fn(lambda m, x: m.bn(m.a(x), use_running_average=True), a=linear(6, 3), bn=bn, alias=nnx.List([bn]))

    model = nets.build(make)
    site = make_site(("a",), norm=("bn",))
    out = assemble(model, {("a",): get(model, ("a",))}, [site])
    assert isinstance(get(out, ("bn",)), Identity)
    assert get(out, ("alias", 0)) is get(out, ("bn",))
    np.testing.assert_allclose(out(VECTORS), get(model, ("a",))(VECTORS))  # type: ignore[operator]
    untouched = assemble(model, {}, [site])
    assert isinstance(get(untouched, ("bn",)), nnx.BatchNorm)


def test_a_network_that_is_one_layer_becomes_the_replacement():
    model, new = nets.build(lambda: linear(6, 3)), Identity()
    assert assemble(model, {(): new}, [make_site(())]) is new


def test_a_replacement_without_a_site_is_an_error():
    with pytest.raises(ValueError, match=r"no layer at \('b',\); layers are: a"):
        assemble(nets.build(nets.mlp), {("b",): Identity()}, [make_site(("a",))])
