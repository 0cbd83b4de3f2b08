"""An experiment's surroundings at small size: few digits in place of MNIST and Fashion-MNIST."""

from dataclasses import replace
from pathlib import Path

import torch

import distill_utils as du
from study.records import Study


def small_study(
    name: str, part: str, folder: Path, *, fraction: float = 0.001, networks: int = 2
) -> Study:
    """Digits with few validation and test images, as every dataset of a study."""
    study = Study(
        name, part, folder, folder / "checkpoints", torch.device("cpu"), "", fraction, networks
    )
    few = {
        name: du.Split(*(column[:80] for column in getattr(study.digits, name)))
        for name in ("validation", "test")
    }
    study.mnist = study.fashion = study.digits = replace(study.digits, **few)
    return study
