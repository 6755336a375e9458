"""Chains to and from the formats of others; nothing is lost on the way there and back.

| format     | file           | read by                                                        |
|------------|----------------|----------------------------------------------------------------|
| `jsonl`    | JSON lines     | this project: one record a line, see `store`                   |
| `parquet`  | Parquet        | this project; pandas, DuckDB                                   |
| `internvl` | JSON lines     | InternVL's fine-tuning: `image`, `width`, `height`, `conversations` |
| `llava`    | one JSON array | LLaVA's fine-tuning: `id`, `image`, `conversations`            |
| `sharegpt` | one JSON array | LLaMA-Factory: `conversations`, `images`                       |
| `messages` | Parquet        | Hugging Face `datasets`, TRL: `messages`, `images`             |

In the formats of others a record's provenance travels in one more field, `domainbed_reasoning`, which their readers
ignore. What a foreign row holds beside that, our record keeps in `foreign`, and gives back in the same format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from domainbed_reasoning.atomic import replacing
from domainbed_reasoning.chains import ChainError, parse_chain
from domainbed_reasoning.parquet import (
    OWN_FIELD,
    message_schema,
    own_schema,
    read_parquet,
    to_columns,
    to_message_columns,
    write_parquet,
)
from domainbed_reasoning.plain_files import open_plain, open_plain_text
from domainbed_reasoning.record import check_record, fault_within, parse_json, parse_json_at
from domainbed_reasoning.registry import unknown
from domainbed_reasoning.store import Record, read_records, write_records

IMAGE_TAG = "<image>"

# A row is one chain and its surroundings; a row this long is another kind of file.
MAX_ROW_CHARACTERS = 8 << 20
_PART_CHARACTERS = 1 << 20


class ExchangeError(ValueError):
    """A file that cannot be read or written in this format; the message names the file, the row and the cure."""


# What an export needs to know of an image: its path → width, height and bytes.
ImageInfo = Callable[[str], tuple[int, int, bytes]]
Row = dict[str, Any]


def export_records(
    path: Path,
    form: str,
    records: Iterable[Record],
    question: str = "",
    image_info: ImageInfo | None = None,
    embed_images: bool = False,
) -> int:
    """Write records to ``path`` in the format ``form`` and return their number.

    Args:
        path: of the new file.
        form: a key of `FORMATS`.
        records: in order.
        question: the prompt of the formats that have one; a record's own `question` goes before it.
        image_info: reads an image, for its size (`internvl`) and bytes (``embed_images``).
        embed_images: put the images' bytes into a `messages` file.

    Raises:
        ExchangeError: unknown format, or one that lacks ``question`` or ``image_info``.
        OSError: if it cannot be written; nothing is left of it then.
    """
    if form not in FORMATS:
        raise ExchangeError(str(unknown("format", form, FORMATS)))
    if form == "jsonl":
        return write_records(path, records)
    if form == "parquet":
        return write_parquet(path, (to_columns(record) for record in records), own_schema())
    if not question:
        raise ExchangeError(f"The format {form!r} holds the question too: give --dataset and --data_dir.")
    make = FORMATS[form]
    rows = (_with_own(make(record, question, image_info, embed_images), record, form) for record in records)
    if form == "messages":
        return write_parquet(path, (to_message_columns(row) for row in rows), message_schema())
    return _write_json(path, rows, as_lines=form == "internvl")


def import_records(path: Path, *, placed: bool = True) -> Iterator[tuple[int, Record]]:
    """Yield (row number from 1, record) of a file in any of the formats, which is told from its contents.

    Args:
        path: of the file.
        placed: the images' paths must be below the dataset's folder; else the caller has to find out what they mean.

    Raises:
        ExchangeError: a file or row that is none of them.
        ChainFileError: likewise, for our own JSON lines.
    """
    try:
        open_plain(path).close()
    except FileNotFoundError as error:
        raise ExchangeError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise ExchangeError(f"{path}: it cannot be read ({error.strerror}). Give a file.") from error
    if path.suffix == ".parquet":
        rows: Iterable[Row] = read_parquet(path)
    else:
        first = _first_object(path)
        if first is not None and "chain" in first:
            yield from read_records(path, placed=placed)
            return
        rows = _read_json(path)
    for number, row in enumerate(rows, 1):
        fault = fault_within(row)
        if fault:
            raise ExchangeError(f"{path}, row {number}: {fault}. Leave the row out.")
        record = _from_row(row, path, number)
        fault = check_record(record, placed=placed)
        if fault:
            raise ExchangeError(f"{path}, row {number}: {fault}. Mend it, or leave the row out.")
        yield number, record


# ---- rows of others ----


def _internvl(record: Record, question: str, image_info: ImageInfo | None, embed: bool) -> Row:
    if image_info is None:
        raise ExchangeError("The format 'internvl' holds the images' sizes: give --dataset and --data_dir.")
    width, height, _ = image_info(record["image"])
    size = {"width": width, "height": height}
    return {"id": record["image"], "image": record["image"]} | size | _turns(record, question)


def _llava(record: Record, question: str, image_info: ImageInfo | None, embed: bool) -> Row:
    return {"id": record["image"], "image": record["image"]} | _turns(record, question)


def _sharegpt(record: Record, question: str, image_info: ImageInfo | None, embed: bool) -> Row:
    return _turns(record, question) | {"images": [record["image"]]}


def _turns(record: Record, question: str) -> Row:
    asked = record.get("question", question)
    return {
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TAG}\n{asked}"},
            {"from": "gpt", "value": record["chain"]},
        ]
    }


def _messages(record: Record, question: str, image_info: ImageInfo | None, embed: bool) -> Row:
    asked = record.get("question", question)
    if embed and image_info is None:
        raise ExchangeError("--embed-images needs the images: give --dataset and --data_dir.")
    data = image_info(record["image"])[2] if embed and image_info else None
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": record["chain"]}]},
        ],
        "images": [{"bytes": data, "path": record["image"]}],
    }


FORMATS: dict[str, Callable[[Record, str, ImageInfo | None, bool], Row]] = {
    "jsonl": lambda record, *_: record,
    "parquet": lambda record, *_: record,
    "internvl": _internvl,
    "llava": _llava,
    "sharegpt": _sharegpt,
    "messages": _messages,
}


def _with_own(row: Row, record: Record, form: str) -> Row:
    """Return the row with the record's provenance and with what a row of this format brought when it was imported."""
    own = {key: value for key, value in record.items() if key not in ("image", "chain")}
    foreign = record.get("foreign")
    if isinstance(foreign, dict) and foreign.get("format") == form:
        row = row | foreign.get("fields", {})
        if "turns" in foreign:
            turns, text = _TURNS[form]
            row[turns] = [
                turn | {text: _as_content(record["chain"], form)} if turn[text] is None else turn
                for turn in foreign["turns"]
            ]
    return row | {OWN_FIELD: own}


