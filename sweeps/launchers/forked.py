"""A launcher for DomainBed's registry that imports everything once, for short jobs on a CPU.

    python -m domainbed.scripts.sweep launch --command_launcher forked …

A train process takes 6 s to import torch, transformers and DomainBed, as long as a job on the embedded dataset. This
launcher imports them once and forks a child per job, which runs the stock train script with the arguments of its
command. CPU only: a process that has used CUDA cannot be forked.

Environment variables, job logs and summaries are those of ``parallel``. Without ``DOMAINBED_REASONING_JOBS``, two jobs
run at a time, each with one thread.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.bridge.train_args import TRAIN_SCRIPT
from domainbed_reasoning.files.cache import NoCacheFolder
from domainbed_reasoning.jobs.resume_store import progress_folder, prune
from domainbed_reasoning.sweeps.launchers.bars import Bars
from domainbed_reasoning.sweeps.launchers.jobs import JOBS, Failure, Job, chosen_jobs, report, whole_number
from domainbed_reasoning.sweeps.launchers.processes import ended_by_sigterm
from domainbed_reasoning.terminal import printable_streams

JOBS_AT_A_TIME = 2
# What a job imports, directly or through transformers' lazy modules.
MODULES = (
    "domainbed.algorithms",
    "domainbed.datasets",
    "domainbed.hparams_registry",
    "domainbed.lib.fast_data_loader",
    "domainbed.lib.misc",
    "transformers.models.auto.modeling_auto",
    "transformers.models.internvl.modeling_internvl",
    "transformers.models.internvl.processing_internvl",
    "transformers.models.qwen2.modeling_qwen2",
    "domainbed_reasoning.mllm.load",
)


@printable_streams()
def forked_launcher(commands: Sequence[str]) -> list[Failure]:
    """Run the train commands of a sweep in forks of this process, two at a time, and report failures.

    Args:
        commands: shell strings, as DomainBed passes them to every launcher.

    Returns:
        The failures, which are also printed.

    Raises:
        ValueError: this machine has a GPU or cannot fork, a command is not DomainBed's train script, or an environment
            variable has an invalid value.
    """
    _check_machine()
    jobs = chosen_jobs(commands)
    arguments = [train_arguments(job) for job in jobs]
    at_a_time = whole_number(JOBS, default=JOBS_AT_A_TIME)
    for module in MODULES:
        importlib.import_module(module)
    from domainbed_reasoning.mllm.sealed import import_peft

    import_peft()
    versions.source_digests()  # of the imported files, which may change in a checkout while jobs wait
    fork = multiprocessing.get_context("fork")
    waiting = list(zip(jobs, arguments, strict=True))
    running: dict[BaseProcess, Job] = {}
    failures = []
    with ended_by_sigterm(), Bars(jobs) as bars:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    job, argv = waiting.pop(0)
                    variables = bars.start(job, len(waiting))
                    process: BaseProcess = fork.Process(target=run_train, args=(job, argv, variables), name=job.name)
                    process.start()
                    running[process] = job
                ended = wait([process.sentinel for process in running], timeout=1 if bars.shown else None)
                if bars.shown:
                    bars.refresh()
                for process in [process for process in running if process.sentinel in ended]:
                    process.join()
                    job = running.pop(process)
                    failure = Failure(job, process.exitcode) if process.exitcode else None
                    failures += [failure] if failure else []
                    bars.end(job, failure)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    with suppress(NoCacheFolder):
        if (kept := progress_folder()).is_dir():
            prune(kept, keep=kept)  # forks run no atexit handlers, which delete the progress of completed jobs
    report(failures, len(jobs))
    return failures


def train_arguments(job: Job) -> list[str]:
    """Return the arguments after ``python -m domainbed.scripts.train`` in a job's command.

    Raises:
        ValueError: it is another command.
    """
    words = shlex.split(job.command)
    if words[1:3] != ["-m", TRAIN_SCRIPT]:
        raise ValueError(f"The launcher `forked` only runs `python -m {TRAIN_SCRIPT}`; got {job.command!r}.")
    return words[3:]


def run_train(job: Job, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run the stock train script in this process, a fork, with its output in the job's log.

    Args:
        job: the job.
        arguments: of the train script.
        variables: added to the environment.
    """
    os.environ.update(variables)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    sys.argv = [TRAIN_SCRIPT, *arguments]
    runpy.run_module(TRAIN_SCRIPT, run_name="__main__", alter_sys=True)


def _check_machine() -> None:
    import torch

    if torch.cuda.is_available():
        raise ValueError(
            "The launcher `forked` runs on CPUs only: a process that has used CUDA cannot be forked. "
            "Use `--command_launcher parallel`, or set CUDA_VISIBLE_DEVICES= to stay on the CPU."
        )
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError("The launcher `forked` requires a system with fork(). Use `--command_launcher parallel`.")
