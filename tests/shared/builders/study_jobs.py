"""Finished jobs of the study in two regimes, without training."""

from __future__ import annotations

import json
from typing import Any

from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob


def write_job(job: TrainJob, accuracy: float, unparsed: float = 0.0, **more: Any) -> None:
    """Write the files of a finished job whose accuracies are all ``accuracy``."""
    job.folder.mkdir(parents=True)
    record = {"args": dict(job.arguments), "hparams": json.loads(job.arguments["hparams"]), "step": 243, **more}
    record["args"].setdefault("holdout_fraction", 0.2)
    answers = {}
    for env in range(4):
        record |= {f"env{env}_in_acc": accuracy, f"env{env}_out_acc": accuracy}
        both = {"label": accuracy, "chain": accuracy, "unparsed": unparsed}
        answers[f"env{env}"] = {"in": both, "out": both}
    (job.folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    (job.folder / "answers.json").write_text(json.dumps(answers))
    (job.folder / "done").write_text("done")