# format → (the field with the turns, the field of a turn with its text)
_TURNS = {
    "internvl": ("conversations", "value"),
    "llava": ("conversations", "value"),
    "sharegpt": ("conversations", "value"),
    "messages": ("messages", "content"),
}


def _as_content(chain: str, form: str) -> Any:
    return [{"type": "text", "text": chain}] if form == "messages" else chain


def _from_row(row: Row, path: Path, number: int) -> Record:
    """Return the record that a row of another format holds.

    Raises:
        ExchangeError: it is none.
    """
    place = f"{path}, row {number}"
    if not isinstance(row, dict):
        raise ExchangeError(f"{place}: a JSON object is wanted, not {type(row).__name__}.")
    if "chain" in row:
        return row
    own = row.get(OWN_FIELD)
    if isinstance(own, str):
        try:
            own = parse_json(own)
        except ValueError as error:
            raise ExchangeError(f"{place}: the field {OWN_FIELD!r} is not JSON ({error}); leave it out.") from error
    image = row.get("image")
    if image is None and isinstance(row.get("images"), list) and len(row["images"]) == 1:
        image = row["images"][0]
    if isinstance(image, dict):
        image = image.get("path")
    if not isinstance(image, str):
        raise ExchangeError(f"{place}: one image path is wanted, in 'image' or 'images', not {image!r:.80}.")
    question, chain = _question_and_chain(row, place)
    if isinstance(own, dict):
        return {"image": image, "chain": chain, **own}
    record: Record = {"image": image, "chain": chain, "question": question}
    foreign = _foreign(row, record)
    try:
        json.dumps(foreign)
    except (TypeError, ValueError) as error:
        raise ExchangeError(
            f"{place}: it has a value that JSON cannot hold ({error}); leave that column out."
        ) from error
    return record | ({"foreign": foreign} if foreign else {})


def _foreign(row: Row, record: Record) -> Row:
    """Return what a row holds that our own row of the same record would not."""
    form = _form_of(row)
    turns, text = _TURNS[form]
    ours = _with_own(
        FORMATS[form](record, "", lambda _: (row.get("width", 0), row.get("height", 0), b""), False), {}, form
    )
    fields = {key: value for key, value in row.items() if key not in ("image", "images", turns, OWN_FIELD)}
    foreign: Row = {"format": form}
    if fields:
        foreign["fields"] = fields
    if _without_nulls(row[turns]) != _without_nulls(ours[turns]):
        is_answer = [_text(turn.get(text)) == record["chain"] for turn in row[turns]]
        foreign["turns"] = [turn | {text: None} if it else turn for turn, it in zip(row[turns], is_answer, strict=True)]
    return foreign if len(foreign) > 1 else {}


