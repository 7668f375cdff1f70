"""Tiny networks of many kinds, and a way to fill them without running initialisers (which compile slowly)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unified_approx.assemble import get, unfold

RNGS = nnx.Rngs


def build(make: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """The network with random weights: kernels of unit gain, batch norms with scales of both signs."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def fill(keys: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        name = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)][-1]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        noise = rng.standard_normal(leaf.shape)
        if name == "var":
            noise = 0.5 + rng.uniform(size=leaf.shape)
        elif name == "scale":
            noise = np.where(noise > -0.5, 1.0, -1.0) + 0.3 * noise
        elif len(leaf.shape) > 1:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            noise = 0.3 * noise
        return jnp.asarray(noise, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def conv(c_in: int, c_out: int, k: int = 3, **options: Any) -> nnx.Conv:
    return nnx.Conv(c_in, c_out, (k, k), rngs=RNGS(0), **options)


def linear(c_in: int, c_out: int, **options: Any) -> nnx.Linear:
    return nnx.Linear(c_in, c_out, rngs=RNGS(0), **options)


def norm(c: int, **options: Any) -> nnx.BatchNorm:
    return nnx.BatchNorm(c, rngs=RNGS(0), **options)


class Fn(nnx.Module):
    """Named parts and a function that calls them: `Fn(lambda m, x: m.a(x), a=...)`."""

    def __init__(self, function: Callable[..., Any], **parts: Any):
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, *args: Any) -> Any:
        return self.function(self, *args)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def mlp() -> nnx.Module:
    return Fn(lambda m, x: m.c(jnp.maximum(m.b(nnx.relu(m.a(x))), 0)), a=linear(6, 5), b=linear(5, 4), c=linear(4, 3))


def lenet() -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(m.conv1(x)), (2, 2), (2, 2))
        x = nnx.relu(nnx.max_pool(m.conv2(x), (2, 2), (2, 2)))
        return m.fc2(nnx.relu(m.fc1(flat(x))))

    return Fn(call, conv1=conv(3, 4, padding="VALID"), conv2=conv(4, 4, padding=1), fc1=linear(4, 5), fc2=linear(5, 3))


def vgg(batch_norm: bool) -> nnx.Module:
    layers: list[Any] = []
    for c_in, c_out in ((3, 4), (4, 6)):
        layers += [conv(c_in, c_out), *([norm(c_out)] if batch_norm else []), nnx.relu]
    pool = lambda x: flat(nnx.max_pool(x, (2, 2), (2, 2)))  # noqa: E731
    return nnx.Sequential(*layers, pool, linear(96, 3))


class BasicBlock(nnx.Module):
    """A CIFAR ResNet's block with the padded or the projected shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int, projection: bool):
        self.conv1 = conv(c_in, c_out, strides=stride, padding=((1, 1), (1, 1)), use_bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = conv(c_out, c_out, use_bias=False)
        self.bn2 = norm(c_out)
        self.stride, self.extra = stride, c_out - c_in
        self.down = conv(c_in, c_out, 1, strides=stride, use_bias=False) if projection else None
        self.down_bn = norm(c_out) if projection else None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        if self.down is not None:
            return nnx.relu(out + self.down_bn(self.down(x)))
        return nnx.relu(jnp.pad(x[:, :: self.stride, :: self.stride], [(0, 0)] * 3 + [(0, self.extra)]) + out)


def resnet(projection: bool) -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        x = nnx.relu(m.bn(m.stem(x)))
        for block in m.blocks:
            x = block(x)
        return m.fc(x.mean((1, 2)))

    blocks = nnx.data([BasicBlock(4, 4, 1, False), BasicBlock(4, 6, 2, projection)])
    return Fn(call, stem=conv(3, 4, use_bias=False), bn=norm(4), blocks=blocks, fc=linear(6, 3))


def preactivation() -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        x = m.stem(x)
        y = m.conv1(nnx.relu(m.bn1(x)))
        x = x + m.conv2(nnx.relu(m.bn2(y)))
        return m.fc(nnx.relu(m.bn3(x)).mean((1, 2)))

    parts = {f"bn{i}": norm(4) for i in (1, 2, 3)}
    return Fn(call, stem=conv(3, 4), conv1=conv(4, 4), conv2=conv(4, 4), fc=linear(4, 3), **parts)


def nin() -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        x = nnx.relu(m.cccp1(nnx.relu(m.conv1(x))))
        return nnx.relu(m.cccp2(nnx.avg_pool(x, (2, 2), (2, 2)))).mean((1, 2))

    return Fn(call, conv1=conv(3, 4, 5), cccp1=conv(4, 4, 1), cccp2=conv(4, 3, 1))


def inception() -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        pooled = nnx.max_pool(x, (3, 3), (1, 1), "SAME")
        branches = [m.b1(x), m.b3(nnx.relu(m.b3_reduce(x))), m.pool(pooled)]
        return m.fc(flat(nnx.relu(jnp.concatenate(branches, axis=-1))))

    return Fn(call, b1=conv(3, 2, 1), b3_reduce=conv(3, 2, 1), b3=conv(2, 3), pool=conv(3, 2, 1), fc=linear(448, 3))


def containers() -> nnx.Module:
    def call(m: Any, x: jax.Array) -> jax.Array:
        for layer in (*m.in_list, m.in_dict["first"], *m.in_tuple, m.nnx_list[0], m.nnx_dict["a"]):
            x = nnx.relu(layer(x))
        return x

    return Fn(
        call,
        in_list=nnx.data([linear(6, 5), linear(5, 6)]),
        in_dict=nnx.data({"first": linear(6, 4)}),
        in_tuple=nnx.data((linear(4, 5), linear(5, 4))),
        nnx_list=nnx.List([linear(4, 3)]),
        nnx_dict=nnx.Dict(a=linear(3, 4)),
    )


def shared() -> nnx.Module:
    layer = conv(4, 4)

    def call(m: Any, x: jax.Array) -> jax.Array:
        return nnx.relu(m.again(nnx.relu(m.middle(nnx.relu(m.layer(m.stem(x)))))))

    return Fn(call, stem=conv(3, 4), layer=layer, middle=conv(4, 4, 1), again=layer)


def shared_norms(same: bool) -> nnx.Module:
    """One layer called twice, with one batch norm for both calls or one for each."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        x = nnx.relu(m.bn1(m.layer(x)))
        return nnx.relu((m.bn1 if same else m.bn2)(m.layer(x)))

    return Fn(call, layer=linear(6, 6), bn1=norm(6), **({} if same else {"bn2": norm(6)}))


