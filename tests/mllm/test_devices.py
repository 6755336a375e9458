"""The device of models, and what happens on accelerators that nobody has tried."""

import types

import psutil
import pytest
import torch

from domainbed_reasoning.mllm import devices


@pytest.fixture
def machine(monkeypatch):
    """``machine("xpu")``: a machine with that accelerator; None for one without."""
    for note in (devices._note_untested, devices._note_unused):
        note.cache_clear()

    def with_accelerator(kind, hip=None):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if kind else None)
        monkeypatch.setattr(torch.version, "hip", hip)

    yield with_accelerator
    for note in (devices._note_untested, devices._note_unused):
        note.cache_clear()


@pytest.fixture
def notes(monkeypatch):
    """What is logged."""
    lines = []
    log = types.SimpleNamespace(warning=lambda message, *more: lines.append(message % more))
    monkeypatch.setattr(devices, "_log", log)
    return lines


@pytest.mark.parametrize("kind", ["cuda", None])
def test_cuda_and_the_cpu_are_used_without_a_word(machine, notes, kind):
    machine(kind)
    assert devices.default_device() == devices.job_device() == torch.device(kind or "cpu")
    assert not notes


@pytest.mark.parametrize(("kind", "hip", "name"), [("cuda", "6.4", "ROCm"), ("xpu", None, "XPU"), ("mps", None, "MPS")])
def test_an_accelerator_that_was_never_tried_is_used_and_noted_once(machine, notes, kind, hip, name):
    machine(kind, hip)
    assert devices.default_device() == devices.default_device() == torch.device(kind)
    assert len(notes) == 1 and notes[0].startswith(f"{name}: this package has never been run on it.")


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_jobs_stay_where_domainbed_puts_them(machine, notes, kind):
    """Its train script knows CUDA and the CPU alone."""
    machine(kind)
    assert devices.job_device() == devices.job_device() == torch.device("cpu")
    assert f"{kind.upper()} is not used: DomainBed's train script runs on CUDA or the CPU" in notes[-1]
    assert len(notes) == 2
    machine("cuda", "6.4")
    assert devices.job_device() == torch.device("cuda")


def test_memory_is_unknown_where_pytorch_does_not_report_it(monkeypatch):
    """The CPU's free memory is the host's."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=5))
    for kind, free in (("cpu", 5), ("meta", None)):
        device = torch.device(kind)
        assert devices.free_memory(device) == free
        assert devices.allocated_memory(device) == devices.peak_memory(device) == 0
        assert not devices.memory_is_measured(device)


def test_memory_of_other_accelerators_is_what_their_modules_report(monkeypatch):
    """XPU: 2 bytes free, 9 reserved, 3 of them allocated. MPS: 10 recommended, 4 allocated."""
    for name, value in (("mem_get_info", (2, 20)), ("memory_reserved", 9), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.xpu, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda device: 7)
    xpu = torch.device("xpu")
    assert (devices.free_memory(xpu), devices.allocated_memory(xpu), devices.peak_memory(xpu)) == (8, 3, 7)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4)
    mps = torch.device("mps")
    assert (devices.free_memory(mps), devices.allocated_memory(mps), devices.peak_memory(mps)) == (6, 4, 0)


def test_random_state_is_kept():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with devices.kept_random_state(torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.rand(1), expected)
