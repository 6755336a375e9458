"""The experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio behind one interface.

All write to local files unless the tracker's own variables say otherwise: ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``,
``TRACKIO_SERVER_URL``. Each library is imported when its tracker is opened.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

PROJECT = "domainbed-reasoning"
_PARAMETERS = 100  # that MLflow takes in one call


@dataclass(frozen=True)
class Run:
    """A job as a tracker knows it.

    Attributes:
        id: the same whenever the job is resumed.
        name: algorithm, dataset, target domains and seeds.
        group: the sweep.
        folder: of the job.
        sweep: folder that contains the sweep's jobs; the job's own for one outside of a sweep.
        config: arguments and hyper-parameters.
        rows: that were logged before it was resumed.
    """

    id: str
    name: str
    group: str
    folder: Path
    sweep: Path
    config: Mapping[str, Any]
    rows: int


class Tracker(Protocol):
    """What is asked of a tracker.

    Class attributes:
        FLUSH_SECONDS: after so many seconds what was logged survives a kill.
    """

    FLUSH_SECONDS: ClassVar[float]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step; a step may be logged in several parts, in ascending order of steps."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table of texts."""

    def close(self, finished: bool) -> None:
        """Flush, and mark the run as finished or as interrupted."""


class TensorBoard:
    """Event files in ``<job>/tensorboard/<run>``; ``tensorboard --logdir SWEEP`` shows all jobs of a sweep."""

    FLUSH_SECONDS: ClassVar[float] = 0.0

    def __init__(self, run: Run):
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.tensors = importlib.import_module("tensorboard.compat.proto.tensor_pb2")
        name = re.sub(r"[^\w.,-]+", "-", run.name)
        self.writer = writer.EventFileWriter(str(run.folder / "tensorboard" / name))
        self.table(0, "config", ["name", "value"], [[name, json.dumps(value)] for name, value in run.config.items()])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars."""
        made = [self.summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, made)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a text that is a Markdown table."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        tensor = self.tensors.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        tensor.tensor_shape.dim.add(size=1)
        kind = self.summaries.SummaryMetadata(plugin_data={"plugin_name": "text"})
        self._add(step, [self.summaries.Summary.Value(tag=f"{name}/text_summary", metadata=kind, tensor=tensor)])

    def close(self, finished: bool) -> None:
        """Close the event file."""
        self.writer.close()

    def _add(self, step: int, values: Sequence[Any]) -> None:
        summary = self.summaries.Summary(value=values)
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, summary=summary))
        self.writer.flush()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


class WeightsAndBiases:
    """Runs in ``<job>/wandb``, which ``wandb sync`` uploads; ``WANDB_MODE=online`` uploads at once."""

    FLUSH_SECONDS: ClassVar[float] = 20.0

    def __init__(self, run: Run):
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run.folder),
            id=run.id,
            name=run.name,
            group=run.group,
            config=dict(run.config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            settings=self.wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        # Its own steps are rows: it keeps back a row until the next, and drops what is added to an earlier one.
        self.run.define_metric("*", step_metric="step")
        self.rows = run.rows

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log metrics as a row, with their step."""
        self.run.log({"step": step, **values}, step=self.rows, commit=True)
        self.rows += 1

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table."""
        self.log(step, {name: self.wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, finished: bool) -> None:
        """Finish the run; an interrupted one is shown as failed until it is resumed."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Runs of the experiment that has the sweep's name, in ``<sweep>/mlruns`` unless ``MLFLOW_TRACKING_URI`` is set."""

    FLUSH_SECONDS: ClassVar[float] = 0.0

    def __init__(self, run: Run):
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3.13 and later
        self.mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self.mlflow.set_tracking_uri((run.sweep / "mlruns").as_uri())
        client = self.mlflow.MlflowClient()
        experiment = self.mlflow.set_experiment(run.group).experiment_id
        query = f"tags.job = '{run.id}'"
        found = client.search_runs([experiment], query, max_results=1)
        if found:
            self.mlflow.start_run(run_id=found[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=run.name, tags={"job": run.id})
            config = {name: str(value)[:500] for name, value in run.config.items()}
            names = list(config)
            for start in range(0, len(names), _PARAMETERS):
                self.mlflow.log_params({name: config[name] for name in names[start : start + _PARAMETERS]})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics."""
        self.mlflow.log_metrics(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table as an artifact, in the layout of `mlflow.log_table`."""
        data = {"columns": list(columns), "data": [list(row) for row in rows]}
        self.mlflow.log_dict(data, f"{name.replace(' ', '_')}.json")

    def close(self, finished: bool) -> None:
        """End the run."""
        self.mlflow.end_run("FINISHED" if finished else "KILLED")


class Trackio:
    """Runs of the project that has the sweep's name, in Trackio's own folder; ``trackio show`` shows them."""

    FLUSH_SECONDS: ClassVar[float] = 5.0

    def __init__(self, run: Run):
        self.trackio = importlib.import_module("trackio")
        self.trackio.init(
            project=re.sub(r"[^\w.-]+", "-", run.group),
            name=f"{run.name} ({run.id})",
            group=run.group,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics."""
        self.trackio.log(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table."""
        table = self.trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self.trackio.log({name: table}, step=step)

    def close(self, finished: bool) -> None:
        """Flush what is logged."""
        self.trackio.finish()


TRACKERS: dict[str, type[Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
