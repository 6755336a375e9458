"""What `domainbed-reasoning annotate` prints before a run and after it."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.pipeline import AnnotationSettings, PendingImage, Summary
from domainbed_reasoning.annotate.teacher import MAX_EDGE, read_picture
from domainbed_reasoning.chains.rules import ADVICE, RULES
from domainbed_reasoning.chains.store import Record
from domainbed_reasoning.images.catalog import FolderScan
from domainbed_reasoning.terminal import counted


def forecast(
    args: argparse.Namespace,
    settings: AnnotationSettings,
    jobs: Sequence[PendingImage],
    records: Sequence[Record],
    on_disk: FolderScan,
) -> str:
    """Return the work left, the tokens, cost and time of the run as text."""
    total = len(on_disk.pictures)
    if not jobs:
        return nothing_to_do(args, on_disk)
    model = args.teacher.partition(":")[2]
    sizes = list(_sizes(on_disk.root / job.picture.path for job in jobs[:20])) or [(MAX_EDGE, MAX_EDGE)]
    tokens = sum(cost.image_tokens(model, *size) for size in sizes) / len(sizes)
    typical = cost.habits(records, args.teacher, round(tokens + cost.text_tokens(settings.question)))
    endpoints = len(args.base_url or [None])  # each with a concurrency and a limit of its own
    concurrency = args.concurrency * endpoints if args.teacher.startswith("openai:") else 1
    expected = cost.estimate(
        (settings.candidates - job.asked for job in jobs),
        typical,
        settings.price,
        concurrency,
        args.rpm and args.rpm * endpoints,
    )
    known = typical.measured >= cost.ENOUGH
    few = f"fewer than {cost.ENOUGH}" if typical.measured else "no"
    basis = f"measured on {typical.measured} candidates" if known else f"assumed: this teacher has {few} candidates yet"
    money = "unknown (set --price IN OUT)" if expected.dollars is None else f"${expected.dollars:,.2f}"
    hours = f"about {_duration(expected.hours)}, {concurrency} in parallel"
    if args.batch_api:
        hours = f"up to 24 hours for each of up to {settings.candidates} rounds of batches"
    return "\n".join(
        [
            f"images       {len(jobs):,} of {total:,} without a chain",
            f"requests     about {expected.requests:,.0f} (up to {settings.candidates} candidates per image)",
            f"tokens       about {expected.prompt_tokens:,.0f} in, {expected.completion_tokens:,.0f} out",
            f"cost         {money}",
            f"time         {hours}",
            f"per request  {typical.prompt_tokens:,.0f} tokens in, {typical.completion_tokens:,.0f} out, "
            f"{typical.seconds:.1f} s, {typical.acceptance:.0%} accepted ({basis})",
            "Dry run: nothing was sent.",
        ]
    )


def nothing_to_do(args: argparse.Namespace, on_disk: FolderScan) -> str:
    """Return why no image is requested."""
    total = len(on_disk.pictures)
    selection = f"of the first {counted(args.limit, 'image')} (--limit), " if args.limit and args.limit < total else ""
    return f"Nothing to do: {selection}every image has a chain or no candidate left ({total:,} images in total)."


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    """Yield the sizes in pixels of the images that can be read, as they are sent."""
    from PIL import Image

    for path in paths:
        with contextlib.suppress(OSError), Image.open(io.BytesIO(read_picture(path)[0])) as picture:
            yield picture.size


def report(summary: Summary, jobs: int) -> str:
    """Return the summary of a run as text."""
    judged = summary.accepted + summary.rejected.total()
    rate = 3600 * judged / summary.seconds if summary.seconds else 0.0
    known = judged > summary.unpriced or not (judged or summary.unknown) or summary.dollars > 0
    money = f"${summary.dollars:.4f}" if known else "cost unknown"
    if 0 < summary.unpriced < judged:
        money += f" plus {summary.unpriced:,} of unknown cost"
    lines = [
        f"{summary.accepted:,} of {counted(jobs, 'image')} got a chain; {counted(judged, 'candidate')} in "
        f"{summary.seconds:,.0f} s ({rate:,.0f} an hour); {summary.prompt_tokens:,} tokens in, "
        f"{summary.completion_tokens:,} out, {money}."
    ]
    if summary.unknown_dollars:
        lines.append(
            f"{counted(summary.unknown, 'request')} without reported usage (time-outs, invalid responses) may cost "
            f"up to ${summary.unknown_dollars:.4f} more, which counts toward --max-cost."
        )
    lines += [f"  rejected {count:>6,}  {rule}" for rule, count in summary.rejected.most_common()]
    if summary.exhausted:
        have = "has" if summary.exhausted == 1 else "have"
        more = "" if summary.rejected["cut"] == summary.rejected.total() else "; increase --candidates to request more"
        lines.append(f"{counted(summary.exhausted, 'image')} {have} no candidate left{more}.")
    if summary.rejected["cut"]:
        lines.append(
            f"{counted(summary.rejected['cut'], 'candidate')} truncated at --max-tokens. Rerun with a larger "
            "--max-tokens; truncated candidates then do not count toward --candidates."
        )
    for title, images in (("could not be read", summary.unreadable), ("got no answer", summary.unanswered)):
        if images:
            first = "".join(f"\n  {image}: {reason}" for image, reason in list(images.items())[:5])
            lines.append(f"{counted(len(images), 'image')} {title}:{first}")
    if summary.rejected and not summary.accepted:
        lines.append(_why_nothing(summary))
    elif summary.stopped:
        lines.append(f"Stopped early: {summary.stopped}. Rerun the command to resume.")
    return "\n".join(lines)


def _why_nothing(summary: Summary) -> str:
    """Return the most frequent rule of a run that accepted nothing, what to do, and an example."""
    rule, count = summary.rejected.most_common(1)[0]
    example = summary.examples[rule]
    text = " ".join(example["chain"].split())
    shown = text if len(text) <= 400 else f"{text[:200]} […] {text[-200:]}"
    stopped = f"Stopped early: {summary.stopped}. " if summary.stopped else ""
    return (
        f"{stopped}None of {counted(summary.rejected.total(), 'candidate')} was accepted. Most frequent rule: {rule} "
        f"({count:,}): {RULES[rule]}. {ADVICE.get(rule, 'Use another teacher')}.\n"
        f"  for example {example['image']}: {example['reason']}\n  {shown}\n"
        "Use `annotate --rejudge` to re-evaluate these candidates with other options, at no cost."
    )
