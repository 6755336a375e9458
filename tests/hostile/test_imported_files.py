"""Untrusted files in other formats: imported correctly, or rejected with file, row and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainbed_reasoning.chains.formats import ExchangeError, import_records
from domainbed_reasoning.chains.parquet import ParquetError
from domainbed_reasoning.chains.store import ChainFileError

TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "dog"}]
GOOD = {"image": "a/b.jpg", "conversations": TURNS}


def row(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


REFUSED = {
    "nothing but a bracket": (b"[", "unterminated array"),
    "an array that does not end": (b"[" + row() + b",", "unterminated array"),
    "an array cut within a row": (b"[" + row() + b"," + row()[:30], "Unterminated|Expecting"),
    "no comma": (b"[" + row() + row() + b"]", "expected a comma"),
    "two commas": (b"[" + row() + b",," + row() + b"]", "expected an array of objects"),
    "text after the array": (b"[" + row() + b"]x", "after the array"),
    "an array of arrays": (b"[" * 100_000, "expected an array of objects"),
    "a row nested too deeply": (b"[" + b'{"a":' * 100_000, "nested too deeply"),
    "a row nested deep": (b'{"image": "a.jpg", "x": ' + b"[" * 500 + b"]" * 500 + b"}", "more than 64 deep"),
    "a key twice": (b'[{"image": "a.jpg", "image": "b.jpg"}]', "duplicate key"),
    "NaN": (b'[{"image": NaN}]', "not a JSON number"),
    "an array of numbers": (b"[1, 2]", "expected an array of objects"),
    "a number": (b"7", "row 1: expected a JSON object"),
    "both fields, one no list": (row(messages=5, image="a"), None),
    "messages as text": (b'{"image": "a.jpg", "messages": "x"}', "must be a list of turns"),
    "a turn as number": (row(conversations=[3]), "must be an object"),
    "no answer": (row(conversations=TURNS[:1]), "no turn from"),
    "image as number": (row(image=3), "expected one image path"),
    "two images": (b'{"images": ["a", "b"], "conversations": []}', "expected one image path"),
    "image climbs": (row(image="../../x.jpg"), "must not contain"),
    "own field not JSON": (row(domainbed_reasoning="{x"), "'domainbed_reasoning' is not valid JSON"),
    "own field takes the chain's place": (row(domainbed_reasoning={"chain": 3}), "'chain' must be a string"),
    "own field with strange usage": (row(domainbed_reasoning={"usage": {"dollars": "x"}}), "'dollars' must be"),
    "NUL in the answer": (row(conversations=[TURNS[0], {"from": "gpt", "value": "a\0"}]), "NUL"),
    "100,000 keys": (json.dumps({f"key{i}": 1 for i in range(100_000)}).encode(), "no image path"),
    "Latin-1": ('[{"image": "\xe9"}]'.encode("latin-1"), "neither JSON Lines nor a JSON array"),
    "not Parquet": (b"PAR1 but no more", "not a readable Parquet file"),
}


def read(file: Path) -> list[dict[str, Any]]:
    return [record for _, record in import_records(file)]


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_file_error_gives_position_problem_and_fix(tmp_path: Path, name: str) -> None:
    data, failure = REFUSED[name]
    if "Parquet" in name:
        pytest.importorskip("pyarrow")
    file = tmp_path / ("rows.parquet" if "Parquet" in name else "rows.json")
    file.write_bytes(data)
    if failure is None:
        assert read(file)[0]["image"] == "a"
        return
    with pytest.raises((ExchangeError, ChainFileError, ParquetError), match=f"(?s)rows.*({failure})") as error:
        read(file)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf[" + row() + b" ,\r\n\t" + row() + b"]\n",
        b"\xef\xbb\xbf" + row() + b"\r\n\r\n" + row() + b"\r\n",
        b" [" + row() + b"," + row() + b" ] ",
    ],
    ids=["array", "lines", "array in one line"],
)
def test_byte_order_marks_and_whitespace_are_ignored(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(data)
    assert [record["chain"] for record in read(file)] == ["dog", "dog"]


def test_a_long_array_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    """Rows of 700 kB over parts of 1 MB: every border lies within a row."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD | {"n": i, "x": "y" * 700_000} for i in range(9)], indent=1))
    assert [record["foreign"]["fields"]["n"] for record in read(file)] == list(range(9))


@pytest.mark.parametrize("start", [b"[", b""])
def test_endless_row_does_not_exhaust_memory(tmp_path: Path, start: bytes) -> None:
    file = tmp_path / "rows.json"
    with open(file, "wb") as out:
        out.write(start + b'{"image": "')
        out.seek(1 << 30)  # sparse: a GiB of NULs
        out.write(b'"}')
    with pytest.raises(ExchangeError, match="rows.json"):
        read(file)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
words = st.sampled_from(["human", "gpt", "user", "assistant", "a/b.jpg", "<image>\n?", "dog", ""])
turn = st.dictionaries(st.sampled_from(["from", "value", "role", "content", "text", "type"]), words | anything)
turns = st.lists(turn | anything, max_size=3) | anything
rows = st.dictionaries(
    st.sampled_from(["image", "images", "conversations", "messages", "domainbed_reasoning", "width", "height", "id"]),
    words | turns | st.just(TURNS) | st.just(["a/b.jpg"]) | st.just([{"path": "a.jpg"}]),
)


@settings(max_examples=400)
@given(row=rows)
def test_any_row_is_imported_or_refused_with_a_message(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    try:
        for record in read(file):
            json.dumps(record, allow_nan=False)
    except (ExchangeError, ChainFileError) as error:
        assert str(file) in str(error)
