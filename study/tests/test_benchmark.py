"""The benchmark compares ways to compute one gradient: independent opinions on it."""

import re
import sys

import pytest
import torch

import distill_utils as du
from study.benchmark import benchmark
from tests.conftest import Smooth

LOOPS = {*benchmark.METHODS} - {"TorchOpt MetaSGD", "JAX, compiled"}  # not installed, LeNets alone


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch):
    monkeypatch.setattr(benchmark.os, "sched_setaffinity", lambda *_: None)


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_rivals_have_the_same_gradient(toy, name):
    torch.set_default_dtype(torch.float64)
    images, labels = du.initialize(toy, "noise", steps=2)
    networks, gradients = [Smooth() for _ in range(3)], []
    real = du.Split(toy.train.images.double(), toy.train.labels)
    for method in (benchmark.ensemble, benchmark.METHODS[name]):
        distilled = du.DistilledSet(images.double(), labels.double(), epochs=3, step_size=0.3)
        method(networks, distilled, real)
        gradients.append([distilled.images.grad, distilled.raw_step_sizes.grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-13)


def test_a_wrong_gradient_is_not_timed():
    def wrong(networks, distilled, real):
        benchmark.ensemble(networks, distilled, real)
        distilled.images.grad *= 1.01

    with pytest.raises(ValueError, match="its gradient is off by"):
        benchmark.measure_gradient(wrong, 1, {})


def test_the_command_writes_what_it_measures(monkeypatch, tmp_path):
    def unrolls():
        """Long unrolls"""
        loop = {"ensemble": benchmark.ensemble}
        return benchmark.compare(loop, {"10": {"updates": 10}}, processes=1)

    output = tmp_path / "new" / "benchmark.md"
    monkeypatch.setitem(benchmark.SECTIONS, "unrolls", unrolls)
    monkeypatch.setattr(benchmark, "run_apart", lambda *works: [work() for work in works])
    monkeypatch.setattr(sys, "argv", ["benchmark", "--only", "unrolls", "--output", str(output)])
    benchmark.main()
    row = output.read_text().splitlines()[-1]
    _, middle, low, high, _ = (float(number) for number in re.findall(r"[\d.]+", row))
    assert 0 < low <= middle <= high


def test_a_job_is_timed(tmp_path):
    assert min(benchmark.measure_iterations(0, 1, 2, str(tmp_path))) > 0
