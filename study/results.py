"""The one table of measurements, and what is made from it: tables, the sets' cards and the README's results.

python -m study.results     write the cards in distilled/, the READMEs' tables and the figure again

results = Results()
print(results.accuracies(experiment="random-real"))  # mean ± std over all networks of three sets
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import distill_utils as du
from study.experiments.experiment import (
    RESULTS,
    ROOT,
    find_set,
    read_table,
)
from study.experiments.protocols import FIXED, UNDISTILLED, scratch_epochs, training
from study.experiments.storage import COMPRESSED, DISTILLED, FORMATS, HELD_OUT, SIZES
from study.methods.compression import stored_bytes

SETS = (*DISTILLED, *COMPRESSED)
SHIPPED = [name for name in SETS if (ROOT / "distilled" / f"{name}.safetensors").exists()]
CONTENT = ["images", "labels", "step_sizes"]


class Results:
    """The table of a folder, as it is when the object is made."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = Path(folder)
        self.measurements = read_table(self.folder, "measurements")

    def rows(self, **columns: str | Iterable[str]) -> pd.DataFrame:
        """The lines whose columns have the given values, or one of several. Raises ValueError if there are none."""
        rows, given = self.measurements, {"metric": "accuracy", **columns}
        for name, value in given.items():
            rows = rows[rows[name].isin([value] if isinstance(value, str) else list(value))]
        remedy = "run python -m study, or see the columns of measurements.csv"
        du.require(len(rows) > 0, f"results={self.folder}: no rows with {given}; {remedy}")
        return rows

    def accuracies(self, **columns: str | Iterable[str]) -> du.Accuracies:
        """The accuracies of all networks of all sets, or what `metric` says."""
        return du.Accuracies(torch.tensor(self.rows(**columns).value.to_numpy()))

    def load_set(self, name: str, *, device: torch.device | str = "cpu") -> du.DistilledSet:
        """The set of that name, as in the table's column, where it was saved."""
        return du.load(find_set(name, self.folder), device=device)


def summarize(rows: pd.DataFrame, index: list[str], columns: str | None = None) -> pd.DataFrame:
    """Mean ± standard deviation over all networks, and n, for each combination of columns in the order of the rows;
    the values of `columns` go across the page."""
    groups = rows.groupby(index + [columns] * bool(columns), sort=False)
    cells = groups.apply(count, include_groups=False)
    if columns is None:
        return cells.rename("accuracy (%)").to_frame()
    names, across = cells.index.droplevel(columns).unique(), rows[columns].drop_duplicates()
    return cells.unstack(columns).reindex(index=names, columns=across).fillna("")


def count(rows: pd.DataFrame) -> str:
    """An accuracy and the networks behind it: n=100, or n=3×100 where there are three sets."""
    accuracies = du.Accuracies(torch.tensor(rows.value.to_numpy()))
    counts = rows.seed.value_counts()  # of networks
    alike = len(counts) > 1 and counts.nunique() == 1
    networks = f"{len(counts)}×{counts.iloc[0]}" if alike else f"{len(rows)}"
    return f"{str(accuracies).removesuffix('%')} (n={networks})"


# ------------------------------------------------------------------------------- a set and its controls
def main_rows(results: Results, name: str) -> pd.DataFrame:
    """What a set, or a set of one of the paper's experiments, reaches as it is meant to be used, over all seeds."""
    if name in COMPRESSED:
        columns = {"images": "compressed", "labels": "teacher", "network": "LeNet"}
    else:
        network = FIXED if name.startswith("fixed") else "LeNet"
        columns = {"images": "distilled", "step_sizes": "distilled", "network": network}
    return results.rows(experiment=name, **columns)


def control_rows(results: Results, name: str) -> pd.DataFrame:
    """What undistilled images reach with the same training, on the same network, in as many bytes where the name tells
    how many; for a compressed set, real images."""
    main = main_rows(results, name)
    columns = {column: main[column].unique() for column in ("network", "training")}
    real = [*FORMATS] if name in COMPRESSED else [*FORMATS, *UNDISTILLED, "compressed"]
    return results.rows(experiment=[name, *same_size(results, name)], images=real, **columns)


def same_size(results: Results, name: str) -> list[str]:
    """The experiments whose sets take as many bytes, where the name tells how many."""
    size, kilobytes, _ = name.partition("kB")
    names = results.measurements.experiment.unique()
    return [key for key in names if kilobytes and key.startswith(size + kilobytes)]


