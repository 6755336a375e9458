"""The text in a chat completion's message: in ``content``, in a list of parts, or in ``reasoning_content``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# vLLM and SGLang put the whole answer there if the model never closes its thoughts; OpenRouter and newer vLLM call it
# "reasoning".
_REASONING = ("reasoning_content", "reasoning")
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")


def text_of(message: Mapping[str, Any]) -> str | None:
    """Return a message's answer; None if it contains no text.

    Thoughts are omitted if there is an answer beside them, and are the answer otherwise.

    Raises:
        TypeError: a content is not a string, an object or a list of them.
    """
    content = _text(message.get("content"))
    if content is not None and content.strip():
        return content
    thoughts = (_text(message.get(name)) for name in _REASONING)
    return next((text for text in thoughts if text and text.strip()), content)


def _text(content: Any) -> str | None:
    """Return the text of a content without thoughts: a string, a part, or a list of either."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        if None in content:
            raise TypeError("the content has a null part")
        texts = [text for part in content if (text := _text(part)) is not None]
        return "".join(texts) if texts else None
    if not isinstance(content, dict):
        raise TypeError(f"the content must be a string, an object or a list, got {type(content).__name__}")
    if content.get("type") in _THOUGHTS:
        return None
    return _text(next((content[name] for name in ("text", "value", "content") if name in content), None))
