"""A run that survives: checkpoints, a calm Ctrl-C and several processes around `distill_utils.Distillation`.

A checkpoint is one file: a line that names the format, the SHA-256 of the rest, and what `torch.save` writes of a
dictionary. Its `settings` and `start` say which run it belongs to, its `state` and `unroll` where that run stands.
While a run goes on, a file beside it with the ending `.lock` keeps other processes away.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import inspect
import io
import os
import platform
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from importlib.metadata import version
from numbers import Number
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F

import distill_utils as du

HEADER = b"checkpoint of distill, format 1\n"
CONTENT = {"settings", "start", "state", "unroll"}
STATE = {*du.STATEFUL, "running_norm", "history"}


class Interrupted(KeyboardInterrupt):
    """The KeyboardInterrupt of a run that has finished its iteration and written its checkpoint."""


def distill(
    distilled: du.DistilledSet, dataset: du.Dataset, make_network: du.Factory, **options
) -> du.History:
    """Runs Algorithm 1 as `du.distill` does, and survives the end of the process: see `Run`."""
    return Run(distilled, dataset, make_network, **options).run()


@dataclass(eq=False, repr=False)
class Run(du.Distillation):
    """A `Distillation` that survives the end of the process.

    The checkpoint is written at each validation, at the end, and on Ctrl-C; the same call resumes from it, on a CPU to
    the bit-identical result. Ctrl-C finishes the iteration at hand and then raises KeyboardInterrupt; a second one
    interrupts at once. In a job of several processes (`torch.distributed`), each has networks and real batches of its
    own and the gradients are averaged; all start from the state of the first, which alone validates and writes, and end
    with its history.

    Args:
        checkpoint: a file of this run; if it exists, the run resumes from it. An `unroll` with a state, as a network
            pool, has `state_dict` and `load_state_dict`; each process keeps its own.

    The others are those of `du.Distillation`. Raises ValueError for bad arguments, for the checkpoint of another run
    and for one that another process is at, and FloatingPointError where training diverges; then `distilled` is as the
    last completed iteration left it, and the last checkpoint stays. A checkpoint that cannot be written, as on a full
    disk, is a warning: the run goes on.
    """

    _: KW_ONLY
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None:  # before any work
            on_first_process(lambda: require_writable("checkpoint", self.checkpoint))
        super().__post_init__()
        self.rank, self.processes = process_rank()
        self.written = False  # whether the checkpoint is up to date
        self.interrupted, self.stopped = threading.Event(), False  # by Ctrl-C, and thereupon
        if self.checkpoint is not None:
            self.settings, self.start = describe_settings(self), describe_start(self)
        self.seed += self.rank << 64  # each process samples its own
        self.progress = self.progress and self.rank == 0

    def run(self) -> du.History:
        """Resumes where the checkpoint is, runs to the end and returns the history."""
        with locked("checkpoint", self.checkpoint):
            self.resume()
            self.stopped = False
            with calm_interrupt() as self.interrupted:
                try:
                    super().run()
                except KeyboardInterrupt:
                    if not self.stopped:  # but in the middle of an iteration
                        raise
        if self.interrupted.is_set() or self.iteration < self.iterations:
            if self.rank == 0:
                print(self.interrupt_text(), flush=True)
            raise Interrupted(f"after {self.iteration} of {self.iterations} iterations")
        return self.history

    def compute_gradient(self) -> float:
        """The mean of all processes' gradients and losses."""
        loss, self.stopping = average_over_processes(
            self, super().compute_gradient(), self.interrupted.is_set()
        )
        return loss

    def step(self) -> float:
        """One iteration, the same in all processes; returns its loss. Raises KeyboardInterrupt after Ctrl-C."""
        loss = super().step()
        if self.stopping:
            self.write()
            self.stopped = True
            raise KeyboardInterrupt
        return loss

    def validate(self) -> None:
        """Validates and writes the checkpoint, but not where an interrupted run goes on between two validations."""
        if self.iteration % self.validate_every > 0 and self.iteration < self.iterations:
            return
        on_first_process(super().validate)
        columns = [self.history.iterations, self.history.accuracy, self.history.images]
        newest = on_first_process(lambda: [column[-1] for column in columns])
        if self.history.iterations[-1:] != [self.iteration]:  # in the other processes
            for column, value in zip(columns, newest, strict=True):
                column.append(value)
        self.write()

    def interrupt_text(self) -> str:
        """The sentence that an interrupted run ends with."""
        done = f"Interrupted after {self.iteration} of {self.iterations} iterations"
        if not self.written:
            return f"{done}: the distilled set keeps what it has learned; with checkpoint=, a run can be resumed."
        return f"{done}: the same call, with checkpoint='{self.checkpoint}', goes on from there."

    # ------------------------------------------------------------------------------------ checkpoint
    def write(self) -> None:
        """Writes the checkpoint, with the state of every process's inner loop."""
        if self.checkpoint is None:
            return
        own = self.unroll.state_dict() if hasattr(self.unroll, "state_dict") else None
        content = {"settings": self.settings, "start": self.start, "state": self.state_dict()}
        content["unroll"] = gather_on_first_process(own)
        self.written = on_first_process(lambda: try_to_write(self.checkpoint, content))

    def resume(self) -> None:
        """Puts everything back where the checkpoint exists; every process then has the state of the first."""
        if self.checkpoint is not None:
            content = on_first_process(self.read)
            if content is not None:
                content = unpack(content)
                self.load_state_dict(content["state"])
                # nothing for a process more than the run had
                own = content["unroll"][self.rank : self.rank + 1]
                if own and own[0] is not None:
                    device = self.dataset.train.images.device
                    self.unroll.load_state_dict(unpack(pack(own[0]), device))
                return
        if self.processes > 1:
            first = on_first_process(lambda: pack(self.distilled.state_dict()))
            self.distilled.load_state_dict(unpack(first))

    def read(self) -> bytes | None:
        """The checkpoint's content where it exists. Raises ValueError where it is damaged or of another run."""
        if not Path(self.checkpoint).exists():
            return None
        content = read_checkpoint(self.checkpoint)
        settings, start, reached = (
            content["settings"],
            content["start"],
            content["state"]["distilled"],
        )
        # A set that was interrupted, and given again, is at the place of the checkpoint rather than at the start.
        start_here = {**self.start, **{name: start[name] for name in reached if name in start}}
        given = self.distilled.state_dict()
        if given.keys() != reached.keys() or any(
            not is_close(given[name], reached[name], 0) for name in given
        ):
            start_here = self.start
        texts = [
            (name, settings.get(name), self.settings.get(name))
            for name in {**settings, **self.settings}
        ]
        texts = [each for each in texts if each[1] != each[2]]
        tensors = [
            (name, start.get(name), start_here.get(name)) for name in {**start, **start_here}
        ]
        for name, there, here in tensors:
            if there is None or here is None or not is_close(there, here):
                texts.append(
                    (
                        name.replace("raw_step_sizes", "step_size"),
                        *(short(name, x) for x in (there, here)),
                    )
                )
        differences = "; ".join(
            f"{name}: {there} there, {here} here" for name, there, here in texts
        )
        remedy = "name another file or delete it"
        du.require(
            not texts,
            f"checkpoint='{self.checkpoint}' belongs to another run ({differences}); {remedy}",
        )
        return pack(content)