def lead(rows: pd.DataFrame, control: pd.DataFrame) -> tuple[float, float]:
    """By how many points the mean is above that of a control, and the standard error: over the seeds that both have,
    over kinds of network where that is a single one, and over networks of a single kind."""
    parts = [part[part.seed.isin({*rows.seed} & {*control.seed})] for part in (rows, control)]
    du.require(len(parts[0]) > 0, "control: it has no seed of the rows; measure it from the same")
    for unit in ("seed", "network"):
        ours, theirs = (part.groupby(unit).value.mean() for part in parts)
        points = ours - theirs
        if len(points) > 1:
            return points.mean(), points.std() / len(points) ** 0.5
    return points.mean(), sum(part.value.var() / len(part) for part in parts) ** 0.5


def strongest(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the experiment, images, labels and step sizes with the highest mean."""
    groups = [group for _, group in rows.groupby(["experiment", *CONTENT])]
    return max(groups, key=lambda group: group.value.mean())


def words(rows: pd.DataFrame) -> str:
    """What rows of one kind of images, labels and step sizes were trained on."""
    images, labels, step_sizes = rows[CONTENT].iloc[0]
    return f"{images} images; labels: {labels}; step sizes: {step_sizes}"


def headline(results: Results) -> pd.DataFrame:
    """The main accuracies beside published ones and the strongest control."""
    lines = pd.read_csv(RESULTS / "headline.csv", keep_default_na=False)
    names = lines.pop("experiment")
    pairs = [(main_rows(results, name), control_rows(results, name)) for name in names]
    controls = [strongest(rows) for _, rows in pairs]
    lines["best control"] = [f"{rows.images.iloc[0]}: {count(rows)}" for rows in controls]
    lines["this project"] = [count(rows) for rows, _ in pairs]
    return lines


def beside_reported(results: Results, *experiments: str) -> pd.DataFrame:
    """The paper's accuracies beside those here, of the experiments whose names begin so."""
    lines = pd.read_csv(RESULTS / "reported.csv", keep_default_na=False)
    lines = lines[lines.experiment.str.startswith(experiments)]
    keys = ["experiment", "network", "images"]
    wanted = [{key: line[key] for key in keys if line[key]} for _, line in lines.iterrows()]
    lines = lines.drop(columns=keys)
    lines.insert(2, "here", [count(results.rows(**columns)) for columns in wanted])
    return lines.set_index("title")


# ---------------------------------------------------------------------------------- accuracy per byte
ARMS = {  # title: the end of the experiments' names, the images and their labels, and how to draw them
    "real images": ("-real", "real", "true", "C7s-"),
    "real images, teacher's labels": ("-real", "real", "teacher", "C7s--"),
    "small real images, teacher's labels": ("-real", "small real", "teacher", "C8D--"),
    "compressed set": ("(-50updates)?", "compressed", "teacher", "C0o-"),
    "distilled set": ("-50updates", "distilled", "distilled", "C3o-"),
}
ACCURACIES = (30, 50, 70, 80, 90, 95, 97, 98, 99)  # marked on the axis


def mean_by_size(
    results: Results, experiments: str, networks: Sequence[str], images: str, labels: str
) -> pd.DataFrame:
    """Kilobytes, the mean accuracy and its standard deviation over seeds, of experiments whose names match a regular
    expression. Every kind of network counts as much. A set before distillation is as large as after it."""
    rows, points = results.measurements, []
    rows = rows[rows.experiment.str.fullmatch(experiments)]
    content = (rows.images == images) & rows.labels.isin([labels, ""])
    measured = rows[content & rows.network.isin(networks) & (rows.metric == "accuracy")]
    measured = measured[~measured.training.str.contains("updates")]  # by a learned schedule
    sizes = rows[rows.network.isin([*networks, ""]) & (rows.metric == "bytes")]
    for experiment, group in measured.groupby("experiment"):
        seeds = group.groupby(["seed", "network"]).value.mean().groupby("seed").mean()
        stored = sizes[sizes.experiment == experiment]
        same = content[stored.index]
        stored = stored[same] if same.any() else stored
        points.append((stored.value.mean() / 1000, seeds.mean(), seeds.std()))
    names = ["kilobytes", "accuracy", "deviation"]
    return pd.DataFrame(points, columns=names).sort_values("kilobytes").fillna({"deviation": 0})


def draw_accuracy_per_byte(results: Results, axes: Sequence[Axes], dataset: str = "mnist") -> None:
    """Accuracy against kilobytes, by training from scratch: LeNets on the first of two axes, the mean of the networks
    that nothing was made for on the second.

    Args:
        results: with the experiments of `study.experiments.storage`.
        axes: two of a figure with constrained layout, which gets a legend below them.
        dataset: "mnist" or "fashion".
    """
    remedy = f"give one of {', '.join(SIZES)}"
    du.require(dataset in SIZES, f"dataset={dataset}: {remedy}")
    titles = {"LeNet": ["LeNet"], "Mean of four held-out networks": HELD_OUT}
    for axis, (title, networks) in zip(axes, titles.items(), strict=True):
        for arm, (end, images, labels, style) in ARMS.items():
            points = mean_by_size(results, rf"{dataset}-\d+kB{end}", networks, images, labels)
            draw_points(axis, points, style, arm)
        axis.set_title(title, fontsize="medium")
    nearest = rf"{dataset}-\d+kB-real", ["nearest neighbor"], "real", "true"
    draw_points(axes[0], mean_by_size(results, *nearest), "kx:", "nearest real image, no network")
    kinds = results.rows(experiment=f"{dataset}-networks").network.unique()
    stored = ((f"{dataset}-networks", [kind], "all real", "true") for kind in kinds)
    parts = [mean_by_size(results, *columns) for columns in stored]
    draw_points(axes[0], pd.concat(parts), "k*", "trained LeNet in place of a set")
    for axis in axes:
        format_axis(axis, SIZES[dataset])
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)


