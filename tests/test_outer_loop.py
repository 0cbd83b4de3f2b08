"""The outer loop: repeatable, resumable, interruptible, and better than what it starts from."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import wait_for_progress
from torch import nn

import distill_utils as du

SETTINGS = {"iterations": 12, "networks": 2, "batch_size": 16, "validate_every": 5, "progress": False, "seed": 3}


def start(toy, **options) -> du.DistilledSet:
    return du.DistilledSet(*du.noise_start(toy, steps=2), **{"epochs": 2, "step_size": 0.2, **options})


def assert_same(first: du.DistilledSet, second: du.DistilledSet) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_seeded_runs_are_bitwise_equal(toy, smooth):
    runs = [start(toy), start(toy)]
    histories = []
    for run in runs:
        torch.rand(torch.randint(9, ()))  # whatever the caller drew before
        histories.append(du.distill(run, toy, smooth, **SETTINGS))
    assert_same(*runs)
    assert histories[0].loss == histories[1].loss
    assert histories[0].accuracy == histories[1].accuracy


def test_another_seed_gives_another_result(toy, smooth):
    runs = [start(toy), start(toy)]
    du.distill(runs[0], toy, smooth, **SETTINGS)
    du.distill(runs[1], toy, smooth, **{**SETTINGS, "seed": 4})
    assert not torch.equal(runs[0].images, runs[1].images)


def test_the_callers_random_state_is_left_alone(toy, smooth):
    before = torch.get_rng_state()
    du.distill(start(toy), toy, smooth, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_history_has_one_entry_for_each_iteration_and_validation(toy, smooth):
    distilled = start(toy)
    history = du.distill(distilled, toy, smooth, **SETTINGS)
    assert len(history.loss) == 12
    assert history.iterations == [0, 5, 10, 12]
    assert len(history.accuracy) == len(history.images) == len(history.step_sizes) == 4
    assert torch.equal(history.images[0], start(toy).images)
    assert torch.equal(history.images[-1], distilled.images)
    assert torch.equal(history.step_sizes[-1], distilled.step_sizes)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the module catches it."""


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"learn_labels": True, "share_step_sizes": True, "momentum": 0.5}, {}),
        ({"momentum": 0.5}, {"pool": 3, "window": 2}),
    ],
)
@pytest.mark.parametrize("killed_at", [8, 18, 40])  # networks drawn: in an iteration, a validation, near the end
def test_a_killed_run_resumes_to_the_bit_identical_result(toy, smooth, tmp_path, killed_at, options, more):
    settings = {**SETTINGS, **more}
    whole = start(toy, **options)
    expected = du.distill(whole, toy, smooth, **settings)

    drawn = []

    def dying():
        drawn.append(1)
        if len(drawn) == killed_at:
            raise Killed
        return smooth()

    with pytest.raises(Killed):
        du.distill(start(toy, **options), toy, dying, checkpoint=tmp_path / "run.pt", **settings)
    resumed = start(toy, **options)
    history = du.distill(resumed, toy, smooth, checkpoint=tmp_path / "run.pt", **settings)
    assert_same(resumed, whole)
    assert history.loss == expected.loss
    assert history.iterations == expected.iterations
    assert history.accuracy == expected.accuracy


def distill_digits(checkpoint: Path) -> du.DistilledSet:
    """A short run on one thread, whatever process it is in: other thread counts may add numbers in another order."""
    torch.set_num_threads(1)
    digits = du.load_digits(device="cpu")
    distilled = du.DistilledSet(*du.noise_start(digits, steps=1))
    options = {"iterations": 40, "batch_size": 16, "validate_every": 5, "validation_networks": 1, "progress": False}
    du.distill(distilled, digits, du.LeNet, checkpoint=checkpoint, **options)
    return distilled


