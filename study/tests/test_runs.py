"""Runs that survive: checkpoints, kills, damages, interrupts, several processes, locks."""

import contextlib
import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
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
from study.methods.decoders import Augment
from study.methods.truncation import Checkpointed, NetworkPool, RandomWindow
from tests.conftest import Smooth, make_toy

OPTIONS = {"iterations": 12, "networks": 2, "validate_every": 5, "validation_networks": 2}
OPTIONS |= {"batch_size": 16, "progress": False, "seed": 3}


def make_set(dataset: du.Dataset, *, seed: int = 0, **options) -> du.DistilledSet:
    images, labels = du.initialize(dataset, "noise", steps=2, seed=seed)
    return du.DistilledSet(images, labels, **{"epochs": 2, "step_size": 0.2, **options})


def equal(first: object, second: object) -> bool:
    """Whether two sets, histories or states have equal values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, nn.Module):
        return equal(first.state_dict(), second.state_dict())
    if isinstance(first, du.History):
        return equal(vars(first), vars(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def losses(path: Path) -> list[float]:
    """Those in a checkpoint, one for each iteration."""
    return runs.read_checkpoint(path)["state"]["history"]["loss"]


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


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)  # as Jupyter's stop button does, too


def interrupt(distilled: du.DistilledSet, dataset: du.Dataset, at: int, **options) -> None:
    """Runs until Ctrl-C in iteration number `at`, counted from 1."""
    run = runs.Run(distilled, dataset, Smooth, unroll=At(at, press_ctrl_c), **OPTIONS, **options)
    with pytest.raises(runs.Interrupted, match=f"after {at} of 12 iterations"):
        run.run()


# ------------------------------------------------------------------------------------------ kills
class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    ("options", "make_unroll"),
    [
        ({"decoder": Augment()}, lambda: du.unroll),
        ({"soft_labels": True, "momentum": 0.5}, lambda: RandomWindow(2, seed=3)),
        ({"momentum": 0.5}, lambda: NetworkPool(3, window=2)),
        ({"optimizer": "Adam"}, lambda: NetworkPool(2, window=1)),
    ],
    ids=["random decoder", "window", "pool", "pool with Adam"],
)
@pytest.mark.parametrize("draw", [7, 22, 36])
def test_a_killed_run_resumes_bit_identically(toy, tmp_path, options, make_unroll, draw):
    """Killed at a draw of a network: in an iteration, in a validation, near the end."""
    path, drawn, whole, killed = tmp_path / "run.pt", [], *(make_set(toy, **options) for _ in "12")
    expected = du.distill(whole, toy, Smooth, unroll=make_unroll(), **OPTIONS)

    def dying():
        drawn.append(1)
        if len(drawn) == draw:
            raise Killed
        return Smooth()

    with pytest.raises(Killed):
        runs.distill(killed, toy, dying, unroll=make_unroll(), checkpoint=path, **OPTIONS)
    assert len(losses(path)) < 12
    for _ in range(2):  # a finished run is returned as it is
        resumed, unroll = make_set(toy, **options), make_unroll()
        history = runs.distill(resumed, toy, Smooth, unroll=unroll, checkpoint=path, **OPTIONS)
        assert equal([resumed, history], [whole, expected])


def work(folder: Path, *, unroll: NetworkPool | None = None, **options) -> list:
    """A short run with a pool, which writes its set; returns what there is to compare."""
    torch.set_num_threads(1)  # another number may add in another order
    toy, unroll = make_toy(), unroll or NetworkPool(3, window=2)
    distilled, options = make_set(toy, soft_labels=True, optimizer="Adam"), {**OPTIONS, **options}
    path = folder / "run.pt"
    history = runs.distill(distilled, toy, Smooth, unroll=unroll, checkpoint=path, **options)
    if runs.process_rank()[0] == 0:
        du.save(distilled, folder / "set.safetensors", dataset=toy)
    return [distilled.state_dict(), vars(history), unroll.state_dict()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here, for speed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_killed_at_any_moment_resumes_to_the_same_file(tmp_path):
    (tmp_path / "whole").mkdir()
    begin = time.perf_counter()
    work(tmp_path / "whole", iterations=40)
    seconds = time.perf_counter() - begin
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                work(folder, iterations=40)
            os._exit(0)
        time.sleep(random.Random(number).uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        work(folder, iterations=40)
        assert sorted(path.name for path in folder.iterdir()) == ["run.pt", "set.safetensors"]
        content = (folder / "set.safetensors").read_bytes()
        assert content == (tmp_path / "whole" / "set.safetensors").read_bytes()


# -------------------------------------------------------------------------------------- other runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path, toy = tmp_path_factory.mktemp("finished") / "run.pt", make_toy()
    runs.distill(make_set(toy), toy, Smooth, checkpoint=path, **OPTIONS)
    return path


class Relu(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def zeros() -> nn.Module:
    network = Smooth()
    nn.init.zeros_(network[3].weight)
    return network


def reorder(dataset: du.Dataset, part: str, column: str) -> du.Dataset:
    """Moves the images of a split, or its labels, by one."""
    split = getattr(dataset, part)
    split = split._replace(**{column: getattr(split, column).roll(1, 0)})
    return dataclasses.replace(dataset, **{part: split})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"distilled.images: \[2, 3, 1, 4, 4\] .* there, .* here", {"set": {"seed": 1}}),
        ("distilled.step_sizes: .* 0.2 .* there, .* 0.21 .* here", {"set": {"step_size": 0.21}}),
        ("epochs: 2 there, 3 here", {"set": {"epochs": 3}}),
        ("momentum: 0 there, 0.5 here", {"set": {"momentum": 0.5}}),
        ("optimizer: SGD there, Adam here", {"set": {"optimizer": "Adam"}}),
        ("distilled.label_scores: None there", {"set": {"soft_labels": True}}),
        ("decoder: Identity.* there, Tanh.* here", {"set": {"decoder": nn.Tanh()}}),
        ("network: .*Tanh.* there, .*ReLU.* here", {"network": Relu}),
        ("initialization: .* there, .* here", {"network": zeros}),
        ("initialization: ", {"network": du.fixed_initialization(Smooth, seed=1)}),
        ("dataset: toy, .* there, toy, .* here", {"dataset": ("train", "images")}),
        ("dataset: ", {"dataset": ("validation", "labels")}),
        ("iterations: 12 there, 3 here", {"iterations": 3}),
        ("batch_size: 16 there, 8 here", {"batch_size": 8}),
        ("step_size_learning_rate: 0.01 there, 0 here", {"step_size_learning_rate": 0}),
        ("clip: 2 there, inf here", {"clip": float("inf")}),
        ("seed: 3 there, 4 here", {"seed": 4}),
        (r"unroll: unroll there, RandomWindow\(length=2, seed=0\)", {"unroll": RandomWindow(2)}),
        (r"unroll: .* Checkpointed\(segment=2\) here", {"unroll": Checkpointed(2)}),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_by_name(toy, finished, message, change):
    change, before = dict(change), finished.read_bytes()
    distilled, network = make_set(toy, **change.pop("set", {})), change.pop("network", Smooth)
    dataset = reorder(toy, *change.pop("dataset")) if "dataset" in change else toy
    message = (
        rf"run.pt' belongs to another run \((.*; )?{message}.*; name another file or delete it"
    )
    with pytest.raises(ValueError, match=message):
        runs.distill(distilled, dataset, network, checkpoint=finished, **{**OPTIONS, **change})
    assert finished.read_bytes() == before


def test_the_last_digits_of_images_do_not_make_another_run(toy, finished):
    """They vary with the number of threads."""
    distilled, images = make_set(toy), toy.train.images * (1 + 1e-7)
    rounded = dataclasses.replace(
        toy, mean=toy.mean * (1 + 1e-7), train=toy.train._replace(images=images)
    )
    distilled.images.data *= 1 + 1e-7
    history = runs.distill(distilled, rounded, Smooth, checkpoint=finished, **OPTIONS)
    assert history.loss == losses(finished)


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
    "last byte lost": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    **{f"bit flipped at {at}": flip(at) for at in (0, 0.003, 0.1, 0.3, 0.5, 0.7, 0.9, 1)},
    "4 KB zeroed": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "all zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"not a checkpoint\n",
    "signed junk": lambda data: sign(b"junk"),
    "signed code": lambda data: sign(pickle.dumps(os.getcwd, 2)),
    "another content": lambda data: runs.pack({"weights": torch.ones(3)}),
    "another torch file": lambda data: runs.pack({"weights": torch.ones(3)})[32:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_refused(toy, finished, tmp_path, damage):
    path, distilled = tmp_path / "run.pt", make_set(toy)
    path.write_bytes(damage(finished.read_bytes()))
    with pytest.raises(ValueError, match=r"run.pt': is damaged .*; delete it or name another file"):
        runs.distill(distilled, toy, Smooth, checkpoint=path, **OPTIONS)
    assert equal(distilled, make_set(toy))


# ------------------------------------------------------------------------------------- interrupts
def test_ctrl_c_finishes_the_iteration_and_the_same_call_goes_on(toy, tmp_path):
    path, whole, distilled = tmp_path / "run.pt", make_set(toy), make_set(toy)
    expected = runs.distill(whole, toy, Smooth, unroll=At(), **OPTIONS)
    interrupt(distilled, toy, 7, checkpoint=path)
    assert len(losses(path)) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    data = path.read_bytes()
    for given in (make_set(toy), distilled):  # in a notebook, it is the one that was interrupted
        path.write_bytes(data)
        history = runs.distill(given, toy, Smooth, unroll=At(), checkpoint=path, **OPTIONS)
        assert equal([given, history], [whole, expected])


def test_ctrl_c_in_the_last_iteration_or_validation_is_not_lost(toy, tmp_path, monkeypatch):
    path, whole, evaluate = tmp_path / "run.pt", make_set(toy), du.evaluate
    runs.distill(whole, toy, Smooth, **OPTIONS)
    interrupt(make_set(toy), toy, 12, checkpoint=path)
    monkeypatch.setattr(du, "evaluate", lambda *a, **b: press_ctrl_c() or evaluate(*a, **b))
    distilled, options = make_set(toy), {**OPTIONS, "checkpoint": path, "unroll": At()}
    with pytest.raises(runs.Interrupted, match=f"checkpoint='{path}', resumes from there"):
        runs.distill(distilled, toy, Smooth, **options)
    assert equal(distilled, whole)
    assert runs.distill(make_set(toy), toy, Smooth, **options).iterations == [0, 5, 10, 12]


def test_a_second_ctrl_c_interrupts_at_once(toy, tmp_path):
    path = tmp_path / "run.pt"
    unroll = At(7, lambda: [press_ctrl_c(), press_ctrl_c(), pytest.fail("it went on")])
    with pytest.raises(KeyboardInterrupt) as caught:
        runs.distill(make_set(toy), toy, Smooth, unroll=unroll, checkpoint=path, **OPTIONS)
    assert not isinstance(caught.value, runs.Interrupted)
    assert len(losses(path)) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_it_runs_in_a_thread_and_where_ctrl_c_is_ignored(toy):
    distilled, options = make_set(toy), {**OPTIONS, "unroll": At(2, press_ctrl_c)}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a job in the background of a script
    try:
        thread = threading.Thread(
            target=runs.distill, args=(distilled, toy, Smooth), kwargs=OPTIONS
        )
        thread.start()
        thread.join()
        assert distilled.iterations == 12
        assert len(runs.distill(make_set(toy), toy, Smooth, **options).loss) == 12
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------ files
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with du.replacing(path) as unfinished:
        unfinished.write_text("first")
    with pytest.raises(Killed), du.replacing(path) as unfinished:  # noqa: PT012
        unfinished.write_text("half of it")
        raise Killed
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_second_run_with_the_same_checkpoint_is_refused_until_the_first_is_gone(tmp_path):
    code = "import sys, time; from study import runs; lock = runs.locked('output', sys.argv[1]);"
    code += "lock.__enter__(); print('held', flush=True); time.sleep(60)"
    line = [sys.executable, "-c", code, str(tmp_path / "run.pt")]
    folder = Path(du.__file__).parent
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=folder) as other:
        assert other.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"process {other.pid} on .* writes it; wait"):
                work(tmp_path)
        other.kill()
    (tmp_path / "run.pt.4711.partial").touch()
    work(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt", "set.safetensors"]


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
    meeting = f"file://{folder}/meeting-{dying}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    toy, evaluated, evaluate = make_toy(), [], du.evaluate
    once = make_set(toy, seed=rank)  # all start from what the first one has
    runs.distill(once, toy, Smooth, **{**OPTIONS, "iterations": 1})
    du.evaluate = lambda *given, **options: evaluated.append(1) or evaluate(*given, **options)
    run = work(folder, unroll=(Dying if rank == dying else NetworkPool)(3, window=2))
    kept = {"run": run, "gradient": once.images.grad, "evaluated": len(evaluated)}
    torch.save(kept, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_job(folder: Path, dying: int | None = None) -> list[dict]:
    """What two processes keep, of which one may die in iteration 8."""
    multiprocessing.spawn(join_job, (folder, dying), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[dict]:
    return run_job(tmp_path_factory.mktemp("job"))


def test_two_processes_take_the_mean_of_their_gradients(job):
    gradients = []
    for rank in (0, 1):
        options = {"iterations": 1, "networks": 2, "batch_size": 16, "seed": 3 + (rank << 64)}
        run = du.Distillation(make_set(make_toy()), make_toy(), Smooth, **options)
        run.compute_gradient()
        gradients.append(run.distilled.images.grad)
    assert not torch.allclose(*gradients)
    for kept in job:
        torch.testing.assert_close(kept["gradient"], (gradients[0] + gradients[1]) / 2)


def test_two_processes_have_one_set_and_pools_of_their_own(job):
    first, second = job
    assert equal(first["run"][:2], second["run"][:2])
    assert not equal(first["run"][2], second["run"][2])
    assert (first["evaluated"], second["evaluated"]) == (4, 0), "the first alone validates"


def test_a_job_with_a_killed_rank_resumes_bit_identically(job, tmp_path):
    with pytest.raises(multiprocessing.ProcessExitedException):
        run_job(tmp_path, dying=1)
    assert len(losses(tmp_path / "run.pt")) == 5
    resumed = run_job(tmp_path)
    assert all(equal(kept["run"], whole["run"]) for kept, whole in zip(resumed, job, strict=True))
