"""Single-source domain generalization: trained on one domain, tested on all others.

No stock sweep has such jobs, but the stock train script does: all domains but one as ``--test_envs``. Folder names and
seeds are made as the sweep makes them. Stock `collect_results` selects models from jobs with one target or two and
shows an X for these; our `collect` applies its first method: the step that is best on the source's validation split.

DomainBed's batch size is per domain. Ours is three times the default here, so that an update has as many images of one
source as it has of three: the paper's 128. ERM keeps DomainBed's 32.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_reasoning.sweeps.studies.study import FOUR, Grid, Settings, Study, domains_of, for_laptop

_BASELINE = Grid(("ERM",), mllm=False)
_OURS = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "RDMLDG"), hparams={"batch_size": 3 * 43})
_OF_LAPTOP = replace(_OURS, hparams={"batch_size": 3 * 6})

STUDY = Study(
    name="single_source",
    title="one source domain, all others as targets",
    claim="Reasoning carries over from a single domain, where nothing can be aligned between sources.",
    paper="arXiv 2602.23777 has it as a further task; its numbers are not among those at hand here",
    datasets=FOUR,
    grids=(_BASELINE, _OURS),
    mini=for_laptop(_BASELINE, _OF_LAPTOP),
    one_source=True,
)


def train_commands(grid: Grid, dataset: str, settings: Settings) -> dict[Path, str]:
    """Return the stock train commands of a grid on a dataset, for a shell, by the folders of their jobs."""
    commands = {}
    for arguments in _arguments(grid, dataset, settings):
        # The sweep's own recipe: the MD5 of the arguments.
        name = hashlib.md5(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
        folder = Path(settings.folder_of(grid)) / name
        words = ["python", "-m", "domainbed.scripts.train"]
        for key, value in sorted({**arguments, "output_dir": str(folder)}.items()):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        commands[folder] = shlex.join(words)
    return commands


def _arguments(grid: Grid, dataset: str, settings: Settings) -> Iterator[dict[str, Any]]:
    domains = range(domains_of(dataset))
    for trial in range(settings.trials_of(grid)):
        for algorithm in grid.algorithms:
            for source in domains:
                targets = [domain for domain in domains if domain != source]
                for seed in range(grid.n_hparams):
                    arguments: dict[str, Any] = {
                        "dataset": dataset,
                        "algorithm": algorithm,
                        "test_envs": targets,
                        "holdout_fraction": 0.2,
                        "hparams_seed": seed,
                        "data_dir": settings.data_dir,
                        "task": "domain_generalization",
                        "trial_seed": trial,
                        "seed": _seed_hash(dataset, algorithm, targets, seed, trial),
                    }
                    if settings.steps is not None:
                        arguments["steps"] = settings.steps
                    if hparams := settings.hparams_of(grid):
                        arguments["hparams"] = json.dumps(hparams)
                    yield arguments


def _seed_hash(*values: Any) -> int:
    """Return DomainBed's seed of a job, without importing torch for it."""
    return int(hashlib.md5(str(values).encode()).hexdigest(), 16) % 2**31
