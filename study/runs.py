"""A run that survives: checkpoints, a calm Ctrl-C and several processes around `du.Distillation`.

A checkpoint is one file: the SHA-256 of the rest, and what `torch.save` writes of a dictionary. Its
`settings` tell which run it belongs to, `state` and the `unroll` of every process where that run
stands. While a run goes on, a file with the ending `.lock` keeps other processes away.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
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
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a run has finished its iteration and written its checkpoint."""


def distill(
    distilled: du.DistilledSet, dataset: du.Dataset, make_network: du.Factory, **options
) -> du.History:
    """Algorithm 1 as `du.distill` runs it, which survives the end of the process: see `Run`."""
    return Run(distilled, dataset, make_network, **options).run()


@dataclass(eq=False, repr=False)
class Run(du.Distillation):
    """A `du.Distillation` that survives the end of the process.

    The checkpoint is written at each validation, at the end, and on Ctrl-C; the same call resumes
    from it, on a CPU to the bit-identical result. Ctrl-C finishes the iteration at hand and raises
    Interrupted; a second one interrupts at once. In a job of several processes
    (`torch.distributed`), each samples networks and real batches of its own, and their gradients
    are averaged. All start from the state of the first, which alone validates and writes.

    Args:
        checkpoint: a file of this run; if it exists, the run resumes from it. An `unroll` with a
            state, as a network pool, has `state_dict` and `load_state_dict`; each process keeps
            its own.

    Raises ValueError for bad arguments, for the checkpoint of another run and for one that another
    process uses. A checkpoint that cannot be written, as on a full disk, is a warning.
    """

    _: KW_ONLY
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = describe_run(self)
        self.rank, _ = process_rank()
        self.seed += self.rank << 64  # each process samples its own
        self.progress = self.progress and self.rank == 0
        self.interrupt = threading.Event()  # set by Ctrl-C
        self.written = False  # the latest checkpoint

    def run(self) -> du.History:
        """Resumes from the checkpoint, runs to the end and returns the history."""
        with locked("checkpoint", self.checkpoint), calm_interrupt() as self.interrupt:
            self.resume()
            self.stopped = False  # at the end of an iteration
            try:
                super().run()
            except KeyboardInterrupt:
                if not self.stopped:  # but in the middle, by a second Ctrl-C
                    raise
        if self.stopped or self.interrupt.is_set():
            done = f"stopped after {self.iteration} of {self.iterations} iterations"
            remedy = f"the same call, with checkpoint='{self.checkpoint}', resumes from there"
            raise Interrupted(f"{done}; {remedy if self.written else 'the set keeps them'}")
        return self.history

    def compute_gradient(self) -> float:
        """The mean of all processes' gradients, and of their losses."""
        loss, interrupted = super().compute_gradient(), self.interrupt.is_set()
        loss, self.stopping = average_over_processes(self, loss, interrupted)
        return loss

    def step(self) -> float:
        """One iteration, the same in all processes; returns its loss, or stops after Ctrl-C."""
        loss = super().step()
        if self.stopping:
            self.write()
            self.stopped = True
            raise KeyboardInterrupt
        return loss

    def validate(self) -> None:
        """Validates in the first process, for all of them, and writes the checkpoint."""
        on_first_process(super().validate)
        self.history = on_first_process(lambda: self.history)
        self.write()

    def write(self) -> None:
        """Writes the checkpoint, with the state of every process's inner loop."""
        if self.checkpoint is not None:
            own = pack(self.unroll.state_dict() if hasattr(self.unroll, "state_dict") else {})
            unroll = [own] * process_rank()[1]
            if len(unroll) > 1:
                dist.all_gather_object(unroll, own)
            content = {"settings": self.settings, "state": self.state_dict(), "unroll": unroll}
            self.written = on_first_process(lambda: try_to_write(self.checkpoint, content))

    def resume(self) -> None:
        """Takes the state of the checkpoint if it exists, else that of the first process."""
        content = unpack(on_first_process(lambda: pack(self.read())))
        self.load_state_dict(content["state"])
        if hasattr(self.unroll, "load_state_dict") and self.rank < len(content["unroll"]):
            device = self.dataset.train.images.device
            self.unroll.load_state_dict(unpack(content["unroll"][self.rank], device))

    def read(self) -> dict:
        """The checkpoint's content, or that of a run that begins. Raises ValueError where the file
        is damaged or belongs to another run."""
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return {"state": self.state_dict(), "unroll": []}
        content, here = read_checkpoint(self.checkpoint), self.settings
        there, reached = content["settings"], describe_set(content["state"]["distilled"])
        if reached.items() <= here.items():  # the set that was interrupted is given again
            there = there | reached
        names = [name for name in there | here if there.get(name) != here.get(name)]
        found = [f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names]
        problem = f"belongs to another run ({'; '.join(found)}); name another file or delete it"
        du.require(not names, f"checkpoint='{self.checkpoint}' {problem}")
        return content


# ------------------------------------------------------------------------- what determines a run
def describe_run(run: Run) -> dict[str, str]:
    """Whatever determines a run, as texts by name."""
    others = ("distilled", "dataset", "make_network", "checkpoint", "progress")
    names = [field.name for field in fields(run) if field.name not in others]
    with du.seeded(1811, 10959):  # two networks, as those of a fixed initialization are equal
        networks = du.sample_networks(run.make_network, 2, torch.device("cpu"))
    weights = [w.flatten() for network in networks for w in network.state_dict().values()]
    data, values = run.dataset, {name: getattr(run, name) for name in names}
    figures = (data.name, f"mean {data.mean:.4g}", f"deviation {data.std:.4g}")
    values |= {"dataset": (*figures, *data.train, *data.validation), "network": networks[0]}
    values |= {"initialization": torch.cat(weights), "decoder": run.distilled.decoder}
    values["bits"] = run.distilled.bits
    texts = {name: describe(value) for name, value in (values | run.distilled.inner).items()}
    return texts | describe_set(run.distilled.state_dict())


