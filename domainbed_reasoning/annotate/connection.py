"""How a server is talked to that may be anyone: no redirects, bounded answers, certificates checked.

The client of the package ``openai`` follows redirects and reads whatever comes, however long it is.
"""

from __future__ import annotations

import email.utils
import ipaddress
import random
import ssl
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

# A chat completion has some kilobytes.
MAX_BODY_BYTES = 4 << 20
# Seconds that a server may ask to wait.
MAX_PAUSE = 600.0


class BodyRefused(ValueError):
    """A server's answer that is not read to its end."""


def guarded_client(openai: Any, timeout: float, url: str) -> Any:
    """Return an HTTP client for ``openai.AsyncOpenAI`` that follows no redirect and reads `MAX_BODY_BYTES` at most.

    Certificates are checked, as the client does by itself. A proxy that the environment names is used where the
    connection through it is encrypted to its end: never for http, which it could read, nor for this machine.

    Args:
        openai: the package.
        timeout: seconds without a byte until a connection is given up.
        url: of the server.

    Raises:
        ValueError: the environment names a proxy that cannot be used.
    """
    parts = urllib.parse.urlsplit(url)
    more = {}
    if parts.scheme == "http" or is_this_machine(parts.hostname):
        library = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]]
        # A transport of its own is never asked about proxies; its limits are those of the package.
        limits = library.Limits(max_connections=1000, max_keepalive_connections=100)
        more["transport"] = library.AsyncHTTPTransport(limits=limits)
    try:
        return _client(openai, timeout, more)
    except (ValueError, ImportError) as error:  # an odd address, or SOCKS without its package
        raise ValueError(
            f"The proxy that HTTPS_PROXY or ALL_PROXY names cannot be used for {parts.hostname} ({error}). Correct "
            "the variable, or exclude the host with NO_PROXY."
        ) from error


def _client(openai: Any, timeout: float, more: dict[str, Any]) -> Any:
    return openai.DefaultAsyncHttpxClient(
        **more,
        timeout=timeout,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # nothing small that unpacks to something large
        event_hooks={"response": [_bound_body]},
    )


async def _bound_body(response: Any) -> None:
    response.encoding = "utf-8"  # JSON is nothing else, and some names of encodings stand for no text at all
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyRefused(f"the response has content encoding {encoding[:20]!r}, which was not requested")
    library = sys.modules[type(response).__module__.partition(".")[0]]

    class Bounded(library.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            count = 0
            async for part in self.stream:
                count += len(part)
                if count > MAX_BODY_BYTES:
                    raise BodyRefused(f"the response exceeds {MAX_BODY_BYTES} bytes")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    response.stream = Bounded(response.stream)


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and what it came from, the outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def certificate_fault(error: BaseException) -> str:
    """Return why the server's certificate was refused, empty if that is not what happened."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError) or "certificate verify failed" in str(cause).lower():
            return str(getattr(cause, "verify_message", "") or cause)
    return ""


def never_connected(error: BaseException) -> bool:
    """Return whether a request failed before anything of it was sent."""
    return any(type(cause).__name__ in ("ConnectError", "ConnectTimeout") for cause in causes(error))


def is_this_machine(host: str | None) -> bool:
    """Return whether a host name is the loopback's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def retry_after(headers: Any) -> float | None:
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
            except (ValueError, ArithmeticError, LookupError, TypeError, OSError):  # each comes of some odd date
                continue
        if seconds == seconds:
            return min(max(seconds, 0.0), MAX_PAUSE)
    return None


def backoff(tries: int) -> float:
    """Return seconds to wait after so many faults: 1, 2, 4, … at most 60, with jitter of a half."""
    return min(60.0, 2.0**tries) * random.uniform(0.5, 1.0)
