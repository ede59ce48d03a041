"""The small network against NumPy, and that it learns scikit-learn's digits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import LEARNING
from models.learner import Frozen, check_questions
from models.vision.cnn import CNN, CNNConfig, CNNLearner
from train.tasks.images import read_digits

CONFIG = CNNConfig(4, 1, 3, (2, 3), 5)


def by_hand(params, image):
    """One image, in float64: padding, cross-correlation, the largest of four."""
    x = image.astype(np.float64)
    for i in range(2):
        kernel, bias = (np.asarray(params[f"conv_{i}"][n], np.float64) for n in ("kernel", "bias"))
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        side = len(x)
        y = np.empty((side, side, kernel.shape[3]))
        for row in range(side):
            for column in range(side):
                window = padded[row : row + 3, column : column + 3]
                y[row, column] = np.einsum("abc,abcd->d", window, kernel) + bias
        y = np.maximum(y, 0)
        halves = [(slice(a, None, 2), slice(b, None, 2)) for a in (0, 1) for b in (0, 1)]
        x = np.max([y[one] for one in halves], axis=0)
    hidden, head = params["hidden"], params["head"]
    features = np.maximum(x.ravel() @ hidden["kernel"] + hidden["bias"], 0)
    return features, features @ head["kernel"] + head["bias"]


def test_it_is_that_of_numpy():
    cnn, draw = CNN(CONFIG), np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), cnn.shapes())
    images = draw.uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32)
    features, logits = jax.jit(cnn.features)(params, images), jax.jit(cnn.logits)(params, images)
    for i, image in enumerate(images):
        want = by_hand(params, image)
        np.testing.assert_allclose(features[i], want[0], atol=1e-4)
        np.testing.assert_allclose(logits[i], want[1], atol=1e-4)
    pixels = np.array([0, 255], np.uint8).repeat(8).reshape(1, 4, 4, 1)
    same = cnn.logits(params, pixels), cnn.logits(params, pixels / np.float32(127.5) - 1)
    np.testing.assert_allclose(*same, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 does not divide images of side 6"):
        CNN(dataclasses.replace(CONFIG, image_size=6))
    cnn = CNN(CONFIG)
    with pytest.raises(ValueError, match=r"images are \(8, 8, 1\), the model reads \(4, 4, 1\)"):
        cnn.logits(cnn.init(jax.random.key(0)), jnp.zeros((2, 8, 8, 1)))


def test_it_learns_digits():
    """Through its learner and the row of classifiers."""
    found = read_digits()
    train, test = found.train, found.held_out
    assert test is not None
    learner = CNNLearner(CNN(CNNConfig(8, 1, 10, (8, 16), 32)))
    row, options = objectives.resolve("classes", LEARNING)
    check_questions(learner, row, options)
    images, labels = np.asarray(train.images), np.asarray(train.labels)
    params = learner.model.init(jax.random.key(0))
    optimizer = optax.adam(3e-3)

    def loss(params, batch):
        batches = {"train": batch}
        context = learner.context(params, Frozen(), batches, row.questions(options))
        total, rows = row.loss(context, batches, options)["train"]
        return total / rows

    @jax.jit
    def learn(params, order):
        def step(carry, rows):
            params, state = carry
            batch = {"image": jnp.asarray(images)[rows], "gold": jnp.asarray(labels)[rows]}
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), order)
        return params, values

    order = np.random.default_rng(0).integers(0, len(labels), (200, 64))
    params, values = learn(params, order)
    assert values[0] == pytest.approx(np.log(10), rel=1e-5)  # the head is 0
    answers = jnp.argmax(learner.model.logits(params, np.asarray(test.images)), -1)
    assert np.mean(answers == test.labels) > 0.8
