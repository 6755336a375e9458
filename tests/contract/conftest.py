"""Probes each implementation of DomainBed once: the stand-in and, where present, the real library.

A probe process imports the implementation once, does what the contract is about, and leaves its observations as JSON.
The tests hold the observations against values worked by hand and against each other.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from builders.domainbeds import NO_UPSTREAM, STAND_IN, UPSTREAM

HERE = pathlib.Path(__file__).resolve().parent


def root_of(implementation: str) -> pathlib.Path:
    """Return what to put on PYTHONPATH; skips the test where that is not there."""
    if implementation == "standin":
        return STAND_IN
    return UPSTREAM or pytest.skip(NO_UPSTREAM)


def run_python(implementation: str, *words: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with the implementation in front of everything else, on one thread."""
    path = os.pathsep.join([str(root_of(implementation)), str(HERE)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, **settings}, capture_output=True, text=True, timeout=3600
    )


@functools.cache
def workplace() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for this test run, with the seeded records in ``sets``."""
    place = tempfile.TemporaryDirectory(prefix="contract-")
    subprocess.run([sys.executable, str(HERE / "records.py"), f"{place.name}/sets"], check=True)
    return place


@functools.cache
def observe(implementation: str) -> dict[str, Any]:
    """Return the probe's observations of one implementation."""
    root_of(implementation)
    folder = pathlib.Path(workplace().name, implementation)
    folder.mkdir()
    result = run_python(implementation, str(HERE / "probe.py"), "observations.json", "../sets", cwd=folder)
    if result.returncode:
        pytest.fail(f"The probe of {implementation} failed:\n{result.stderr[-4000:]}")
    return json.loads((folder / "observations.json").read_text())


@pytest.fixture(params=["standin", "upstream"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation in turn."""
    root_of(request.param)
    return request.param


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python``, for tests that need a process of their own."""
    return run_python


@pytest.fixture
def seen(implementation: str) -> dict[str, Any]:
    """What the probe saw of the implementation."""
    return observe(implementation)


@pytest.fixture
def both(upstream_root: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the probe saw of the stand-in, and of the real library."""
    return observe("standin"), observe("upstream")
