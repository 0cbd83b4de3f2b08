"""What the device flag does: the method on one device, held to the CPU, and what ensembles cost there.

    python -m study.benchmark.devices --device cuda     prints Markdown; `make test-device DEVICE=cuda` tests first

Raises AssertionError where the gradient of 10 updates in float32 differs from the CPU's by over a thousandth of its
norm, where the accuracy of a shipped set is two points (or three standard deviations, if that is more) from its card's,
or where a run does not continue on the other device.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path

import nbformat
import torch
import tyro
from nbclient import NotebookClient

import distill_utils as du
from study import runs
from study.benchmark import benchmark
from study.benchmark.benchmark import (
    TOLERANCE,
    ensemble_gradient,
    gradient_error,
    make_problem,
    seconds,
)
from study.experiments.protocols import train_from_scratch
from study.report import markdown_table

SCHEDULE, SCRATCH = "mnist-ipc1-mf2-50updates", "mnist-ipc10-compressed"


def card_name(device: torch.device) -> str:
    """The name of the card or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def continue_elsewhere(dataset: du.Dataset, cpu: du.Dataset) -> str:
    """Ten iterations on the device with a checkpoint, and ten more of the same run on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "iterations": 20,
            "batch_size": 64,
            "validate_every": 10,
            "validation_networks": 1,
            "progress": False,
        }
        sets = [
            du.DistilledSet(*du.initialize(cpu, "real", steps=3)).to(each.train.images.device)
            for each in (dataset, cpu)
        ]
        run = runs.Run(sets[0], dataset, du.LeNet, checkpoint=Path(folder, "run.pt"), **options)
        for _ in range(10):
            run.step()
        run.validate()
        history = runs.distill(sets[1], cpu, du.LeNet, checkpoint=Path(folder, "run.pt"), **options)
    assert len(history.loss) == 20, "the run did not continue"
    return f"loss {history.loss[0]:.2f} before, {history.loss[-1]:.2f} after"


def accuracies(dataset: du.Dataset) -> list[list]:
    """Shipped sets on the device beside their cards; asserts that they agree."""
    device, rows = dataset.test.images.device, []
    trainings = {
        SCHEDULE: lambda distilled: du.evaluate(distilled, dataset.test, du.LeNet, networks=16),
        SCRATCH: lambda distilled: train_from_scratch(
            distilled,
            dataset.test,
            du.LeNet,
            networks=2,
            optimizer="Adam",
            step_size=0.001,
            batch_size=64,
            epochs=40,
        ),
    }
    for name, train in trainings.items():
        begin = time.perf_counter()
        found = train(du.load(name, device=device))
        card = Path(du.__file__).with_name("distilled").joinpath(f"{name}.md").read_text()
        mean, std = (
            float(number) for number in re.search(r"\*\*(\d+\.\d) ± (\d+\.\d)%", card).groups()
        )
        assert abs(found.mean - mean) < max(2.0, 3 * std), (
            f"{name}: {found}, but its card has {mean} ± {std}%"
        )
        rows.append([name, found, f"{mean} ± {std}%", f"{time.perf_counter() - begin:.1f}"])
    return rows


def ensembles(device: torch.device, sizes: tuple[int, ...]) -> list[list]:
    """Seconds of a meta-gradient and peak memory, for ensembles of several sizes, the smallest first."""
    rows = []
    for networks in sizes:
        problem = make_problem(networks=networks, device=device)
        synchronized(device, *problem)  # warms up
        before = forget_peak(device)
        spent = statistics.median(seconds(synchronized, device, *problem) for _ in range(3))
        rows.append(
            [
                networks,
                f"{spent:.2f}",
                f"{spent / networks:.4f}",
                f"{read_peak(device) - before:.0f}",
            ]
        )
    return rows


def synchronized(device: torch.device, *problem: object) -> None:
    """A meta-gradient, to the end of what it starts on a GPU."""
    ensemble_gradient(*problem)
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def forget_peak(device: torch.device) -> float:
    """Makes the MiB that are in use on the device the peak, and returns them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return benchmark.forget_peak() if device.type == "cpu" else read_peak(device)


def read_peak(device: torch.device) -> float:
    """MiB in use on the device at most; on an Apple GPU, those in use now."""
    readers = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}
    return readers[device.type]() / 2**20 if device.type in readers else benchmark.peak_memory()


def run_tutorial(device: torch.device, data_root: str) -> None:
    """Runs `distill.ipynb` from top to bottom; what it writes is deleted."""
    path = Path(du.__file__).with_name("distill.ipynb")
    notebook = nbformat.read(path, as_version=4)
    parameters = next(
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    with tempfile.TemporaryDirectory() as folder:
        parameters.source += (
            f"\nDEVICE, DATA_ROOT, OUT = {device.type!r}, {data_root!r}, {folder!r}"
        )
        NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": path.parent}}
        ).execute()


def main(
    device: str = "auto", sizes: tuple[int, ...] = (1, 16, 64, 256), data_root: str = ""
) -> None:
    """Checks a device and prints a report.

    Args:
        device: auto, cpu, cuda or mps.
        sizes: networks in an ensemble, in ascending order.
        data_root: where MNIST lies; by default the environment variable DATA_ROOT, or data.
    """
    place, root = du.pick_device(device), data_root or os.environ.get("DATA_ROOT", "data")
    cpu, dataset = (du.load_mnist(root, device=where) for where in ("cpu", place))
    print(
        f"# {card_name(place)}\n\nPython {platform.python_version()}, torch {torch.__version__}\n"
    )
    for tf32 in (False, True) if place.type == "cuda" else (False,):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        error = gradient_error(device=place)
        assert tf32 or error < TOLERANCE, (
            f"the meta-gradient differs from the CPU's by {error:.1e} of its norm"
        )
        print(
            f"- Meta-gradient, TF32 {'on' if tf32 else 'off'}: {error:.1e} of its norm from the CPU's"
        )
        table = markdown_table(
            ["networks", "seconds", "seconds for each", "MiB"], ensembles(place, sizes)
        )
        print(f"\n{table}\n")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"- A run continued on the CPU: {continue_elsewhere(dataset, cpu)}\n")
    print(markdown_table(["set", "here", "its card", "seconds"], accuracies(dataset)))
    print(
        f"\n- The tutorial: {seconds(run_tutorial, place, str(Path(root).resolve())):.0f} seconds"
    )


if __name__ == "__main__":
    tyro.cli(main)
