"""Starts the process that logs a job to an experiment tracker, for our algorithms and for baselines on our datasets.

The hparam ``track`` can only come from ``--hparams``, which the train script shows to no baseline: it is read from its
arguments. The process follows the job's files; training neither waits for it nor sees its libraries.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import domainbed_reasoning
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.preflight import is_ours, parse_hparams
from domainbed_reasoning.bridge.train_args import NAME_OF_JOB, recognized_arguments
from domainbed_reasoning.terminal import get_logger

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_CODE = """\
import sys
sys.path.append(sys.argv[1])
from domainbed_reasoning.tracking.follow import main
sys.exit(main())
"""
_FLUSH_SECONDS = 120.0
_log = get_logger(__name__)


def start_for_job(algorithm: str, dataset: str) -> None:
    """Start tracking the job that runs in this process, once; do nothing where none does or it is not to be tracked.

    Args:
        algorithm: whose hyper-parameters are asked for; another's than the job's is ignored.
        dataset: its.
    """
    args = recognized_arguments()
    if args is None or (args.algorithm, args.dataset) != (algorithm, dataset):
        return
    if algorithm in registry.ALGORITHMS or is_ours(dataset):
        tool = parse_hparams(args).get("track", "none")
        if tool in TRACKERS:
            _start(str(Path(args.output_dir).absolute()), json.dumps(vars(args), sort_keys=True), tool, os.getpid())


@functools.cache
def _start(folder: str, args: str, tool: str, pid: int) -> None:
    if importlib.util.find_spec(tool) is None:
        _log.warning(
            f"WARNING: hparam track: {tool} is not installed, so this job is not tracked. Run pip install "
            f"'domainbed-reasoning[{tool}]'."
        )
        return
    is_of_sweep = NAME_OF_JOB.fullmatch(Path(folder).name) is not None
    job = {"folder": folder, "args": json.loads(args), "tool": tool, "is_of_sweep": is_of_sweep, "process": pid}
    command = [sys.executable, "-c", _CODE, str(Path(domainbed_reasoning.__file__).parents[1])]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables, text=True, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except OSError as error:
        _log.warning(f"WARNING: tracking with {tool} could not be started ({error}). The job continues untracked.")
        return
    atexit.register(_end, process, pid)


def _end(process: subprocess.Popen[str], pid: int) -> None:
    """Let the process log what is left when the job ends; not in forks of the job, which inherit this."""
    if os.getpid() != pid:
        return
    with suppress(OSError):  # it has failed and said so
        assert process.stdin is not None
        process.stdin.write("end\n")  # workers of the job may still hold the pipe, so that closing would not do
        process.stdin.close()
    try:
        process.wait(_FLUSH_SECONDS)
    except subprocess.TimeoutExpired:
        _log.warning("WARNING: the experiment tracker is still busy and continues in the background.")
