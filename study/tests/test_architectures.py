"""Networks of other architectures."""

import pytest
import torch

import distill_utils as du
from study.methods.architectures import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_an_architecture_learns_in_every_layer(name):
    digits = du.load_digits(device="cpu").train
    batch, network = du.Split(*(part[:20] for part in digits)), NETWORKS[name]()
    loss = du.cross_entropy(network(batch.images), batch.labels)
    loss.backward()
    assert all(weight.grad is not None for weight in network.parameters())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    du.train(network, batch, epochs=25, batch_size=20, optimizer=optimizer)
    scores = network(batch.images)
    assert scores.shape == (20, 10)
    assert du.cross_entropy(scores, batch.labels) < 0.8 * loss
