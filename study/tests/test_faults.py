"""Mishaps: kills at any moment, damaged files, two runs with one file. `make test-faults` counts what comes of them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distill_utils as du
from study import runs
from study.methods.truncation import NetworkPool
from tests.conftest import Smooth, make_toy

KILLS = int(os.environ.get("KILLS", 10))
OPTIONS = {"batch_size": 16, "validation_networks": 2, "progress": False, "seed": 3}
ENDS = (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)


def make_set(dataset: du.Dataset) -> du.DistilledSet:
    images, labels = du.initialize(dataset, "noise", steps=2)
    options = {"epochs": 2, "step_size": 0.2, "soft_labels": True, "optimizer": "Adam"}
    return du.DistilledSet(images, labels, **options)


def work(folder: Path, *, iterations: int = 60, unroll: NetworkPool | None = None) -> bytes:
    """A short run with a pool, and the content of its output."""
    torch.set_num_threads(1)  # another number may add in another order
    toy, options = make_toy(), {**OPTIONS, "iterations": iterations, "validate_every": 5}
    distilled, unroll = make_set(toy), unroll or NetworkPool(3, window=2)
    runs.distill(distilled, toy, Smooth, unroll=unroll, checkpoint=folder / "run.pt", **options)
    output = folder / "set.safetensors"
    with runs.locked("output", output), runs.write_safely(output) as path:
        du.save(distilled, path, dataset=toy)
    return (folder / "set.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[bytes, float]:
    """What a run gives that nothing happens to, and the seconds it takes."""
    begin = time.perf_counter()
    return work(tmp_path_factory.mktemp("undisturbed")), time.perf_counter() - begin


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here, for speed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.fault("kills resumed to the same file")
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_resumes_to_the_same_file(undisturbed, tmp_path, number):
    expected, seconds = undisturbed
    child = os.fork()
    if child == 0:
        try:
            work(tmp_path)
        finally:
            os._exit(0)
    time.sleep(random.Random(number).uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert work(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "set.safetensors"]


class Dying(NetworkPool):
    """A pool that ends its process in call number 8."""

    def __call__(self, network, distilled):
        if self.calls == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(network, distilled)


def work_together(rank: int, folder: Path, dying: int | None) -> None:
    meeting = f"file://{folder / f'meeting-{dying}'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    Dying.__qualname__ = Dying.__name__ = "NetworkPool"  # it has the state, and is to have the name
    work(folder, iterations=12, unroll=(Dying if rank == dying else NetworkPool)(3, window=2))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.fault("killed ranks resumed to the same file")
@pytest.mark.parametrize("dying", range(min(2, KILLS // 10)))
def test_a_job_with_a_killed_rank_resumes_to_the_same_file(tmp_path, dying):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.spawn(work_together, (tmp_path / "whole", None), nprocs=2)
    with pytest.raises(ENDS):
        torch.multiprocessing.spawn(work_together, (tmp_path / "killed", dying), nprocs=2)
    assert (
        len(runs.read_checkpoint(tmp_path / "killed" / "run.pt")["state"]["history"]["loss"]) == 5
    )
    torch.multiprocessing.spawn(work_together, (tmp_path / "killed", None), nprocs=2)
    paths = (tmp_path / name / "set.safetensors" for name in ("whole", "killed"))
    first, second = (path.read_bytes() for path in paths)
    assert first == second


# ------------------------------------------------------------------------------------- damaged files
def damage(content: bytes, seed: int) -> bytes:
    """One of five mishaps at a random place."""
    chance = random.Random(seed)
    at, length = chance.randrange(len(content)), chance.randrange(1, 4096)
    flipped = bytes([content[at] ^ 1 << chance.randrange(8)])
    return [
        content[:at] + flipped + content[at + 1 :],
        content[:at],  # cut off
        content[:at] + bytes(len(content[at : at + length])) + content[at + length :],  # zeroed
        content[:at] + content[at + length :],  # a part lost
        content[:at] + chance.randbytes(length) + content[at:],  # something put in
    ][seed % 5]


@pytest.mark.fault("damaged files refused")
@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("kind", ["run.pt", "set.safetensors"])
def test_no_damaged_file_is_read(undisturbed_folder, tmp_path, kind, seed):
    content, path = (undisturbed_folder / kind).read_bytes(), tmp_path / kind
    path.write_bytes(damage(content, seed))
    if path.read_bytes() == content:  # zeros where zeros were
        path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"no checkpoint of distill|cannot load a distilled set"):
        runs.read_checkpoint(path) if kind == "run.pt" else du.load(path)


@pytest.fixture(scope="module")
def undisturbed_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    work(folder, iterations=5)
    return folder


# --------------------------------------------------------------------------------- two runs, one file
HOLD = """
import sys, time
from study import runs
with runs.locked("checkpoint", sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the checkpoint."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "run.pt")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(du.__file__).parent) as other:
        assert other.stdout.readline() == b"held\n"
        yield other
        other.kill()


@pytest.mark.fault("bad calls named")
def test_a_second_run_with_the_same_checkpoint_is_refused_until_the_first_is_gone(tmp_path, holder):
    path = tmp_path / "run.pt"
    message = rf"checkpoint='{path}': process {holder.pid} on .* writes it; wait until"
    with pytest.raises(ValueError, match=message):
        work(tmp_path)
    holder.kill()
    holder.wait()
    (tmp_path / "run.pt.4711.partial").touch()
    work(tmp_path, iterations=1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.pt", "set.safetensors"]
    with (
        runs.locked("output", path),
        pytest.raises(ValueError, match=rf"output='{path}': process {os.getpid()} on"),
    ):
        runs.locked("output", path).__enter__()
