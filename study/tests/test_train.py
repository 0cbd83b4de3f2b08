"""The command line, alone and under torchrun: its options, its exit status, and what it leaves behind."""

import inspect
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch

import distill_utils as du
from study import runs, train
from study.methods import truncation
from study.records import read_metadata

ROOT = Path(du.__file__).parent
SMALL = "--dataset digits --device cpu --steps 1 --step-size 0.05 --batch-size 16"
SMALL += " --validate-every 5 --validation-networks 1 --test-networks 2 --no-progress"


def command(*arguments: object, processes: int | None = None) -> list[str]:
    """The command line on scikit-learn's digits, small enough for a test."""
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *runner, "-m", "study.train", *SMALL.split(), *map(str, arguments)]


def run_here(*arguments: object) -> int:
    """The exit status of the command, run in this process."""
    return train.main([*SMALL.split(), *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# ------------------------------------------------------------------------------------------- options
def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: python -m study.train [-h] [OPTIONS] OUTPUT" in text
    for option in fields(train.Options)[1:]:
        assert f"--{option.name.replace('_', '-')}" in text
        description = inspect.getdoc(train.Options).split(f"    {option.name}: ")[1]
        assert description.split("\n")[0].rstrip(".") in text


def test_defaults_are_those_of_the_library():
    defaults = {each.name: each.default for each in fields(train.Options)}
    compared = []
    for function in (du.DistilledSet, runs.Run):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty and defaults.get(name) is not None:
                assert defaults[name] == parameter.default, name
                compared.append(name)
    assert len(compared) > 10


def test_options_reach_the_run(tmp_path):
    digits = du.load_digits(device="cpu")
    line = "--init noise --init-std 0.5 --per-class 4 --factor 2 --epochs 4 --soft-labels"
    line += " --optimizer SGD --momentum 0.5 --label-smoothing 0.2 --networks 3 --window 2 --seed 5"
    line += " --learning-rate 0.2 --step-size-learning-rate 0"
    options = train.parse([str(tmp_path / "set.safetensors"), *SMALL.split(), *line.split()])
    run = train.make_run(options, digits, du.LeNet)
    distilled = run.distilled
    assert distilled.images.shape == (1, 10, 1, 28, 28)
    assert isinstance(distilled.decoder, du.MultiFormation)
    assert distilled.decoder.factor == 2
    assert distilled.inner == {"epochs": 4, "optimizer": "SGD", "momentum": 0.5}
    torch.testing.assert_close(distilled.labels.max(), torch.tensor(0.8 + 0.2 / 10))
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.05))
    assert distilled.images.std() < 0.5
    assert (run.networks, run.batch_size, run.seed) == (3, 16, 5)
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [0.2, 0]
    assert run.unroll.length == 2
    assert run.unroll.seed == 5
    for text, kind in (
        ("--pool 2 --window 1", truncation.NetworkPool),
        ("--checkpointed 1", truncation.Checkpointed),
    ):
        options = train.parse([str(tmp_path / "set.safetensors"), *text.split()])
        assert isinstance(train.make_unroll(options), kind)
    assert names(tmp_path) == []


BAD = {
    "--steps 0": "steps=0: give a whole number",
    "--per-class -1": "per_class=-1: give a whole number",
    "--iterations 0": "iterations=0: give a whole number",
    "--test-networks 0": "test_networks=0: give a whole number",
    "--validate-every 0": "validate_every=0: give a whole number",
    "--iterations 2.5": "--iterations: invalid literal for int() with base 10: '2.5'; see --help",
    "--dataset CIFAR": "invalid choice 'CIFAR' for argument '--dataset'",
    "--device tpu": "device='tpu': not on this machine; give auto",
    "--bogus 3": "Unrecognized options: --bogus, 3; see --help",
    "--seed -1": "seed=-1: give at least 0",
    "--seed 99999999999999999999": "seed=99999999999999999999: give at least 0 and less than 2**63",
    "--fixed-initialization -1": "fixed_initialization=-1: give at least 0",
    "--learning-rate nan": "learning_rate=nan: give a number below 1e37",
    "--learning-rate -1": "learning_rate=-1.0: give at least 0",
    "--step-size 0": "step_size=0.0: give a positive number",
    "--init noise --init-std -1": "init_std=-1.0: give at least 0",
    "--device cpu:x": "device='cpu:x': not on this machine; give auto",
    "--init-std 0.5": "init_std=0.5: has no effect without --init noise",
    "--label-smoothing 0.5": "label_smoothing=0.5: has no effect without --soft-labels",
    "--optimizer Adam --momentum 0.5": "momentum=0.5: ",
    "--factor 2": "factor=2: a step has 10 images; give a multiple of 4",
    "--steps 100000": "steps=100000, per_class=1: class 0 has ",
    "--pool 2": "pool=2: has no effect without --window",
    "--window 0": "length=0: give a whole number",
    "--window 2": "length=2: give at most the 1 updates",
    "--window 1 --checkpointed 1": "checkpointed=1: does not go with --window",
    "--checkpoint {output}": "is the output as well; name another file",
    "--checkpoint {folder}": "is a folder; name a file in it",
    "--dataset MNIST --data-root {folder}/file": "MNIST",
}


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize("line", BAD)
def test_bad_options_end_in_one_line_and_leave_no_file(tmp_path, capfd, line):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    output = folder / "set.safetensors"
    output.write_bytes(b"an older file")
    arguments = line.format(output=output, folder=folder).split()
    assert run_here(output, "--iterations", 3, *arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert BAD[line] in error
    assert names(folder) == ["file", "set.safetensors"]
    assert output.read_bytes() == b"an older file"


def test_a_missing_output_is_named(capsys):
    assert train.main([]) == 1
    assert "OUTPUT" in capsys.readouterr().err


def test_outputs_are_tried_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("work had begun"))
    (tmp_path / "file").touch()
    refused = {
        tmp_path: "is a folder",
        tmp_path / "file" / "set.safetensors": "cannot be written",
        tmp_path / ("x" * 238): "File name too long",  # with what is added while it is written
    }
    for path, reason in refused.items():
        assert run_here(path) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: output='{path}': ")
        assert reason in error
        assert error.count("\n") == 1
    assert names(tmp_path) == ["file"]


