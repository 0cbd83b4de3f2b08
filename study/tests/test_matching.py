"""Matching: its distances against independent computations, and what it learns."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import distill_utils as du
from study.methods.matching import feature_distance, gradient_distance, match
from tests.conftest import Smooth, assert_same

LABEL = torch.tensor([0.0, 1.0, 0.0]).double()


def gradient_distance_by_hand(network, synthetic: Tensor, real: Tensor) -> float:
    """1 - cosine of the gradients of each row of weights, added."""

    def rows(images: Tensor) -> list[Tensor]:
        network.zero_grad()
        F.cross_entropy(network(images), torch.ones(len(images), dtype=torch.int64)).backward()
        return [row.clone() for layer in (network[1], network[3]) for row in layer.weight.grad]

    pairs = zip(rows(synthetic), rows(real), strict=True)
    return sum(float(1 - a @ b / a.norm() / b.norm()) for a, b in pairs)


@torch.no_grad()
def feature_distance_by_hand(network, synthetic: Tensor, real: Tensor) -> float:
    features = [torch.tanh(network[1](images.flatten(1))) for images in (synthetic, real)]
    return float((features[0].mean(0) - features[1].mean(0)).norm() ** 2)


HAND = {gradient_distance: gradient_distance_by_hand, feature_distance: feature_distance_by_hand}


@pytest.mark.parametrize("distance", HAND)
def test_a_distance_and_its_gradient_are_those_of_independent_computations(distance):
    network, real = Smooth().double(), torch.randn(5, 1, 4, 4).double()
    synthetic = torch.randn(2, 1, 4, 4).double().requires_grad_()
    found = float(distance(network, synthetic, real, LABEL).detach())
    assert found == pytest.approx(HAND[distance](network, synthetic.detach(), real))
    assert torch.autograd.gradcheck(lambda x: distance(network, x, real, LABEL), (synthetic,))


OPTIONS = {
    gradient_distance: {"learning_rate": 1.0, "matches": 3, "updates": 2},
    feature_distance: {"learning_rate": 3.0},
}


@pytest.mark.parametrize("distance", OPTIONS)
def test_matching_improves_noise_and_repeats(toy, distance):
    images, labels = du.initialize(toy, "noise", steps=1, per_class=2)
    sets = [du.DistilledSet(images, labels, epochs=30, step_size=0.1) for _ in range(3)]
    for distilled in sets[1:]:
        options = {"iterations": 60, "batch_size": 16, **OPTIONS[distance]}
        match(distilled, toy, Smooth, distance=distance, **options)
    assert_same(sets[1], sets[2])
    accuracies = [du.evaluate(x, toy.test, Smooth, networks=5).mean for x in sets[:2]]
    assert accuracies[0] < 60 < 95 < accuracies[1]


def test_sets_of_several_steps_are_refused(toy):
    distilled = du.DistilledSet(*du.initialize(toy, "noise", steps=2))
    with pytest.raises(ValueError, match="distilled: has 2 steps; give a set of one step"):
        match(distilled, toy, Smooth, distance=feature_distance, iterations=1, learning_rate=1.0)