def try_to_write(path: str | Path, content: dict) -> bool:
    """Writes a checkpoint and tells whether it could; if not, warns: that is no reason to end a run."""
    try:
        write_checkpoint(path, content)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); the run goes on without"
        warnings.warn(f"checkpoint='{path}': {reason}", stacklevel=2)
        return False
    return True


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Writes a checkpoint, whole or not at all."""
    payload = pack(content)
    with write_safely(path) as partial:
        partial.write_bytes(HEADER + hashlib.sha256(payload).digest() + payload)


def read_checkpoint(path: str | Path) -> dict:
    """What `write_checkpoint` wrote. Raises ValueError where the file is anything else."""
    file = io.BytesIO(Path(path).read_bytes())
    header, digest, payload = file.read(len(HEADER)), file.read(32), file.read()
    try:
        du.require(header == HEADER and digest == hashlib.sha256(payload).digest(), "damaged")
        content = unpack(payload)
        du.require(content.keys() == CONTENT and content["state"].keys() == STATE, "not of distill")
    except Exception as error:  # other versions and contents raise errors of many kinds
        raise ValueError(
            f"checkpoint='{path}': no checkpoint of distill; delete it or name another"
        ) from error
    return content


def pack(content: object) -> bytes:
    """Tensors, numbers and texts in lists and dictionaries as bytes, which also travel between processes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def unpack(payload: bytes, device: torch.device | str = "cpu") -> object:
    """What `pack` packed, with its tensors on `device`."""
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


