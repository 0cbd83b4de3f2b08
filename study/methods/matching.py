"""Two rivals that never unroll training: gradient matching (Zhao et al. 2021) and distribution matching (Zhao and Bilen
2023). They learn images alone; labels stay hard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du

# between synthetic and real images of one class, for a network and the class's label
Distance = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def gradient_distance(network: nn.Module, synthetic: Tensor, real: Tensor, label: Tensor) -> Tensor:
    """How far the weights' gradients on synthetic images [n, c, h, w] point away from those on real images, as a sum []
    of 1 - cosine over the rows of all weight matrices (DC); the images have one `label` [classes]."""
    weights = [weight for weight in network.parameters() if weight.dim() > 1]

    def gradients(images: Tensor, differentiable: bool) -> list[Tensor]:
        loss = F.cross_entropy(network(images), label.expand(len(images), -1))
        slopes = torch.autograd.grad(loss, weights, create_graph=differentiable)
        return [slope.flatten(1) for slope in slopes]

    pairs = zip(gradients(synthetic, True), gradients(real, False), strict=True)
    return sum((1 - F.cosine_similarity(*pair, eps=1e-6)).sum() for pair in pairs)


def feature_distance(network: nn.Module, synthetic: Tensor, real: Tensor, label: Tensor) -> Tensor:
    """The squared distance [] between the mean features of synthetic and of real images (DM). Features are
    the inputs of the last layer of an `nn.Sequential`; the label plays no part."""
    features = nn.Sequential(*list(network)[:-1])
    with torch.no_grad():
        target = features(real).mean(0)
    return (features(synthetic).mean(0) - target).square().sum()


def match(
    distilled: du.DistilledSet,
    dataset: du.Dataset,
    make_network: du.Factory,
    *,
    distance: Distance,
    iterations: int,
    learning_rate: float,
    batch_size: int = 64,
    matches: int = 1,
    updates: int = 0,
) -> None:
    """Improves the images of `distilled`, one step of all classes in turn as `du.initialize` arranges them.

    Args:
        distance: `gradient_distance` or `feature_distance`, summed over classes.
        iterations: fresh networks, each from a seed of its own.
        learning_rate: of the images, by SGD with momentum 0.5, as both papers have it.
        batch_size: real images of each class.
        matches: steps of the images for each network.
        updates: full-batch updates of the network on the synthetic images, by SGD with momentum 0.9, between two steps.
    """
    du.require_counts(iterations=iterations, batch_size=batch_size, matches=matches)
    steps = len(distilled.images)
    du.require(steps == 1, f"distilled: has {steps} steps; give a set of one step")
    (real, real_labels), (labels,), classes = dataset.train, distilled.labels, dataset.classes
    members = [(real_labels == label).nonzero().flatten() for label in range(classes)]
    optimizer = torch.optim.SGD([distilled.images], lr=learning_rate, momentum=0.5)
    for iteration in range(iterations):
        with du.seeded(0, iteration):
            network = make_network().to(real.device)
            for turn in range(matches):
                loss, images = 0.0, distilled.decode()[0]
                if turn > 0:
                    sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
                    batch, options = du.Split(images.detach(), labels), {"batch_size": len(images)}
                    du.train(network, batch, epochs=updates, optimizer=sgd, **options)
                for label, rows in enumerate(members):
                    chosen = real[rows[torch.randint(len(rows), (batch_size,))]]
                    loss += distance(network, images[label::classes], chosen, labels[label])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
