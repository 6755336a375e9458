"""What a server of a test sends."""

import json
from typing import Any


def response(body: Any, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    """Return an HTTP response: ``body`` as it is where it is bytes, else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def completion(content: Any, **choice: Any) -> dict[str, Any]:
    """Return a chat completion with one choice."""
    return {"choices": [{"message": {"content": content}, **choice}]}