@contextlib.contextmanager
def write_safely(path: str | Path) -> Iterator[Path]:
    """Gives a neighbouring path to write to, and puts that file in the place of `path` only once it is whole, on the
    disk too: after a power cut, `path` is what it was before or what was written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial, os.O_RDWR)
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # not every system lets a folder be opened
            sync(path.parent, os.O_RDONLY)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(name: str, path: str | Path | None) -> Iterator[None]:
    """Within the block, no other run has `path`, the argument `name`; None is no file. Of several processes of a run,
    the first holds the lock. Raises ValueError, with the other process, where there is one."""
    with contextlib.ExitStack() as stack:
        if path is not None:
            on_first_process(lambda: stack.enter_context(lock_file(name, Path(path))))
        yield


@contextlib.contextmanager
def lock_file(name: str, path: Path) -> Iterator[None]:
    """Locks a file for this process, and removes what dead ones left half-written."""
    lock = FileLock(f"{path}.lock")
    file = Path(lock.lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = file.read_text() or "another one"
        message = (
            f"{name}='{path}': process {other} writes it; wait until it ends or name another file"
        )
        raise ValueError(message) from None
    try:
        file.write_text(f"{os.getpid()} on {platform.node()}")
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            unfinished.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            file.unlink()
        lock.release()


def sync(path: Path, flags: int) -> None:
    """Waits until the disk has the file or folder."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(name: str, path: str | Path) -> None:
    """Raises ValueError unless a file can be written to `path`, the argument `name`; tries it with a file beside it."""
    path = Path(path)
    try:
        du.require(not path.is_dir(), f"{name}='{path}': is a folder; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists() or path.is_symlink()
        du.require(
            not there or path.is_file(), f"{name}='{path}': is no regular file; name another"
        )
        # the longest name in use
        probe = path.with_name(f"{path.name}.{os.getpid()}.partial.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written ({error.strerror}: '{error.filename}')"
        raise ValueError(
            f"{name}='{path}': {reason}; name a file in a folder that you can write to"
        ) from error


# ---------------------------------------------------------------------------------- what determines a run
def describe_settings(run: Run) -> dict[str, str]:
    """Whatever determines the run, apart from the values of `describe_start`, as short texts by name."""
    tensors = ("distilled", "dataset", "make_network", "checkpoint", "progress")
    names = [field.name for field in fields(run) if field.name not in tensors]
    texts = {name: describe(getattr(run, name)) for name in names}
    (network,) = du.sample_networks(run.make_network, 1, torch.device("cpu"))
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(network))
    texts["network"] = f"{type(network).__name__} {digest(structure.encode())}"
    texts["dataset"] = describe_dataset(run.dataset)
    texts["decoder"] = re.sub(r" at 0x[0-9a-f]+", "", repr(run.distilled.decoder))
    return texts | {name: str(value) for name, value in run.distilled.inner.items()}


def describe(value: object) -> str:
    """An option as text: a number by its value, an inner loop by its name and settings."""
    if isinstance(value, Number):
        return f"{value:.10g}"
    if inspect.isfunction(value):
        code = inspect.unwrap(value).__code__
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [
            code.co_code.hex(),
            code.co_consts,
            code.co_names,
            [each for each in closure if is_scalar(each)],
        ]
        # a lambda, or a function in a function: its name does not tell what it does
        local = "<" in value.__qualname__
        text = (
            f"{value.__qualname__} {digest(repr(parts).encode())}" if local else value.__qualname__
        )
    elif type(value).__repr__ is object.__repr__:
        state = value.state_dict() if hasattr(value, "state_dict") else {}
        settings = {
            name: each
            for name, each in vars(value).items()
            if is_scalar(each) and name not in state
        }
        settings = {name: each for name, each in settings.items() if not name.startswith("_")}
        text = f"{type(value).__name__}({', '.join(f'{name}={settings[name]!r}' for name in sorted(settings))})"
    else:
        text = repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (Number, str))


