"""A checkpoint of any kind: a base model, or what a job trained on one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.mllm import MLLM, load_mllm
from domainbed_reasoning.trained import TASK_FILE, TrainedJob, read_job


@dataclass(frozen=True)
class Checkpoint:
    """A model, not yet loaded.

    Attributes:
        name: a folder, a hub id or ``tiny``.
        job: what trained it, or where a base model is asked as a job asks its own; None for a base model alone.
        trained: whether the model has the job's adapters.
    """

    name: str
    job: TrainedJob | None = None
    trained: bool = True

    def load(self, model: str | None = None) -> MLLM:
        """Load the model for answering, in evaluation mode, its adapters merged where the weights allow.

        Args:
            model: a base model in place of the job's, which may lie elsewhere on this machine.

        Raises:
            ModelError: for a model that cannot be used.
        """
        if self.job is None:
            return load_mllm(self.name).eval()
        mllm = self.job.load(model if self.trained else None)
        return mllm if mllm.quantized else mllm.merge()

    def untrained(self, model: str | None = None) -> Checkpoint:
        """Return a base model with this job's precision and tiles, without its adapters.

        Args:
            model: a folder, a hub id or ``tiny``; None takes the job's own base model.
        """
        assert self.job is not None
        name = model or str(self.job.hparams["model"])
        return Checkpoint(name, dataclasses.replace(self.job, adapters={}, model=name), trained=False)


def open_checkpoint(name: str) -> Checkpoint:
    """Return the checkpoint of that name: a job's or an exported folder, a model's folder, a hub id, or ``tiny``.

    Raises:
        JobError: for a job without a saved model.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir() and ((path / TASK_FILE).is_file() or (path / "results.jsonl").is_file()):
        return Checkpoint(name, read_job(path))
    return Checkpoint(name)


def records_of(folder: str | pathlib.Path) -> list[dict[str, Any]]:
    """Return the records of a job's results.jsonl, one a step, in order; a restarted job's newest count.

    A line that was cut short, as by a job that was killed while it wrote, is left out.
    """
    by_step: dict[int, dict[str, Any]] = {}
    path = pathlib.Path(folder).expanduser() / "results.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]
