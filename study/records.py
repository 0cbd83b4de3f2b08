"""What an experiment is given, and the tables that keep what it measured.

A folder of results has a line of accuracies.csv for the accuracy of each network, a line of runs.csv for each
experiment, and a line of sets.csv for each distilled set that a row of accuracies stands on.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import safetensors
import torch
from filelock import FileLock  # comes with torch

import distill_utils as du
from study import runs

RESULTS = Path(__file__).with_name("results")
TABLES = {  # runs last, as its line says that the others are there
    "accuracies": ["experiment", "row", "set", "network", "value"],
    "sets": ["experiment", "row", "set", "file"],
    "runs": [
        "experiment",
        "seconds",
        "distillation_seconds",
        "fraction",
        "networks",
        "machine",
        "versions",
    ],
}


class Results:
    """The tables of a folder such as `RESULTS / "paper"`, as they are when the object is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.accuracies, self.sets, self.runs = map(self._read, TABLES)

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / f"{name}.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=TABLES[name])

    def find(self, experiment: str) -> pd.DataFrame:
        """The accuracies of an experiment, or of all its seeds where the name is given without."""
        return self.accuracies[
            self.accuracies.experiment.str.fullmatch(f"{experiment}(-seed[0-9])?")
        ]

    def without_seeds(self) -> Results:
        """The results of one run of each experiment."""
        one = copy.copy(self)
        one.accuracies = self.accuracies[~self.accuracies.experiment.str.contains("-seed[0-9]$")]
        return one

    def values(self, experiment: str, row: str) -> list[list[float]]:
        """Accuracies of the networks of each set, in rows that begin with `row`; experiments as for `find`."""
        found = self.find(experiment)
        found = found[found.row.str.startswith(row)]
        remedy = f"run python -m study {self.folder.name}"
        du.require(len(found) > 0, f"results={self.folder}: no '{row}' of '{experiment}'; {remedy}")
        return [
            list(group)
            for _, group in found.groupby(["experiment", "row", "set"], sort=False).value
        ]

    def pooled(self, experiment: str, row: str) -> du.Accuracies:
        """The accuracies of all networks of all sets."""
        return du.Accuracies(torch.tensor([*itertools.chain(*self.values(experiment, row))]))

    def run(self, experiment: str) -> pd.Series:
        """How an experiment ran: its line of runs.csv."""
        return self.runs.set_index("experiment").loc[experiment]

    def load_set(
        self, experiment: str, row: str, *, number: int = 0, device: torch.device | str = "cpu"
    ):
        """The distilled set behind a row; the best ones of the stored study are in `distilled/`."""
        lines = self.sets[
            (self.sets.experiment == experiment)
            & (self.sets.row == row)
            & (self.sets.set == number)
        ]
        remedy = f"run python -m study {self.folder.name} --only {experiment}"
        du.require(
            len(lines) > 0,
            f"results={self.folder}: no set behind '{row}' of '{experiment}'; {remedy}",
        )
        path = self.folder / lines.file.iloc[0]
        return du.load(path if path.exists() else path.stem, device=device)


def read_metadata(path: Path) -> dict:
    """What a distilled set's file says beside its tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["distilled_set"])


def add_lines(folder: Path, lock: Path, experiment: str, lines: dict[str, list[dict]]) -> None:
    """Adds an experiment's lines to the tables of a folder, in place of earlier ones; processes take turns."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        stored = Results(folder)
        for name, columns in TABLES.items():
            table, new = getattr(stored, name), pd.DataFrame(lines[name], columns=columns)
            parts = [part for part in (table[table.experiment != experiment], new) if len(part) > 0]
            if parts:
                with runs.write_safely(folder / f"{name}.csv") as path:
                    pd.concat(parts).sort_values("experiment", kind="stable").to_csv(
                        path, index=False
                    )


@dataclass
class Study:
    """An experiment's surroundings: what it is given, and where it leaves its lines."""

    name: str  # the experiment's
    part: str  # of the study: paper, ablation or best
    results: Path  # holds a folder for each part
    checkpoints: Path
    device: torch.device
    data_root: str
    fraction: float = 1.0  # of the iterations and pretrained networks
    networks: int = 200  # fresh networks behind an accuracy
    lines: dict[str, list[dict]] = field(
        default_factory=lambda: {name: [] for name in TABLES}, init=False
    )
    # where an experiment is timed
    distillation_seconds: float = field(default=math.nan, init=False)

    @property
    def folder(self) -> Path:
        return self.results / self.part

    @cached_property
    def mnist(self) -> du.Dataset:
        return du.load_mnist(self.data_root, device=self.device)

    @cached_property
    def fashion(self) -> du.Dataset:
        return du.load_mnist(self.data_root, name="FashionMNIST", device=self.device)

    @cached_property
    def digits(self) -> du.Dataset:
        return du.load_digits(device=self.device)

    def add(self, row: str, *sets: torch.Tensor | list, files: list[str] | None = None) -> None:
        """Keeps a row: the accuracies of the networks of each set, and the sets' files."""
        for number, values in enumerate(sets):
            line = {"experiment": self.name, "row": row, "set": number}
            values = enumerate(round(float(value), 2) for value in values)
            self.lines["accuracies"] += [
                {**line, "network": network, "value": value} for network, value in values
            ]
            if files:
                self.lines["sets"].append({**line, "file": files[number]})

    def distill(
        self, distilled: du.DistilledSet, dataset: du.Dataset, make_network: du.Factory, *, iterations: int,
        label: str = "", seed: int = 0, **options,
    ) -> str:  # fmt: skip
        """Runs Algorithm 1, continuing where an interrupted run stopped; saves the set and returns its file's name.

        `label` tells the sets of one experiment apart; `options` are those of `du.Distillation`.
        """
        iterations = max(1, round(self.fraction * iterations))
        runs.distill(
            distilled, dataset, make_network, iterations=iterations, seed=seed, validation_networks=1, progress=False,
            checkpoint=self.checkpoints / self.name / f"{label or 'set'}.pt", validate_every=max(100, iterations // 4),
            **options,
        )  # fmt: skip
        return self.save(distilled, dataset, label=label, seed=seed)

    def save(
        self, distilled: du.DistilledSet, dataset: du.Dataset, *, label: str = "", seed: int = 0
    ) -> str:
        """Saves a set in the folder and returns its file's name."""
        file = f"{self.name}{label and '-'}{label}.safetensors"
        command = f"python -m study {self.part} --only {self.name}"
        notes = {
            "network": "LeNet",
            "seed": seed,
            "command": command,
            "versions": runs.versions(),
        }
        du.save(distilled, self.folder / file, dataset=dataset, **notes)
        return file

    def run(self, experiment: Callable[[Study], None]) -> None:
        """Runs the experiment and adds its lines to the tables; the time of interrupted runs counts."""
        clock, begin = self.checkpoints / self.name / "seconds", time.perf_counter()
        earlier = float(clock.read_text()) if clock.exists() else 0.0
        try:
            experiment(self)
        except BaseException:
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text(str(earlier + time.perf_counter() - begin))
            raise
        self.write(earlier + time.perf_counter() - begin)
        shutil.rmtree(clock.parent, ignore_errors=True)

    def write(self, seconds: float) -> None:
        """Adds the experiment's lines, and how it ran, to the tables."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        self.lines["runs"] = [{
            "experiment": self.name, "seconds": round(seconds), "distillation_seconds": self.distillation_seconds,
            "fraction": self.fraction, "networks": self.networks,
            "machine": gpu or f"{self.device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        }]  # fmt: skip
        add_lines(self.folder, self.checkpoints / f"{self.part}.lock", self.name, self.lines)