def draw_points(axis: Axes, points: pd.DataFrame, style: str, title: str) -> None:
    """A line through points, with error bars; on another axis of the figure, it is the same title's."""
    titles = {label for other in axis.figure.axes for label in other.get_legend_handles_labels()[1]}
    label = "_" * (title in titles) + title
    line, size = (points.kilobytes, points.accuracy, points.deviation), 9 if "*" in style else 4
    if len(points):
        axis.errorbar(*line, fmt=style, label=label, markersize=size, linewidth=1.3, capsize=2)


def format_axis(axis: Axes, kilobytes: Sequence[int]) -> None:
    """Logarithmic in the bytes, and in the share of wrong answers."""
    axis.set_xscale("log")
    axis.set_xticks(kilobytes, kilobytes)
    axis.minorticks_off()
    axis.set_yscale("function", functions=(to_error, from_error))
    axis.autoscale(axis="y")
    limits = axis.get_ylim()
    axis.set_yticks(ACCURACIES, ACCURACIES)
    axis.set(xlabel="kilobytes", ylim=limits)
    axis.grid(alpha=0.3)


def to_error(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(100 - accuracy, 0.1, None))


def from_error(error: np.ndarray) -> np.ndarray:
    return 100 - np.exp(-error)


# --------------------------------------------------------------------------------------------- cards
CARD = """# {name}

{about}
Test accuracy (%) of new LeNets, with initial weights not used to make the set: **{main}**.
The best control has {control} ({words}).

{facts}

```python
{use}
print(f"{{du.accuracy(network, data.test):.1f}}%")
```

Accuracy (%) on the 10,000 test images: mean ± std over n new networks (drawn from seed 10000), or n=3×3 for three sets.
{controls}

{accuracies}
"""
LOAD = """import distill_utils as du

data = du.load_mnist("data", name="{dataset}", device="cpu")
distilled = du.load("{name}")
"""
SCHEDULE = "network = du.train_on(du.LeNet(), distilled)  # a trained copy"
TRAIN = """images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)
network = du.LeNet()
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
du.train(network, du.Split(images, labels), epochs={epochs}, optimizer=optimizer)"""
CONTROLS = {
    True: """*Real* images are packed by LZMA into as many bytes, *small* ones with 14×14 pixels and 16 levels of gray.
Soft labels are those of a *teacher*, four LeNets trained on all images, and count; true ones take no bytes.
Training from scratch takes the better of the step sizes 0.001 and 0.003, on validation images.""",
    False: """The *compressed* set is the one that distillation started from. Other controls are real images in at most
as many bytes, whole or small, with true labels or a teacher's.""",
}


