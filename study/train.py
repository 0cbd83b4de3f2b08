"""The command line: `python -m study.train OUTPUT`, or `torchrun --nproc-per-node=2 -m study.train OUTPUT`.

The exit status is 0 only where OUTPUT is written whole, 130 after Ctrl-C, and another one after an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro

import distill_utils as du
from study import runs
from study.methods import truncation
from study.methods.decoders import multi_formation


@dataclass(frozen=True, kw_only=True)
class Options:
    """Distill a dataset for LeNet. Under torchrun, several processes average their meta-gradients.

    The same command again resumes from its --checkpoint. Ctrl-C saves what was learned.

    Args:
        output: Safetensors file for the distilled set.
        dataset: What to distill.
        data_root: Folder of the dataset, which is downloaded there if missing. DATA_ROOT sets the default.
        device: auto, cpu, cuda or mps.
        seed: Of the synthetic-image initialization, the networks and the real batches.
        steps: Training steps, each with images of its own.
        per_class: Images per class in each step.
        epochs: How often the steps are repeated.
        init: Synthetic-image initialization.
        init_std: Standard deviation of --init noise; 1 if not given.
        factor: Multi-formation: each stored image holds factor × factor smaller ones.
        step_size: Initial value of the step sizes.
        optimizer: Inner optimizer.
        momentum: Momentum of SGD.
        soft_labels: Learn the labels too.
        label_smoothing: How far --soft-labels start towards uniform; 0.5 if not given.
        fixed_initialization: Seed of one network to distill for, in place of random initializations.
        iterations: Steps of the outer optimizer.
        networks: Initializations in each iteration and process.
        batch_size: Real images in each iteration and process.
        learning_rate: Of images and soft labels.
        step_size_learning_rate: Of step sizes; 0 keeps them.
        window: Random truncation window: differentiate through so many updates only.
        pool: Network pool: keep so many networks, and train one on for a --window in each iteration.
        checkpointed: Gradient checkpointing: store the weights of every so many updates only.
        checkpoint: File for the state of the run; if it exists, the run resumes from it.
        validate_every: Iterations between validations.
        validation_networks: Networks behind each validation accuracy.
        test_networks: Networks behind the test accuracy.
        progress: Show a progress bar.
    """

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    dataset: Literal["MNIST", "FashionMNIST", "KMNIST", "digits"] = "MNIST"
    data_root: str = field(default_factory=lambda: os.environ.get("DATA_ROOT", "data"))
    device: str = "auto"
    seed: int = 0
    steps: int = 10
    per_class: int = 1
    epochs: int = 1
    init: Literal["noise", "real", "k-means"] = "real"
    init_std: float | None = None
    factor: int = 1
    step_size: float = 0.02
    optimizer: Literal["SGD", "Adam"] = "SGD"
    momentum: float = 0.0
    soft_labels: bool = False
    label_smoothing: float | None = None
    fixed_initialization: int | None = None
    iterations: int = 1000
    networks: int = 1
    batch_size: int = 256
    learning_rate: float = 0.03
    step_size_learning_rate: float = 0.01
    window: int | None = None
    pool: int | None = None
    checkpointed: int | None = None
    checkpoint: Path | None = None
    validate_every: int = 100
    validation_networks: int = 5
    test_networks: int = 100
    progress: bool = True


# ------------------------------------------------------------------------------------------- arguments
def parse(arguments: list[str]) -> Options:
    """The options given. Raises ValueError with what the parser says, in one line, where it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Options, prog="python -m study.train", args=arguments)
    except SystemExit as end:
        if not end.code:  # after --help
            raise
        # title, message and help, in a frame or not
        _, message, *_ = re.split("[-─╭╮╰╯]{5,}", said.getvalue())
        text = " ".join(message.replace("│", " ").split()).rstrip(".")
        raise ValueError(f"{text}; see --help") from None


