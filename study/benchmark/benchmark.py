"""Speed and memory of distillation, beside other ways to compute the same meta-gradient.

    python -m study.benchmark.benchmark                            everything, in about an hour on 2 CPU cores
    python -m study.benchmark.benchmark --only gradient memory

Writes Markdown to out/benchmark.md, where sections that are not run keep their place; results.md beside this file has
what was measured for the project. Each measurement has a process of its own. Peak memory is read from Linux's /proc.
"""

import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

import distill_utils as du
from study import runs
from study.benchmark import rivals
from study.methods.architectures import ConvNet
from study.methods.decoders import multi_formation
from study.methods.truncation import Checkpointed
from study.report import markdown_table

TOLERANCE = 1e-3  # of a gradient's norm
# what a method takes: set, networks, real batch
Problem = tuple[du.DistilledSet, list[nn.Module], du.Split]


def ensemble_gradient(
    distilled: du.DistilledSet,
    networks: list[nn.Module],
    real: du.Split,
    *,
    unroll: Callable = du.unroll,
) -> None:
    """This project's meta-gradient, as `du.Distillation` computes it: all networks in one ensemble."""
    distilled.zero_grad()
    du.outer_loss(du.Ensemble(networks), distilled, real, unroll=unroll).backward()


def jax_scan(*problem: object) -> None:
    from study.benchmark import in_jax  # here, as a process is pinned before it starts JAX

    in_jax.jax_scan(*problem)


METHODS = {
    "this project": ensemble_gradient,
    "(a) one `higher` loop per network": rivals.higher_loop,
    "(b) `functional_call` loop": rivals.functional_loop,
    "(b) in one ensemble": rivals.functional_ensemble,
    "(c) TorchOpt MetaSGD": rivals.torchopt_loop,
    "(d) per-step products, as the original": rivals.step_products,
    "(e) forward over reverse, as in MixFlow-MG": rivals.forward_over_reverse,
    "(f) JAX, compiled": jax_scan,
}


