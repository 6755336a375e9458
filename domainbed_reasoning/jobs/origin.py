"""Keeps weights that another job trained from jobs whose target domains that job has seen."""

from __future__ import annotations

from pathlib import Path

from domainbed_reasoning.jobs.trained import TASK_FILE, read_task
from domainbed_reasoning.method.task import Task


def check_origin(name: str, folder: str, task: Task) -> None:
    """Check that weights which a job starts from were not trained on its target domains.

    Only folders with a ``task.json`` are checked: jobs' and those that `export` wrote.

    Args:
        name: the hyper-parameter.
        folder: its value: a folder, or a hub id, which is not checked.
        task: of the job.

    Raises:
        ValueError: a target domain was among the sources that the weights were trained on.
        JobError: task.json is damaged.
    """
    path = Path(folder).expanduser()
    if not (path / TASK_FILE).is_file():
        return
    other = read_task(path)
    if other["dataset"] != task.dataset:
        return
    seen = [task.environments[env] for env in task.test_envs if env not in other["test_envs"]]
    if seen:
        raise ValueError(
            f"hparam {name} {folder!r:.300}: it was trained on {', '.join(seen)}, a target domain of this job. Start "
            f"from weights of a job with the targets {' '.join(map(str, task.test_envs))}, or of another dataset."
        )
