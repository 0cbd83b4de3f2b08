"""The command line, alone and under torchrun: options, exit statuses, what it leaves behind."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch

import distill_utils as du
from study import runs, train
from tests.conftest import ROOT

SMALL = "--dataset digits --device cpu --steps 1 --step-size 0.05 --batch-size 16"
SMALL += " --validate-every 5 --validation-networks 1 --test-networks 2 --no-progress"


def run_here(*arguments: object) -> int:
    """The exit status of the command, run in this process."""
    try:
        return train.main([*SMALL.split(), *map(str, arguments)])
    except SystemExit as end:  # of the parser
        return end.code


def read_notes(path: Path) -> dict:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["distilled_set"])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_options_reach_the_run(tmp_path):
    line = "--init noise --init-std 0.5 --per-class 4 --epochs 4 --soft-labels --seed 5"
    line += " --momentum 0.5 --label-smoothing 0.2 --networks 3 --window 2 --learning-rate 0.2"
    line += f" --step-size-learning-rate 0 --checkpoint {tmp_path}/run.pt --fixed-initialization 3"
    line = [*SMALL.split(), *line.split(), str(tmp_path / "set.safetensors")]
    options = train.tyro.cli(train.Options, args=line)
    run = train.make_run(options, du.load_digits(device="cpu"))
    distilled = run.distilled
    assert distilled.images.shape == (1, 40, 1, 28, 28)
    assert distilled.images.std().item() == pytest.approx(0.5, rel=0.02)
    assert distilled.inner == {"epochs": 4, "optimizer": "SGD", "momentum": 0.5}
    torch.testing.assert_close(distilled.labels.max(), torch.tensor(0.8 + 0.2 / 10))
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.05))
    assert (run.networks, run.batch_size, run.seed, run.validate_every) == (3, 16, 5, 5)
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [0.2, 0]
    assert (run.unroll.length, run.unroll.seed) == (2, 5)
    assert torch.equal(run.make_network()[0].weight, run.make_network()[0].weight)
    assert run.checkpoint == tmp_path / "run.pt"
    unrolls = ("NetworkPool", "--pool 2 --window 1"), ("Checkpointed", "--checkpointed 1")
    for kind, line in unrolls:
        options = train.tyro.cli(train.Options, args=["set", *line.split()])
        assert type(train.make_unroll(options)).__name__ == kind


BAD = {
    "--steps 0": "steps=0: give a whole number",
    "--test-networks 0": "test_networks=0: give a whole number",
    "--iterations 2.5": "invalid literal for int() with base 10: '2.5'",
    "--dataset CIFAR": "CIFAR",
    "--device tpu": "device='tpu': not on this machine; give auto",
    "--bogus 3": "Unrecognized options: --bogus",
    "--seed -1": "seed=-1: give at least 0",
    "--seed 99999999999999999999": "seed=99999999999999999999: give at least 0 and less than 2**63",
    "--fixed-initialization -1": "fixed_initialization=-1: give at least 0",
    "--init-std 0.5": "init_std=0.5: give at least 0, and --init noise",
    "--label-smoothing 0.4": "label_smoothing=0.4: has no effect without --soft-labels",
    "--pool 2": "window=None: give a whole number",
    "--window 2": "length=2: give at most the 1 updates",
    "--window 1 --checkpointed 1": "checkpointed=1: does not go with --window",
    "--checkpoint {folder}/set.safetensors": "is the output, too; name another",
    "--checkpoint {folder}": "is no regular file; name a file in a folder",
    "--checkpoint {folder}/file/run.pt": "cannot be written",
    "--dataset MNIST --data-root {folder}/file": "MNIST is missing or damaged; delete",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_options_are_named_and_leave_no_file(tmp_path, capfd, line):
    (tmp_path / "file").touch()
    output = tmp_path / "set.safetensors"
    output.write_bytes(b"an older file")
    assert run_here(output, "--iterations", 3, *line.format(folder=tmp_path).split()) in (1, 2)
    error = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert BAD[line] in error
    assert names(tmp_path) == ["file", "set.safetensors"]
    assert output.read_bytes() == b"an older file"


def test_a_missing_output_and_one_that_cannot_be_written_are_named(tmp_path, monkeypatch, capsys):
    assert run_here() == 2
    assert "OUTPUT" in capsys.readouterr().err
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("work had begun"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "set.safetensors"):
        assert run_here(path) == 1
        assert capsys.readouterr().err.startswith(f"error: output='{path}': ")
    assert names(tmp_path) == ["file"]


def test_equal_commands_give_equal_files_and_the_same_one_goes_on(tmp_path, capsys, monkeypatch):
    output, line = tmp_path / "set.safetensors", "--iterations 6 --init k-means"
    line += f" --epochs 2 --pool 2 --window 1 --checkpoint {tmp_path}/run.pt"
    contents = []
    for repeated in (False, False, True):
        if not repeated:
            (tmp_path / "run.pt").unlink(missing_ok=True)
        assert run_here(output, *line.split()) == 0
        contents.append(output.read_bytes())
        assert f"{output}: written after 6 of 6 iterations" in capsys.readouterr().out
        assert names(tmp_path) == ["run.pt", "set.safetensors"]
    assert contents[0] == contents[1] == contents[2]
    made = {"network": "LeNet", "initialization": "random", "seed": 0, "iterations": 6}
    assert made.items() <= read_notes(output).items()
    assert run_here(output, *line.split(), "--seed", 1) == 1
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    assert output.read_bytes() == contents[0]


def test_mnist_from_its_folder(tmp_path, mnist_root):
    line = ("--dataset", "MNIST", "--data-root", mnist_root, "--iterations", 1)
    assert run_here(tmp_path / "set.safetensors", *line, "--test-networks", 1) == 0
    assert read_notes(tmp_path / "set.safetensors")["dataset"] == "MNIST"


def test_diverged_training_leaves_the_output_alone(tmp_path, monkeypatch, capsys):
    output = tmp_path / "set.safetensors"
    output.write_bytes(b"a sound set")
    assert run_here(output, "--iterations", 3, "--step-size", "1e30") == 1
    message = "error: the meta-gradient is not finite at iteration 0; lower step_size="
    assert capsys.readouterr().err.startswith(message)
    assert du.load(tmp_path / "set.diverged.safetensors").iterations == 0

    def diverge(run):  # in the last step, which no gradient follows
        run.distilled.images.data[0, 0] = math.inf

    monkeypatch.setattr(runs.Run, "run", diverge)
    assert run_here(output, "--iterations", 1) == 1
    assert "the set has values that are not finite" in capsys.readouterr().err
    assert output.read_bytes() == b"a sound set"


def test_a_full_disk_costs_nothing_that_was_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    output, write_bytes, full = tmp_path / "set.safetensors", Path.write_bytes, ["run.pt", "set"]

    def write(path: Path, data: bytes) -> int:
        if path.name.startswith(tuple(full)) and path.parent == tmp_path:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    message = r"run\.pt': cannot be written \(No space left on device\); the run goes on"
    with pytest.warns(UserWarning, match=message):
        assert run_here(output, "--iterations", 3, "--checkpoint", tmp_path / "run.pt") == 1
    error = capsys.readouterr().err
    problem = "cannot be written (No space left on device)"
    assert error.startswith(f"error: output='{output}': {problem}")
    assert du.load(error.split("'")[3]).iterations == 3
    assert names(tmp_path) == ["temporary"]


def test_ctrl_c_writes_what_was_learned_and_the_same_command_goes_on(tmp_path, monkeypatch):
    output, unroll, calls = tmp_path / "set.safetensors", du.unroll, []
    line = (output, "--iterations", 8, "--checkpoint", tmp_path / "run.pt")

    def interrupted(network, distilled, **options):
        calls.append(1)
        if len(calls) == 7:  # of which two are for validations
            signal.raise_signal(signal.SIGINT)
        return unroll(network, distilled, **options)

    assert run_here(*line) == 0
    whole = output.read_bytes()
    (tmp_path / "run.pt").unlink()
    interrupted.__qualname__ = "unroll"
    monkeypatch.setattr(du, "unroll", interrupted)
    assert run_here(*line) == 130
    assert 0 < read_notes(output)["iterations"] < 8
    assert run_here(*line) == 0
    assert output.read_bytes() == whole


def test_ctrl_c_under_torchrun_writes_what_was_learned_once(tmp_path):
    output, checkpoint = tmp_path / "set.safetensors", tmp_path / "run.pt"
    line = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "study.train"]
    line += [*SMALL.split(), output, "--checkpoint", checkpoint, "--iterations", 5000]
    job = subprocess.Popen(
        [sys.executable, *map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not checkpoint.exists() or len(read_losses(checkpoint)) < 5:
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert printed.count("set.safetensors: written after") == 1, "the first process alone writes"
    notes = read_notes(output)
    assert notes["iterations"] == len(read_losses(checkpoint))
    assert "torchrun --nproc-per-node=2" in notes["command"]


def read_losses(checkpoint: Path) -> list[float]:
    return runs.read_checkpoint(checkpoint)["state"]["history"]["loss"]
