"""Puts the best sets of a finished study into distilled/, each with a card.

python -m study.ship                           from results/, after python -m study beyond
"""

import json
import shutil
from pathlib import Path

import distill_utils as du
from study.beyond import RECIPES
from study.report import Line

SHIPPED = {
    "mnist-10": ("best-10", "as distilled"),
    "mnist-100-in-30-updates": ("best-100-in-30", "as distilled"),
    "mnist-100-in-100-updates": ("best-100-in-100", "as distilled"),
    "mnist-100": ("best-100-free", "retrained"),
    "mnist-500": ("best-500-free", "retrained"),
    "mnist-10-tiled": ("tiled-10", "as distilled"),
    "mnist-100-in-30-updates-tiled": ("tiled-100-in-30", "as distilled"),
    "mnist-100-in-100-updates-tiled": ("tiled-100-in-100", "as distilled"),
    "mnist-100-tiled": ("tiled-100-free", "retrained"),
    "mnist-500-tiled": ("tiled-500-free", "retrained"),
}  # name: experiment, and the regime it was made for


def card(name: str, results: Path) -> str:
    """What a user of the set wants to know, as Markdown."""
    experiment, regime = SHIPPED[name]
    record = json.loads((results / f"{experiment}.json").read_text())
    recipe = RECIPES[experiment]
    distilled = du.DistilledSet.load(results / f"{experiment}-images.safetensors")
    settings = {key: value for key, value in recipe.items() if key not in ("steps", "per_class", "epochs", "chiefly")}
    measured = {row: Line("", experiment, row).result(results) for row in ("as distilled", "retrained")}
    count = {row: len(each.values) for row, each in measured.items()}
    steps, n = distilled.labels.shape[:2]
    tiles = f", each of {distilled.tiles} × {distilled.tiles} tiles" if distilled.tiles > 1 else ""
    return f"""# {name}

{distilled.steps * distilled.images.shape[1]} images for MNIST with learned soft labels, made to train LeNets of any
Xavier-normal initial weights; chiefly {"for free retraining" if regime == "retrained" else "as distilled"}.

- **Accuracy** on MNIST's 10,000 test images, mean ± std over fresh networks: as distilled, {distilled.updates} updates
  by {distilled.optimizer}, {measured["as distilled"]} ({count["as distilled"]} networks); retrained freely by SGD, 300
  epochs, {measured["retrained"]} ({count["retrained"]} networks).
- **Made** by `python -m study beyond --only {experiment}`, seed 0, from k-means centers of the training images, in
  {record["seconds"] / 60:.0f} minutes, tests included ({record["machine"]}; {record["versions"]}).
- **Settings**: `{settings}`.
- **Contents**: {distilled.steps} × {distilled.images.shape[1]} images{tiles}, {steps} × {n} labels and
  {distilled.updates} step sizes.
- **Limits**: made for this LeNet and MNIST's digits; nothing is promised for other networks. As distilled means in
  this order, with these step sizes, by `higher`'s {distilled.optimizer} as `du.unroll` runs it. One distillation.
"""


def main() -> None:
    results, folder = Path("results"), Path(du.__file__).with_name("distilled")
    for name, (experiment, _) in SHIPPED.items():
        shutil.copy(results / f"{experiment}-images.safetensors", folder / f"{name}.safetensors")
        (folder / f"{name}.md").write_text(card(name, results))


if __name__ == "__main__":
    main()
