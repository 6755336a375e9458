"""Annotation: draws candidates from a teacher, judges each and appends it to the chain file.

Every candidate is judged and appended before the next one of its image is requested, and answered candidates are
skipped on restart: rerun a killed run to resume it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.teacher import (
    Answer,
    NoAnswer,
    Request,
    Teacher,
    TeacherError,
    read_picture,
    seed_of,
)
from domainbed_reasoning.chains.record import is_accepted
from domainbed_reasoning.chains.rules import Rules, make_printable, with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, ChainFileError, ChainWriter, Record
from domainbed_reasoning.images.catalog import Picture
from domainbed_reasoning.images.decode import reject_truncated_images

# Longer candidates are not chains; the store keeps their beginning.
_MAX_CHARACTERS = 80_000

# The run stops if this many candidates were rejected and none was accepted.
_HOPELESS = 30

NOTHING_ACCEPTED = "no candidate was accepted"


@dataclass(frozen=True)
class AnnotationSettings:
    """How candidates are drawn.

    Attributes:
        question: the prompt, the same for every image.
        prompt_version: written to every record.
        candidates: maximum per image; drawing ends at the first accepted one.
        max_tokens: of an answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling in (0, 1].
        price: dollars per million tokens, input and output; None if unknown.
    """

    question: str
    prompt_version: str
    candidates: int = 4
    max_tokens: int = 768
    temperature: float = 1.0
    top_p: float = 1.0
    price: tuple[float, float] | None = None


@dataclass(frozen=True)
class PendingImage:
    """An image that needs a chain.

    Attributes:
        picture: the image.
        label: index of its class.
        asked: number of rejected candidates that count toward the maximum.
        first: number of the next attempt, so that no seed is used twice.
    """

    picture: Picture
    label: int
    asked: int = 0
    first: int = 0


@dataclass
class Summary:
    """The results of a run.

    Attributes:
        accepted: number of accepted candidates.
        rejected: number of rejected candidates, by rule.
        unreadable: images that could not be read, with the reason.
        unanswered: images without an answer, with the reason; the next run requests them again.
        exhausted: images whose candidates were all rejected.
        prompt_tokens: total.
        completion_tokens: total.
        dollars: total, without requests of unknown cost.
        unpriced: candidates of unknown cost.
        unknown: requests, candidates included, that may have been billed without reported usage.
        unknown_dollars: estimated maximum of their cost.
        unsaved: candidates that could not be written.
        seconds: of the run.
        stopped: why the run ended early, empty if it did not.
        examples: the first rejected candidate of each rule.
        failed: the error that ended the run, if any.
    """

    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)
    exhausted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    unpriced: int = 0
    unknown: int = 0
    unknown_dollars: float = 0.0
    unsaved: int = 0
    seconds: float = 0.0
    stopped: str = ""
    examples: dict[str, Record] = field(default_factory=dict)

    @property
    def is_hopeless(self) -> bool:
        """Whether at least `_HOPELESS` candidates were rejected and none was accepted."""
        return not self.accepted and self.rejected.total() >= _HOPELESS

    failed: str = ""


def plan(
    pictures: Sequence[Picture],
    classes: Sequence[str],
    records: Iterable[Mapping[str, Any]],
    teacher: str,
    prompt_version: str,
    candidates: int,
    limit: int | None = None,
    max_tokens: int = 0,
) -> list[PendingImage]:
    """Return the images that need a chain, shuffled within rounds of one image per domain and class.

    This balances a run with a limit, and the order in which a server sees the images does not reveal their labels.

    Args:
        pictures: of the dataset.
        classes: class folders in label order.
        records: of the chain file. An image with an accepted chain of any teacher is done; rejected candidates of the
            same teacher and prompt count toward ``candidates``.
        teacher: name.
        prompt_version: of the prompt.
        candidates: maximum per image.
        limit: number of images including finished ones; None: all.
        max_tokens: of an answer; a candidate that was truncated at fewer does not count toward ``candidates``.
    """
    done: set[str] = set()
    asked: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    following: dict[str, int] = {}  # attempt after the latest: lines may have been deleted
    for record in records:
        if is_accepted(record):
            done.add(record["image"])
        elif record.get("teacher") == teacher and record.get("prompt_version") == prompt_version:
            image, attempt = record["image"], record.get("attempt")
            drawn[image] += 1
            following[image] = max(following.get(image, 0), attempt + 1 if isinstance(attempt, int) else 0)
            asked[record["image"]] += not _was_cut_below(record, max_tokens)
    labels = {name: index for index, name in enumerate(classes)}
    ordered = list(_interleaved(pictures))[:limit]
    return [
        PendingImage(picture, labels[picture.label], asked[path], max(drawn[path], following.get(path, 0)))
        for picture in ordered
        if (path := picture.path) not in done and asked[path] < candidates
    ]


def _was_cut_below(record: Mapping[str, Any], max_tokens: int) -> bool:
    """Return whether a rejected candidate was truncated at fewer tokens than ``max_tokens``."""
    limit = (record.get("sampling") or {}).get("max_tokens")
    return record.get("rule") == "cut" and isinstance(limit, int) and limit < max_tokens


def _interleaved(pictures: Sequence[Picture]) -> Iterator[Picture]:
    groups: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault((picture.domain, picture.label), []).append(picture)
    shuffle = random.Random(0).shuffle
    for group in groups.values():
        shuffle(group)
    while groups:
        this_round = [group.pop() for group in groups.values()]
        shuffle(this_round)
        yield from this_round
        groups = {key: group for key, group in groups.items() if group}


class Annotation:
    """One run over a list of jobs.

    Args:
        root: the dataset's folder.
        teacher: to request candidates from.
        writer: of the chain file.
        rules: for judging candidates.
        settings: how candidates are drawn.
        budget: limits of the run.
        on_record: called after every candidate, for a progress bar.
        has_accepted: whether an earlier run accepted candidates of this teacher and prompt. If not, the run stops after
            30 rejections without an acceptance.
    """

    def __init__(
        self,
        root: Path,
        teacher: Teacher,
        writer: ChainWriter,
        rules: Rules,
        settings: AnnotationSettings,
        budget: cost.Budget,
        on_record: Callable[[Record, Summary], None] = lambda record, summary: None,
        has_accepted: bool = False,
    ):
        """Begin with an empty summary."""
        self.summary = Summary()
        self._root = root
        self._teacher = teacher
        self._writer = writer
        self._rules = rules
        self._settings = settings
        self._budget = budget
        self._on_record = on_record
        self._has_accepted = has_accepted
        self._failures_in_a_row = 0
        self._unwritten: OSError | ChainFileError | None = None

    async def run(self, jobs: Iterable[PendingImage]) -> Summary:
        """Process the jobs and return the summary; on Ctrl-C, requests in progress complete first.

        Raises:
            TeacherError: the teacher cannot be used; all answers so far are saved.
            ChainFileError: the chain file was deleted, replaced or truncated during the run.
            OSError: it cannot be written.
        """
        began = time.monotonic()
        # Outside of the main thread and on Windows, Ctrl-C ends the run at once; no received answer is lost.
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            with reject_truncated_images():
                await self._work_off(jobs)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self.summary.seconds = time.monotonic() - began
            self._account()
            await self._teacher.close()
            self._writer.sync()
        if self._unwritten is not None:
            raise self._unwritten
        return self.summary

    def _stop(self, why: str) -> None:
        """Start no further requests; those in progress complete."""
        self.summary.stopped = self.summary.stopped or why
        self._budget.end()

    def _account(self) -> None:
        summary, budget = self.summary, self._budget
        summary.prompt_tokens, summary.completion_tokens = budget.prompt_tokens, budget.completion_tokens
        summary.dollars = budget.spent
        summary.unknown, summary.unknown_dollars = budget.unknown, budget.unknown_dollars

    def _interrupt(self) -> None:
        self._stop("interrupted")
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    async def _work_off(self, jobs: Iterable[PendingImage]) -> None:
        waiting = iter(jobs)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._teacher.concurrency):
                group.create_task(self._work(waiting))

    async def _work(self, waiting: Iterator[PendingImage]) -> None:
        for job in waiting:
            if self.summary.stopped:
                return
            try:
                image, sha256 = await asyncio.to_thread(read_picture, self._root / job.picture.path)
            except OSError as error:
                self.summary.unreadable[job.picture.path] = str(error)
                continue
            try:
                await self._draw(job, image, sha256)
            except NoAnswer as error:
                self.summary.unanswered[job.picture.path] = str(error)
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= max(10, 2 * self._teacher.concurrency):
                    raise TeacherError(
                        f"{self._failures_in_a_row} consecutive images got no answer from "
                        f"{self._teacher.endpoint or self._teacher.name}; last error: {error}"
                    ) from error

    async def _draw(self, job: PendingImage, image: bytes, sha256: str) -> None:
        """Draw candidates until one is accepted, none is left, or the budget is spent."""
        for attempt in range(job.first, job.first + self._settings.candidates - job.asked):
            if self.summary.stopped:
                return
            request = Request(
                self._settings.question,
                image,
                seed_of(image, attempt),
                self._settings.max_tokens,
                self._settings.temperature,
                self._settings.top_p,
            )
            if await self._ask(job, attempt, request, sha256):
                return
        if not self.summary.stopped:
            self.summary.exhausted += 1

    async def _ask(self, job: PendingImage, attempt: int, request: Request, sha256: str) -> bool:
        """Ask once, judge and append; return whether the candidate was accepted."""
        try:
            self._budget.begin_request()
            answer = await self._teacher.answer(request, self._budget)
        except cost.BudgetSpent as spent:
            self._stop(str(spent))
            return False
        return self._keep(job, attempt, request, sha256, answer)

    def _keep(self, job: PendingImage, attempt: int, request: Request, sha256: str, answer: Answer) -> bool:
        """Judge an answer and append it; return whether it was accepted."""
        paid = cost.cost(self._settings.price, answer.prompt_tokens, answer.completion_tokens)
        self._failures_in_a_row = 0
        # Judge the stored text: the truncated end of an overlong text must not matter.
        text = answer.text[:_MAX_CHARACTERS]
        verdict = self._rules.judge(text, job.label, finish=answer.finish, refused=answer.refused)
        record = self._record(job, attempt, request, sha256, answer, paid)
        record = with_verdict(record, record["chain"], verdict)
        try:
            self._writer.append(record)
        except (OSError, ChainFileError) as error:  # answers still in progress may yet be saved
            self._unwritten = self._unwritten or error
            self._stop("the chain file cannot be written")
            if isinstance(error, OSError):
                self.summary.unsaved += 1
                return False
        self._count(record)
        if not self._has_accepted and self.summary.is_hopeless and not self.summary.stopped:
            self._stop(NOTHING_ACCEPTED)
        return verdict.accepted

    def _record(
        self, job: PendingImage, attempt: int, request: Request, sha256: str, answer: Answer, paid: float | None
    ) -> Record:
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "dollars": None if paid is None else round(paid, 8),
        }
        return {
            "image": job.picture.path,
            "chain": make_printable(answer.text[:_MAX_CHARACTERS]),
            "attempt": attempt,
            "teacher": self._teacher.name,
            "model": make_printable(answer.model[:200]),
            "prompt_version": self._settings.prompt_version,
            "sampling": {
                name: getattr(request, name)
                for name in ("temperature", "top_p", "max_tokens", "seed")
                if name not in answer.omitted
            },
            "sha256": sha256,
            "label_conditioned": False,
            "verified": self._rules.verified,
            "finish": make_printable(answer.finish[:40]),
            **({"refused": True} if answer.refused else {}),
            "usage": {key: value for key, value in usage.items() if value is not None},
            "seconds": round(answer.seconds, 3),
            "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _count(self, record: Record) -> None:
        summary = self.summary
        if record["verdict"] == ACCEPTED:
            summary.accepted += 1
        else:
            summary.rejected[record["rule"]] += 1
            summary.examples.setdefault(record["rule"], record)
        self._account()
        summary.unpriced += "dollars" not in record["usage"]
        self._on_record(record, summary)
