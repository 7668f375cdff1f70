"""Train a network of the zoo from scratch: `python experiments/train_reference.py --network resnet20 --out FILE`.

SGD with a one-cycle learning rate; CIFAR-10 images are padded, cropped and mirrored. 5,000 training images are held
out, the weights of the best epoch on them are written, and the test images are only used for the final accuracy. A
killed run goes on from its work folder.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.numpy import save

from unified_approx import datasets, evaluate, zoo
from unified_approx.files import replacing
from unified_approx.results import network_row, write_results
from unified_approx.training import Recipe, train

HELD_OUT = 5000


def main(
    network: str = "resnet20",
    out: Annotated[Path, typer.Option(help="Safetensors file in PyTorch's layouts, as zoo.load reads it.")] = Path(
        "reference.safetensors"
    ),
    epochs: int = 30,
    learning_rate: float = 0.2,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    seed: int = 0,
    count: Annotated[int | None, typer.Option(help="Training images; all by default.")] = None,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    work_dir: Annotated[Path, typer.Option(help="Checkpoints.")] = Path(".train_reference"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Train, measure, and write the weights."""
    start, entry = time.perf_counter(), zoo.entry(network)
    images = datasets.load(entry.dataset, data)
    order = np.random.default_rng(seed).permutation(len(images.x_train))[:count]
    held, chosen = np.split(order, [min(HELD_OUT, len(order) // 10)])
    recipe = Recipe(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        augment="crop_flip" if entry.dataset == "cifar10" else None,
        seed=seed,
    )
    shape = (-1, *entry.input_shape)
    x, y = images.x_train.reshape(shape), images.y_train
    done = train(
        zoo.create(network, seed=seed),
        x[chosen],
        y[chosen],
        recipe,
        validation=(x[held], y[held]),
        checkpoint_dir=work_dir / f"{network}-{epochs}-{seed}",
        prepare=entry.normalization(images).on_device,
        progress=print,
    )
    accuracy = evaluate.accuracy(done.model, entry.preprocess(images.x_test, images), images.y_test)
    about = {"network": network, "script": "experiments/train_reference.py", "test_accuracy": round(accuracy, 2)}
    tensors = zoo.torch_tensors(done.model, entry.torch_names, entry.flatten)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        partial.write_bytes(save(tensors, {"about": json.dumps(about)}))
    print(f"test accuracy {accuracy:.2f} % (epoch {done.best} of {len(done.history)}); {out}")
    if json_file is not None:
        row = network_row(
            network=network,
            method="none",
            budget="",
            reference_accuracy=None,
            accuracy=accuracy,
            params_ratio=1.0,
            cr=1.0,
            macs_ratio=1.0,
            epochs=len(done.history),
        )
        command = f"python experiments/train_reference.py --network {network} --epochs {epochs} --seed {seed}"
        write_results(json_file, command, [row], seconds=time.perf_counter() - start, seed=seed)


if __name__ == "__main__":
    typer.run(main)
