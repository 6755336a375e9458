"""How a server is talked to that may be anyone: no redirects, bounded answers, certificates checked.

The client of the package ``openai`` follows redirects and reads whatever comes, however long it is.
"""

from __future__ import annotations

import ipaddress
import ssl
import sys
from collections.abc import AsyncIterator
from typing import Any

# A chat completion has some kilobytes.
MAX_BODY_BYTES = 4 << 20


class BodyRefused(ValueError):
    """A server's answer that is not read to its end."""


def guarded_client(openai: Any, timeout: float) -> Any:
    """Return an HTTP client for ``openai.AsyncOpenAI`` that follows no redirect and reads `MAX_BODY_BYTES` at most.

    Certificates are checked, as the client does by itself.

    Args:
        openai: the package.
        timeout: seconds without a byte until a connection is given up.
    """
    return openai.DefaultAsyncHttpxClient(
        timeout=timeout,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # nothing small that unpacks to something large
        event_hooks={"response": [_bound_body]},
    )


async def _bound_body(response: Any) -> None:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyRefused(f"the answer is packed as {encoding[:20]!r}, which was not asked for")
    library = sys.modules[type(response).__module__.partition(".")[0]]

    class Bounded(library.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            count = 0
            async for part in self.stream:
                count += len(part)
                if count > MAX_BODY_BYTES:
                    raise BodyRefused(f"the answer is longer than {MAX_BODY_BYTES} bytes")
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


def is_this_machine(host: str | None) -> bool:
    """Return whether a host name is the loopback's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
