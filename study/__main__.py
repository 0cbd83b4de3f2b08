"""The paper's whole MNIST study, every experiment that needs no GPU, beside its figures; and what lies beyond it.

    make study                                     all that results/ does not hold yet, two experiments at a time
    python -m study beyond                         the same for the experiments that go further than the paper
    python -m study --only attack                  one experiment, or several
    python -m study --fraction 0.01 --networks 2 --results glance         a glance at all of it, in some minutes

Each experiment writes one JSON file, with the accuracy of every network it tested, and its distilled sets. What is
there is not run again; an interrupted distillation goes on from its checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distill_utils as du
from checks import require, require_positive
from study.beyond import BEYOND
from study.beyond_report import report_beyond
from study.experiments import EXPERIMENTS, Study
from study.report import pooled, report

PARTS = {"paper": (EXPERIMENTS, report, "summary.md"), "beyond": (BEYOND, report_beyond, "beyond.md")}


def run(names: list[str], arguments: argparse.Namespace) -> None:
    """Runs experiments one after the other, in this process."""
    for name in names:
        start = time.perf_counter()
        experiment = Study(
            name, arguments.results, du.pick_device(arguments.device), arguments.data_root, arguments.fraction,
            arguments.networks,
        )  # fmt: skip
        try:
            {**EXPERIMENTS, **BEYOND}[name](experiment)
        except BaseException:
            experiment.keep_time(time.perf_counter() - start)
            raise
        experiment.write(time.perf_counter() - start)
        for row, found in experiment.rows.items():
            print(f"{name}: {row}: {pooled(found['values'])}", flush=True)


def run_side_by_side(names: list[str], arguments: argparse.Namespace) -> None:
    """Runs each experiment in a process of its own, `workers` at a time; ends with the first error."""
    options = [f"--{option}={getattr(arguments, option.replace('-', '_'))}"
               for option in ("results", "device", "data-root", "fraction", "networks")]  # fmt: skip
    threads = str(max(1, os.cpu_count() // arguments.workers))

    def start(name: str) -> None:
        command = [sys.executable, "-m", "study", arguments.part, "--only", name, *options]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        try:
            list(pool.map(start, names))
        except (KeyboardInterrupt, subprocess.CalledProcessError):
            pool.shutdown(cancel_futures=True)  # waits for those at work, which end by themselves
            sys.exit("the study is not whole; the same command goes on with it")


def study(arguments: argparse.Namespace) -> None:
    """Runs what is missing, and reports once nothing is."""
    du.pick_device(arguments.device)
    require(0 < arguments.fraction <= 1, f"--fraction={arguments.fraction}: give more than 0 and at most 1")
    require_positive(networks=arguments.networks, workers=arguments.workers)
    experiments, write_report, written = PARTS[arguments.part]
    names = [name for name in arguments.only or experiments if not is_there(name, arguments)]
    if len(names) > 1 and arguments.workers > 1:
        run_side_by_side(names, arguments)
    else:
        run(names, arguments)
    missing = [name for name in experiments if not is_there(name, arguments)]
    if not missing and (names or not (arguments.results / written).exists()):
        write_report(arguments.results)


def is_there(name: str, arguments: argparse.Namespace) -> bool:
    """Whether an experiment's result is; raises ValueError where it came of other options."""
    path = arguments.results / f"{name}.json"
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    for option in ("fraction", "networks"):
        given = getattr(arguments, option)
        require(
            record[option] == given,
            f"--{option}={given}: {path} has {option} {record[option]}; name another folder with --results",
        )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, default="paper", help="which experiments; the paper's")
    names = [*EXPERIMENTS, *BEYOND]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--results", type=Path, default="results", help="the folder that the results go to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"), help="where MNIST lies")
    parser.add_argument("--workers", type=int, default=2, help="experiments at a time")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the iterations; 0.01 for a glance")
    parser.add_argument("--networks", type=int, default=200, help="fresh networks behind an accuracy")
    arguments = parser.parse_args()
    try:
        study(arguments)
    except (ValueError, FloatingPointError, du.DatasetUnavailable) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with it")


if __name__ == "__main__":
    main()
