"""The chain file is deleted or its disk is full during a run, or there is nothing to write."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders.servers import annotate_words
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter, read_records

resource = pytest.importorskip("resource")

CHAIN = (
    "<SUMMARY>I look.</SUMMARY><CAPTION>A thing.</CAPTION><REASONING>It has parts.</REASONING>"
    "<REFLECTION>None.</REFLECTION><CONCLUSION>bike</CONCLUSION>"
)
ANSWER = (200, {"choices": [{"message": {"content": CHAIN}, "finish_reason": "stop"}]})


def record(name: str) -> dict[str, str]:
    return {"image": f"{name}.jpg", "chain": CHAIN}


def images(file: Path) -> list[str]:
    return [record["image"].removesuffix(".jpg") for _, record in read_records(file)]


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_text(json.dumps(record("other")) + "\n")
    os.replace(other, file)


def folder_gone(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()


LOSSES: dict[str, tuple[Callable[[Path], None], str]] = {
    "deleted": (Path.unlink, "deleted"),
    "moved away": (lambda file: file.rename(file.with_name("moved")), "deleted"),
    "replaced": (replaced, "replaced"),
    "replaced by a folder": (lambda file: (file.unlink(), file.mkdir())[1], "replaced"),
    "replaced by a link": (lambda file: (file.unlink(), file.symlink_to("nowhere"))[1], "replaced"),
    "deleted with its folder": (folder_gone, "deleted"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("at", ["append", "sync", "close"])
def test_deleted_chain_file_is_detected_and_its_lines_are_saved(loss: str, at: str, tmp_path: Path) -> None:
    happens, word = LOSSES[loss]
    file = tmp_path / "chains" / "c.jsonl"
    writer = ChainWriter(file)
    writer.append(record("a"))
    happens(file)
    with pytest.raises(ChainFileError, match=f"c.jsonl: another program {word} it .* are saved in") as error:
        writer.append(record("b")) if at == "append" else getattr(writer, at)()
    saved = Path(writer.path)
    assert saved != file and str(saved) in str(error.value)
    expected = ["a"] + ["b"] * (at == "append")
    if at != "close":  # what is still under way can be written, without a second error
        writer.append(record("c"))
        writer.close()
        expected += ["c"]
    assert images(saved) == expected
    if loss == "replaced":
        assert images(file) == ["other"], "what another program wrote is left alone"


def test_truncated_chain_file_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    with ChainWriter(file) as writer:
        writer.append(record("a"))
        os.truncate(file, 0)
        with pytest.raises(ChainFileError, match="truncated it"):
            writer.append(record("b"))
        writer.append(record("c"))
    assert images(file) == ["b", "c"]


def test_lines_that_another_program_appends_stay(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    with ChainWriter(file) as writer:
        writer.append(record("a"))
        with file.open("a") as other:
            other.write(json.dumps(record("other")) + "\n")
        writer.append(record("b"))
    assert images(file) == ["a", "other", "b"]


@pytest.fixture
def annotate(toy: Path, verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``annotate(url, …)`` runs the verb and returns exit code, standard output and error."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(url: str, *more: object) -> tuple[int, str, str]:
        return verb(*annotate_words(toy, url, tmp_path / "new" / "c.jsonl", "--retries", 0), *more)

    return run


@pytest.mark.parametrize("loss", ["deleted", "replaced"])
def test_run_with_a_deleted_chain_file_ends_with_every_answer_saved(
    loss: str, scripted: Any, annotate: Any, tmp_path: Path
) -> None:
    """Of eight images, the file goes at the third request; what is under way then is saved, nothing more is asked."""
    file, lock, count = tmp_path / "new" / "c.jsonl", threading.Lock(), [0]

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        with lock:
            count[0] += 1
            if count[0] == 3:
                LOSSES[loss][0](file)
        return ANSWER

    server = scripted(answer)
    code, out, err = annotate(server.url, "--concurrency", 2)
    assert code == 1 and f"c.jsonl: another program {loss} it" in err and "Traceback" not in err
    (saved,) = file.parent.glob("c.jsonl.rescued-*.jsonl")
    assert str(saved) in err and len(images(saved)) == len(server.requests) <= 4


def test_full_disk_error_names_the_file_and_saved_records(
    scripted: Any, annotate: Any, start_verb: Any, toy: Path, tmp_path: Path
) -> None:
    """A file may have 2,000 bytes: three records of some 700."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "new" / "c.jsonl"
    server = scripted(lambda body: ANSWER)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        child = start_verb(*annotate_words(toy, server.url, file, "--retries", 0, "--concurrency", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, err = child.communicate()
    stored = len(images(file))
    assert child.returncode == 1 and stored and len(server.requests) == stored + 1
    assert f"Cannot write {file} (File too large)" in err and "1 answer lost" in err
    assert f"{stored} candidate" in err
    # With room again, the rest is asked for.
    code, out, err = annotate(server.url)
    assert code == 0 and len(set(images(file))) == 8


@pytest.mark.parametrize("host", ["127.0.0.1", "teacher.invalid"])
def test_unreachable_server_is_reported_and_leaves_no_file(
    host: str, annotate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://{host}:{taken.getsockname()[1]}/v1"
    code, out, err = annotate(url, "--limit", 2, "--retries", 1)
    assert code == 1 and f"{url} cannot be reached" in err and "--base-url" in err
    assert "browse" not in out + err and not (tmp_path / "new" / "c.jsonl").exists()


def test_existing_empty_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.touch()
    ChainWriter(file, leave_empty=False).close()
    assert file.exists()
    ChainWriter(tmp_path / "d.jsonl", leave_empty=False).close()
    ChainWriter(tmp_path / "e.jsonl").close()
    assert not (tmp_path / "d.jsonl").exists() and (tmp_path / "e.jsonl").exists()
