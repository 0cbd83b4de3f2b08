"""The study's pieces at small size, on scikit-learn's digits and toys: selection, attack, what is kept and reported."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Smooth, make_toy
from torch import nn

import distill_utils as du
import runs
from runs import seeded
from study import __main__ as command
from study import experiments, report
from study.beyond import BEYOND


class Linear(nn.Sequential):
    """The least network that can be taught and attacked."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(28 * 28, 10))


@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


def trained(dataset: du.Dataset, count: int) -> list[nn.Module]:
    with seeded(0):
        return [du.train(Linear(), dataset.train, epochs=5, step_size=0.01) for _ in range(count)]


def test_one_center_of_a_class_is_its_mean(digits):
    images, labels = du.k_means_start(digits, steps=1)
    assert images.shape == (1, 10, 1, 28, 28)
    assert labels[0].argmax(-1).tolist() == list(range(10))
    for label in (0, 7):
        mean = digits.train.images[digits.train.labels == label].mean(0)
        torch.testing.assert_close(images[0, label], mean, atol=1e-4, rtol=1e-4)


def test_centers_lie_closer_to_their_class_than_random_images_do(digits):
    images, labels = du.k_means_start(digits, steps=8)
    assert (images.shape, labels.shape) == ((8, 10, 1, 28, 28), (8, 10, 10))

    def mean_distance(images, labels):
        kinds = labels.argmax(-1)
        return sum(
            torch.cdist(
                digits.train.images[digits.train.labels == label].flatten(1), images[kinds == label].flatten(1)
            ).amin(1).mean()
            for label in range(10)
        )  # fmt: skip

    assert mean_distance(images, labels) < mean_distance(*du.real_start(digits, steps=8))


def test_the_step_size_that_validates_best_is_chosen(digits):
    start = du.real_start(digits, steps=2)
    chosen = du.tuned(*start, digits, Linear, epochs=3, networks=3, step_sizes=(1e-6, 0.02, 1e3))
    assert chosen.step_sizes.tolist() == pytest.approx([0.02] * 6)
    assert torch.equal(chosen.images, start[0])


def test_relabelling_changes_one_class_and_nothing_else(digits):
    poisoned = du.relabel(digits, 9, 4)
    for name in ("train", "validation", "test"):
        before, after = getattr(digits, name), getattr(poisoned, name)
        assert torch.equal(before.images, after.images)
        assert (after.labels[before.labels == 9] == 4).all()
        assert torch.equal(after.labels[before.labels != 9], before.labels[before.labels != 9])
    assert poisoned.classes == 10, "networks keep their ten outputs"
    with pytest.raises(ValueError, match="target=10: give a class, 0 to 9"):
        du.relabel(digits, 1, 10)


def test_pretrained_networks_are_drawn_from_all_and_stay_as_they_are():
    toy = make_toy()
    with seeded(0):
        networks = [Smooth() for _ in range(4)]
    before = [[weight.clone() for weight in network.parameters()] for network in networks]
    make_network = du.one_of(networks)
    assert {id(make_network()) for _ in range(100)} == set(map(id, networks))
    distilled = du.DistilledSet(*du.noise_start(toy, steps=2), epochs=2, step_size=0.1)
    for count in (1, 3):  # alone and in a stack
        du.distill(distilled, toy, make_network, iterations=3, networks=count, progress=False)
    for network, weights in zip(networks, before, strict=True):
        assert all(map(torch.equal, network.parameters(), weights))
    with pytest.raises(ValueError, match="networks: none given"):
        du.one_of([])


def test_an_attack_takes_one_class_for_another_and_spares_the_others(digits):
    networks = trained(digits, 4)
    poisoned = du.relabel(digits, 0, 1)
    distilled = du.DistilledSet(*du.real_start(digits, steps=1), step_size=0.05)
    options = {"iterations": 300, "learning_rate": 0.1, "step_size_learning_rate": 0.03, "progress": False}
    du.distill(distilled, poisoned, du.one_of(networks[:2]), **options)
    attacked = digits.test.labels == 0
    taken = du.Split(poisoned.test.images[attacked], poisoned.test.labels[attacked])
    others = du.Split(digits.test.images[~attacked], digits.test.labels[~attacked])
    held_out = networks[2:]
    assert max(du.accuracy(network, taken) for network in held_out) < 5
    result = [
        du.evaluate(distilled, split, experiments.in_turn(held_out), networks=2).mean for split in (taken, others)
    ]
    assert result[0] > 60
    assert result[1] > 80


def test_neighbours_label_their_own_images_rightly(digits):
    images, labels = du.real_start(digits, steps=3)
    own = du.Split(images.flatten(0, 1), labels.flatten(0, 1).argmax(-1))
    assert experiments.neighbour_accuracy(images, labels, own, 2, 1) == 100
    assert 50 < experiments.neighbour_accuracy(images, labels, digits.test, 1, 3) < 100


