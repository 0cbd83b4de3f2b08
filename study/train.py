"""The command line: `python -m study.train OUTPUT`, alone or by `torchrun --nproc-per-node=2 -m`.

The exit status is 0 only where OUTPUT is written whole, 130 after Ctrl-C, else another one.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro

import distill_utils as du
from study import runs
from study.methods import truncation


def keywords(function: Callable) -> dict[str, object]:
    """The keyword-only parameters of a function, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


CORE = {**keywords(du.initialize), **keywords(du.DistilledSet), **keywords(du.Distillation)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Distill a dataset for LeNet. Under torchrun, several processes average their meta-gradients.

    The same command again resumes from its --checkpoint. Ctrl-C saves what was learned.
    """

    # Safetensors file for the distilled set.
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    dataset: Literal["MNIST", "FashionMNIST", "KMNIST", "digits"] = "MNIST"  # What to distill.
    # Folder of the dataset, which is downloaded there if missing. DATA_ROOT sets the default.
    data_root: str = field(default_factory=lambda: os.environ.get("DATA_ROOT", "data"))
    device: str = "auto"  # auto, cpu, cuda or mps.
    seed: int = CORE["seed"]  # Of the synthetic-image initialization, networks and real batches.
    steps: int = 10  # Training steps, each with images of its own.
    per_class: int = CORE["per_class"]  # Images per class in each step.
    epochs: int = CORE["epochs"]  # How often the steps are repeated.
    init: Literal["noise", "real", "k-means"] = "real"  # Synthetic-image initialization.
    init_std: float = CORE["std"]  # Standard deviation of --init noise.
    step_size: float = CORE["step_size"]  # Initial value of the step sizes.
    optimizer: Literal["SGD", "Adam"] = CORE["optimizer"]  # Inner optimizer.
    momentum: float = CORE["momentum"]  # Momentum of SGD.
    soft_labels: bool = CORE["soft_labels"]  # Learn the labels too.
    label_smoothing: float = CORE["label_smoothing"]  # How uniform --soft-labels start, up to 1.
    fixed_initialization: int | None = None  # Seed of one network to distill for, not random ones.
    iterations: int = 1000  # Steps of the outer optimizer.
    networks: int = CORE["networks"]  # Initializations in each iteration and process.
    batch_size: int = CORE["batch_size"]  # Real images in each iteration and process.
    learning_rate: float = CORE["learning_rate"]  # Of images and soft labels.
    step_size_learning_rate: float = CORE["step_size_learning_rate"]  # Of step sizes; 0 keeps them.
    window: int | None = None  # Random truncation window: differentiate so many updates only.
    # Network pool: keep so many networks, and train one on for a --window in each iteration.
    pool: int | None = None
    checkpointed: int | None = None  # Gradient checkpointing: store every so many updates only.
    checkpoint: Path | None = None  # State of the run; if the file exists, the run resumes from it.
    validate_every: int = CORE["validate_every"]  # Iterations between validations.
    validation_networks: int = CORE["validation_networks"]  # Behind each validation accuracy.
    test_networks: int = keywords(du.evaluate)["networks"]  # Behind the test accuracy.
    progress: bool = CORE["progress"]  # Show a progress bar.

    def __post_init__(self) -> None:
        """Raises ValueError for what the library would find late, or not at all."""
        du.require_counts(test_networks=self.test_networks)
        for name in ("seed", "fixed_initialization"):
            seed = getattr(self, name) or 0
            du.require(0 <= seed < 2**63, f"{name}={seed}: give at least 0 and less than 2**63")
        std, smoothing, updates = self.init_std, self.label_smoothing, self.checkpointed
        idle = self.init != "noise" and std != CORE["std"]
        du.require(std >= 0 and not idle, f"init_std={std}: give at least 0, and --init noise")
        idle = not self.soft_labels and smoothing != CORE["label_smoothing"]
        du.require(not idle, f"label_smoothing={smoothing}: has no effect without --soft-labels")
        alone = self.window is None or updates is None
        du.require(alone, f"checkpointed={updates}: does not go with --window; give one of them")
        same = self.checkpoint == self.output
        du.require(not same, f"checkpoint='{self.checkpoint}': is the output, too; name another")

    def take(self, function: Callable) -> dict[str, object]:
        """The options that are keyword-only parameters of a function, by name."""
        return {name: getattr(self, name) for name in keywords(function) if hasattr(self, name)}


def join_processes(name: str) -> torch.device:
    """This process's device. Under torchrun, which sets LOCAL_RANK, joins the other processes."""
    if "LOCAL_RANK" not in os.environ:
        return du.pick_device(name)
    if name == "auto":  # mps cannot average
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = du.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group()  # gloo for tensors on a CPU, nccl for those on a GPU
    return device


def load_dataset(options: Options, device: torch.device) -> du.Dataset:
    """The dataset; one process on a machine downloads what is missing while the others wait."""
    waits = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    if options.dataset == "digits":
        dataset = du.load_digits(device=device)
    else:
        dataset = du.load_mnist(options.data_root, name=options.dataset, device=device)
    if dist.is_initialized() and not waits:
        dist.barrier()
    return dataset


def make_unroll(options: Options) -> Callable:
    """The inner loop."""
    if options.pool is not None:
        return truncation.NetworkPool(options.pool, window=options.window)
    if options.window is not None:
        return truncation.RandomWindow(options.window, seed=options.seed)
    segment = options.checkpointed
    return du.unroll if segment is None else truncation.Checkpointed(segment)


def make_run(options: Options, dataset: du.Dataset) -> runs.Run:
    """The run, ready to start or to resume."""
    seed, counts = options.fixed_initialization, options.take(du.initialize)
    make_network = du.LeNet if seed is None else du.fixed_initialization(du.LeNet, seed=seed)
    images, labels = du.initialize(dataset, options.init, std=options.init_std, **counts)
    distilled = du.DistilledSet(images, labels, **options.take(du.DistilledSet))
    choices = {"unroll": make_unroll(options), **options.take(runs.Run)}
    return runs.Run(distilled, dataset, make_network, **choices)


def save(options: Options, run: runs.Run, path: Path) -> None:
    """Writes the set, in the first process alone. Where the disk refuses, the set goes to the
    temporary folder, and an OSError says so."""
    if run.rank > 0:
        return
    seed, processes = options.fixed_initialization, os.environ.get("LOCAL_WORLD_SIZE")
    runner = f"torchrun --nproc-per-node={processes}" if processes else "python"
    notes = {"network": "LeNet", "seed": options.seed, "versions": runs.versions()}
    notes["initialization"] = "random" if seed is None else f"fixed, seed {seed}"
    notes["command"] = f"{runner} -m study.train {shlex.join(sys.argv[1:])}"
    try:
        du.save(run.distilled, path, dataset=run.dataset, **notes)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="distilled-"), path.name)
        du.save(run.distilled, elsewhere, dataset=run.dataset, **notes)
        reason = f"cannot be written ({error.strerror}); the set is in '{elsewhere}'"
        raise OSError(f"output='{path}': {reason}") from error
    done = f"{run.iteration} of {run.iterations} iterations"
    print(f"{path}: written after {done}", flush=True)


def distill(options: Options) -> None:
    """Distills and, in the first process, writes and tests the set."""
    device, output = join_processes(options.device), options.output
    with runs.locked("output", output):
        run = make_run(options, load_dataset(options, device))
        try:
            run.run()
        except runs.Interrupted:
            save(options, run, output)
            raise
        except FloatingPointError:
            with contextlib.suppress(ValueError):  # nothing sound is left
                save(options, run, output.with_suffix(".diverged.safetensors"))
            raise
        save(options, run, output)
        if run.rank == 0:
            networks = options.test_networks if options.fixed_initialization is None else 1
            test, make_network = run.dataset.test, run.make_network
            accuracies = du.evaluate(run.distilled, test, make_network, networks=networks)
            print(f"{output}: {accuracies} of the test set", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status; errors become one line on stderr."""
    try:
        distill(tyro.cli(Options, prog="python -m study.train", args=arguments))
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
