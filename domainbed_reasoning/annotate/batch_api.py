"""OpenAI's Batch API: requests as a file, answered within a day, at about half the price.

``POST /files``, ``POST /batches``, ``GET /batches/{id}`` and ``GET /files/{id}/content``, as
https://platform.openai.com/docs/guides/batch describes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from domainbed_reasoning.annotate.batch_journal import OpenBatch
from domainbed_reasoning.annotate.connection import backoff, never_connected, retry_after
from domainbed_reasoning.annotate.openai import FILTERED, NotACompletion, OpenAITeacher, read_completion, without_key
from domainbed_reasoning.annotate.pricing import reported_tokens
from domainbed_reasoning.annotate.redaction import redact
from domainbed_reasoning.annotate.teacher import Answer, NoAnswer, Request, TeacherError

# OpenAI's limits of a batch are 50,000 requests and 200 MB.
MAX_REQUESTS = 10_000
MAX_FILE_BYTES = 100_000_000
# Of a result file: 10,000 answers with their envelopes.
MAX_RESULT_BYTES = 512 << 20

_ENDED = {"completed", "failed", "expired", "cancelled"}
_URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
_METADATA = "domainbed_reasoning"
_LISTED = 1000  # batches that are searched for a token


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one request of a batch.

    Attributes:
        index: of the request in its batch.
        answer: None without one.
        problem: why there is none.
        refusal: the body of an error response, which may name a parameter.
        billed: whether it may have been billed.
    """

    index: int
    answer: Answer | None = None
    problem: str = ""
    refusal: str = ""
    billed: bool = False


