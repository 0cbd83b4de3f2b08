"""Speed and memory of distillation, beside other ways to compute the same meta-gradient.

    python -m study.benchmark.benchmark                          everything, in 10 minutes on 2 CPU cores
    python -m study.benchmark.benchmark --only accuracy --initializations "real images" noise --limit 1000

Writes Markdown to out/benchmark.md, where sections that are not run keep their place; results.md beside this file has
what was measured for the project. Peak memory is read from Linux's /proc.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import distill_utils as du
from study import running
from study.benchmark import rivals
from study.report import markdown_table
from study.truncation import Checkpointed

MODULE = "study.benchmark.benchmark"
Problem = tuple[du.DistilledSet, list[nn.Module], du.Split]  # what a method takes: set, networks, real batch


def ensemble_gradient(
    distilled: du.DistilledSet, networks: list[nn.Module], real: du.Split, *, unroll: Callable = du.unroll
) -> None:
    """This project's meta-gradient, as `du.Distillation` computes it: all networks in one ensemble."""
    distilled.zero_grad()
    network = du.Ensemble(networks) if len(networks) > 1 else networks[0]
    du.outer_loss(network, distilled, real, unroll=unroll).backward()


METHODS = {
    "this project": ensemble_gradient,
    "(a) one `higher` loop per network": rivals.higher_loop,
    "(b) `functional_call` loop": rivals.functional_loop,
    "(c) TorchOpt MetaSGD": rivals.torchopt_loop,
    "(d) per-step products, as the original": rivals.step_products,
}
OURS, *RIVALS = METHODS


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


