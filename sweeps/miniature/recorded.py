"""Jobs of a study that ran elsewhere: their lines of ``rows.csv`` and ``choice.csv``, in ``OUTPUT/recorded``.

To continue a study on another machine, copy both tables there: their jobs are not run again, and their lines enter the
new tables.
"""

from __future__ import annotations

import csv
from pathlib import Path

from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob

FOLDER = "recorded"
FILES = ("rows.csv", "choice.csv")


def name_of(job: TrainJob, output: Path) -> str:
    """Return a job's folder below the output folder. It has a digest of all arguments, so it is the same elsewhere."""
    return job.folder.relative_to(output).as_posix()


def recorded(output: Path, *names: str) -> dict[str, dict[str, str]]:
    """Return the recorded lines by the job's name.

    Args:
        output: folder of the study.
        names: of the tables; without any, all.

    Raises:
        ValueError: a table does not name its jobs.
    """
    lines: dict[str, dict[str, str]] = {}
    for name in names or FILES:
        path = output / FOLDER / name
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if "job" not in (reader.fieldnames or ()):
                    raise ValueError(f"{path} has no column job. It must be what `--study regimes --table` wrote.")
                lines |= {line["job"]: line for line in reader}
    return lines
