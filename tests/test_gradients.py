"""The unroll's gradients, against two computations that share no code with it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import make_decoder

SGD, MOMENTUM, ADAM = {"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "Adam"}  # inner loops


def make_problem(toy, *, epochs=2, optimizer="SGD", **options):
    """A distilled set of 2 steps × 3 images and a real batch, in float64."""
    torch.set_default_dtype(torch.float64)
    images, labels = du.initialize(toy, "noise", steps=2)
    step_size = 0.3 if optimizer == "SGD" else 0.02
    options = {"epochs": epochs, "optimizer": optimizer, "step_size": step_size, **options}
    real = du.Split(toy.train.images.double(), toy.train.labels)
    return du.DistilledSet(images.double(), labels.double(), **options), real


def functional_loss(network, real, images, labels, step_sizes, *, optimizer="SGD", momentum=0.0):
    """The outer loss by a hand-written loop over `torch.func.functional_call`; its own update order, SGD and Adam."""
    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for update in range(len(step_sizes)):
        x, y = images[update % len(images)], labels[update % len(images)]
        loss = -(y * functional_call(network, weights, x).log_softmax(-1)).sum(-1).mean()
        values = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        gradients = dict(zip(weights, values, strict=True))
        if optimizer == "SGD":
            velocity = {
                name: momentum * velocity[name] + gradient for name, gradient in gradients.items()
            }
            weights = {
                name: weights[name] - step_sizes[update] * velocity[name] for name in weights
            }
        else:
            velocity = {
                name: 0.9 * velocity[name] + 0.1 * gradient for name, gradient in gradients.items()
            }
            square = {
                name: 0.999 * square[name] + 0.001 * gradient**2
                for name, gradient in gradients.items()
            }
            size = (
                step_sizes[update] * (1 - 0.999 ** (update + 1)) ** 0.5 / (1 - 0.9 ** (update + 1))
            )
            # 1e-40: a slope where a gradient is 0
            roots = {name: (square[name] + 1e-40).sqrt() for name in weights}
            weights = {
                name: weights[name] - size * velocity[name] / (roots[name] + 1e-4)
                for name in weights
            }
    return F.cross_entropy(functional_call(network, weights, real.images), real.labels)


def assert_same_gradients(loss, expected, learned):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("architecture", ["smooth", "LeNet"])
def test_gradients_equal_a_functional_loop(toy, smooth, inner, soft_labels, architecture):
    distilled, real = make_problem(toy, soft_labels=soft_labels, **inner)
    if architecture == "LeNet":
        distilled.images.data = torch.randn(2, 3, 1, 28, 28)
        real = du.Split(torch.randn(20, 1, 28, 28), torch.randint(0, 3, (20,)))
    network = smooth() if architecture == "smooth" else du.LeNet(classes=3)
    learned = list(distilled.parameters())
    assert len(learned) == 2 + soft_labels
    loss = du.outer_loss(network, distilled, real)
    expected = functional_loss(
        network, real, distilled.images, distilled.labels, distilled.step_sizes, **inner
    )
    assert_same_gradients(loss, expected, learned)


def test_gradients_reach_the_images_of_a_multi_formation(toy, smooth):
    """Against the functional loop on images cut out and enlarged one by one."""
    _, real = make_problem(toy)
    labels = torch.eye(3).repeat(2, 4, 1)
    images, formation = torch.randn(2, 3, 1, 4, 4), du.MultiFormation(2)
    distilled = du.DistilledSet(images, labels, decoder=formation, epochs=2, step_size=0.3)
    network = smooth()
    cut = [
        F.interpolate(
            image[None, :, row : row + 2, column : column + 2], scale_factor=2, mode="bilinear"
        )[0]
        for image in distilled.images.flatten(0, 1)
        for row in (0, 2)
        for column in (0, 2)
    ]
    expected = functional_loss(
        network, real, torch.stack(cut).unflatten(0, (2, 12)), labels, distilled.step_sizes
    )
    assert_same_gradients(
        du.outer_loss(network, distilled, real), expected, list(distilled.parameters())
    )


@pytest.mark.parametrize(
    ("inner", "factor"), [(SGD, 1), (MOMENTUM, 2), (ADAM, 1), (ADAM, 2), (SGD, 0)]
)
def test_gradients_equal_finite_differences(toy, smooth, inner, factor):
    distilled, real = make_problem(toy, soft_labels=True, **inner)
    labels, options = distilled.labels.detach(), {"epochs": 2, "soft_labels": True, **inner}
    if factor > 1:
        labels, options["decoder"] = labels.repeat(1, 4, 1), du.MultiFormation(2)
        distilled = du.DistilledSet(distilled.images.detach(), labels, **options)
    if factor == 0:  # codes and a decoder
        codes = torch.randn(2, labels.shape[1], 5, 1, 1)
        distilled = du.DistilledSet(codes, labels, decoder=make_decoder(), **options)
    network = smooth()

    def loss() -> float:
        trained = du.unroll(network, distilled, differentiable=False)
        return F.cross_entropy(trained(real.images)[0], real.labels).item()

    du.outer_loss(network, distilled, real).backward()
    for name, parameter in distilled.named_parameters():
        entries, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for entry in range(0, len(entries), max(1, len(entries) // 4)):
            value = entries[entry].item()
            entries[entry] = value + 1e-5
            above = loss()
            entries[entry] = value - 1e-5
            below = loss()
            entries[entry] = value
            assert gradient[entry].item() == pytest.approx(
                (above - below) / 2e-5, rel=1e-5, abs=1e-9
            ), (name, entry)


def test_evaluation_trains_as_distillation_does(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.9)
    network = smooth()
    differentiable = du.unroll(network, distilled)(real.images)
    plain = du.unroll(network, distilled, differentiable=False)(real.images)
    assert torch.equal(differentiable, plain)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unroll_is_ordinary_sgd_and_leaves_the_network_as_it_is(toy, smooth, momentum):
    distilled, real = make_problem(toy, momentum=momentum, epochs=3)
    network = smooth()
    before = [parameter.clone() for parameter in network.parameters()]
    trained = du.unroll(network, distilled)(real.images)
    assert all(map(torch.equal, before, network.parameters()))

    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=momentum)
    for _ in range(3):
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(
                network(distilled.images[step].detach()), distilled.labels[step]
            ).backward()
            optimizer.step()
    torch.testing.assert_close(trained[0], network(real.images))


def test_unroll_trains_where_the_caller_wants_no_gradients(toy, smooth):
    distilled, real = make_problem(toy)
    network = smooth()
    expected = du.unroll(network, distilled)(real.images)
    with torch.no_grad():
        assert torch.equal(du.unroll(network, distilled)(real.images), expected)


def test_outer_loss_takes_another_inner_loop(toy, smooth):
    distilled, real = make_problem(toy)
    network = smooth()

    def unroll(network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        return du.as_ensemble(network)

    loss = du.outer_loss(network, distilled, real, unroll=unroll)
    torch.testing.assert_close(loss, F.cross_entropy(network(real.images), real.labels))


class Shifted(nn.Module):
    """Convolutions, a parameter outside torch.nn's layers, an unused one, and a buffer that differs in each network."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.unused = nn.Parameter(torch.rand(2))
        self.register_buffer("shift", torch.rand(4, 1, 1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.scale * self.convolution(images) + self.shift))


