"""What is asked of arguments. Each check raises ValueError that names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_positive(**settings: float | str | None) -> None:
    """A number is above 0, and whole where it counts something; None and text pass."""
    for name, value in settings.items():
        if isinstance(value, (int, float)):
            require(value > 0, f"{name}={value}: give more than 0")
            require(isinstance(value, int) or name.endswith("rate"), f"{name}={value}: give a whole number")


def require_one_of(choices: Iterable[str], **settings: str) -> None:
    """Each setting is one of `choices`."""
    for name, value in settings.items():
        require(value in choices, f"{name}='{value}': give one of {', '.join(choices)}")


def check_pixels(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], validation: int) -> None:
    """Pairs of pixels [n, c, h, w] in 0..1 and labels [n] that number the classes from 0; how many to hold out."""
    for argument, (pixels, labels) in {"train": train, "test": test}.items():
        require(
            isinstance(pixels, Tensor) and isinstance(labels, Tensor),
            f"{argument}: a pair of {type(pixels).__name__} and {type(labels).__name__}; give tensors",
        )
        require(
            pixels.dim() == 4 and labels.dim() == 1 and len(pixels) == len(labels) > 0,
            f"{argument}: pixels {list(pixels.shape)}, labels {list(labels.shape)}; give [n, c, h, w] and [n], n > 0",
        )
        low, high = float(pixels.min()), float(pixels.max())
        require(0 <= low < high <= 1, f"{argument}: pixels lie in {low:g}..{high:g}; scale them to 0..1")
    pixels, labels = train
    classes = int(labels.max()) + 1
    require(
        labels.unique().tolist() == list(range(classes)),
        f"train: labels {labels.unique().tolist()[:12]}; number the classes 0, 1, 2, ..., and have each in train",
    )
    require(
        test[1].min() >= 0 and test[1].max() < classes,
        f"test: labels {int(test[1].min())} to {int(test[1].max())}; give those of train, 0 to {classes - 1}",
    )
    require(
        isinstance(validation, int) and 0 < validation < len(pixels),
        f"validation={validation}: hold out at least 1, fewer than the {len(pixels)} training images, a whole number",
    )
    require(
        test[0].shape[1:] == pixels.shape[1:],
        f"test: images {list(test[0].shape[1:])}; give the size of train's, {list(pixels.shape[1:])}",
    )


def check_factory(make_network: object) -> None:
    """A network factory, not a network."""
    kind = type(make_network).__name__
    require(
        not isinstance(make_network, nn.Module),
        f"make_network={kind}(...): give the factory, {kind}, or for a known initialization fixed_initialization(...)",
    )


def check_weights(network: nn.Module) -> None:
    """All weights can be trained."""
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    require(
        not frozen, f"make_network: {', '.join(frozen)} require no gradient; register what is not trained as buffers"
    )


def check_network(network: nn.Module, images: Tensor, classes: int) -> None:
    """The network turns images [1, c, h, w] into scores [1, classes], in training as in testing."""
    unlike = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    found = sorted({type(module).__name__ for module in network.modules() if isinstance(module, unlike)})
    require(
        not found,
        f"make_network: {', '.join(found)} in it works otherwise in training than in testing, and networks stay in "
        "training mode here; give one without (GroupNorm can stand for BatchNorm), or use retrain with stack=1",
    )
    wanted = f"images {list(images.shape)}; give a network that makes scores [1, {classes}] of them"
    try:
        shape = list(network(images).shape)
    except RuntimeError as error:
        raise ValueError(f"make_network: it fails ({error}) on {wanted}") from error
    require(shape == [1, classes], f"make_network: it makes {shape} of {wanted}")


def check_class_size(label: int, found: int, *, steps: int, per_class: int) -> None:
    """A class has the steps × per_class training images that a start asks for."""
    wanted = steps * per_class
    require(
        0 < wanted <= found,
        f"steps={steps} × per_class={per_class} asks for {wanted} images of class {label}, which has {found}",
    )


def check_tiles(size: Sequence[int], tiles: int) -> None:
    """Images of `size`, height and width, can be cut into tiles × tiles."""
    require(
        tiles >= 1 and all(length % tiles == 0 for length in size),
        f"tiles={tiles}: give a number that divides the images' height and width, {list(size)}",
    )


def check_images_and_labels(images: Tensor, labels: Tensor, *, tiles: int) -> None:
    """Images [steps, n, c, h, w], and probabilities [steps, n × tiles², classes]."""
    require(images.dim() == 5 and len(images) > 0, f"images: shape {list(images.shape)}; give [steps, n, c, h, w]")
    check_tiles(images.shape[-2:], tiles)
    wanted = [len(images), images.shape[1] * tiles**2]
    require(
        labels.dim() == 3 and list(labels.shape[:2]) == wanted,
        f"labels: shape {list(labels.shape)} with images {list(images.shape)} and tiles={tiles}; give "
        f"{wanted} and classes, for integer labels F.one_hot(labels, classes)"
        + (f"; tiled(images, labels, tiles={tiles}) makes them fit" if tiles > 1 else ""),
    )
    sums = labels.double().sum(-1)
    require(
        bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4),
        "labels: give probabilities, which are at least 0 and add up to 1 for each image",
    )


def check_training(*, epochs: int, label_smoothing: float, optimizer: str, momentum: float) -> None:
    """The inner loop of a distilled set."""
    require(epochs >= 1, f"epochs={epochs}: give at least 1")
    require(0 < label_smoothing <= 1, f"label_smoothing={label_smoothing}: give more than 0 and at most 1")
    require(0 <= momentum < 1, f"momentum={momentum}: give at least 0 and less than 1")
    require_one_of(("SGD", "Adam"), optimizer=optimizer)
    require(optimizer == "SGD" or momentum == 0, f"momentum={momentum}: is SGD's; Adam has moments of its own")


def check_step_sizes(step_size: float | Tensor, *, count: int) -> None:
    """One positive step size, or [count] of them."""
    sizes = torch.as_tensor(step_size)
    require(
        sizes.dim() == 0 or sizes.shape == (count,),
        f"step_size: shape {list(sizes.shape)}; give one number or [{count}]",
    )
    sound = bool((sizes > 0).all() & sizes.isfinite().all())
    require(sound, f"step_size={step_size}: give positive numbers")


def check_file(path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """What is read of a distilled set's file is whole and finite."""
    for kind, wanted, found in (
        ("tensors", {"images", "labels", "step_sizes"}, tensors),
        ("metadata", {"epochs", "inner_optimizer", "momentum"}, metadata),
    ):
        missing = ", ".join(sorted(wanted - set(found)))
        require(not missing, f"path='{path}': no {kind} named {missing}; write it with DistilledSet.save")
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), f"path='{path}': '{name}' holds values that are not finite")


def check_outer_loop(settings: Mapping[str, object], *, updates: int, segment: int | None, stack: int | None) -> None:
    """The settings of `distill`, for a distilled set of so many updates."""
    seed, window, pool = settings["seed"], settings["window"], settings["pool"]
    step_size_learning_rate = settings["step_size_learning_rate"]
    require(seed >= 0, f"seed={seed}: give at least 0")
    require(step_size_learning_rate >= 0, f"step_size_learning_rate={step_size_learning_rate}: give at least 0")
    require_positive(**{**settings, "segment": segment, "stack": stack, "seed": None, "step_size_learning_rate": None})
    require(
        window is None or window <= updates,
        f"window={window}: give at most the {updates} updates of the distilled set",
    )
    require(
        pool is None or (window is not None and updates % window == 0),
        f"pool={pool} with window={window}: give a window that divides the {updates} updates",
    )