def _without_nulls(value: Any) -> Any:
    """Return a JSON value without keys that are null, as which Parquet gives absent ones."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _form_of(row: Row) -> str:
    if "conversations" not in row:
        return "messages"
    if "images" in row:
        return "sharegpt"
    return "internvl" if "width" in row else "llava"


def _question_and_chain(row: Row, place: str) -> tuple[str, str]:
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        has = ", ".join(map(str, row))
        raise ExchangeError(f"{place}: 'chain', 'conversations' or 'messages' is wanted; it has {has:.200}.")
    asked, answers = "", []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ExchangeError(f"{place}: a turn must be an object, not {turn!r:.80}.")
        speaker = turn.get("from", turn.get("role"))
        text = _text(turn.get("value", turn.get("content")))
        if speaker in ("human", "user"):
            asked = asked or text.replace(f"{IMAGE_TAG}\n", "", 1)
        elif speaker in ("gpt", "assistant"):
            answers.append(text)
    if not answers:
        raise ExchangeError(f"{place}: no turn is of 'gpt' or 'assistant'.")
    return asked, next((text for text in answers if _is_chain(text)), answers[-1])


def _text(value: Any) -> str:
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return value if isinstance(value, str) else ""


def _is_chain(text: str) -> bool:
    try:
        parse_chain(text)
    except ChainError:
        return False
    return True


# ---- JSON ----


def _first_object(path: Path) -> Row | None:
    """Return the first line's object; None if the file does not begin with one."""
    with open_plain_text(path, "utf-8-sig", errors="replace", newline="\n") as file:
        while line := file.readline(MAX_ROW_CHARACTERS):
            if not line.isspace():
                try:
                    first = parse_json(line)
                except ValueError:
                    return None
                return first if isinstance(first, dict) else None
    return None


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the values of JSON lines or of one JSON array, with one row in memory at a time."""
    place = str(path)
    try:
        with open_plain_text(path, "utf-8-sig", newline="\n") as file:
            start = file.read(_PART_CHARACTERS).lstrip()
            if start.startswith("["):
                yield from _read_array(start[1:], file)
                return
            file.seek(0)
            number = 0
            # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
            while line := file.readline(MAX_ROW_CHARACTERS):
                number += 1
                place = f"{path}, line {number}"
                if len(line) == MAX_ROW_CHARACTERS:
                    raise ValueError(f"longer than {MAX_ROW_CHARACTERS} characters")
                if line.strip():
                    yield parse_json(line)
    except ValueError as error:
        raise ExchangeError(
            f"{place}: neither JSON lines nor a JSON array ({error}). Give a file in one of the formats of `export`."
        ) from error


def _read_array(text: str, file: IO[str]) -> Iterator[Any]:
    """Yield the items of a JSON array whose opening bracket has been read.

    Raises:
        ValueError: it is none.
    """
    at, is_first = 0, True
    while True:
        fault: ValueError = ValueError("the array does not end")
        at = _after_space(text, at)
        if text.startswith("]", at):
            if text[at + 1 :].strip() or file.read(_PART_CHARACTERS).strip():
                raise ValueError("text stands after the array")
            return
        begin = at if is_first else _after_space(text, at + 1)
        if at < len(text) and not is_first and text[at] != ",":
            raise ValueError(f"a comma is wanted, not {text[at : at + 20]!r}")
        if begin < len(text):
            if text[begin] != "{":
                raise ValueError(f"an array of objects is wanted, not {text[begin : begin + 20]!r}")
            try:
                value, at = parse_json_at(text, begin)
            except json.JSONDecodeError as error:  # perhaps its end has not been read yet
                fault = error
            else:
                yield value
                is_first = False
                continue
        more = file.read(_PART_CHARACTERS) if len(text) - at <= MAX_ROW_CHARACTERS else ""
        if not more:
            raise fault
        text, at = text[at:] + more, 0


def _after_space(text: str, at: int) -> int:
    """Return the place of the first character from ``at`` on that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _write_json(path: Path, rows: Iterable[Row], as_lines: bool) -> int:
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(b"" if as_lines else b"[")
        for row in rows:
            file.write(b"" if as_lines else b",\n" if count else b"\n")
            file.write(json.dumps(row, ensure_ascii=False).encode() + (b"\n" if as_lines else b""))
            count += 1
        file.write(b"" if as_lines else b"\n]\n")
    return count
