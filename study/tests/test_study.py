"""Running experiments: what is kept, what is not run again, interrupts and processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import distill_utils as du
from study import __main__ as command
from study import records, report
from study.experiments import paper
from study.tests.small import small_study

ROOT = Path(du.__file__).parent


def run_command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["study", *map(str, arguments)])
    command.run_command_line()


@pytest.fixture
def handlers():
    """Puts signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def quick(monkeypatch, handlers) -> list[str]:
    """Two experiments that only leave their names, and a report that does too."""
    ran = []

    def experiment(name: str, study: records.Study) -> None:
        ran.append(name)
        study.add("some", [50.0])

    experiments = {name: partial(experiment, name) for name in ("one", "two")}
    monkeypatch.setattr(command, "PARTS", {"paper": experiments})
    monkeypatch.setattr(report, "write_report", lambda part, results: ran.append("report"))
    monkeypatch.setattr(du, "load_mnist", lambda *_, **__: None)
    return ran


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, quick):
    options = ["paper", "--results", tmp_path, "--workers", 1, "--device", "cpu"]
    run_command(monkeypatch, *options, "--only", "two")
    assert quick == ["two"], "no report of a part that is not whole"
    run_command(monkeypatch, *options)
    assert quick == ["two", "one", "report"]
    (tmp_path / "paper" / "summary.md").touch()
    run_command(monkeypatch, *options)
    assert quick == ["two", "one", "report"], "nothing is left to do"
    with pytest.raises(SystemExit, match=r"error: --fraction 0.5: .* has 1; name another folder"):
        run_command(monkeypatch, *options, "--fraction", 0.5)


def test_missing_data_is_found_out_before_any_process_starts(tmp_path, monkeypatch, quick):
    def load_mnist(*_, **__):
        raise FileNotFoundError("MNIST is not there")

    monkeypatch.setattr(du, "load_mnist", load_mnist)
    monkeypatch.setattr(command, "run_side_by_side", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit, match="error: MNIST is not there"):
        run_command(monkeypatch, "paper", "--results", tmp_path)


def test_a_whole_study_writes_nothing(monkeypatch, handlers):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (records.RESULTS / "ablation").iterdir()}

    before = written()
    monkeypatch.setattr(du, "load_mnist", lambda *_, **__: pytest.fail("not needed"))
    run_command(monkeypatch, "ablation")
    assert written() == before


def add_some(folder: Path, number: int) -> None:
    lines = {
        "accuracies": [{"experiment": f"e{number}", "row": "some", "set": 0, "network": 0, "value": number}],
        "sets": [], "runs": [{"experiment": f"e{number}", "seconds": 1, "fraction": 1.0, "networks": 2}],
    }  # fmt: skip
    records.add_lines(folder / "paper", folder / "lock", f"e{number}", lines)


def test_processes_that_add_to_one_table_lose_no_lines(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(partial(add_some, tmp_path), range(20), chunksize=1)
    results = records.Results(tmp_path / "paper")
    assert len(results.accuracies) == len(results.runs) == 20
    add_some(tmp_path, 3)  # again: in place of the earlier lines
    assert len(records.Results(tmp_path / "paper").accuracies) == 20


def test_an_interrupted_experiment_continues_to_the_identical_set(tmp_path, monkeypatch, handlers):
    def run(folder: Path) -> None:
        small_study("fixed-10-seed0", "paper", folder).run(paper.EXPERIMENTS["fixed-10-seed0"])

    apply_gradient = du.Distillation.apply_gradient

    def interrupt(self) -> None:
        apply_gradient(self)
        if self.iteration == 10:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(du.Distillation, "apply_gradient", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not list((tmp_path / "paper").glob("*"))
    clock = tmp_path / "checkpoints" / "fixed-10-seed0" / "seconds"
    assert float(clock.read_text()) > 0
    clock.write_text("1000")
    run(tmp_path)
    run(tmp_path / "whole")
    file = Path("paper") / "fixed-10-seed0.safetensors"
    assert (tmp_path / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    seconds = records.Results(tmp_path / "paper").run("fixed-10-seed0").seconds
    assert seconds >= 1000, "the time before counts"
    assert not clock.parent.exists()


def test_ctrl_c_stops_all_processes_with_a_sentence(tmp_path, mnist_root):
    options = ["--results", str(tmp_path), "--data-root", mnist_root]
    options += ["--fraction", "0.5", "--networks", "2"]
    names = ["fixed-10-seed0", "fixed-10-seed1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "study", "paper", "--only", *names, *options, "--device", "cpu"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        checkpoints = [tmp_path / "checkpoints" / name / "set.pt" for name in names]
        while not all(path.exists() for path in checkpoints):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output.splitlines()[-1] == "interrupted; the same command continues from here"
    assert "Traceback" not in output
    assert not list(tmp_path.glob("paper/*.csv"))