def test_a_missing_dataset_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(du.torchvision.datasets, "MNIST", offline)
    root = tmp_path / "data"
    assert run_here(tmp_path / "set.safetensors", "--dataset", "MNIST", "--data-root", root) == 1
    error = capsys.readouterr().err
    with pytest.raises(FileNotFoundError) as caught:
        du.load_mnist(root, device="cpu")
    assert error == f"error: {caught.value}\n"
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------- runs
def test_it_writes_a_set_and_the_same_command_goes_on(tmp_path, capsys):
    output = tmp_path / "set.safetensors"
    line = (output, "--iterations", 6, "--checkpoint", tmp_path / "run.pt")
    line += ("--epochs", 2, "--fixed-initialization", 3)
    assert run_here(*line) == 0
    assert f"{output}: " in capsys.readouterr().out
    made = {"network": "LeNet", "initialization": "fixed, seed 3", "seed": 0, "iterations": 6}
    kept = read_metadata(output)
    assert {name: kept[name] for name in made} == made
    distilled = du.load(output)
    start, _ = du.initialize(du.load_digits(device="cpu"), "real", steps=1)
    assert not torch.equal(distilled.images, start)

    output.unlink()
    assert run_here(*line) == 0
    assert torch.equal(du.load(output).images, distilled.images)
    assert run_here(*line, "--seed", 1) == 1
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    assert names(tmp_path) == ["run.pt", "set.safetensors"]


@pytest.mark.parametrize("init", ["noise", "k-means"])
def test_other_initializations_and_inner_loops(tmp_path, init):
    line = f"--iterations 1 --init {init} --factor 2 --per-class 4 --epochs 2 --pool 2 --window 1"
    assert run_here(tmp_path / "set.safetensors", *line.split()) == 0
    assert du.load(tmp_path / "set.safetensors").decode().shape == (1, 40, 1, 28, 28)


def test_mnist_from_its_folder(tmp_path, mnist_root):
    line = ("--dataset", "MNIST", "--data-root", mnist_root, "--iterations", 1)
    assert run_here(tmp_path / "set.safetensors", *line, "--test-networks", 1) == 0
    assert read_metadata(tmp_path / "set.safetensors")["dataset"] == "MNIST"


def test_diverged_training_leaves_the_output_alone(tmp_path, capsys):
    output = tmp_path / "set.safetensors"
    assert run_here(output, "--iterations", 2) == 0
    before = output.read_bytes()
    assert run_here(output, "--iterations", 3, "--step-size", "1e30") == 1
    diverged = tmp_path / "set.diverged.safetensors"
    error = capsys.readouterr().err
    assert error.startswith("error: the meta-gradient is not finite at iteration 0")
    assert f"the set after 0 of 3 iterations is in {diverged}, and {output} is as it was" in error
    assert output.read_bytes() == before
    assert du.load(diverged).iterations == 0
    diverged.unlink()
    assert names(tmp_path) == ["set.safetensors"]


def test_values_that_are_not_finite_are_never_written(tmp_path, monkeypatch, capsys):
    finish = runs.Run.run

    def diverge(run):
        finish(run)
        run.distilled.images.data[0, 0] = math.inf  # in the last step, where no gradient follows

    monkeypatch.setattr(runs.Run, "run", diverge)
    output = tmp_path / "set.safetensors"
    assert run_here(output, "--iterations", 1) == 1
    error = capsys.readouterr().err
    message = "the set has values that are not finite; lower step_size= or the learning rates"
    assert error.startswith(f"error: {message}")
    assert f"nothing sound is left to write, and {output} is as it was" in error
    assert names(tmp_path) == []


