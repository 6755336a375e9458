"""Responses of test servers, and requests to them by the teacher or by `annotate`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from domainbed_reasoning.annotate.teacher import Request

REQUEST = Request("Which?", b"jpeg", seed=1, max_tokens=9, temperature=1.0, top_p=1.0)


def response(body: Any, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    """Return an HTTP response: ``body`` as it is where it is bytes, else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def completion(content: Any, **choice: Any) -> dict[str, Any]:
    """Return a chat completion with one choice."""
    return {"choices": [{"message": {"content": content}, **choice}]}


def ask(url: str, timeout: float = 30, **options: Any) -> Any:
    """Return the teacher's answer; a server that holds the client forever fails the test."""
    from domainbed_reasoning.annotate.openai import OpenAITeacher

    async def once() -> Any:
        teacher = OpenAITeacher("m", base_url=url, timeout=timeout, retries=0, **options)
        try:
            return await teacher.answer(REQUEST)
        finally:
            await teacher.close()

    return asyncio.run(asyncio.wait_for(once(), 600))


def annotate_words(data_dir: object, url: str, chains: object, *options: object) -> list[object]:
    """Return the command line that annotates Toy by a server whose chains are barely checked."""
    words = ["annotate", "--dataset", "Toy", "--data_dir", data_dir, "--teacher", "openai:m", "--base-url", url]
    return [*words, "--chains", chains, "--min-words", 1, "--unverified", *options]
