"""The rivals: their distances against independent computations, and what they learn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distill_utils as du
from study.methods.matching import feature_distance, gradient_distance, match


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Two synthetic images that require gradients, and five real ones."""
    return torch.randn(2, 1, 4, 4).double().requires_grad_(), torch.randn(5, 1, 4, 4).double()


def test_the_gradient_distance_adds_one_minus_cosine_over_the_rows_of_weights(smooth, images):
    network, label = smooth().double(), torch.tensor([0.0, 1.0, 0.0]).double()

    def rows(batch: torch.Tensor) -> list[torch.Tensor]:
        network.zero_grad()
        F.cross_entropy(network(batch.detach()), torch.full((len(batch),), 1)).backward()
        weights = [w for name, w in network.named_parameters() if "weight" in name]
        return [row.clone() for w in weights for row in w.grad]

    pairs = zip(*map(rows, images), strict=True)
    expected = sum(1 - float(ours @ theirs / ours.norm() / theirs.norm()) for ours, theirs in pairs)
    assert float(gradient_distance(network, *images, label).detach()) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [gradient_distance, feature_distance])
def test_the_slopes_of_a_distance_are_those_of_finite_differences(smooth, images, distance):
    network, (synthetic, real) = smooth().double(), images
    label = torch.tensor([0.0, 0.0, 1.0]).double()
    assert torch.autograd.gradcheck(lambda each: distance(network, each, real, label), (synthetic,))


def test_the_feature_distance_compares_mean_features(smooth, images):
    network, label = smooth().double(), torch.zeros(3).double()
    synthetic, real = (nn.Sequential(*list(network)[:-1])(each).mean(0) for each in images)
    expected = ((synthetic - real) ** 2).sum()
    torch.testing.assert_close(feature_distance(network, *images, label), expected)
    assert float(feature_distance(network, images[1], images[1], label).detach()) == 0


@pytest.mark.parametrize(
    ("distance", "options"),
    [
        (gradient_distance, {"learning_rate": 1.0, "matches": 3, "updates": 2}),
        (feature_distance, {"learning_rate": 3.0}),
    ],
)
def test_matching_improves_noise_and_repeats(toy, smooth, distance, options):
    def accuracy(iterations: int) -> tuple[float, torch.Tensor]:
        noise, labels = du.initialize(toy, "noise", steps=1, per_class=2)
        distilled = du.DistilledSet(noise, labels, epochs=30, step_size=0.1)
        if iterations:
            more = {"iterations": iterations, "batch_size": 16, **options}
            match(distilled, toy, smooth, distance=distance, **more)
        return du.evaluate(distilled, toy.test, smooth, networks=5).mean, distilled.images

    (before, _), (after, first), (_, second) = accuracy(0), accuracy(60), accuracy(60)
    assert after > 95 > 60 > before
    assert torch.equal(first, second)


def test_sets_of_several_steps_are_refused(toy, smooth):
    distilled = du.DistilledSet(*du.initialize(toy, "noise", steps=2))
    with pytest.raises(ValueError, match="distilled: has 2 steps; give a set of one step"):
        match(distilled, toy, smooth, distance=feature_distance, iterations=1, learning_rate=1.0)
