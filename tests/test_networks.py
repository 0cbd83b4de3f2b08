"""Networks, their training and their evaluation."""

import pytest
import torch
from torch import nn

import distill_utils as du


@pytest.fixture
def distilled(toy) -> du.DistilledSet:
    return du.DistilledSet(*du.initialize(toy, "real", steps=2), epochs=2, step_size=0.05)


def test_lenet_is_the_papers():
    network = du.LeNet()
    shapes = [list(parameter.shape) for parameter in network.parameters()]
    assert shapes == [
        [6, 1, 5, 5],
        [6],
        [16, 6, 5, 5],
        [16],
        [120, 400],
        [120],
        [84, 120],
        [84],
        [10, 84],
        [10],
    ]
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert all(not parameter.any() for parameter in network.parameters() if parameter.dim() == 1)
    weight = network[7].weight  # 400 → 120; Xavier: variance 2 / (fan in + fan out)
    assert float(weight.detach().std()) == pytest.approx((2 / 520) ** 0.5, rel=0.02)


def test_lenet_takes_another_number_of_classes_and_another_initialization():
    network = du.LeNet(classes=3, initialize=nn.init.ones_)
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    assert {float(parameter.detach().mean()) for parameter in network.parameters()} == {0.0, 1.0}


def test_the_automatic_device_is_one_that_is_there():
    device = du.pick_device("auto")
    assert torch.zeros(1, device=device).sum() == 0
    assert du.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device='gpu': not on this machine; give auto, .*cpu"):
        du.pick_device("gpu")


# ------------------------------------------------------------------------------------- initialization
def test_a_fixed_initialization_is_always_the_same_and_stays_as_it_is(toy, smooth, distilled):
    before = torch.get_rng_state()
    factory = du.fixed_initialization(smooth, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = factory(), factory()
    assert first is not second
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    du.train(first, toy.train, epochs=1)
    assert all(map(torch.equal, factory().parameters(), second.parameters()))
    assert not torch.equal(du.fixed_initialization(smooth, seed=2)()[1].weight, second[1].weight)
    assert du.evaluate(distilled, toy.test, factory, networks=3).std == 0


def test_seeds_repeat_a_block_and_leave_the_random_state_as_it_was():
    before = torch.get_rng_state()

    def sample(*numbers):
        with du.seeded(*numbers):
            return float(torch.rand(()))

    assert sample(5) == sample(5)
    assert (
        len({sample(5), sample(6), sample(5, 0), sample(5, 1), sample(5, 0, 1), sample(5, 0, 0, 1)})
        == 6
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert float(torch.rand(())) == sample(5), "one number is the seed itself"
    assert torch.equal(torch.get_rng_state(), before)


def test_an_ensemble_holds_copies_and_gives_the_scores_of_each_network(toy, smooth):
    networks = [smooth() for _ in range(3)]
    ensemble = du.Ensemble(networks)
    scores = ensemble(toy.test.images)
    assert scores.shape == (3, 30, 3)
    for network, found in zip(networks, scores, strict=True):
        torch.testing.assert_close(found, network(toy.test.images))
    assert du.accuracy(ensemble, toy.test).tolist() == [
        pytest.approx(float(du.accuracy(each, toy.test))) for each in networks
    ]
    du.train(ensemble, toy.train, epochs=1)
    assert not torch.equal(ensemble(toy.test.images), scores)
    torch.testing.assert_close(networks[0](toy.test.images), scores[0])


def test_an_ensemble_tests_and_trains_as_its_layers_do(toy):
    def make_network():
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))

    ensemble = du.Ensemble([make_network() for _ in range(2)])
    images = toy.test.images
    assert not torch.equal(ensemble(images), ensemble(images))
    ensemble.eval()
    assert torch.equal(ensemble(images), ensemble(images))
    ensemble.train()
    assert not torch.equal(ensemble(images), ensemble(images))


