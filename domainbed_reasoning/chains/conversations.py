"""A row of another format: which image it shows, what it asks of it, and which of its answers is the chain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_reasoning.chains.chain import ChainError
from domainbed_reasoning.chains.reader import read_chain
from domainbed_reasoning.chains.record import parse_json

IMAGE_TAG = "<image>"

# The fields of a row with its turns, and of a part of a turn with its image.
TURNS = ("conversations", "messages")
_IMAGE_OF_A_PART = ("image", "path", "url", "image_url")
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")
_TAG = re.compile(rf"(\s*){IMAGE_TAG}(\s*)")

Turn = Mapping[str, Any]


def turns_of(row: Mapping[str, Any]) -> tuple[str, list[Turn]]:
    """Return the field of a row with its turns, and these; JSON in a text is read.

    Raises:
        ValueError: it has none, or no list of objects, saying what is there.
    """
    there = {name: _listed(row[name]) for name in TURNS if row.get(name) is not None}
    for name, turns in there.items():
        if not isinstance(turns, list):
            continue
        odd = [turn for turn in turns if not isinstance(turn, dict)]
        if odd:
            raise ValueError(f"in {name!r} a turn must be an object, not {odd[0]!r:.80}")
        return name, turns
    for name, value in there.items():
        kind = "a text that is no JSON list" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name!r} as a list of turns is wanted; it has {kind}: {value!r:.80}")
    has = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
    raise ValueError(f"'chain', 'conversations' or 'messages' is wanted; it has {has:.200}")


def image_of(row: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    """Return the path of a row's image: of its fields ``image`` or ``images``, or of a part of a turn.

    Raises:
        ValueError: it has none, or several, saying what is there.
    """
    parts = [part for turn in turns for part in _parts(_content(turn)) if isinstance(part, dict)]
    of_parts = [part[name] for part in parts for name in _IMAGE_OF_A_PART if part.get(name) is not None]
    for place, values in (("image", row.get("image")), ("images", row.get("images")), ("a turn", of_parts)):
        found = values if isinstance(values, str) else _listed(values)
        listed = _listed(found) if isinstance(found, str) and found.startswith("[") else found
        values = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not values:
            continue
        paths = [_path(value) for value in values]
        if len(set(paths)) > 1:
            raise ValueError(f"one image path is wanted; {place!r} has {len(values)} images")
        if paths[0] is None:
            raise ValueError(f"one image path is wanted; {place!r} has {_described(values[0])}")
        return paths[0]
    raise ValueError("one image path is wanted, in 'image', in 'images' or in a turn; there is none")


def question_and_chain(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return the first answer that is a chain, or else the last one, with what was asked before it; no image tags.

    Raises:
        ValueError: nobody answers.
    """
    asked: list[str] = []
    pairs: list[tuple[str, str]] = []
    is_answered = False
    for turn in turns:
        speaker = turn.get("from", turn.get("role"))
        if speaker in _ASKING:
            asked = [] if is_answered else asked
            asked.append(without_tag(text_of(_content(turn))))
            is_answered = False
        elif speaker in _ANSWERING:
            pairs.append(("\n".join(filter(None, asked)), text_of(_content(turn))))
            is_answered = True
    if not pairs:
        raise ValueError("no turn is of 'gpt' or 'assistant'")
    return next((pair for pair in pairs if _is_chain(pair[1])), pairs[-1])


def is_answer(turn: Turn) -> bool:
    """Return whether a turn is the model's."""
    return turn.get("from", turn.get("role")) in _ANSWERING


def without_tag(text: str) -> str:
    """Return a text without the tags that stand for images, wherever they stand."""
    return _TAG.sub(lambda tag: _between(tag, text), text)


def _between(tag: re.Match[str], text: str) -> str:
    """Return what stays of a tag: nothing at an end of the text, else white space."""
    if tag.start() == 0 or tag.end() == len(text):
        return ""
    return "\n" if "\n" in tag[1] + tag[2] else " "


def text_of(value: Any) -> str:
    """Return the text of a turn, which may be a list of parts."""
    parts = [part.get("text") if isinstance(part, dict) else part for part in _parts(value)]
    return "".join(part for part in parts if isinstance(part, str))


def _content(turn: Turn) -> Any:
    return turn.get("value", turn.get("content"))


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(value: Any) -> Any:
    """Return the list that a text holds as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except ValueError:
        return value
    return found if isinstance(found, list) else value


def _path(value: Any) -> str | None:
    if isinstance(value, dict):
        value = next((value[name] for name in ("path", "url") if value.get(name) is not None), None)
    if not isinstance(value, str) or value.startswith("data:"):
        return None
    return value.removeprefix("file://")


def _described(value: Any) -> str:
    if isinstance(value, dict) and value.get("bytes") is not None or str(value)[:5] == "data:":
        return "an embedded image without its path"
    return f"{value!r:.80}"


def _is_chain(text: str) -> bool:
    try:
        read_chain(text)
    except ChainError:
        return False
    return True
