"""Training from scratch, and scores."""

import math

import pytest
import torch
from torch import nn

import distill_utils as du
from study.experiments.protocols import (
    hard_labels,
    label_robust_score,
    train_from_scratch,
    with_schedule_of,
)
from study.methods.decoders import LowResolution, low_resolution


class Normalized(nn.Sequential):
    """A network with batch normalization."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        )


@pytest.fixture
def noisy(toy) -> du.Split:
    """A test split that is hard enough for accuracies to differ, and shifted so that evaluation mode matters."""
    images = toy.test.images.repeat(20, 1, 1, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return du.Split(images + 2 * noise + 1, toy.test.labels.repeat(20))


@pytest.fixture
def distilled(toy) -> du.DistilledSet:
    return du.DistilledSet(*du.initialize(toy, "real", steps=4), epochs=2, soft_labels=True)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_it_is_ordinary_training(distilled, noisy, smooth, name):
    """Against torch's own optimizer, on all images at once, where no order matters."""
    options = {"epochs": 7, "step_size": 0.05, "seed": 5, "optimizer": name}
    result = train_from_scratch(distilled, noisy, smooth, networks=2, **options)
    torch.manual_seed(5)
    networks = [smooth() for _ in range(2)]  # all drawn before any is trained
    content = (distilled.images, distilled.labels)
    images, labels = (each.detach().flatten(0, 1) for each in content)
    for network, found in zip(networks, result.values, strict=True):
        momentum = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(network.parameters(), lr=0.05, **momentum)
        for _ in range(7):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        assert found == du.accuracy(network, noisy)


@pytest.mark.parametrize("kind", ["smooth", "normalized"])
def test_it_does_not_depend_on_the_grouping(distilled, noisy, smooth, kind):
    """Groups of 8 and 2 give what ten networks give one by one, in shuffled batches. It used to shuffle between draws,
    and to test an ensemble's batch normalization in training mode."""
    make_network = smooth if kind == "smooth" else Normalized
    options = {"networks": 10, "epochs": 6, "batch_size": 5, "step_size": 0.02}
    grouped, one_by_one = (
        train_from_scratch(distilled, noisy, make_network, side_by_side=each, **options).values
        for each in (True, False)
    )
    assert len(set(grouped.tolist())) > 1
    assert torch.equal(grouped, one_by_one)


def test_batch_normalization_is_tested_in_evaluation_mode(distilled, toy):
    """An image's class does not depend on the other images: they all belong to one class here."""
    same = du.Split(toy.test.images[toy.test.labels == 0], toy.test.labels[toy.test.labels == 0])
    options = {"networks": 3, "epochs": 60, "step_size": 0.05}
    assert train_from_scratch(distilled, same, Normalized, **options).mean > 95


def test_batch_normalization_takes_its_statistics_from_other_images(distilled, noisy):
    """Running means move to the shifted test images, which a network trained on others does badly on."""
    options = {"networks": 3, "epochs": 60, "step_size": 0.05, "side_by_side": False}
    shifted = du.Split(noisy.images + 5, noisy.labels)
    own, other = (
        train_from_scratch(distilled, shifted, Normalized, statistics=statistics, **options).mean
        for statistics in (None, shifted.images)
    )
    assert other > own + 10


def test_augmented_training_shows_no_image_twice(distilled, toy):
    seen = []

    class Watching(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(images.detach().clone())
            return super().forward(images)

    make_network = lambda: Watching(nn.Flatten(), nn.Linear(16, 3))  # noqa: E731
    train_from_scratch(distilled, toy.test, make_network, networks=1, epochs=3, black=-1.0)
    sums = [round(float(image.sum()), 4) for batch in seen for image in batch]
    assert len(sums) == len(set(sums)) == 3 * 12


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm2d(1), nn.Dropout])
def test_networks_that_distillation_refuses_are_trained(toy, layer):
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2))

    def make_network() -> nn.Module:
        return nn.Sequential(layer(), nn.Flatten(), nn.Linear(16, 3))

    with pytest.raises(ValueError, match=r"make_network: .* leave out dropout"):
        du.evaluate(distilled, toy.test, make_network, networks=1)
    options = {"networks": 2, "epochs": 60, "step_size": 0.1}
    for each in (True, False):
        result = train_from_scratch(distilled, toy.test, make_network, side_by_side=each, **options)
        assert result.mean > 60


def test_it_repeats_and_leaves_the_random_state_alone(distilled, noisy, smooth):
    state = torch.get_rng_state()
    runs = [
        train_from_scratch(distilled, noisy, smooth, networks=3, epochs=2, seed=s).values
        for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(each.grad is None for each in distilled.parameters())  # as nobody asked for it
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", ["networks", "epochs", "batch_size"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_counts_that_train_nothing_are_named(distilled, toy, smooth, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: give a whole number of at least 1"):
        train_from_scratch(distilled, toy.test, smooth, **{name: value})


def test_optimizers_that_are_none_are_named(distilled, toy, smooth):
    with pytest.raises(ValueError, match="optimizer='sgd': give SGD or Adam"):
        train_from_scratch(distilled, toy.test, smooth, optimizer="sgd")


def test_another_sets_schedule_keeps_its_parametrization(toy):
    options = {"epochs": 3, "step_size": torch.rand(6), "optimizer": "Adam"}
    low = low_resolution(*du.initialize(toy, "real", steps=2), **options)
    images, labels = torch.randn(2, 3, 1, 14, 14), hard_labels(low.labels.roll(1, 1))
    other = with_schedule_of(low, images, labels)
    assert isinstance(other.decoder, LowResolution)
    assert other.decode().shape == (2, 3, 1, 4, 4)
    assert other.inner == low.inner
    assert torch.equal(other.images, images)
    assert torch.equal(other.labels, labels)
    torch.testing.assert_close(other.step_sizes, low.step_sizes)


def test_label_robust_score_is_as_published():
    """(e^α - 1/e) / (e - 1/e), with α = (improvement - recovery) / 2 as fractions of 1."""
    recovery, improvement, score = label_robust_score(90.0, 80.0, 60.0, 98.0)
    assert (recovery, improvement) == (18, 30)
    assert score == pytest.approx((math.exp(0.06) - 1 / math.e) / (math.e - 1 / math.e))
    score = label_robust_score(100, 100, 0, 100)[2]
    assert score == pytest.approx((math.exp(0.5) - 1 / math.e) / 2.3504, rel=1e-4)


def test_hard_labels_keep_the_most_probable_class():
    assert hard_labels(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [[0.0, 1.0, 0.0]]
