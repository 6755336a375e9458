"""A job that is killed and started again ends as one that was not: bit for bit, on the CPU in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).with_name("killing.py")


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm", "RDMLDG", "--kills", "4", "--steps", "10"],
        ["--algorithm", "MLLMZeroShot", "--kills", "1", "--steps", "1", "--signal", "TERM"],
    ],
    ids=lambda options: options[1],
)
def test_a_killed_job_goes_on_and_ends_as_if_undisturbed(domainbed_root, tmp_path, options):
    path = os.pathsep.join([str(domainbed_root), str(KILLING.parent.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(KILLING), "--folder", str(tmp_path), "--answer", "label", *options]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.stdout, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["differing"] == [] and said["left"] == []
    assert said["kills"] == int(options[3])
