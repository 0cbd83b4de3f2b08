"""Trains a fully connected network in JAX on an exported set, without this project's code: see README.md."""

import jax
import numpy as np
import optax
import pandas as pd

table = pd.read_parquet("mnist-31kB.parquet", columns=["image", "soft_label"])
images = np.stack([np.concatenate(image[0]) for image in table.image])  # [n, 784]
labels = np.stack(table.soft_label)  # [n, 10]
with np.load("mnist.npz") as file:
    test_images, test_labels = file["x_test"].reshape(-1, 784) / 255, file["y_test"]


def network(weights, images):
    return jax.nn.relu(images @ weights[0] + weights[1]) @ weights[2] + weights[3]


@jax.jit
def update(weights, state, images, labels):
    loss = lambda w: optax.softmax_cross_entropy(network(w, images), labels).mean()  # noqa: E731
    changes, state = adam.update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, changes), state


draw, adam, random = jax.nn.initializers.lecun_normal(), optax.adam(1e-3), np.random.default_rng(0)
keys = jax.random.split(jax.random.key(0))
weights = draw(keys[0], (784, 256)), np.zeros(256), draw(keys[1], (256, 10)), np.zeros(10)
state = adam.init(weights)
for _ in range(40):
    for rows in random.permutation(len(images))[: len(images) // 64 * 64].reshape(-1, 64):
        weights, state = update(weights, state, images[rows], labels[rows])
scores = network(weights, (test_images - 0.1307) / 0.3081)
print(f"{100 * (scores.argmax(1) == test_labels).mean():.1f}%")
