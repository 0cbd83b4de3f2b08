"""What the benchmark compares with does the same thing: a third and a fourth opinion on the gradient."""

import sys
from pathlib import Path

import pytest
import torch

import distill_utils as du

sys.path.append(str(Path(du.__file__).parent / "benchmarks"))
import rivals


@pytest.mark.parametrize("rival", [rivals.higher_loop, rivals.functional_loop, rivals.step_products])
def test_rivals_have_the_same_gradient(toy, smooth, rival):
    torch.set_default_dtype(torch.float64)
    images, labels = du.noise_start(toy, steps=2)
    distilled = du.DistilledSet(images.double(), labels.double(), epochs=3, step_size=0.3)
    draws = [(smooth(), du.Split(toy.train.images.double(), toy.train.labels)) for _ in range(3)]
    gradients = []
    for method in (du.outer_gradient, rival):
        method(distilled, draws)
        gradients.append([distilled.images.grad, distilled.raw_step_sizes.grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-13)
