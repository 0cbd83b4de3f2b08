"""Runs the experiments that the stored results do not hold yet, and then writes their tables and figures.

    python -m study                      everything that is missing, two experiments at a time
    python -m study ablation             one part of it: paper, ablation or best
    python -m study paper --only attack  one experiment, or several
    python -m study --fraction 0.01 --networks 2 --results out/glance    a quick look at all of it

An interrupted experiment continues from its checkpoints when the same command runs again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

import distill_utils as du
from study import report
from study.experiments import ablation, paper
from study.experiments import sets as best_sets
from study.records import RESULTS, Results, Study

PARTS = {
    "paper": paper.EXPERIMENTS,
    "ablation": ablation.EXPERIMENTS,
    "best": best_sets.EXPERIMENTS,
}
NEEDS = {**paper.NEEDS, **best_sets.NEEDS}
ERRORS = (ValueError, FloatingPointError, OSError)
Job = tuple[str, str]  # a part, and the name of an experiment


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Args:
        part: which part of the study.
        only: experiments by their names, to run no others.
        results: the folder of the results; experiments that it holds are not run again.
        device: auto, cpu, cuda or mps.
        data_root: the folder of MNIST.
        workers: experiments at a time, each in a process of its own.
        fraction: of the iterations.
        networks: fresh networks behind an accuracy.
        report: run nothing; write all tables and figures again, and the cards of the sets in distilled/.
    """

    part: tyro.conf.Positional[Literal["all", "paper", "ablation", "best"]] = "all"
    only: tuple[str, ...] = ()
    results: Path = RESULTS
    device: str = "auto"
    data_root: str = field(default_factory=lambda: os.environ.get("DATA_ROOT", "data"))
    workers: int = 2
    fraction: float = 1.0
    networks: int = 200
    report: bool = False

    def __post_init__(self) -> None:
        du.require(
            0 < self.fraction <= 1, f"--fraction {self.fraction}: give more than 0 and at most 1"
        )
        du.require_counts(networks=self.networks, workers=self.workers)
        du.pick_device(self.device)
        names = [name for part in self.parts for name in PARTS[part]]
        for name in self.only:
            du.require(name in names, f"--only {name}: give one of {', '.join(names)}")

    @property
    def parts(self) -> list[str]:
        return [part for part in PARTS if self.part in ("all", part)]

    @property
    def stored(self) -> bool:
        """Whether the results are those of the repository."""
        return self.results.resolve() == RESULTS.resolve()

    def find_missing(self) -> list[Job]:
        """The experiments without results. Raises ValueError where there are results of other settings."""
        missing = []
        for part in self.parts:
            runs = Results(self.results / part).runs.set_index("experiment")
            for name in self.only or PARTS[part]:
                if name not in runs.index and name in PARTS[part]:
                    missing.append((part, name))
                for setting in ("fraction", "networks") if name in runs.index else ():
                    there, given = runs.loc[name, setting], getattr(self, setting)
                    remedy = f"{name} in {self.results / part} has {there:g}; name another folder with --results"
                    du.require(there == given, f"--{setting} {given:g}: {remedy}")
        return missing

    def run(self, job: Job) -> None:
        """Runs one experiment in this process and prints its accuracies."""
        part, name = job
        out = Path(du.__file__).with_name("out") / "study" if self.stored else self.results
        study = Study(
            name, part, self.results, out / "checkpoints", du.pick_device(self.device), self.data_root, self.fraction,
            self.networks,
        )  # fmt: skip
        study.run(PARTS[part][name])
        results = Results(study.folder)
        for row in dict.fromkeys(line["row"] for line in study.lines["accuracies"]):
            print(f"{name}: {row}: {results.pooled(name, row)}", flush=True)


def run_worker(job: Job, options: Options) -> None:
    """Runs one experiment in a process of its own, which SIGTERM interrupts calmly."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches the parent alone
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() // options.workers)))
    try:
        options.run(job)
    except KeyboardInterrupt:
        sys.exit(1)
    except ERRORS as error:
        sys.exit(f"error: {job[1]}: {error}")


def run_side_by_side(jobs: list[Job], options: Options) -> None:
    """Runs experiments in processes, `options.workers` at a time; an interrupt or an error stops them all."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            unfinished = {name for _, name in [*waiting, *running]}
            ready = [job for job in waiting if NEEDS.get(job[1]) not in unfinished]
            for job in ready[: options.workers - len(running)]:
                waiting.remove(job)
                running[job] = context.Process(target=run_worker, args=(job, options))
                # inherited while the process starts
                interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
                running[job].start()
                signal.signal(signal.SIGINT, interrupt)
            time.sleep(0.1)
            for job in [job for job, process in running.items() if not process.is_alive()]:
                failed = running.pop(job).exitcode != 0
                du.require(
                    not failed,
                    f"{job[1]} has failed; the same command continues with what is missing",
                )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def main(options: Options) -> None:
    """Runs what is missing, and writes the reports of what has changed."""
    jobs = [] if options.report else options.find_missing()
    if jobs:
        # downloads it once, or fails before any process starts
        du.load_mnist(options.data_root, device="cpu")
    elif not options.report:
        print(f"{options.results} holds all these experiments")
    if len(jobs) > 1 and options.workers > 1:
        run_side_by_side(jobs, options)
    else:
        for job in jobs:
            options.run(job)
    for part in options.parts:
        results = Results(options.results / part)
        changed = part in dict(jobs) or not (results.folder / "summary.md").exists()
        whole = set(PARTS[part]) <= set(results.runs.experiment)
        if options.report or (changed and whole):
            report.write_report(part, results)
    if options.report and options.stored:
        repository, (paper_results, best) = (
            Path(du.__file__).parent,
            (Results(RESULTS / part) for part in ("paper", "best")),
        )
        report.write_cards(repository / "distilled", best)
        report.write_readme(repository / "README.md", paper_results, best)


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
    # new processes find `run_worker` in this module by its full name
    from study import __main__ as importable

    importable.run_command_line()
