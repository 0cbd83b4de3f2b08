"""Trains a fully connected network in PyTorch on an exported set, without this project's code: see README.md."""

import numpy as np
import pandas as pd
import torch
from torch import nn

torch.manual_seed(0)
table = pd.read_parquet("mnist-31kB.parquet", columns=["image", "soft_label"])
images = torch.tensor(np.stack([np.stack(image[0]) for image in table.image]))  # [n, 28, 28]
labels = torch.tensor(np.stack(table.soft_label))  # [n, 10]
with np.load("mnist.npz") as file:
    test_images, test_labels = (torch.tensor(file[name]) for name in ("x_test", "y_test"))
test_images = (test_images / 255 - 0.1307) / 0.3081

network = nn.Sequential(
    nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
)
adam = torch.optim.Adam(network.parameters(), lr=1e-3)
for _ in range(40):
    for rows in torch.randperm(len(images)).split(64):
        adam.zero_grad()
        nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        adam.step()
print(f"{100 * (network(test_images).argmax(1) == test_labels).float().mean():.1f}%")
