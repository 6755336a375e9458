"""Import and export: round trips in every format lose nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builders.files import chain_text, write_lines
from domainbed_reasoning.chains.formats import FORMATS, ExchangeError, export_records, import_records
from domainbed_reasoning.chains.store import load_chains

Verb = Callable[..., tuple[int, str, str]]
MUGS = [f"art/Mug/Mug_{number}.png" for number in range(3)]
ENDING = {"jsonl": "jsonl", "parquet": "parquet", "internvl": "jsonl", "messages": "parquet"}


def there_and_back(folder: Path, form: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    path = folder / f"{form}.{ENDING.get(form, 'json')}"
    export_records(path, form, records, "Which?", lambda image: (8, 6, b"bytes"), embed_images=True)
    return [record for _, record in import_records(path)]


# What a chain file may hold: no NUL, no lone surrogates, keys of its own.
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
record_of = st.fixed_dictionaries(
    {"image": st.from_regex(r"[a-z é]{1,8}/[a-z]{1,8}/[a-zü ]{1,8}\.jpg", fullmatch=True), "chain": text},
    optional={
        "verdict": st.sampled_from(["accepted", "rejected"]),
        "rule": text,
        "attempt": st.integers(0, 2**53),
        "teacher": st.none() | text,
        "seconds": st.integers(0, 2**53) | st.floats(0, 2**53),
        "verified": st.none() | st.booleans(),
        "usage": st.dictionaries(text.filter(lambda key: key != "dollars" and "tokens" not in key), value, max_size=3),
        "question": text,
        "own key": value,
        "extra": value,
    },
)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=20)
@given(records=st.lists(record_of, min_size=1, max_size=10))
def test_any_record_comes_back_as_it_was(tmp_path: Path, form: str, records: list[dict[str, Any]]) -> None:
    assert there_and_back(tmp_path, form, records) == records


@pytest.mark.parametrize("form", FORMATS)
def test_text_with_every_kind_of_line_break_comes_back_byte_for_byte(tmp_path: Path, form: str) -> None:
    chain = "a\r\nb\u2028c\u2029d\x85e\x0bf\x1cg\n\n \t\U0001f415 é e\u0301"
    back = there_and_back(tmp_path, form, [{"image": "a/b/c.jpg", "chain": chain}])
    assert back[0]["chain"].encode() == chain.encode()


FOREIGN = {
    "internvl": {
        "id": 7,
        "image": "a/b/c.jpg",
        "width": 640,
        "height": 480,
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It is."}],
        "source": {"name": "x", "score": 0.5},
    },
    "llava": {
        "id": "0001",
        "image": "a/b/c.jpg",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "It is.", "weight": 2},
            {"from": "human", "value": "Thanks"},
        ],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "It is."},
        ],
        "images": ["a/b/c.jpg"],
        "split": "train",
    },
}


@pytest.mark.parametrize("form", FOREIGN)
def test_a_row_of_others_comes_back_with_all_it_had(tmp_path: Path, form: str) -> None:
    """Their fields, more turns, a system prompt, the image tag elsewhere: in the same format all of it returns."""
    (tmp_path / "theirs.json").write_text(json.dumps([FOREIGN[form]]), "utf-8")
    records = [record for _, record in import_records(tmp_path / "theirs.json")]
    assert records[0]["chain"] == "It is."
    path = tmp_path / "again.json"
    export_records(path, form, records, "another question", lambda image: (1, 1, b""))
    written = path.read_text("utf-8")
    again = json.loads(written) if written.startswith("[") else [json.loads(written)]
    del again[0]["domainbed_reasoning"]
    assert again == [FOREIGN[form]]


@pytest.mark.parametrize(
    ("name", "content", "failure"),
    [
        ("a.json", "{'x': 1}", "neither JSON Lines nor a JSON array"),
        ("a.json", "[1]", "expected an array of objects"),
        ("a.json", '[{"image": "a.jpg"}]', "row 1: expected 'chain', 'conversations' or 'messages'"),
        ("a.json", '[{"images": ["a.jpg", "b.jpg"], "conversations": []}]', "expected one image path"),
        ("a.json", '[{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}]', "no turn from 'gpt'"),
        ("a.jsonl", '{"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]}\n{torn', "line 2: neither"),
        ("a.parquet", "not parquet", "not a readable Parquet file"),
        ("a.json", '[{"image": "../a", "conversations": [{"from": "gpt", "value": "x"}]}]', "must not contain"),
    ],
)
def test_unknown_format_error_gives_row_and_problem(tmp_path: Path, name: str, content: str, failure: str) -> None:
    path = tmp_path / name
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=failure) as error:
        list(import_records(path))
    assert str(path) in str(error.value)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def gone(image: str) -> tuple[int, int, bytes]:
        raise FileNotFoundError(image)

    with pytest.raises(FileNotFoundError):
        export_records(path, "internvl", [{"image": "a.jpg", "chain": "c"}], "q", gone)
    with pytest.raises(ExchangeError, match="Unknown format 'llama'. Did you mean 'llava'"):
        export_records(path, "llama", [])
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_import_judges_rows_resolves_paths_and_rejects_unknown_images(
    toy: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    mine = tmp_path / "mine.jsonl"
    rows = [
        {"image": "/data/old/toy/art/Mug/Mug_0.png", "chain": chain_text("mug")},
        {"image": "D:\\toy\\art\\Mug\\Mug_1.png", "chain": chain_text("bike")},
        {"image": "art/Mug/Mug_0.png", "chain": chain_text("mug", "square")},
    ]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    where = ("--dataset", "Toy", "--data_dir", toy)
    code, out, err = verb("import", mine, *where, "--teacher", "me", "--min-words", 10)
    assert code == 0, err
    records = lines_of(toy / "toy" / "reasoning.jsonl")
    assert [record["image"] for record in records] == ["art/Mug/Mug_0.png", "art/Mug/Mug_1.png", "art/Mug/Mug_0.png"]
    assert [record.get("rule") for record in records] == [None, "label", "second"]
    assert all(r["teacher"] == "me" and r["label_conditioned"] is None and len(r["sha256"]) == 64 for r in records)
    assert len(load_chains(toy / "toy" / "reasoning.jsonl")) == 1
    # Again: nothing new.
    code, out, _ = verb("import", mine, *where, "--teacher", "me", "--min-words", 10)
    assert code == 0 and "wrote 0 to" in out
    for unknown in ("art/Mug/none.png", "/etc/passwd", "../art/Mug/Mug_0.png", "C:\\none.png"):
        mine.write_text(json.dumps({"image": unknown, "chain": "x"}) + "\n", "utf-8")
        code, _, err = verb("import", mine, *where)
        assert code == 1 and f"row 1: {unknown!r}: Toy at" in err and "has none of these images" in err
        llava = {"image": unknown, "conversations": [{"from": "gpt", "value": "x"}]}
        (tmp_path / "llava.json").write_text(json.dumps([llava]), "utf-8")
        code, _, err = verb("import", tmp_path / "llava.json", *where)
        assert code == 1 and f"{unknown!r}: Toy at" in err and "has none of these images" in err


def test_rows_of_other_images_are_left_out_and_digests_decide_over_paths(
    toy: Path, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """A file of more images than these, whose numbering differs; a re-encoded image has a digest that nothing has."""
    folder = toy / "toy"
    digest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MUGS}
    rows = [
        {"image": MUGS[0], "sha256": digest[MUGS[1]]},  # at this path is another image
        {"image": "elsewhere/0.png", "sha256": digest[MUGS[0]]},
        {"image": MUGS[2], "sha256": "0" * 64},
        {"image": "art/Mug/none.png", "sha256": "1" * 64},
    ]
    mine = tmp_path / "mine.jsonl"
    write_lines(mine, [{**row, "chain": chain_text("mug", str(number))} for number, row in enumerate(rows)])
    code, out, err = verb("import", mine, "--dataset", "Toy", "--data_dir", toy, "--min-words", 5)
    assert code == 0, err
    assert [record["image"] for record in lines_of(folder / "reasoning.jsonl")] == [MUGS[1], MUGS[0], MUGS[2]]
    assert "1  left out, no such image" in out and "is row 4: 'art/Mug/none.png'" in out
    assert "1 row matched by SHA-256" in out and "1 row matched by path alone" in out


def test_accepted_row_without_a_valid_chain_is_imported_as_rejected(
    toy: Path, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """Else the chain file could not be trained on."""
    row = {"image": "art/Mug/Mug_0.png", "chain": "no chain", "verdict": "accepted"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    assert verb("import", tmp_path / "a.jsonl", "--dataset", "Toy", "--data_dir", toy)[0] == 0
    assert lines_of(toy / "toy" / "reasoning.jsonl")[0]["rule"] == "stage_missing"
    assert load_chains(toy / "toy" / "reasoning.jsonl") == {}


def test_the_112_real_chains_go_through_every_format_and_come_back_byte_for_byte(
    test_data: Path, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    where = ("--dataset", "PACS", "--data_dir", test_data)
    first = tmp_path / "first.jsonl"
    code, out, err = verb(
        "import", test_data / "PACS_chains.jsonl", *where, "--chains", first, "--label-conditioned", "no"
    )
    assert code == 0 and "112  accepted" in out, err
    given = {record["image"]: record["chain"] for record in lines_of(test_data / "PACS_chains.jsonl")}
    assert load_chains(first) == given
    for form in FORMATS:
        path = tmp_path / f"{form}.{ENDING.get(form, 'json')}"
        more = ("--embed-images",) if form == "messages" else ()
        assert verb("export", path, "--format", form, *where, "--chains", first, *more)[0] == 0
        back = tmp_path / f"{form}_back.jsonl"
        assert verb("import", path, *where, "--chains", back)[0] == 0
        assert lines_of(back) == lines_of(first)
        assert {image: chain.encode() for image, chain in load_chains(back).items()} == {
            image: chain.encode() for image, chain in given.items()
        }


def test_other_libraries_read_our_exports(test_data: Path, verb: Verb, tmp_path: Path, lines_of: Any) -> None:
    """pandas reads both Parquet files, images decode from their bytes, InternVL rows have sizes and one image tag."""
    import io

    import pandas

    where = ("--dataset", "PACS", "--data_dir", test_data, "--chains", test_data / "PACS_chains.jsonl")
    verb("export", tmp_path / "m.parquet", "--format", "messages", "--embed-images", *where)
    frame = pandas.read_parquet(tmp_path / "m.parquet")
    row = frame.iloc[0]
    assert len(frame) == 112 and [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (227, 227)
    verb("export", tmp_path / "p.parquet", "--format", "parquet", *where)
    assert len(pandas.read_parquet(tmp_path / "p.parquet", columns=["image", "chain"])) == 112
    verb("export", tmp_path / "i.jsonl", "--format", "internvl", "--domains", "photo", "sketch", *where)
    rows = lines_of(tmp_path / "i.jsonl")
    assert len(rows) == 56 and {row["image"].split("/")[0] for row in rows} == {"photo", "sketch"}
    assert all(row["width"] == 227 and row["conversations"][0]["value"].count("<image>") == 1 for row in rows)
    assert math.isclose(rows[0]["height"], 227)
