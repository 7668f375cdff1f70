"""The objectives of training, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unified_approx import evaluate, zoo
from unified_approx.calling import forward
from unified_approx.distances import output_distance, relative_gap
from unified_approx.objectives import CrossEntropy, OutputMatch
from unified_approx.training import Recipe


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2)]


def divergence(taught, logits, temperature):
    return temperature**2 * evaluate.agreement(np.asarray(taught) / temperature, np.asarray(logits) / temperature)["kl"]


def test_cross_entropy_and_the_teachers_divergence(logits):
    own, taught = logits
    labels = jnp.array([0, 1, 2, 0, 1])
    hard = -np.mean(np.asarray(jax.nn.log_softmax(own))[np.arange(5), labels])
    objective = Recipe(distill=0.25, temperature=2.0).objective()
    assert objective.loss(own, None, labels) == pytest.approx(hard, rel=1e-5)
    assert objective.loss(own, taught, labels) == pytest.approx(
        0.75 * hard + 0.25 * divergence(taught, own, 2), rel=1e-4
    )
    assert CrossEntropy(distill=1.0).loss(taught, taught, labels) == pytest.approx(0, abs=1e-6)
    smooth = CrossEntropy(label_smoothing=1.0).loss(own, None, labels)
    assert smooth == pytest.approx(-float(jnp.mean(jax.nn.log_softmax(own))), rel=1e-5)


def test_output_match_of_logits_is_the_divergence(logits):
    own, taught = logits
    assert OutputMatch(temperature=3.0).loss([own], [taught]) == pytest.approx(divergence(taught, own, 3), rel=1e-4)
    assert OutputMatch().loss([own], [own]) == pytest.approx(0, abs=1e-6)


def test_output_match_of_anything_else_is_the_relative_gap(logits):
    own, taught = (z.reshape(5, 3, 1) for z in logits)
    gap = float(np.mean(np.sum((own - taught) ** 2, axis=(1, 2)) / np.sum(taught**2, axis=(1, 2))))
    assert OutputMatch().loss([own], [taught]) == pytest.approx(gap, rel=1e-5)
    blocks = OutputMatch(blocks=(("a",), ("b",)))
    assert blocks.loss([own, taught], [taught, taught]) == pytest.approx(gap / 2, rel=1e-5)
    assert blocks.loss([own[..., 0]] * 2, [taught[..., 0]] * 2) == pytest.approx(gap, rel=1e-5)
    assert relative_gap(jnp.zeros((2, 3)), jnp.ones((2, 3))) == 6
    assert output_distance(taught, own) == pytest.approx(5 * gap, rel=1e-5)


def test_what_blocks_give_is_what_they_were_called_for():
    model, x = zoo.create("resnet20"), jnp.ones((2, 32, 32, 3))
    model.eval()
    paths = (("blocks", 0), ("bn1",))
    block, norm = OutputMatch(blocks=paths).observe(forward, model, x)
    expected = model.bn1(model.conv1(x))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    np.testing.assert_allclose(block, model.blocks[0](jax.nn.relu(expected)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(OutputMatch().observe(forward, model, x)[0], model(x), rtol=1e-5, atol=1e-6)
    model.spare = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="blocks: 'spare' is not called"):
        OutputMatch(blocks=(("spare",),)).observe(forward, model, x)
