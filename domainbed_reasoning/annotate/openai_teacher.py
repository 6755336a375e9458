"""A teacher behind an OpenAI-compatible endpoint: GPT-4o, vLLM, a local server.

Retries are ours, not the client's, so that one server's "too many requests" holds every worker back, for as long as the
server asks.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import email.utils
import json
import os
import random
import re
import time
import urllib.parse
from typing import Any

from domainbed_reasoning.annotate.connection import (
    BodyRefused,
    causes,
    certificate_fault,
    guarded_client,
    is_this_machine,
)
from domainbed_reasoning.annotate.message import text_of
from domainbed_reasoning.annotate.teacher import Answer, NoAnswer, Request, TeacherError, redact

_RETRIED = {408, 409, 425, 429}
_FATAL = {401, 403, 404}
# Names of models that want max_completion_tokens and no sampling settings.
_REASONING_MODELS = ("o1", "o3", "o4", "gpt-5")
_MAX_PAUSE = 600.0
_DEFAULT_KEY = "OPENAI_API_KEY"
# More tokens than any request can have: a server that says so is not believed.
_MAX_TOKENS = 10_000_000


class OpenAITeacher:
    """Asks ``/chat/completions`` of an OpenAI-compatible server.

    Args:
        model: as the server names it.
        base_url: of the server, ``http://localhost:8000/v1``; None for OpenAI's own or ``OPENAI_BASE_URL``.
        key_variable: environment variable that holds the key; the key itself is never an argument.
        concurrency: requests under way at a time.
        timeout: seconds until a request is given up, however busy the server looks.
        retries: further tries of a request after faults that may pass.
        requests_per_minute: at most so many; None leaves it to the server's own limits.

    Raises:
        TeacherError: if the package ``openai`` or the key is missing, the URL holds a password or is none, or OpenAI's
            key would travel unencrypted to another machine.
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
    ):
        try:
            import openai
        except ImportError as error:
            raise TeacherError(
                "The package 'openai' is not installed: pip install 'domainbed-reasoning[teacher]'."
            ) from error
        url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise TeacherError(f"The server's URL must hold no password or query; put the key into ${_DEFAULT_KEY}.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TeacherError("The server's URL must begin with https:// or http:// and name a host.")
        self._key = _read_key(key_variable)
        if not self._key and parts.hostname == "api.openai.com":
            raise TeacherError(f"The environment variable {key_variable} is not set; it must hold the key of {url}.")
        unsafe = parts.scheme == "http" and not is_this_machine(parts.hostname)
        if self._key and unsafe and key_variable == _DEFAULT_KEY:
            raise TeacherError(
                f"{parts.scheme}://{parts.netloc} is another machine and the connection is not encrypted: "
                f"${_DEFAULT_KEY} is not sent there. Use https, a tunnel to this machine, or that server's own key "
                "with --key-env."
            )
        self.name = f"openai:{model}"
        self.endpoint = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.concurrency = concurrency
        self.retried = 0
        self._model = model
        self._timeout = timeout
        self._retries = retries
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._not_before = 0.0
        self._pause_until = 0.0
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=url,
            timeout=timeout,
            max_retries=0,
            http_client=guarded_client(openai, timeout),
        )

    async def answer(self, request: Request) -> Answer:
        """Return the server's answer; see `Teacher.answer`."""
        fault = ""
        for tries in range(self._retries + 1):
            await self._wait_for_turn()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self._client.chat.completions.with_raw_response.create(**self._body(request))
                # UTF-8 whatever the server says: JSON is nothing else, and some names stand for no text at all.
                text = response.http_response.content.decode("utf-8", "replace")
                return _without(_read(text, time.monotonic() - began), self._key)
            except self._openai.APIStatusError as error:
                fault = self._why(error)
                if _is_filtered(error):
                    return Answer(fault, "content_filter", refused=True, seconds=time.monotonic() - began)
                self._give_up_if_hopeless(error, fault)
                asked_for = _retry_after(error.response.headers)
                if error.status_code == 429:
                    self._pause(asked_for if asked_for is not None else _backoff(tries))
            except self._openai.APIConnectionError as error:  # time-outs too
                self._give_up_on_certificate(error)
                cause = next((f": {cause}" for cause in causes(error)[1:] if str(cause)), "")
                fault, asked_for = redact(f"{type(error).__name__}{cause}", self._key), None
            except TimeoutError:
                fault, asked_for = f"no whole answer within {self._timeout:g} seconds", None
            except (_NotACompletion, BodyRefused) as error:
                fault, asked_for = redact(error, self._key), None
            if tries < self._retries:
                self.retried += 1
                await asyncio.sleep(_backoff(tries) if asked_for is None else asked_for)
        asked = f"{self._retries + 1} tries" if self._retries else "1 try"
        raise NoAnswer(f"no answer after {asked}; the last fault: {fault}")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, request: Request) -> dict[str, Any]:
        url = "data:image/jpeg;base64," + base64.b64encode(request.image).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.question}]
        body: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": content}]}
        if self._model.startswith(_REASONING_MODELS):
            return body | {"max_completion_tokens": request.max_tokens, "seed": request.seed}
        return body | {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }

    async def _wait_for_turn(self) -> None:
        """Wait until neither a pause that the server asked for nor our own rate limit is in the way."""
        while (now := time.monotonic()) < self._pause_until:
            await asyncio.sleep(self._pause_until - now)
        if self._gap:
            turn = max(now, self._not_before)
            self._not_before = turn + self._gap
            await asyncio.sleep(turn - now)

    def _pause(self, seconds: float) -> None:
        self._pause_until = max(self._pause_until, time.monotonic() + min(seconds, _MAX_PAUSE))

    def _why(self, error: Any) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        message = body.get("message") or error.response.text[:300] or type(error).__name__
        return redact(f"HTTP {error.status_code}: {message}", self._key)

    def _give_up_on_certificate(self, error: BaseException) -> None:
        why = certificate_fault(error)
        if why:
            raise TeacherError(
                f"{self.endpoint} has a certificate that is not trusted ({redact(why, self._key)}); nothing was sent. "
                "Check the URL; for a server of your own, name its certificate's file in the variable SSL_CERT_FILE."
            ) from error

    def _give_up_if_hopeless(self, error: Any, fault: str) -> None:
        code = error.status_code
        if 300 <= code < 400:
            target = urllib.parse.urljoin(self.endpoint, error.response.headers.get("location", ""))
            host = urllib.parse.urlsplit(target)
            raise TeacherError(
                f"{self.endpoint} redirects (HTTP {code}) to {redact(f'{host.scheme}://{host.netloc}', self._key)!r}, "
                "which is not followed: neither key nor image goes there. If that is the server you mean, give its URL "
                "with --base-url."
            )
        if code == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise TeacherError(f"{self.endpoint} says that the account has no credit left ({fault}).")
        if code in _FATAL:
            raise TeacherError(
                f"{self.endpoint} refuses every request ({fault}). Check the key, the model and the URL."
            )
        if code < 500 and code not in _RETRIED:
            raise NoAnswer(fault)


