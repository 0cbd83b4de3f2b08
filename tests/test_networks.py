"""Networks, their training and their evaluation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import Smooth, assert_same, make_set, train_plainly


def test_lenet_is_the_papers():
    network = du.LeNet()
    weights, biases = [*network.parameters()][::2], [*network.parameters()][1::2]
    sizes = [[6, 1, 5, 5], [16, 6, 5, 5], [120, 400], [84, 120], [10, 84]]
    assert [list(weight.shape) for weight in weights] == sizes
    assert not any(bias.any() for bias in biases)
    xavier = (2 / (400 + 120)) ** 0.5
    assert weights[2].std().item() == pytest.approx(xavier, rel=0.02)
    assert du.LeNet(classes=3)(torch.randn(2, 1, 28, 28)).shape == (2, 3)


def test_the_automatic_device_is_one_that_is_there():
    assert torch.zeros(1, device=du.pick_device("auto")).sum() == 0
    assert du.pick_device("cpu") == torch.device("cpu")


def test_a_fixed_initialization_is_always_the_same_and_stays_as_it_is(toy):
    before = torch.get_rng_state()
    factory = du.fixed_initialization(Smooth, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    network = copy.deepcopy(factory())
    du.train(factory(), toy.train, epochs=1)
    assert_same(factory(), network)
    assert not torch.equal(du.fixed_initialization(Smooth, seed=2)()[1].weight, network[1].weight)
    assert du.evaluate(make_set(toy), toy.test, factory, networks=3).std == 0


def test_seeds_repeat_a_block_and_differ():
    def sample(*numbers: int) -> float:
        with du.seeded(*numbers):
            return float(torch.rand(()))

    assert sample(5) == sample(5) == float(torch.rand((), generator=torch.manual_seed(5)))
    assert len({sample(5), sample(6), sample(5, 0), sample(5, 1), sample(5, 0, 1)}) == 5


def test_an_ensemble_trains_copies_of_its_networks(toy):
    networks = [Smooth() for _ in range(3)]
    ensemble = du.train(du.Ensemble(networks), toy.train, epochs=20, batch_size=10)
    assert (du.accuracy(ensemble, toy.test) > 95).all()
    assert max(du.accuracy(network, toy.test) for network in networks) < 95


def test_an_ensemble_tests_and_trains_as_its_layers_do(toy):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    ensemble = du.Ensemble([network, network])
    for training in (True, False, True):
        ensemble.train(training)
        assert torch.equal(*ensemble(toy.test.images)) != training


@pytest.mark.parametrize("copies", [1, 61])  # one part, and several, of which the last is smaller
def test_accuracy_counts_the_whole_split(toy, copies):
    labels = (toy.test.labels + (torch.arange(30) < 6)) % 3
    wrong = du.Split(toy.test.images.repeat(copies, 1, 1, 1), labels.repeat(copies))
    row_means = nn.Sequential(nn.AvgPool2d((1, 4)), nn.Flatten())  # class k has row k bright
    assert du.accuracy(row_means, toy.test) == 100
    assert du.accuracy(row_means, wrong) == 80


def test_evaluation_trains_fresh_networks_as_torch_does_and_leaves_all_as_it_was(toy):
    distilled, before = make_set(toy, step_size=0.05), torch.get_rng_state()
    copied = copy.deepcopy(distilled)
    accuracies = du.evaluate(distilled, toy.test, Smooth, networks=11, seed=5)
    with du.seeded(5):
        networks = [train_plainly(Smooth(), distilled) for _ in range(11)]
    expected = torch.stack([du.accuracy(network, toy.test) for network in networks])
    torch.testing.assert_close(accuracies.values, expected)
    assert accuracies.std > 0
    with torch.no_grad():  # also where the caller wants no gradients, and in smaller groups
        fewer = du.evaluate(distilled, toy.test, Smooth, networks=3, seed=5)
    assert torch.equal(fewer.values, accuracies.values[:3])
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(distilled, copied)
    assert all(parameter.grad is None for parameter in distilled.parameters())


@pytest.mark.parametrize("probabilities", [False, True])
def test_training_is_torchs_in_place_and_in_batches(toy, probabilities):
    images, labels = toy.train.images, F.one_hot(toy.train.labels).float()
    schedule = {"epochs": 2, "step_size": 0.02, "momentum": 0.9}
    expected = train_plainly(Smooth(), du.DistilledSet(images[None], labels[None], **schedule))
    split = du.Split(images, labels if probabilities else toy.train.labels)
    torch.manual_seed(0)  # as above
    network = Smooth()
    assert du.train(network, split, epochs=2, batch_size=60) is network
    torch.testing.assert_close(network(images), expected(images))
    du.train(network, split, epochs=20, batch_size=10)
    assert du.accuracy(network, toy.test) > 95


def test_the_step_size_with_the_best_validation_accuracy_is_chosen(toy):
    distilled = make_set(toy, epochs=5, step_size=torch.linspace(0.1, 1, 10))
    options = {"networks": 3, "step_sizes": (1e-6, 0.1, 1e3)}
    chosen = du.best_constant_step_size(distilled, toy, Smooth, **options)
    torch.testing.assert_close(chosen.step_sizes, torch.full((10,), 0.1))
    assert torch.equal(chosen.images, distilled.images)
    torch.testing.assert_close(distilled.step_sizes, torch.linspace(0.1, 1, 10))
