import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import rel_entr, softmax

from unified_approx import evaluate, zoo


class Net(nnx.Module):
    """Batch norm, then a dense layer with known weights."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.norm(x))


@pytest.fixture(scope="module")
def model():
    net = zoo.he_normal(lambda: Net(nnx.Rngs(0)))
    net.norm.mean[...] = jnp.array([0.5, -1.0, 0.0, 2.0], jnp.float32)
    return net


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((23, 4)).astype(np.float32)


def expected_logits(model, x):
    shifted = (x - np.asarray(model.norm.mean[...])) / np.sqrt(1 + 1e-5)
    return shifted @ np.asarray(model.fc.kernel[...])


def scaled(model, x):
    return 2 * model(x)


@pytest.mark.parametrize("batch_size", [1, 10, 23, 256])
def test_predict_drops_the_padding_of_the_last_batch(model, x, batch_size):
    logits = evaluate.predict(model, x, batch_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(model, x), rtol=1e-5, atol=1e-5)


def test_predict_takes_jax_arrays_and_another_call(model, x):
    logits = evaluate.predict(model, jnp.asarray(x), 10, call=scaled)
    np.testing.assert_allclose(logits, 2 * expected_logits(model, x), rtol=1e-5, atol=1e-5)


def test_predict_compiles_once_per_structure(model, x):
    evaluate.predict(model, x, 8)
    before = evaluate._run._cache_size()
    other = nnx.clone(model)
    other.fc.kernel[...] = other.fc.kernel[...] + 1
    assert not np.allclose(evaluate.predict(other, x, 8), evaluate.predict(model, x, 8))
    assert evaluate._run._cache_size() == before


def test_the_model_is_evaluated_in_eval_mode_and_left_alone(model, x):
    training = nnx.clone(model)
    training.train()
    logits = evaluate.predict(training, x)
    np.testing.assert_allclose(logits, expected_logits(model, x), rtol=1e-5, atol=1e-5)
    assert not training.norm.use_running_average
    np.testing.assert_array_equal(training.norm.mean[...], model.norm.mean[...])


def test_accuracy_counts(model, x):
    answers = expected_logits(model, x).argmax(1)
    assert evaluate.accuracy(model, x, answers, 10) == 100.0
    wrong = answers.copy()
    wrong[:5] = (wrong[:5] + 1) % 3
    assert evaluate.accuracy(model, x, jnp.asarray(wrong), 10) == pytest.approx(100 * 18 / 23)
    batches = ((x[i : i + 10], wrong[i : i + 10]) for i in range(0, 23, 10))
    assert evaluate.accuracy_of_batches(model, batches) == pytest.approx(100 * 18 / 23)
    with pytest.raises(ValueError, match="batches: there are none"):
        evaluate.accuracy_of_batches(model, [])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.full(23, 3), "labels from 3 to 3, but the network has outputs 0 to 2"),
        (np.array([-1] + [0] * 22), "labels from -1 to 0"),
        (np.zeros(22, int), r"y is int64 \(22,\), expected one integer label for each of 23"),
        (np.zeros(23), "y is float64"),
    ],
)
def test_bad_labels_are_refused_before_anything_runs(model, x, y, message, monkeypatch):
    monkeypatch.setattr(evaluate, "_logits", lambda *args: pytest.fail("the network was run"))
    with pytest.raises(ValueError, match=message):
        evaluate.accuracy(model, x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((0, 4), np.float32)}, r"x has shape \(0, 4\)"),
        ({"x": np.zeros((), np.float32)}, r"x has shape \(\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"call": lambda model, x: model(x)[:, 0]}, "call="),
        ({"call": lambda model, x: {"logits": model(x)}}, "call="),
        ({"call": lambda model, x: model(x)[:1]}, "expected logits"),
    ],
)
def test_predict_refuses(model, x, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.predict(model, **({"x": x} | change))


def test_agreement():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 6)).astype(np.float32)
    found = evaluate.agreement(a, b)
    assert found["kl"] == pytest.approx(rel_entr(softmax(a, axis=1), softmax(b, axis=1)).sum(1).mean(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * np.mean(a.argmax(1) == b.argmax(1)))
    assert evaluate.agreement(a, a + 100) == pytest.approx({"kl": 0, "top1": 100}, abs=1e-6)
    assert np.isfinite(evaluate.agreement(1e4 * a, jnp.asarray(-1e4 * a))["kl"])


@pytest.mark.parametrize(("n", "m"), [(3, 4), (0, 0)])
def test_agreement_refuses(n, m):
    with pytest.raises(ValueError, match=rf"reference is \({n}, 2\), logits \({m}, 2\)"):
        evaluate.agreement(np.zeros((n, 2), np.float32), np.zeros((m, 2), np.float32))
