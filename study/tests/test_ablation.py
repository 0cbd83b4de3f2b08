"""Each technique of the ablation at small size."""

import math

import pytest

import distill_utils as du
from study.experiments import ablation
from study.records import Results
from study.tests.small import small_study

KINDS = (
    "add-one-none", "add-one-momentum", "add-one-random-window", "add-one-network-pool", "add-one-four-networks",
    "add-one-augmented-real", "add-to-best-augmented-synthetic", "add-to-best-low-resolution",
    "add-to-best-multi-formation", "add-to-best-no-clipping", "leave-one-out-adam", "leave-one-out-init-kmeans",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_technique_is_measured_and_timed(name, tmp_path):
    study = small_study(name, "ablation", tmp_path)
    study.run(ablation.EXPERIMENTS[name])
    results = Results(tmp_path / "ablation")
    assert len(results.values(name, "validation")) == len(ablation.SEEDS)
    assert results.run(name).distillation_seconds > 0


def test_the_settings_reach_distillation(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        du, "distill", lambda distilled, *_, **options: seen.update(options, distilled=distilled)
    )
    study = small_study("some", "ablation", tmp_path)
    ablation.EXPERIMENTS["add-to-best-no-clipping"](study)
    assert seen["clip"] == math.inf
    assert seen["distilled"].inner["optimizer"] == "Adam"
    ablation.EXPERIMENTS["add-one-network-pool"](study)
    assert (seen["unroll"].size, seen["unroll"].window, seen["distilled"].updates) == (8, 25, 100)
    ablation.EXPERIMENTS["add-to-best-multi-formation"](study)
    assert (seen["distilled"].images.shape[1], seen["distilled"].decode().shape[1]) == (10, 40)
    ablation.EXPERIMENTS["add-one-low-resolution"](study)
    stored, decoded = seen["distilled"].images, seen["distilled"].decode()
    assert (stored.shape[-2:], decoded.shape[-2:]) == ((14, 14), (28, 28))