def make_problem(
    *, updates: int = 30, networks: int = 1, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Problem:  # fmt: skip
    """Ten steps of ten images for `updates` updates, networks and a real batch; random, since only time counts."""
    with du.seeded(0):
        images, labels = torch.randn(10, 10, 1, 28, 28), torch.eye(10).repeat(10, 1, 1)
        distilled = du.DistilledSet(images, labels, epochs=updates // 10, step_size=0.02).to(device)
        real = du.Split(torch.randn(batch_size, 1, 28, 28), torch.randint(10, (batch_size,)))
        lenets = [du.LeNet().to(device) for _ in range(networks)]
    return distilled, lenets, du.Split(*(part.to(device) for part in real))


def as_dataset(real: du.Split) -> du.Dataset:
    """Random images as a dataset, as `du.Distillation` takes it."""
    return du.Dataset("random", 0.0, 1.0, real, real, real, classes=10)


def apart(function: Callable, *arguments: object, cores: int = 1) -> object:
    """What `function` returns in a new process, pinned to the first `cores` cores, with a thread for each."""
    os.environ["OMP_NUM_THREADS"] = str(cores)
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=pin, initargs=(cores,)
    ) as pool:
        return pool.submit(function, *arguments).result()


def pin(cores: int) -> None:
    """Keeps this process, with what it starts, to some cores; JAX takes all whatever its flags say."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def seconds(work: Callable, *arguments: object, clock: Callable = time.perf_counter) -> float:
    """How long one call takes."""
    start = clock()
    work(*arguments)
    return clock() - start


def forget_peak() -> float:
    """Makes what this process holds now, in MiB, its peak."""
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")
    return peak_memory()


def peak_memory() -> float:
    """MiB that this process has held at most, by Linux's account, and nan elsewhere; getrusage's would include its
    parent's."""
    status = Path("/proc/self/status")
    return (
        int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
        if status.exists()
        else math.nan
    )


def timed(
    work: Callable, *arguments: object, repeats: int, clock: Callable = time.process_time
) -> tuple[list[float], float]:  # fmt: skip
    """Seconds of repeated calls, the first of which also compiles, and the memory that they take. They are processor
    time, which does not depend on what else the machine does."""
    before = forget_peak()
    times = [seconds(work, *arguments, clock=clock) for _ in range(1 + repeats)]
    return times, peak_memory() - before


# ------------------------------------------------------------------------------------------ sections


def machine() -> str:
    """The machine, and the speed of a product of square matrices on it."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpu_name(cpuinfo.read_text() if cpuinfo.exists() else "")
    return (
        f"{cpu}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}. Processes have one core and one thread unless stated otherwise. There, a product of "
        f"1024 × 1024 matrices runs at {apart(matrix_speed):.0f} GFLOP/s. Networks are LeNets unless stated otherwise."
    )


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo, or its architecture where there is none, as on ARM."""
    found = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine() or "CPU"


def matrix_speed() -> float:
    """GFLOP/s of a product of 1024 × 1024 matrices."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / statistics.median(timed(torch.matmul, a, b, repeats=50)[0]) / 1e9


def gradient() -> str:
    """Seconds and memory of one meta-gradient, by method and number of networks."""
    for method in METHODS.values():
        apart(check_gradient, method)
    sizes, rounds = {1: 7, 8: 4, 16: 3}, 2
    head, rows = ["method"], {name: [name] for name in METHODS}
    for networks, repeats in sizes.items():
        head += [f"seconds, {networks} network{'s' * (networks > 1)}", "MiB"]
        found = {name: [] for name in METHODS}
        for _ in range(rounds):
            for name, method in METHODS.items():  # in turns, as the speed of a machine varies
                found[name].append(apart(time_gradient, method, networks, repeats))
        for name, each in found.items():
            times = [second for times, _ in each for second in times[1:]]
            low, middle, high = (f(times) / networks for f in (min, statistics.median, max))
            rows[name] += [
                f"{middle:.3f} ({low:.3f}-{high:.3f})",
                f"{max(memory for _, memory in each):.0f}",
            ]
            if networks == 1:
                rows[name].append(f"{statistics.mean(times[0] for times, _ in each):.1f}")
        head += ["first call"] if networks == 1 else []
    return (
        "One meta-gradient through 10 steps × 3 epochs of 10 images, real batch of 256. Seconds are "
        f"processor time for each network: median, minimum and maximum over {rounds} processes with "
        + ", ".join(f"{count} repeats at {networks}" for networks, count in sizes.items())
        + " networks, the methods in turns. The first call compiles, where a method does; imports do not count. Memory "
        "is the peak above what the process held before, compilation included. All gradients are checked to be equal "
        "first.\n\n" + markdown_table(head, list(rows.values()))
    )


def check_gradient(method: Callable) -> None:
    """Raises ValueError unless a method gives this project's gradient."""
    error = gradient_error(method)
    du.require(
        error < TOLERANCE, f"{method.__name__}: its gradient is off by {error:.1e} of the norm"
    )


def gradient_error(
    method: Callable = ensemble_gradient, *, device: torch.device | str = "cpu"
) -> float:
    """How far a method's meta-gradient in float32 is from this project's on the CPU, relative to its norm; after 10
    updates, as long unrolls amplify rounding."""
    gradients = []
    for compute, where in ((ensemble_gradient, "cpu"), (method, device)):
        problem = make_problem(updates=10, networks=2, device=where)  # the same numbers on each
        compute(*problem)
        learned = problem[0].images, problem[0].raw_step_sizes
        gradients.append(torch.cat([each.grad.flatten().cpu() for each in learned]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def time_gradient(method: Callable, networks: int, repeats: int) -> tuple[list[float], float]:
    method(*make_problem(updates=10, batch_size=8))  # imports what is imported at first use
    return timed(method, *make_problem(networks=networks), repeats=repeats)


def processes(networks: int = 16, counts: tuple[int, ...] = (1, 2, 4)) -> str:
    """The same networks per iteration, divided among several processes."""
    rows, cores = [], len(os.sched_getaffinity(0))
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.multiprocessing.spawn(
                work_in_a_job, (count, networks // count, folder), nprocs=count
            )
            unroll, average = torch.load(Path(folder, "seconds"))
        rows.append([count, unroll, average, rows[0][1] / (unroll + average) if rows else 1.0])
    rows = [
        [
            count,
            f"{unroll:.2f}",
            f"{1000 * average:.1f}",
            f"{gain:.2f} ×",
            f"{100 * gain / min(count, cores):.0f}%",
        ]
        for count, unroll, average, gain in rows
    ]
    head = ["processes", "seconds to unroll", "milliseconds to average", "gain", "of as many cores"]
    return (
        f"An iteration with {networks} networks, divided among processes of one thread on {cores} cores, real batches "
        "of 256; medians of 5 iterations in the slowest process.\n\n" + markdown_table(head, rows)
    )


def work_in_a_job(rank: int, count: int, networks: int, folder: str) -> None:
    """One of several processes; the first writes the median seconds of unrolling and of averaging."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    distilled, _, real = make_problem(batch_size=4096)
    run = du.Distillation(distilled, as_dataset(real), du.LeNet, iterations=1, networks=networks)
    run.seed, found = rank, []
    for _ in range(6):
        unroll = seconds(run.compute_gradient)
        torch.distributed.barrier()
        found.append([unroll, seconds(runs.average_over_processes, run, 0.0, False)])
    medians = torch.tensor(found[1:]).median(0).values
    torch.distributed.all_reduce(medians, torch.distributed.ReduceOp.MAX)
    if rank == 0:
        torch.save(medians.tolist(), Path(folder, "seconds"))
    torch.distributed.destroy_process_group()


def memory() -> str:
    """Peak memory and time of long unrolls, whole and with gradient checkpointing."""
    rows = []
    for updates in (10, 30, 100, 300):
        segment = round(updates**0.5)
        found = [
            apart(time_unroll, updates, unroll) for unroll in (du.unroll, Checkpointed(segment))
        ]
        (whole, whole_peak), (short, short_peak) = (
            (statistics.median(times[1:]), peak) for times, peak in found
        )
        bound = whole_peak / updates**0.5
        rows.append(
            [
                updates,
                f"{whole:.2f}",
                f"{whole_peak:.0f}",
                segment,
                f"{short:.2f}",
                f"{short_peak:.0f}",
            ]
        )
        rows[-1].append(f"{bound:.0f}")
    head = [
        "updates",
        "whole: seconds",
        "MiB",
        "segment",
        "checkpointed: seconds",
        "MiB",
        "MiB of the whole ÷ √updates",
    ]
    return (
        "One network, real batch of 64; peak memory above what the process held before; processor time, medians of 3."
        "\n\n" + markdown_table(head, rows)
    )


def time_unroll(updates: int, unroll: Callable) -> tuple[list[float], float]:
    # loads what torch loads at first use
    ensemble_gradient(*make_problem(updates=10, batch_size=64))
    return timed(
        partial(ensemble_gradient, unroll=unroll),
        *make_problem(updates=updates, batch_size=64),
        repeats=3,
    )


def larger() -> str:
    """A problem of CIFAR-10's size, by the same functions."""
    cores, rows = len(os.sched_getaffinity(0)), []
    for title, unroll in {
        "whole": du.unroll,
        "checkpointed, segments of 8": Checkpointed(8),
    }.items():
        times, peak = apart(time_larger, unroll, cores=cores)
        each = statistics.median(times)
        rows.append([title, f"{each:.1f}", f"{peak / 1024:.1f}", f"{200 * each / 60:.0f}"])
    head = ["unroll", "seconds", "GiB", "minutes for 200 networks, one after another"]
    return (
        "One iteration on random data of CIFAR-10's size: 10 images [3, 32, 32] per class as 10 steps of 10, 60 "
        "updates, ConvNet-3 of width 128 with instance normalization, real batch of 256, all cores; medians of 2. The "
        "last column is computed.\n\n" + markdown_table(head, rows)
    )


def time_larger(
    unroll: Callable, *, width: int = 128, epochs: int = 6, repeats: int = 1
) -> tuple[list[float], float]:
    with du.seeded(0):
        real = du.Split(torch.randn(1000, 3, 32, 32), torch.randint(10, (1000,)))
        images = torch.randn(10, 10, 3, 32, 32)
    distilled = du.DistilledSet(
        images, torch.eye(10).repeat(10, 1, 1), epochs=epochs, step_size=0.01, momentum=0.9
    )
    make_network = partial(ConvNet, width=width, channels=3, size=32)
    run = du.Distillation(distilled, as_dataset(real), make_network, iterations=1, unroll=unroll)
    return timed(run.compute_gradient, repeats=repeats, clock=time.perf_counter)


# -------------------------------------------------------------------------------- time to an accuracy
TARGETS = (80, 85, 90)  # percent of the validation images
NETWORKS, EVERY = 10, 20  # fresh networks behind an accuracy, and iterations between two of them
STARTS = {
    "noise": "noise", "real images": "real", "k-means": "k-means",
}  # fmt: skip
ADAM = {"step_size": 0.003, "optimizer": "Adam", "soft_labels": True, "label_smoothing": 0.1}
WAYS = {  # options of the set, and of the outer loop
    "SGD": ({"step_size": 0.015, "momentum": 0.5}, {"batch_size": 128}),
    "Adam, soft labels": (ADAM, {"batch_size": 64}),
    "Adam, soft labels, multi-formation": ({**ADAM, "factor": 2}, {"batch_size": 128}),
}
ORIGINAL = "(d), as the original"


def reach(limit: float, data_root: str) -> str:
    """Seconds of distillation to some accuracies, from each start."""
    jobs = [(start, way, limit, data_root) for start in STARTS for way in (*WAYS, ORIGINAL)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(time_to_targets, *zip(*jobs, strict=True)))
    head = ["start", "method", *(f"seconds to {target}%" for target in TARGETS)]
    head += ["iterations", "seconds in all", "last accuracy"]
    return (
        f"Until the mean of {NETWORKS} fresh networks passes an accuracy on the 5,000 validation images: 100 stored "
        f"images, 30 updates. Networks are tested every {EVERY} iterations, which does not count; the search for "
        f"k-means centers counts. Seconds are those of one thread's processor time. A run ends after {limit:.0f}, or "
        "when it has passed all. One run each: another seed may take longer or less long. This project's settings were "
        "found on these validation images; (d) has the original's: plain SGD, one network and 1,024 real images per "
        "iteration, step sizes from 0.02, standard normal noise, Adam at 0.01 with betas 0.5 and 0.999, halved every "
        "40 epochs.\n\n" + markdown_table(head, rows)
    )


def time_to_targets(start: str, way: str, limit: float, data_root: str) -> list:
    """A row of the table: one start, one method."""
    mnist = du.load_mnist(data_root, device="cpu")
    begin = time.process_time()
    distilled, iterate = (start_as_the_original if way == ORIGINAL else start_here)(
        start, way, mnist
    )
    spent, iterations, passed = time.process_time() - begin, 0, {}
    while len(passed) < len(TARGETS) and spent < limit:
        spent += sum(seconds(iterate, clock=time.process_time) for _ in range(EVERY))
        iterations += EVERY
        found = du.evaluate(
            distilled, mnist.validation, du.LeNet, networks=NETWORKS, seed=du.VALIDATION_SEED
        )
        passed |= {
            target: f"{spent:.0f}"
            for target in TARGETS
            if found.mean >= target and target not in passed
        }
    return [
        start,
        way,
        *(passed.get(target, "-") for target in TARGETS),
        iterations,
        f"{spent:.0f}",
        found,
    ]


def start_here(start: str, way: str, mnist: du.Dataset) -> tuple[du.DistilledSet, Callable]:
    """The set and an iteration of this project."""
    inner, outer = WAYS[way]
    factor = inner.get("factor", 1)
    images = du.initialize(mnist, STARTS[start], steps=10, per_class=factor**2, std=0.3)
    make = multi_formation if factor > 1 else du.DistilledSet
    distilled = make(*images, epochs=3, **inner)
    run = du.Distillation(distilled, mnist, du.LeNet, iterations=5000, **outer)
    return distilled, run.step


def start_as_the_original(
    start: str, _: str, mnist: du.Dataset
) -> tuple[du.DistilledSet, Callable]:
    """The set and an iteration of the original's outer loop on the original's gradient."""
    images = du.initialize(mnist, STARTS[start], steps=10)
    distilled = du.DistilledSet(*images, epochs=3, step_size=0.02)
    optimizer = torch.optim.Adam(distilled.parameters(), lr=0.01, betas=(0.5, 0.999))
    halving = torch.optim.lr_scheduler.StepLR(
        optimizer, 40 * (len(mnist.train.labels) // 1024), gamma=0.5
    )
    torch.manual_seed(0)

    def iterate() -> None:
        rows = torch.randint(len(mnist.train.labels), (1024,))
        rivals.step_products(
            distilled, [du.LeNet()], du.Split(mnist.train.images[rows], mnist.train.labels[rows])
        )
        optimizer.step()
        halving.step()

    return distilled, iterate


# ------------------------------------------------------------------------------------------------ file
TITLES = {
    "machine": "Machine", "gradient": "One meta-gradient", "processes": "Several processes", "memory": "Long unrolls",
    "larger": "A larger problem", "reach": "Time to an accuracy",
}  # fmt: skip


def write(output: Path, title: str, text: str) -> None:
    """Puts a section into the file, in the place of an older one of that title."""
    old = output.read_text() if output.exists() else ""
    parts = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)*)", old, re.MULTILINE))
    parts[title] = text + "\n"
    sections = [
        f"## {each}\n\n{parts[each].strip()}\n" for each in TITLES.values() if each in parts
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        "\n".join(["# Benchmark\n\nWritten by `python -m study.benchmark.benchmark`.\n", *sections])
    )


def main(
    only: tuple[Literal["machine", "gradient", "processes", "memory", "larger", "reach"], ...] = tuple(TITLES),
    limit: float = 180, output: Path = Path("out/benchmark.md"), data_root: str = "",
) -> None:  # fmt: skip
    """Measures, prints and writes the sections of the benchmark.

    Args:
        only: sections to run.
        limit: seconds of each run of the section `reach`.
        output: a Markdown file.
        data_root: where MNIST lies; by default the environment variable DATA_ROOT, or data.
    """
    sections = {
        "machine": machine, "gradient": gradient, "processes": processes, "memory": memory, "larger": larger,
        "reach": partial(reach, limit, data_root or os.environ.get("DATA_ROOT", "data")),
    }  # fmt: skip
    for name in only:
        text = sections[name]()
        write(output, TITLES[name], text)
        print(f"\n## {TITLES[name]}\n\n{text}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
