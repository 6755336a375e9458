"""The chain file: its guarantees for readers, writers, and killed processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.store import (
    MAX_LINE_BYTES,
    ChainFileError,
    ChainWriter,
    load_chains,
    read_records,
    write_records,
)

CHAIN = Chain("I look at the ears.", "An animal – brown.", "It has paws.", "Fur may mislead.", "dog").render()


def line(image: str = "photo/dog/1.jpg", chain: str = CHAIN, **more: object) -> str:
    return json.dumps({"image": image, "chain": chain, **more}, ensure_ascii=False) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chains.jsonl"


def test_load_returns_accepted_chains_byte_for_byte(file: Path) -> None:
    odd = Chain("ä", "b\u2028c", "\U0001f415 d", "e", "dog").render()
    file.write_text(
        line("a.jpg") + "\n" + line("b.jpg", odd, verdict="accepted") + line("c.jpg", "no", verdict="rejected"), "utf-8"
    )
    assert load_chains(file, {"a.jpg", "b.jpg", "c.jpg"}) == {"a.jpg": CHAIN, "b.jpg": odd}


def test_last_newline_is_optional_and_a_byte_order_mark_is_accepted(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + (line("a.jpg") + line("b.jpg")).rstrip("\n").encode())
    assert list(load_chains(file)) == ["a.jpg", "b.jpg"]


BAD_LINES = {
    "json": ("{'image': 1}\n", "not valid JSON"),
    "utf8": (b'{"image": "\xff", "chain": "x"}\n', "not valid JSON"),
    "raw NUL": (line().replace("paws", "pa\0ws"), "not valid JSON"),
    "number": ("3\n", "expected a JSON object, got int"),
    "deep": ("[" * 100_000 + "\n", "not valid JSON"),
    "no image": ('{"chain": "x"}\n', "'image' is missing"),
    "no chain": ('{"image": "a.jpg"}\n', "'chain' is missing"),
    "type": ('{"image": ["a.jpg"], "chain": "x"}\n', "'image' must be a string, got list"),
    "verdict": (line(verdict="ok"), "'verdict' must be"),
    "escaped NUL": (line(chain=CHAIN.replace("paws", "pa\0ws")), "NUL"),
    "surrogate": (r'{"image": "a.jpg", "chain": "\ud83d"}' + "\n", "surrogate"),
    "surrogate key": (r'{"image": "a.jpg", "chain": "x", "teacher": {"\udc00": 1}}' + "\n", "surrogate"),
    "absolute": (line("/etc/passwd"), "below the dataset's folder"),
    "drive": (line("C:/a.jpg"), "below the dataset's folder"),
    "backslash": (line("photo\\a.jpg"), "below the dataset's folder"),
    "climbing": (line("photo/../../a.jpg"), "must not contain"),
    "empty step": (line("photo//a.jpg"), "must not contain"),
    "unknown": (line("photo/dog/2.jpg"), "image 'photo/dog/2.jpg' is not in the dataset"),
    "stages": (line(chain="<SUMMARY>x</SUMMARY>"), "not have the five stages: <CAPTION> is missing"),
    "long": (line(chain="x" * MAX_LINE_BYTES), f"longer than {MAX_LINE_BYTES:,} bytes"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_invalid_line_error_gives_file_line_and_fix(file: Path, name: str) -> None:
    bad, failure = BAD_LINES[name]
    first = line("photo/dog/0.jpg")
    file.write_bytes(first.encode() + (bad if isinstance(bad, bytes) else bad.encode()))
    with pytest.raises(ChainFileError) as error:
        load_chains(file, {"photo/dog/0.jpg", "photo/dog/1.jpg", "a.jpg"})
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert failure in str(error.value)
    assert error.value.line == 2


def test_two_accepted_chains_of_an_image_are_refused_but_a_rejected_one_beside_it_is_not(file: Path) -> None:
    file.write_text(line(verdict="rejected") + line() + line(verdict="rejected"), "utf-8")
    assert len(load_chains(file)) == 1
    file.write_text(line() + line(), "utf-8")
    with pytest.raises(ChainFileError, match="line 2: a second accepted chain of 'photo/dog/1.jpg'"):
        load_chains(file)


def test_missing_file_error_says_how_to_create_one(file: Path) -> None:
    with pytest.raises(ChainFileError, match="cannot be read.*domainbed-reasoning annotate"):
        load_chains(file)


@pytest.mark.parametrize("cut", [1, 20, 200, len(line("b.jpg").encode()) - 2])
def test_partial_last_line_is_an_error_for_readers_and_removed_by_the_next_writer(file: Path, cut: int) -> None:
    whole = line("a.jpg").encode()
    file.write_bytes(whole + line("b.jpg").encode()[:cut])
    with pytest.raises(ChainFileError, match="line 2: incomplete.*annotate"):
        load_chains(file)
    assert list(load_chains(file, repair=True)) == ["a.jpg"]
    with ChainWriter(file) as writer:
        assert writer.cut_bytes == cut
        writer.append({"image": "c.jpg", "chain": CHAIN})
    assert list(load_chains(file)) == ["a.jpg", "c.jpg"]


def test_repair_does_not_hide_a_bad_line_in_the_middle(file: Path) -> None:
    file.write_text("{torn\n" + line(), "utf-8")
    with pytest.raises(ChainFileError, match="line 1: not valid JSON"):
        load_chains(file, repair=True)


@pytest.mark.parametrize("blank", [b"  ", b"\t", b"\r"])
def test_blanks_at_the_end_are_neither_a_line_nor_a_damage(file: Path, blank: bytes) -> None:
    file.write_bytes(line("a.jpg").encode() + blank)
    with ChainWriter(file) as writer:
        assert writer.cut_bytes == 0
        writer.append({"image": "b.jpg", "chain": CHAIN})
    assert list(load_chains(file)) == ["a.jpg", "b.jpg"]


def test_a_writer_ends_a_whole_last_line_instead_of_cutting_it(file: Path) -> None:
    file.write_text(line("a.jpg").rstrip("\n"), "utf-8")
    with ChainWriter(file) as writer:
        assert writer.cut_bytes == 0
        writer.append({"image": "b.jpg", "chain": CHAIN})
    assert list(load_chains(file)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "value", [{"image": "a.jpg"}, {"image": "a.jpg", "chain": "\ud800"}, {"image": "../a", "chain": ""}]
)
def test_writer_rejects_what_readers_reject(file: Path, value: dict[str, str]) -> None:
    with (
        ChainWriter(file) as writer,
        pytest.raises(ValueError, match="Cannot store the record|cannot be stored as JSON"),
    ):
        writer.append(value)
    assert file.read_bytes() == b""


def test_second_writer_error_names_the_first(file: Path) -> None:
    with ChainWriter(file):
        with pytest.raises(ChainFileError, match="another process.*is writing.*--chains") as error:
            ChainWriter(file)
        if os.path.exists("/proc/locks"):
            assert f"(process {os.getpid()})" in str(error.value)
    with ChainWriter(file) as writer:
        writer.append({"image": "a.jpg", "chain": CHAIN})
    assert len(load_chains(file)) == 1


def test_full_disk_leaves_no_partial_line(file: Path) -> None:
    """The child may write files of 2,000 bytes at most; the record that does not fit leaves the others whole."""
    code = textwrap.dedent(f"""
        import resource, signal, sys
        from domainbed_reasoning.chains.store import ChainWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        writer = ChainWriter({str(file)!r})
        for i in range(100):
            try:
                writer.append({{"image": f"{{i}}.jpg", "chain": {CHAIN!r}}})
            except OSError:
                print(i)
                break
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(load_chains(file)) == int(done.stdout) > 3