def _read_key(variable: str) -> str:
    """Return the key in an environment variable, empty where it is not set.

    Raises:
        TeacherError: that is no variable's name; it is not repeated, for it may be the key itself.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise TeacherError(
            "--key-env wants the name of an environment variable, in capitals, not the key itself. If that was a key, "
            "it now stands in your shell's history: replace it."
        )
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise TeacherError(f"The environment variable {variable} holds what can be no key: other than printable ASCII.")
    return key


def _without(answer: Answer, key: str) -> Answer:
    """Return the answer without the key, should the server have echoed it: it must not get into the chain file."""
    return dataclasses.replace(
        answer, text=redact(answer.text, key), finish=redact(answer.finish, key), model=redact(answer.model, key)
    )


class _NotACompletion(ValueError):
    """What a server sent with status 200 is no chat completion."""


def _read(text: str, seconds: float) -> Answer:
    """Return the answer in a chat completion's JSON.

    Raises:
        _NotACompletion: it is none.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = text_of(message), message.get("refusal")
        usage = body.get("usage") or {}
        tokens = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        finish = str(choice.get("finish_reason") or "stop")
        model = str(body.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _NotACompletion(f"the answer is no chat completion ({error!r:.120}): {text[:80]!r}") from error
    if not isinstance(content, str) and not refusal:
        raise _NotACompletion(f"the answer holds no text: {text[:80]!r}")
    return Answer(
        text=content if isinstance(content, str) and content else str(refusal or ""),
        finish=finish,
        refused=bool(refusal) or finish == "content_filter",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        seconds=seconds,
        model=model,
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS else None


def _is_filtered(error: Any) -> bool:
    code = str(getattr(error, "code", None) or "")
    return error.status_code == 400 and code in ("content_filter", "content_policy_violation", "moderation_blocked")


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds or a date)."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if seconds == seconds:
            return min(max(seconds, 0.0), _MAX_PAUSE)
    return None


def _backoff(tries: int) -> float:
    """Return seconds to wait after so many faults: 1, 2, 4, … at most 60, with jitter of a half."""
    return min(60.0, 2.0**tries) * random.uniform(0.5, 1.0)
