"""The unroll's gradients, against two computations that share no code with it."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import Smooth, make_set

SGD, MOMENTUM = {"step_size": 0.3}, {"step_size": 0.3, "momentum": 0.9}
ADAM = {"step_size": 0.02, "optimizer": "Adam"}
STORED = [SGD, {**MOMENTUM, "codes": "random"}, {**ADAM, "codes": "generated"}]


def make_problem(toy, **options) -> tuple[du.DistilledSet, du.Split]:
    """A distilled set and real images, in float64."""
    torch.set_default_dtype(torch.float64)
    real = du.Split(toy.train.images.double(), toy.train.labels)
    return make_set(toy, "noise", **options), real


def functional_loss(network: nn.Module, distilled: du.DistilledSet, real: du.Split) -> Tensor:
    """The outer loss by a loop over `functional_call`, with an order, SGD and Adam of its own."""
    inner, sizes = distilled.inner, distilled.step_sizes
    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    first, second = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for t, size in enumerate(sizes, 1):
        x, y = distilled.images[(t - 1) % 2], distilled.labels[(t - 1) % 2]
        loss = -(y * functional_call(network, weights, x).log_softmax(-1)).sum(-1).mean()
        slopes = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
        for name, g in zip(weights, slopes, strict=True):
            if inner["optimizer"] == "SGD":
                first[name] = inner["momentum"] * first[name] + g
                change = first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                root = (second[name] + 1e-40).sqrt()  # 1e-40: a slope where a gradient is 0
                change = first[name] / (root + 1e-4) * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            weights[name] = weights[name] - size * change
    return F.cross_entropy(functional_call(network, weights, real.images), real.labels)


@pytest.mark.parametrize("inner", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize(("architecture", "count"), [("Smooth", 1), ("Smooth", 3), ("LeNet", 2)])
def test_gradients_equal_a_functional_loop(toy, inner, architecture, count):
    distilled, real = make_problem(toy, soft_labels=True, **inner)
    networks = [Smooth() for _ in range(count)]
    if architecture == "LeNet":
        distilled.images.data = torch.randn(2, 3, 1, 28, 28)
        real = du.Split(torch.randn(20, 1, 28, 28), torch.randint(0, 3, (20,)))
        networks = [du.LeNet(classes=3) for _ in range(count)]
    loss = du.outer_loss(du.Ensemble(networks) if count > 1 else networks[0], distilled, real)
    expected = sum(functional_loss(network, distilled, real) for network in networks) / count
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    learned = [distilled.images, distilled.raw_step_sizes, distilled.label_scores]
    gradients = torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", STORED, ids=str)
def test_gradients_equal_finite_differences(toy, options):
    distilled, real = make_problem(toy, soft_labels=True, **options)
    network, learned = Smooth(), [*distilled.parameters()]
    du.outer_loss(network, distilled, real).backward()
    gradient = nn.utils.parameters_to_vector([parameter.grad for parameter in learned])
    start = nn.utils.parameters_to_vector(learned).detach()
    for entry in range(0, len(start), 3):
        losses = []
        for change in (1e-5, -1e-5):
            moved = start.clone()
            moved[entry] += change
            nn.utils.vector_to_parameters(moved, learned)
            trained = du.unroll(network, distilled, differentiable=False)
            losses.append(F.cross_entropy(trained(real.images)[0], real.labels).item())
        slope = (losses[0] - losses[1]) / 2e-5
        assert gradient[entry].item() == pytest.approx(slope, rel=1e-5, abs=1e-9), entry


def test_unroll_trains_alike_for_distillation_and_evaluation_and_changes_no_network(toy):
    distilled, real = make_problem(toy, **MOMENTUM)
    network = Smooth()
    before = network(real.images)
    expected = du.unroll(network, distilled)(real.images)
    plain = du.unroll(network, distilled, differentiable=False)
    assert torch.equal(plain(real.images), expected)
    assert all(weight.grad_fn is None for weight in plain.parameters()), "no graph takes memory"
    with torch.no_grad():
        assert torch.equal(du.unroll(network, distilled)(real.images), expected)
    assert torch.equal(network(real.images), before)
