"""Checkpoints to analyze: base models and trained jobs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.bridge.train_args import NAME_OF_JOB
from domainbed_reasoning.files.plain import plain_lines
from domainbed_reasoning.jobs.results_file import add_record
from domainbed_reasoning.jobs.trained import TASK_FILE, TrainedJob, read_job
from domainbed_reasoning.mllm import MLLM, load_mllm

LAST = "model.pkl"
_LONGEST_RECORD = 1 << 16  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A model, not yet loaded.

    Attributes:
        name: a folder, a checkpoint file, a hub id or ``tiny``.
        job: the job that trained it, or whose settings a base model uses; None for a plain base model.
        trained: whether the model has the job's adapters.
        file: name of the checkpoint in the job's folder.
        trust_remote_code: whether Python files of a base model alone run; a job knows it itself.
    """

    name: str
    job: TrainedJob | None = None
    trained: bool = True
    file: str = LAST
    trust_remote_code: bool = False

    def load(self, model: str | None = None) -> MLLM:
        """Load the model in evaluation mode, with its adapters merged unless the weights are quantized.

        Args:
            model: base model, if the job's path no longer exists.

        Raises:
            ModelError: if the model cannot be used.
        """
        if self.job is None:
            return load_mllm(self.name, trust_remote_code=self.trust_remote_code).eval()
        mllm = self.job.load(model if self.trained else None)
        return mllm if mllm.quantized else mllm.merge()

    def untrained(self, model: str | None = None) -> Checkpoint:
        """Return a base model with this job's precision and tiles, without its adapters.

        Args:
            model: a folder, a hub id or ``tiny``; None for the job's own base model.
        """
        assert self.job is not None
        name = model or str(self.job.hparams["model"])
        return Checkpoint(name, dataclasses.replace(self.job, adapters={}, model=name), trained=False)

    @property
    def held_out(self) -> str:
        """The target domains of the job, joined by ``+``."""
        assert self.job is not None
        return "+".join(self.job.environments[env] for env in self.job.test_envs)

    @property
    def where(self) -> str:
        """Its name in tables: a model's name, or a job's folder with the checkpoint's file if that is not the last."""
        if self.job is None or not self.trained:
            return pathlib.Path(self.name).name
        folder = self.job.folder.resolve().name
        return folder if self.file == LAST else f"{folder}/{self.file}"

    @property
    def title(self) -> str:
        """Its name in titles."""
        if self.job is None or not self.trained:
            return self.where
        step = "" if self.file == LAST else f", {pathlib.Path(self.file).stem}"
        return f"{self.job.algorithm} ({self.held_out} held out{step})"

    @property
    def tag(self) -> str:
        """Its name in file names: algorithm, target domains, the head of the job's folder, the checkpoint."""
        if self.job is None or not self.trained:
            return words_of_file(self.where)
        folder = self.job.folder.resolve().name
        folder = folder[:8] if NAME_OF_JOB.fullmatch(folder) else folder[:40]
        step = "" if self.file == LAST else pathlib.Path(self.file).stem.removeprefix("model_")
        return words_of_file("_".join(filter(None, [self.job.algorithm, self.held_out, folder, step])))


def words_of_file(text: str) -> str:
    """Return ``text`` with a hyphen for each run of characters other than letters, digits and underscores."""
    return re.sub(r"[^\w]+", "-", text).strip("-")


def open_checkpoint(name: str, trust_remote_code: bool = False) -> Checkpoint:
    """Return the checkpoint of that name.

    Args:
        name: a job's or an exported folder, one of a job's checkpoints (``job/model_step20.pkl``), a model's folder, a
            hub id, or ``tiny``.
        trust_remote_code: whether Python files that come with the model, or with a job's base model, run.

    Raises:
        JobError: if the job has no saved model, or not this checkpoint.
    """
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".pkl":
        return Checkpoint(name, read_job(path.parent, path.name, trust_remote_code), file=path.name)
    if path.is_dir() and ((path / TASK_FILE).is_file() or (path / "results.jsonl").is_file()):
        return Checkpoint(name, read_job(path, trust_remote_code=trust_remote_code))
    return Checkpoint(name, trust_remote_code=trust_remote_code)


def records_of(folder: str | pathlib.Path) -> list[Mapping[str, Any]]:
    """Return the records of a job's results.jsonl by step, without replaced ones (see `results_file`).

    Invalid lines, such as one truncated when the job was killed, are skipped.
    """
    run: list[Mapping[str, Any]] = []
    path = pathlib.Path(folder).expanduser() / "results.jsonl"
    for line in plain_lines(path, _LONGEST_RECORD) if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            run = add_record(run, record)
    return run