@pytest.mark.parametrize("inner", [MOMENTUM, ADAM])
@pytest.mark.parametrize("architecture", ["smooth", "shifted", "LeNet"])
def test_the_gradient_of_an_ensemble_is_the_mean_of_its_networks(toy, smooth, architecture, inner):
    distilled, real = make_problem(toy, soft_labels=True, **inner)
    if architecture == "LeNet":
        distilled.images.data = torch.randn(2, 3, 1, 28, 28)
        real = du.Split(torch.randn(7, 1, 28, 28), torch.randint(0, 3, (7,)))
    make_network = {"smooth": smooth, "shifted": Shifted, "LeNet": lambda: du.LeNet(classes=3)}[
        architecture
    ]
    networks = [make_network() for _ in range(3)]
    loss = du.outer_loss(du.Ensemble(networks), distilled, real)
    expected = sum(du.outer_loss(network, distilled, real) for network in networks) / 3
    assert_same_gradients(loss, expected, list(distilled.parameters()))


def test_training_takes_less_memory_where_no_gradient_is_asked_for(toy, smooth):
    """No graph: nothing of the set is reachable from the trained network."""
    distilled, _ = make_problem(toy)
    trained = du.unroll(smooth(), distilled, differentiable=False)
    assert all(weight.grad_fn is None for weight in trained.parameters())
