"""`make export`: the distilled sets as a dataset repository for the Hugging Face hub, and as tensors for DD-Ranking.

    python -m study.export out/export

Each set becomes one Parquet file, which any framework reads without this project's code.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import tyro
from PIL import Image
from torch import Tensor

import distill_utils as du
from study.records import read_metadata

DISTILLED = Path(du.__file__).with_name("distilled")
HEADER = """---
license: mit
task_categories: [image-classification]
tags: [dataset-distillation, mnist, fashion-mnist]
size_categories: ["n<1K", "1K<n<10K", "10K<n<100K"]
configs:
{configs}
---

"""
CONFIG = "- config_name: {name}\n  data_files: [{{split: train, path: {name}.parquet}}]"


def as_table(distilled: du.DistilledSet, *, mean: float, std: float) -> datasets.Dataset:
    """One row per image, in the order of the schedule.

    Columns: `image` float32 [c, h, w], normalized, as networks see it; `soft_label` [classes], probabilities; `label`,
    the most probable class; `step` and `position` in it; `preview`, a PNG of 8 bits, to look at and not to train on.
    """
    images, labels = distilled.decode().detach().cpu(), distilled.labels.detach().cpu()
    steps, n, *size = images.shape
    columns = {
        "image": images.flatten(0, 1).numpy(),
        "soft_label": labels.flatten(0, 1).tolist(),
        "label": labels.argmax(-1).flatten().tolist(),
        "step": torch.arange(steps).repeat_interleave(n).tolist(),
        "position": torch.arange(n).repeat(steps).tolist(),
        "preview": [
            {"bytes": as_png(image * std + mean), "path": None} for image in images.flatten(0, 1)
        ],
    }
    number = datasets.Value("float32")
    features = {
        "image": datasets.Array3D(tuple(size), "float32"),
        "soft_label": datasets.Sequence(number),
        "label": datasets.ClassLabel(labels.shape[-1]),
        "step": datasets.Value("int32"),
        "position": datasets.Value("int32"),
        "preview": datasets.Image(),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def as_png(pixels: Tensor) -> bytes:
    """Pixels [c, h, w], clipped to 0..1, as a gray or RGB image."""
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def export(folder: Path, names: Sequence[str]) -> None:
    """Writes for each set of `distilled/` its file and card, a Parquet table, and `images.pt` [images, c, h, w],
    `labels.pt` [images, classes] and `lr.pt` [updates] in a folder of its name; and a README with the hub's header."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        distilled, path = du.load(name), DISTILLED / f"{name}.safetensors"
        mean, std = (float(read_metadata(path)[key]) for key in ("mean", "std"))
        as_table(distilled, mean=mean, std=std).to_parquet(folder / f"{name}.parquet")
        (folder / name).mkdir(exist_ok=True)
        tensors = {
            "images": distilled.decode().flatten(0, 1),
            "labels": distilled.labels.flatten(0, 1),
        }
        for kind, tensor in {**tensors, "lr": distilled.step_sizes}.items():
            torch.save(tensor.detach().clone(), folder / name / f"{kind}.pt")
        for each in (path, path.with_suffix(".md")):
            shutil.copy(each, folder)
    configs = "\n".join(CONFIG.format(name=name) for name in names)
    (folder / "README.md").write_text(
        HEADER.format(configs=configs) + (DISTILLED / "README.md").read_text()
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Exports all distilled sets.

    Args:
        folder: where to write, made if it is missing.
    """
    export(folder, sorted(path.stem for path in DISTILLED.glob("*.safetensors")))
    print(f"The dataset repository is in {folder}.")


if __name__ == "__main__":
    tyro.cli(main)