def seconds(work, *arguments, **options) -> float:
    """How long one call takes, to the end of what it started on a GPU."""
    start = time.perf_counter()
    work(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(works: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each work; in turns, as the host's speed varies. Works with few repeats are long, and need no
    warm-up.
    """
    times = {name: [] for name in works}
    warm_ups = 1 if repeats > 3 else 0
    for turn in range(warm_ups + repeats):
        for name, work in works.items():
            spent = seconds(work)
            if turn >= warm_ups:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


# ------------------------------------------------------------------------------------------ sections


def machine(arguments: argparse.Namespace) -> str:
    """The machine, and the speed of a product of square matrices on it."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpu_name(cpuinfo.read_text() if cpuinfo.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    return (
        f"{cpu}, {os.cpu_count()} cores{gpu}; {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads unless stated otherwise. A product of "
        f"1024 × 1024 matrices runs at {matrix_speed(arguments.device):.0f} GFLOP/s. Networks are LeNets; gradients "
        "are checked to be equal before they are timed."
    )


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo, or its architecture where there is none, as on ARM."""
    found = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine() or "CPU"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matrix_speed(device: str) -> float:
    """GFLOP/s of a product of 1024 × 1024 matrices."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    return 2 * 1024**3 / medians({"product": lambda: a @ b}, 50)["product"] / 1e9


def iteration(arguments: argparse.Namespace) -> str:
    """Seconds for one meta-gradient, by method, real batch and number of networks."""
    check_gradients(arguments.device)
    columns, repeats = [], {1: 11, 4: 3, 16: 3, 64: 1}
    for batch_size in (256, 1024):
        for networks in repeats:
            problem = make_problem(networks=networks, batch_size=batch_size, device=arguments.device)
            works = {name: partial(method, *problem) for name, method in METHODS.items()}
            columns.append(((batch_size, networks), medians(works, repeats[networks])))
            print(batch_size, networks, columns[-1][1], flush=True)
    head = [
        "seconds",
        *(f"{networks} network{'s' * (networks > 1)}, batch {batch_size}" for (batch_size, networks), _ in columns),
    ]
    rows = [[name, *(f"{times[name]:.2f}" for _, times in columns)] for name in METHODS]
    best = [min(times[name] for name in RIVALS) / times[OURS] for _, times in columns]
    rows.append(["best of (a)-(d) ÷ this project", *(f"{ratio:.2f} ×" for ratio in best)])
    return (
        "One meta-gradient through 10 steps × 3 epochs of 10 images. Medians of "
        + ", ".join(f"{count} repeats at {networks}" for networks, count in repeats.items())
        + " networks, the methods in turns.\n\n"
        + markdown_table(head, rows)
    )


def check_gradients(device: str) -> None:
    """All methods give one gradient, up to rounding; after 10 updates, as long unrolls amplify rounding."""
    torch.backends.cudnn.allow_tf32 = False
    distilled, networks, real = make_problem(updates=10, networks=2, device=device)
    gradients = {}
    for name, method in METHODS.items():
        method(distilled, networks, real)
        gradients[name] = distilled.images.grad
        error = (gradients[name] - gradients[OURS]).norm() / gradients[OURS].norm()
        du.require(error < 1e-3, f"{name}: its gradient is off by {error:.1e} of the norm; the comparison is void")


def profiled(arguments: argparse.Namespace) -> str:
    """Where the time goes: convolutions, and arithmetic against the machine's best."""
    rows = []
    with FlopCounterMode(display=False) as counter:
        ensemble_gradient(*make_problem())
    per_network, best = counter.get_total_flops(), matrix_speed(arguments.device)
    for networks in (1, 4, 8, 16):
        work = partial(ensemble_gradient, *make_problem(networks=networks, device=arguments.device))
        time_taken = medians({"": work}, 4)[""]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work()
        spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        convolutions = sum(time for name, time in spent.items() if name.startswith("aten::") and "convolution" in name)
        share, speed = convolutions / sum(spent.values()), networks * per_network / time_taken / 1e9
        each = f"{time_taken / networks:.3f}"
        rows.append([networks, each, f"{100 * share:.0f}%", f"{speed:.0f}", f"{100 * speed / best:.0f}%"])
    head = ["networks in an ensemble", "seconds for each", "in convolutions", "GFLOP/s", "of a matrix product's"]
    return (
        f"Meta-gradients with real batches of 256, of {per_network / 1e9:.1f} GFLOP a network as torch counts them; "
        "medians of 4 repeats.\n\n" + markdown_table(head, rows)
    )


def processes(arguments: argparse.Namespace) -> str:
    """The same networks per iteration in one process with all cores, and in one process per core."""
    cores, rows = available_cores(), []
    if cores == 1:
        return "One core, and so nothing to compare."
    for networks in (cores, 8 * cores):
        times = {1: 0.0, cores: 0.0}
        for count in times:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "-m", MODULE]
            threads = {"OMP_NUM_THREADS": str(cores // count)}
            times[count] = json.loads(child([*command, "--worker", str(networks // count)], **threads))
        one, several = times.values()
        rows.append([networks, f"{one:.2f}", f"{several:.2f}", f"{one / several:.2f} ×"])
    head = ["networks per iteration", f"one process, {cores} threads", f"{cores} processes, 1 thread each", "gain"]
    return (
        "Seconds for a meta-gradient, averaged over the processes, on CPU; medians of 5 iterations, real batches "
        "of 256.\n\n" + markdown_table(head, rows)
    )


def worker(networks: int) -> None:
    """One of several processes: prints the median seconds of an iteration with `networks` of its own."""
    torch.distributed.init_process_group()
    distilled, _, real = make_problem(batch_size=4096)
    random = du.Dataset("random", 0.0, 1.0, real, real, real, classes=10)
    run = du.Distillation(distilled, random, du.LeNet, iterations=1, networks=networks)
    run.rank = running.process_rank()[0]
    median = medians({"": lambda: running.average_over_processes(run, run.compute_gradient(), False)}, 5)[""]
    if run.rank == 0:
        print(json.dumps(median))
    torch.distributed.destroy_process_group()


def memory(arguments: argparse.Namespace) -> str:
    """Peak memory and time of long unrolls, whole and with gradient checkpointing."""
    rows = []
    for updates in (10, 30, 100, 300):
        row = [updates]
        for segment in (0, round(updates**0.5)):
            took, peak = json.loads(child([sys.executable, "-m", MODULE, "--unroll", str(updates), str(segment)]))
            row += [segment, f"{peak:.0f}", f"{took:.2f}"][0 if segment else 1 :]
        rows.append(row)
    head = ["updates", "whole: MiB", "seconds", "segment", "checkpointed: MiB", "seconds"]
    return (
        "One network, real batch of 64, on CPU; peak resident memory above that of the process before, each "
        "in a process of its own; seconds are the median of 3.\n\n" + markdown_table(head, rows)
    )


def unroll_once(updates: int, segment: int) -> None:
    """Prints seconds and peak memory of a meta-gradient; in a process that does nothing else."""
    problem, unroll = make_problem(updates=updates, batch_size=64), Checkpointed(segment) if segment else du.unroll
    ensemble_gradient(*make_problem(updates=10, batch_size=64))  # loads what torch loads at first use
    before = peak_memory()
    times = [seconds(ensemble_gradient, *problem, unroll=unroll) for _ in range(3)]
    print(json.dumps([statistics.median(times), peak_memory() - before]))


def peak_memory() -> float:
    """MiB that this process has held at most, by Linux's account; getrusage's would include its parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def child(command: list[str], **environment: str) -> str:
    """What `command` prints, run in the repository's folder."""
    options = {"cwd": Path(du.__file__).parent, "env": {**os.environ, **environment}}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def accuracy(arguments: argparse.Namespace) -> str:
    """Seconds of distillation to 79.5% of the validation images: this project, and (d) at the original's settings."""
    options = [
        "--limit",
        str(arguments.limit),
        "--device",
        arguments.device,
        "--data-root",
        str(Path(arguments.data_root).resolve()),
    ]
    commands = [[sys.executable, "-m", MODULE, "--reach", title, *options] for title in arguments.initializations]
    with ThreadPoolExecutor() as pool:
        rows = [row for lines in pool.map(partial(child, OMP_NUM_THREADS="1"), commands) for row in json.loads(lines)]
    head = ["synthetic-image initialization", "method", "iterations", f"seconds to {TARGET}%", "validation accuracy"]
    return (
        f"Until the mean of {NETWORKS} fresh networks passes the paper's figure on the 5,000 validation images. Two "
        "initializations run side by side, on one thread each. (d) has the original's settings: one network and "
        "1,024 real images per iteration, step sizes from 0.02, Adam at 0.01 with betas 0.5 and 0.999, halved every 40 "
        "epochs. "
        f"It is validated every {EVERY} iterations, which is not counted in its time, and stops after "
        f"{arguments.limit:g} seconds. (a) to (c) have the same gradients and so take as many iterations. This "
        "project's iterations are fixed beforehand, as found in earlier runs on these validation images; it takes "
        "batches of 64 at learning rates 0.06 and 0.02 from real images, of 128 at 0.03 and 0.01 from noise of "
        "standard deviation 0.3, and inner momentum 0.5.\n\n" + markdown_table(head, rows)
    )


TARGET = 79.5  # percent, what the paper reports for 100 images and random initializations
NETWORKS = 10  # fresh networks behind an accuracy
EVERY = 100  # iterations between validations of (d)
INITIALIZATIONS = {"real images": du.init_from_real, "noise": partial(du.init_from_noise, std=0.3)}
FAST = {
    "real images": {"iterations": 400, "batch_size": 64, "learning_rate": 0.06, "step_size_learning_rate": 0.02},
    "noise": {"iterations": 600, "batch_size": 128},
}


def reach(title: str, arguments: argparse.Namespace) -> None:
    """Prints both methods' rows for one synthetic-image initialization."""
    mnist = du.load_mnist(arguments.data_root, device=arguments.device)
    rows = []
    for name, method in {OURS: reach_fast, RIVALS[-1]: reach_as_the_original}.items():
        iterations, took, result = method(title, mnist, arguments.limit)
        reached = f"{took:.0f}" if result.mean >= TARGET else f"not in {took:.0f}"
        rows.append([title, name, iterations, reached, f"{result.mean:.2f} ± {result.std:.1f}%"])
    print(json.dumps(rows))


def reach_fast(title: str, mnist: du.Dataset, limit: float) -> tuple[int, float, du.Accuracies]:
    """This project's own settings: iterations, seconds and accuracy."""
    distilled = du.DistilledSet(*INITIALIZATIONS[title](mnist, steps=10), epochs=3, step_size=0.015, momentum=0.5)
    iterations = FAST[title]["iterations"]
    options = {"validate_every": iterations, "validation_networks": 1, "progress": False}
    took = seconds(du.distill, distilled, mnist, du.LeNet, **options, **FAST[title])
    return iterations, took, du.evaluate(distilled, mnist.validation, du.LeNet, networks=NETWORKS)


def accuracy_beyond(arguments: argparse.Namespace) -> str:
    """Seconds to the same accuracy with later techniques, the search for cluster centers included."""
    mnist = du.load_mnist(arguments.data_root, device=arguments.device)
    inner = {"epochs": 3, "step_size": 0.003, "optimizer": "Adam", "soft_labels": True, "label_smoothing": 0.1}
    outer = {"iterations": 20, "batch_size": 64, "validate_every": 20, "validation_networks": 1, "progress": False}
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for seed in range(3):
        begin = time.perf_counter()
        distilled = du.DistilledSet(*du.init_from_kmeans(mnist, steps=10, seed=seed), **inner)
        du.distill(distilled, mnist, du.LeNet, seed=seed, **outer)
        took = time.perf_counter() - begin
        result = du.evaluate(distilled, mnist.validation, du.LeNet, networks=NETWORKS)
        rows.append([seed, outer["iterations"], f"{took:.0f}", f"{result.mean:.2f} ± {result.std:.1f}%"])
    torch.set_num_threads(threads)
    return (
        "The same images and updates, but from k-means centers, with soft labels and inner Adam, on one thread; the "
        "search for the centers is part of the time.\n\n"
        + markdown_table(["seed", "iterations", "seconds", "validation accuracy"], rows)
    )


def reach_as_the_original(title: str, mnist: du.Dataset, limit: float) -> tuple[int, float, du.Accuracies]:
    """The original's outer loop on the original's gradient, until it reaches the accuracy or the limit."""
    initialize = du.init_from_noise if title == "noise" else du.init_from_real
    distilled = du.DistilledSet(*initialize(mnist, steps=10), epochs=3, step_size=0.02)
    optimizer = torch.optim.Adam(distilled.parameters(), lr=0.01, betas=(0.5, 0.999))
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 40 * (len(mnist.train.labels) // 1024), gamma=0.5)

    def iterate(iteration: int) -> None:
        with du.seeded(0, iteration):
            network = du.LeNet().to(mnist.train.images.device)
            rows = torch.randint(len(mnist.train.labels), (1024,)).to(mnist.train.labels.device)
        rivals.step_products(distilled, [network], du.Split(mnist.train.images[rows], mnist.train.labels[rows]))
        optimizer.step()
        halving.step()

    iteration, spent = 0, 0.0
    while True:
        if iteration % EVERY == 0:
            result = du.evaluate(distilled, mnist.validation, du.LeNet, networks=NETWORKS)
            if result.mean >= TARGET or spent > limit:
                return iteration, spent, result
        spent += seconds(iterate, iteration)
        iteration += 1


SECTIONS = {
    "machine": ("Machine", machine),
    "iteration": ("Time of a meta-gradient", iteration),
    "profile": ("Where the time goes", profiled),
    "processes": ("Several processes", processes),
    "memory": ("Long unrolls", memory),
    "accuracy": ("Time to the paper's accuracy", accuracy),
    "beyond": ("Time to the same accuracy with later techniques", accuracy_beyond),
}


def write(output: Path, title: str, text: str) -> None:
    """Puts a section into the file, in the place of an older one of that title."""
    old = output.read_text() if output.exists() else ""
    parts = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)*)", old, re.MULTILINE))
    parts[title] = text + "\n"
    titles = [each for each, _ in SECTIONS.values() if each in parts]
    sections = [f"## {each}\n\n{parts[each].strip()}\n" for each in titles]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([f"# Benchmark\n\nWritten by `python -m {MODULE}`.\n", *sections]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument(
        "--initializations", nargs="+", choices=INITIALIZATIONS, default=["real images"], help="of the accuracy section"
    )
    parser.add_argument("--limit", type=float, default=20, help="seconds that (d) has to reach the paper's accuracy")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark.md"), help="a Markdown file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"), help="where MNIST lies")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # these three: the script calling itself
    parser.add_argument("--reach", choices=INITIALIZATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--unroll", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    if arguments.reach:
        return reach(arguments.reach, arguments)
    if arguments.unroll:
        return unroll_once(*arguments.unroll)
    for name in arguments.only:
        title, section = SECTIONS[name]
        text = section(arguments)
        write(arguments.output, title, text)
        print(f"\n## {title}\n\n{text}", flush=True)


if __name__ == "__main__":
    main()
