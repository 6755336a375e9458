"""Single-source domain generalization: trained on one domain, tested on all others.

No stock sweep has such jobs, but the stock train script does: all domains but one as ``--test_envs``. Folder names and
seeds are made as the sweep makes them. Stock `collect_results` selects models from jobs with one target or two and
shows an X for these; our `collect` applies its first method: the step that is best on the source's validation split.

DomainBed's batch size is per domain. Ours is three times the default here, so that an update has as many images of one
source as it has of three: the paper's 128. ERM keeps DomainBed's 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from domainbed_reasoning.results.published import SINGLE_SOURCE
from domainbed_reasoning.sweeps.studies.study import FOUR, Grid, Settings, Study, domains_of, for_laptop
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, make_job

_BASELINE = Grid(("ERM",), mllm=False)
_OURS = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "RDMLDG"), hparams={"batch_size": 3 * 43})
_OF_LAPTOP = replace(_OURS, hparams={"batch_size": 3 * 6})

STUDY = Study(
    name="single_source",
    title="one source domain, all others as targets",
    claim="Reasoning carries over from a single domain, where nothing can be aligned between sources.",
    paper=(
        f"arXiv 2602.23777, a further task: average {SINGLE_SOURCE['RDMLDG']:.2f}, of the best baseline "
        f"{SINGLE_SOURCE['best baseline']:.2f}; over which datasets and sources is not among the facts at hand here"
    ),
    datasets=FOUR,
    grids=(_BASELINE, _OURS),
    mini=for_laptop(_BASELINE, _OF_LAPTOP),
    one_source=True,
)


def train_jobs(grid: Grid, dataset: str, settings: Settings) -> Iterator[TrainJob]:
    """Yield the jobs of a grid on a dataset."""
    domains = range(domains_of(dataset))
    for trial in range(settings.trials_of(grid)):
        for algorithm in grid.algorithms:
            for source in domains:
                for seed in range(grid.n_hparams):
                    yield make_job(
                        Path(settings.folder_of(grid)),
                        dataset,
                        algorithm,
                        [domain for domain in domains if domain != source],
                        data_dir=settings.data_dir,
                        trial_seed=trial,
                        hparams_seed=seed,
                        hparams=settings.hparams_of(grid),
                        steps=settings.steps,
                    )
