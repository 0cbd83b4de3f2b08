"""Runs that survive: checkpoints, kills, damages, interrupts, several processes, locks."""

import dataclasses
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

import distill_utils as du
from study import runs
from study.methods.truncation import Checkpointed, NetworkPool, RandomWindow
from tests.conftest import Smooth, assert_same, make_set, make_toy

TOY = make_toy()
OPTIONS = {"iterations": 12, "networks": 2, "validate_every": 5, "validation_networks": 2}
OPTIONS |= {"batch_size": 16, "progress": False, "seed": 3, "clip": 1.01}
forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def initial(**options) -> du.DistilledSet:
    return make_set(TOY, "noise", **{"step_size": 0.2, **options})


def distill(distilled, dataset=TOY, network=Smooth, *, run=runs.distill, **options) -> list:
    """Runs to the end and returns what there is to compare."""
    history = run(distilled, dataset, network, **OPTIONS | options)
    return [distilled.state_dict(), vars(history)]


def losses(path: Path) -> list[float]:
    """Those in a checkpoint, one for each iteration."""
    return runs.read_checkpoint(path)["state"]["history"]["loss"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@dataclass
class At:
    """An inner loop that does something else in call number `at`."""

    at: int = field(default=0, repr=False)
    action: Callable = field(default=None, repr=False)
    calls: int = field(default=0, repr=False)

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return du.unroll(network, distilled)


# ------------------------------------------------------------------------------------------ kills
class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    ("options", "make_unroll"),
    [
        ({"decoder": nn.Dropout(0.1)}, lambda: du.unroll),
        ({"soft_labels": True, "momentum": 0.5}, lambda: RandomWindow(2, seed=3)),
        ({"momentum": 0.5}, lambda: NetworkPool(3, window=2)),
        ({"optimizer": "Adam"}, lambda: NetworkPool(2, window=1)),
    ],
    ids=["random decoder", "window", "pool", "pool with Adam"],
)
@pytest.mark.parametrize("draw", [7, 22, 36])
def test_a_killed_run_resumes_bit_identically(tmp_path, options, make_unroll, draw):
    """Killed at a draw of a network: in an iteration, in a validation, near the end."""
    path, drawn = tmp_path / "run.pt", []
    whole = distill(initial(**options), run=du.distill, unroll=make_unroll())

    def dying():
        drawn.append(1)
        if len(drawn) == draw:
            raise Killed
        return Smooth()

    with pytest.raises(Killed):
        distill(initial(**options), network=dying, unroll=make_unroll(), checkpoint=path)
    assert len(losses(path)) < 12
    for _ in range(2):  # a finished run is returned as it is
        assert_same(distill(initial(**options), unroll=make_unroll(), checkpoint=path), whole)


def work(folder: Path, unroll: NetworkPool | None = None, **options) -> list:
    """A short run with a pool, which writes its set."""
    torch.set_num_threads(1)  # another number may add in another order
    distilled, unroll = initial(optimizer="Adam"), unroll or NetworkPool(3, window=2)
    kept = distill(distilled, unroll=unroll, checkpoint=folder / "run.pt", **options)
    output = folder / "set.safetensors"
    with runs.locked("output", output):  # which also removes what a killed process left
        if runs.process_rank()[0] == 0:
            du.save(distilled, output, dataset=TOY)
    return [*kept, unroll.state_dict()]


