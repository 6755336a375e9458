"""Groups jobs by algorithm, dataset, hyper-parameters and checkpoint, ignoring targets and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_reasoning.analysis.checkpoints import Checkpoint


def settings_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return, per job, the settings that differ among jobs of its algorithm and dataset, ``name=value, …``.

    Args:
        checkpoints: the jobs' checkpoints.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    hparams: list[Mapping[str, Any]] = []
    for position, checkpoint in enumerate(checkpoints):
        job = checkpoint.job
        assert job is not None
        groups.setdefault((job.algorithm, job.dataset), []).append(position)
        hparams.append({**job.hparams, "checkpoint": checkpoint.file})
    settings = [""] * len(hparams)
    for positions in groups.values():
        names = dict.fromkeys(name for position in positions for name in hparams[position])
        differ = [name for name in names if len({repr(hparams[position].get(name)) for position in positions}) > 1]
        for position in positions:
            settings[position] = ", ".join(f"{name}={hparams[position].get(name)}" for name in differ)
    return settings


def kinds_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a readable name of each row's kind of job: algorithm, dataset if there are several, setting.

    Args:
        rows: with ``algorithm``, ``dataset`` and ``setting``.
    """
    several = len({row["dataset"] for row in rows}) > 1
    parts = ([row["algorithm"], row["dataset"] if several else "", row["setting"]] for row in rows)
    return [", ".join(filter(None, part)) for part in parts]
