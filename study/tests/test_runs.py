"""Runs that survive: checkpoints, interrupts, several processes, safe files."""

import dataclasses
import functools
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import distill_utils as du
from study import runs
from study.methods.decoders import augmented
from study.methods.truncation import Checkpointed, NetworkPool, RandomWindow
from tests.conftest import Smooth, make_toy

OPTIONS = {"batch_size": 16, "progress": False, "seed": 3}
OPTIONS |= {"iterations": 12, "networks": 2, "validate_every": 5}
SHORT = {"iterations": 2, "batch_size": 16, "validation_networks": 2, "progress": False}


def make_set(dataset: du.Dataset, seed: int = 0, **options) -> du.DistilledSet:
    images, labels = du.initialize(dataset, "noise", steps=2, seed=seed)
    return du.DistilledSet(images, labels, **{"epochs": 2, "step_size": 0.2, **options})


def assert_same(first: du.DistilledSet, second: du.DistilledSet) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Failing:
    """An inner loop that does something else in call number `at`, as an object with a state of its own."""

    def __init__(self, at: int, action) -> None:
        self.calls, self._at, self._action = 0, at, action

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        self.calls += 1
        if self.calls == self._at:
            self._action()
        return du.unroll(network, distilled)

    def state_dict(self) -> dict:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state["calls"]


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)  # as Jupyter's stop button does, too


def interrupt(distilled: du.DistilledSet, dataset: du.Dataset, at: int, **options) -> None:
    """Runs until Ctrl-C in iteration number `at`, counted from 1."""
    with pytest.raises(runs.Interrupted):  # noqa: PT012
        unroll = Failing(at, press_ctrl_c)
        runs.distill(distilled, dataset, Smooth, unroll=unroll, **{**OPTIONS, **options})


def test_it_does_what_the_core_does(toy, tmp_path):
    expected, found = make_set(toy), make_set(toy)
    history = du.distill(expected, toy, Smooth, **OPTIONS)
    again = runs.distill(found, toy, Smooth, checkpoint=tmp_path / "run.pt", **OPTIONS)
    assert_same(expected, found)
    assert equal(vars(again), vars(history))


# ------------------------------------------------------------------------------------------ resuming
class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    ("options", "make_unroll"),
    [
        ({}, lambda: du.unroll),
        ({"soft_labels": True, "momentum": 0.5}, lambda: RandomWindow(2, seed=3)),
        ({"momentum": 0.5}, lambda: NetworkPool(3, window=2)),
        ({"optimizer": "Adam"}, lambda: NetworkPool(2, window=1)),
    ],
    ids=["plain", "window", "pool", "pool-adam"],
)
@pytest.mark.parametrize(("killed_at", "reached"), [(17, 0), (39, 5), (45, 10)])
def test_a_killed_run_resumes_to_the_bit_identical_result(
    toy, tmp_path, options, make_unroll, killed_at, reached
):
    """Killed at a draw of a network: in an iteration, in a validation, near the end."""
    path, drawn = tmp_path / "run.pt", []

    def dying():
        drawn.append(1)
        if len(drawn) == killed_at:
            raise Killed
        return Smooth()

    def run(make_network=Smooth, **more) -> tuple[du.DistilledSet, du.History]:
        distilled, more = make_set(toy, **options), {"unroll": make_unroll(), **OPTIONS, **more}
        return distilled, runs.distill(distilled, toy, make_network, **more)

    whole, expected = run()
    with pytest.raises(Killed):
        run(dying, checkpoint=path)
    assert len(runs.read_checkpoint(path)["state"]["history"]["loss"]) == reached
    for _ in range(2):  # a finished run is returned as it is
        resumed, history = run(checkpoint=path)
        assert_same(resumed, whole)
        assert equal(vars(history), vars(expected))


def test_a_set_that_decodes_at_random_resumes_bit_identically(toy, tmp_path):
    def make_augmented():
        return augmented(*du.initialize(toy, "noise", steps=2), step_size=0.2)

    whole, resumed, path = make_augmented(), make_augmented(), tmp_path / "run.pt"
    options = {**OPTIONS, "unroll": Failing(0, None)}
    expected = runs.distill(whole, toy, Smooth, **options)
    interrupt(make_augmented(), toy, 7, checkpoint=path)
    torch.rand(3)  # whatever else takes random numbers
    history = runs.distill(resumed, toy, Smooth, checkpoint=path, **options)
    assert history.loss == expected.loss
    assert_same(resumed, whole)


