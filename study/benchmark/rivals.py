"""Other ways to compute the meta-gradient of one network. Each adds it to the gradient of the distilled set, and trains
by plain SGD."""

import copy
from collections.abc import Callable
from functools import partial

import higher
import jax
import torch
from jax import numpy as jnp
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du


def higher_loop(network: nn.Module, distilled: du.DistilledSet, real: du.Split) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with higher.innerloop_ctx(network, optimizer) as (trained, inner):
        for images, labels, step_size in distilled.schedule():
            inner.step(F.cross_entropy(trained(images), labels), override={"lr": [step_size]})
    F.cross_entropy(trained(real.images), real.labels).backward()


def torchopt_loop(network: nn.Module, distilled: du.DistilledSet, real: du.Split) -> None:
    """MetaSGD's step size is a number, so the learned ones multiply the loss."""
    import torchopt  # only the benchmark has it installed

    network = copy.deepcopy(network)  # whose weights MetaSGD replaces
    optimizer = torchopt.MetaSGD(network, lr=1.0)
    for images, labels, step_size in distilled.schedule():
        optimizer.step(step_size * F.cross_entropy(network(images), labels))
    F.cross_entropy(network(real.images), real.labels).backward()


# --------------------------------------------------------------------------- loops of torch alone
def functional_loop(
    network: nn.Module, distilled: du.DistilledSet, real: du.Split, *, update: Callable
) -> None:
    """The weights are one vector. `update` turns them into the next ones."""
    shapes = {name: weight.shape for name, weight in network.named_parameters()}

    def loss(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(functional_call(network, named, images), labels)

    weights = nn.utils.parameters_to_vector(network.parameters()).detach().requires_grad_()
    for images, labels, step_size in distilled.schedule():
        weights = update(loss, weights, images, labels, step_size)
    loss(weights, *real).backward()


def differentiable_update(loss, weights, images, labels, step_size) -> Tensor:
    """Keeps the graph of the gradient: automatic differentiation does the rest."""
    (slope,) = autograd.grad(loss(weights, images, labels), weights, create_graph=True)
    return weights - step_size * slope


class ProductUpdate(autograd.Function):
    """Hessian-vector products by hand, as in the original code."""

    @staticmethod
    @torch.enable_grad()
    def forward(ctx, loss, weights, images, labels, step_size) -> Tensor:
        inputs = (tensor.detach().requires_grad_() for tensor in (weights, images, step_size))
        weights, images, step_size = ctx.inputs = tuple(inputs)
        value = loss(weights, images, labels)
        (ctx.move,) = autograd.grad(value, weights, step_size, create_graph=True)
        return (weights - ctx.move).detach()

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        of_weights, of_images, of_step_size = autograd.grad(ctx.move, ctx.inputs, -slope)
        return None, slope + of_weights, of_images, None, of_step_size


class ForwardUpdate(autograd.Function):
    """Keeps no graph, as in MixFlow-MG (Kemaev et al. 2025): the product is the derivative, in one
    direction, of a gradient that the backward pass computes again."""

    @staticmethod
    @torch.enable_grad()
    def forward(ctx, loss, weights, images, labels, step_size) -> Tensor:
        weights = weights.detach().requires_grad_()
        (gradient,) = autograd.grad(loss(weights, images.detach(), labels), weights)
        ctx.inputs = loss, weights, images.detach(), labels, step_size.detach(), gradient
        return (weights - step_size * gradient).detach()

    @staticmethod
    @torch.enable_grad()
    def backward(ctx, slope: Tensor) -> tuple:
        loss, weights, images, labels, step_size, gradient = ctx.inputs
        with forward_ad.dual_level():
            inputs = forward_ad.make_dual(weights, slope), images.requires_grad_()
            duals = autograd.grad(loss(*inputs, labels), inputs)
            of_weights, of_images = (-step_size * forward_ad.unpack_dual(d).tangent for d in duals)
        return None, slope + of_weights, of_images, None, -slope @ gradient


# ------------------------------------------------------------------------------------------- JAX
def jax_scan(network: nn.Module, distilled: du.DistilledSet, real: du.Split) -> None:
    """For LeNets."""
    learned = distilled.images, distilled.step_sizes
    tensors = learned, distilled.labels, [*network.parameters()], real
    arrays = jax.tree.map(lambda tensor: jnp.asarray(tensor.detach().numpy()), tensors)
    autograd.backward(learned, [*map(torch.from_dlpack, jax_gradient(*arrays))])


@jax.jit
@jax.grad
def jax_gradient(learned: tuple, labels: jax.Array, weights: list, real: du.Split) -> jax.Array:
    """The outer loss, of which `jax.grad` gives the gradient for `learned`: images, step sizes."""
    images, step_sizes = learned

    def update(weights: list, turn: tuple) -> tuple[list, None]:
        step, step_size = turn
        slopes = jax.grad(jax_loss)(weights, images[step], labels[step])
        return [w - step_size * slope for w, slope in zip(weights, slopes, strict=True)], None

    steps = jnp.arange(len(step_sizes)) % len(images)
    trained, _ = jax.lax.scan(update, weights, (steps, step_sizes))
    return jax_loss(trained, real.images, jax.nn.one_hot(real.labels, labels.shape[-1]))


def jax_loss(weights: list, images: jax.Array, labels: jax.Array) -> jax.Array:
    """LeNet's loss for probabilities; its weights and biases take turns."""
    images = convolve(images, *weights[:2], padding=2)
    hidden = convolve(images, *weights[2:4], padding=0).reshape(len(images), -1)
    for weight, bias in zip(weights[4:-2:2], weights[5:-2:2], strict=True):
        hidden = jax.nn.relu(hidden @ weight.T + bias)
    scores = hidden @ weights[-2].T + weights[-1]
    return -(labels * jax.nn.log_softmax(scores)).sum(-1).mean()


def convolve(images: jax.Array, weight: jax.Array, bias: jax.Array, *, padding: int) -> jax.Array:
    """5×5 convolution, 2×2 max pooling and ReLU. The convolution is a matrix product, as JAX's own
    takes two to ten times as long on a CPU."""
    images = jnp.pad(images, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    n, _, h, w = images.shape
    parts = [images[:, :, i : h - 4 + i, j : w - 4 + j] for i in range(5) for j in range(5)]
    kernels = weight.reshape(*weight.shape[:2], 25)
    images = jnp.einsum("ncphw,ocp->nohw", jnp.stack(parts, 2), kernels) + bias[:, None, None]
    return jax.nn.relu(images.reshape(n, -1, h // 2 - 2, 2, w // 2 - 2, 2).max((3, 5)))


RIVALS = {
    "`higher` loop": higher_loop,
    "TorchOpt MetaSGD": torchopt_loop,
    "`functional_call` loop": partial(functional_loop, update=differentiable_update),
    "per-step products, as the original": partial(functional_loop, update=ProductUpdate.apply),
    "forward over reverse, as MixFlow-MG": partial(functional_loop, update=ForwardUpdate.apply),
    "JAX, compiled": jax_scan,
}
