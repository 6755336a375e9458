"""Single-source domain generalization: trained on one domain, tested on all others.

No stock sweep has such jobs, but the stock train script does: all domains but one as ``--test_envs``. Folder names and
seeds are made as the sweep makes them. Stock `collect_results` selects models from jobs with one target or two and
shows an X for these; `table` applies its first method: the step that is best on the source's validation split.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.sweeps.study import FOUR, Grid, Settings, Study, domains_of, for_laptop

_BASELINE = Grid(("ERM",), mllm=False)
_OURS = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "RDMLDG"))

STUDY = Study(
    name="single_source",
    title="one source domain, all others as targets",
    claim="Reasoning carries over from a single domain, where nothing can be aligned between sources.",
    paper="arXiv 2602.23777 has it as a further task; its numbers are not among those at hand here",
    datasets=FOUR,
    grids=(_BASELINE, _OURS),
    mini=for_laptop(_BASELINE, _OURS),
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


def table(folder: Path, domains: Mapping[str, Sequence[str]]) -> str:
    """Return mean accuracies over targets and trials, in percent, by algorithm and source.

    Args:
        folder: of the jobs; those without `done` are left out.
        domains: the names of each dataset's domains.
    """
    cells: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for records in sorted(folder.glob("*/results.jsonl")):
        if not (records.parent / "done").exists():
            continue
        steps = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        args = steps[0]["args"]
        targets = args["test_envs"]
        (source,) = set(range(len(domains[args["dataset"]]))) - set(targets)
        chosen = max(steps, key=lambda record: record[f"env{source}_out_acc"])
        accuracy = fmean(chosen[f"env{target}_in_acc"] for target in targets)
        cells[args["dataset"], args["algorithm"], source].append(100 * accuracy)
    lines = []
    for dataset in sorted({dataset for dataset, _, _ in cells}):
        names = domains[dataset]
        lines += [f"\nOne source, accuracy on all other domains: {dataset}"]
        lines += ["".join(f"{word:<14}" for word in ("Algorithm", *names, "Avg")).rstrip()]
        for algorithm in sorted({row for name, row, _ in cells if name == dataset}, key=_order):
            row = [cells.get((dataset, algorithm, source)) for source in range(len(names))]
            shown = [f"{fmean(cell):.1f}" if cell else "X" for cell in row]
            average = f"{fmean(fmean(cell) for cell in row if cell):.1f}" if all(row) else "X"
            lines += ["".join(f"{word:<14}" for word in (algorithm, *shown, average)).rstrip()]
    return "\n".join(lines)


def _order(algorithm: str) -> int:
    """Baselines first, then ours in the order of their names' table."""
    ours = list(registry.ALGORITHMS)
    return ours.index(algorithm) if algorithm in ours else -1
