"""Distills ten images from a folder of your own: FOLDER/CLASS/picture.png, with a folder for each class.

python examples/image_folder.py FOLDER
"""

import sys

import torch
from torch import nn
from torch.utils.data import random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import distill_utils as du

to_pixels = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
folder = ImageFolder(sys.argv[1], transform=to_pixels)
torch.manual_seed(0)
train, test = random_split(folder, [0.8, 0.2])
mine = du.make_dataset("mine", train, test, validation=len(train) // 10, device="cpu")


def make_network():
    features = nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(256, mine.classes))


distilled = du.DistilledSet(*du.initialize(mine, "real", steps=2), epochs=5, step_size=0.05)
du.distill(distilled, mine, make_network, iterations=100, batch_size=128)
print(f"{du.evaluate(distilled, mine.test, make_network, networks=5)} of the test images")
du.save(distilled, "mine.safetensors", dataset=mine)
