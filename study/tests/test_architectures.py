"""Networks of other architectures."""

import pytest
import torch

import distill_utils as du
from study.methods.architectures import TESTED_ON, ConvNet


@pytest.mark.parametrize("name", TESTED_ON)
def test_an_architecture_learns_in_every_layer(name):
    digits = du.load_digits(device="cpu").train
    batch, network = du.Split(*(part[:20] for part in digits)), TESTED_ON[name]()
    loss = du.cross_entropy(network(batch.images), batch.labels)
    loss.backward()
    assert all(weight.grad is not None for weight in network.parameters())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    du.train(network, batch, epochs=25, batch_size=20, optimizer=optimizer)
    scores = network(batch.images)
    assert scores.shape == (20, 10)
    assert du.cross_entropy(scores, batch.labels) < 0.8 * loss


def test_convnet_takes_images_of_other_sizes():
    network = ConvNet(width=8, norm="batch", channels=3, size=32)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