# ------------------------------------------------------------------------------------------ evaluation
def test_accuracy_counts_the_whole_split(toy):
    class Bright(nn.Module):
        def forward(self, images):
            return images.mean((1, 3))[:, :3]  # class k of the toy set has row k bright

    assert du.accuracy(Bright(), toy.test) == 100
    wrong = du.Split(toy.test.images, (toy.test.labels + (torch.arange(30) < 6)) % 3)
    assert du.accuracy(Bright(), wrong) == 80
    # more than one part's
    repeated = du.Split(wrong.images.repeat(60, 1, 1, 1), wrong.labels.repeat(60))
    assert du.accuracy(Bright(), repeated) == 80


def test_evaluation_draws_fresh_networks_and_repeats_them(toy, smooth, distilled):
    before = torch.get_rng_state()
    accuracies = du.evaluate(distilled, toy.test, smooth, networks=11)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(accuracies.values) == 11
    assert accuracies.std > 0
    assert torch.equal(
        accuracies.values, du.evaluate(distilled, toy.test, smooth, networks=11).values
    )
    assert torch.equal(
        accuracies.values[:3], du.evaluate(distilled, toy.test, smooth, networks=3).values
    )
    assert not torch.equal(
        accuracies.values, du.evaluate(distilled, toy.test, smooth, networks=11, seed=1).values
    )


def test_evaluation_leaves_the_set_as_it_is_and_needs_no_gradients(toy, smooth, distilled):
    state = {name: value.clone() for name, value in distilled.state_dict().items()}
    expected = du.evaluate(distilled, toy.test, smooth, networks=3).values
    with torch.no_grad():
        assert torch.equal(du.evaluate(distilled, toy.test, smooth, networks=3).values, expected)
        assert torch.equal(
            du.evaluate(distilled, toy.test, smooth, networks=1).values, expected[:1]
        )
    assert all(torch.equal(value, state[name]) for name, value in distilled.state_dict().items())
    assert all(parameter.grad is None for parameter in distilled.parameters())


def test_accuracies_are_printed_and_compared():
    assert str(du.Accuracies(torch.tensor([90.0, 92.0]))) == "91.0 ± 1.4%"
    assert str(du.Accuracies(torch.tensor([90.0]))) == "90.0%"
    accuracies = du.Accuracies(torch.tensor([90.0, 92.0]))
    assert accuracies == accuracies
    assert (accuracies == du.Accuracies(torch.tensor([90.0, 93.0]))) is False


def test_evaluation_trains_by_the_learned_schedule(toy, smooth, distilled):
    """As ordinary training of the same networks does, one after the other."""
    found = du.evaluate(distilled, toy.test, smooth, networks=3, seed=5).values
    with du.seeded(5):
        networks = [smooth() for _ in range(3)]
    for network, value in zip(networks, found.tolist(), strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=1)
        for images, labels, step_size in distilled.schedule():
            optimizer.param_groups[0]["lr"] = step_size.item()
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images.detach()), labels).backward()
            optimizer.step()
        assert float(du.accuracy(network, toy.test)) == pytest.approx(value)


# -------------------------------------------------------------------------------------------- training
def test_training_learns_from_integer_labels_and_from_probabilities(toy, smooth):
    for labels in (toy.train.labels, nn.functional.one_hot(toy.train.labels).float()):
        network = du.train(smooth(), du.Split(toy.train.images, labels), epochs=20, batch_size=10)
        assert du.accuracy(network, toy.test) > 95


def test_training_is_in_place_and_repeats_from_a_random_state(toy, smooth):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        network = smooth()
        assert du.train(network, toy.train, epochs=2) is network
        results.append(network(toy.test.images))
    assert torch.equal(*results)


def test_the_step_size_with_the_best_validation_accuracy_is_chosen(toy, smooth):
    images, labels = du.initialize(toy, "real", steps=2)
    distilled = du.DistilledSet(images, labels, epochs=5, step_size=torch.linspace(0.1, 1, 10))
    chosen = du.best_constant_step_size(
        distilled, toy, smooth, networks=3, step_sizes=(1e-6, 0.1, 1e3)
    )
    torch.testing.assert_close(chosen.step_sizes, torch.full((10,), 0.1))
    assert torch.equal(chosen.images, images)
    torch.testing.assert_close(
        distilled.step_sizes, torch.linspace(0.1, 1, 10), msg="the set given stays as it is"
    )
