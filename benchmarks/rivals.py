"""Other ways to the same outer gradient, written to be compared with.

Each takes a distilled set and pairs of a fresh network and a real batch, and leaves the mean gradient over the pairs
in the distilled set, as `distill_utils.outer_gradient` does. All train one network after the other.
"""

import copy

import higher
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du


def higher_loop(distilled: du.DistilledSet, draws: list[du.Draw]) -> None:
    """One `higher` loop for each network, as in the work this began from."""
    distilled.zero_grad()
    for network, real in draws:
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        with higher.innerloop_ctx(network, optimizer) as (trained, inner):
            for images, labels, step_size in distilled.schedule():
                inner.step(F.cross_entropy(trained(images), labels), override={"lr": [step_size]})
            (F.cross_entropy(trained(real.images), real.labels) / len(draws)).backward()


def functional_loop(distilled: du.DistilledSet, draws: list[du.Draw]) -> None:
    """A hand-written loop over `torch.func.functional_call`: nothing but torch."""
    distilled.zero_grad()
    for network, real in draws:
        weights = {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}
        for images, labels, step_size in distilled.schedule():
            loss = F.cross_entropy(functional_call(network, weights, images), labels)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            pairs = zip(weights.items(), gradients, strict=True)
            weights = {name: weight - step_size * gradient for (name, weight), gradient in pairs}
        (F.cross_entropy(functional_call(network, weights, real.images), real.labels) / len(draws)).backward()


def torchopt_loop(distilled: du.DistilledSet, draws: list[du.Draw]) -> None:
    """TorchOpt's MetaSGD. Its step size is a number, so the learned ones multiply the loss, which comes to the same."""
    import torchopt  # only the benchmark has it installed

    distilled.zero_grad()
    for network, real in draws:
        network = copy.deepcopy(network)  # whose weights MetaSGD replaces
        optimizer = torchopt.MetaSGD(network, lr=1.0)
        for images, labels, step_size in distilled.schedule():
            optimizer.step(step_size * F.cross_entropy(network(images), labels))
        (F.cross_entropy(network(real.images), real.labels) / len(draws)).backward()


def step_products(distilled: du.DistilledSet, draws: list[du.Draw]) -> None:
    """Per-step Hessian-vector products, as in the original code: back-propagation through time by hand.

    The forward pass keeps the graph of each gradient step, cut off from the step before it; the backward pass takes
    the adjoint of the weights, all of them in one vector, through one of them at a time.
    """
    distilled.zero_grad()
    for network, real in draws:
        forward = flat_forward(network)
        weights = nn.utils.parameters_to_vector(network.parameters()).detach().requires_grad_()
        schedule, taken = list(distilled.schedule()), []
        for update in schedule:
            images, labels, step_size = (tensor.detach().requires_grad_() for tensor in update)
            loss = F.cross_entropy(forward(weights, images), labels)
            (move,) = torch.autograd.grad(loss, weights, step_size, create_graph=True)
            taken.append((move, (weights, images, step_size)))
            weights = (weights - move).detach().requires_grad_()

        loss = F.cross_entropy(forward(weights, real.images), real.labels) / len(draws)
        (adjoint,) = torch.autograd.grad(loss, weights)
        learned, gradients = [], []
        for (images, _, step_size), (move, inputs) in zip(reversed(schedule), reversed(taken), strict=True):
            through_weights, *rest = torch.autograd.grad(move, inputs, -adjoint)
            adjoint = adjoint + through_weights
            learned += [images, step_size]
            gradients += rest
        torch.autograd.backward(learned, gradients)


def flat_forward(network: nn.Module):
    """A function of all weights in one vector, and of images: the network's scores."""
    named = list(network.named_parameters())
    sizes = [weight.numel() for _, weight in named]

    def forward(weights: Tensor, images: Tensor) -> Tensor:
        parts = zip(named, weights.split(sizes), strict=True)
        return functional_call(network, {name: part.view_as(weight) for (name, weight), part in parts}, images)

    return forward
