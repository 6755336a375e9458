"""A teacher behind an OpenAI-compatible endpoint: GPT-4o, vLLM, a local server.

Requests are retried here, not by the client, so that HTTP 429 pauses all workers for as long as the server requests.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from domainbed_reasoning.annotate.connection import (
    MAX_BODY_BYTES,
    MAX_PAUSE,
    backoff,
    causes,
    certificate_error,
    guarded_client,
    is_this_machine,
    never_connected,
    retry_after,
)
from domainbed_reasoning.annotate.message import text_of
from domainbed_reasoning.annotate.parameters import Parameters
from domainbed_reasoning.annotate.pricing import AttemptCost, Budget, reported_tokens
from domainbed_reasoning.annotate.redaction import LogRedaction, redact
from domainbed_reasoning.annotate.teacher import Answer, NoAnswer, Request, TeacherError, Unreachable

_RETRIED = {408, 409, 425, 429}
_FATAL = {401, 403, 404}
_ABOUT_PARAMETERS = re.compile(r"param|argument|field|support|permitted|allowed|unknown|recogni|extra", re.IGNORECASE)
# Finish reasons of answers that were truncated at the token limit.
_TRUNCATED = {"length", "max_tokens", "max_output_tokens", "model_length", "token_limit"}
_DEFAULT_KEY = "OPENAI_API_KEY"
_OPENAI = "api.openai.com"
# Error codes of requests that a content filter refuses.
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked")


class OpenAITeacher:
    """Sends requests to ``/chat/completions`` of an OpenAI-compatible server.

    Args:
        model: the server's name of the model.
        base_url: of the server, such as ``http://localhost:8000/v1``; None for OpenAI's or ``OPENAI_BASE_URL``.
        key_variable: environment variable that holds the key; the key itself is never an argument.
        concurrency: maximum parallel requests.
        timeout: seconds per request, including a response that is still arriving.
        retries: of a request after transient errors.
        requests_per_minute: maximum; None leaves it to the server's limits.
        omitted: parameters of `parameters.OMITTABLE` that are not sent; others that the server rejects by name are
            omitted automatically.
        needs_limit: end the run if the server accepts no token limit.
        most_bytes: of a response.
        tell: called with messages to the user during the run, each once.

    Raises:
        TeacherError: the package ``openai`` or the key is missing, the URL is invalid or contains a password, or
            OpenAI's key would be sent unencrypted to another machine.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_variable: str = _DEFAULT_KEY,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        requests_per_minute: float | None = None,
        omitted: Sequence[str] = (),
        needs_limit: bool = False,
        most_bytes: int = MAX_BODY_BYTES,
        tell: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ):
        try:
            import openai
        except ImportError as error:
            raise TeacherError(
                "The package 'openai' is not installed. Run pip install 'domainbed-reasoning[teacher]'."
            ) from error
        url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise TeacherError(
                f"The server URL must not contain a password or query; put the key into ${_DEFAULT_KEY}."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TeacherError("The server URL must start with https:// or http:// and name a host.")
        self._key = _read_key(key_variable)
        if not self._key and parts.hostname == _OPENAI:
            raise TeacherError(f"Environment variable {key_variable} is not set. Set it to the API key of {url}.")
        unsafe = parts.scheme == "http" and not is_this_machine(parts.hostname)
        if self._key and unsafe and key_variable == _DEFAULT_KEY:
            raise TeacherError(
                f"{parts.scheme}://{parts.netloc} is another machine and the connection is not encrypted: "
                f"${_DEFAULT_KEY} is not sent there. Use https, a tunnel to this machine, or that server's own key "
                "with --key-env."
            )
        self.name = f"openai:{model}"
        self.endpoint = redact(f"{parts.scheme}://{parts.netloc}{parts.path}", self._key)
        self.concurrency = concurrency
        self.retried = 0
        self._model = model
        self._timeout = timeout
        self._retries = retries
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._not_before = 0.0
        self._pause_until = 0.0
        self._parameters = Parameters(model, tuple(omitted), needs_limit)
        self._tell = tell
        self._reached = self._told = False
        self._openai = openai
        try:
            client = guarded_client(openai, timeout, url, most_bytes)
        except ValueError as error:
            raise TeacherError(str(error)) from error
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=url, timeout=timeout, max_retries=0, http_client=client
        )
        if parts.scheme == "http" or not f".{parts.hostname}".endswith(f".{_OPENAI}"):
            # The client takes them from the environment; other servers must not see whose account it is.
            self._client.organization = self._client.project = None
        self._log = LogRedaction(self._key)

    async def answer(self, request: Request, budget: Budget | None = None, patient: bool = True) -> Answer:
        """Return the server's answer; see `Teacher.answer`.

        Args:
            request: as there.
            budget: as there.
            patient: retry a server that cannot be connected to; else `Unreachable` is raised at once.
        """
        budget = budget or Budget()
        failed = _Failed("")
        tries = 0
        while tries <= self._retries:
            await self._wait_for_turn()
            try:
                async with budget.attempt() as made:
                    return await self._ask(request, made, tries, quiet=not patient)
            except _Refitted:
                continue
            except _Failed as error:
                failed = error
                if error.unsent and not patient:
                    raise Unreachable(str(error)) from error
            tries += 1
            if tries <= self._retries:
                self.retried += 1
                await asyncio.sleep(backoff(tries - 1) if failed.wait is None else failed.wait)
        if not self._reached:
            raise TeacherError(f"{failed}. Check that the server runs, and --base-url.")
        asked = f"{self._retries + 1} attempts" if self._retries else "1 attempt"
        raise NoAnswer(f"no answer after {asked}; last error: {failed}")

    async def _ask(self, request: Request, made: AttemptCost, tries: int, quiet: bool = False) -> Answer:
        """Send a request once, and record what is known of its cost.

        Raises:
            _Refitted: the server rejected a parameter that is omitted from now on.
            _Failed: a transient error.
            NoAnswer: an error of this request.
            TeacherError: an error of every request.
        """
        began = time.monotonic()
        sent = self._parameters.of(request)
        try:
            async with asyncio.timeout(self._timeout):
                body = {**self._content(request), **sent}
                response = await self._client.chat.completions.with_raw_response.create(**body)
        except self._openai.APIStatusError as error:
            self._reached = True
            return self._answer_of_status(error, sent, made, tries, time.monotonic() - began)
        except TimeoutError as error:
            self._reached = True
            raise _Failed(f"no complete answer within {self._timeout:g} seconds") from error
        except Exception as error:  # the client raises errors of many types on invalid responses; also time-outs
            made.free = never_connected(error)
            self._raise_if_untrusted(error)
            self._reached |= not made.free
            raise _Failed(self._why_no_response(error, quiet=quiet), unsent=made.free) from error
        self._reached = True
        text = response.http_response.content.decode("utf-8", "replace")
        tokens = made.prompt_tokens, made.completion_tokens = reported_tokens(text)
        try:
            answer = read_completion(text, *tokens, time.monotonic() - began)
        except NotACompletion as error:
            if '"error"' in text:  # some gateways forward errors with status 200
                self._refit(sent, text, "HTTP 200")
            raise _Failed(f"{error}: {redact(text, self._key)[:80]!r}") from error
        made.prompt_tokens, made.completion_tokens = answer.prompt_tokens, answer.completion_tokens
        return dataclasses.replace(without_key(answer, self._key), omitted=self._parameters.omitted(sent))

    def _answer_of_status(
        self, error: Any, sent: dict[str, Any], made: AttemptCost, tries: int, seconds: float
    ) -> Answer:
        """Return the answer if a content filter refused the request, else raise as `_ask` does."""
        reason = self._why(error)
        if _is_filtered(error):  # billed by some
            return Answer(reason, "content_filter", refused=True, seconds=seconds)
        # After a gateway error or a time-out, the answer may have been generated and billed.
        made.free = error.status_code < 500 and error.status_code not in (408, 499)
        if error.status_code in (400, 422):
            self._refit(sent, error.response.text, reason)
        self._raise_if_permanent(error, reason)
        wait = retry_after(error.response.headers)
        if error.status_code == 429:
            self._pause(wait if wait is not None else backoff(tries))
        raise _Failed(reason, wait)

    def _refit(self, sent: dict[str, Any], refusal: str, reason: str) -> None:
        """Raise `_Refitted` if an error names a parameter that can be omitted or renamed."""
        done = self._parameters.adapt(sent, refusal)
        if done:
            self._tell(f"{self.endpoint} rejects a parameter ({reason[:300]}): {done}.")
        if done is not None:
            raise _Refitted

    def _why_no_response(self, error: Exception, quiet: bool = False) -> str:
        cause: BaseException = error
        if isinstance(error, self._openai.APIConnectionError):  # its own message has no details
            cause = next((cause for cause in causes(error)[1:] if str(cause)), error)
        reason = redact(f"{type(error).__name__}: {cause}", self._key)[:500]
        if not never_connected(error):
            return reason
        reason = f"{self.endpoint} cannot be reached ({reason})"
        if self._retries and not self._reached and not self._told and not quiet:
            self._told = True
            self._tell(f"{reason}; retrying {self._retries} times.")
        return reason

    async def close(self) -> None:
        """Close the connections."""
        self._log.remove()
        await self._client.close()

    def _content(self, request: Request) -> dict[str, Any]:
        url = "data:image/jpeg;base64," + base64.b64encode(request.image).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.question}]
        return {"model": self._model, "messages": [{"role": "user", "content": content}]}

    async def _wait_for_turn(self) -> None:
        """Wait for the end of a pause that the server requested, and for our own rate limit."""
        while (now := time.monotonic()) < self._pause_until:
            await asyncio.sleep(self._pause_until - now)
        if self._gap:
            turn = max(now, self._not_before)
            self._not_before = turn + self._gap
            await asyncio.sleep(turn - now)

    def _pause(self, seconds: float) -> None:
        self._pause_until = max(self._pause_until, time.monotonic() + min(seconds, MAX_PAUSE))

    def _why(self, error: Any) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        message = body.get("message") or error.response.text or type(error).__name__
        return redact(f"HTTP {error.status_code}: {message}", self._key)[:500]

    def _raise_if_untrusted(self, error: BaseException) -> None:
        why = certificate_error(error)
        if why:
            raise TeacherError(
                f"{self.endpoint} has an untrusted certificate ({redact(why, self._key)}); nothing was sent. "
                "Check the URL; for your own server, set SSL_CERT_FILE to its certificate file."
            ) from error

    def _raise_if_permanent(self, error: Any, reason: str) -> None:
        code = error.status_code
        if 300 <= code < 400:
            try:
                target = urllib.parse.urljoin(self.endpoint, error.response.headers.get("location", ""))
                place = "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(target))
            except ValueError:
                place = "an invalid address"
            raise TeacherError(
                f"{self.endpoint} redirects (HTTP {code}) to {redact(place, self._key)[:200]!r}, "
                "which is not followed: neither key nor image is sent there. If that is the intended server, pass its "
                "URL with --base-url."
            )
        if code == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise TeacherError(f"{self.endpoint} reports that the account has no credit left ({reason}).")
        if code in _FATAL:
            raise TeacherError(
                f"{self.endpoint} rejects every request ({reason}). Check the key, the model and the URL."
            )
        if code < 500 and code not in _RETRIED:
            hint = " (--omit-parameter omits a parameter)" if _ABOUT_PARAMETERS.search(reason) else ""
            raise NoAnswer(reason + hint)


