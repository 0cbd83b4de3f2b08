"""Time and memory of the meta-gradient, beside other ways to compute it.

    python -m study.benchmark.benchmark                     everything, in 15 minutes on 2 idle cores
    python -m study.benchmark.benchmark --only processes    one section

Needs Linux, and TorchOpt beside the project's own requirements. `results.md` has what it measured for the project.
"""

import argparse
import gc
import inspect
import os
import re
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import distributed
from torch.nn.utils import parameters_to_vector

import distill_utils as du
from study.benchmark.rivals import RIVALS
from study.methods.truncation import Checkpointed
from study.runs import Run


def ensemble(networks: list, distilled: du.DistilledSet, real: du.Split, unroll=du.unroll) -> None:
    """This project's gradient of the networks' summed loss: all of them at once."""
    loss = du.outer_loss(du.Ensemble(networks), distilled, real, unroll=unroll)
    (len(networks) * loss).backward()


def one_by_one(networks: list, distilled: du.DistilledSet, real: du.Split, rival: Callable) -> None:
    for network in networks:
        rival(network, distilled, real)


METHODS = {name: partial(one_by_one, rival=rival) for name, rival in RIVALS.items()}
METHODS = {"this project": ensemble, **METHODS}


def make_problem(*, networks: int = 1, updates: int = 30, batch_size: int = 256) -> tuple:
    """What a method takes: networks, ten steps of ten images for a multiple of ten updates, and a
    real batch. Images are random, as only time counts."""
    with du.seeded(0):
        images, labels = torch.randn(10, 10, 1, 28, 28), torch.eye(10).repeat(10, 1, 1)
        distilled = du.DistilledSet(images, labels, epochs=updates // 10)
        real = du.Split(torch.randn(batch_size, 1, 28, 28), torch.randint(10, (batch_size,)))
        return [du.LeNet() for _ in range(networks)], distilled, real


def require_same_gradient(method: Callable) -> None:
    """Raises ValueError where a method's gradient is not this project's."""
    gradients = []
    for compute in (ensemble, method):  # for few updates, as many amplify rounding
        problem = make_problem(networks=2, updates=10, batch_size=8)
        compute(*problem)
        gradients.append(parameters_to_vector(tensor.grad for tensor in problem[1].parameters()))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    du.require(error < 1e-3, f"{method=}: its gradient is off by {error:.1e} of the norm")


def run_apart(*works: Callable) -> list:
    """What each work returns; all run at once, in new processes of one thread."""
    options = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(len(works), get_context("spawn"), **options) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def measure_gradient(method: Callable, calls: int, options: dict) -> tuple[list[float], float]:
    """Processor seconds of each call, of which the first may compile, and the MiB that they take."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # JAX takes every core that it may
    require_same_gradient(method)
    work = partial(method, *make_problem(**options))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = read_peak()
    seconds = timeit.repeat(work, gc.enable, time.process_time, repeat=calls, number=1)
    return seconds, read_peak() - before


def read_peak() -> float:
    """MiB that this process has held at most; getrusage may tell those of its parent."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_iterations(rank: int, processes: int, networks: int, folder: str) -> list[float]:
    """Seconds by the clock of each iteration in a process of a job."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    _, distilled, real = make_problem(batch_size=4096)
    dataset = du.Dataset("random", 0.0, 1.0, real, real, real, classes=10)
    run = Run(distilled, dataset, du.LeNet, iterations=6, networks=networks)
    seconds = timeit.repeat(run.step, gc.enable, repeat=6, number=1)
    distributed.destroy_process_group()
    return seconds


def gradients() -> list[dict]:
    """One meta-gradient

    Through 10 steps × 3 epochs of 10 images, with a real batch of 256. Seconds are processor time per network: median,
    minimum and maximum over two processes, the methods in turns, without the first call, in which JAX compiles. MiB
    are the peak above what the process held before. All gradients are equal, which is checked first.
    """
    problems = {f"{count} at once": {"networks": count} for count in (1, 8, 16)}
    return compare(METHODS, problems, processes=2)


def unrolls() -> list[dict]:
    """Long unrolls

    One network, real batch of 64, one process each. In segments, only the weights before each of them are stored.
    """
    methods = {f"segments of {n}": partial(ensemble, unroll=Checkpointed(n)) for n in (5, 10, 17)}
    options = {f"{n} updates": {"updates": n, "batch_size": 64} for n in (10, 30, 100, 300)}
    return compare({"whole": ensemble, **methods}, options, processes=1)


def compare(methods: dict, problems: dict[str, dict], *, processes: int) -> list[dict]:
    """A table with a row for each method and columns for each problem."""
    rows = {name: {"method": name} for name in methods}
    for title, options in problems.items():
        networks, results = options.get("networks", 1), {name: [] for name in methods}
        for name in [*methods] * processes:  # in turns, as the speed of a machine varies
            calls = 6 if networks == 1 else 3
            results[name] += run_apart(partial(measure_gradient, methods[name], calls, options))
        for name, row in rows.items():
            seconds, memory = zip(*results[name], strict=True)
            row.setdefault("first call", f"{seconds[0][0]:.1f}")
            row[f"{title}: seconds"] = summarize(seconds, networks)
            row[f"{title}: MiB"] = f"{max(memory):.0f}"
    return [*rows.values()]


def processes() -> list[dict]:
    """Several processes

    An iteration with 16 networks, divided among processes of one thread. Seconds are by the clock, in all of them.
    """
    rows = []
    for count in [count for count in (1, 2, 4, 8, 16) if count <= len(os.sched_getaffinity(0))]:
        with tempfile.TemporaryDirectory() as folder:
            work = partial(measure_iterations, processes=count, networks=16 // count)
            seconds = run_apart(*(partial(work, rank, folder=folder) for rank in range(count)))
        rows.append({"processes": count, "seconds": summarize(seconds)})
    return rows


def summarize(calls: list[list[float]], networks: int = 1) -> str:
    """Median, minimum and maximum of the seconds per network, without the first call of each process."""
    seconds = [second / networks for process in calls for second in process[1:]]
    return f"{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


SECTIONS = {section.__name__: section for section in (gradients, processes, unrolls)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--output", type=Path, default="out/benchmark.md")
    options = parser.parse_args()
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    versions = [f"{name} {version(name)}" for name in ("torch", "jax")]
    text = f"# Benchmark\n\n{cpu}, {os.cpu_count()} cores; {', '.join(versions)}; {date.today()}.\n"
    for name in options.only:
        rows = SECTIONS[name]()
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        text += f"\n## {inspect.getdoc(SECTIONS[name])}\n\n{table}\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
