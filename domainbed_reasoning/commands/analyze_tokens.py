"""`analyze token-shift` and `analyze entropy`: predictions of the same tokens before and after training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from domainbed_reasoning.analysis import entropy, plots, target_tokens, token_shift
from domainbed_reasoning.analysis.checkpoints import Checkpoint, open_checkpoint, words_of_file
from domainbed_reasoning.analysis.data import AnalysisData
from domainbed_reasoning.analysis.target_tokens import Labeling, TargetTexts, TokenTable
from domainbed_reasoning.commands.analyze_results import data_for, job_of, plot, results_for, write
from domainbed_reasoning.mllm import MLLM


def run_token_shift(args: argparse.Namespace) -> None:
    """Compare the probabilities of target tokens under the two models."""
    after, before = _after_and_before(args, args.after)
    targets = Path(args.targets).stem
    results = results_for(args, f"token_shift_{words_of_file(targets)}_{after.tag}", after)
    chains = True if args.targets == "teacher" else False if args.targets in ("label", "own") else args.targets
    material = data_for(args, after, chains)
    samples = material.draw(material.domains(args.domains), args.images, chained=bool(chains))

    def answers_of(mllm: MLLM) -> dict[str, TargetTexts]:
        if args.targets == "own":
            return {targets: target_tokens.own_targets(mllm, material, samples, _labeling(after))}
        read = target_tokens.label_targets if args.targets == "label" else target_tokens.teacher_targets
        return {targets: read(material, samples)}

    answers, tables = _first_pass(args, before, after, material, answers_of)
    first, second = tables[targets], _second_pass(args, before, after, material, answers[targets], tables[targets])
    columns = {"dataset": job_of(after).dataset, "before": before.where, "after": after.where, "targets": targets}
    rows = [{**columns, **row} for row in token_shift.shift(first, second)]
    title = f"{before.title} to {after.title}, {targets} targets"
    findings = token_shift.found_in(rows[0], token_shift.PAPER_RISEN.get(args.targets))
    if args.targets == "own":
        findings.append(f"{token_shift.OWN}; these: {_labeling(after).description}")
    write(results, title, rows, findings, token_shift.PAPER)
    plot(results, lambda path: plots.token_shift(first, second, title, path))


def run_entropy(args: argparse.Namespace) -> None:
    """Find the tokens whose entropy training reduces most, in teacher and in self-generated chains."""
    after, before = _after_and_before(args, args.after)
    of_own = open_checkpoint(args.after_own, args.trust_remote_code) if args.after_own else after
    labeling = _labeling(of_own)
    results = results_for(args, f"entropy_{after.tag}", after)
    material = data_for(args, after, True)
    samples = material.draw(material.domains(args.domains), args.images, chained=True)

    def answers_of(mllm: MLLM) -> dict[str, TargetTexts]:
        own = target_tokens.own_targets(mllm, material, samples, labeling)
        return {"teacher": target_tokens.teacher_targets(material, samples), "self-generated": own}

    answers, first = _first_pass(args, before, after, material, answers_of)
    found = {}
    for source, checkpoint in (("teacher", after), ("self-generated", of_own)):
        second = _second_pass(args, before, checkpoint, material, answers[source], first[source])
        found[source] = entropy.reductions(first[source], second)
    top = [{"chains": source, **row} for source, rows in found.items() for row in rows[: entropy.TOP]]
    title = f"Entropy reduction: {before.title} to {after.title} and {of_own.title}"
    columns = {"dataset": job_of(after).dataset, "before": before.where}
    ends = {"teacher": after.where, "self-generated": of_own.where}
    everything = [
        {**columns, "after": ends[source], "chains": source, **row} for source, rows in found.items() for row in rows
    ]
    shared = entropy.overlap(found["teacher"], found["self-generated"])
    in_class = {source: sum(row["of_class"] for row in rows[: entropy.TOP]) for source, rows in found.items()}
    findings = [
        f"tokens in both lists of {entropy.TOP}: {100 * shared:.0f}% of their union (paper: none)",
        f"conclusion tokens among them: teacher {in_class['teacher']}, own {in_class['self-generated']}",
        f"own chains: {labeling.description}",
    ]
    write(results, title, everything, findings, entropy.PAPER, shown=top)
    plot(results, lambda path: plots.entropy(found, entropy.TOP, title, path))


def _first_pass(
    args: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: AnalysisData,
    answers_of: Callable[[MLLM], dict[str, TargetTexts]],
) -> tuple[dict[str, TargetTexts], dict[str, TokenTable]]:
    """Return the answers by name, and their tokens' statistics under the model before training, which is then freed."""
    mllm = before.load(args.model)
    answers = answers_of(mllm)
    return answers, {
        name: target_tokens.read_tokens(mllm, material, one, _batch(after)) for name, one in answers.items()
    }


def _second_pass(
    args: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: AnalysisData,
    answers: TargetTexts,
    first: TokenTable,
) -> TokenTable:
    """Return the same tokens' statistics under the model after training, which is then freed."""
    mllm = after.load(args.model)
    target_tokens.check_same_tokens(mllm, answers, first, before.title, after.title)
    return target_tokens.read_tokens(mllm, material, answers, _batch(after))


def _batch(checkpoint: Checkpoint) -> int:
    return min(16, int(job_of(checkpoint).hparams["eval_batch"]))


def _labeling(checkpoint: Checkpoint) -> Labeling:
    return target_tokens.labeling_of(job_of(checkpoint).hparams)


def _after_and_before(args: argparse.Namespace, folder: str) -> tuple[Checkpoint, Checkpoint]:
    after = open_checkpoint(folder, args.trust_remote_code)
    job_of(after)
    before = open_checkpoint(args.before, args.trust_remote_code) if args.before else after.untrained(args.model)
    return after, before if before.job else after.untrained(args.before)
