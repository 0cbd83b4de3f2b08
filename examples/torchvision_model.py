"""Trains torchvision's SqueezeNet, made for color images of ImageNet's size, on a set of 31 kB."""

import torch
from torch import nn
from torchvision.models import squeezenet1_1

import distill_utils as du

torch.manual_seed(0)
mnist = du.load_mnist("data", device="cpu")
distilled = du.load("mnist-31kB")
images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)

color = nn.Conv2d(1, 3, 1)
network = nn.Sequential(nn.Upsample(scale_factor=2), color, squeezenet1_1(num_classes=10))
adam = torch.optim.Adam(network.parameters(), lr=1e-3)
du.train(network, du.Split(images, labels), epochs=6, optimizer=adam)
part = du.Split(*(tensor[:2000] for tensor in mnist.test))
print(f"{du.accuracy(network.eval(), part):.1f}% of 2,000 test images")
