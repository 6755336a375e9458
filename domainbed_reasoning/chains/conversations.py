"""Conversations of other formats: the layout of their turns, and the image, question and chain of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.chains.chain import ChainError
from domainbed_reasoning.chains.reader import read_chain
from domainbed_reasoning.chains.record import parse_json

IMAGE_TAG = "<image>"
Turn = Mapping[str, Any]


@dataclass(frozen=True)
class TurnStyle:
    """The layout of a conversation's turns in a format.

    Attributes:
        turns: field of a row with its turns.
        speaker: field of a turn with its speaker.
        content: field of a turn with its content.
        user: the speaker who asks.
        assistant: the speaker who answers.
        is_typed: whether a content is a list of parts with types; else it is a text with `IMAGE_TAG`.
    """

    turns: str
    speaker: str
    content: str
    user: str
    assistant: str
    is_typed: bool

    def write(self, question: str, chain: str) -> list[Turn]:
        """Return the two turns of a question about an image and a chain as its answer."""
        asked = [_part("image"), _part("text", question)] if self.is_typed else f"{IMAGE_TAG}\n{question}"
        return [
            {self.speaker: self.user, self.content: asked},
            {self.speaker: self.assistant, self.content: self.answer(chain)},
        ]

    def answer(self, chain: str) -> Any:
        """Return a chain as the content of a turn."""
        return [_part("text", chain)] if self.is_typed else chain


def _part(kind: str, text: str | None = None) -> dict[str, Any]:
    return {"type": kind, "text": text}


SHAREGPT = TurnStyle("conversations", "from", "value", "human", "gpt", is_typed=False)
OPENAI = TurnStyle("messages", "role", "content", "user", "assistant", is_typed=True)
STYLES = (SHAREGPT, OPENAI)  # a reader looks for the fields of either in any row, in this order

_USERS = tuple(style.user for style in STYLES)  # not sets: a speaker may be any JSON value
_ASSISTANTS = tuple(style.assistant for style in STYLES)
_IMAGE_OF_A_PART = ("image", "path", "url", "image_url")
_TAG = re.compile(rf"(\s*){IMAGE_TAG}(\s*)")


def turns_of(row: Mapping[str, Any]) -> tuple[str, list[Turn]]:
    """Return the name of a row's field with its turns, and the turns; a JSON string is parsed.

    Raises:
        ValueError: if it has no list of turns.
    """
    found = {style.turns: _listed(row[style.turns]) for style in STYLES if row.get(style.turns) is not None}
    for name, turns in found.items():
        if not isinstance(turns, list):
            continue
        odd = [turn for turn in turns if not isinstance(turn, dict)]
        if odd:
            raise ValueError(f"each turn in {name!r} must be an object, got {odd[0]!r:.80}")
        return name, turns
    for name, value in found.items():
        kind = "a string that is not a JSON list" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name!r} must be a list of turns, got {kind}: {value!r:.80}")
    has = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
    raise ValueError(f"expected 'chain', 'conversations' or 'messages', got {has:.200}")


def image_of(row: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    """Return the path of a row's image, from its fields ``image`` or ``images``, or from a part of a turn.

    Raises:
        ValueError: if it has none, or several.
    """
    parts = [part for turn in turns for part in _parts(_field(turn, "content")) if isinstance(part, dict)]
    of_parts = [part[name] for part in parts for name in _IMAGE_OF_A_PART if part.get(name) is not None]
    for place, values in (("image", row.get("image")), ("images", row.get("images")), ("a turn", of_parts)):
        found = values if isinstance(values, str) else _listed(values)
        listed = _listed(found) if isinstance(found, str) and found.startswith("[") else found
        values = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not values:
            continue
        paths = [_path(value) for value in values]
        if len(set(paths)) > 1:
            raise ValueError(f"expected one image path; {place!r} has {len(values)} images")
        if paths[0] is None:
            raise ValueError(f"expected one image path; {place!r} has {_described(values[0])}")
        return paths[0]
    raise ValueError("no image path in 'image', 'images' or a turn")


def question_and_chain(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return the question, without image tags, and the first answer that is a chain, or else the last answer.

    Raises:
        ValueError: no turn is an answer.
    """
    asked: list[str] = []
    pairs: list[tuple[str, str]] = []
    is_answered = False
    for turn in turns:
        speaker = _field(turn, "speaker")
        if speaker in _USERS:
            asked = [] if is_answered else asked
            asked.append(without_tag(text_of(_field(turn, "content"))))
            is_answered = False
        elif speaker in _ASSISTANTS:
            pairs.append(("\n".join(filter(None, asked)), text_of(_field(turn, "content"))))
            is_answered = True
    if not pairs:
        raise ValueError("no turn from 'gpt' or 'assistant'")
    return next((pair for pair in pairs if _is_chain(pair[1])), pairs[-1])


def is_answer(turn: Turn) -> bool:
    """Return whether a turn is the model's."""
    return _field(turn, "speaker") in _ASSISTANTS


def without_tag(text: str) -> str:
    """Return a text without image tags."""
    return _TAG.sub(lambda tag: _between(tag, text), text)


def _between(tag: re.Match[str], text: str) -> str:
    """Return the replacement of an image tag: nothing at an end of the text, else whitespace."""
    if tag.start() == 0 or tag.end() == len(text):
        return ""
    return "\n" if "\n" in tag[1] + tag[2] else " "


def text_of(value: Any) -> str:
    """Return the text of a turn, which may be a list of parts."""
    parts = [part.get("text") if isinstance(part, dict) else part for part in _parts(value)]
    return "".join(part for part in parts if isinstance(part, str))


def _field(turn: Turn, name: str, styles: Sequence[TurnStyle] = STYLES) -> Any:
    """Return a turn's ``speaker`` or ``content``, in the first style whose field it has."""
    keys = (getattr(style, name) for style in styles)
    return next((turn[key] for key in keys if key in turn), None)


def to_typed(turns: Sequence[Turn]) -> list[Turn]:
    """Return turns of any style in that of `OPENAI`, one of them with a part for the image."""
    styles = STYLES[::-1]
    renamed = {SHAREGPT.user: OPENAI.user, SHAREGPT.assistant: OPENAI.assistant}
    speakers = [str(_field(turn, "speaker", styles)) for turn in turns]
    speakers = [renamed.get(speaker, speaker) for speaker in speakers]
    contents = [_typed_parts(_field(turn, "content", styles)) for turn in turns]
    if not any(part["type"] == "image" for parts in contents for part in parts):
        asking = speakers.index(OPENAI.user) if OPENAI.user in speakers else 0
        contents[asking].insert(0, _part("image"))
    pairs = zip(speakers, contents, strict=True)
    return [{OPENAI.speaker: speaker, OPENAI.content: parts} for speaker, parts in pairs]


def _typed_parts(content: Any) -> list[dict[str, Any]]:
    parts = [_part("text", part) if isinstance(part, str) else part for part in _parts(content)]
    return [
        _part(str(part.get("type", "text")), part["text"] if isinstance(part.get("text"), str) else None)
        for part in parts
        if isinstance(part, dict)
    ]


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(value: Any) -> Any:
    """Return the list in a JSON string; any other value unchanged."""
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
