"""Importing conversations: any way to name the image, and any turn that contains the chain."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from domainbed_reasoning.chains.formats import ExchangeError, export_records, import_records

PATH = "photo/dog/0.png"
ASKED = {"from": "human", "value": "<image>\nWhat?"}


def read(folder: Path, *rows: Any, as_lines: bool = False) -> list[dict[str, Any]]:
    file = folder / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    return [record for _, record in import_records(file)]


def answer(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


IMAGES: dict[str, dict[str, Any]] = {
    "a text": {"image": PATH}, "a list of one": {"image": [PATH]}, "images as text": {"images": PATH},
    "images as JSON": {"images": json.dumps([PATH])}, "an object": {"image": {"path": PATH}},
    "objects": {"images": [{"bytes": None, "path": PATH}]}, "beside null": {"image": None, "images": [PATH]},
    "an empty list beside": {"image": [], "images": [PATH]}, "a URL": {"image": {"url": f"file://{PATH}"}},
    "twice": {"images": [PATH, PATH]}, "bytes with a path": {"images": [{"bytes": "x", "path": PATH}]},
}  # fmt: skip


@pytest.mark.parametrize("fields", IMAGES.values(), ids=IMAGES)
def test_an_image_is_found_however_it_is_named(tmp_path: Path, fields: dict[str, Any]) -> None:
    (record,) = read(tmp_path, {**fields, "conversations": [ASKED, answer("dog")]})
    assert record["image"] == PATH and record["question"] == "What?"


PARTS: dict[str, Any] = {
    "path": {"type": "image", "path": PATH}, "image": {"type": "image", "image": PATH},
    "url": {"type": "image", "url": PATH}, "image_url": {"type": "image_url", "image_url": {"url": PATH}},
    "object": {"type": "image", "image": {"path": PATH}},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_an_image_is_found_in_a_turn_as_hugging_face_writes_it(tmp_path: Path, part: dict[str, Any]) -> None:
    content = [part, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "dog"}]}]
    for row in ({"messages": turns}, {"messages": turns, "conversations": None}, {"messages": json.dumps(turns)}):
        (record,) = read(tmp_path, row)
        assert (record["image"], record["question"], record["chain"]) == (PATH, "What?", "dog")


@pytest.mark.parametrize(
    ("fields", "failure"),
    [
        ({"images": ["a.png", "b.png"]}, "'images' has 2 images"),
        ({"images": [{"bytes": "x", "path": None}]}, "'images' has an embedded image without its path"),
        ({"image": "data:image/png;base64,AAAA"}, "'image' has an embedded image without its path"),
        ({"image": 7}, "'image' has 7"),
        ({}, "no image path in 'image', 'images' or a turn"),
        (
            {"image": PATH, "conversations": "no JSON"},
            "'conversations' must be a list of turns, got a string",
        ),
        ({"image": PATH, "conversations": None}, r"or 'messages', got .*conversations \(null\)"),
        (
            {"image": PATH, "conversations": {"from": "gpt"}},
            "'conversations' must be a list of turns, got dict",
        ),
    ],
)
def test_errors_describe_the_actual_values(tmp_path: Path, fields: dict[str, Any], failure: str) -> None:
    with pytest.raises(ExchangeError, match=f"row 1: .*{failure}"):
        read(tmp_path, {"conversations": [ASKED, answer("dog")], **fields})


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("<image>\nWhat?", "What?"), ("<image>What?", "What?"), ("What?\n<image>", "What?"), ("What? <image>", "What?"),
        ("Look <image> here", "Look here"), ("Look:\n<image>\nWhat?", "Look:\nWhat?"), ("What?", "What?"),
    ],
)  # fmt: skip
def test_image_tag_may_be_anywhere(tmp_path: Path, text: str, question: str) -> None:
    turns = [{"from": "human", "value": text}, answer("dog")]
    (record,) = read(tmp_path, {"image": PATH, "conversations": turns})
    assert record["question"] == question
    export_records(tmp_path / "again.json", "llava", [record], "another")
    assert json.loads((tmp_path / "again.json").read_text())[0]["conversations"] == turns


def test_chain_is_paired_with_the_question_of_its_turn(tmp_path: Path, chain_text: Callable[..., str]) -> None:
    chain = chain_text("mug")
    turns = [ASKED, answer("A mug."), {"from": "human", "value": "Why?"}, answer(chain)]
    turns += [{"from": "human", "value": "Sure?"}, answer("Yes.")]
    (record,) = read(tmp_path, {"image": PATH, "conversations": turns})
    assert (record["question"], record["chain"]) == ("Why?", chain)
    apart = [{"from": "human", "value": "<image>"}, {"from": "human", "value": "Which?"}, answer(chain)]
    assert read(tmp_path, {"image": PATH, "conversations": apart})[0]["question"] == "Which?"


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_may_hold_own_rows_and_others_in_either_order(tmp_path: Path, order: int) -> None:
    rows = [{"image": "a/b.png", "chain": "x"}, {"image": PATH, "conversations": [ASKED, answer("dog")]}]
    for as_lines in (True, False):
        found = read(tmp_path, *rows[::order], as_lines=as_lines)
        assert [record["chain"] for record in found] == ["x", "dog"][::order]


def test_invalid_array_row_error_gives_number_and_position(tmp_path: Path) -> None:
    good = json.dumps({"image": PATH, "conversations": [ASKED, answer("x" * 700_000)]})
    for broken, failure in (
        ('{"image": nope}', "Expecting value"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("7", "expected an array"),
    ):
        text = f" [{good},\n{good},\n{broken}]"
        (tmp_path / "rows.json").write_text(text)
        at = text.index(broken) + 1 + (len('{"image": ') if "nope" in broken else 0)
        with pytest.raises(ExchangeError, match=f"rows.json, row 3, character {at}: {failure}"):
            list(import_records(tmp_path / "rows.json"))


def test_unstorable_row_is_rejected_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="row 1: .*above the limit for a line of a chain file"):
        read(tmp_path, {"image": PATH, "conversations": [ASKED, answer("x" * (2 << 20))]})


# ---- what goes out ----


def export(folder: Path, form: str, foreign: dict[str, Any]) -> dict[str, Any]:
    record = {"image": PATH, "chain": "dog", "question": "What?", "foreign": {"format": form, **foreign}}
    path = folder / ("out.parquet" if form == "messages" else "out.json")
    export_records(path, form, [record], "Which?", lambda _: (8, 6, b"bytes"), True)
    if form == "messages":
        pandas = pytest.importorskip("pandas")
        row = pandas.read_parquet(path).iloc[0].to_dict()
        return row | {"images": [dict(image) for image in row["images"]]}
    text = path.read_text()
    found = json.loads(text)
    return found[0] if isinstance(found, list) else found


@pytest.mark.parametrize("form", ["internvl", "llava", "sharegpt", "messages"])
def test_foreign_fields_neither_replace_ours_nor_name_outside_files(tmp_path: Path, form: str) -> None:
    climb = "../../../../etc/passwd"
    fields = {
        "image": climb,
        "images": [climb],
        "conversations": climb,
        "messages": [{"role": "user", "content": climb}],
    }
    fields |= {"video": climb, "videos": ["/etc/passwd"], "image_path": climb, "chain": climb, "note": "kept"}
    fields |= {"domainbed_reasoning": {"image": climb}}
    turns = [
        {"from": "human", "value": [{"type": "image", "image": climb, "path": climb}]},
        {"from": "gpt", "value": None},
    ]
    row = export(tmp_path, form, {"fields": fields, "turns": turns})
    own = row.pop("domainbed_reasoning")
    row["own question"] = (json.loads(own) if isinstance(own, str) else own)["question"]
    other = "messages" if form != "messages" else "conversations"
    row.pop(other, None)
    row.pop("extra", None)
    text = json.dumps(row, default=str)
    assert "passwd" not in text and PATH in text and row["own question"] == "What?"
    if form != "messages":
        assert row["note"] == "kept" and row["conversations"][1] == {"from": "gpt", "value": "dog"}


@pytest.mark.parametrize(
    "foreign",
    [{"fields": 5}, {"turns": 5}, {"turns": [5]}, {"fields": ["a"]}, {"turns": [{}]}, {"turns": [{"value": None}]}],
)
@pytest.mark.parametrize("form", ["internvl", "llava", "sharegpt", "messages"])
def test_foreign_values_of_any_kind_end_in_a_row_or_a_message(
    tmp_path: Path, form: str, foreign: dict[str, Any]
) -> None:
    try:
        export(tmp_path, form, foreign)
    except ExchangeError as error:
        assert f"'{PATH}' has an invalid 'foreign'" in str(error)


def test_record_with_a_path_outside_the_folder_is_not_exported(tmp_path: Path) -> None:
    for form in ("jsonl", "parquet", "llava", "sharegpt", "internvl", "messages"):
        with pytest.raises(ValueError, match="must not contain"):
            export_records(tmp_path / "x", form, [{"image": "../x", "chain": "c"}], "q", lambda _: (1, 1, b""))
        assert not (tmp_path / "x").exists()


def test_hugging_face_reads_a_messages_file_as_images_and_turns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "load_dataset"):
        pytest.skip("no Hugging Face datasets here: pip install datasets")
    picture = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(picture, "PNG")
    record = {"image": PATH, "chain": "dog"}
    export_records(tmp_path / "m.parquet", "messages", [record], "Which?", lambda _: (8, 6, picture.getvalue()), True)
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "m.parquet"), cache_dir=str(tmp_path))
    row = loaded[0]
    assert [image.size for image in row["images"]] == [(8, 6)] and row["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    trainer = pytest.importorskip("trl.data_utils", reason="no TRL here: pip install trl")
    ready = trainer.prepare_multimodal_messages(row["messages"], images=row["images"])
    assert ready[0]["content"][0]["image"].size == (8, 6)


def test_features_are_stored_in_the_file_metadata(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    foreign = {"format": "messages", "turns": [{"role": "user", "content": "What?"}, {"from": "gpt", "content": None}]}
    record = {"image": PATH, "chain": "dog", "foreign": foreign}
    export_records(tmp_path / "m.parquet", "messages", [record], "Which?", lambda _: (8, 6, b"x"), True)
    table = parquet.read_table(tmp_path / "m.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["images"] == [{"_type": "Image"}] and set(features) == set(table.column_names)
    user, assistant = table.to_pylist()[0]["messages"]
    assert user["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "dog"}]}
