"""Single-source domain generalization: trained on one domain, tested on all others.

The stock sweep has no such jobs, but the stock train script supports them: all domains but one as ``--test_envs``.
Folder names and seeds are those of the stock sweep. Stock `collect_results` only handles jobs with one or two targets
and prints X for these; our `collect` applies its first method: the step that is best on the source's validation split.

DomainBed's batch size is per domain. It is three times our default here, so that an update has as many images from one
source as otherwise from three: about the paper's 128. ERM keeps DomainBed's 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from domainbed_reasoning.results.published import SINGLE_SOURCE
from domainbed_reasoning.sweeps.studies.study import FOUR, Grid, Settings, Study, domains_of, for_laptop
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, make_job

_BASELINE = Grid(("ERM",), mllm=False)
OURS = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "RDMLDG"), hparams={"batch_size": 3 * 43})
OF_LAPTOP = replace(OURS, hparams={"batch_size": 3 * 6})

STUDY = Study(
    name="single_source",
    title="one source domain, all others as targets",
    claim="Reasoning transfers from a single domain, where there are no other sources to align with.",
    paper=(
        f"arXiv 2602.23777, single-source generalization: average {SINGLE_SOURCE['RDMLDG']:.2f}, of the best baseline "
        f"{SINGLE_SOURCE['best baseline']:.2f}; the datasets and sources averaged over are not known here"
    ),
    datasets=FOUR,
    grids=(_BASELINE, OURS),
    mini=for_laptop(_BASELINE, OF_LAPTOP),
    one_source=True,
)


def train_jobs(grid: Grid, dataset: str, settings: Settings, sources: Sequence[int] = ()) -> Iterator[TrainJob]:
    """Yield the jobs of a grid on a dataset, for each of the sources; () for each domain."""
    domains = range(domains_of(dataset))
    for trial in range(settings.trials_of(grid)):
        for algorithm in grid.algorithms:
            for source in sources or domains:
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
