"""The benchmark compares ways to compute one gradient: a third and a fourth opinion on it."""

import platform

import pytest
import torch

import distill_utils as du
from study.benchmark import benchmark, devices, rivals
from study.methods.truncation import Checkpointed

RIVALS = (
    "higher_loop", "functional_loop", "functional_ensemble", "step_products", "forward_over_reverse",
)  # fmt: skip


@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_have_the_same_gradient(toy, smooth, rival):
    torch.set_default_dtype(torch.float64)
    images, labels = du.initialize(toy, "noise", steps=2)
    distilled = du.DistilledSet(images.double(), labels.double(), epochs=3, step_size=0.3)
    networks = [smooth() for _ in range(3)]
    real = du.Split(toy.train.images.double(), toy.train.labels)
    gradients = []
    for method in (benchmark.ensemble_gradient, getattr(rivals, rival)):
        method(distilled, networks, real)
        gradients.append([distilled.images.grad, distilled.raw_step_sizes.grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-13)


def test_a_processor_without_a_name_is_named_by_its_architecture(monkeypatch):
    found = benchmark.cpu_name("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n")
    assert found == "AMD EPYC"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for text in ("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n", ""):
        assert benchmark.cpu_name(text) == "aarch64"


def test_a_section_keeps_its_place(tmp_path):
    output = tmp_path / "new" / "benchmark.md"
    titles = list(benchmark.TITLES.values())
    for title, text in ((titles[2], "first"), (titles[0], "second"), (titles[2], "third")):
        benchmark.write(output, title, text)
    text = output.read_text()
    assert "first" not in text
    assert text.index(f"## {titles[0]}\n\nsecond") < text.index(f"## {titles[2]}\n\nthird")


def test_a_wrong_gradient_voids_the_comparison():
    def wrong(distilled, networks, real):
        benchmark.ensemble_gradient(distilled, networks, real)
        for learned in distilled.parameters():
            learned.grad *= 1.01

    benchmark.check_gradient(rivals.step_products)
    with pytest.raises(ValueError, match=r"wrong: its gradient is off by 1\.0e-02 of the norm"):
        benchmark.check_gradient(wrong)


def test_a_job_is_timed(tmp_path):
    benchmark.work_in_a_job(0, 1, 2, str(tmp_path))
    unroll, average = torch.load(tmp_path / "seconds")
    assert unroll > average >= 0


@pytest.mark.parametrize("unroll", [du.unroll, Checkpointed(5)])
def test_a_problem_of_cifars_size_runs_by_the_same_functions(unroll):
    times, _ = benchmark.time_larger(unroll, width=2, epochs=1)
    assert len(times) == 2


@pytest.mark.parametrize(
    ("start", "way"),
    [("noise", benchmark.ORIGINAL), ("real images", "Adam, soft labels, multi-formation")],
)
def test_the_time_to_an_accuracy_is_that_of_whole_iterations(monkeypatch, mnist_root, start, way):
    for name, value in {"EVERY": 1, "NETWORKS": 2, "TARGETS": (1, 101)}.items():
        monkeypatch.setattr(benchmark, name, value)
    clock = iter(range(100))  # each look at it takes a second
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(clock))
    row = benchmark.time_to_targets(start, way, 3.5, mnist_root)
    assert row[:6] == [start, way, "2", "-", 3, "4"]
    assert len(row[6].values) == 2


def test_the_device_report_measures_what_it_prints(toy):
    assert devices.gradient_error(device=torch.device("cpu")) < devices.TOLERANCE
    assert [row[0] for row in devices.ensembles(torch.device("cpu"), (1, 2))] == [1, 2]


def test_the_device_report_refuses_an_accuracy_unlike_the_cards(monkeypatch, toy):
    found = du.Accuracies(torch.tensor([80.0, 81.0]))
    monkeypatch.setattr(devices.du, "evaluate", lambda *_, **__: found)
    message = r"mnist-ipc1-mf2-50updates: 80\.5 ± 0\.7%, but its card has 91\.9 ± 1\.0%"
    with pytest.raises(AssertionError, match=message):
        devices.accuracies(toy)
