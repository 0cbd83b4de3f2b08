"""The one table of measurements, and what is made from it: tables, the sets' cards and the README's results.

python -m study.results     write the cards in distilled/ and the table in the README again

results = Results()
print(results.accuracies(experiment="random-noise"))  # mean ± std over all networks of three sets
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch

import distill_utils as du
from study.experiments.experiment import RESULTS, ROOT, find_set, read_metadata, read_table
from study.experiments.protocols import ADAM, FIXED, SCRATCH, UNDISTILLED, training
from study.experiments.sets import COMPRESSED, FEW_BITS, LENET, RECIPES, START, is_scheduled

SHIPPED = (*RECIPES, *COMPRESSED, *FEW_BITS)
CONTENT = ["images", "labels", "step_sizes"]
OTHERS = {  # experiments that have controls for a set of another one, of as many bytes or more
    "mnist-ipc10-compressed": ["transfer"],
    **{name: [START, f"controls-{START}"] for name in FEW_BITS},
}


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
    """An accuracy and the networks behind it: n=100, or n=3×100 where three sets were distilled."""
    accuracies, seeds = du.Accuracies(torch.tensor(rows.value.to_numpy())), rows.seed.nunique()
    networks = f"{seeds}×{len(rows) // seeds}" if seeds > 1 else f"{len(rows)}"
    return f"{str(accuracies).removesuffix('%')} (n={networks})"


# ------------------------------------------------------------------------------- a set and its controls
def main_rows(results: Results, name: str) -> pd.DataFrame:
    """What a set, or a set of one of the paper's experiments, reaches as it is meant to be used, over all seeds."""
    columns = {"images": "distilled", "network": FIXED if name.startswith("fixed") else "LeNet"}
    if name.endswith("-compressed"):
        columns |= {"images": "compressed", "labels": "teacher", "training": ADAM}
    elif name.endswith("-scratch"):
        columns |= {"labels": "distilled", "training": SCRATCH}
    else:
        columns["step_sizes"] = "distilled"
    return results.rows(experiment=name, **columns)


def control_rows(results: Results, name: str) -> pd.DataFrame:
    """What undistilled images reach with the same training, on the same network."""
    main = main_rows(results, name)
    columns = {column: main[column].unique() for column in ("network", "training")}
    codes = name in FEW_BITS or (name in COMPRESSED and is_scheduled(name))
    images = [*UNDISTILLED] + ["compressed"] * codes
    experiments = [name, f"controls-{name}", *OTHERS.get(name, [])]
    return results.rows(experiment=experiments, images=images, **columns)


