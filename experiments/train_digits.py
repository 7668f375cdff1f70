"""Train the package's digits network: `python experiments/train_digits.py` rewrites the packaged weights.

1,297 training images of scikit-learn's digits, shifted by up to one pixel at random; AdamW with a one-cycle learning
rate. Same seed, same machine, same weights. The test images are only used for the final accuracy.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int
from safetensors.numpy import save

from unified_approx import datasets, evaluate, zoo

TARGET = 98.0  # percent of the test images
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


def shifted(
    x: Float32[np.ndarray, "n h w c"], rng: np.random.Generator, pixels: int = 1
) -> Float32[np.ndarray, "n h w c"]:
    """Each image moved by up to `pixels` in both directions, zeros coming in."""
    _, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    top, left = rng.integers(0, 2 * pixels + 1, (2, len(x), 1, 1))
    rows, columns = top + np.arange(h)[None, :, None], left + np.arange(w)[None, None, :]
    return padded[np.arange(len(x))[:, None, None], rows, columns]


def make_step(optimizer: optax.GradientTransformation, graphdef: Any) -> Callable[..., Any]:
    """One jitted step on the parameters of a network without batch statistics."""

    def loss(params: Any, x: Float[Array, "b h w c"], y: Int[Array, " b"]) -> Float[Array, ""]:
        logits = nnx.merge(graphdef, params)(x)
        targets = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1]), LABEL_SMOOTHING)
        return jnp.mean(optax.softmax_cross_entropy(logits, targets))

    @jax.jit
    def step(params: Any, state: Any, x: Float[Array, "b h w c"], y: Int[Array, " b"]) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(data: datasets.Dataset, epochs: int, seed: int, on_epoch: Callable[[int, float], None]) -> nnx.Module:
    """Train from scratch; `on_epoch(epoch, mean loss)` is called after each epoch."""
    x = zoo.entry("digits").preprocess(data.x_train)
    graphdef, params = nnx.split(zoo.create("digits", seed=seed))
    per_epoch = len(x) // BATCH
    schedule = optax.cosine_onecycle_schedule(epochs * per_epoch, LEARNING_RATE)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    step, state = make_step(optimizer, graphdef), optimizer.init(params)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        losses = []
        for rows in rng.permutation(len(x))[: per_epoch * BATCH].reshape(per_epoch, BATCH):
            params, state, value = step(params, state, shifted(x[rows], rng), data.y_train[rows])
            losses.append(value)
        on_epoch(epoch, float(jnp.mean(jnp.stack(losses))))
    return nnx.merge(graphdef, params)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=zoo.entry("digits").weights, help="safetensors file to write")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}: give at least 1")

    start = time.perf_counter()
    data, entry = datasets.load("digits"), zoo.entry("digits")
    model = train(data, args.epochs, args.seed, lambda epoch, loss: print(f"epoch {epoch + 1:3d}  loss {loss:.4f}"))
    accuracy = evaluate.accuracy(model, entry.preprocess(data.x_test), data.y_test)
    seconds = time.perf_counter() - start
    about = {"network": "digits", "layout": "torch", "script": "experiments/train_digits.py"}
    about |= {"seed": args.seed, "epochs": args.epochs, "test_accuracy": round(accuracy, 2)}
    tensors = zoo.torch_tensors(model, entry.torch_names, entry.flatten)
    # One entry: safetensors writes several in random order, and then equal weights would not be equal files.
    args.out.write_bytes(save(tensors, {"about": json.dumps(about)}))
    print(f"test accuracy {accuracy:.2f} % after {seconds:.0f} s; {args.out.stat().st_size} bytes in {args.out}")
    if args.json:
        check = {"value": accuracy, "relation": ">=", "target": TARGET, "holds": accuracy >= TARGET}
        result = {
            "command": "train_digits",
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
            "seed": args.seed,
            "seconds": round(seconds, 1),
            "rows": [{"network": "digits", "accuracy": accuracy, "epochs": args.epochs}],
            "checks": {"digits_accuracy": check},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