def describe_set(state: dict[str, Tensor]) -> dict[str, str]:
    """The values of a distilled set, as texts by name."""
    state = {**state, "step_sizes": F.softplus(state["raw_step_sizes"])}
    return {f"distilled.{name}": describe(value) for name, value in state.items()}


def describe(value: object) -> str:
    """A value as text, the same in every process. The last digits of a tensor do not count, as
    those of a dataset's mean, and so of its images, vary with the number of threads."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().flatten()
        some = flat[:: 1 + len(flat) // 1_000_000].double()
        figure = some @ torch.arange(len(some)).double().cos()  # another one in another order
        exact = flat > 0 if flat.is_floating_point() else flat
        digest = hashlib.sha256(f"{figure:.4g}".encode() + exact.numpy().tobytes()).hexdigest()
        return f"{list(value.shape)} of mean {round(float(some.mean()), 4) + 0:g} ({digest[:8]})"
    if isinstance(value, tuple):
        return ", ".join(map(describe, value))
    text = getattr(value, "__qualname__", None) or str(value).removesuffix(".0")
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())


def versions() -> str:
    """The libraries that a set's values depend on."""
    return " ".join(f"{name}=={version(name)}" for name in ("torch", "torchvision", "higher"))


# ----------------------------------------------------------------------------------------- files
def try_to_write(path: str | Path, content: dict) -> bool:
    """Writes a checkpoint; if that fails, warns and returns False, as the run can go on."""
    try:
        with du.replacing(path) as unfinished:
            unfinished.write_bytes(pack(content))
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); the run goes on without"
        warnings.warn(f"checkpoint='{path}': {reason}", stacklevel=2)
        return False
    return True


def read_checkpoint(path: str | Path) -> dict:
    """What a run wrote. Raises ValueError where the file is anything else."""
    try:
        content = unpack(Path(path).read_bytes())
        du.require(content.keys() == {"settings", "state", "unroll"}, "its format differs")
    except Exception as error:  # other contents raise errors of many kinds
        problem = "is damaged or no checkpoint; delete it or name another file"
        raise ValueError(f"checkpoint='{path}': {problem}") from error
    return content


def pack(content: object) -> bytes:
    """Tensors, numbers and texts in lists and dictionaries, as bytes with a checksum."""
    file = io.BytesIO()
    torch.save(content, file)
    return hashlib.sha256(file.getvalue()).digest() + file.getvalue()


def unpack(packed: bytes, device: torch.device | str = "cpu") -> object:
    """What `pack` packed, with its tensors on `device`. Raises ValueError where it is damaged."""
    checksum, payload = packed[:32], packed[32:]
    du.require(checksum == hashlib.sha256(payload).digest(), "its checksum differs")
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


@contextlib.contextmanager
def locked(name: str, path: str | Path | None) -> Iterator[None]:
    """Keeps other runs from `path`, the argument `name`, within the block; None is no file. In a
    job, the first process holds the lock. Raises ValueError where another process holds it, or
    where no file can be written."""
    lock = FileLock(f"{path}.lock")
    if path is not None:
        on_first_process(lambda: acquire(lock, name, Path(path)))
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                os.unlink(lock.lock_file)
            lock.release()


def acquire(lock: FileLock, name: str, path: Path) -> None:
    """Locks `path`, and removes what killed processes left half-written."""
    owner, trial = Path(lock.lock_file), Path(f"{path}.{os.getpid()}.partial")
    try:
        sound = path.is_file() or not path.exists()
        du.require(sound, f"{name}='{path}': is no regular file; name a file in a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
        lock.acquire(timeout=0)
    except Timeout:
        remedy = f"process {owner.read_text()} writes it; wait until it ends or name another file"
        raise ValueError(f"{name}='{path}': {remedy}") from None
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a file in a folder that you own"
        raise ValueError(f"{name}='{path}': {remedy}") from error
    owner.write_text(f"{os.getpid()} on {platform.node()}")
    for unfinished in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.partial"):
        unfinished.unlink()


# ------------------------------------------------------------------------ interrupts, processes
@contextlib.contextmanager
def calm_interrupt() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C sets within the block; a second Ctrl-C interrupts at once."""
    event, previous = threading.Event(), signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # which alone may set a handler
    listens = main and previous is not signal.SIG_IGN  # as a script's job in the background

    def stop(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    if listens:
        signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        if listens:
            signal.signal(signal.SIGINT, previous)


def process_rank() -> tuple[int, int]:
    """The number of this process in a `torch.distributed` job, and how many it has; else 0, 1."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def average_over_processes(run: Run, loss: float, interrupted: bool) -> tuple[float, bool]:
    """Averages the meta-gradient, in place, and the loss; tells whether any was interrupted."""
    if process_rank()[1] == 1:
        return loss, interrupted
    gradients = [p.grad for p in run.distilled.parameters() if p.grad is not None]
    figures = gradients[0].new_tensor([loss, interrupted])
    message = torch.cat([nn.utils.parameters_to_vector(gradients), figures])
    dist.all_reduce(message)  # one for everything, since each costs a round trip
    message /= process_rank()[1]
    nn.utils.vector_to_parameters(message[:-2], gradients)
    return float(message[-2]), float(message[-1]) > 0


def on_first_process(work: Callable[[], object]) -> object:
    """Does `work` in the first process; every process returns its result or raises its error."""
    outcome, (rank, processes) = [None, None], process_rank()
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
