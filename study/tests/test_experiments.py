"""Every kind of experiment measures what the table of results holds, and the command survives interrupts."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import distill_utils as du
from study import __main__ as command
from study.experiments import ablation, paper
from study.experiments.experiment import (
    RESULTS,
    ROOT,
    Experiment,
    Recipe,
    add_rows,
    read_table,
)

KINDS = """fixed-10 random-noise baselines random-samples nearest-neighbors
adapt-digits-to-mnist attack ablation-network-pool ablation-multi-formation rival-k-means rival-gradient-matching
rival-unrolled-training mnist-8kB mnist-4kB-50updates mnist-4kB-real mnist-networks"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of checkpoints, so that all experiments have the same teacher."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", KINDS.split())  # one of each function, and of each branch in it
def test_an_experiment_measures_what_the_stored_table_has(name, tmp_path, mnist_root, shared):
    (tmp_path / "checkpoints").symlink_to(shared)
    recipe = command.EXPERIMENTS[name]
    experiment = Experiment(name, 0, tmp_path, torch.device("cpu"), mnist_root, quick=True)
    add_rows(tmp_path, experiment.run(recipe))
    columns = ["set", "network", "images", "training", "metric"]
    stored = read_table(RESULTS, "measurements")
    stored = stored[(stored.experiment == name) & (stored.seed == 0)]
    rows = read_table(tmp_path, "measurements")
    known, measured = (set(map(tuple, table[columns].values)) for table in (stored, rows))
    assert measured
    new = {row for row in measured - known if "updates" not in row[3]}
    assert not known or not new, "the table has other rows of this experiment"
    assert rows.value[~rows.metric.isin(["bytes", "seconds"])].between(0, 100).all()
    (run,) = read_table(tmp_path, "runs").itertuples()
    assert (run.experiment, run.quick) == (name, True)
    for path in (tmp_path / "sets").glob("*"):
        assert path.stem in set(rows.set)
        assert du.load(path).updates > 0


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the command on two experiments that only note their names; returns their folder."""

    def measure(experiment: Experiment, title: str) -> None:
        experiment.measure([50.0], images=title)

    recipes = {name: Recipe(partial(measure, title=name)) for name in ("one", "two")}
    monkeypatch.setattr(command, "EXPERIMENTS", recipes)
    monkeypatch.setattr(du, "load_mnist", lambda *_, **__: None)

    def run_here(experiments: list[Experiment], options: command.Options) -> None:
        for experiment in experiments:
            add_rows(options.results, command.work(experiment))

    monkeypatch.setattr(command, "run_side_by_side", run_here)

    def run(*arguments: str) -> Path:
        monkeypatch.setattr("sys.argv", ["study", *arguments, "--results", str(tmp_path)])
        command.run_command_line()
        return tmp_path

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_is_there_is_not_run_again(study):
    folder = study("--only", "two")
    assert list(read_table(folder, "runs").experiment) == ["two"]
    written = (folder / "measurements.csv").stat().st_mtime_ns
    study("--only", "two")
    assert (folder / "measurements.csv").stat().st_mtime_ns == written
    study()
    assert list(read_table(folder, "measurements").images) == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "three"], "--only three: give some of one, two"),
        (["--workers", "0"], "workers=0: give a whole number"),
        (["--quick"], "has other results; name another folder with --results"),
    ],
)
def test_bad_options_are_named(study, arguments, error, capsys):
    study("--only", "one")
    with pytest.raises(ValueError, match="name another folder with --results"):
        command.Options(quick=True)  # where the stored results are
    with pytest.raises(SystemExit):
        study(*arguments)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert error in message


def test_an_experiment_that_ran_again_replaces_its_lines(tmp_path):
    for value in (1.0, 2.0):
        for name in ("a", "b"):
            experiment = Experiment(name, 0, tmp_path, torch.device("cpu"), "")
            recipe = Recipe(lambda experiment, value=value: experiment.measure([value], images="x"))
            add_rows(tmp_path, experiment.run(recipe))
    assert list(read_table(tmp_path, "measurements").value) == [2.0, 2.0]
    assert list(read_table(tmp_path, "runs").experiment) == ["a", "b"]


def test_ctrl_c_stops_all_processes_with_a_sentence(tmp_path, mnist_root):
    line = [sys.executable, "-m", "study", "--only", "fixed-10", "--results", str(tmp_path)]
    line += ["--data-root", mnist_root, "--device", "cpu"]
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(line, **options)
    try:
        while len([*tmp_path.glob("checkpoints/fixed-10-[01]/set.pt")]) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output.splitlines()[-1] == "interrupted; the same command continues from here"
    assert "Traceback" not in output
    assert not list(tmp_path.glob("*.csv"))


# ---------------------------------------------------------------------------------- pieces of the paper
def test_a_sampled_network_is_a_copy_of_one_of_several():
    networks = [torch.nn.Linear(2, 2) for _ in range(3)]
    make_network = paper.sample_network(networks)
    samples = [make_network() for _ in range(60)]
    weights = torch.stack([network.weight for network in networks])
    drawn = torch.stack([sample.weight for sample in samples])
    assert torch.equal(drawn.unique(dim=0), weights.unique(dim=0))
    assert not {id(sample) for sample in samples} & {id(network) for network in networks}
    with pytest.raises(ValueError, match="networks: none given; give at least one"):
        paper.sample_network([])


def test_poisoning_changes_the_labels_of_one_class_and_nothing_else():
    digits = du.load_digits(device="cpu")
    poisoned = paper.poison_labels(digits, 9, 4)
    for name in ("train", "validation", "test"):
        before, after = getattr(digits, name), getattr(poisoned, name)
        assert torch.equal(before.images, after.images)
        nine = before.labels == 9
        assert (after.labels[nine] == 4).all()
        assert torch.equal(after.labels[~nine], before.labels[~nine])
    with pytest.raises(ValueError, match="target=10: give a class, 0 to 9"):
        paper.poison_labels(digits, 1, 10)


def test_poisoned_images_are_labelled_with_the_target(toy):
    control = du.DistilledSet(*du.initialize(toy, "real", steps=2), epochs=3)
    poisoned = paper.poison_set(control, 2, 0)
    assert torch.equal(poisoned.labels.argmax(-1), control.labels.argmax(-1) % 2)
    assert torch.equal(poisoned.images, control.images)
    assert poisoned.updates == 6


# --------------------------------------------------------------------------- pieces of the ablation
def test_smooth_images_come_back_from_fewer_pixels():
    """Each channel by itself."""
    ramps = torch.linspace(-1, 1, 28) * torch.tensor([1.0, 0.5, -0.5, -1.0]).view(1, 2, 2, 1, 1)
    ramps = ramps.expand(1, 2, 2, 28, 28)
    distilled = ablation.low_resolution(ramps, torch.eye(2)[None])
    assert distilled.images.shape == (1, 2, 2, 14, 14)
    torch.testing.assert_close(distilled.decode(), ramps, atol=0.06, rtol=0)
    distilled.decode().square().sum().backward()
    assert distilled.images.grad.abs().min() > 0
