"""Training from scratch, and the controls of a learned schedule."""

import pytest
import torch
from torch import nn

import distill_utils as du
from study.experiments import protocols
from study.experiments.experiment import Experiment
from study.experiments.protocols import train_from_scratch
from tests.conftest import Smooth, assert_same


def normalized() -> nn.Module:
    layers = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.fixture
def distilled(toy) -> du.DistilledSet:
    return du.DistilledSet(*du.initialize(toy, "real", steps=4), epochs=2, soft_labels=True)


def test_it_is_ordinary_training_and_leaves_the_random_state_alone(distilled, toy):
    """Against torch's own Adam, on all twelve images at once, which fill a minibatch five times."""
    options, state = {"seen": 400, "step_size": 0.05}, torch.get_rng_state()
    trained = train_from_scratch(distilled, Smooth, networks=range(3), **options)
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = (part.detach().flatten(0, 1) for part in (distilled.images, distilled.labels))
    for number, network in enumerate(trained):
        with du.seeded(10_000, number):
            expected = Smooth()
        optimizer = torch.optim.Adam(expected.parameters(), lr=0.05)
        for _ in range(7):
            optimizer.zero_grad()
            nn.functional.cross_entropy(expected(images), labels).backward()
            optimizer.step()
        torch.testing.assert_close(network(toy.test.images), expected(toy.test.images))
    (second,) = train_from_scratch(distilled, Smooth, networks=[1], **options)
    assert_same(second, trained[1])


def test_batch_normalization_is_tested_in_evaluation_mode(distilled, toy):
    """An image's class does not depend on the other images: they all belong to one class here."""
    images = toy.test.images[toy.test.labels == 0]
    (network,) = train_from_scratch(distilled, normalized, seen=60 * 60, step_size=0.05)
    assert (network(images).argmax(-1) == 0).all()


@pytest.mark.parametrize(("name", "value"), [("seen", 1.5), ("step_size", 0)])
def test_bad_options_are_named(distilled, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: give"):
        train_from_scratch(distilled, Smooth, **{name: value})


def test_controls_have_the_form_and_the_schedule_of_the_set(toy):
    images, labels = du.initialize(toy, "real", steps=2)
    distilled = du.DistilledSet(images, labels, epochs=3, step_size=torch.rand(6), momentum=0.5)
    controls = protocols.undistilled_sets(distilled, toy)
    assert list(controls) == [(name, "true") for name in protocols.UNDISTILLED]
    for control in controls.values():
        torch.testing.assert_close(control.step_sizes, distilled.step_sizes)
        assert control.inner == distilled.inner
        assert control.images.shape == images.shape
        assert torch.equal(control.labels, labels)


def test_the_best_control_gets_borrowed_and_learned_step_sizes(toy, tmp_path, mnist_root):
    experiment = Experiment("toy", 0, tmp_path, torch.device("cpu"), mnist_root)
    images, labels = du.initialize(toy, "real", steps=2)
    schedule = du.DistilledSet(images, labels, step_size=torch.tensor([0.2, 0.4]))
    sets = {
        ("real", "true"): du.DistilledSet(images, labels),
        ("real", "wrong"): du.DistilledSet(images, labels.roll(1, -1)),
    }
    chosen = protocols.Controls(experiment, toy, Smooth).choose(sets, schedule, iterations=3)
    constant = [(*content, "constant") for content in sets]
    assert [*chosen] == [*constant, ("real", "true", "distilled"), ("real", "true", "learned")]
    assert all(torch.equal(control.images, images) for control in chosen.values())
    *_, borrowed, learned = (control.step_sizes for control in chosen.values())
    torch.testing.assert_close(borrowed, schedule.step_sizes)
    assert not torch.equal(learned, borrowed)


def test_neighbors_classify_their_own_images_correctly():
    digits = du.load_digits(device="cpu")
    images, labels = du.initialize(digits, "real", steps=3)
    same = du.Split(images.flatten(0, 1), labels.flatten(0, 1).argmax(-1))
    assert protocols.neighbor_accuracy(images, labels, same, 2, 1) == 100
    assert 50 < protocols.neighbor_accuracy(images, labels, digits.test, 1, 3) < 100
