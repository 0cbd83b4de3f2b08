"""The meta-gradient in JAX: compiled, the inner loop a scan, the convolutions matrix products, one network after the
other. On a CPU, JAX's own convolutions take two to ten times as long, and `vmap` over networks takes longer than `map`.
"""

import jax
import torch
from jax import numpy as jnp
from torch import nn

import distill_utils as du

Weights = list[jax.Array]  # of LeNet's layers, in order: weight, bias, weight, bias, ...


def convolve(images: jax.Array, weight: jax.Array, bias: jax.Array, *, padding: int) -> jax.Array:
    """Convolution [n, c, h, w] as one product of patches and kernels (im2col)."""
    images = jnp.pad(images, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    size = weight.shape[-1]
    height, width = (length - size + 1 for length in images.shape[-2:])
    shifts = [(row, column) for row in range(size) for column in range(size)]
    patches = jnp.stack(
        [images[:, :, row : row + height, column : column + width] for row, column in shifts], 2
    )
    return (
        jnp.einsum("ncphw,ocp->nohw", patches, weight.reshape(*weight.shape[:2], -1))
        + bias[:, None, None]
    )


def pool(images: jax.Array) -> jax.Array:
    """Max pooling by 2×2."""
    n, c, h, w = images.shape
    return images.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def lenet(weights: Weights, images: jax.Array) -> jax.Array:
    """Scores [n, classes]."""
    images = jax.nn.relu(pool(convolve(images, *weights[:2], padding=2)))
    hidden = jax.nn.relu(pool(convolve(images, *weights[2:4], padding=0))).reshape(len(images), -1)
    for weight, bias in zip(weights[4:-2:2], weights[5:-2:2], strict=True):
        hidden = jax.nn.relu(hidden @ weight.T + bias)
    return hidden @ weights[-2].T + weights[-1]


def cross_entropy(weights: Weights, images: jax.Array, labels: jax.Array) -> jax.Array:
    return -(labels * jax.nn.log_softmax(lenet(weights, images))).sum(-1).mean()


@jax.jit
def gradient(
    learned: tuple,
    labels: jax.Array,
    networks: Weights,
    real_images: jax.Array,
    real_labels: jax.Array,
):
    """The gradient of the networks' mean loss with respect to images and step sizes, which are `learned`."""

    def outer_loss(learned: tuple, weights: Weights) -> jax.Array:
        images, step_sizes = learned

        def update(weights: Weights, place: tuple) -> tuple[Weights, None]:
            step, step_size = place
            slopes = jax.grad(cross_entropy)(weights, images[step], labels[step])
            return [
                weight - step_size * slope for weight, slope in zip(weights, slopes, strict=True)
            ], None

        steps = jnp.arange(len(step_sizes)) % len(images)
        trained, _ = jax.lax.scan(update, weights, (steps, step_sizes))
        return cross_entropy(trained, real_images, jax.nn.one_hot(real_labels, labels.shape[-1]))

    of_each = jax.lax.map(lambda weights: jax.grad(outer_loss)(learned, weights), networks)
    return [each.mean(0) for each in of_each]


def jax_scan(distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split) -> None:
    """Leaves the meta-gradient in the distilled set, as the functions of `rivals.py` do; for LeNets on a CPU alone."""
    distilled.zero_grad()
    weights = [
        jnp.stack([jnp.asarray(each.detach().numpy()) for each in of_networks])
        for of_networks in zip(*(network.parameters() for network in networks), strict=True)
    ]
    learned = distilled.images, distilled.step_sizes
    images, sizes, labels, *real = (
        jnp.asarray(each.detach().numpy()) for each in (*learned, distilled.labels, *real)
    )
    found = gradient((images, sizes), labels, weights, *real)
    torch.autograd.backward(learned, [torch.from_dlpack(each) for each in found])