@nnx.jit
def _jitted(layer: nnx.Module, x: jax.Array) -> jax.Array:
    return nnx.relu(layer(x))


@nnx.remat
def _rematerialised(layer: nnx.Module, bn: nnx.Module, x: jax.Array) -> jax.Array:
    return nnx.relu(bn(layer(x)))


def nested() -> nnx.Module:
    return Fn(
        lambda m, x: m.c(_rematerialised(m.b, m.bn, _jitted(m.a, x))),
        a=conv(3, 4),
        b=conv(4, 4),
        bn=norm(4),
        c=conv(4, 3),
    )


def hand_written_scale() -> nnx.Module:
    return Fn(
        lambda m, x: m.b(nnx.relu(m.a(x) * m.gamma + m.beta)),
        a=linear(6, 5),
        gamma=nnx.Param(jnp.zeros(5)),
        beta=nnx.Param(jnp.zeros(5)),
        b=linear(5, 3),
    )


def vmapped() -> nnx.Module:
    return Fn(lambda m, x: jax.vmap(lambda image: nnx.relu(m.bn(m.a(image))).mean((0, 1)))(x), a=conv(3, 4), bn=norm(4))


def tokens() -> nnx.Module:
    return Fn(
        lambda m, x: m.b(nnx.relu(m.a(x.reshape(x.shape[0] * 4, -1)))).reshape(x.shape[0], -1),
        a=linear(48, 5),
        b=linear(5, 3),
    )


def small_dtype() -> nnx.Module:
    return Fn(
        lambda m, x: m.b(nnx.relu(m.bn(m.a(x)))).astype(jnp.float32),
        a=conv(3, 4, dtype=jnp.bfloat16),
        bn=norm(4, dtype=jnp.bfloat16),
        b=conv(4, 3, dtype=jnp.bfloat16),
    )


def exact(model: nnx.Module, site: Any) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and bias of z that change nothing."""
    layer: Any = get(model, site.path)
    shape = site.geometry.matrix_shape
    matrix = site.scale[:, None] * np.asarray(layer.kernel[...], np.float64).reshape(shape.p, shape.n).T
    return matrix.astype(np.float32), site.shift.astype(np.float32)


def plain_layer(model: nnx.Module, site: Any, matrix: np.ndarray, bias: np.ndarray) -> nnx.Module:
    """A new nnx.Conv or nnx.Linear, made from the site alone, that replaces the layer: z = x matrix' + bias."""
    rows, shift = unfold(site, matrix, bias)
    g, dtype = site.geometry, get(model, site.path).dtype
    if site.kind == "linear":
        new = build(lambda: linear(g.c_in, g.c_out, dtype=dtype))
    else:
        options: dict[str, Any] = {"strides": g.strides, "padding": g.padding, "kernel_dilation": g.dilation}
        new = build(lambda: nnx.Conv(g.c_in, g.c_out, g.window, dtype=dtype, rngs=RNGS(0), **options))
    layer: Any = new
    layer.kernel[...] = jnp.asarray(rows.T.reshape(layer.kernel.shape))
    layer.bias[...] = jnp.asarray(shift)
    return new