def describe_dataset(dataset: du.Dataset) -> str:
    """Name, sizes and a hash of the images and labels that a run uses.

    Mean and standard deviation vary in the last bit with the number of threads, so it hashes pixels of 8 bits. The
    edges between two of their values are at odd places, which no image of 8 bits comes near to.
    """
    found = hashlib.sha256()
    for split in (dataset.train, dataset.validation):
        for images in split.images.split(5000):
            pixels = (images.cpu() * dataset.std + dataset.mean) * 255
            found.update((pixels + 0.62337).floor().to(torch.int16).numpy().tobytes())
        found.update(split.labels.cpu().numpy().tobytes())
    return f"{dataset.name} {len(dataset.train.labels)}+{len(dataset.validation.labels)} {found.hexdigest()[:8]}"


@torch.no_grad()
def describe_start(run: Run) -> dict[str, Tensor]:
    """The values that the run starts from: the distilled set, and figures of two networks drawn from a fixed seed.

    Two, as those of a fixed initialization are equal. They are compared with a tolerance, see `describe_dataset`.
    """
    with du.seeded(1811, 10959):
        networks = du.sample_networks(run.make_network, 2, torch.device("cpu"))
    figures = [network(run.dataset.train.images[:2].cpu()).flatten() for network in networks]
    for network in networks:
        for weights in network.state_dict().values():
            flat = weights.flatten().float()
            wave = torch.arange(len(flat)).cos()  # tells two orders of the same weights apart
            figures.append(torch.stack([flat.mean(), flat.square().mean(), flat @ wave]))
    start = {
        name: value.detach().cpu().clone() for name, value in run.distilled.state_dict().items()
    }
    return {**start, "initialization": torch.cat(figures)}


def is_close(first: Tensor, second: Tensor, tolerance: float = 1e-4) -> bool:
    first, second = first.cpu(), second.cpu()
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=tolerance, atol=tolerance
    )


def short(name: str, value: Tensor | None) -> str:
    """A tensor in a few words: step sizes by value, anything else by its shape and a hash."""
    if value is None:
        return "none"
    if name == "raw_step_sizes":
        low, high = (f"{float(each):.4g}" for each in F.softplus(value).aminmax())
        return (
            f"{low} for {len(value)} updates"
            if low == high
            else f"{low} to {high} for {len(value)} updates"
        )
    return f"{list(value.shape)} {digest(value.numpy().tobytes())}"


def versions() -> str:
    """The libraries that a set's values depend on."""
    return " ".join(f"{name}=={version(name)}" for name in ("torch", "torchvision", "higher"))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


# ----------------------------------------------------------------------------------- interrupts, processes
@contextlib.contextmanager
def calm_interrupt() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C sets the event given, so that work can end whole; a second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    main = threading.current_thread() is threading.main_thread()  # which alone may set a handler
    previous = signal.getsignal(signal.SIGINT) if main else None
    if previous in (None, signal.SIG_IGN):
        yield interrupted
        return

    def stop(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def process_rank() -> tuple[int, int]:
    """This process's number among those of a torch.distributed job, and how many there are; without a job, 0 and 1."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def average_over_processes(
    run: du.Distillation, loss: float, interrupted: bool
) -> tuple[float, bool]:
    """Averages the meta-gradient, in place, and the loss over all processes; tells whether any was interrupted."""
    _, processes = process_rank()
    if processes == 1:
        return loss, interrupted
    gradients = [
        parameter.grad for parameter in run.distilled.parameters() if parameter.grad is not None
    ]
    message = torch.cat(
        [*map(torch.flatten, gradients), gradients[0].new_tensor([loss, interrupted])]
    )
    dist.all_reduce(message)  # one for everything, since each costs a round trip
    *means, (loss, interruptions) = (message / processes).split([*map(torch.numel, gradients), 2])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(loss), float(interruptions) > 0


def on_first_process(work: Callable[[], object]) -> object:
    """Does `work` in the first process alone; its result is returned, and its error raised, in every process."""
    rank, processes = process_rank()
    outcome: list = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    if processes > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_on_first_process(state: object) -> list:
    """The `state` of every process, by rank, in the first process; elsewhere a list without them."""
    rank, processes = process_rank()
    if processes == 1:
        return [state]
    states: list = [None] * processes
    dist.gather_object(pack(state), states if rank == 0 else None)
    return [unpack(each) for each in states] if rank == 0 else states