def small(name: str, results, digits) -> experiments.Study:
    """An experiment's surroundings, with few digits in the place of MNIST."""
    few = {part: du.Split(*(column[:80] for column in getattr(digits, part))) for part in ("validation", "test")}
    dataset = replace(digits, **few)
    made = experiments.Study(name, results, torch.device("cpu"), "", fraction=0.002, networks=2)
    made.mnist = made.digits = dataset
    return made


@pytest.mark.parametrize(
    "name",
    ["known-10-seed1", "unknown-noise-seed0", "baselines", "longer-baselines", "nearest-neighbours", "sweep-5x20x3",
     "initializations", "adapt-digits-to-mnist", "attack"],
)  # fmt: skip
def test_each_kind_of_experiment_writes_its_rows_and_sets(name, tmp_path, digits, monkeypatch):
    monkeypatch.setattr(experiments, "PRETRAINING", {digits.name: {"epochs": 1, "batch_size": 400}})
    surroundings = small(name, tmp_path, digits)
    experiments.EXPERIMENTS[name](surroundings)
    surroundings.write(1.0)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    for line in report.LINES:
        if line.experiment == name.partition("-seed")[0]:
            assert line.sets(tmp_path), "each line of the summary finds its row"
    for row in record["rows"].values():
        assert all(0 <= value <= 100 for values in row["values"] for value in values)
        if row["file"]:
            du.DistilledSet.load(tmp_path / row["file"])


def test_an_interrupted_distillation_leaves_no_result(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(du, "distill", lambda *_, **__: du.History(loss=[1.0]))
    surroundings = small("known-10-seed0", tmp_path, digits)
    with pytest.raises(KeyboardInterrupt):
        experiments.EXPERIMENTS["known-10-seed0"](surroundings)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    (tmp_path / "attack.json").write_text(json.dumps({"fraction": 1.0, "networks": 200}))
    ran = []
    experiments = {name: partial(lambda name, _: ran.append(name), name) for name in ("attack", "baselines")}
    monkeypatch.setattr(command, "EXPERIMENTS", experiments)
    parts = {"paper": (experiments, lambda results: ran.append("report"), "summary.md")}
    monkeypatch.setattr(command, "PARTS", parts)
    options = ["--results", str(tmp_path), "--workers", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["study", *options])
    command.main()
    assert ran == ["baselines", "report"]
    monkeypatch.setattr("sys.argv", ["study", *options, "--fraction", "0.5"])
    with pytest.raises(SystemExit, match=r"error: --fraction=0.5: .*attack.json has fraction 1.0; name another"):
        command.main()


def test_a_table_leaves_out_columns_that_are_empty_throughout():
    table = runs.markdown_table(["set", "reported", "here"], [["ten", "", 81.9], ["hundred", "", ""]])
    assert table == "| set | here |\n| --- | --- |\n| ten | 81.9 |\n| hundred |  |"


def test_the_summary_is_computed_from_the_stored_accuracies(tmp_path):
    for seed, values in enumerate(([80.0, 82.0], [84.0, 86.0])):
        record = {"rows": {"unknown": {"values": [values], "file": None}}}
        (tmp_path / f"unknown-noise-seed{seed}.json").write_text(json.dumps(record))
    (line,) = [line for line in report.summary(tmp_path, "unknown-noise").splitlines() if "from noise" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:6] == ["79.5 ± 8.1", "83.0 ± 2.6%", "+3.5", "2 sets, 2 networks each; means 81.0 to 85.0"]
    with pytest.raises(ValueError, match="no 'known' of 'known-10'; run make study"):
        report.summary(tmp_path, "known-10")


RESULTS = Path(__file__).parent.parent / "results"


def test_the_stored_study_is_whole_and_the_readme_quotes_it():
    stored = {path.stem for path in RESULTS.glob("*.json")}
    assert stored - set(BEYOND) == set(experiments.EXPERIMENTS)
    assert report.summary(RESULTS) in (RESULTS / "summary.md").read_text()
    readme = (RESULTS.parent / "README.md").read_text()
    assert report.summary(RESULTS, "known", "unknown", "baselines", "longer", "nearest") in readme
    assert len(report.draw_baselines(RESULTS).axes[0].get_yticks()) == 6
    assert len(report.draw_what_matters(RESULTS).axes) == 4


def test_a_stored_set_still_trains_networks_as_stored(mnist_root):
    """The first two of the two hundred networks behind a main figure, trained and tested again."""
    kept = json.loads((RESULTS / "unknown-real-seed0.json").read_text())["rows"]["unknown"]
    distilled = du.DistilledSet.load(RESULTS / kept["file"])
    mnist = du.load_mnist(mnist_root, device="cpu")
    again = du.evaluate(distilled, mnist.test, du.LeNet, networks=2).values
    assert again.tolist() == pytest.approx(kept["values"][0][:2], abs=0.5)


def test_the_time_of_an_interrupted_run_counts(tmp_path):
    for seconds in (5.0, 2.0):
        experiments.Study("some", tmp_path, torch.device("cpu"), "").keep_time(seconds)
    experiments.Study("some", tmp_path, torch.device("cpu"), "").write(3.0)
    assert json.loads((tmp_path / "some.json").read_text())["seconds"] == 10