def check(options: Options) -> None:
    """Raises ValueError for what the library would find only after work, or not at all."""
    for name, value in vars(options).items():
        if isinstance(value, float):
            # which float32 still holds
            du.require(abs(value) < 1e37, f"{name}={value}: give a number below 1e37")
    for name in ("seed", "fixed_initialization"):
        value = getattr(options, name) or 0
        du.require(0 <= value < 2**63, f"{name}={value}: give at least 0 and less than 2**63")
    counts = (
        "steps",
        "per_class",
        "epochs",
        "factor",
        "iterations",
        "networks",
        "batch_size",
        "validate_every",
    )
    counts += ("validation_networks", "test_networks")
    du.require_counts(**{name: getattr(options, name) for name in counts})
    du.require(
        options.init_std is None or options.init == "noise",
        needs(options, "init_std", "--init noise"),
    )
    du.require((options.init_std or 0) >= 0, f"init_std={options.init_std}: give at least 0")
    du.require(
        options.label_smoothing is None or options.soft_labels,
        needs(options, "label_smoothing", "--soft-labels"),
    )
    du.require(
        options.pool is None or options.window is not None, needs(options, "pool", "--window")
    )
    alone = options.checkpointed is None or options.window is None
    du.require(
        alone,
        f"checkpointed={options.checkpointed}: does not go with --window; leave one of them out",
    )
    runs.require_writable("output", options.output)
    if options.checkpoint is not None:
        runs.require_writable("checkpoint", options.checkpoint)
        same = options.checkpoint.resolve() == options.output.resolve()
        du.require(
            not same, f"checkpoint='{options.checkpoint}': is the output as well; name another file"
        )


def needs(options: Options, name: str, other: str) -> str:
    return f"{name}={getattr(options, name)}: has no effect without {other}; add that or leave this out"


# ---------------------------------------------------------------------------------------------- pieces
@contextlib.contextmanager
def several_processes(name: str) -> Iterator[torch.device]:
    """This process's device; under torchrun, which sets LOCAL_RANK, within a job of all processes."""
    device = du.pick_device(name)
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        du.require(
            number < count,
            f"device='{name}': {count} here for more processes; lower --nproc-per-node",
        )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    elif name == "auto":
        device = torch.device("cpu")
    du.require(
        device.type != "mps", f"device='{name}': not for several processes; give cpu or cuda"
    )
    dist.init_process_group()  # gloo for tensors on a CPU, nccl for those on a GPU
    yield device
    dist.destroy_process_group()


def load_dataset(options: Options, device: torch.device) -> du.Dataset:
    """The dataset; of several processes on a machine, one downloads what is missing while the others wait."""
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


def make_distilled_set(options: Options, dataset: du.Dataset) -> du.DistilledSet:
    """The set to start from."""
    std = {} if options.init_std is None else {"std": options.init_std}
    counts = {"steps": options.steps, "per_class": options.per_class}
    images, labels = du.initialize(dataset, options.init, seed=options.seed, **counts, **std)
    smoothing = (
        {} if options.label_smoothing is None else {"label_smoothing": options.label_smoothing}
    )
    names = ("epochs", "step_size", "soft_labels", "optimizer", "momentum")
    chosen = {name: getattr(options, name) for name in names} | smoothing
    if options.factor > 1:
        return multi_formation(images, labels, factor=options.factor, **chosen)
    return du.DistilledSet(images, labels, **chosen)


def make_unroll(options: Options) -> Callable:
    """The inner loop."""
    if options.pool is not None:
        return truncation.NetworkPool(options.pool, window=options.window)
    if options.window is not None:
        return truncation.RandomWindow(options.window, seed=options.seed)
    return (
        du.unroll if options.checkpointed is None else truncation.Checkpointed(options.checkpointed)
    )


def make_run(options: Options, dataset: du.Dataset, make_network: du.Factory) -> runs.Run:
    """The run, ready to start or to resume."""
    names = (
        "iterations",
        "networks",
        "batch_size",
        "learning_rate",
        "step_size_learning_rate",
        "seed",
    )
    names += ("checkpoint", "validate_every", "validation_networks", "progress")
    chosen = {name: getattr(options, name) for name in names}
    return runs.Run(
        make_distilled_set(options, dataset),
        dataset,
        make_network,
        unroll=make_unroll(options),
        **chosen,
    )


