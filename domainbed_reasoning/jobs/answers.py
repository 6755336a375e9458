"""Both answers for every image at the last evaluation, written beside DomainBed's results.jsonl.

``predictions.jsonl`` has one line per sample. ``answers.json`` has the accuracies of each split by both answers, and
the shares of chains that name no class and that are well formed. ``task.json`` describes the job and is written at
its start. DomainBed itself only records one answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning import __version__
from domainbed_reasoning.bridge import stock
from domainbed_reasoning.bridge.samples import environment_of
from domainbed_reasoning.chains.prompts import PROMPT_VERSION
from domainbed_reasoning.chains.reader import is_well_formed
from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.jobs.values import TASK_VERSION
from domainbed_reasoning.method.answering import answers_from_chains, misled
from domainbed_reasoning.method.task import SampleId, Task
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_MOSTLY = 0.5  # share of chains without a class above which an evaluation's accuracy says little about chains


def write_task(task: Task, hparams: dict[str, Any], args: argparse.Namespace) -> None:
    """Write ``task.json`` beside results.jsonl, which `predict` needs in addition to DomainBed's checkpoint."""
    nothing, other = misled(task, hparams.get("answer_matching") == "exact")
    content: dict[str, Any] = {
        format_version.KEY: TASK_VERSION,
        "algorithm": args.algorithm,
        "dataset": task.dataset,
        "subject": task.subject,
        "class_names": list(task.class_names),
        "environments": list(task.environments),
        "test_envs": list(args.test_envs),
        "prompt_version": PROMPT_VERSION,
        "version": __version__,
        "hparams": dict(hparams),
        "chains": {"source": len(task.chains), "no_class": len(nothing), "other_class": len(other)},
    }
    if task.offered:
        content["offered"] = [[task.class_names[label] for label in labels] for labels in task.offered]
    if task.bundle:
        content["chains"] |= {"bundle": task.bundle}
    folder = pathlib.Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # DomainBed's own script has created it
    replace_text(folder / "task.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def records_for(task: Task, args: argparse.Namespace, hparams: Mapping[str, Any]) -> AnswerRecords | None:
    """Return the answer records of this job; None if samples have no ids.

    Args:
        task: of the job.
        args: of DomainBed's train script.
        hparams: of the job.
    """
    if not task.labels:
        return None
    return AnswerRecords(task, pathlib.Path(args.output_dir), _splits(task, args), hparams)


class Splits:
    """The split (``in``, ``out`` or ``uda``) of every sample, a byte each.

    Args:
        sizes: number of images of each environment.
    """

    NAMES = ("in", "out", "uda")

    def __init__(self, sizes: Sequence[int]):
        self._of = [bytearray(size) for size in sizes]

    def assign(self, env: int, name: str, indices: Iterable[int]) -> None:
        """Put samples of an environment into the split of that name."""
        of, number = self._of[env], self.NAMES.index(name)
        for index in indices:
            of[index] = number

    def __getitem__(self, sample: SampleId) -> str:
        """Return the name of a sample's split."""
        return self.NAMES[self._of[sample[0]][sample[1]]]

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(map(len, self._of))


def _splits(task: Task, args: argparse.Namespace) -> Splits:
    """Return the split (``in``, ``out`` or ``uda``) of every sample, as the train script draws it.

    With ``--uda_holdout_fraction``, a share of a target domain's ``in`` is held out for domain adaptation, as ``uda``.
    """
    misc = stock.misc()

    splits = Splits([len(labels) for labels in task.labels])
    for env, labels in enumerate(task.labels):
        held_out = int(len(labels) * args.holdout_fraction)
        seed = misc.seed_hash(args.trial_seed, env)
        out, kept = misc.split_dataset(range(len(labels)), held_out, seed)
        parts = {"out": out, "in": kept}
        if env in args.test_envs:
            unlabeled = int(len(kept) * getattr(args, "uda_holdout_fraction", 0))
            parts["uda"], parts["in"] = misc.split_dataset(kept, unlabeled, seed)
        for name, part in parts.items():
            splits.assign(env, name, (int(part[i]) for i in range(len(part))))
    return splits


class AnswerRecords:
    """Collects the answers of an evaluation; writes those of the last one once every sample has been answered.

    Args:
        task: of the job.
        folder: of the job.
        splits: the split of every sample.
        hparams: of the job; uses ``answer``, ``answer_matching`` and ``on_parse_failure`` if present.

    Attributes:
        evaluated: values to add to DomainBed's record of the current evaluation: ``well_formed``, the share of
            well-formed chains in [0, 1]; empty if no chains were generated, or once it has been recorded.
    """

    def __init__(
        self,
        task: Task,
        folder: pathlib.Path,
        splits: Splits | Mapping[SampleId, str],
        hparams: Mapping[str, Any] | None = None,
    ):
        hparams = hparams or {}
        self.judged_by_chains = hparams.get("answer") == "chain"
        self.strict = hparams.get("on_parse_failure") == "wrong"
        self.exact = hparams.get("answer_matching") == "exact"
        self.task = task
        self.folder = folder
        self.splits = splits
        self.rows: dict[SampleId, dict[str, Any]] = {}
        self.evaluated: dict[str, float] = {}
        self.unparsed = 0
        self.chains = 0
        self.well_formed = 0

    def add(self, ids: torch.Tensor, chains: Sequence[str] | None, labels: Sequence[int] | None, last: bool) -> None:
        """Add one batch's answers.

        Args:
            ids: sample ids, ``(n, 2)``.
            chains: n generated chains, or None.
            labels: the classification path's n answers, or None.
            last: whether this is the last evaluation, whose answers are written.
        """
        names, offered = self.task.class_names, self.task.classes_offered(environment_of(self.task, ids))
        answers: Sequence[int | None] = [None] * len(ids)
        if chains is not None:
            read = answers_from_chains(chains, [names[label] for label in offered], self.exact)
            answers = [None if place is None else offered[place] for place in read]
        whole = [is_well_formed(chain, self.exact) for chain in chains] if chains is not None else [None] * len(ids)
        if chains is not None:
            self.chains += len(chains)
            self.unparsed += sum(answer is None for answer in answers)
            self.well_formed += sum(map(bool, whole))
            self.evaluated = {"well_formed": self.well_formed / self.chains}
        if not last:
            return
        for row, ((env, index), answer) in enumerate(zip(ids.tolist(), answers, strict=True)):
            self.rows[env, index] = {
                "env": env,
                "index": index,
                "image": self.task.images[env][index],
                "split": self.splits[env, index],
                "label": names[self.task.labels[env][index]],
                "label_answer": names[labels[row]] if labels is not None else None,
                "chain_answer": names[answer] if answer is not None else None,
                "chain": chains[row] if chains is not None else None,
                "parsed": answer is not None if chains is not None else None,
                "well_formed": whole[row],
            }
        if len(self.rows) == len(self.splits):
            self._write()

    def report(self, when: str) -> None:
        """Print the number of chains that named no class in the evaluation before ``when``, and reset the counts."""
        if self.chains:
            share = self.unparsed / self.chains
            counts = f"{self.unparsed} of {self.chains} chains named no class ({share:.1%})"
            counts += f", {self.well_formed / self.chains:.1%} are well formed"
            effect = "; its accuracies mostly reflect class-name likelihoods, not chains"
            effect = "; each of these counts as wrong" if self.strict else effect
            loud = self.judged_by_chains and share >= _MOSTLY
            level = logging.WARNING if loud else logging.INFO
            _log.log(level, f"{'WARNING: ' * loud}Evaluation before {when}: {counts}{effect * loud}")
        self.unparsed = self.chains = self.well_formed = 0

    def _write(self) -> None:
        rows = [self.rows[key] for key in sorted(self.rows)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_text(self.folder / "predictions.jsonl", lines)
        replace_text(self.folder / "answers.json", json.dumps(summarize(rows), indent=1) + "\n")
        self.report("the end")


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, for every environment and split, n and shares of images in [0, 1].

    Returns:
        Accuracies by ``label``, by ``chain`` (a chain that names no class counts as wrong) and by ``chain_or_label``
        (such a chain falls back to the classification path); the shares of chains that are ``unparsed`` (name no
        class) and ``well_formed``. None if that answer was not computed. DomainBed's records use ``chain_or_label``
        or, with the hparam ``on_parse_failure="wrong"``, ``chain``.
    """
    table: dict[str, Any] = {}
    for env in sorted({row["env"] for row in rows}):
        for split in ("in", "out", "uda"):
            part = [row for row in rows if row["env"] == env and row["split"] == split]
            if part:
                table.setdefault(f"env{env}", {})[split] = {
                    "n": len(part),
                    "label": _share([row["label_answer"] == row["label"] for row in part], part[0]["label_answer"]),
                    "chain": _share([row["chain_answer"] == row["label"] for row in part], part[0]["chain"]),
                    "chain_or_label": _share(*_fallen_back(part)),
                    "unparsed": _share([row["parsed"] is False for row in part], part[0]["chain"]),
                    "well_formed": _share([row["well_formed"] for row in part], part[0]["chain"]),
                }
    return table


def _fallen_back(part: Sequence[dict[str, Any]]) -> tuple[list[bool], object]:
    answers = [row["chain_answer"] or row["label_answer"] for row in part]
    hits = [answer == row["label"] for answer, row in zip(answers, part, strict=True)]
    return hits, part[0]["chain"] if all(answers) else None


def _share(hits: Sequence[bool], asked: object) -> float | None:
    return sum(hits) / len(hits) if asked is not None else None
