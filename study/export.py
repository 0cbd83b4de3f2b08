"""`make export`: the distilled sets as a dataset repository for the Hugging Face hub, and as tensors for DD-Ranking.

    python -m study.export out/export

Each set becomes one Parquet file, which any framework reads without this project's code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import torch
import tyro
from torchvision.transforms.functional import to_pil_image

import distill_utils as du
from study.experiments.experiment import ROOT

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
    (steps, n), size, classes = labels.shape[:2], images.shape[2:], labels.shape[-1]
    images, labels = images.flatten(0, 1), labels.flatten(0, 1)
    pixels = (images * std + mean).clamp(0, 1)
    columns = {
        "image": (images.numpy(), datasets.Array3D(tuple(size), "float32")),
        "soft_label": (labels.tolist(), datasets.Sequence(datasets.Value("float32"))),
        "label": (labels.argmax(-1).tolist(), datasets.ClassLabel(classes)),
        "step": (torch.arange(steps).repeat_interleave(n).tolist(), datasets.Value("int32")),
        "position": (torch.arange(n).repeat(steps).tolist(), datasets.Value("int32")),
        "preview": ([to_pil_image(picture) for picture in pixels], datasets.Image()),
    }
    features = datasets.Features({name: kind for name, (_, kind) in columns.items()})
    values = {name: column for name, (column, _) in columns.items()}
    return datasets.Dataset.from_dict(values, features=features)


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Writes for each set of `distilled/` its file and card, a Parquet table, and `images.pt` [images, c, h, w],
    `labels.pt` [images, classes] and `lr.pt` [updates] in a folder of its name; and a README with the hub's header.

    Args:
        folder: where to write, made if it is missing.
    """
    paths = sorted((ROOT / "distilled").glob("*.safetensors"))
    for path in paths:
        distilled, tensors = du.load(path), folder / path.stem
        notes = distilled.metadata
        tensors.mkdir(parents=True, exist_ok=True)
        table = as_table(distilled, mean=float(notes["mean"]), std=float(notes["std"]))
        table.to_parquet(folder / f"{path.stem}.parquet")
        torch.save(distilled.decode().flatten(0, 1).detach(), tensors / "images.pt")
        torch.save(distilled.labels.flatten(0, 1).detach().clone(), tensors / "labels.pt")
        torch.save(distilled.step_sizes.detach(), tensors / "lr.pt")
        for file in (path, path.with_suffix(".md")):
            shutil.copy(file, folder)
    configs = "\n".join(CONFIG.format(name=path.stem) for path in paths)
    about = (ROOT / "distilled" / "README.md").read_text()
    (folder / "README.md").write_text(HEADER.format(configs=configs) + about)
    print(f"The dataset repository is in {folder}.")


if __name__ == "__main__":
    tyro.cli(main)
