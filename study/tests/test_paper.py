"""The paper's experiments at small size: pretrained networks, the attack, what is kept."""

import re

import pytest
import torch
from torch import nn

import distill_utils as du
from study import report
from study.experiments import paper
from study.experiments import protocols as controls
from study.records import Results
from study.tests.small import small_study

SHORT = {"scikit-learn digits": {"epochs": 1, "batch_size": 400}}


class Linear(nn.Sequential):
    """The smallest network that can be taught and attacked."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(28 * 28, 10))


@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


def train_networks(dataset: du.Dataset, count: int) -> list[nn.Module]:
    def train(network: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        return du.train(network, dataset.train, epochs=5, optimizer=optimizer)

    with du.seeded(0):
        return [train(Linear()) for _ in range(count)]


def test_sampled_networks_are_copies_of_all_that_are_given(digits):
    networks = train_networks(digits, 3)
    make_network = paper.sample_network(networks)
    given = [network[1].weight.clone() for network in networks]
    found = [make_network() for _ in range(60)]
    kinds = [[torch.equal(each[1].weight, weight) for weight in given] for each in found]
    assert {kind.index(True) for kind in kinds} == {0, 1, 2}
    for network in found[:10]:
        du.train(network, digits.test, epochs=1)
    distilled = du.DistilledSet(*du.initialize(digits, "real", steps=1), step_size=0.1)
    for count in (1, 2):  # alone and in an ensemble
        du.distill(distilled, digits, make_network, iterations=2, networks=count, progress=False)
    assert all(map(torch.equal, [network[1].weight for network in networks], given))
    with pytest.raises(ValueError, match="networks: none given; give at least one"):
        paper.sample_network([])


def test_poisoning_changes_the_labels_of_one_class_and_nothing_else(digits):
    poisoned = paper.poison_labels(digits, 9, 4)
    for name in ("train", "validation", "test"):
        before, after = getattr(digits, name), getattr(poisoned, name)
        assert torch.equal(before.images, after.images)
        assert (after.labels[before.labels == 9] == 4).all()
        assert torch.equal(after.labels[before.labels != 9], before.labels[before.labels != 9])
    assert poisoned.classes == 10, "networks keep their ten outputs"
    with pytest.raises(ValueError, match="target=10: give a class, 0 to 9"):
        paper.poison_labels(digits, 1, 10)


def test_an_attack_changes_one_class_and_spares_the_others(digits):
    networks = train_networks(digits, 4)
    poisoned = paper.poison_labels(digits, 0, 1)
    distilled = du.DistilledSet(*du.initialize(digits, "real", steps=1), step_size=0.05)
    options = {"learning_rate": 0.1, "step_size_learning_rate": 0.03}
    options |= {"iterations": 300, "progress": False}
    du.distill(distilled, poisoned, paper.sample_network(networks[:2]), **options)
    attacked, held_out = digits.test.labels == 0, networks[2:]
    success = du.Split(poisoned.test.images[attacked], poisoned.test.labels[attacked])
    others = du.Split(digits.test.images[~attacked], digits.test.labels[~attacked])
    assert max(du.accuracy(network, success) for network in held_out) < 5
    for split, least in ((success, 60), (others, 80)):
        found = du.evaluate(distilled, split, paper.in_turn(held_out), networks=2)
        assert found.mean > least


def test_neighbors_classify_their_own_images_correctly(digits):
    images, labels = du.initialize(digits, "real", steps=3)
    own = du.Split(images.flatten(0, 1), labels.flatten(0, 1).argmax(-1))
    assert paper.neighbor_accuracy(images, labels, own, 2, 1) == 100
    assert 50 < paper.neighbor_accuracy(images, labels, digits.test, 1, 3) < 100


@pytest.mark.parametrize(
    "name",
    ["fixed-10-seed1", "random-noise-seed0", "baselines", "longer-baselines", "nearest-neighbors", "sweep-5x20x3",
     "initializations", "adapt-digits-to-mnist", "attack"],
)  # fmt: skip
def test_each_kind_of_experiment_adds_its_lines_and_saves_its_sets(name, tmp_path, monkeypatch):
    choose, validate = du.best_constant_step_size, paper.validation_accuracy
    few = {"networks": 1, "step_sizes": (0.05, 0.1)}  # to choose by, and to choose from
    monkeypatch.setattr(du, "best_constant_step_size", lambda *given, **_: choose(*given, **few))
    for module in (paper, controls):
        by_one = lambda *given, **more: validate(*given, **more | {"networks": 1})  # noqa: E731
        monkeypatch.setattr(module, "validation_accuracy", by_one)
    monkeypatch.setattr(paper, "PRETRAINING", SHORT)
    study = small_study(name, "paper", tmp_path)
    study.run(paper.EXPERIMENTS[name])
    results = Results(tmp_path / "paper")
    assert list(results.runs.experiment) == [name]
    assert results.accuracies.value.between(0, 100).all()
    for line in report.reported("paper"):
        if line["experiment"] == name.partition("-seed")[0]:
            found = results.values(line["experiment"], line["row"])
            assert found, "each line of the table finds its row"
    for line in results.sets.itertuples():
        assert results.load_set(name, line.row, number=line.set).updates > 0
    assert len(results.sets) == len(results.sets.drop_duplicates())
    stored = Results(report.RESULTS / "paper")  # under the same names
    rows, files = (table[table.experiment == name] for table in (stored.accuracies, stored.sets))
    assert strip(results.accuracies.row) == strip(rows.row)
    assert set(results.sets.file) == set(files.file)


def strip(rows) -> set[str]:
    """Names of rows, without the numbers that a small study finds otherwise."""
    found = (re.sub(", ([0-9]+ updates|step size|l[12]).*", "", row) for row in rows)
    return {row.replace("of 2 ", "of 50 ") for row in found}


def test_a_pretrained_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PRETRAINING", SHORT)
    study = small_study("attack", "paper", tmp_path)
    first, _ = paper.pretrain(study, study.mnist)
    monkeypatch.setattr(du, "train", lambda *_, **__: pytest.fail("trained again"))
    again, _ = paper.pretrain(study, study.mnist)
    for one, other in zip(first, again, strict=True):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
