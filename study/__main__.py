"""Runs the experiments that the results do not hold yet.

    python -m study                                     everything that is missing, two experiments at a time
    python -m study --only attack fixed-10              some experiments
    python -m study --quick --results out/glance        a look at all of it, in a few minutes

An interrupted experiment continues from its checkpoints when the same command runs again.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import distill_utils as du
from study import runs
from study.experiments import ablation, paper, rivals, storage
from study.experiments.experiment import RESULTS, Experiment, Rows, add_rows, read_table

MODULES = paper, ablation, rivals, storage
EXPERIMENTS = {name: recipe for part in MODULES for name, recipe in part.EXPERIMENTS.items()}
ERRORS = (ValueError, FloatingPointError, OSError)


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Args:
        only: experiments by their names, to run no others.
        results: the folder of the results; experiments that it holds are not run again.
        quick: try everything on few images, with few iterations and networks; the figures mean nothing.
        device: auto, cpu, cuda or mps.
        data_root: the folder of MNIST and Fashion-MNIST.
        workers: experiments at a time, each in a process.
    """

    only: tuple[str, ...] = ()
    results: Path = RESULTS
    quick: bool = False
    device: str = "auto"
    data_root: str = field(default_factory=lambda: os.environ.get("DATA_ROOT", "data"))
    workers: int = 2

    def __post_init__(self) -> None:
        du.require_counts(workers=self.workers)
        for name in self.only:
            du.require(name in EXPERIMENTS, f"--only {name}: give some of {', '.join(EXPERIMENTS)}")
        quick = read_table(self.results, "runs").quick
        stored = self.quick and self.results.resolve() == RESULTS.resolve()
        same = not stored and all(quick == self.quick)
        remedy = f"{self.results} has other results; name another folder with --results"
        du.require(same, f"--quick {self.quick}: {remedy}")

    def find_missing(self) -> list[Experiment]:
        """The experiments without results, by name and seed."""
        stored = read_table(self.results, "runs")
        there = set(zip(stored.experiment, stored.seed, strict=True))
        place = (self.results, du.pick_device(self.device), self.data_root, self.quick)
        missing = [
            Experiment(name, seed, *place)
            for name in self.only or EXPERIMENTS
            for seed in EXPERIMENTS[name].seeds[: 1 if self.quick else None]
            if (name, seed) not in there
        ]
        return sorted(missing, key=lambda experiment: experiment.seed)  # a first one of each


def prepare_worker() -> None:
    """Ctrl-C in the terminal reaches the parent alone, and workers end with the parent."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits until the parent has ended, and ends this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(experiment: Experiment) -> Rows:
    """Runs one experiment in a worker, where SIGTERM interrupts it calmly; returns its lines of the tables."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return experiment.run(EXPERIMENTS[experiment.name])
    except ERRORS as error:
        raise ValueError(f"{experiment.name}, seed {experiment.seed}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_side_by_side(experiments: list[Experiment], options: Options) -> None:
    """Runs experiments in processes and keeps what they measure; an interrupt or an error stops them all."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    # Workers share the cores, in torch and in scikit-learn, which read this when they start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.workers)))
    waiting, jobs = list(experiments), {}
    with ProcessPoolExecutor(options.workers, context, prepare_worker) as pool:
        try:
            while waiting or jobs:
                # No more than there are workers, which would begin another one after an interrupt.
                for experiment in waiting[: options.workers - len(jobs)]:
                    waiting.remove(experiment)
                    jobs[pool.submit(work, experiment)] = experiment
                for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                    add_rows(options.results, job.result())
                    experiment = jobs.pop(job)
                    shutil.rmtree(experiment.checkpoints, ignore_errors=True)
                    print(f"{experiment.name}, seed {experiment.seed}", flush=True)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def main(options: Options) -> None:
    """Runs what is missing."""
    options.results.mkdir(parents=True, exist_ok=True)
    with runs.locked("results", options.results / "measurements.csv"):
        missing = options.find_missing()
        if missing:
            for name in ("MNIST", "FashionMNIST"):  # downloads them, or fails before any work
                du.load_mnist(options.data_root, name=name, device="cpu")
            run_side_by_side(missing, options)
    print(f"{options.results} has all these experiments")


def run_command_line() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C
    try:
        main(tyro.cli(Options, prog="python -m study", description=__doc__))
    except ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    from study import __main__ as importable  # workers find `work` in this module by its full name

    importable.run_command_line()
