"""Teachers with imperfectly formatted answers: what is stored, when a run stops, and `--rejudge` offline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domainbed_reasoning.annotate.message import text_of
from domainbed_reasoning.annotate.rejudge import rejudge
from domainbed_reasoning.chains.chain import parse_chain
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter, load_chains

Verb = Callable[..., tuple[int, str, str]]
NAMES = ("alarm clock", "bike", "mug")


def where(toy: Path, chains: Path) -> list[object]:
    return ["annotate", "--dataset", "Toy", "--data_dir", toy, "--chains", chains, "--min-words", 10]


def arguments(toy: Path, url: str, chains: Path) -> list[object]:
    return [*where(toy, chains), "--teacher", "openai:test", "--base-url", url]


STYLES = {
    "think": ["think"],
    "thought": ["think"],
    "fence": ["fence"],
    "lower": ["case"],
    "bold": ["bold"],
    "heading": ["heading"],
    "preamble": ["preamble", "postscript"],
    "article": ["conclusion"],
    "sentence": ["conclusion"],
}


@pytest.fixture
def calm(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> dict[str, str]:
    """The accepted chains of a teacher whose answers are perfectly formed."""
    verb(*arguments(toy, serve().url, tmp_path / "calm.jsonl"))
    return load_chains(tmp_path / "calm.jsonl")


@pytest.mark.parametrize("style", STYLES)
def test_normalized_chain_is_accepted_and_the_raw_text_kept(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: dict[str, str], style: str
) -> None:
    """The same answers, written in another way: the same chains train."""
    chains = tmp_path / "chains.jsonl"
    code, out, err = verb(*arguments(toy, serve("--style", style).url, chains))
    assert code == 0, err
    assert load_chains(chains) == calm
    for record in lines_of(chains):
        if record["verdict"] == "accepted":
            assert record["normalized"] == STYLES[style]
            assert record["raw"] != record["chain"] and parse_chain(record["chain"])
        else:
            assert not {"raw", "normalized"} & record.keys()


@pytest.mark.parametrize("field", ["reasoning_content", "parts"])
def test_an_answer_is_read_wherever_the_server_puts_it(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, calm: dict[str, str], field: str
) -> None:
    code, _, err = verb(*arguments(toy, serve("--field", field).url, tmp_path / "c.jsonl"))
    assert code == 0, err
    assert load_chains(tmp_path / "c.jsonl") == calm


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": "a", "reasoning_content": "b"}, "a"),
        ({"content": None, "reasoning_content": "b"}, "b"),
        ({"content": " ", "reasoning": "b"}, "b"),
        ({"content": [], "reasoning_content": "b"}, "b"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": ["a", "b"]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "output_text", "text": {"value": "a"}}]}, "a"),
        ({"content": {"text": "a"}}, "a"),
        ({"content": [{"type": "image_url"}]}, None),
        ({"content": None}, None),
        ({"content": ""}, ""),
        ({}, None),
    ],
)
def test_message_text_is_extracted(message: dict[str, Any], text: str | None) -> None:
    assert text_of(message) == text


def test_invalid_message_part_is_rejected() -> None:
    for content in (["a", 7], ["a", None], [{"text": 7}], 7):
        with pytest.raises(TypeError):
            text_of({"content": content})


def test_thirty_rejections_without_an_acceptance_stop_the_run_with_an_example_and_advice(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains = tmp_path / "c.jsonl"
    command = arguments(toy, serve("--style", "hopeless").url, chains)
    code, out, _ = verb(*command, "--concurrency", 4)
    assert code == 1
    assert 30 <= len(lines_of(chains)) <= 33  # what was under way is kept
    assert "Stopped early: no candidate was accepted." in out
    assert "Most frequent rule: stage_missing" in out and "--prompt teacher" in out
    example = next(line for line in out.splitlines() if "detail" in line)
    assert len(example) < 450 and "\x1b" not in out and "\\x1b[31m" in example and "[…]" in example


def test_run_continues_if_the_teacher_had_an_accepted_chain(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """A second run, for the hard images that are left, may be rejected thirty times in a row."""
    chains = tmp_path / "c.jsonl"
    verb(*arguments(toy, serve().url, chains), "--max-requests", 6, "--concurrency", 1)
    there = len(lines_of(chains))
    assert load_chains(chains)
    code, out, _ = verb(*arguments(toy, serve("--style", "hopeless").url, chains))
    assert code == 0 and "None of" in out and len(lines_of(chains)) - there > 40


def test_a_run_that_ends_without_an_acceptance_fails_and_so_does_the_next(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path
) -> None:
    command = arguments(toy, serve("--style", "hopeless").url, tmp_path / "c.jsonl")
    code, out, _ = verb(*command, "--candidates", 1)
    assert code == 1 and "None of 18 candidates was accepted" in out and "Stopped" not in out
    code, out, _ = verb(*command, "--candidates", 1)
    assert code == 1 and "Nothing to do" in out and "--rejudge" in out


def test_stored_candidates_are_judged_again_without_a_teacher(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: dict[str, str]
) -> None:
    """Drawn by the exact rules, nothing is accepted; judged again, what one run would have had, and back."""
    chains = tmp_path / "c.jsonl"
    server = serve("--style", "think")
    code, out, _ = verb(*arguments(toy, server.url, chains), "--exact", "--candidates", 1)
    assert code == 1 and load_chains(chains) == {}
    before, asked = lines_of(chains), len(server.events())
    code, out, _ = verb(*where(toy, chains), "--rejudge", "--dry-run")
    assert code == 0 and "Dry run: nothing was written." in out and lines_of(chains) == before
    code, out, _ = verb(*where(toy, chains), "--rejudge")
    accepted = load_chains(chains)
    assert code == 0 and len(server.events()) == asked
    first = {image: chain for image, chain in calm.items() if image in accepted}
    assert accepted == first and accepted
    assert "18 candidates judged, 18 changed." in out
    assert f"{len(accepted):>7}  stage_outside → accepted" in out
    assert f"{len(accepted)} images of 18 have a chain." in out
    for old, new in zip(before, lines_of(chains), strict=True):  # nothing is lost
        assert old["chain"] == new.get("raw", new["chain"])
        assert {k: v for k, v in old.items() if k not in ("chain", "verdict", "rule", "reason")}.items() <= new.items()
    code, out, _ = verb(*where(toy, chains), "--rejudge", "--exact")
    assert code == 1 and "accepted → stage_outside" in out
    assert lines_of(chains) == before


def records_of(*records: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"image": "a/Mug/0.png", "verified": True, **record} for record in records]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    with ChainWriter(path) as writer:
        for record in records:
            writer.append(record)


def test_one_candidate_of_an_image_is_accepted_and_the_one_that_was_stays(
    tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    path, rules = tmp_path / "c.jsonl", Rules(NAMES, 10)
    blemished = {"chain": "Sure! " + chain_text("a mug"), "verdict": "rejected", "rule": "stage_outside"}
    write(path, records_of(blemished, blemished))
    became = rejudge(path, {"a/Mug/0.png": 2}, rules)
    assert became == {("stage_outside", "accepted"): 1, ("stage_outside", "second"): 1}
    path.unlink()
    write(path, records_of(blemished, {"chain": chain_text("mug"), "verdict": "accepted"}))
    assert rejudge(path, {"a/Mug/0.png": 2}, rules) == {("stage_outside", "second"): 1, ("accepted", "accepted"): 1}
    assert list(load_chains(path)) == ["a/Mug/0.png"]


def test_rejudge_keeps_chains_that_were_corrected_by_hand(
    tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    """The original text concludes a bike; a correction that breaks the chain is none."""
    path, raw = tmp_path / "c.jsonl", "Sure! " + chain_text("a bike")
    common = {"raw": raw, "normalized": ["outside"], "verdict": "accepted"}
    write(path, records_of({"chain": chain_text("mug"), **common}))
    assert rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10)) == {("accepted", "accepted"): 1}
    (kept,) = lines_of(path)
    assert (kept["chain"], kept["raw"], kept["normalized"]) == (chain_text("mug"), raw, ["outside"])
    path.unlink()
    write(path, records_of({"chain": chain_text("cup"), **common}))
    assert rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10)) == {("accepted", "label"): 1}


def test_rejudge_keeps_manual_verdicts_unknown_images_and_unprintable_texts(
    tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    path, good = tmp_path / "c.jsonl", chain_text("mug")
    records = records_of(
        {"chain": good, "verdict": "rejected"},
        {"chain": good, "verdict": "rejected", "rule": "ugly", "reason": "I do not like it"},
        {"chain": good, "verdict": "rejected", "rule": "unprintable", "reason": "it held a NUL"},
        {"chain": good, "verdict": "rejected", "rule": "refusal", "reason": "flagged", "refused": True},
        {"chain": good, "verdict": "rejected", "rule": "refusal", "reason": "flagged", "finish": "content_filter"},
        {"chain": good, "verdict": "rejected", "rule": "label", "reason": "", "image": "b/Cat/0.png"},
        {"chain": "junk", "verdict": "accepted", "image": "b/Cat/0.png"},
    )
    write(path, records)
    became = rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10))
    assert all(before == after for before, after in became) and became.total() == 7
    kept = [{k: v for k, v in one.items() if k not in ("reason", "format_version")} for one in lines_of(path)]
    assert kept == [{k: v for k, v in one.items() if k != "reason"} for one in records]


def test_rejudge_finds_images_in_either_unicode_form(
    tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    """Two accepted chains of an image that the file names otherwise than the disk; one concludes another class."""
    composed, decomposed = "a/Mug/caf\u00e9.png", "a/Mug/cafe\u0301.png"
    chains = [{"chain": chain_text(name), "verdict": "accepted", "image": composed} for name in ("bike", "mug", "mug")]
    write(tmp_path / "c.jsonl", chains)
    became = rejudge(tmp_path / "c.jsonl", {decomposed: 2}, Rules(NAMES, 10))
    assert became == {("accepted", "label"): 1, ("accepted", "accepted"): 2}
    assert {one["image"] for one in lines_of(tmp_path / "c.jsonl")} == {composed}


def test_rejudge_without_changes_does_not_write(tmp_path: Path, chain_text: Callable[..., str]) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(
        json.dumps({"verified": True, "verdict": "accepted", "chain": chain_text("mug"), "image": "a/Mug/0.png"}) + "\n"
    )
    before = path.read_bytes(), path.stat().st_ino
    rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10))
    assert (path.read_bytes(), path.stat().st_ino) == before and os.listdir(tmp_path) == ["c.jsonl"]


def test_rejudge_leaves_invalid_or_locked_files_unchanged(tmp_path: Path, chain_text: Callable[..., str]) -> None:
    path = tmp_path / "c.jsonl"
    write(path, records_of({"chain": "Sure! " + chain_text("mug"), "verdict": "rejected", "rule": "stage_outside"}))
    with ChainWriter(path), pytest.raises(ChainFileError, match="another process"):
        rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10))
    path.write_text(path.read_text() + "not a record\n")
    before = path.read_bytes()
    with pytest.raises(ChainFileError, match="line 2"):
        rejudge(path, {"a/Mug/0.png": 2}, Rules(NAMES, 10))
    assert path.read_bytes() == before


_REJUDGE = """
import pathlib, sys
from domainbed_reasoning.annotate import rejudge
from domainbed_reasoning.chains.rules import Rules
labels = {f"a/Mug/{i}.png": 2 for i in range(4000)}
print("begin", flush=True)
rejudge.rejudge(pathlib.Path(sys.argv[1]), labels, Rules(("alarm clock", "bike", "mug"), 10))
"""


def test_rejudge_killed_while_writing_leaves_a_complete_file(
    tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    path = tmp_path / "c.jsonl"
    record = {"chain": "Sure! " + chain_text("mug"), "verdict": "rejected", "rule": "stage_outside"}
    write(path, [record | {"image": f"a/Mug/{i}.png"} for i in range(4000)])
    outcomes: Counter[str] = Counter()
    for delay in (0.0, 0.05, 0.1, 0.2, 0.4):
        child = subprocess.Popen([sys.executable, "-c", _REJUDGE, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        verdicts = {one["verdict"] for one in lines_of(path)}
        assert len(lines_of(path)) == 4000 and len(verdicts) == 1
        outcomes[verdicts.pop()] += 1
    assert outcomes["rejected"]  # the first was killed before its end
    rejudge(path, {f"a/Mug/{i}.png": 2 for i in range(4000)}, Rules(NAMES, 10))
    assert len(load_chains(path)) == 4000


def test_a_blemished_chain_is_imported_in_canonical_form_once(
    toy: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str], lines_of: Any
) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"image": "art/Mug/Mug_0.png", "chain": "Sure! " + chain_text("A mug.")}) + "\n")
    target = ("--dataset", "Toy", "--data_dir", toy, "--chains", tmp_path / "c.jsonl")
    assert verb("import", given, *target)[0] == 0
    code, out, _ = verb("import", given, *target)
    assert code == 0 and "skipped, already in the chain file" in out
    [record] = lines_of(tmp_path / "c.jsonl")
    assert record["chain"] == chain_text("mug") and record["raw"].startswith("Sure!")
    assert record["normalized"] == ["preamble", "conclusion"]
    verb("import", given, *target[:-1], tmp_path / "d.jsonl", "--exact")
    assert [one["rule"] for one in lines_of(tmp_path / "d.jsonl")] == ["stage_outside"]
    code, out, _ = verb("check", *target, "--no-images")
    assert "by the rule" not in out
