"""Steps of LC-model-compression, timed by its own code: PyTorch, CPU. `bench_lc.py --peer` runs this in another Python.

    python lc_peer.py CHECKOUT MNIST.npz EPOCHS WEIGHTS

CHECKOUT is the reader's own copy of github UCMerced-ML/LC-model-compression. The L step is that of its LeNet-300
example, but for its data loader: images lie in one tensor, which is faster. Prints one line of JSON. Needs no package
of ours.
"""

import json
import sys
import time
from typing import Any

import numpy as np

BATCH = 256


def l_step(torch: Any, lc: Any, data: str, epochs: int) -> dict[str, float]:
    """Seconds of an epoch of an L step, with one thread and with two; the example's pruning task."""
    from lc.compression_types import ConstraintL0Pruning  # pyright: ignore[reportMissingImports]
    from lc.models.torch import lenet300_classic  # pyright: ignore[reportMissingImports]
    from lc.torch import AsVector, ParameterTorch  # pyright: ignore[reportMissingImports]

    with np.load(data) as arrays:
        x = arrays["x_train"].reshape(-1, 784).astype(np.float32) / 255
        y = torch.from_numpy(arrays["y_train"].astype(np.int64))
    x = torch.from_numpy(x - x.mean(axis=0))
    device, model = torch.device("cpu"), lenet300_classic()
    getters = [lambda m=m: m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tasks = {ParameterTorch(getters, device): (AsVector, ConstraintL0Pruning(kappa=13310), "pruning")}
    algorithm = lc.Algorithm(model, tasks, [1e-3], None, None)
    algorithm.mu = 1e-3
    algorithm.c_step(0)
    for parameter in tasks:
        parameter.target = parameter.delta_theta
    algorithm.release()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(epochs):
            order = torch.randperm(len(x))
            for rows in order[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
                optimizer.zero_grad()
                loss = model.loss(model(x[rows]), y[rows]) + algorithm.lc_penalty()
                loss.item()
                loss.backward()
                optimizer.step()
        found[f"{threads}_threads"] = (time.perf_counter() - start) / epochs
    return found


def c_step(count: int) -> dict[str, float]:
    """Seconds of its k-means with four values, from scratch and from the codebook before."""
    from lc.compression_types import AdaptiveQuantization  # pyright: ignore[reportMissingImports]

    values = np.random.default_rng(0).laplace(size=count)
    form, seconds = AdaptiveQuantization(k=4), []
    for step in range(2):
        form.step_number, form.mu = step, 1e-3
        start = time.perf_counter()
        form.compress(values * (1 + 0.01 * step))
        seconds.append(time.perf_counter() - start)
    return {"cold": seconds[0], "warm": seconds[1]}


def main() -> None:
    """Time both; what the peer prints goes to standard error."""
    checkout, data, epochs, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    sys.path.insert(0, checkout)
    out, sys.stdout = sys.stdout, sys.stderr
    import lc  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    found = {"l_step": l_step(torch, lc, data, epochs), "c_step": c_step(count), "torch": torch.__version__}
    out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
