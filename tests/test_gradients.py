"""The unroll's gradients, against two computations that share no code with it."""

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du


def make_problem(toy, *, momentum, learn_labels=False, share_step_sizes=False, epochs=2):
    """A distilled set of 2 steps × 3 images and a real batch, in float64."""
    torch.set_default_dtype(torch.float64)
    images, labels = du.noise_start(toy, steps=2)
    distilled = du.DistilledSet(
        images.double(),
        labels.double(),
        epochs=epochs,
        step_size=0.3,
        momentum=momentum,
        learn_labels=learn_labels,
        share_step_sizes=share_step_sizes,
    )
    return distilled, du.Split(toy.train.images.double(), toy.train.labels)


def functional_loss(network, real, images, labels, step_sizes, momentum):
    """The outer loss by a hand-written loop over `torch.func.functional_call`; its own update order and SGD."""
    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    for update in range(len(step_sizes)):
        x, y = images[update % len(images)], labels[update % len(images)]
        loss = -(y * functional_call(network, weights, x).log_softmax(-1)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        velocity = {name: momentum * velocity[name] + g for name, g in zip(weights, gradients, strict=True)}
        weights = {name: weights[name] - step_sizes[update] * velocity[name] for name in weights}
    return F.cross_entropy(functional_call(network, weights, real.images), real.labels)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("learn_labels", [False, True])
@pytest.mark.parametrize("make_network", ["smooth", "lenet"])
def test_gradients_equal_a_functional_loop(toy, smooth, momentum, learn_labels, make_network):
    distilled, real = make_problem(toy, momentum=momentum, learn_labels=learn_labels)
    if make_network == "lenet":
        distilled.images.data = torch.randn(2, 3, 1, 28, 28)
        real = du.Split(torch.randn(20, 1, 28, 28), torch.randint(0, 3, (20,)))
    network = smooth() if make_network == "smooth" else du.LeNet(classes=3)
    loss = du.outer_loss(network, distilled, real)
    expected = functional_loss(network, real, distilled.images, distilled.labels, distilled.step_sizes, momentum)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    learned = list(distilled.parameters())
    assert len(learned) == 2 + learn_labels
    gradients = zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True)
    for ours, theirs in gradients:
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("share_step_sizes", [False, True])
def test_gradients_equal_finite_differences(toy, smooth, momentum, share_step_sizes):
    distilled, real = make_problem(toy, momentum=momentum, learn_labels=True, share_step_sizes=share_step_sizes)
    network = smooth()

    def loss() -> float:
        trained = du.unroll(network, distilled, track_higher_grads=False)
        return F.cross_entropy(trained(real.images), real.labels).item()

    du.outer_loss(network, distilled, real).backward()
    for name, parameter in distilled.named_parameters():
        entries, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for entry in range(0, len(entries), max(1, len(entries) // 7)):
            start = entries[entry].item()
            entries[entry] = start + 1e-5
            above = loss()
            entries[entry] = start - 1e-5
            below = loss()
            entries[entry] = start
            assert gradient[entry].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-9), (name, entry)


def test_evaluation_unrolls_as_training_does(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.9)
    network = smooth()
    tracked = du.unroll(network, distilled)(real.images)
    plain = du.unroll(network, distilled, track_higher_grads=False)(real.images)
    assert torch.equal(tracked, plain)


def test_unroll_is_ordinary_sgd_and_spares_the_network(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.0, epochs=3)
    network = smooth()
    before = [parameter.clone() for parameter in network.parameters()]
    trained = du.unroll(network, distilled)(real.images)
    assert all(map(torch.equal, before, network.parameters()))

    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(3):
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(distilled.images[step].detach()), distilled.labels[step]).backward()
            optimizer.step()
    torch.testing.assert_close(trained, network(real.images))


def test_outer_gradient_is_the_mean_over_networks(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.0)
    networks = [smooth(), smooth()]
    halves = [du.Split(real.images[:30], real.labels[:30]), du.Split(real.images[30:], real.labels[30:])]
    losses = [du.outer_loss(network, distilled, half) for network, half in zip(networks, halves, strict=True)]
    expected = torch.autograd.grad(sum(losses) / 2, distilled.images)[0]

    mean_loss = du.outer_gradient(distilled, lambda: networks.pop(0), halves)
    assert mean_loss == pytest.approx((sum(losses) / 2).item())
    torch.testing.assert_close(distilled.images.grad, expected)
