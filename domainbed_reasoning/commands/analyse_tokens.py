"""`analyse token-shift` and `analyse entropy`: the same tokens under a model before and after its training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from domainbed_reasoning.analysis import entropy, plots, target_tokens, token_shift
from domainbed_reasoning.analysis.checkpoints import Checkpoint, open_checkpoint, words_of_file
from domainbed_reasoning.analysis.data import AnalysisData
from domainbed_reasoning.analysis.target_tokens import Labelling, TargetTexts, TokenTable
from domainbed_reasoning.commands.analyse_results import data_for, job_of, plot, results_for, write
from domainbed_reasoning.mllm import MLLM


def run_token_shift(given: argparse.Namespace) -> None:
    """Compare the probabilities of given answers' tokens under the two models."""
    after, before = _after_and_before(given, given.after)
    targets = Path(given.targets).stem
    results = results_for(given, f"token_shift_{words_of_file(targets)}_{after.tag}", after)
    chains = True if given.targets == "teacher" else False if given.targets in ("label", "own") else given.targets
    material = data_for(given, after, chains)
    samples = material.draw(material.domains(given.domains), given.images, chained=bool(chains))

    def answers_of(mllm: MLLM) -> dict[str, TargetTexts]:
        if given.targets == "own":
            return {targets: target_tokens.own_targets(mllm, material, samples, _labelling(after))}
        read = target_tokens.label_targets if given.targets == "label" else target_tokens.teacher_targets
        return {targets: read(material, samples)}

    answers, tables = _first_pass(given, before, after, material, answers_of)
    first, second = tables[targets], _second_pass(given, before, after, material, answers[targets], tables[targets])
    told = {"dataset": job_of(after).dataset, "before": before.where, "after": after.where, "targets": targets}
    rows = [{**told, **row} for row in token_shift.shift(first, second)]
    title = f"{before.said} to {after.said}, {targets} targets"
    found = token_shift.found_in(rows[0], token_shift.PAPER_RISEN.get(given.targets))
    if given.targets == "own":
        found.append(f"{token_shift.OWN}; these: {_labelling(after).said}")
    write(results, title, rows, found, token_shift.PAPER)
    plot(results, lambda path: plots.token_shift(first, second, title, path))


def run_entropy(given: argparse.Namespace) -> None:
    """Find the tokens whose entropy training reduces most, in a teacher's chains and in own ones."""
    after, before = _after_and_before(given, given.after)
    of_own = open_checkpoint(given.after_own) if given.after_own else after
    labelling = _labelling(of_own)
    results = results_for(given, f"entropy_{after.tag}", after)
    material = data_for(given, after, True)
    samples = material.draw(material.domains(given.domains), given.images, chained=True)

    def answers_of(mllm: MLLM) -> dict[str, TargetTexts]:
        own = target_tokens.own_targets(mllm, material, samples, labelling)
        return {"teacher": target_tokens.teacher_targets(material, samples), "self-generated": own}

    answers, first = _first_pass(given, before, after, material, answers_of)
    found = {}
    for source, checkpoint in (("teacher", after), ("self-generated", of_own)):
        second = _second_pass(given, before, checkpoint, material, answers[source], first[source])
        found[source] = entropy.reductions(first[source], second)
    top = [{"chains": source, **row} for source, rows in found.items() for row in rows[: entropy.TOP]]
    title = f"Entropy reduction: {before.said} to {after.said} and {of_own.said}"
    told = {"dataset": job_of(after).dataset, "before": before.where}
    ends = {"teacher": after.where, "self-generated": of_own.where}
    everything = [
        {**told, "after": ends[source], "chains": source, **row} for source, rows in found.items() for row in rows
    ]
    shared = entropy.overlap(found["teacher"], found["self-generated"])
    in_class = {source: sum(row["of_class"] for row in rows[: entropy.TOP]) for source, rows in found.items()}
    said = [
        f"tokens that both lists of {entropy.TOP} share: {100 * shared:.0f}% of their union (paper: none)",
        f"tokens of conclusions among them: teacher {in_class['teacher']}, own {in_class['self-generated']}",
        f"own chains: {labelling.said}",
    ]
    write(results, title, everything, said, entropy.PAPER, shown=top)
    plot(results, lambda path: plots.entropy(found, entropy.TOP, title, path))


def _first_pass(
    given: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: AnalysisData,
    answers_of: Callable[[MLLM], dict[str, TargetTexts]],
) -> tuple[dict[str, TargetTexts], dict[str, TokenTable]]:
    """Return the answers by name, and what the model before training expects at their tokens; it is gone then."""
    mllm = before.load(given.model)
    answers = answers_of(mllm)
    return answers, {
        name: target_tokens.read_tokens(mllm, material, one, _batch(after)) for name, one in answers.items()
    }


def _second_pass(
    given: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: AnalysisData,
    answers: TargetTexts,
    first: TokenTable,
) -> TokenTable:
    """Return what the model after training expects at the same tokens; it is gone then."""
    mllm = after.load(given.model)
    target_tokens.check_same_tokens(mllm, answers, first, before.said, after.said)
    return target_tokens.read_tokens(mllm, material, answers, _batch(after))


def _batch(checkpoint: Checkpoint) -> int:
    return min(16, int(job_of(checkpoint).hparams["eval_batch"]))


def _labelling(checkpoint: Checkpoint) -> Labelling:
    return target_tokens.labelling_of(job_of(checkpoint).hparams)


def _after_and_before(given: argparse.Namespace, folder: str) -> tuple[Checkpoint, Checkpoint]:
    after = open_checkpoint(folder)
    job_of(after)
    before = open_checkpoint(given.before) if given.before else after.untrained(given.model)
    return after, before if before.job else after.untrained(given.before)
