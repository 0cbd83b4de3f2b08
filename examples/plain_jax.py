"""Trains a fully connected network in JAX on an exported set, without this project's code: see README.md."""

import jax
import numpy as np
import optax
import pandas as pd
from jax import numpy as jnp

table = pd.read_parquet("mnist-31kB.parquet", columns=["image", "soft_label"])
images = np.stack([np.concatenate(image[0]) for image in table.image])  # [n, 784]
labels = np.stack(table.soft_label)  # [n, 10]
with np.load("mnist.npz") as file:
    test_images, test_labels = file["x_test"].reshape(-1, 784), file["y_test"]
test_images = (test_images / 255 - 0.1307) / 0.3081


def network(layers, images):
    for weight, bias in layers[:-1]:
        images = jax.nn.relu(images @ weight + bias)
    weight, bias = layers[-1]
    return images @ weight + bias


def loss(layers, images, labels):
    return optax.softmax_cross_entropy(network(layers, images), labels).mean()


@jax.jit
def update(layers, state, images, labels):
    changes, state = adam.update(jax.grad(loss)(layers, images, labels), state)
    return optax.apply_updates(layers, changes), state


draw, key, shuffle = jax.nn.initializers.lecun_normal(), jax.random.key(0), np.random.default_rng(0)
shapes = (784, 256), (256, 256), (256, 10)
layers = [
    (draw(jax.random.fold_in(key, i), shape), jnp.zeros(shape[1])) for i, shape in enumerate(shapes)
]
adam = optax.adam(1e-3)
state = adam.init(layers)
for _ in range(40):
    for rows in shuffle.permutation(len(images))[: len(images) // 60 * 60].reshape(-1, 60):
        layers, state = update(layers, state, images[rows], labels[rows])
print(f"{100 * (network(layers, test_images).argmax(1) == test_labels).mean():.1f}%")
