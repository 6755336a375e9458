"""Untrusted chain files: read correctly, or rejected with file, line and fix, in bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from builders.processes import run_python
from domainbed_reasoning.chains.chain import Chain, ChainError, conclusion_of, parse_chain
from domainbed_reasoning.chains.store import MAX_LINE_BYTES, ChainFileError, ChainWriter, load_chains, read_lines

CHAIN = Chain("I look.", "An animal.", "It has paws.", "Fur may mislead.", "dog").render()


def line(image: str = "a.jpg", chain: str = CHAIN, **more: Any) -> bytes:
    return json.dumps({"image": image, "chain": chain, **more}).encode() + b"\n"


def raw(value: str) -> bytes:
    """A line with a further key whose value is this very text."""
    return line().rstrip(b"}\n") + b', "x": ' + value.encode() + b"}\n"


# name: (the whole file, what the error says)
REFUSED = {
    "nested beyond the parser": (raw("[" * 200_000 + "]" * 200_000), "nested too deeply"),
    "nested as deep as the parser goes": (raw("[" * 900 + "]" * 900), "more than 64 deep"),
    "objects nested": (raw('{"a":' * 500 + "1" + "}" * 500), "more than 64 deep"),
    "nested, with an escape": (raw('["\\u0041",' * 480 + "1" + "]" * 480), "more than 64 deep"),
    "laughs: a list doubled ten times in a key": (raw('{"lol":' * 70 + "[]" + "}" * 70), "more than 64 deep"),
    "key twice": (line().replace(b'{"image"', b'{"image": "b.jpg", "image"'), "duplicate key 'image'"),
    "chain twice": (line().rstrip(b"}\n") + b', "chain": "x"}\n', "duplicate key 'chain'"),
    "verdict twice": (raw('1, "verdict": "rejected", "verdict": "accepted"'), "duplicate key 'verdict'"),
    "key twice, once escaped": (raw('1, "ch\\u0061in": "y"'), "duplicate key 'chain'"),
    "key twice far inside": (raw('{"a": [{"b": 1, "b": 2}]}'), "duplicate key 'b'"),
    "NaN": (raw("NaN"), "NaN is not a JSON number"),
    "infinity": (raw("-Infinity"), "-Infinity is not a JSON number"),
    "number beyond floats": (raw("1e999"), "too large"),
    "number of 10,000 digits": (raw("9" * 10_000), "not valid JSON"),
    "tokens without end": (line(usage={"prompt_tokens": 10**300}), "'prompt_tokens' must be a number from 0"),
    "tokens as text": (line(usage={"prompt_tokens": "7"}), "'prompt_tokens' must be int"),
    "tokens as truth": (line(usage={"prompt_tokens": True}), "'prompt_tokens' must be int"),
    "dollars below zero": (line(usage={"dollars": -1.0}), "'dollars' must be a number from 0"),
    "usage as list": (line(usage=[1]), "'usage' must be dict"),
    "rule as list": (line(verdict="rejected", rule=["a"]), "'rule' must be str"),
    "attempt as object": (line(attempt={"a": 1}), "'attempt' must be int"),
    "verdict of a strange kind": (line(verdict=["accepted"]), "'verdict' must be"),
    "image as number": (b'{"image": 3, "chain": "x"}\n', "'image' must be a string"),
    "chain as list": (b'{"image": "a.jpg", "chain": ["x"]}\n', "'chain' must be a string"),
    "chain as null": (b'{"image": "a.jpg", "chain": null}\n', "'chain' must be a string"),
    "array of records": (b"[" + line().strip() + b"]\n", "expected a JSON object, got list"),
    "NUL": (line(chain=CHAIN + "\0"), "NUL"),
    "NUL raw": (line().replace(b"paws", b"pa\0ws"), "not valid JSON"),
    "lone surrogate": (line(chain=CHAIN + "\ud800"), "surrogate"),
    "lone surrogate in a key": (line(**{"\udc00": 1}), "surrogate"),
    "UTF-16": (line().decode().encode("utf-16"), "not valid JSON"),
    "Latin-1": ('{"image": "\xe9.jpg", "chain": "x"}\n'.encode("latin-1"), "not valid JSON"),
    "overlong UTF-8": (line().replace(b"paws", b"\xc0\xafws"), "not valid JSON"),
    "a second byte order mark": (line() + b"\xef\xbb\xbf" + line("b.jpg"), "line 2: not valid JSON"),
    "climbs": (line("../../etc/passwd"), "must not contain"),
    "climbs in the middle": (line("photo/../../x.jpg"), "must not contain"),
    "absolute": (line("/etc/passwd"), "below the dataset's folder"),
    "a drive": (line("C:/x.jpg"), "below the dataset's folder"),
    "backslashes": (line("..\\..\\x.jpg"), "below the dataset's folder"),
    "empty steps": (line("photo//x.jpg"), "must not contain '..', '.' or empty parts"),
    "empty path": (line(""), "empty parts"),
    "unknown image": (line("c.jpg"), "image 'c.jpg' is not in the dataset"),
    "tags inside tags": (line(chain=CHAIN.replace("paws", "<REASONING>paws</REASONING>")), "not have the five stages"),
    "a chain within a chain": (line(chain=CHAIN.replace("paws", CHAIN)), "not have the five stages"),
    "another stage inside": (line(chain=CHAIN.replace("paws", "<CAPTION>x</CAPTION>")), "not have the five stages"),
    "100,000 open tags": (line(chain="<SUMMARY>" * 50_000), "not have the five stages"),
    "two conclusions": (line(chain=CHAIN + "<CONCLUSION>cat</CONCLUSION>"), "not have the five stages"),
    "empty chain": (line(chain=""), "not have the five stages"),
    "torn last line": (line() + line("b.jpg")[:-9], "line 2: incomplete"),
    "torn in the middle of a letter": (line() + '{"image": "ä'.encode()[:-1], "line 2: incomplete"),
    "zeros of a power cut": (line() + b"\0" * 4096, "line 2: incomplete"),
    "a line just too long": (line(chain="x" * MAX_LINE_BYTES), "longer than 1,048,576 bytes"),
    "a picture": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)) * 9, "not valid JSON|incomplete"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(1, 200)), "not valid JSON|incomplete"),
    "HTML": (b"<!DOCTYPE html>\n<html>\n", "line 1: not valid JSON"),
    "CSV": (b"image,chain\na.jpg,x\n", "line 1: not valid JSON"),
}

# name: (the whole file, the images that have a chain)
READ = {
    "nothing": (b"", []),
    "blank lines": (b"\n \n\r\n\t\n", []),
    "byte order mark": (b"\xef\xbb\xbf" + line(), ["a.jpg"]),
    "CRLF": (line().rstrip(b"\n") + b"\r\n" + line("b.jpg").rstrip(b"\n") + b"\r\n", ["a.jpg", "b.jpg"]),
    "no newline at the end": (line().rstrip(b"\n"), ["a.jpg"]),
    "U+2028, U+0085 and a form feed in a text": (line(chain=CHAIN.replace("paws", "p\u2028a\x85\x0cws")), ["a.jpg"]),
    "a pair of surrogates, escaped": (line(chain=CHAIN.replace("paws", "\U0001f415")), ["a.jpg"]),
    "keys that nobody knows": (line(x={"y": [1, None, {"z": 2.5}]}), ["a.jpg"]),
    "tags in lower case, HTML and templates": (
        line(chain=CHAIN.replace("paws", "<reasoning><b>{x}</b>{{ 7*7 }}{% raw %}</REASON>")),
        ["a.jpg"],
    ),
    "other tokens in a chain": (line(chain=CHAIN.replace("paws", "<IMG_CONTEXT><|im_end|><s>")), ["a.jpg"]),
    "rejected nonsense": (line(chain="\U0001f4a3 <SUMMARY>", verdict="rejected"), []),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_file_error_gives_position_problem_and_fix(tmp_path: Path, name: str) -> None:
    data, failure = REFUSED[name]
    file = tmp_path / "chains.jsonl"
    file.write_bytes(data)
    with pytest.raises(ChainFileError, match=f"(?s)chains.jsonl, (?=line \\d+: ).*({failure}).*[a-z.]$") as error:
        load_chains(file, {"a.jpg", "b.jpg"})
    assert len(str(error.value)) < 600, "an error is read by people"
    assert file.read_bytes() == data


@pytest.mark.parametrize("name", READ)
def test_unusual_file_is_read_correctly(tmp_path: Path, name: str) -> None:
    data, images = READ[name]
    file = tmp_path / "chains.jsonl"
    file.write_bytes(data)
    chains = load_chains(file, {"a.jpg", "b.jpg"})
    assert list(chains) == images
    with ChainWriter(file) as writer:
        assert writer.cut_bytes == 0
        writer.append({"image": "c.jpg", "chain": CHAIN})
    assert list(load_chains(file)) == [*images, "c.jpg"]


@pytest.mark.parametrize(
    "data",
    [b"hello", line() + b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), b"x" * (3 << 20), b"{" + b"x" * (3 << 20)],
    ids=["a word", "a word after a record", "a picture", "3 MiB", "3 MiB that begin as a record"],
)
def test_other_files_are_never_truncated(tmp_path: Path, data: bytes) -> None:
    """Only what may be the first half of a record is cut off: the user may have named a file of another kind."""
    file = tmp_path / "notes.txt"
    file.write_bytes(data)
    with pytest.raises(ChainFileError, match="not a chain file.*left unchanged"):
        ChainWriter(file)
    assert file.read_bytes() == data


@pytest.mark.parametrize("data", [b'{"image": "b', b'{"a":' * 100_000, b"\0" * 5000], ids=["half", "nested", "zeros"])
def test_remains_of_a_power_failure_are_removed(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "chains.jsonl"
    file.write_bytes(line() + data)
    with ChainWriter(file) as writer:
        assert writer.cut_bytes == len(data)
    assert file.read_bytes() == line()


def test_lines_of_100_megabytes_cost_neither_memory_nor_much_time(tmp_path: Path) -> None:
    """A sparse file of two such lines, read and opened for writing in 96 MiB of memory beyond Python's own."""
    file = tmp_path / "chains.jsonl"
    with open(file, "wb") as out:
        out.write(line() + b'{"image": "')
        out.seek(100 << 20, os.SEEK_CUR)
        out.write(b"\n" + line("b.jpg") + b"x")
        out.seek(100 << 20, os.SEEK_CUR)
        out.write(b"x")
    code = f"""
import resource, sys
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter, read_lines
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for number, record in read_lines({str(file)!r}):
    print(number, record if isinstance(record, ChainFileError) else record["image"])
try:
    ChainWriter({str(file)!r})
except ChainFileError as error:
    print(error)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("memory is read from /proc")
    done = run_python("-c", code)
    printed = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert printed[0] == "1 a.jpg" and printed[2] == "3 b.jpg" and len(printed) == 5
    assert (
        "line 2: longer than" in printed[1] and "line 4: longer than" in printed[3] and "not a chain file" in printed[4]
    )


def test_every_invalid_line_is_listed_and_valid_ones_are_used(tmp_path: Path) -> None:
    file = tmp_path / "chains.jsonl"
    bad = [data for name, (data, _) in REFUSED.items() if "torn" not in name and data.count(b"\n") == 1]
    file.write_bytes(b"".join(data + line("b.jpg") for data in bad if data.endswith(b"\n")))
    good = [number for number, record in read_lines(file) if not isinstance(record, ChainFileError)]
    assert len(good) >= len([data for data in bad if data.endswith(b"\n")])


@pytest.mark.parametrize("text", ["<SUMMARY>" * 200_000, "<" * 1_000_000, "</CONCLUSION>" * 100_000, CHAIN * 5_000])
def test_hostile_texts_are_parsed_in_linear_time(text: str) -> None:
    """A megabyte or so each: quadratic work would not end within the test's time."""
    with pytest.raises(ChainError):
        parse_chain(text)
    conclusion_of(text)