def _read_key(variable: str) -> str:
    """Return the key in an environment variable, empty if it is not set.

    Raises:
        TeacherError: the name is invalid; the message does not repeat it, as it may be the key itself.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise TeacherError(
            "--key-env takes the name of an environment variable, in capitals, not the key itself. If that was a key, "
            "it is now in your shell history: revoke it."
        )
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise TeacherError(f"Environment variable {variable} is not a valid key: it is not printable ASCII.")
    return key


def without_key(answer: Answer, key: str) -> Answer:
    """Return the answer without the key, in case the server echoed it: it must not be written to the chain file."""
    texts: dict[str, Any] = {name: redact(text, key) for name, text in vars(answer).items() if isinstance(text, str)}
    return dataclasses.replace(answer, **texts)


class NotACompletion(ValueError):
    """A response with status 200 is not a chat completion."""


class _Refitted(Exception):
    """The request must be sent again with other parameters."""


class _Failed(Exception):
    """A transient error, the wait in seconds that the server requests, and whether nothing was sent."""

    def __init__(self, reason: str, wait: float | None = None, unsent: bool = False):
        super().__init__(reason)
        self.wait, self.unsent = wait, unsent


def read_completion(text: str, prompt_tokens: int | None, completion_tokens: int | None, seconds: float) -> Answer:
    """Return the answer in a chat completion's JSON.

    Raises:
        NotACompletion: it is not one.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = text_of(message), message.get("refusal")
        ended = choice.get("finish_reason")
        model = str(body.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise NotACompletion(f"the response is not a chat completion ({type(error).__name__})") from error
    if content is None and (ended or refusal or completion_tokens):  # only thinking tokens, which are billed
        content = ""
    if not isinstance(content, str):
        raise NotACompletion("the response contains no text")
    finish = str(ended or "stop")
    answer = content or str(refusal or "")
    return Answer(
        text=answer,
        finish="length" if finish.lower() in _TRUNCATED else finish,
        refused=bool(refusal) or finish == "content_filter",
        prompt_tokens=prompt_tokens,
        completion_tokens=None if answer and not completion_tokens else completion_tokens,
        seconds=seconds,
        model=model,
    )


def _is_filtered(error: Any) -> bool:
    code = str(getattr(error, "code", None) or "")
    return error.status_code == 400 and code in FILTERED
