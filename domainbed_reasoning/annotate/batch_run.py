"""Annotation through a provider's batches: submitted, polled, and collected, also by a later run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.batch_api import MAX_FILE_BYTES, MAX_REQUESTS, BatchTeacher, Result
from domainbed_reasoning.annotate.batch_journal import Asked, Journal, OpenBatch
from domainbed_reasoning.annotate.pipeline import (
    NOTHING_ACCEPTED,
    Annotation,
    AnnotationSettings,
    PendingImage,
    Summary,
)
from domainbed_reasoning.annotate.teacher import Request, TeacherError, read_picture, seed_of
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import ChainWriter, Record


@dataclass(frozen=True)
class Draw:
    """The next request of an image.

    Attributes:
        job: the image.
        attempt: number of its candidate.
        end: the first attempt that is too many.
        failures: requests so far that were not answered.
        is_again: whether this candidate has been requested before, and counts once.
    """

    job: PendingImage
    attempt: int
    end: int
    failures: int = 0
    is_again: bool = False


class BatchAnnotation(Annotation):
    """One run over a list of jobs; arguments are those of `Annotation`.

    Args:
        root: see there, as for the other arguments.
        teacher: of batches.
        journal: of the open batches.
        without_chain: images of the dataset that have no chain, by path.
        answered: (image, attempt) of this teacher's candidates in the chain file.
        poll: seconds between two looks at the open batches.
        retries: of a request that a batch did not answer.
    """

    def __init__(
        self,
        root: Path,
        teacher: BatchTeacher,
        writer: ChainWriter,
        rules: Rules,
        settings: AnnotationSettings,
        budget: cost.Budget,
        on_record: Callable[[Record, Summary], None],
        has_accepted: bool,
        journal: Journal,
        without_chain: Mapping[str, PendingImage],
        answered: set[tuple[str, int]],
        poll: float,
        retries: int,
    ):
        super().__init__(root, teacher, writer, rules, settings, budget, on_record, has_accepted)
        self._batches, self._journal, self._answered = teacher, journal, answered
        self._without_chain, self._poll, self._retries = without_chain, poll, retries
        self._stopping = asyncio.Event()

    def _interrupt(self) -> None:
        super()._interrupt()
        self._stopping.set()

    async def _work_off(self, jobs: Iterable[PendingImage]) -> None:
        """Submit, poll and collect until every job is done; on Ctrl-C, batches stay open for the next run."""
        by_path = {job.picture.path: job for job in jobs}
        for batch in list(self._journal.batches):
            if not batch.batch_id:
                await self._adopt(batch)
        draws: dict[tuple[str, int], Draw] = {}
        for batch in self._journal.batches:
            self._budget.reserve(len(batch.requests), sent=True)
            for asked in batch.requests:
                if (job := by_path.get(asked.image)) is not None:
                    draws[asked.image, asked.attempt] = Draw(job, asked.attempt, self._end(job))
                elif (job := self._without_chain.get(asked.image)) is not None:  # beyond --limit: no further candidate
                    draws[asked.image, asked.attempt] = Draw(job, asked.attempt, asked.attempt + 1)
        opened = self._journal.images
        waiting = deque(Draw(job, job.first, self._end(job)) for path, job in by_path.items() if path not in opened)
        while True:
            while waiting and not self.summary.stopped and await self._submit(waiting, draws):
                pass
            if not self._journal.batches or self._stopping.is_set() or self._unwritten is not None:
                break
            ended = [await self._collect(batch, draws, waiting) for batch in list(self._journal.batches)]
            if not any(ended):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._poll)

    def _end(self, job: PendingImage) -> int:
        return job.first + self._settings.candidates - job.asked

    async def _adopt(self, batch: OpenBatch) -> None:
        """Find out whether a batch that an earlier run was submitting exists."""
        found = await self._batches.find(batch.token)
        if found is None:
            self._journal.batches.remove(batch)
        else:
            batch.batch_id = found.id
        self._journal.save()

    async def _submit(self, waiting: deque[Draw], draws: dict[tuple[str, int], Draw]) -> bool:
        """Submit one batch of waiting draws, as many as limits and budget allow; return whether there were any."""
        lines, settings = bytearray(), self._settings
        chosen: list[Draw] = []
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_tokens}
        batch = OpenBatch(self._teacher.name, self._teacher.endpoint, settings.prompt_version, sampling, [], [])
        while waiting and len(chosen) < MAX_REQUESTS and len(lines) < MAX_FILE_BYTES and not self._stopping.is_set():
            draw = waiting[0]
            path = draw.job.picture.path
            try:
                image, sha256 = await asyncio.to_thread(read_picture, self._root / path)
            except OSError as error:
                self.summary.unreadable[path] = str(error)
                waiting.popleft()
                continue
            if not self._allowed(draw, is_first=not chosen and not self._journal.batches):
                break
            waiting.popleft()
            request = Request(
                settings.question,
                image,
                seed_of(image, draw.attempt),
                settings.max_tokens,
                settings.temperature,
                settings.top_p,
            )
            batch.omitted, batch.sent = self._batches.omitted(request), self._batches.sent(request)
            lines += self._batches.line(f"{batch.token}-{len(chosen)}", request)
            chosen.append(draw)
            batch.requests.append(Asked(path, draw.attempt, request.seed, sha256))
        if self._stopping.is_set():
            for _ in chosen:
                self._budget.settle(cost.AttemptCost(free=True))
            return False
        if not chosen:
            return False
        self._journal.batches.append(batch)
        self._journal.save()  # before the provider may know of it
        draws.update({(draw.job.picture.path, draw.attempt): draw for draw in chosen})
        batch.batch_id = await self._batches.submit(bytes(lines), batch.token)
        self._journal.save()
        return True

    def _allowed(self, draw: Draw, is_first: bool) -> bool:
        """Reserve a request in the budget.

        Args:
            draw: that is to be requested.
            is_first: whether nothing is open or about to be, so that no room will come of what is settled.
        """
        if not self._budget.reserve():
            if is_first:
                self.summary.stopped = f"--max-cost is reached; one more request may cost ${self._budget.dearest:.4f}"
            return False
        try:
            if not draw.is_again:
                self._budget.begin_request()
        except cost.BudgetSpent as spent:
            self._budget.settle(cost.AttemptCost(free=True))
            self.summary.stopped = str(spent)
            return False
        return True

    async def _collect(self, batch: OpenBatch, draws: dict[tuple[str, int], Draw], waiting: deque[Draw]) -> bool:
        """Take over the results of a batch if it has ended; return whether it has."""
        ended = await self._batches.ended(batch.batch_id)
        if ended is None:
            return False
        if ended.status == "failed":
            self._journal.batches.remove(batch)
            self._journal.save()
            raise TeacherError(
                f"{self._teacher.endpoint} rejects the batch {batch.batch_id}: {self._batches.failure(ended)}."
            )
        results = {result.index: result for result in await self._batches.results(ended, batch)}
        for index, asked in enumerate(batch.requests):
            result = results.get(index) or Result(index, problem=f"the batch is {ended.status}; no answer")
            self._settle(result)
            draw = draws.pop((asked.image, asked.attempt), None)
            if (asked.image, asked.attempt) in self._answered:
                if draw is not None:  # collected and rejected before the last run was killed
                    self._next(draw, waiting)
                continue
            if draw is None:
                self.summary.unanswered[asked.image] = "it has a chain by now, or is gone: its answer is left out"
                continue
            request = Request(
                self._settings.question,
                b"",
                asked.seed,
                batch.sampling["max_tokens"],
                batch.sampling["temperature"],
                batch.sampling["top_p"],
            )
            if result.answer is None:
                self._again(draw, batch.sent or self._batches.sent(request), result, waiting)
            elif not self._keep(draw.job, asked.attempt, request, asked.sha256, result.answer):
                if self._unwritten is not None:
                    return True
                self._next(draw, waiting)
        self._writer.sync()
        self._journal.batches.remove(batch)
        self._journal.save()
        return True

    def _settle(self, result: Result) -> None:
        made = cost.AttemptCost(free=not result.billed)
        if result.answer is not None:
            made.prompt_tokens, made.completion_tokens = result.answer.prompt_tokens, result.answer.completion_tokens
        self._budget.settle(made)

    def _next(self, draw: Draw, waiting: deque[Draw]) -> None:
        """Queue the next candidate of an image whose last one was rejected."""
        if self.summary.stopped == NOTHING_ACCEPTED:
            return
        if draw.attempt + 1 < draw.end:
            waiting.append(Draw(draw.job, draw.attempt + 1, draw.end))
        else:
            self.summary.exhausted += 1

    def _again(self, draw: Draw, sent: Sequence[str], result: Result, waiting: deque[Draw]) -> None:
        """Queue a request without an answer again, unless it failed too often."""
        if result.refusal and self._batches.adapt(sent, result.refusal):
            waiting.append(replace(draw, is_again=True))
        elif draw.failures < self._retries and not result.refusal and not result.billed:
            waiting.append(replace(draw, failures=draw.failures + 1, is_again=True))
        else:
            self.summary.unanswered[draw.job.picture.path] = result.problem


def open_requests(journal: Journal) -> str:
    """Return how many requests are in open batches, as a sentence; empty without any."""
    count = sum(len(batch.requests) for batch in journal.batches)
    return (
        f"{count:,} requests are in open batches ({journal.path}). Rerun the command to collect them." if count else ""
    )


def answered_of(records: Iterable[Record], teacher: str, prompt_version: str) -> set[tuple[str, int]]:
    """Return (image, attempt) of a teacher's candidates."""
    own = (record for record in records if record.get("teacher") == teacher)
    return {(one["image"], one.get("attempt", -1)) for one in own if one.get("prompt_version") == prompt_version}
