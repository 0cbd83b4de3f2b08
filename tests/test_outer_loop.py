"""The outer loop: Algorithm 1, repeatable, interruptible, and better than what it starts from."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import distill_utils as du
from tests.conftest import Smooth, assert_same, make_set

SETTINGS = {"iterations": 12, "networks": 2, "batch_size": 16, "validate_every": 5, "seed": 3}


def initial(toy, **options) -> du.DistilledSet:
    return make_set(toy, "noise", **{"step_size": 0.2, **options})


def prepare(toy, distilled=None, **options) -> du.Distillation:
    options = {**SETTINGS, "progress": False, **options}
    return du.Distillation(distilled or initial(toy), toy, Smooth, **options)


def distill(toy, distilled=None, **options) -> tuple[du.DistilledSet, du.History]:
    run = prepare(toy, distilled, **options)
    return run.distilled, run.run()


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("options", [{"optimizer": "Adam"}, {"decoder": nn.Dropout(0.1)}], ids=str)
def test_a_seed_repeats_a_run_bit_by_bit(toy, options, networks):
    results = []
    for seed in (3, 3, 4):
        torch.rand(int(torch.randint(9, ())))  # whatever the caller drew before
        distilled = initial(toy, soft_labels=True, **options)
        results.append(distill(toy, distilled, networks=networks, seed=seed))
    (first, history), (second, again), (other, _) = results
    assert_same(first, second)
    assert_same(vars(history), vars(again))
    assert not torch.equal(first.images, other.images)


def test_random_decoders_are_tested_on_the_same_networks_as_others(toy):
    sets = initial(toy, step_size=1e-9), initial(toy, step_size=1e-9, decoder=nn.Dropout(0.1))
    values = [du.evaluate(each, toy.test, Smooth, networks=11).values for each in sets]
    assert torch.equal(*values)


def test_an_iteration_follows_algorithm_1(toy):
    distilled, seen = initial(toy, soft_labels=True), []

    def unroll(network, distilled):
        seen.append(network)
        return du.unroll(network, distilled)

    options = {"networks": 3, "batch_size": 60, "unroll": unroll, "seed": 0, "clip": math.inf}
    run = prepare(toy, distilled, **options)
    for iteration in range(2):
        loss = run.compute_gradient()
        with du.seeded(0, iteration):
            networks = [Smooth() for _ in range(3)]
            rows = torch.randint(60, (60,))
        real = du.Split(toy.train.images[rows], toy.train.labels[rows])
        expected = sum(du.outer_loss(network, distilled, real) for network in networks) / 3
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        (slopes,) = torch.autograd.grad(expected, distilled.images)
        torch.testing.assert_close(distilled.images.grad, slopes, rtol=1e-3, atol=1e-6)
        before = distilled.images.detach().clone()
        run.apply_gradient()
        run.history.loss.append(loss)
        if iteration == 0:  # where Adam's step has the sign of the gradient
            step = before - distilled.images.detach()
            torch.testing.assert_close(step, 0.03 * slopes.sign(), rtol=1e-2, atol=1e-4)
    assert [len(ensemble(toy.test.images)) for ensemble in seen] == [3, 3]


def test_the_learning_rates_fall_to_zero_and_a_rate_of_zero_keeps_the_step_sizes(toy):
    run = prepare(toy, iterations=6, step_size_learning_rate=0, learning_rate=0.1)
    for step in range(7):
        rate = 0.05 * (1 + math.cos(math.pi * step / 6))
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        if step < 6:
            run.step()
    assert torch.equal(run.distilled.step_sizes, initial(toy).step_sizes)


def test_the_history_has_the_losses_and_validations(toy):
    before = torch.get_rng_state()
    distilled, history = distill(toy)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert len(history.loss) == 12
    assert history.iterations == [0, 5, 10, 12]
    assert len(history.accuracy) == len(history.images) == 4
    assert torch.equal(history.images[0], initial(toy).images)
    assert torch.equal(history.images[-1], distilled.images)
    options = {"networks": 5, "seed": du.VALIDATION_SEED}
    accuracies = du.evaluate(distilled, toy.validation, Smooth, **options)
    assert history.accuracy[-1] == pytest.approx(accuracies.mean, abs=0.01)
    assert distill(toy, iterations=10)[1].iterations == [0, 5, 10]
    assert_same(distill(toy, validate_every=1)[0], distilled)


def test_the_progress_bar_shows_the_last_validation_as_plain_text(toy, capsys):
    _, history = distill(toy, progress=True)
    captured = capsys.readouterr()
    assert captured.err == "", "notebooks store standard output best"
    assert "12/12" in captured.out
    shown = re.findall(r"validation (\d+\.\d)%", captured.out)
    assert float(shown[-1]) in {round(value, 1) for value in history.accuracy}


def test_an_interrupted_run_says_how_far_it_came_and_goes_on(toy):
    made = []

    def unroll(network, distilled):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return du.unroll(network, distilled)

    whole, history = distill(toy)
    run = prepare(toy, unroll=unroll)
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 12 iterations, which the set"):
        run.run()
    assert int(run.distilled.iterations) == run.iteration == 2
    assert run.run() is run.history
    assert_same(
        [run.distilled.state_dict(), vars(run.history)], [whole.state_dict(), vars(history)]
    )


def test_arrays_and_numbers_of_any_type_are_taken(toy):
    images, labels = du.initialize(toy, "real", steps=np.int64(2))
    numbers = {name: np.int64(value) for name, value in SETTINGS.items()}
    expected, _ = distill(toy, du.DistilledSet(images, labels, epochs=2))
    for array, classes in ((images.double().numpy(), labels.numpy()), (images, labels.bool())):
        distilled, _ = distill(toy, du.DistilledSet(array, classes, epochs=np.int32(2)), **numbers)
        assert_same(distilled, expected)


def test_divergence_names_the_iteration_and_the_remedy_and_spares_the_set(toy):
    run = prepare(toy, initial(toy, step_size=1e30))
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 0; lower step_size="):
        run.run()
    assert_same(run.distilled, initial(toy, step_size=1e30))


@pytest.mark.parametrize(
    ("clip", "norms", "clipped", "running_norm"),
    [
        (2.0, [3, 1000], [3, 6], 0.9 * 3 + 0.1 * 6),
        (math.inf, [3, 1000, 0.001], [3, 1000, 0.001], 0.9 * (0.9 * 3 + 100) + 0.0001),
        (2.0, [0, 0, 5, 1], [0, 0, 5, 1], 0.9 * 5 + 0.1),  # no outlier, and no zero limit
    ],
)
def test_an_outlier_is_clipped_to_the_running_norm(toy, clip, norms, clipped, running_norm):
    run, results = prepare(toy, clip=clip), []
    images = run.distilled.images
    for norm in norms:
        for parameter in run.distilled.parameters():
            parameter.grad = torch.zeros_like(parameter)
        images.grad.view(-1)[0] = norm
        run.apply_gradient()
        results.append(float(images.grad.norm()))
    assert results == pytest.approx(clipped, rel=1e-4)
    assert run.running_norm == pytest.approx(running_norm, rel=1e-4)


def test_distilled_digits_beat_the_real_ones_that_they_start_from_by_20_points():
    """Ten images and three updates; the real ones get their best step size."""

    def make_mlp() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

    digits, sizes = du.load_digits(device="cpu"), (0.02, 0.05, 0.1, 0.2)
    distilled = du.DistilledSet(*du.initialize(digits, "real", steps=1), epochs=3, step_size=0.05)
    real = du.best_constant_step_size(distilled, digits, make_mlp, step_sizes=sizes)
    du.distill(distilled, digits, make_mlp, iterations=200, progress=False)
    sets = real, distilled
    before, after = (du.evaluate(x, digits.test, make_mlp, networks=20).mean for x in sets)
    assert after > before + 20