def test_a_process_killed_outright_resumes(tmp_path):
    """SIGKILL in the middle of a run, then the same call in this process."""
    folders = [str(Path(module).parent) for module in (__file__, du.__file__)]
    code = "import pathlib, sys, test_outer_loop as t; t.distill_digits(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run.pt")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )
    wait_for_progress(tmp_path / "run.pt", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(120) == -signal.SIGKILL

    threads = torch.get_num_threads()
    try:
        assert_same(distill_digits(tmp_path / "run.pt"), distill_digits(tmp_path / "whole.pt"))
    finally:
        torch.set_num_threads(threads)


def test_interrupt_returns_what_was_learned_and_a_second_call_goes_on(toy, smooth, tmp_path):
    whole = start(toy)
    expected = du.distill(whole, toy, smooth, **SETTINGS)
    made = []

    def interrupting():
        made.append(1)
        if len(made) == 13:
            signal.raise_signal(signal.SIGINT)  # what Ctrl-C, or Jupyter's stop button, sends
        return smooth()

    distilled = start(toy)
    history = du.distill(distilled, toy, interrupting, checkpoint=tmp_path / "run.pt", **SETTINGS)
    assert 0 < len(history.loss) < 12
    assert not torch.equal(distilled.images, start(toy).images)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    history = du.distill(distilled, toy, smooth, checkpoint=tmp_path / "run.pt", **SETTINGS)
    assert history.loss == expected.loss
    assert_same(distilled, whole)


def test_it_runs_outside_the_main_thread(toy, smooth):
    distilled = start(toy)
    thread = threading.Thread(target=du.distill, args=(distilled, toy, smooth), kwargs=SETTINGS)
    thread.start()
    thread.join()
    assert not torch.equal(distilled.images, start(toy).images)


def test_another_runs_checkpoint_is_refused(toy, smooth, tmp_path):
    path = tmp_path / "run.pt"
    du.distill(start(toy), toy, smooth, checkpoint=path, **SETTINGS)
    with pytest.raises(ValueError, match=r"another run's \(batch_size=16 there, 8 here\); name another file"):
        du.distill(start(toy), toy, smooth, checkpoint=path, **{**SETTINGS, "batch_size": 8})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no checkpoint of distill; delete it"):
        du.distill(start(toy), toy, smooth, checkpoint=path, **SETTINGS)


@pytest.mark.parametrize("name", ["iterations", "networks", "batch_size", "learning_rate", "window", "stack"])
def test_bad_settings_are_named_before_any_work(toy, name):
    def no_network():
        pytest.fail("work had begun")

    with pytest.raises(ValueError, match=f"{name}=0: give more than 0"):
        du.distill(start(toy), toy, no_network, **{**SETTINGS, name: 0})


def test_half_an_iteration_is_refused(toy, smooth):
    with pytest.raises(ValueError, match=r"iterations=2\.5: give a whole number"):
        du.distill(start(toy), toy, smooth, **{**SETTINGS, "iterations": 2.5})


@pytest.mark.parametrize("options", [{"segment": 2}, {"stack": 1}, {"stack": 2, "segment": 3}])
def test_segments_and_stacks_change_nothing_but_time_and_memory(toy, smooth, options):
    plain, other = start(toy), start(toy)
    expected = du.distill(plain, toy, smooth, **{**SETTINGS, "networks": 3})
    history = du.distill(other, toy, smooth, **{**SETTINGS, "networks": 3}, **options)
    assert history.loss == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(other.images, plain.images, rtol=1e-3, atol=1e-4)


def test_evaluation_is_the_same_in_any_stack(toy, smooth):
    values = [du.evaluate(start(toy), toy.test, smooth, networks=5, stack=stack).values for stack in (1, 2, 5, None)]
    assert len(set(values[0].tolist())) > 1
    assert all(torch.equal(value, values[0]) for value in values)


def test_a_window_moves_at_random_and_repeatably(toy, smooth):
    windows = {du.draw_window(4, 2, seed=(0, iteration)) for iteration in range(50)}
    assert windows == {(0, 2), (1, 3), (2, 4)}
    runs = [start(toy), start(toy), start(toy)]
    for run, window in zip(runs, (2, 2, None), strict=True):
        du.distill(run, toy, smooth, window=window, **SETTINGS)
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0].images, runs[2].images)
    with pytest.raises(ValueError, match="window=5: give at most the 4 updates"):
        du.distill(start(toy), toy, smooth, window=5, **SETTINGS)


