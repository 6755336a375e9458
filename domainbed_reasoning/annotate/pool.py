"""Several endpoints that serve one model: work is spread over them, and a dead one is set aside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from domainbed_reasoning.annotate.openai import OpenAITeacher
from domainbed_reasoning.annotate.pricing import Budget
from domainbed_reasoning.annotate.teacher import Answer, NoAnswer, Request, TeacherError, Unreachable

# An endpoint is set aside after so many requests in a row without an answer.
_FAILURES = 3


class TeacherPool:
    """A teacher behind several endpoints.

    A request goes to the endpoint with the fewest in progress. It moves to another one only if nothing of it can have
    been answered: the endpoint could not be connected to, or rejects every request. So no image is asked twice.

    Args:
        teachers: one an endpoint, all of the same model.
        tell: called with one message an endpoint that is set aside.

    Raises:
        TeacherError: two endpoints are the same.
    """

    def __init__(self, teachers: Sequence[OpenAITeacher], tell: Callable[[str], None]):
        endpoints = [teacher.endpoint.rstrip("/") for teacher in teachers]
        if twice := next((each for each in endpoints if endpoints.count(each) > 1), None):
            raise TeacherError(f"--base-url names {twice} twice. Pass each endpoint once.")
        self.name = teachers[0].name
        self.endpoint = ", ".join(endpoints)
        self.concurrency = sum(teacher.concurrency for teacher in teachers)
        self._all = tuple(teachers)
        self._live = list(teachers)
        self._under_way = dict.fromkeys(teachers, 0)
        self._failures = dict.fromkeys(teachers, 0)
        self._tell = tell

    async def answer(self, request: Request, budget: Budget) -> Answer:
        """Return an endpoint's answer; see `Teacher.answer`."""
        while True:
            teacher = min(self._live, key=self._under_way.__getitem__)
            is_last = len(self._live) == 1
            self._under_way[teacher] += 1
            try:
                answer = await teacher.answer(request, budget, patient=is_last)
            except Unreachable as error:
                self._set_aside(teacher, str(error))
            except NoAnswer as error:  # it may have been answered: not asked elsewhere
                self._failures[teacher] += 1
                if self._failures[teacher] >= _FAILURES and len(self._live) > 1:
                    self._set_aside(teacher, f"{_FAILURES} requests in a row got no answer ({error})")
                raise
            except TeacherError as error:
                if self._live == [teacher]:
                    raise
                self._set_aside(teacher, str(error))
            else:
                self._failures[teacher] = 0
                return answer
            finally:
                self._under_way[teacher] -= 1

    async def close(self) -> None:
        """Close the connections of all endpoints."""
        await asyncio.gather(*(teacher.close() for teacher in self._all))

    def _set_aside(self, teacher: OpenAITeacher, why: str) -> None:
        if teacher in self._live and len(self._live) > 1:
            self._live.remove(teacher)
            left = f"{len(self._live)} of {len(self._all)} endpoints left"
            self._tell(f"WARNING: {teacher.endpoint} is set aside for the rest of this run: {why.rstrip('.')}. {left}.")