def strongest(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the images, labels and step sizes with the highest mean."""
    groups = [group for _, group in rows.groupby(CONTENT)]
    return max(groups, key=lambda group: group.value.mean())


def words(rows: pd.DataFrame) -> str:
    """What rows of one kind of images, labels and step sizes were trained on."""
    images, labels, step_sizes = rows[CONTENT].iloc[0]
    return f"{images} images; labels: {labels}; step sizes: {step_sizes}"


def headline(results: Results) -> pd.DataFrame:
    """The main accuracies beside published ones and the strongest control."""
    lines = pd.read_csv(RESULTS / "headline.csv", keep_default_na=False)
    names = lines.pop("experiment")
    controls = [strongest(control_rows(results, name)) for name in names]
    lines["best control"] = [f"{count(rows)}: {words(rows)}" for rows in controls]
    lines["this project"] = [count(main_rows(results, name)) for name in names]
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


def gains(results: Results, name: str) -> list[float]:
    """Mean accuracies from random real images to a set, adding one ingredient after another: k-means centers, their
    best labels and their best step sizes, and distillation."""
    rows = control_rows(results, name)
    constant = rows[rows.step_sizes == "constant"]
    true, kmeans = constant[constant.labels == "true"], rows[rows.images == "k-means"]
    steps = [true[true.images == "random real"], true[true.images == "k-means"]]
    steps += [strongest(constant[constant.images == "k-means"]), strongest(kmeans)]
    return [part.value.mean() for part in (*steps, main_rows(results, name))]


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

Accuracy on the 10,000 test images: mean ± std over n new networks (drawn from seed 10000). *Random real* and *k-means*
images, as many and stored in the same way, are controls; so are *compressed* ones where the set is distilled.

{accuracies}
"""
LOAD = """import distill_utils as du

data = du.load_mnist("data", name="{dataset}", device="cpu")
distilled = du.load("{name}")
"""
SCHEDULE = "network = du.train_on(du.LeNet(), distilled)  # a trained copy"
TRAIN = """images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)
network = du.LeNet()
optimizer = torch.optim.{optimizer}
du.train(network, du.Split(images, labels), epochs={epochs}, batch_size={size}, optimizer=optimizer)"""
STORED = {
    "Identity": "",
    "MultiFormation": ", four in each stored image (multi-formation with factor 2)",
    "CodeDecoder": ", each stored as a short code for one small decoder",
}
TABLE = re.compile("(?<=<!-- results -->\n\n).*(?=\n\n<!-- end of results -->)", re.DOTALL)


def card(name: str, results: Results) -> str:
    """What a user of a shipped set wants to know, in Markdown."""
    distilled, metadata = du.load(name), read_metadata(find_set(name))
    control, main = strongest(control_rows(results, name)), main_rows(results, name)
    use = LOAD.format(name=name, **metadata) + use_code(distilled, name)
    table = pd.Series(facts(distilled, metadata)).reset_index()
    sets = [name, START] if name in FEW_BITS else name  # whose controls, in floats, are its own
    return CARD.format(
        name=name,
        about=about(distilled, name, metadata["dataset"]),
        main=count(main[main.seed == 0]),
        control=count(control),
        words=words(control),
        facts=table.set_axis(["", " "], axis=1).to_markdown(index=False),
        use=use.replace("du\n", "du\nimport torch\n", 1) if "torch." in use else use,
        accuracies=all_accuracies(results.rows(set=sets)).to_markdown(index=False),
    )


def about(distilled: du.DistilledSet, name: str, dataset: str) -> str:
    """A sentence on what a set is and how large."""
    images, how = distilled.labels[..., 0].numel(), STORED[type(distilled.decoder).__name__]
    tensors = safetensors.torch.load_file(find_set(name)).values()
    size = sum(8 + tensor.nbytes for tensor in tensors) / 1000  # with a scale and an offset each
    return f"{images:,} images for {dataset} with soft labels{how}: {size:.{1 if size < 10 else 0}f} kB."


def use_code(distilled: du.DistilledSet, name: str) -> str:
    """Python that trains a LeNet on a set, as the set is meant to be used."""
    if is_scheduled(name):
        return SCHEDULE
    if name in RECIPES:
        sgd = "SGD(network.parameters(), lr=0.01, momentum=0.9)"
        return TRAIN.format(optimizer=sgd, epochs=300, size=256)
    epochs = round(LENET.seen / distilled.labels[..., 0].numel())
    return TRAIN.format(optimizer="Adam(network.parameters(), lr=1e-3)", epochs=epochs, size=64)


def facts(distilled: du.DistilledSet, metadata: dict) -> dict[str, str]:
    """What a set's file says, by topic."""
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


def all_accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Every accuracy on sets and their controls; several networks stand below each other."""
    if rows.network.nunique() == 1:
        sets = ["set"] if rows.set.nunique() > 1 else []
        return summarize(rows, [*sets, "training", *CONTENT]).reset_index()
    content = rows.images + " images, " + rows.labels + " labels"
    return summarize(rows.assign(content=content), ["network", "training"], "content").reset_index()


def write(path: Path, text: str) -> None:
    with du.replacing(path) as unfinished:
        unfinished.write_text(text)


def main() -> None:
    """Writes the card of each shipped set and the table in the README."""
    results, readme = Results(), ROOT / "README.md"
    for name in SHIPPED:
        write(ROOT / "distilled" / f"{name}.md", card(name, results))
    table = headline(results).to_markdown(index=False)
    write(readme, TABLE.sub(lambda _: table, readme.read_text()))


if __name__ == "__main__":
    main()