# --------------------------------------------------------------------------------------------- command
def distill(options: Options) -> int:
    """Distills and, in the first process, writes and tests the set; returns the exit status."""
    check(options)
    with several_processes(options.device) as device, runs.locked("output", options.output):
        dataset, fixed = load_dataset(options, device), options.fixed_initialization
        make_network = du.LeNet if fixed is None else du.fixed_initialization(du.LeNet, seed=fixed)
        run = make_run(options, dataset, make_network)
        try:
            run.run()
            require_finite(run.distilled)
        except runs.Interrupted:
            save(options, run, options.output)
            report(f"{options.output}: interrupted, written {progress(run)}")
            return 130
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {save_diverged(options, run)}") from error
        save(options, run, options.output)
        if runs.process_rank()[0] == 0:
            return test(options, run, make_network)
    return 0


def test(options: Options, run: runs.Run, make_network: du.Factory) -> int:
    """Prints the accuracy of the set, which is written already; returns the exit status."""
    networks = options.test_networks if options.fixed_initialization is None else 1
    distilled, split = run.distilled, run.dataset.test
    try:
        result = du.evaluate(distilled, split, make_network, networks=networks)
    except KeyboardInterrupt:
        report(f"{options.output}: written {progress(run)}; the test was interrupted")
        return 130
    report(f"{options.output}: {result} of the test set {progress(run)}")
    return 0


def save(options: Options, run: runs.Run, path: Path) -> None:
    """Writes the set, in the first process alone, and reads it again before it takes the place of an older file. Where
    the disk refuses, the set goes to the temporary folder, and an OSError says so."""
    if runs.process_rank()[0] > 0:
        return
    processes = runs.process_rank()[1]
    runner = f"torchrun --nproc-per-node={processes}" if "LOCAL_RANK" in os.environ else "python"
    fixed = options.fixed_initialization
    notes = {
        "network": "LeNet", "initialization": "random" if fixed is None else f"fixed, seed {fixed}",
        "seed": options.seed,
        "command": f"{runner} -m study.train {shlex.join(sys.argv[1:])}",
        "versions": runs.versions(),
    }  # fmt: skip
    try:
        with runs.write_safely(path) as partial:
            du.save(run.distilled, partial, dataset=run.dataset, **notes)
            du.load(partial)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="distilled-")) / path.name
        du.save(run.distilled, elsewhere, dataset=run.dataset, **notes)
        place = f"the set {progress(run)} is in '{elsewhere}'"
        raise OSError(f"output='{path}': cannot be written ({error.strerror}); {place}") from error


def save_diverged(options: Options, run: runs.Run) -> str:
    """Writes what diverged training leaves beside the output, whose sound set it must not replace; tells where."""
    path = options.output.with_name(
        f"{options.output.name.removesuffix('.safetensors')}.diverged.safetensors"
    )
    try:
        require_finite(run.distilled)
    except FloatingPointError:
        return f"nothing sound is left to write, and {options.output} is as it was"
    save(options, run, path)
    return f"the set {progress(run)} is in {path}, and {options.output} is as it was"


def require_finite(distilled: du.DistilledSet) -> None:
    sound = all(bool(value.isfinite().all()) for value in distilled.state_dict().values())
    if not sound:
        raise FloatingPointError(
            "the set has values that are not finite; lower step_size= or the learning rates"
        )


def progress(run: runs.Run) -> str:
    return f"after {run.iteration} of {run.iterations} iterations"


def report(text: str) -> None:
    """Prints a line, in the first process alone."""
    if runs.process_rank()[0] == 0:
        print(text, flush=True)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status; errors become one line on stderr."""
    try:
        return distill(parse(arguments))
    except KeyboardInterrupt:
        print("error: interrupted; the output is as it was", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
