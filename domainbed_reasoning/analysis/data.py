"""The data of an analysis: images, class names and chains of a dataset, as in a job."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning import registry
from domainbed_reasoning.analysis.checkpoints import records_of
from domainbed_reasoning.bridge import stock
from domainbed_reasoning.chains.bundled import BUNDLED
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.chains.store import load_chains
from domainbed_reasoning.datasets.base import source_chains
from domainbed_reasoning.jobs.trained import TrainedJob
from domainbed_reasoning.method.task import SampleId, Task


@dataclass(frozen=True)
class AnalysisData:
    """A dataset with one choice of target domains.

    Attributes:
        task: names, labels and chains.
        environments: for every domain, its images by index.
    """

    task: Task
    environments: Sequence[Any]

    @property
    def q_cls(self) -> str:
        """The question of the classification path."""
        return q_cls(self.task.class_names, self.task.subject)

    @property
    def q_reason(self) -> str:
        """The question of the reasoning path."""
        return q_reason(self.task.class_names, self.task.subject)

    @property
    def sources(self) -> list[int]:
        """Numbers of the source domains."""
        return [env for env in range(len(self.task.environments)) if env not in self.task.test_envs]

    def label(self, sample: SampleId) -> int:
        """Return the class of a sample."""
        return self.task.labels[sample[0]][sample[1]]

    def name(self, sample: SampleId) -> str:
        """Return the class name of a sample."""
        return self.task.class_names[self.label(sample)]

    def pixels(self, samples: Sequence[SampleId]) -> torch.Tensor:
        """Return images as bytes, ``(n, 3, H, W)``."""
        return torch.stack([self.environments[env][index][0].as_subclass(torch.Tensor) for env, index in samples])

    def draw(self, domains: Sequence[int], count: int, seed: int = 0, chained: bool = False) -> list[SampleId]:
        """Return ``count`` samples in order, equally many from each domain; all if there are fewer.

        Args:
            domains: numbers of the domains.
            count: number of samples; 0 for all.
            seed: random seed.
            chained: only samples with a chain.

        Raises:
            ValueError: if there are no samples, or ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"--images must be 0 (all) or more; got {count}.")
        drawn: list[SampleId] = []
        for position, env in enumerate(domains):
            known = [(env, index) for index in range(len(self.task.labels[env]))]
            known = [sample for sample in known if not chained or sample in self.task.chains]
            share = count * (position + 1) // len(domains) - count * position // len(domains)
            drawn += sorted(random.Random(seed).sample(known, min(share, len(known)))) if count else known
        if not drawn:
            raise ValueError(
                f"{self.task.dataset}: no images{' with chains' if chained else ''} in the selected domains."
            )
        return drawn

    def domains(self, chosen: Sequence[str]) -> list[int]:
        """Return the indices of domains specified by index or name, or as ``sources``, ``target`` or ``all``.

        Raises:
            ValueError: for an unknown domain.
        """
        names = self.task.environments
        words = {"sources": self.sources, "target": list(self.task.test_envs), "all": list(range(len(names)))}
        words |= {name: [env] for env, name in enumerate(names)}
        words |= {str(env): [env] for env in range(len(names))}
        found: list[int] = []
        for word in chosen:
            if word not in words:
                raise registry.unknown("domain", word, words)
            found += [env for env in words[word] if env not in found]
        return found


def data_of_job(
    job: TrainedJob,
    data_dir: str | None = None,
    chains: bool | str = False,
    model: str | None = None,
) -> AnalysisData:
    """Return the data that a job was trained and tested on.

    Args:
        job: the job.
        data_dir: folder of the data; None: as in the job.
        chains: whether to read chains, or a chain file to use instead of the job's.
        model: base model, if the job's path no longer exists.

    Raises:
        ValueError: for a dataset that is not ours.
        FileNotFoundError: where the data or chains are not there.
    """
    records = records_of(job.folder)
    original = records[0]["args"].get("data_dir") if records else None
    replaced = {"model": model, "revision": job.revision(model)} if model else {}
    hparams = {**job.hparams, **replaced, "trust_remote_code": job.trust_remote_code}
    return build_data(job.dataset, data_dir or original, job.test_envs, hparams, chains)


def build_data(
    dataset: str,
    data_dir: str | None,
    test_envs: Sequence[int],
    hparams: Mapping[str, Any] | None = None,
    chains: bool | str = False,
    clip: str | None = None,
) -> AnalysisData:
    """Return a dataset as DomainBed builds it for an MLLM algorithm, without augmentation.

    Args:
        dataset: name of one of our datasets.
        data_dir: the folder that contains the dataset's folder; None for a rendered dataset.
        test_envs: the target domains, whose chains are not read; [] makes all domains sources.
        hparams: of a job; missing ones have their defaults.
        chains: whether to read chains, or a chain file, or ``bundled``.
        clip: the CLIP model for which images are prepared, instead of an MLLM.

    Raises:
        ValueError: for a dataset that is not ours.
        FileNotFoundError: where the data or chains are not there.
    """
    datasets, hparams_registry = stock.datasets(), stock.hparams_registry()

    is_bundle = chains == BUNDLED
    if is_bundle and getattr(vars(datasets).get(dataset), "BUNDLE", None) is None:
        raise ValueError(f"{dataset} has no bundled chains.")
    algorithm = "MTCT" if chains is True or is_bundle else "MLLMZeroShot"
    settings = hparams_registry.default_hparams("MTCT", dataset) | dict(hparams or {})
    settings |= {"algorithm": algorithm, "data_augmentation": False, "mtct_epochs": 1, "batch_size": 1}
    settings |= {"chains": BUNDLED} if is_bundle else {}
    if dataset not in vars(datasets):
        raise registry.unknown("dataset", dataset, registry.DATASETS)
    if clip is not None:
        settings["model"] = "tiny"  # names and chains do not depend on the model
    built = vars(datasets)[dataset](data_dir, list(test_envs), settings)
    task = getattr(built, "task", None)
    if task is None:
        raise ValueError(f"{dataset} has no class names and no chains: use {dataset}Reasoning.")
    if task.offered:
        raise ValueError(
            f"{dataset}: analyses ask one question about all images, but the questions of its environments offer "
            "different classes. Analyze a job on a dataset whose environments share their classes."
        )
    if isinstance(chains, str) and not is_bundle:
        known = {image for images in task.images for image in images}
        texts = load_chains(pathlib.Path(chains).expanduser(), known)
        task = dataclasses.replace(task, chains=source_chains(texts, task.images, test_envs))
    if clip is not None:
        settings |= {"algorithm": "CLIPZeroShot", "clip_model": clip}
        built = vars(datasets)[dataset](data_dir, list(test_envs), settings)
    return AnalysisData(task, list(built))
