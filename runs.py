"""What a run needs whatever it computes: a device, seeds, whole files, processes, checkpoints, a calm Ctrl-C.

`distill_utils` is built on this; nothing here knows of images or networks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checks import require


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """`items` in order, up to `size` at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes cuda where there is one, else mps, else cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    choices = ", ".join(kind for kind in there if there[kind])
    require(there.get(name.split(":")[0], False), f"name='{name}': not on this machine; give auto or one of {choices}")
    return torch.device(name)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block from `seed` and puts the caller's random state back afterwards."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


def mixed(seed: tuple[int, ...]) -> int:
    """One seed out of at most four numbers; those of neighbouring numbers have nothing to do with each other."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a neighbouring path to write to, and puts it in the place of `path` only once it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def markdown_table(head: list[str], rows: list[list]) -> str:
    """Column names and rows as a table in Markdown, without the columns that are empty throughout."""
    filled = [any(str(row[place]) for row in rows) for place in range(len(head))]
    lines = [list(itertools.compress(line, filled)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def progress_bar(iterable: range, **options) -> tqdm:
    """A bar as plain text, which stays readable in a stored notebook; drawn each second, as more would cost time."""
    return tqdm(iterable, file=sys.stdout, ncols=100, mininterval=1.0, **options)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C sets the event given, so that work ends whole; a second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield interrupted
        return
    previous = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def process_rank() -> tuple[int, int]:
    """This process's number among those of a torch.distributed job, and how many there are; alone, 0 and 1."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def average_over_processes(gradients: list[Tensor], loss: float, interrupted: bool) -> tuple[float, bool]:
    """Averages `gradients`, in place, and `loss` over all processes, and tells whether any was interrupted."""
    _, processes = process_rank()
    if processes == 1:
        return loss, interrupted
    message = torch.cat([*map(torch.flatten, gradients), gradients[0].new_tensor([loss, interrupted])])
    dist.all_reduce(message)  # one for everything, since each costs a round trip
    *means, (loss, interruptions) = (message / processes).split([*map(torch.numel, gradients), 2])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return loss.item(), interruptions.item() > 0


@dataclass(frozen=True)
class Checkpoint:
    """The file from which `distill` goes on: its settings, and the state of each part."""

    path: str | Path | None
    settings: dict
    parts: list  # each with state_dict and load_state_dict

    def write(self) -> None:
        """Writes the file, in the first process alone."""
        if self.path is None or process_rank()[0] > 0:
            return
        with atomic_write(self.path) as partial:
            torch.save({"settings": self.settings, "states": [part.state_dict() for part in self.parts]}, partial)

    def resume(self) -> None:
        """Puts everything back where the file is there; every process then starts from what the first one has."""
        rank, processes = process_rank()
        message: list = [None]
        if rank == 0:
            try:
                message = [self.read() or [part.state_dict() for part in self.parts]]
            except ValueError as error:  # which all processes are to end with
                message = [error]
        if processes > 1:
            dist.broadcast_object_list(message)
        if isinstance(message[0], ValueError):
            raise message[0]
        for part, state in zip(self.parts, message[0], strict=True):
            part.load_state_dict(state)

    def read(self) -> list[dict] | None:
        """The states in the file, where it is there; raises ValueError where it is another run's, or broken."""
        if self.path is None or not Path(self.path).exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, states = saved["settings"], saved["states"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint='{self.path}': no checkpoint of distill; delete it or name another"
            ) from error
        changed = [
            f"{name}={settings.get(name)} there, {value} here"
            for name, value in self.settings.items()
            if settings.get(name) != value
        ]
        require(
            not changed,
            f"checkpoint='{self.path}' is another run's ({'; '.join(changed)}); "
            "name another file, or delete this one to start anew",
        )
        return states