def start(function: Callable, *arguments) -> multiprocessing.Process:
    """Calls a function in another process."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked here, for speed")
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


@forking
def test_a_process_killed_at_any_moment_resumes_to_the_same_file(tmp_path):
    folders = [tmp_path / name for name in ("whole", *"abcde")]
    for folder in folders:
        folder.mkdir()
    begin = time.perf_counter()
    work(folders[0])
    seconds = time.perf_counter() - begin
    for number, folder in enumerate(folders[1:]):
        process = start(work, folder)
        time.sleep(random.Random(number).uniform(0, seconds))
        process.kill()
        process.join()
        (folder / "set.safetensors.1.partial").touch()  # as of one killed while it wrote
        work(folder)
        assert names(folder) == ["run.pt", "set.safetensors"]
    assert len({(folder / "set.safetensors").read_bytes() for folder in folders}) == 1


# -------------------------------------------------------------------------------------- other runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    distill(initial(), checkpoint=path)
    return path


class Relu(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def zeros() -> nn.Module:
    network = Smooth()
    nn.init.zeros_(network[3].weight)
    return network


def reorder(part: str, column: str) -> dict:
    """The toy data with the images of a split, or its labels, moved by one."""
    split = getattr(TOY, part)
    split = split._replace(**{column: getattr(split, column).roll(1, 0)})
    return {"dataset": dataclasses.replace(TOY, **{part: split})}


OTHERS = [
    (r"distilled.images: \[2, 3, 1, 4, 4\] .* there, .* here", {"seed": 1}, {}),
    ("distilled.step_sizes: .* 0.2 .* there, .* 0.21 .* here", {"step_size": 0.21}, {}),
    ("epochs: 2 there, 3 here", {"epochs": 3}, {}),
    ("optimizer: SGD there, Adam here", {"optimizer": "Adam"}, {}),
    ("distilled.label_scores: None there", {"soft_labels": True}, {}),
    ("decoder: Identity.* there, Tanh.* here", {"decoder": nn.Tanh()}, {}),
    ("network: .*Tanh.* there, .*ReLU.* here", {}, {"network": Relu}),
    ("initialization: .* there, .* here", {}, {"network": zeros}),
    ("initialization: ", {}, {"network": du.fixed_initialization(Smooth, seed=1)}),
    ("dataset: toy, .* there, toy, .* here", {}, reorder("train", "images")),
    ("dataset: ", {}, reorder("validation", "labels")),
    ("iterations: 12 there, 3 here", {}, {"iterations": 3}),
    ("batch_size: 16 there, 8 here", {}, {"batch_size": 8}),
    ("clip: 1.01 there, inf here", {}, {"clip": float("inf")}),
    ("seed: 3 there, 4 here", {}, {"seed": 4}),
    (r"unroll: unroll there, RandomWindow\(length=2, seed=0\)", {}, {"unroll": RandomWindow(2)}),
    (r"unroll: .* Checkpointed\(segment=2\) here", {}, {"unroll": Checkpointed(2)}),
]


@pytest.mark.parametrize(("message", "of_set", "of_run"), OTHERS)
def test_the_checkpoint_of_another_run_is_refused_by_name(finished, message, of_set, of_run):
    before, other = finished.read_bytes(), r"run.pt' belongs to another run \((.*; )?"
    with pytest.raises(ValueError, match=f"{other}{message}.*; name another file or delete it"):
        distill(initial(**of_set), checkpoint=finished, **of_run)
    assert finished.read_bytes() == before


def test_the_last_digits_of_images_do_not_make_another_run(finished):
    """They vary with the number of threads."""
    distilled, images = initial(), TOY.train.images * (1 + 1e-7)
    changes = {"mean": TOY.mean * (1 + 1e-7), "train": TOY.train._replace(images=images)}
    distilled.images.data *= 1 + 1e-7
    rounded = dataclasses.replace(TOY, **changes)
    assert distill(distilled, rounded, checkpoint=finished)[1]["loss"] == losses(finished)


# ---------------------------------------------------------------------------------------- damages
def flip(position: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        at = int(position * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]

    return damage


def sign(payload: bytes) -> bytes:
    return runs.hashlib.sha256(payload).digest() + payload


DAMAGES = {
    "empty": lambda data: b"",
    "checksum alone": lambda data: data[:32],
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    **{f"bit flipped at {at}": flip(at) for at in (0, 0.003, 0.3, 0.7, 1)},
    "4 KB zeroed": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "signed junk": lambda data: sign(b"junk"),
    "signed code": lambda data: sign(pickle.dumps(os.getcwd, 2)),
    "another content": lambda data: runs.pack({"weights": torch.ones(3)}),
    "another torch file": lambda data: runs.pack({"weights": torch.ones(3)})[32:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_refused(finished, tmp_path, damage):
    path, distilled = tmp_path / "run.pt", initial()
    path.write_bytes(damage(finished.read_bytes()))
    with pytest.raises(ValueError, match=r"run.pt': is damaged .*; delete it or name another file"):
        distill(distilled, checkpoint=path)
    assert_same(distilled, initial())


# ------------------------------------------------------------------------------------- interrupts
def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)  # as Jupyter's stop button does, too


@pytest.mark.parametrize("at", [7, 12])
def test_ctrl_c_finishes_the_iteration_and_the_same_call_goes_on(tmp_path, at):
    path, whole, distilled = tmp_path / "run.pt", distill(initial(), unroll=At()), initial()
    with pytest.raises(runs.Interrupted, match=f"after {at} of 12 iterations"):
        distill(distilled, unroll=At(at, press_ctrl_c), checkpoint=path)
    assert len(losses(path)) == at
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    data = path.read_bytes()
    for given in (initial(), distilled):  # in a notebook, it is the one that was interrupted
        path.write_bytes(data)
        assert_same(distill(given, unroll=At(), checkpoint=path), whole)


def test_ctrl_c_in_the_last_validation_is_not_lost(tmp_path, monkeypatch):
    path, evaluate, distilled = tmp_path / "run.pt", du.evaluate, initial()

    def interrupted(distilled, *given, **options):
        if distilled.iterations == 12:
            press_ctrl_c()
        return evaluate(distilled, *given, **options)

    monkeypatch.setattr(du, "evaluate", interrupted)
    with pytest.raises(runs.Interrupted, match=f"checkpoint='{path}', resumes from there"):
        distill(distilled, checkpoint=path)
    resumed = distill(initial(), checkpoint=path)
    assert_same(resumed[0], distilled.state_dict())
    assert resumed[1]["iterations"] == [0, 5, 10, 12]


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    path = tmp_path / "run.pt"
    unroll = At(7, lambda: [press_ctrl_c(), press_ctrl_c(), pytest.fail("it went on")])
    with pytest.raises(KeyboardInterrupt) as caught:
        distill(initial(), unroll=unroll, checkpoint=path)
    assert not isinstance(caught.value, runs.Interrupted)
    assert len(losses(path)) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert names(tmp_path) == ["run.pt"]


def test_it_runs_in_a_thread_and_where_ctrl_c_is_ignored():
    distilled, before = initial(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        thread = threading.Thread(target=distill, args=(distilled,))
        thread.start()
        thread.join()
        assert distilled.iterations == 12
        # as a job in the background of a script
        assert_same(distill(initial(), unroll=At(2, press_ctrl_c))[0], distilled.state_dict())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------ locks
@forking
def test_a_second_run_with_the_same_checkpoint_is_refused_until_the_first_is_gone(tmp_path):
    held = multiprocessing.get_context("fork").Event()

    def hold():
        with runs.locked("output", tmp_path / "run.pt"):
            held.set()
            time.sleep(60)

    other = start(hold)
    assert held.wait(60)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"process {other.pid} on .* writes it; wait"):
            work(tmp_path)
    other.kill()
    other.join()
    (tmp_path / "run.pt.4711.partial").touch()
    work(tmp_path)
    assert names(tmp_path) == ["run.pt", "set.safetensors"]


# -------------------------------------------------------------------------------------- processes
class Dying(NetworkPool):
    """A pool that kills its process in call number 8."""

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        if self.calls == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(network, distilled)


Dying.__qualname__ = "NetworkPool"  # of the same settings


def join_job(rank: int, folder: Path, dying: int | None) -> None:
    """One of two processes, which keeps what there is to compare."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{dying}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    evaluated, evaluate, once = [], du.evaluate, initial(seed=rank)  # all take the first's set
    distill(once, iterations=1)
    du.evaluate = lambda *given, **options: evaluated.append(1) or evaluate(*given, **options)
    run = work(folder, (Dying if rank == dying else NetworkPool)(3, window=2))
    kept = {"run": run, "gradient": once.images.grad, "evaluated": len(evaluated)}
    torch.save(kept, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_job(folder: Path, dying: int | None = None) -> list[dict]:
    """What two processes keep, of which one may die in iteration 8."""
    processes = [start(join_job, rank, folder, dying) for rank in (0, 1)]
    if dying is not None:
        processes[dying].join()
        processes[0].kill()  # as torchrun does
    for process in processes:
        process.join()
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("[01].pt"))]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[dict]:
    return run_job(tmp_path_factory.mktemp("job"))


@forking
def test_two_processes_average_their_gradients_and_have_pools_of_their_own(job):
    gradients, (first, second) = [], job
    for rank in (0, 1):
        options = {"iterations": 1, "networks": 2, "batch_size": 16, "seed": 3 + (rank << 64)}
        run = du.Distillation(initial(), TOY, Smooth, **options)
        run.compute_gradient()
        gradients.append(run.distilled.images.grad)
    assert not torch.allclose(*gradients)
    for kept in job:
        torch.testing.assert_close(kept["gradient"], (gradients[0] + gradients[1]) / 2)
    assert_same(first["run"][:2], second["run"][:2])
    with pytest.raises(AssertionError):
        assert_same(first["run"][2], second["run"][2])
    assert (first["evaluated"], second["evaluated"]) == (4, 0), "the first alone validates"


@forking
def test_a_job_with_a_killed_rank_resumes_bit_identically(job, tmp_path):
    assert run_job(tmp_path, dying=1) == []
    assert len(losses(tmp_path / "run.pt")) == 5
    assert_same([kept["run"] for kept in run_job(tmp_path)], [whole["run"] for whole in job])
