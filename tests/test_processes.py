"""Several processes distil together; the command line, with and without torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Smooth, make_toy, wait_for_progress

import command_line
import distill_utils as du

ROOT = Path(du.__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes on two cores
OPTIONS = {"batch_size": 16, "validate_every": 2, "validation_networks": 2, "progress": False, "seed": 3}


def make_start() -> du.DistilledSet:
    return du.DistilledSet(*du.noise_start(make_toy(), steps=2), epochs=2, step_size=0.2)


def in_a_job(rank: int, folder: Path) -> None:
    """One of two processes: an iteration whose gradient it keeps, then a run of six."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    once, whole = make_start(), make_start()
    du.distill(once, make_toy(), Smooth, iterations=1, **OPTIONS)
    history = du.distill(whole, make_toy(), Smooth, iterations=6, networks=2, checkpoint=folder / "run.pt", **OPTIONS)
    torch.save([once.images.grad, once.raw_step_sizes.grad, whole.state_dict(), vars(history)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    torch.multiprocessing.spawn(in_a_job, (folder,), nprocs=2)
    return folder


def results(job: Path) -> list[list]:
    return [torch.load(job / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_take_the_mean_of_their_gradients(job):
    distilled, toy = make_start(), make_toy()
    gradients = []
    for rank in (0, 1):
        du.outer_gradient(distilled, [du.draw(Smooth, toy.train, 16, seed=(3, 0, rank))])
        gradients.append([distilled.images.grad, distilled.raw_step_sizes.grad])
    assert not torch.allclose(gradients[0][0], gradients[1][0])
    for images, step_sizes, *_ in results(job):
        torch.testing.assert_close(images, (gradients[0][0] + gradients[1][0]) / 2)
        torch.testing.assert_close(step_sizes, (gradients[0][1] + gradients[1][1]) / 2)


def test_two_processes_do_what_one_does_with_twice_the_networks(job):
    alone = make_start()
    history = du.distill(alone, make_toy(), Smooth, iterations=6, networks=4, **OPTIONS)
    (*_, first, seen), (*_, second, unseen) = results(job)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert seen["loss"] == unseen["loss"] == pytest.approx(history.loss, rel=1e-5)
    assert seen["iterations"] == [0, 2, 4, 6]
    assert seen["accuracy"] == pytest.approx(history.accuracy)
    assert unseen["accuracy"] == [], "the first process alone validates"


def test_one_process_goes_on_from_a_checkpoint_of_two(job):
    distilled, checkpoint = make_start(), job / "run.pt"
    history = du.distill(distilled, make_toy(), Smooth, iterations=6, networks=2, checkpoint=checkpoint, **OPTIONS)
    state = results(job)[0][2]
    assert len(history.loss) == 6
    assert all(torch.equal(distilled.state_dict()[name], state[name]) for name in state)


def command(*arguments: str | Path, processes: int | None = None) -> list[str]:
    """The command line on scikit-learn's digits, small enough for a test."""
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    small = "--dataset digits --device cpu --steps 1 --step-size 0.05 --batch-size 16 --validate-every 5"
    small += " --validation-networks 1 --test-networks 2"
    return [sys.executable, *runner, "-m", "distill_utils", *small.split(), *map(str, arguments)]


def start_job(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Two workers of torchrun, well into a run of 5,000 iterations, and their process numbers."""
    line = command(folder / "set.safetensors", "--checkpoint", folder / "run.pt", "--iterations", "5000", processes=2)
    with open(folder / "errors", "w") as errors, open(folder / "output", "w") as output:
        job = subprocess.Popen(line, cwd=ROOT, env=ONE_THREAD, stderr=errors, stdout=output)
    wait_for_progress(folder / "run.pt", job)
    return job, [worker.pid for worker in psutil.Process(job.pid).children()]


def test_a_dead_process_ends_the_job_and_one_process_goes_on(tmp_path):
    """SIGKILL to one of two workers; then the same command without torchrun."""
    job, workers = start_job(tmp_path)
    try:
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert job.wait(60) != 0
        assert "SIGKILL" in (tmp_path / "errors").read_text()
    finally:
        job.terminate()

    saved = torch.load(tmp_path / "run.pt")
    losses = saved["states"][3]["loss"]
    saved["settings"]["iterations"] = len(losses) + 5  # in place of the 5,000, which would take too long
    torch.save(saved, tmp_path / "run.pt")
    line = ["--checkpoint", tmp_path / "run.pt", "--iterations", len(losses) + 5]
    alone = command(tmp_path / "set.safetensors", *line)
    result = subprocess.run(alone, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=True)
    assert f"of the test set after {len(losses) + 5} iterations" in result.stdout
    after = torch.load(tmp_path / "run.pt")["states"][3]["loss"]
    assert len(losses) >= 5
    assert after[: len(losses)] == losses
    assert len(after) == len(losses) + 5
    du.DistilledSet.load(tmp_path / "set.safetensors")


def test_an_interrupted_job_writes_what_it_has(tmp_path):
    """Ctrl-C to torchrun, which hands it on to its workers."""
    job, _ = start_job(tmp_path)
    try:
        job.send_signal(signal.SIGINT)
        job.wait(60)
    finally:
        job.terminate()
    assert "interrupted after" in (tmp_path / "output").read_text()
    du.DistilledSet.load(tmp_path / "set.safetensors")


def test_the_command_line_has_every_option_of_distill(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill_utils", "--help"])
    with pytest.raises(SystemExit):
        command_line.command_line()
    text = " ".join(capsys.readouterr().out.split())
    for function in (du.distill, du.DistilledSet, du.noise_start):
        for option in command_line.options_of(function):
            assert f"--{option.name.replace('_', '-')}" in text
    assert "step sizes: roughly, their relative change in one iteration; 0 fixes them (default: 0.01)" in text


def test_the_command_line_passes_its_options_on(monkeypatch):
    line = "set.safetensors --steps 2 --iterations 7 --learning-rate 0.5 --learn-labels --no-progress --window 1"
    monkeypatch.setattr(sys, "argv", ["distill_utils", *line.split()])
    given = command_line.command_line()
    assert (given["steps"], given["iterations"], given["learning_rate"], given["window"]) == (2, 7, 0.5, 1)
    assert (given["learn_labels"], given["progress"], given["segment"]) == (True, False, None)


def test_a_bad_option_ends_the_command_with_its_remedy(tmp_path):
    bad = command(tmp_path / "set.safetensors", "--iterations", "0")
    result = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: iterations=0: give more than 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--test-networks", "0"], "error: test_networks=0: give more than 0"),
        (["--start", "noise", "--per-class", "-1"], "error: per_class=-1: give more than 0"),
        (["--tiles", "2"], "error: tiles=2: a step has 10 images; give a multiple of 4, as with per_class=4"),
        (["--optimizer", "Adam", "--momentum", "0.5"], "error: momentum=0.5: is SGD's; Adam has moments of its own"),
    ],
)
def test_what_would_fail_late_fails_at_once(tmp_path, options, message):
    bad = command(tmp_path / "set.safetensors", "--iterations", "3", *options)
    result = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == message
    assert not (tmp_path / "set.safetensors").exists()


def test_images_in_tiles_come_from_the_command_line_too(tmp_path):
    subprocess.run(
        command(tmp_path / "set.safetensors", "--iterations", "1", "--tiles", "2", "--per-class", "4"),
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    distilled = du.DistilledSet.load(tmp_path / "set.safetensors")
    assert distilled.images.shape == (1, 10, 1, 28, 28)
    assert distilled.decoded().shape == (1, 40, 1, 28, 28)


def test_a_folder_that_cannot_be_written_to_is_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    bad = command(tmp_path / "file" / "set.safetensors", "--iterations", "3")
    result = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert str(tmp_path / "file") in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_an_output_that_is_a_folder_is_named_at_once(tmp_path):
    result = subprocess.run(command(tmp_path, "--iterations", "3"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == f"error: output={tmp_path}: is a folder; name a file in it"


def test_training_that_diverges_leaves_what_it_had(tmp_path):
    bad = command(tmp_path / "set.safetensors", "--iterations", "3", "--step-size", "1e30")
    result = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: the outer gradient is not finite at iteration 0" in result.stderr
    du.DistilledSet.load(tmp_path / "set.safetensors")