def test_appended_records_survive_sigkill(file: Path) -> None:
    """The child prints each number after appending it; every printed number must be in the file after each kill."""
    code = textwrap.dedent(f"""
        import itertools, sys
        from domainbed_reasoning.chains.store import ChainWriter
        with ChainWriter({str(file)!r}, sync_records=64) as writer:
            for i in itertools.count():
                writer.append({{"image": f"{{sys.argv[1]}}/{{i}}.jpg", "chain": {CHAIN!r}}})
                print(i, flush=True)
    """)
    for turn in range(5):
        child = subprocess.Popen([sys.executable, "-c", code, str(turn)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.01 * turn)
        child.send_signal(signal.SIGKILL)
        printed = child.stdout.read().split("\n")[:-1]
        child.wait()
        child.stdout.close()
        last = int(printed[-1]) if printed else 0
        mine = {record["image"] for _, record in read_records(file) if record["image"].startswith(f"{turn}/")}
        assert mine >= {f"{turn}/{i}.jpg" for i in range(last + 1)}


def test_write_records_replaces_a_file_whole_or_not_at_all(file: Path) -> None:
    file.write_text(line("old.jpg"), "utf-8")
    with pytest.raises(ValueError, match="Cannot store the record|cannot be stored as JSON"):
        write_records(file, [{"image": "a.jpg", "chain": CHAIN}, {"image": "b.jpg"}])
    assert list(load_chains(file)) == ["old.jpg"]
    assert write_records(file, [{"image": "a.jpg", "chain": CHAIN}]) == 1
    assert list(load_chains(file)) == ["a.jpg"]
    assert os.listdir(file.parent) == ["chains.jsonl"]


def test_the_112_real_chains_load() -> None:
    data = Path(os.environ.get("DOMAINBED_REASONING_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"the test data is not at {data}; set DOMAINBED_REASONING_TEST_DATA")
    known = {path.relative_to(data / "PACS").as_posix() for path in (data / "PACS").rglob("*.*")}
    chains = load_chains(data / "PACS_chains.jsonl", known)
    assert len(known) == 1120 and len(chains) == 112
    for image, chain in chains.items():
        assert chain.endswith(f"<CONCLUSION>{image.split('/')[1]}</CONCLUSION>")


def test_lines_without_a_version_are_version_1_and_are_written_back_with_the_current_one(file: Path) -> None:
    file.write_text(
        line("a.jpg", teacher="t") + line("b.jpg", format_version=1) + line("c.jpg", format_version=2), "utf-8"
    )
    records = [record for _, record in read_records(file)]
    assert [sorted(record) for record in records] == [["chain", "image", "teacher"], *[["chain", "image"]] * 2]
    write_records(file, records)
    assert [json.loads(text)["format_version"] for text in file.read_text("utf-8").splitlines()] == [2, 2, 2]
    assert [record for _, record in read_records(file)] == records


def test_a_line_of_a_newer_version_is_refused_with_the_upgrade(file: Path) -> None:
    file.write_text(line("a.jpg") + line("b.jpg", format_version=3), "utf-8")
    with pytest.raises(ChainFileError, match="line 2: its format has version 3, .* up to version 2. Upgrade"):
        load_chains(file)
    file.write_text(line("a.jpg", format_version="new"), "utf-8")
    with pytest.raises(ChainFileError, match="'format_version' must be int, got 'new'"):
        load_chains(file)
