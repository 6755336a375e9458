"""Both answers to every image at the last evaluation, written beside DomainBed's results.jsonl.

``predictions.jsonl`` holds a line a sample, ``answers.json`` each split's accuracies by either answer and the share of
chains that named no class; ``task.json`` says from the start what the job is about. DomainBed compares one answer; what
the other would have been is asked of every MLLM method.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from domainbed_reasoning import __version__
from domainbed_reasoning.bridge import stock
from domainbed_reasoning.chains.prompts import PROMPT_VERSION
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.method.answering import answers_from_chains, misled
from domainbed_reasoning.method.task import SampleId, Task

_MOSTLY = 0.5  # share of an evaluation's chains without a class from which its accuracies say little of chains


def write_task(task: Task, hparams: dict[str, Any], args: argparse.Namespace) -> None:
    """Write ``task.json`` beside results.jsonl: what an answer needs that DomainBed's checkpoint does not hold."""
    nothing, other = misled(task)
    said: dict[str, Any] = {
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
    if task.bundle:
        said["chains"] |= {"bundle": task.bundle}
    folder = pathlib.Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # DomainBed's own script has made it
    replace_text(folder / "task.json", json.dumps(said, ensure_ascii=False, indent=1) + "\n")


def records_for(
    task: Task, args: argparse.Namespace, judged_by_chains: bool = False, exact: bool = False
) -> AnswerRecords | None:
    """Return the records of this job; None where samples have no ids.

    Args:
        task: of the job.
        args: of DomainBed's train script.
        judged_by_chains: whether DomainBed's accuracies are those of chains.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    if not task.labels:
        return None
    return AnswerRecords(task, pathlib.Path(args.output_dir), _splits(task, args), judged_by_chains, exact)


def _splits(task: Task, args: argparse.Namespace) -> dict[SampleId, str]:
    """Return the split (``in``, ``out`` or ``uda``) of every sample, as the train script draws it.

    Under ``--uda_holdout_fraction`` a share of a target domain's ``in`` is set aside for domain adaptation, as ``uda``.
    """
    misc = stock.misc()

    splits = {}
    for env, labels in enumerate(task.labels):
        held_out = int(len(labels) * args.holdout_fraction)
        seed = misc.seed_hash(args.trial_seed, env)
        out, kept = misc.split_dataset(range(len(labels)), held_out, seed)
        parts = {"out": out, "in": kept}
        if env in args.test_envs:
            unlabelled = int(len(kept) * getattr(args, "uda_holdout_fraction", 0))
            parts["uda"], parts["in"] = misc.split_dataset(kept, unlabelled, seed)
        splits.update({(env, int(part[i])): name for name, part in parts.items() for i in range(len(part))})
    return splits


class AnswerRecords:
    """Collects the answers of an evaluation; writes those of the last one when every sample has been answered.

    Args:
        task: what is asked.
        folder: of the job.
        splits: of every sample.
        judged_by_chains: whether DomainBed's accuracies are those of chains.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """

    def __init__(
        self,
        task: Task,
        folder: pathlib.Path,
        splits: dict[SampleId, str],
        judged_by_chains: bool = False,
        exact: bool = False,
    ):
        self.judged_by_chains = judged_by_chains
        self.task = task
        self.exact = exact
        self.folder = folder
        self.splits = splits
        self.rows: dict[SampleId, dict[str, Any]] = {}
        self.unparsed = 0
        self.chains = 0

    def add(self, ids: torch.Tensor, chains: Sequence[str] | None, labels: Sequence[int] | None, last: bool) -> None:
        """Take in one batch's answers.

        Args:
            ids: sample ids, ``(n, 2)``.
            chains: n generated chains, or None.
            labels: the classification path's n answers, or None.
            last: whether this is the last evaluation, whose answers are written.
        """
        names = self.task.class_names
        answers = answers_from_chains(chains, names, self.exact) if chains is not None else [None] * len(ids)
        if chains is not None:
            self.chains += len(chains)
            self.unparsed += sum(answer is None for answer in answers)
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
            }
        if len(self.rows) == len(self.splits):
            self._write()

    def report(self, when: str) -> None:
        """Print how many chains of the evaluation before ``when`` named no class, and count anew."""
        if self.chains:
            share = self.unparsed / self.chains
            said = f"{self.unparsed} of {self.chains} chains named no class ({share:.1%})"
            effect = "; its accuracies are mostly or wholly the class names' likelihood, not the chains'"
            loud = self.judged_by_chains and share >= _MOSTLY
            print(f"{'WARNING: ' * loud}Evaluation before {when}: {said}{effect * loud}", flush=True)
        self.unparsed = self.chains = 0

    def _write(self) -> None:
        rows = [self.rows[key] for key in sorted(self.rows)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_text(self.folder / "predictions.jsonl", lines)
        replace_text(self.folder / "answers.json", json.dumps(summarize(rows), indent=1) + "\n")
        self.report("the end")


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, for every environment and split: n, accuracy by ``label`` and ``chain``, and the ``unparsed`` share.

    Accuracies are in [0, 1], None where that answer was not asked for. A chain that names no class counts as wrong
    here; DomainBed's records, where it falls back to the classification path, may be higher.
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
                    "unparsed": _share([row["parsed"] is False for row in part], part[0]["chain"]),
                }
    return table


def _share(hits: Sequence[bool], asked: object) -> float | None:
    return sum(hits) / len(hits) if asked is not None else None
