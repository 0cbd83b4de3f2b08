"""What an experiment is given, and the table that keeps what it measures.

A folder of results has measurements.csv, with one line for each measured value, runs.csv, with one line for each
experiment and seed, and the distilled sets in sets/.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch

import distill_utils as du
from study import runs

ROOT = Path(du.__file__).parent
RESULTS = ROOT / "study" / "results"
KEY = ["experiment", "seed"]
WHAT = ["set", "network", "images", "labels", "step_sizes", "training", "metric"]
COLUMNS = {
    "measurements": [*KEY, *WHAT, "value"],
    "runs": [*KEY, "seconds", "quick", "machine", "versions", "commit"],
}
Rows = dict[str, list[dict]]  # lines of each table


@dataclass(frozen=True)
class Recipe:
    """An experiment to run: what it does, and from which seeds."""

    measure: Callable[[Experiment], None]
    seeds: Sequence[int] = (0,)


@dataclass
class Experiment:
    """One run of an experiment: its surroundings, and what it has measured so far.

    Args:
        name: of the experiment.
        seed: of its distillation.
        folder: of the results.
        device: to compute on.
        data_root: the folder of MNIST.
        quick: try everything on few images, with few iterations and networks; the figures mean nothing.
    """

    name: str
    seed: int
    folder: Path
    device: torch.device
    data_root: str
    quick: bool = False
    rows: list[dict] = field(default_factory=list, init=False)

    @property
    def dataset(self) -> du.Dataset:
        """Fashion-MNIST where the experiment's name says so, else MNIST."""
        name = "FashionMNIST" if "fashion" in self.name else "MNIST"
        return load_dataset(name, self.data_root, self.device, self.quick)

    @property
    def checkpoints(self) -> Path:
        """What an interrupted run of the experiment continues from."""
        return self.folder / "checkpoints" / f"{self.name}-{self.seed}{'-quick' * self.quick}"

    def reduced(self, count: int) -> int:
        """So many iterations, networks or epochs; in a quick run far fewer."""
        return max(1, count // 400) if self.quick else count

    def some(self, items: Iterable) -> list:
        """All items; in a quick run the first two."""
        return list(items)[: 2 if self.quick else None]

    def measure(self, values: Iterable, *, metric: str = "accuracy", **columns: str) -> None:
        """Keeps what networks reach, a value in percent for each; `columns` are those of the table."""
        row = dict.fromkeys(WHAT, "") | {"experiment": self.name, "seed": self.seed}
        row |= {"network": "LeNet", "metric": metric, **columns}
        self.rows += [{**row, "value": round(float(value), 2)} for value in values]

    def distill(self, distilled: du.DistilledSet, *, label: str = "", **options) -> str:
        """Runs Algorithm 1, from where an interrupted run stopped; saves the set and returns its name.

        `label` tells the sets of one experiment apart; `options` are those of `du.Distillation`, by default with the
        experiment's dataset and seed, for LeNets.
        """
        options = {"seed": self.seed} | self.complete(options)
        options["validate_every"] = max(100, options["iterations"] // 4)  # and writes a checkpoint
        options["checkpoint"] = self.checkpoints / f"{label or 'set'}.pt"
        runs.distill(distilled, **options)
        return self.save(distilled, label=label, dataset=options["dataset"])

    def improve(self, distilled: du.DistilledSet, **options) -> None:
        """Runs Algorithm 1 alone, without a checkpoint."""
        du.distill(distilled, **self.complete(options))

    def complete(self, options: dict) -> dict:
        """Options of `du.Distillation` with those that an experiment leaves out."""
        usual = {"dataset": self.dataset, "make_network": du.LeNet}
        usual |= {"validation_networks": 1, "validate_every": 10**6, "progress": False}
        return usual | options | {"iterations": self.reduced(options["iterations"])}

    def save(
        self,
        distilled: du.DistilledSet,
        *,
        label: str = "",
        dataset: du.Dataset | None = None,
        **notes: object,
    ) -> str:
        """Saves a set, with notes, and returns its name."""
        name = "-".join(filter(None, [self.name, label, f"seed{self.seed}" * (self.seed > 0)]))
        notes |= {"network": "LeNet", "seed": self.seed, "versions": runs.versions()}
        notes["command"] = f"python -m study --only {self.name}"
        path = self.folder / "sets" / f"{name}.safetensors"
        du.save(distilled, path, dataset=dataset or self.dataset, **notes)
        return name

    def load(self, name: str) -> du.DistilledSet:
        """A set that an experiment has saved, or else one of `distilled/`."""
        return du.load(find_set(name, self.folder), device=self.device)

    def run(self, recipe: Recipe) -> Rows:
        """Runs the experiment and returns its lines of each table; the time of interrupted runs counts."""
        clock, begin = self.checkpoints / "seconds", time.process_time()
        before = float(clock.read_text()) if clock.exists() else 0.0
        try:
            recipe.measure(self)
        finally:
            seconds = before + time.process_time() - begin
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text(str(seconds))
        on_gpu, processor = self.device.type == "cuda", platform.processor() or platform.machine()
        machine = torch.cuda.get_device_name() if on_gpu else processor
        versions = f"Python {platform.python_version()}, {runs.versions()}"
        run = (self.name, self.seed, round(seconds), self.quick, machine, versions, commit())
        return {"measurements": self.rows, "runs": [dict(zip(COLUMNS["runs"], run, strict=True))]}


@cache
def load_dataset(name: str, root: str, device: torch.device, quick: bool) -> du.Dataset:
    """A dataset, once in a process; for a quick run, a part of it."""
    dataset = du.load_mnist(root, name=name, device=device)
    if not quick:
        return dataset
    sizes = {"train": 30_000, "validation": 200, "test": 200}
    parts = {name: [part[:size] for part in getattr(dataset, name)] for name, size in sizes.items()}
    return replace(dataset, **{name: du.Split(*part) for name, part in parts.items()})


def find_set(name: str, folder: Path = RESULTS) -> Path:
    """The file of a set: in a folder of results, in the stored results, or else in `distilled/`."""
    paths = [place / "sets" / f"{name}.safetensors" for place in (folder, RESULTS)]
    return next(filter(Path.exists, paths), ROOT / "distilled" / paths[0].name)


def commit() -> str:
    """The commit of the code, with a + if files differ from it; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """measurements.csv or runs.csv of a folder; an empty table where there is none."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS[name])
    texts = {column: str for column in COLUMNS[name] if column in WHAT}
    return pd.read_csv(path, dtype=texts, keep_default_na=not texts)


def add_rows(folder: Path, rows: Rows) -> None:
    """Adds an experiment's lines to the tables of a folder, runs.csv last: its line says that the others are there."""
    (run,) = rows["runs"]
    for name, columns in COLUMNS.items():
        table = read_table(folder, name)
        others = table[(table.experiment != run["experiment"]) | (table.seed != run["seed"])]
        tables = [others, pd.DataFrame(rows[name], columns=columns)]
        table = pd.concat([table for table in tables if len(table)])
        with du.replacing(folder / f"{name}.csv") as path:
            table.sort_values(KEY, kind="stable").to_csv(path, index=False)