# ---------------------------------------------------------------------------------------- other runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path, toy = tmp_path_factory.mktemp("finished") / "run.pt", make_toy()
    runs.distill(make_set(toy), toy, Smooth, checkpoint=path, **SHORT)
    return path


class Relu(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


class Doubled(Smooth):
    """The same layers and weights as Smooth, and another result."""

    def forward(self, images):
        return 2 * super().forward(images)


Doubled.__name__ = "Smooth"


def zeros() -> nn.Module:
    network = Smooth()
    nn.init.zeros_(network[3].weight)
    return network


def other_pixels(dataset: du.Dataset) -> du.Dataset:
    images = dataset.train.images.clone()
    images[7, 0, 3, 3] += 0.05 / dataset.std
    return dataclasses.replace(dataset, train=du.Split(images, dataset.train.labels))


def other_labels(dataset: du.Dataset) -> du.Dataset:
    labels = dataset.validation.labels.clone()
    labels[:2] = labels[:2].flip(0)
    return dataclasses.replace(dataset, validation=du.Split(dataset.validation.images, labels))


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("named", "change"),
    [
        (r"images: \[2, 3, 1, 4, 4\] \w+ there, \[2, 3, 1, 4, 4\] \w+ here", {"set": {"seed": 1}}),
        (r"step_size: 0.2 for 4 updates there, 0.21 .* here", {"set": {"step_size": 0.21}}),
        (r"epochs: 2 there, 3 here", {"set": {"epochs": 3, "step_size": 0.2}}),
        (r"momentum: 0.0 there, 0.5 here", {"set": {"momentum": 0.5}}),
        (r"optimizer: SGD there, Adam here", {"set": {"optimizer": "Adam"}}),
        (r"label_scores: none there", {"set": {"soft_labels": True}}),
        (r"network: Smooth \w+ there, Relu \w+ here", {"network": Relu}),
        (r"initialization: .* there, .* here", {"network": zeros}),
        (r"initialization: ", {"network": du.fixed_initialization(Smooth, seed=1)}),
        (r"initialization: ", {"network": Doubled}),
        (r"dataset: toy 60\+30 \w+ there, toy 60\+30 \w+ here", {"dataset": other_pixels}),
        (r"dataset: ", {"dataset": other_labels}),
        (r"iterations: 2 there, 3 here", {"iterations": 3}),
        (r"batch_size: 16 there, 8 here", {"batch_size": 8}),
        (r"networks: 1 there, 2 here", {"networks": 2}),
        (r"learning_rate: 0.03 there, 0.02 here", {"learning_rate": 0.02}),
        (r"step_size_learning_rate: 0.01 there, 0 here", {"step_size_learning_rate": 0}),
        (r"clip: 2 there, inf here", {"clip": float("inf")}),
        (r"seed: 0 there, 1 here", {"seed": 1}),
        (r"validate_every: 100 there, 1 here", {"validate_every": 1}),
        (r"validation_networks: 2 there, 1 here", {"validation_networks": 1}),
        (r"unroll: .* RandomWindow\(length=2, seed=0\) here", {"unroll": RandomWindow(2)}),
        (r"unroll: .* NetworkPool\(size=3, window=2\) here", {"unroll": NetworkPool(3, window=2)}),
        (r"unroll: .* Checkpointed\(segment=2\) here", {"unroll": Checkpointed(2)}),
        (r"unroll: unroll there, Failing\(\) here", {"unroll": Failing(1, None)}),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(toy, finished, named, change):
    change = dict(change)
    distilled, network = make_set(toy, **change.pop("set", {})), change.pop("network", Smooth)
    dataset = change.pop("dataset", lambda same: same)(toy)
    before = finished.read_bytes()
    message = rf"belongs to another run \((.*; )?{named}.*name another file or delete it"
    with pytest.raises(ValueError, match=message):
        runs.distill(distilled, dataset, network, checkpoint=finished, **{**SHORT, **change})
    assert finished.read_bytes() == before


@pytest.mark.fault("bad calls named")
def test_a_fixed_initialization_is_told_from_random_ones_whatever_its_seed(toy):
    def start(make_network):
        run = du.Distillation(make_set(toy), toy, make_network, iterations=1)
        return runs.describe_start(run)["initialization"]

    with du.seeded(1811, 10959):
        seed = torch.initial_seed()  # the first network is that of a fixed initialization
    assert not torch.allclose(start(Smooth), start(du.fixed_initialization(Smooth, seed=seed)))
    assert torch.equal(start(Smooth), start(lambda: Smooth()))


def test_inner_loops_are_told_apart():
    def local(factor):
        return lambda network, distilled: du.unroll(network, distilled) if factor else None

    descriptions = [
        runs.describe(each)
        for each in (du.unroll, local(1), local(2), lambda *given: du.unroll(*given), Failing(1, None),
                     functools.partial(du.unroll, differentiable=True), RandomWindow(2), RandomWindow(3))
    ]  # fmt: skip
    assert len(set(descriptions)) == len(descriptions)
    assert not any("0x" in each for each in descriptions)
    assert runs.describe(local(1)) == runs.describe(local(1))
    used = RandomWindow(2)
    used.calls = 7
    assert runs.describe(used) == runs.describe(RandomWindow(2))


def test_numbers_of_any_kind_are_the_same_option(toy, finished):
    np = pytest.importorskip("numpy")
    options = {"iterations": np.int64(2), "batch_size": np.int32(16)}
    options = {**SHORT, **options, "learning_rate": np.float64(0.03)}
    history = runs.distill(make_set(toy), toy, Smooth, checkpoint=finished, **options)
    assert len(history.loss) == 2


def test_a_rounding_of_mean_and_images_is_the_same_run(toy, finished):
    """As by another number of threads, under torchrun for instance: 1e-7 of everything."""
    splits = {
        name: du.Split(getattr(toy, name).images * (1 + 1e-7), getattr(toy, name).labels)
        for name in ("train", "validation")
    }
    rounded = dataclasses.replace(toy, mean=toy.mean * (1 + 1e-7), **splits)
    distilled = make_set(toy)
    distilled.images.data *= 1 + 1e-7
    history = runs.distill(distilled, rounded, Smooth, checkpoint=finished, **SHORT)
    assert len(history.loss) == 2


# ------------------------------------------------------------------------------------------- damages
def flip(position: float):
    def damage(data: bytes) -> bytes:
        at = int(position * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]

    return damage


def without(*names: str):
    def damage(data: bytes) -> bytes:
        content = runs.unpack(data[len(runs.HEADER) + 32 :])
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        return sign(runs.pack(content))

    return damage


def sign(payload: bytes) -> bytes:
    return runs.HEADER + runs.hashlib.sha256(payload).digest() + payload


DAMAGES = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "header alone": lambda data: data[: len(runs.HEADER)],
    "cut in half": lambda data: data[: len(data) // 2],
    "last byte lost": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    **{f"bit flipped at {at}": flip(at) for at in (0, 0.003, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1)},
    "4 KB zeroed": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "all zeros": lambda data: bytes(len(data)),
    "junk": lambda data: bytes(range(256)) * 40,
    "text": lambda data: b"not a checkpoint\n",
    "a pickle": lambda data: pickle.dumps({"settings": {}, "state": {}}),
    "a signed pickle of code": lambda data: sign(pickle.dumps(os.getcwd, 2)),
    "signed junk": lambda data: sign(b"junk"),
    "signed list": lambda data: sign(runs.pack([1, 2])),
    "no settings": without("settings"),
    "no state": without("state"),
    "no unroll": without("unroll"),
    "no set": without("state", "distilled"),
    "another torch file": lambda data: runs.pack({"weights": torch.ones(3)}),
}


@pytest.mark.fault("damaged files refused")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_refused(toy, finished, tmp_path, damage):
    path = tmp_path / "run.pt"
    path.write_bytes(damage(finished.read_bytes()))
    distilled = make_set(toy)
    message = r"run.pt': no checkpoint of distill; delete it or name another"
    with pytest.raises(ValueError, match=message):
        runs.distill(distilled, toy, Smooth, checkpoint=path, **SHORT)
    assert_same(distilled, make_set(toy))


# ---------------------------------------------------------------------------------------- interrupts
def test_ctrl_c_finishes_the_iteration_and_the_same_call_goes_on(toy, tmp_path, capsys):
    path, whole, distilled = tmp_path / "run.pt", make_set(toy), make_set(toy)
    options = {**OPTIONS, "unroll": Failing(0, None)}
    expected = runs.distill(whole, toy, Smooth, **options)
    interrupt(distilled, toy, 7, checkpoint=path)
    remedy = f"the same call, with checkpoint='{path}', goes on from there."
    assert capsys.readouterr().out == f"Interrupted after 7 of 12 iterations: {remedy}\n"
    assert len(runs.read_checkpoint(path)["state"]["history"]["loss"]) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    data = path.read_bytes()
    for given in (make_set(toy), distilled):  # in a notebook, it is the one that was interrupted
        path.write_bytes(data)
        history = runs.distill(given, toy, Smooth, checkpoint=path, **options)
        assert_same(given, whole)
        assert equal(vars(history), vars(expected))


def test_ctrl_c_without_a_checkpoint_keeps_what_was_learned_and_stops_a_loop(toy, capsys):
    sets = [make_set(toy, seed=seed) for seed in range(3)]
    seen = []

    def loop():
        for seed, distilled in enumerate(sets):
            seen.append(seed)
            unroll = Failing(4 if seed == 1 else 0, press_ctrl_c)
            runs.distill(distilled, toy, Smooth, unroll=unroll, **OPTIONS)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert seen == [0, 1]
    message = "after 4 of 12 iterations: the distilled set keeps what it has learned"
    assert message in capsys.readouterr().out
    assert not torch.equal(sets[1].images, make_set(toy, seed=1).images)


def test_ctrl_c_in_the_last_iteration_or_validation_is_not_lost(toy, tmp_path):
    path, whole = tmp_path / "run.pt", make_set(toy)
    runs.distill(whole, toy, Smooth, **OPTIONS)
    interrupt(make_set(toy), toy, 12, checkpoint=path)
    drawn = []

    def interrupting():
        drawn.append(1)
        if len(drawn) == 7:  # in the validation: five are looked at before
            press_ctrl_c()
        return Smooth()

    options = {**OPTIONS, "checkpoint": path, "unroll": Failing(0, None)}
    distilled = make_set(toy)
    with pytest.raises(runs.Interrupted):
        runs.distill(distilled, toy, interrupting, **options)
    assert_same(distilled, whole)
    assert runs.read_checkpoint(path)["state"]["history"]["iterations"] == [0, 5, 10, 12]
    assert len(runs.distill(make_set(toy), toy, Smooth, **options).loss) == 12


def test_a_second_ctrl_c_interrupts_at_once(toy, tmp_path):
    path = tmp_path / "run.pt"
    reached = []

    def twice():
        press_ctrl_c()
        reached.append(1)
        press_ctrl_c()
        reached.append(2)

    options = {**OPTIONS, "unroll": Failing(7, twice), "checkpoint": path}
    with pytest.raises(KeyboardInterrupt) as caught:
        runs.distill(make_set(toy), toy, Smooth, **options)
    assert reached == [1]
    assert not isinstance(caught.value, runs.Interrupted)
    assert len(runs.read_checkpoint(path)["state"]["history"]["loss"]) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


def test_it_runs_outside_the_main_thread(toy, tmp_path):
    distilled, options = make_set(toy), {**OPTIONS, "checkpoint": tmp_path / "run.pt"}
    thread = threading.Thread(target=runs.distill, args=(distilled, toy, Smooth), kwargs=options)
    thread.start()
    thread.join()
    assert len(runs.read_checkpoint(tmp_path / "run.pt")["state"]["history"]["loss"]) == 12


def test_a_process_that_ignores_ctrl_c_keeps_ignoring_it(toy):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a job in the background of a script
    try:
        runs.distill(make_set(toy), toy, Smooth, unroll=Failing(2, press_ctrl_c), **OPTIONS)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_divergence_leaves_the_last_good_iteration_and_checkpoint(toy, tmp_path):
    path, good, distilled = tmp_path / "run.pt", make_set(toy), make_set(toy)
    interrupt(good, toy, 7)

    def diverge():
        hook = distilled.images.register_hook(lambda gradient: gradient * float("nan"))
        cleanup.append(hook.remove)

    cleanup = []
    options = {**OPTIONS, "checkpoint": path}
    with pytest.raises(FloatingPointError, match="not finite at iteration 7"):
        runs.distill(distilled, toy, Smooth, unroll=Failing(8, diverge), **options)
    assert_same(distilled, good)
    assert len(runs.read_checkpoint(path)["state"]["history"]["loss"]) == 5
    cleanup[0]()
    whole, resumed = make_set(toy), make_set(toy)
    runs.distill(whole, toy, Smooth, **OPTIONS)
    runs.distill(resumed, toy, Smooth, unroll=Failing(0, None), **options)
    assert_same(resumed, whole)


# --------------------------------------------------------------------------------------------- files
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "new" / "file", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), sync(file)))
    with runs.write_safely(path) as partial:
        assert partial.parent == path.parent
        partial.write_text("first")
    assert path.read_text() == "first"
    assert len(synced) == 2, "the file and its folder"
    with pytest.raises(Killed), runs.write_safely(path) as partial:  # noqa: PT012
        partial.write_text("half of it")
        raise Killed
    assert path.read_text() == "first"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.fault("bad calls named")
