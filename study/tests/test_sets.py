"""The best sets and their controls at small size, and a stored one at full size."""

import re
from functools import partial

import pytest
import torch

import distill_utils as du
from study import report
from study.experiments import protocols as controls
from study.experiments import sets as best_sets
from study.methods.truncation import NetworkPool
from study.records import RESULTS, Results
from study.tests.small import small_study


def test_the_experiments_add_what_the_report_reads(tmp_path, monkeypatch):
    def train_from_scratch(*_, networks: int, **__) -> du.Accuracies:
        return du.Accuracies(100 * torch.rand(networks))

    monkeypatch.setattr(best_sets, "train_from_scratch", train_from_scratch)
    monkeypatch.setattr(du, "best_constant_step_size", lambda distilled, *_, **__: distilled)
    monkeypatch.setattr(controls, "validation_accuracy", lambda *_, **__: 50.0)
    monkeypatch.setattr(best_sets, "match", lambda *_, **__: None)  # which have tests of their own
    monkeypatch.setattr(best_sets, "NetworkPool", lambda _, **options: NetworkPool(1, **options))
    limits = {"epochs": 2, "window": 2, "per_class": 4, "batch_size": 64}
    limits |= {"floats": 20_000, "channels": [8, 4]}
    recipes = {
        best_sets.best_set: best_sets.RECIPES,
        best_sets.decoded_set: best_sets.DECODED,
        best_sets.rivalry: best_sets.RIVALS,
    }
    # The first of the controls is enough, and so is one seed.
    alike = {f"controls-{name}" for name in best_sets.SCHEDULED[1:]}
    alike |= {name for name in best_sets.EXPERIMENTS if re.search("-seed[12]$", name)}
    alike -= {"mnist-ipc10-30updates-seed1"}
    for name, experiment in best_sets.EXPERIMENTS.items():
        if name in alike:
            continue
        for function, settings in recipes.items():
            if name in settings:
                options = settings[name].items()
                options = {
                    key: min(value, limits[key]) if key in limits else value
                    for key, value in options
                }
                experiment = partial(function, **options)
        study = small_study(name, "best", tmp_path, fraction=0.0001)
        study.run(experiment)
    results, stored = Results(tmp_path / "best"), Results(RESULTS / "best")
    report.write_report("best", results)
    text = (tmp_path / "best" / "summary.md").read_text()
    for title in ("mnist-ipc10-scratch", "label-robust score", "IDC (Kim"):
        assert title in text
    assert "ResNet-18, batch norm | real statistics" in text
    # Rows of the controls name step sizes, and those of the whole set epochs.
    for name in set(stored.runs.experiment) - {"whole-set"}:
        if not name.startswith("controls-"):
            assert set(results.find(name).row) == set(stored.find(name).row) != set()


METHODS = ("gradient matching", "distribution matching", "unrolled training")


@pytest.mark.parametrize("method", METHODS)
def test_a_rival_learns_images_and_is_timed(method, tmp_path, monkeypatch):
    """Images move, labels of the matching methods stay hard, and the time is kept."""
    study = small_study("rival", "best", tmp_path, fraction=1.0)
    options = {"per_class": 1, "iterations": 2, "learning_rate": 0.1, "batch_size": 8}
    options |= {"window": 30} if method == "unrolled training" else {}
    before, _ = du.initialize(study.mnist, "real", steps=1)
    seen, original = [], best_sets.train_from_scratch

    def train_from_scratch(each: du.DistilledSet, *_, **__) -> du.Accuracies:
        seen.append(each)
        return original(each, study.mnist.test, du.LeNet, networks=1, epochs=1)

    monkeypatch.setattr(best_sets, "train_from_scratch", train_from_scratch)
    best_sets.rivalry(study, method=method, network="LeNet", **options)
    assert not torch.equal(seen[0].images, before)
    assert set(seen[0].labels.unique().tolist()) == {0.0, 1.0} or method == "unrolled training"
    assert study.distillation_seconds >= 0
    assert {line["row"] for line in study.lines["accuracies"]} == {"LeNet", "ConvNet-3"}


def test_a_set_for_training_from_scratch_keeps_its_step_sizes(tmp_path):
    study, seen = small_study("mnist-ipc10-mf2-scratch", "best", tmp_path), {}

    def distill(distilled: du.DistilledSet, *_, **options) -> str:
        kept = {name: options[name] for name in ("unroll", "step_size_learning_rate")}
        kept |= {"iterations": 2, "batch_size": 8, "validation_networks": 1, "progress": False}
        du.distill(distilled, study.mnist, du.LeNet, **kept)
        seen.update(distilled=distilled, unroll=kept["unroll"])
        raise StopIteration  # what follows is not of interest

    study.distill = distill
    with pytest.raises(StopIteration):
        best_sets.best_set(study, **{**best_sets.RECIPES[study.name], "epochs": 15, "per_class": 4})
    distilled = seen["distilled"]
    assert isinstance(distilled.decoder, du.MultiFormation)
    assert distilled.images.shape[1] == 10
    assert distilled.step_sizes.tolist() == pytest.approx([0.01] * 30)
    assert seen["unroll"].calls == 2


@pytest.mark.parametrize("name", best_sets.RECIPES)
def test_a_stored_set_is_shipped_and_its_recipe_made_it(name):
    distilled = Results(RESULTS / "best").load_set(name, best_sets.protocol(name))
    recipe = best_sets.RECIPES[name]
    factor = recipe.get("factor", 1)
    steps, n = distilled.images.shape[:2]
    assert distilled.labels.shape[:2] == (recipe["steps"], 10 * recipe["per_class"])
    assert (steps, n * factor**2) == distilled.labels.shape[:2]
    assert getattr(distilled.decoder, "factor", 1) == factor
    inner = {"optimizer": "SGD", "momentum": 0.0, "epochs": recipe["epochs"], **recipe["inner"]}
    assert distilled.inner == {key: inner[key] for key in distilled.inner}
    assert f"-ipc{steps * n // 10}-" in name
