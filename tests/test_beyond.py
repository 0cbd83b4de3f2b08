"""Free retraining, controls and scores beyond the paper."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Smooth
from torch import nn

import distill_utils as du
from study import beyond, beyond_report, experiments


@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


def test_free_retraining_is_ordinary_training(toy):
    """Against torch's own optimizer, on all images at once, where no order matters."""
    distilled = du.DistilledSet(*du.real_start(toy, steps=4), epochs=2, learn_labels=True)
    result = du.retrain(distilled, toy.test, Smooth, networks=2, epochs=7, step_size=0.05, seed=5)

    torch.manual_seed(5)
    networks = [Smooth() for _ in range(2)]
    for network, found in zip(networks, result.values, strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(7):
            optimizer.zero_grad()
            images, labels = distilled.images.detach().flatten(0, 1), distilled.labels.detach().flatten(0, 1)
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        assert found == du.accuracy(network, toy.test)


def test_free_retraining_takes_networks_with_batch_normalization(digits):
    def make_network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Dropout(0.1))

    distilled = du.DistilledSet(*du.k_means_start(digits, steps=1, per_class=3))
    assert du.retrain(distilled, digits.test, make_network, networks=2, epochs=50, stack=1).mean > 60


def test_centers_may_share_a_step(digits):
    steps, step = du.k_means_start(digits, steps=3), du.k_means_start(digits, steps=1, per_class=3)
    assert step[0].shape == (1, 30, 1, 28, 28)
    for one, other in zip(steps, step, strict=True):
        assert torch.equal(one.flatten(0, 1), other.flatten(0, 1))


def test_label_robust_score_is_as_published():
    """(e^α - 1/e) / (e - 1/e), with α = (improvement - recovery) / 2 as fractions of 1."""
    recovery, improvement, score = beyond.label_robust_score(90.0, 80.0, 60.0, 98.0)
    assert (recovery, improvement) == (18, 30)
    assert score == pytest.approx((math.exp(0.06) - 1 / math.e) / (math.e - 1 / math.e))
    assert beyond.label_robust_score(100, 100, 0, 100)[2] == pytest.approx(
        (math.exp(0.5) - 1 / math.e) / 2.3504, rel=1e-4
    )


def test_hard_labels_keep_the_most_probable_class():
    assert beyond.hard(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [[0.0, 1.0, 0.0]]


def test_the_experiments_write_what_the_report_reads(tmp_path, digits, monkeypatch):
    few = {part: du.Split(*(column[:80] for column in getattr(digits, part))) for part in ("validation", "test")}
    monkeypatch.setattr(du, "retrain", lambda *_, networks, **__: du.Accuracies(torch.rand(networks)))
    limits = {"epochs": 2, "window": 2, "per_class": 4}
    short = {
        name: partial(
            beyond.best, **{key: min(value, limits[key]) if key in limits else value for key, value in recipe.items()}
        )
        for name, recipe in beyond.RECIPES.items()
    }
    for name, experiment in {**beyond.BEYOND, **short}.items():
        study = experiments.Study(name, tmp_path, torch.device("cpu"), "", fraction=0.0001, networks=2)
        study.mnist = replace(digits, **few)
        experiment(study)
        study.write(60.0)
    assert len(json.loads((tmp_path / "best-10.json").read_text())["rows"]["retrained"]["values"][0]) == 1
    beyond_report.report_beyond(tmp_path)
    text = (tmp_path / "beyond.md").read_text()
    for title in ("100 images, free retraining", "label-robust score", "ResNet-18"):
        assert title in text


@pytest.mark.parametrize("name", beyond.ARCHITECTURES)
def test_each_architecture_reads_digits(name):
    network = beyond.ARCHITECTURES[name]()
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_stored_results_are_whole_and_the_readme_quotes_them():
    results = Path(du.__file__).with_name("results")
    assert set(beyond.BEYOND) <= {path.stem for path in results.glob("*.json")}
    written, readme = (results / "beyond.md").read_text(), (results.parent / "README.md").read_text()
    for table in (beyond_report.best, beyond_report.ingredients, beyond_report.controls, beyond_report.transfer):
        assert table(results) in written
    for table in (beyond_report.in_short, beyond_report.best):
        assert table(results) in readme