def card(name: str, results: Results) -> str:
    """What a user of a shipped set wants to know, in Markdown."""
    distilled = du.load(name)
    control, main = strongest(control_rows(results, name)), main_rows(results, name)
    table = pd.Series(facts(distilled)).reset_index()
    rows = results.rows(experiment=[name, *same_size(results, name)])
    rows = rows[rows.network != "nearest neighbor"]
    return CARD.format(
        name=name,
        about=about(distilled, name),
        main=count(main[main.seed == distilled.metadata["seed"]]),
        control=count(control),
        words=words(control),
        facts=table.set_axis(["", " "], axis=1).to_markdown(index=False),
        use=use_code(distilled, name),
        controls=CONTROLS[name in COMPRESSED],
        accuracies=summarize(rows, ["training", *CONTENT], "network")
        .reset_index()
        .to_markdown(index=False),
    )


def about(distilled: du.DistilledSet, name: str) -> str:
    """A sentence on what a set is and how large."""
    kind = "compressed" if name in COMPRESSED else "distilled"
    generated = distilled.decoder.options["classes"] > 0
    how = "which a small generator makes" if generated else "stored as codes for one small decoder"
    what = f"{distilled.labels[..., 0].numel():,} {kind} images for {distilled.metadata['dataset']}"
    size = stored_bytes(find_set(name)) / 1000
    return f"{what} with soft labels, {how}: {size:.{1 if size < 10 else 0}f} kB."


def use_code(distilled: du.DistilledSet, name: str) -> str:
    """Python that trains a LeNet on a set, as the set is meant to be used."""
    load = LOAD.format(name=name, dataset=distilled.metadata["dataset"])
    if name not in COMPRESSED:
        return load + SCHEDULE
    return "import torch\n\n" + load + TRAIN.format(epochs=scratch_epochs(distilled))


def sets_table(results: Results) -> pd.DataFrame:
    """The shipped sets, their sizes and what they and their controls reach as they are meant to be used."""
    lines = []
    for name in SHIPPED:
        main, control = main_rows(results, name), strongest(control_rows(results, name))
        kilobytes = f"{stored_bytes(find_set(name)) / 1000:.1f}"
        kind = "compressed" if name in COMPRESSED else "distilled"
        training = main.training.iloc[0]
        control = f"{count(control)}: {words(control)}"
        lines.append([f"[`{name}`]({name}.md)", kilobytes, kind, training, count(main), control])
    head = ["set", "kB", "kind", "training", "accuracy (%)", "best control"]
    return pd.DataFrame(lines, columns=head)


def facts(distilled: du.DistilledSet) -> dict[str, str]:
    """What a set's file says, by topic."""
    metadata = distilled.metadata
    mean, std = float(metadata["mean"]), float(metadata["std"])
    low, high = (float(value) * std + mean for value in distilled.decode().detach().aminmax())
    schedule = f"{training(distilled)}, in the stored order with the stored step sizes"
    return {
        "images": f"{list(distilled.images.shape)} as stored, {list(distilled.decode().shape)} decoded",
        "labels": f"{list(distilled.labels.shape)}: steps, labels, classes",
        "learned schedule": schedule if metadata["iterations"] else "none: not distilled",
        "normalization": f"`(pixel - {mean:.4f}) / {std:.4f}` of pixels in 0..1",
        "pixel range": f"{low:.2f} to {high:.2f}; clip to 0..1 to look at them, not to train",
        "made by": f"`{metadata['command']}`, seed {metadata['seed']}, {metadata['versions']}",
    }


def write(path: Path, text: str) -> None:
    with du.replacing(path) as unfinished:
        unfinished.write_text(text)


def replace_table(path: Path, marker: str, table: pd.DataFrame) -> None:
    """Puts a table between the comments `marker` and `end of marker` of a Markdown file."""
    before, rest = path.read_text().split(f"<!-- {marker} -->\n\n")
    _, after = rest.split(f"<!-- end of {marker} -->")
    table = table.to_markdown(index=False)
    write(path, f"{before}<!-- {marker} -->\n\n{table}\n\n<!-- end of {marker} -->{after}")


def main() -> None:
    """Writes the card of each shipped set, the tables in both READMEs and the figure."""
    results, folder = Results(), ROOT / "distilled"
    figure = Figure((10, 5), layout="constrained")
    draw_accuracy_per_byte(results, figure.subplots(1, 2, sharey=True))
    with du.replacing(ROOT / "figures" / "accuracy_per_byte.png") as unfinished:
        figure.savefig(unfinished, dpi=144, format="png")
    for name in SHIPPED:
        write(folder / f"{name}.md", card(name, results))
    replace_table(folder / "README.md", "sets", sets_table(results))
    replace_table(ROOT / "README.md", "results", headline(results))


if __name__ == "__main__":
    main()
