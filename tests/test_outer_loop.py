"""The outer loop: Algorithm 1, repeatable, interruptible, and better than what it starts from."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import distill_utils as du

SETTINGS = {
    "iterations": 12,
    "networks": 2,
    "batch_size": 16,
    "validate_every": 5,
    "progress": False,
    "seed": 3,
}


def initial(toy, **options) -> du.DistilledSet:
    return du.DistilledSet(
        *du.initialize(toy, "noise", steps=2), **{"epochs": 2, "step_size": 0.2, **options}
    )


def assert_same(first: du.DistilledSet, second: du.DistilledSet) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("options", [{}, {"optimizer": "Adam", "soft_labels": True}])
@pytest.mark.parametrize("networks", [1, 2])
def test_two_seeded_runs_are_bitwise_equal(toy, smooth, options, networks):
    runs, histories = [initial(toy, **options), initial(toy, **options)], []
    for run in runs:
        torch.rand(int(torch.randint(9, ())))  # whatever the caller drew before
        histories.append(du.distill(run, toy, smooth, **{**SETTINGS, "networks": networks}))
    assert_same(*runs)
    assert histories[0].loss == histories[1].loss
    assert histories[0].accuracy == histories[1].accuracy


class Noisy(nn.Module):
    """A decoder that draws random numbers."""

    def forward(self, images):
        return images + 0.1 * torch.randn_like(images)


def test_a_random_decoder_repeats_with_the_seed(toy, smooth):
    runs = [initial(toy, decoder=Noisy()), initial(toy, decoder=Noisy())]
    for run in runs:
        torch.rand(int(torch.randint(9, ())))
        du.distill(run, toy, smooth, **SETTINGS)
    assert_same(*runs)
    plain = du.DistilledSet(runs[0].images, runs[0].labels, epochs=2, step_size=1e-9)
    noisy = du.DistilledSet(
        runs[0].images, runs[0].labels, epochs=2, step_size=1e-9, decoder=Noisy()
    )
    found = [du.evaluate(each, toy.test, smooth, networks=11).values for each in (plain, noisy)]
    assert torch.equal(*found), "both are tested on the same networks"


def test_another_seed_gives_another_result(toy, smooth):
    runs = [initial(toy), initial(toy)]
    du.distill(runs[0], toy, smooth, **SETTINGS)
    du.distill(runs[1], toy, smooth, **{**SETTINGS, "seed": 4})
    assert not torch.equal(runs[0].images, runs[1].images)


def test_the_callers_random_state_is_left_alone(toy, smooth):
    before = torch.get_rng_state()
    du.distill(initial(toy), toy, smooth, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_validations_change_nothing_but_the_history(toy, smooth):
    runs = [initial(toy), initial(toy)]
    for run, every in zip(runs, (1, 100), strict=True):
        du.distill(run, toy, smooth, **{**SETTINGS, "validate_every": every})
    assert_same(*runs)


def test_the_history_has_one_entry_for_each_iteration_and_validation(toy, smooth):
    distilled = initial(toy)
    history = du.distill(distilled, toy, smooth, **SETTINGS)
    assert len(history.loss) == 12
    assert history.iterations == [0, 5, 10, 12]
    assert len(history.accuracy) == len(history.images) == 4
    assert torch.equal(history.images[0], initial(toy).images)
    assert torch.equal(history.images[-1], distilled.images)
    found = du.evaluate(distilled, toy.validation, smooth, networks=5, seed=du.VALIDATION_SEED)
    assert history.accuracy[-1] == pytest.approx(found.mean, abs=0.01)
    assert history == history


def test_the_last_validation_is_made_once(toy, smooth):
    assert du.distill(initial(toy), toy, smooth, **{**SETTINGS, "iterations": 10}).iterations == [
        0,
        5,
        10,
    ]


def test_the_progress_bar_shows_the_last_validation(toy, smooth, capsys):
    history = du.distill(initial(toy), toy, smooth, **{**SETTINGS, "progress": True})
    captured = capsys.readouterr()
    assert captured.err == "", "plain text on standard output, as notebooks store it best"
    assert "12/12" in captured.out
    shown = re.findall(r"validation (\d+\.\d)%", captured.out)
    assert {float(accuracy) for accuracy in shown} <= {round(made, 1) for made in history.accuracy}
    assert shown


def test_a_run_can_be_taken_one_iteration_at_a_time(toy, smooth):
    """As `distill` takes it, but for the validations."""
    whole, distilled = initial(toy), initial(toy)
    history = du.distill(whole, toy, smooth, **SETTINGS)
    run = du.Distillation(distilled, toy, smooth, iterations=12, networks=2, batch_size=16, seed=3)
    while run.iteration < run.iterations:
        loss = run.compute_gradient()
        assert all(parameter.grad is not None for parameter in distilled.parameters())
        run.apply_gradient()
        run.history.loss.append(loss)
    assert_same(distilled, whole)
    assert run.history.loss == history.loss


def test_an_iteration_follows_algorithm_1(toy, smooth):
    """The gradient of the mean loss over the sampled networks, on one real batch, and one step of Adam."""
    distilled, seen = initial(toy, soft_labels=True), []

    def unroll(network, distilled):
        seen.append(network)
        return du.unroll(network, distilled)

    run = du.Distillation(
        distilled,
        toy,
        smooth,
        iterations=4,
        networks=3,
        batch_size=60,
        unroll=unroll,
        clip=math.inf,
    )
    loss = run.compute_gradient()
    (ensemble,) = seen
    assert isinstance(ensemble, du.Ensemble)
    gradient = distilled.images.grad.clone()
    before = distilled.images.detach().clone()
    with du.seeded(0, 0, 0):
        networks = [smooth() for _ in range(3)]
        rows = torch.randint(60, (60,))
    real = du.Split(toy.train.images[rows], toy.train.labels[rows])
    expected = sum(du.outer_loss(network, distilled, real) for network in networks) / 3
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, distilled.images)[0], rtol=1e-3, atol=1e-6
    )
    run.apply_gradient()
    step = before - distilled.images.detach()
    # Adam's first step
    torch.testing.assert_close(step, 0.03 * gradient.sign(), rtol=1e-2, atol=1e-4)


def test_the_learning_rates_fall_to_zero_and_a_rate_of_zero_keeps_the_step_sizes(toy, smooth):
    distilled = initial(toy)
    options = {"iterations": 6, "batch_size": 8, "step_size_learning_rate": 0, "learning_rate": 0.1}
    run, rates = du.Distillation(distilled, toy, smooth, **options), []
    while run.iteration < 6:
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(7)])
    assert torch.equal(distilled.step_sizes, initial(toy).step_sizes)
    assert not torch.equal(distilled.images, initial(toy).images)


def stop_at(call: int, error: type[BaseException]):
    """An inner loop whose call of that number raises an error."""
    made = []

    def unroll(network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        made.append(1)
        if len(made) == call:
            raise error("a reason")
        return du.unroll(network, distilled)

    return unroll


def test_a_stopped_run_says_how_far_it_came_and_goes_on(toy, smooth):
    whole, distilled = initial(toy), initial(toy)
    history = du.distill(whole, toy, smooth, **SETTINGS)
    run = du.Distillation(distilled, toy, smooth, unroll=stop_at(3, KeyboardInterrupt), **SETTINGS)
    with pytest.raises(
        KeyboardInterrupt, match="stopped after 2 of 12 iterations, which the set keeps"
    ):
        run.run()
    assert int(distilled.iterations) == len(run.history.loss) == 2
    assert not torch.equal(distilled.images, initial(toy).images)
    assert run.run() is run.history
    assert_same(distilled, whole)
    assert run.history.loss == history.loss
    assert run.history.accuracy == history.accuracy


def test_other_errors_come_as_they_are_and_the_set_keeps_what_it_learned(toy, smooth):
    distilled = initial(toy)
    with pytest.raises(RuntimeError, match="a reason"):
        du.distill(distilled, toy, smooth, unroll=stop_at(3, RuntimeError), **SETTINGS)
    assert int(distilled.iterations) == 2


def test_a_state_continues_in_another_run_to_the_same_result(toy, smooth, tmp_path):
    runs = [du.Distillation(initial(toy), toy, smooth, **SETTINGS) for _ in range(3)]
    runs[0].run()
    for _ in range(5):
        runs[1].step()
    runs[1].validate()
    torch.save(runs[1].state_dict(), tmp_path / "state.pt")
    runs[1].step()  # which the file does not follow
    runs[2].load_state_dict(torch.load(tmp_path / "state.pt"))
    runs[2].run()
    assert_same(runs[2].distilled, runs[0].distilled)
    assert runs[2].history.loss == runs[0].history.loss
    assert runs[2].history.accuracy == runs[0].history.accuracy[1:]
    assert int(runs[2].distilled.iterations) == 12


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1}, "learning_rate=-1: give at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: give"),
        ({"clip": 1}, "clip=1: give more than 1"),
        ({"clip": 0}, "clip=0: give"),
        ({"iterations": 0}, "iterations=0: give a whole number"),
        ({"networks": 1.5}, r"networks=1\.5: give a whole number"),
        ({"batch_size": 0}, "batch_size=0: give a whole number"),
        ({"validate_every": 0}, "validate_every=0: give a whole number"),
        ({"validation_networks": 0}, "validation_networks=0: give a whole number"),
    ],
)
def test_bad_settings_are_named_before_any_work(toy, options, message):
    def no_network():
        pytest.fail("work had begun")

    with pytest.raises(ValueError, match=message):
        du.distill(initial(toy), toy, no_network, **{**SETTINGS, **options})


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(("size", "classes"), [((3, 4, 4), 3), ((1, 5, 5), 3), ((1, 4, 4), 4)])
def test_a_set_for_other_data_is_named(toy, smooth, size, classes):
    distilled = du.DistilledSet(torch.rand(1, classes, *size), torch.eye(classes)[None])
    message = rf"distilled: \({classes}, {size[0]}, .* the dataset has \(3, 1, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        du.distill(distilled, toy, smooth, **SETTINGS)


@pytest.mark.fault("bad calls named")
def test_real_images_that_are_not_finite_give_no_accuracy(toy, smooth):
    split = du.Split(toy.test.images * math.nan, toy.test.labels)
    with pytest.raises(ValueError, match="split: some images are not finite"):
        du.evaluate(initial(toy), split, smooth, networks=2)


def test_arrays_and_numbers_of_another_type_are_images(toy, smooth):
    images, labels = du.initialize(toy, "real", steps=2)
    runs = [
        du.DistilledSet(images, labels),
        du.DistilledSet(images.double().numpy(), labels.numpy()),
    ]
    for run in runs:
        du.distill(run, toy, smooth, **SETTINGS)
    assert_same(*runs)


def test_numpy_numbers_are_settings(toy, smooth):
    runs = [initial(toy), initial(toy)]
    du.distill(runs[0], toy, smooth, **SETTINGS, learning_rate=0.5)
    numbers = {name: np.int64(value) for name, value in SETTINGS.items() if name != "progress"}
    du.distill(runs[1], toy, smooth, **numbers, progress=False, learning_rate=np.float64(0.5))
    assert_same(*runs)


@pytest.mark.fault("bad calls named")
def test_divergence_names_the_iteration_and_the_remedy_and_spares_the_set(toy, smooth):
    distilled = initial(toy, step_size=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 0; lower step_size="):
        du.distill(distilled, toy, smooth, **SETTINGS)
    assert_same(distilled, initial(toy, step_size=1e30))


def clipped_norms(toy, smooth, norms: list[float], clip: float) -> tuple[list[float], float]:
    """The norms that gradients of given norms are scaled to, and the running norm in the end."""
    distilled = initial(toy)
    run, found = du.Distillation(distilled, toy, smooth, iterations=10, clip=clip), []
    for norm in norms:
        for parameter in distilled.parameters():
            parameter.grad = torch.zeros_like(parameter)
        distilled.images.grad.view(-1)[0] = norm
        run.apply_gradient()
        found.append(float(distilled.images.grad.norm()))
    return found, run.running_norm


def test_clipping_holds_an_outlier_to_twice_the_running_norm(toy, smooth):
    found, running_norm = clipped_norms(toy, smooth, [3.0, 1000.0], 2.0)
    assert found == pytest.approx([3.0, 6.0], rel=1e-4)
    assert running_norm == pytest.approx(0.9 * 3 + 0.1 * 6)


def test_an_infinite_clip_changes_no_gradient(toy, smooth):
    assert clipped_norms(toy, smooth, [3.0, 1000.0, 0.001], math.inf)[0] == pytest.approx(
        [3.0, 1000.0, 0.001]
    )


def test_a_gradient_of_zero_is_no_outlier_and_makes_none(toy, smooth):
    assert clipped_norms(toy, smooth, [0.0, 0.0, 5.0, 1.0], 2.0)[0] == pytest.approx(
        [0, 0, 5, 1], rel=1e-4
    )


@pytest.mark.parametrize(("steps", "classes"), [(1, 3), (1, 1), (2, 1)])
def test_one_step_and_one_class_are_enough(steps, classes):
    pixels, labels = torch.rand(30, 1, 4, 4), torch.arange(30) % classes
    dataset = du.make_dataset("few", (pixels, labels), (pixels, labels), validation=5, device="cpu")
    distilled = du.DistilledSet(*du.initialize(dataset, "real", steps=steps), soft_labels=True)

    def make_network():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))

    history = du.distill(distilled, dataset, make_network, iterations=2, networks=2, progress=False)
    assert all(map(math.isfinite, history.loss))
    assert distilled.images.isfinite().all()


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def test_distilled_digits_beat_random_real_digits():
    """10 images and 3 updates: 20 points above the real images it starts from, at their best step size."""
    digits = du.load_digits(device="cpu")
    distilled = du.DistilledSet(*du.initialize(digits, "real", steps=1), epochs=3, step_size=0.05)
    real = du.best_constant_step_size(distilled, digits, MLP, step_sizes=(0.02, 0.05, 0.1, 0.2))
    du.distill(distilled, digits, MLP, iterations=200, progress=False)
    baseline, result = (
        du.evaluate(each, digits.test, MLP, networks=20) for each in (real, distilled)
    )
    assert result.mean > baseline.mean + 20, (str(result), str(baseline))
