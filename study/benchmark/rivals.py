"""Other ways to compute the same meta-gradient, for comparison.

Each takes a distilled set, fresh networks and the real batch that they share, and leaves the gradient of the networks'
mean loss in the distilled set. All use plain SGD, and but for the ensemble train one network after the other.
"""

import copy
from collections.abc import Callable
from functools import partial

import higher
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du


def higher_loop(distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split) -> None:
    """One `higher` loop for each network."""
    distilled.zero_grad()
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        with higher.innerloop_ctx(network, optimizer) as (trained, inner):
            for images, labels, step_size in distilled.schedule():
                inner.step(F.cross_entropy(trained(images), labels), override={"lr": [step_size]})
            (F.cross_entropy(trained(real.images), real.labels) / len(networks)).backward()


def functional_unroll(
    network: nn.Module, distilled: du.DistilledSet, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """A hand-written loop over `torch.func.functional_call`; returns the trained network, a function of images."""
    weights = {
        name: weight.detach().requires_grad_() for name, weight in network.named_parameters()
    }
    for images, labels, step_size in distilled.schedule():
        found = loss(functional_call(network, weights, images), labels)
        gradients = torch.autograd.grad(found, list(weights.values()), create_graph=True)
        pairs = zip(weights.items(), gradients, strict=True)
        weights = {name: weight - step_size * gradient for (name, weight), gradient in pairs}
    return partial(functional_call, network, weights)


def functional_loop(distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split) -> None:
    """One hand-written loop for each network: nothing but torch."""
    distilled.zero_grad()
    for network in networks:
        trained = functional_unroll(network, distilled, F.cross_entropy)
        (F.cross_entropy(trained(real.images), real.labels) / len(networks)).backward()


def functional_ensemble(
    distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split
) -> None:
    """One hand-written loop for all networks, in an ensemble."""
    distilled.zero_grad()
    trained = functional_unroll(du.Ensemble(networks), distilled, du.cross_entropy)
    (du.cross_entropy(trained(real.images), real.labels) / len(networks)).backward()


def torchopt_loop(distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split) -> None:
    """TorchOpt's MetaSGD. Its step size is a number, so the learned ones multiply the loss instead."""
    import torchopt  # only the benchmark has it installed

    distilled.zero_grad()
    for network in networks:
        network = copy.deepcopy(network)  # whose weights MetaSGD replaces
        optimizer = torchopt.MetaSGD(network, lr=1.0)
        for images, labels, step_size in distilled.schedule():
            optimizer.step(step_size * F.cross_entropy(network(images), labels))
        (F.cross_entropy(network(real.images), real.labels) / len(networks)).backward()


def step_products(distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split) -> None:
    """Hessian-vector products step by step, as in the original code: backpropagation through time by hand.

    The forward pass keeps the graph of each gradient step, detached from the step before it; the backward pass takes
    the adjoint of the weights, all of them in one vector, through one step at a time.
    """
    distilled.zero_grad()
    for network in networks:
        forward = flat_forward(network)
        weights = nn.utils.parameters_to_vector(network.parameters()).detach().requires_grad_()
        schedule, taken = list(distilled.schedule()), []
        for update in schedule:
            images, labels, step_size = (tensor.detach().requires_grad_() for tensor in update)
            loss = F.cross_entropy(forward(weights, images), labels)
            (move,) = torch.autograd.grad(loss, weights, step_size, create_graph=True)
            taken.append((move, (weights, images, step_size)))
            weights = (weights - move).detach().requires_grad_()

        loss = F.cross_entropy(forward(weights, real.images), real.labels) / len(networks)
        (adjoint,) = torch.autograd.grad(loss, weights)
        learned, gradients = [], []
        for (images, _, step_size), (move, inputs) in zip(
            reversed(schedule), reversed(taken), strict=True
        ):
            through_weights, *rest = torch.autograd.grad(move, inputs, -adjoint)
            adjoint = adjoint + through_weights
            learned += [images, step_size]
            gradients += rest
        torch.autograd.backward(learned, gradients)


def forward_over_reverse(
    distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split
) -> None:
    """MixFlow-MG (Kemaev et al. 2025): as `step_products`, but each product is a derivative, in the direction of the
    adjoint, of the step's gradient. Only the weights before each step are stored, and no graph."""
    distilled.zero_grad()
    for network in networks:
        forward = flat_forward(network)
        weights = nn.utils.parameters_to_vector(network.parameters()).detach()
        schedule, taken = list(distilled.schedule()), []
        for images, labels, step_size in schedule:
            loss = F.cross_entropy(forward(weights.requires_grad_(), images.detach()), labels)
            (slope,) = torch.autograd.grad(loss, weights)
            taken.append((weights, slope))
            weights = (weights - step_size * slope).detach()

        loss = F.cross_entropy(forward(weights.requires_grad_(), real.images), real.labels) / len(
            networks
        )
        (adjoint,) = torch.autograd.grad(loss, weights)
        learned, gradients = [], []
        for (images, labels, step_size), (weights, slope) in zip(
            reversed(schedule), reversed(taken), strict=True
        ):
            with forward_ad.dual_level():
                inputs = forward_ad.make_dual(weights, adjoint), images
                found = torch.autograd.grad(F.cross_entropy(forward(*inputs), labels), inputs)
                through_weights, through_images = (
                    forward_ad.unpack_dual(each).tangent for each in found
                )
            learned += [images, step_size]
            gradients += [-step_size.detach() * through_images, -adjoint @ slope]
            adjoint = adjoint - step_size.detach() * through_weights
        torch.autograd.backward(learned, gradients)


def flat_forward(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of all weights in one vector, and of images: the network's scores."""
    named = list(network.named_parameters())
    sizes = [weight.numel() for _, weight in named]

    def forward(weights: Tensor, images: Tensor) -> Tensor:
        parts = zip(named, weights.split(sizes), strict=True)
        return functional_call(
            network, {name: part.view_as(weight) for (name, weight), part in parts}, images
        )

    return forward
