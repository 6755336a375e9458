"""Finds completed jobs in which a part of the algorithm had no effect, which accuracies do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from domainbed_reasoning.jobs.stage_log import MOSTLY_WELL_FORMED
from domainbed_reasoning.results.job_folders import JobFolder

_MOSTLY = 0.5  # share of chains without a class above which accuracies say little about chains
_MOST_ROUNDS = 1000  # no job has more

Finding = tuple[str, str, str, str]  # kind, detail, effect, fix


def inactive_parts(job: JobFolder) -> Iterator[Finding]:
    """Yield kind, detail, effect and fix of every part of a job that had no effect.

    Args:
        job: with valid records.
    """
    yield from _stages_without_steps(job)
    yield from _rounds_without_chains(job)
    yield from _rounds_of_broken_chains(job)
    yield from _chains_without_class(job)
    yield from _answers_without_class(job)


def _stages_without_steps(job: JobFolder) -> Iterator[Finding]:
    last, rounds = job.records[-1], job.hparams.get("sarr_rounds")
    if "stage" not in last or not _has_rounds(job.args["algorithm"]):
        return
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 0 < rounds <= _MOST_ROUNDS:
        return
    absent = [str(k) for k in range(1, rounds + 1) if f"sarr{k}_accepted" not in last]
    if absent:
        yield (
            "stages without steps",
            f"SARR round {', '.join(absent)} of {rounds} took no step (--steps {job.args.get('steps')})",
            "Counted, as an algorithm with fewer rounds",
            "Rerun it with more --steps, without --steps, or with the intended hparam sarr_rounds.",
        )


def _has_rounds(algorithm: str) -> bool:
    """Return whether an algorithm has SARR rounds: a sweep passes `--hparams` to all of its algorithms."""
    from domainbed_reasoning import registry

    target = registry.ALGORITHMS.get(algorithm)
    return target is not None and "sarr_rounds" in registry.load(target).HPARAMS


def _rounds_without_chains(job: JobFolder) -> Iterator[Finding]:
    last = job.records[-1]
    empty = [k for k in range(1, _MOST_ROUNDS) if _share(last.get(f"sarr{k}_accepted")) == 0]
    if empty:
        yield (
            "nothing kept",
            f"SARR round {', '.join(map(str, empty))} kept none of the model's own chains",
            "Counted; these rounds trained on no chains, with loss 0",
            "Train the supervised stage longer (mtct_epochs) or use other teacher chains; see predictions.jsonl.",
        )


def _rounds_of_broken_chains(job: JobFolder) -> Iterator[Finding]:
    last = job.records[-1]
    shares = {k: _share(last.get(f"sarr{k}_well_formed")) for k in range(1, _MOST_ROUNDS)}
    found = [(k, share) for k, share in shares.items() if share is not None]
    broken = [f"{share:.0%} in round {k}" for k, share in found if share < MOSTLY_WELL_FORMED]
    if broken:
        yield (
            "broken chains",
            f"of the chains that SARR kept, {', '.join(broken)} are well formed, with five stages in order",
            "Counted; these rounds also trained on malformed chains",
            'Rerun it with {"sarr_filter": "well_formed"}, which only keeps well-formed chains.',
        )


def _chains_without_class(job: JobFolder) -> Iterator[Finding]:
    chains = (job.task or {}).get("chains")
    if not isinstance(chains, Mapping):
        return
    total, nothing, other = (_count(chains.get(key)) for key in ("source", "no_class", "other_class"))
    if job.hparams.get("chain_verification") == "unverified":
        other = 0  # used on purpose
    if total and nothing + other:
        yield (
            "misleading chains",
            f"of its {total} teacher chains {nothing} conclude with no class and {other} with a wrong class",
            "Counted",
            "`domainbed-reasoning check` lists these chains; correct or reject them and rerun the job.",
        )


def _answers_without_class(job: JobFolder) -> Iterator[Finding]:
    if job.hparams.get("answer") != "chain":
        return  # chain answers do not affect the accuracy
    splits = [split for env in (job.answers or {}).values() if isinstance(env, Mapping) for split in env.values()]
    found = [
        (count, share)
        for split in splits
        if isinstance(split, Mapping)
        and (count := _count(split.get("n")))
        and (share := _share(split.get("unparsed"))) is not None
    ]
    total = sum(count for count, _ in found)
    unparsed = round(sum(count * share for count, share in found))
    if total and unparsed >= _MOSTLY * total:
        effect = "for these images DomainBed's accuracy is that of the class-name likelihoods, not of the chains"
        if job.hparams.get("on_parse_failure") == "wrong":
            effect = "these images are wrong answers in DomainBed's accuracy"
        yield (
            "no class named",
            f"{unparsed} of the {total} chains of the last evaluation name no class",
            f"Counted; {effect}",
            "See predictions.jsonl: truncated chains need a larger max_new_tokens, others more training; or evaluate "
            'with {"answer": "label"}.',
        )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0


def _share(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= 1 else None