class BatchTeacher(OpenAITeacher):
    """The teacher's batches. Arguments are those of `OpenAITeacher`."""

    def line(self, custom_id: str, request: Request) -> bytes:
        """Return a request as a line of the input file."""
        body = {**self._content(request), **self._parameters.of(request)}
        line = {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}
        return json.dumps(line).encode() + b"\n"

    def omitted(self, request: Request) -> list[str]:
        """Return the settings of a request that are not sent."""
        return list(self._parameters.omitted(self._parameters.of(request)))

    def sent(self, request: Request) -> list[str]:
        """Return the settings of a request that are sent, by the provider's names."""
        return list(self._parameters.of(request))

    def adapt(self, sent: Sequence[str], refusal: str) -> bool:
        """Omit or rename the parameter that an error names; return whether it names one.

        Args:
            sent: the settings of the rejected request's batch, which another of its requests may have adapted.
            refusal: the body of the response.
        """
        done = self._parameters.adapt(dict.fromkeys(sent), refusal)
        if done:
            self._tell(f"{self.endpoint} rejects a parameter: {done}.")
        return done is not None

    async def submit(self, lines: bytes, token: str) -> str:
        """Upload requests and create their batch; return its id.

        Raises:
            TeacherError: the server accepts neither.
        """
        files, batches = self._client.files, self._client.batches
        uploaded = await self._call(lambda: files.create(file=(f"{token}.jsonl", lines), purpose="batch"))

        async def create() -> Any:
            return await batches.create(
                completion_window="24h", endpoint=_URL, input_file_id=uploaded.id, metadata={_METADATA: token}
            )

        created = await self._call(create, lambda: self.find(token))
        return _id(created)

    async def find(self, token: str) -> Any:
        """Return the batch that carries a token; None if the server has none.

        Raises:
            TeacherError: the server cannot be asked.
        """

        async def search() -> Any:
            count = 0
            async for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get(_METADATA) == token:
                    return batch
                count += 1
                if count >= _LISTED:
                    break
            return None

        return await self._call(search)

    async def ended(self, batch_id: str) -> Any:
        """Return a batch that has ended; None while it is in progress.

        Raises:
            TeacherError: the server does not know it, or cannot be asked.
        """
        batch = await self._call(lambda: self._client.batches.retrieve(batch_id))
        return batch if batch.status in _ENDED else None

    async def results(self, batch: Any, open_batch: OpenBatch) -> list[Result]:
        """Return the results of an ended batch, at most one a request.

        Raises:
            TeacherError: its files cannot be read.
        """
        found: dict[int, Result] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = await self._call(functools.partial(self._client.files.content, file_id))
                for result in self._parsed(content.content, open_batch):
                    found.setdefault(result.index, result)
        return list(found.values())

    def failure(self, batch: Any) -> str:
        """Return why a batch failed as a whole."""
        errors = getattr(batch.errors, "data", None) or []
        text = "; ".join(str(getattr(error, "message", error)) for error in errors[:3]) or "no reason given"
        return redact(text, self._key)[:500]

    def _parsed(self, content: bytes, open_batch: OpenBatch) -> Iterator[Result]:
        for raw in content.splitlines():
            try:
                line = json.loads(raw)
                token, _, number = line["custom_id"].rpartition("-")
                index = int(number)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # its request counts as unanswered
            if token == open_batch.token and 0 <= index < len(open_batch.requests):
                yield self._result(index, line, tuple(open_batch.omitted))

    def _result(self, index: int, line: Mapping[str, Any], omitted: tuple[str, ...]) -> Result:
        response = line.get("response")
        if not isinstance(response, dict) or "body" not in response:
            error = line.get("error")
            code = error.get("code") if isinstance(error, dict) else None
            text = (error.get("message") or code) if isinstance(error, dict) else "no response"
            return Result(index, problem=redact(str(text), self._key)[:300])
        status, text = response.get("status_code"), json.dumps(response["body"])
        if status != 200:
            body = response["body"]
            error = body.get("error") if isinstance(body, dict) else None
            error = error if isinstance(error, dict) else {}
            reason = redact(f"HTTP {status}: {error.get('message') or text}", self._key)[:300]
            if status == 400 and error.get("code") in FILTERED:
                return Result(index, Answer(reason, "content_filter", refused=True, omitted=omitted), billed=True)
            return Result(index, problem=reason, refusal=text if status in (400, 422) else "")
        try:
            answer = read_completion(text, *reported_tokens(text), 0.0)  # a batch does not tell seconds
        except NotACompletion as error:
            return Result(index, problem=str(error), billed=True)
        return Result(index, dataclasses.replace(without_key(answer, self._key), omitted=omitted), billed=True)

    async def _call(
        self, make: Callable[[], Awaitable[Any]], instead: Callable[[], Awaitable[Any]] | None = None
    ) -> Any:
        """Return what a call of the API returns, retried after transient errors.

        Args:
            make: makes the call.
            instead: asked before a retry of a call that may have succeeded unseen; its result counts unless it is None.
        """
        for tries in range(self._retries + 1):
            wait = None
            try:
                return await make()
            except self._openai.APIStatusError as error:
                reason = self._why(error)
                try:
                    self._raise_if_permanent(error, reason)
                except NoAnswer as permanent:
                    raise TeacherError(f"{self.endpoint} rejects a request of the Batch API ({permanent}).") from error
                wait, sent = retry_after(error.response.headers), True
            except Exception as error:  # anything that the client raises on a server's bytes; time-outs too
                self._raise_if_untrusted(error)
                if isinstance(error, TeacherError):
                    raise
                reason, sent = self._why_no_response(error), not never_connected(error)
            if tries < self._retries:
                await asyncio.sleep(backoff(tries) if wait is None else wait)
                if instead is not None and sent and (found := await instead()) is not None:
                    return found
        raise TeacherError(
            f"{self.endpoint} does not answer ({reason}). Open batches are kept; rerun the command to collect them."
        )


def _id(batch: Any) -> str:
    if not isinstance(batch.id, str) or not batch.id:
        raise TeacherError("The server created a batch without an id, so it does not implement the Batch API.")
    return batch.id
