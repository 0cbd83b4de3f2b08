"""Trains torchvision's ShuffleNet, made for large color images, on a set of 31 kB, in about half a minute."""

import torch
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

import distill_utils as du

torch.manual_seed(0)
mnist = du.load_mnist("data", device="cpu")
distilled = du.load("mnist-31kB")
images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)

enlarge, color = nn.Upsample(scale_factor=2), nn.Conv2d(1, 3, 1)
network = nn.Sequential(enlarge, color, shufflenet_v2_x0_5(num_classes=10))
adam = torch.optim.Adam(network.parameters(), lr=2e-3)
du.train(network, du.Split(images, labels), epochs=2, optimizer=adam)
part = du.Split(*(tensor[:2000] for tensor in mnist.test))
print(f"{du.accuracy(network.eval(), part):.1f}% of 2,000 test images")