def test_a_full_disk_costs_nothing_that_was_learned(tmp_path, monkeypatch, capsys):
    """The checkpoint's is a warning; the output's an error that says where the set is."""
    monkeypatch.setattr(train.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    output, checkpoint = tmp_path / "set.safetensors", tmp_path / "run.pt"
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if full.name in path.name and path.parent == tmp_path:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    full.name = "run.pt"
    run = ("--iterations", 3, "--checkpoint", checkpoint)
    message = r"run\.pt': cannot be written \(No space left on device\); the run goes on"
    with pytest.warns(UserWarning, match=message):
        assert run_here(output, *run) == 0
    assert du.load(output).iterations == 3
    output.unlink()
    full.name = "set"
    assert run_here(output, *run) == 1
    error = capsys.readouterr().err
    message = "cannot be written (No space left on device); the set after 3"
    assert error.startswith(f"error: output='{output}': {message}")
    assert du.load(error.split("'")[3]).iterations == 3
    assert names(tmp_path) == ["run.pt", "temporary"]


def test_ctrl_c_in_the_test_does_not_touch_the_output(tmp_path, monkeypatch, capsys):
    evaluate = du.evaluate

    def interrupted(distilled, split, *given, **options):
        if len(split.labels) == 300:  # the test images of digits, not those for validation
            raise KeyboardInterrupt
        return evaluate(distilled, split, *given, **options)

    monkeypatch.setattr(du, "evaluate", interrupted)
    output = tmp_path / "set.safetensors"
    assert run_here(output, "--iterations", 1) == 130
    assert "written after 1 of 1 iterations; the test was interrupted" in capsys.readouterr().out
    assert du.load(output).iterations == 1


# ----------------------------------------------------------------------------------------- processes
def start(folder: Path, line: list[str]) -> subprocess.Popen:
    """The command, well into its run."""
    with open(folder / "errors", "w") as errors, open(folder / "printed", "w") as printed:
        options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        process = subprocess.Popen(line, stderr=errors, stdout=printed, **options)
    path = folder / "run.pt"
    while not (path.exists() and len(runs.read_checkpoint(path)["state"]["history"]["loss"]) >= 5):
        assert process.poll() is None, (folder / "errors").read_text()
        time.sleep(0.01)
    return process


def finish_here(folder: Path, *, more: int = 3) -> list[float]:
    """Goes on, in this process, with a run of 5,000 iterations as if it had but a few to go; returns its losses."""
    checkpoint, output = folder / "run.pt", folder / "set.safetensors"
    content = runs.read_checkpoint(checkpoint)
    losses = content["state"]["history"]["loss"]
    content["settings"]["iterations"] = str(len(losses) + more)
    runs.write_checkpoint(checkpoint, content)
    assert run_here(output, "--checkpoint", checkpoint, "--iterations", len(losses) + more) == 0
    after = runs.read_checkpoint(checkpoint)["state"]["history"]["loss"]
    assert len(after) == len(losses) + more
    assert after[: len(losses)] == losses
    assert du.load(output).iterations == len(after)
    return after


def test_ctrl_c_saves_what_was_learned(tmp_path, monkeypatch, capsys):
    calls, compute_gradient = [], du.Distillation.compute_gradient

    def interrupting(distillation):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return compute_gradient(distillation)

    output, checkpoint = tmp_path / "set.safetensors", tmp_path / "run.pt"
    with monkeypatch.context() as patched:
        patched.setattr(du.Distillation, "compute_gradient", interrupting)
        assert run_here(output, "--checkpoint", checkpoint, "--iterations", 5000) == 130
    said = capsys.readouterr()
    assert "Interrupted after 7 of 5000 iterations: the same call" in said.out
    assert f"{output}: interrupted, written after 7 of 5000 iterations" in said.out
    assert said.err == ""
    assert du.load(output).iterations == 7
    images = runs.read_checkpoint(checkpoint)["state"]["distilled"]["images"]
    assert torch.equal(du.load(output).images, images)
    finish_here(tmp_path)


def test_torchrun_passes_ctrl_c_on_and_one_process_finishes_the_run(tmp_path):
    line = (tmp_path / "set.safetensors", "--checkpoint", tmp_path / "run.pt", "--iterations", 5000)
    job = start(tmp_path, command(*line, processes=2))
    try:
        assert len(psutil.Process(job.pid).children()) == 2
        job.send_signal(signal.SIGINT)
        assert job.wait(60) != 0
    finally:
        job.terminate()
    printed = (tmp_path / "printed").read_text()
    assert printed.count("interrupted, written after") == 1, "the first process alone writes"
    done = len(runs.read_checkpoint(tmp_path / "run.pt")["state"]["history"]["loss"])
    kept = read_metadata(tmp_path / "set.safetensors")
    assert kept["iterations"] == done
    assert kept["command"].startswith("torchrun --nproc-per-node=2 -m study.train --dataset digits")
    finish_here(tmp_path)