def test_a_pool_holds_networks_of_every_age_and_goes_through_all_updates():
    pool = du.Pool(3, window=2, updates=8)
    spans, ages = [], []
    for iteration in range(24):
        span, kept = pool.turn(iteration)
        assert not kept if span[0] == 0 or iteration < 3 else kept == {0: [iteration - 3]}
        kept[0] = [iteration]
        spans.append(span)
        ages.append(span[0])
    assert spans[::3] == [(0, 2), (2, 4), (4, 6), (6, 8)] * 2
    assert ages[:3] == [0, 2, 4]


def test_a_pool_distils(toy, smooth):
    settings = {**SETTINGS, "iterations": 60, "validate_every": 60}
    options = {"epochs": 4, "step_size": 0.02, "momentum": 0.9, "share_step_sizes": True}
    distilled = start(toy, **options)
    history = du.distill(distilled, toy, smooth, pool=3, window=4, step_size_learning_rate=0, **settings)
    assert history.accuracy[-1] > history.accuracy[0]
    torch.testing.assert_close(distilled.step_sizes, torch.full((8,), 0.02))
    with pytest.raises(ValueError, match="pool=3 with window=3: give a window that divides the 8 updates"):
        du.distill(start(toy, **options), toy, smooth, pool=3, window=3, **settings)
    with pytest.raises(ValueError, match="pool=3 with window=None"):
        du.distill(start(toy, **options), toy, smooth, pool=3, **settings)


def test_divergence_names_the_iteration_and_the_remedy(toy, smooth):
    distilled = start(toy, step_size=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 0: .*Start from a lower step_size="):
        du.distill(distilled, toy, smooth, **SETTINGS)
    assert torch.equal(distilled.images, start(toy).images)


def test_a_fixed_initialization_is_always_the_same_one(toy, smooth):
    factory = du.fixed_initialization(smooth, seed=1)
    first, second = factory(), factory()
    assert first is not second
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with torch.no_grad():
        first[1].weight.zero_()
    assert all(map(torch.equal, factory().parameters(), second.parameters()))
    accuracies = du.evaluate(start(toy), toy.test, factory, networks=3)
    assert accuracies.std == 0


def test_gradient_clipping_holds_an_outlier_to_twice_the_running_norm(toy):
    history, distilled = du.History(), start(toy)

    def clipped(norm):
        for parameter in distilled.parameters():
            parameter.grad = torch.zeros_like(parameter)
        distilled.images.grad.view(-1)[0] = norm
        history.clip_gradient(distilled)
        return float(distilled.images.grad.norm())

    assert clipped(3.0) == pytest.approx(3.0, rel=1e-4)
    assert clipped(1000.0) == pytest.approx(6.0, rel=1e-4)
    assert history.running_norm == pytest.approx(0.9 * 3 + 0.1 * 6)


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def test_distilled_digits_beat_random_real_digits():
    """10 images and 3 updates: 20 points above the random real images they started from, at their best step size."""
    digits = du.load_digits(device="cpu")
    images, labels = du.real_start(digits, steps=1)

    def real(step_size: float) -> du.DistilledSet:
        return du.DistilledSet(images, labels, epochs=3, step_size=step_size)

    def validate(step_size: float) -> float:
        return du.evaluate(real(step_size), digits.validation, MLP, networks=5).mean

    best = max((0.02, 0.05, 0.1, 0.2), key=validate)
    distilled = real(0.05)
    du.distill(distilled, digits, MLP, iterations=200, progress=False)
    baseline, result = (du.evaluate(each, digits.test, MLP, networks=20) for each in (real(best), distilled))
    assert result.mean > baseline.mean + 20, (str(result), str(baseline))