def test_checkpoints_that_cannot_be_written_are_named_before_any_work(toy, tmp_path):
    def no_network():
        pytest.fail("work had begun")

    (tmp_path / "file").touch()
    refused = {
        tmp_path: "is a folder; name a file in it",
        tmp_path / "file" / "run.pt": "cannot be written .*can write to",
        os.devnull: "is no regular file; name another",
    }
    for path, reason in refused.items():
        with pytest.raises(ValueError, match=f"checkpoint='{path}': {reason}"):
            runs.distill(make_set(toy), toy, no_network, checkpoint=path, **OPTIONS)


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize("name", ["validate_every", "validation_networks", "iterations"])
def test_bad_options_are_named_before_any_work(toy, tmp_path, name):
    def no_network():
        pytest.fail("work had begun")

    options = {**OPTIONS, "checkpoint": tmp_path / "run.pt", name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: give a whole number"):
        runs.distill(make_set(toy), toy, no_network, **options)


# ----------------------------------------------------------------------------------------- processes
JOB = {"batch_size": 16, "progress": False, "seed": 3}
JOB |= {"validate_every": 2, "validation_networks": 2}


def in_a_job(rank: int, folder: Path) -> None:
    """One of two processes, which keeps what the tests below look at."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    toy, kept = make_toy(), {}
    once = make_set(toy, seed=rank)  # all start from what the first one has
    runs.distill(once, toy, Smooth, iterations=1, **JOB)
    kept["gradients"] = [once.images.grad, once.raw_step_sizes.grad]

    evaluate, evaluated = du.evaluate, []
    du.evaluate = lambda *given, **options: evaluated.append(1) or evaluate(*given, **options)
    whole, pool = make_set(toy), NetworkPool(3, window=2)
    options = {**JOB, "iterations": 6, "checkpoint": folder / "whole.pt"}
    history = runs.distill(whole, toy, Smooth, unroll=pool, **options)
    kept |= {"set": whole.state_dict(), "history": vars(history), "pool": pool.state_dict()}
    kept["evaluated"] = len(evaluated)

    at = 3 if rank == 1 else 0  # Ctrl-C reaches one of them
    half, options = make_set(toy), {**JOB, "iterations": 6, "checkpoint": folder / "half.pt"}
    pool = NetworkPool(3, window=2)

    class Interrupting(NetworkPool):
        __repr__ = NetworkPool.__repr__

        def __call__(self, network, distilled):
            if self.calls + 1 == at:
                press_ctrl_c()
            return super().__call__(network, distilled)

    Interrupting.__qualname__ = "NetworkPool"
    try:
        runs.distill(half, toy, Smooth, unroll=Interrupting(3, window=2), **options)
    except runs.Interrupted as error:
        kept["interrupted"] = str(error)
    torch.distributed.barrier()
    (folder / "of_two.pt").write_bytes((folder / "half.pt").read_bytes())
    pool, resumed = NetworkPool(3, window=2), make_set(toy)
    runs.distill(resumed, toy, Smooth, unroll=pool, **options)
    kept |= {"resumed": resumed.state_dict(), "resumed pool": pool.state_dict()}

    try:
        runs.distill(make_set(toy), toy, Smooth, unroll=pool, **{**options, "seed": 4})
    except ValueError as error:
        kept["refused"] = str(error)
    try:  # only the first process finds it
        options = {**JOB, "iterations": 2, "checkpoint": folder if rank == 0 else None}
        runs.distill(make_set(toy), toy, Smooth, **options)
    except ValueError as error:
        kept["folder"] = str(error)
    torch.distributed.barrier()
    torch.save(kept, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    torch.multiprocessing.spawn(in_a_job, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def kept(job) -> list[dict]:
    return [torch.load(job / f"{rank}.pt") for rank in (0, 1)]


def equal(first: object, second: object) -> bool:
    """Whether two states have equal values."""
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, dict):
        same = first.keys() == second.keys()
        return same and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_two_processes_take_the_mean_of_their_gradients(kept):
    gradients = []
    for rank in (0, 1):
        toy, options = make_toy(), {"iterations": 1, "batch_size": 16, "seed": 3 + (rank << 64)}
        run = du.Distillation(make_set(toy), toy, Smooth, **options)
        run.compute_gradient()
        gradients.append([run.distilled.images.grad, run.distilled.raw_step_sizes.grad])
    assert not torch.allclose(gradients[0][0], gradients[1][0])
    for each in kept:
        for found, *both in zip(each["gradients"], *gradients, strict=True):
            torch.testing.assert_close(found, (both[0] + both[1]) / 2)


def test_two_processes_have_one_set_and_pools_of_their_own(kept):
    first, second = kept
    assert equal(first["set"], second["set"])
    assert equal(first["history"], second["history"])
    assert first["history"]["iterations"] == [0, 2, 4, 6]
    assert (first["evaluated"], second["evaluated"]) == (4, 0), "the first alone validates"
    assert not equal(first["pool"], second["pool"])


def test_an_interrupted_job_resumes_bit_identically_each_process_with_its_pool(kept):
    for each in kept:
        assert each["interrupted"] == "after 3 of 6 iterations"
        assert equal(each["resumed"], each["set"])
        assert equal(each["resumed pool"], each["pool"])


def test_all_processes_refuse_what_the_first_refuses(kept):
    for each in kept:
        assert "belongs to another run (seed: 3 there, 4 here)" in each["refused"]
        assert "is a folder" in each["folder"]


def test_one_process_goes_on_from_a_checkpoint_of_two(job, kept, tmp_path):
    path, distilled, pool = tmp_path / "run.pt", make_set(make_toy()), NetworkPool(3, window=2)
    path.write_bytes((job / "of_two.pt").read_bytes())
    options = {**JOB, "iterations": 6, "checkpoint": path, "unroll": pool}
    history = runs.distill(distilled, make_toy(), Smooth, **options)
    assert len(history.loss) == 6
    assert history.loss[:3] == kept[0]["history"]["loss"][:3]
    assert history.iterations == [0, 2, 4, 6]
    assert pool.calls == 6


def test_a_process_without_a_saved_pool_starts_an_empty_one(job, monkeypatch):
    """A third process, here without the other two."""
    pool = NetworkPool(3, window=2)
    options = {**JOB, "iterations": 6, "unroll": pool, "checkpoint": job / "of_two.pt"}
    run = runs.Run(make_set(make_toy()), make_toy(), Smooth, **options)
    for rank, calls in ((2, 0), (1, 3)):
        run.rank = rank
        run.resume()
        assert run.iteration == 3
        assert pool.calls == calls
