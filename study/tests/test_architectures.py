"""Networks of other architectures."""

import pytest
import torch
from torch.nn import functional as F

import distill_utils as du
from study.methods.architectures import TESTED_ON


@pytest.fixture(scope="module")
def digits() -> du.Split:
    train = du.load_digits(device="cpu").train
    return du.Split(train.images[:20], train.labels[:20])


@pytest.mark.parametrize("name", TESTED_ON)
def test_each_architecture_learns_digits(name, digits):
    network = TESTED_ON[name]()
    assert network(digits.images).shape == (20, 10)
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.003), []
    for _ in range(25):
        loss = F.cross_entropy(network(digits.images), digits.labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in network.parameters())  # none is left out
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
