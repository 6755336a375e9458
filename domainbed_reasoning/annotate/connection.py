"""HTTP client for untrusted servers: no redirects, bounded responses, certificates checked.

The client of the package ``openai`` follows redirects and reads responses of any length.
"""

from __future__ import annotations

import email.utils
import functools
import ipaddress
import random
import ssl
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

# A chat completion has a few kilobytes.
MAX_BODY_BYTES = 4 << 20
# The longest wait, in seconds, that a server may request.
MAX_PAUSE = 600.0


class ResponseRejected(ValueError):
    """A server's response is too long or encoded."""


def guarded_client(openai: Any, timeout: float, url: str, most: int = MAX_BODY_BYTES) -> Any:
    """Return an HTTP client for ``openai.AsyncOpenAI`` that follows no redirects and reads bounded responses.

    Certificates are checked, as by default. A proxy from the environment is used only if the connection through it is
    encrypted end to end: never for http, which it could read, nor for this machine.

    Args:
        openai: the package.
        timeout: seconds without a byte until a connection times out.
        url: of the server.
        most: bytes of a response.

    Raises:
        ValueError: the environment names a proxy that cannot be used.
    """
    parts = urllib.parse.urlsplit(url)
    more: dict[str, Any] = {"event_hooks": {"response": [functools.partial(_bound_body, most)]}}
    if parts.scheme == "http" or is_this_machine(parts.hostname):
        library = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]]
        # With an explicit transport, proxies are not used; its limits are those of the package.
        limits = library.Limits(max_connections=1000, max_keepalive_connections=100)
        more["transport"] = library.AsyncHTTPTransport(limits=limits)
    try:
        return _client(openai, timeout, more)
    except (ValueError, ImportError) as error:  # an invalid address, or SOCKS without its package
        raise ValueError(
            f"The proxy in HTTPS_PROXY or ALL_PROXY cannot be used for {parts.hostname} ({error}). Correct the "
            "variable, or exclude the host with NO_PROXY."
        ) from error


def _client(openai: Any, timeout: float, more: dict[str, Any]) -> Any:
    return openai.DefaultAsyncHttpxClient(
        **more,
        timeout=timeout,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # no compressed responses that expand to a large size
    )


async def _bound_body(most: int, response: Any) -> None:
    response.encoding = "utf-8"  # as JSON always is; the server may name a codec that is not a text encoding
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ResponseRejected(f"the response has content encoding {encoding[:20]!r}, which was not requested")
    library = sys.modules[type(response).__module__.partition(".")[0]]

    class Bounded(library.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            count = 0
            async for part in self.stream:
                count += len(part)
                if count > most:
                    raise ResponseRejected(f"the response exceeds {most} bytes")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    response.stream = Bounded(response.stream)


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and its causes, the outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def certificate_error(error: BaseException) -> str:
    """Return why the server's certificate was rejected, empty if it was not."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError) or "certificate verify failed" in str(cause).lower():
            return str(getattr(cause, "verify_message", "") or cause)
    return ""


def never_connected(error: BaseException) -> bool:
    """Return whether a request failed before any of it was sent."""
    return any(type(cause).__name__ in ("ConnectError", "ConnectTimeout") for cause in causes(error))


def is_this_machine(host: str | None) -> bool:
    """Return whether a host is this machine (localhost or a loopback address)."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def retry_after(headers: Any) -> float | None:
    """Return the requested wait in seconds, from ``retry-after-ms`` or ``Retry-After`` (seconds or a date)."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (
                ValueError,
                ArithmeticError,
                LookupError,
                TypeError,
                OSError,
            ):  # all are raised for some invalid dates
                continue
        if seconds == seconds:
            return min(max(seconds, 0.0), MAX_PAUSE)
    return None


def backoff(tries: int) -> float:
    """Return seconds to wait before a retry: 1, 2, 4, … at most 60, with up to 50% jitter."""
    return min(60.0, 2.0**tries) * random.uniform(0.5, 1.0)
