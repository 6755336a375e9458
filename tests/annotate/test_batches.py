"""Annotating through a provider's Batch API, against a real server: kills, faults, limits, and what is paid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domainbed_reasoning.annotate import batch_run
from domainbed_reasoning.annotate.batch_journal import journal_path
from domainbed_reasoning.annotate.teacher import read_picture

Verb = Callable[..., tuple[int, str, str]]


def arguments(toy: Path, url: str, chains: Path) -> list[object]:
    return [
        *("annotate", "--dataset", "Toy", "--data_dir", toy, "--chains", chains),
        *("--teacher", "openai:test", "--base-url", url, "--min-words", 10, "--price", 2, 8),
    ]


BATCH = ("--batch-api", "--batch-poll", 0.05)


def stored(records: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return records by image and attempt, without what differs between any two runs, and without dollars."""
    left = {
        (record["image"], record["attempt"]): {k: v for k, v in record.items() if k not in ("time", "seconds")}
        for record in records
    }
    for record in left.values():
        record["usage"] = {k: v for k, v in record["usage"].items() if k != "dollars"}
    assert len(left) == len(records)
    return left


def billed(server: Any) -> Counter[str]:
    """Return how often each request was answered."""
    return Counter(event["key"] for event in server.events() if event["event"] == "billed")


def batches(server: Any) -> int:
    return sum(event["event"] == "batch" for event in server.events())


@pytest.fixture
def calm(toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any) -> list[dict[str, Any]]:
    """The records of a run without batches."""
    chains = tmp_path / "calm.jsonl"
    assert verb(*arguments(toy, serve().url, chains))[0] == 0
    records: list[dict[str, Any]] = lines_of(chains)
    return records


def test_batches_bring_the_same_chains_at_half_the_price(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: list[dict[str, Any]]
) -> None:
    """A batch a round: of 18 images, then of those that were rejected."""
    chains, server = tmp_path / "chains.jsonl", serve()
    code, out, err = verb(*arguments(toy, server.url, chains), *BATCH)
    assert code == 0, err
    records = lines_of(chains)
    assert stored(records) == stored(calm)
    for record in records:
        usage = record["usage"]
        assert usage["dollars"] == pytest.approx((usage["prompt_tokens"] * 1 + usage["completion_tokens"] * 4) / 1e6)
    assert max(billed(server).values()) == 1 and len(billed(server)) == len(records)
    assert batches(server) == max(record["attempt"] for record in records) + 1
    assert not journal_path(chains).exists()
    assert f"{len(records)} candidates" in out
    code, out, _ = verb(*arguments(toy, server.url, chains), *BATCH)
    assert code == 0 and "Nothing to do" in out
    third = tmp_path / "third.jsonl"
    verb(*arguments(toy, server.url, third), *BATCH, "--batch-discount", 0.25, "--limit", 3)
    usage = lines_of(third)[0]["usage"]
    assert usage["dollars"] == pytest.approx((usage["prompt_tokens"] * 1.5 + usage["completion_tokens"] * 6) / 1e6)


def test_requests_that_a_batch_did_not_answer_are_asked_again_and_paid_once(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: list[dict[str, Any]]
) -> None:
    """Half of them expire, fail with 500 or have no line in the results; the store is that of a calm run."""
    chains = tmp_path / "chains.jsonl"
    server = serve("--batch-faults", "0.5", "--batch-kinds", "expired", "500", "missing")
    code, _, err = verb(*arguments(toy, server.url, chains), *BATCH)
    assert code == 0, err
    assert stored(lines_of(chains)) == stored(calm)
    assert max(billed(server).values()) == 1
    assert batches(server) > max(record["attempt"] for record in calm) + 1


def test_without_retries_they_are_left_for_the_next_run(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve("--batch-faults", "1", "--batch-kinds", "expired")
    code, out, _ = verb(*arguments(toy, server.url, chains), *BATCH, "--retries", 0)
    assert code == 1 and "18 images got no answer" in out and "completion window expired" in out
    assert not chains.exists() and not journal_path(chains).exists()
    assert verb(*arguments(toy, server.url, chains), *BATCH)[0] == 0
    assert len({record["image"] for record in lines_of(chains)}) == 18


def test_a_content_filters_refusal_is_a_rejected_candidate(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve("--batch-faults", "1", "--batch-kinds", "filter")
    verb(*arguments(toy, server.url, chains), *BATCH, "--candidates", 1)
    assert [(record["rule"], record["refused"]) for record in lines_of(chains)] == [("refusal", True)] * 18


@pytest.mark.parametrize("moment", ["before the reply", "while it waits"])
def test_killed_after_it_submitted_a_run_finds_its_batch_and_asks_nothing_twice(
    toy: Path,
    serve: Any,
    start_verb: Any,
    verb: Verb,
    tmp_path: Path,
    lines_of: Any,
    calm: list[dict[str, Any]],
    moment: str,
) -> None:
    """Before the reply the id of the batch is unknown: it is found by the token that the batch carries."""
    chains = tmp_path / "chains.jsonl"
    hold = "3600" if moment == "before the reply" else "0"
    server = serve("--batch-hold", hold, "--batch-polls", "3")
    child = start_verb(*arguments(toy, server.url, chains), "--batch-api", "--batch-poll", 3600)
    is_known = False
    while not batches(server) or (hold == "0" and not is_known):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
        if hold == "0" and journal_path(chains).exists():
            (batch,) = json.loads(journal_path(chains).read_text())["batches"]
            is_known = bool(batch["batch_id"])
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (batch,) = json.loads(journal_path(chains).read_text())["batches"]
    assert bool(batch["batch_id"]) == is_known and len(batch["requests"]) == 18

    code, _, err = verb(*arguments(toy, server.url, chains))
    assert code == 2 and "18 requests are in open batches" in err and "--batch-api" in err
    code, _, err = verb(*arguments(toy, server.url, chains), *BATCH, "--teacher", "openai:other")
    assert code == 1 and "18 requests to openai:test at" in err
    if hold == "3600":  # only this server's replies to new batches are held
        code, _, err = verb(*arguments(toy, server.url, chains), *BATCH, "--candidates", 1)
        assert batches(server) == 1
        assert max(billed(server).values()) == 1 and len(billed(server)) == 18
        first = {place: record for place, record in stored(calm).items() if place[1] == 0}
        assert stored(lines_of(chains)) == first
        return
    code, _, err = verb(*arguments(toy, server.url, chains), *BATCH)
    assert code == 0, err
    assert stored(lines_of(chains)) == stored(calm)
    assert max(billed(server).values()) == 1


def test_killed_while_it_submits_before_the_provider_knows_it_starts_anew(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: list[dict[str, Any]]
) -> None:
    """The journal as it is between its writing and the creation of the batch."""
    chains, server = tmp_path / "chains.jsonl", serve("--batch-polls", "1000000")
    failing = serve("--batch-fail", "no")
    verb(*arguments(toy, failing.url, chains), *BATCH)
    request = {"image": calm[0]["image"], "attempt": 0, "seed": 1, "sha256": "0" * 64}
    batch = {
        "teacher": "openai:test",
        "endpoint": failing.url,
        "prompt_version": calm[0]["prompt_version"],
        "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 768},
        "omitted": [],
        "requests": [request],
        "token": "f" * 24,
        "created": 0.0,
        "batch_id": "",
    }
    fresh = serve()
    batch["endpoint"] = fresh.url
    journal_path(chains).write_text(json.dumps({"version": 1, "batches": [batch]}))
    assert verb(*arguments(toy, fresh.url, chains), *BATCH)[0] == 0
    assert stored(lines_of(chains)) == stored(calm)
    assert not server.events()


def test_killed_while_it_collects_nothing_is_stored_or_paid_twice(
    toy: Path, serve: Any, start_verb: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """The store as it is after five of the first batch's records, rejected ones among them, with its journal."""
    chains, server = tmp_path / "chains.jsonl", serve("--batch-polls", "2")
    one = arguments(toy, server.url, chains)
    child = start_verb(*one, "--batch-api", "--batch-poll", 3600)
    known = False
    while not known:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
        if journal_path(chains).exists():
            known = bool(json.loads(journal_path(chains).read_text())["batches"][0]["batch_id"])
    child.send_signal(signal.SIGKILL)
    child.communicate()
    journal = tmp_path / "journal"
    shutil.copyfile(journal_path(chains), journal)
    verb(*one, *BATCH)
    whole = lines_of(chains)
    assert len(whole) > 18 and not journal_path(chains).exists()
    assert {record["verdict"] for record in whole[:5]} == {"accepted", "rejected"}
    chains.write_text("".join(line + "\n" for line in chains.read_text().splitlines()[:5]))
    shutil.copyfile(journal, journal_path(chains))
    verb(*one, *BATCH)
    assert stored(lines_of(chains)) == stored(whole)
    first = {str(record["sampling"]["seed"]) for record in whole if record["attempt"] == 0}
    assert {count for key, count in billed(server).items() if key.partition(":")[2] in first} == {1}
    assert not journal_path(chains).exists()


def test_a_batch_whose_creation_got_no_reply_is_found(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: list[dict[str, Any]]
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve("--batch-silent")
    assert verb(*arguments(toy, server.url, chains), *BATCH)[0] == 0
    assert stored(lines_of(chains)) == stored(calm)
    assert max(billed(server).values()) == 1
    assert batches(server) == max(record["attempt"] for record in calm) + 1


def test_interrupted_it_leaves_its_batches_open(
    toy: Path, serve: Any, start_verb: Any, verb: Verb, tmp_path: Path
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve("--batch-polls", "2")
    child = start_verb(*arguments(toy, server.url, chains), "--batch-api", "--batch-poll", 3600)
    while not batches(server):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 3 and "18 requests are in open batches" in err and "interrupted" in out
    assert verb(*arguments(toy, server.url, chains), *BATCH)[0] == 0
    assert max(billed(server).values()) == 1


def test_rejected_parameters_are_adapted_once_and_all_requests_are_asked_again(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, calm: list[dict[str, Any]]
) -> None:
    """Two batches are rejected, one for each parameter; the third is answered, and every candidate counts once."""
    chains, server = tmp_path / "chains.jsonl", serve("--refuses", "max_tokens", "temperature")
    limits = ("--max-requests", len(calm), "--max-cost", 10)
    code, _, err = verb(*arguments(toy, server.url, chains), *BATCH, *limits, "--retries", 0)
    assert code == 0, err
    assert err.count("rejects a parameter") == 2 and "max_completion_tokens is sent instead of max_tokens" in err
    records = lines_of(chains)
    assert {(one["image"], one["attempt"], one["chain"]) for one in records} == {
        (one["image"], one["attempt"], one["chain"]) for one in calm
    }
    assert all(one["sampling"].get("temperature") is None for one in records)
    assert batches(server) == max(one["attempt"] for one in calm) + 1 + 2


def test_interrupted_while_it_reads_images_it_submits_nothing(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the third of 18 images; a second one would end the run at once."""
    server, count = serve(), 0

    def read(path: Path) -> tuple[bytes, str]:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return read_picture(path)

    monkeypatch.setattr(batch_run, "read_picture", read)
    code, out, _ = verb(*arguments(toy, server.url, tmp_path / "chains.jsonl"), *BATCH)
    assert code == 3 and "interrupted" in out and count < 18
    assert not server.events() and not journal_path(tmp_path / "chains.jsonl").exists()


def test_a_batch_that_fails_as_a_whole_ends_the_run_with_the_providers_reason(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve("--batch-fail", "Enqueued token limit reached")
    code, _, err = verb(*arguments(toy, server.url, chains), *BATCH)
    assert code == 1 and "rejects the batch batch_0: Enqueued token limit reached." in err
    assert not journal_path(chains).exists() and not chains.exists()


def test_a_server_without_the_batch_api_is_named(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    chains = tmp_path / "chains.jsonl"
    server = serve()
    code, _, err = verb(*arguments(toy, server.url.replace("/v1", "/v2"), chains), *BATCH, "--retries", 0)
    assert code == 1 and "HTTP 404" in err


def test_limits_hold_over_batches(toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any) -> None:
    chains, server = tmp_path / "chains.jsonl", serve()
    code, out, _ = verb(*arguments(toy, server.url, chains), *BATCH, "--max-requests", 7)
    assert code == 3 and "--max-requests 7 is reached" in out and len(billed(server)) == 7
    code, out, _ = verb(*arguments(toy, server.url, chains), *BATCH, "--max-cost", 0.02)
    spent = sum(record["usage"]["dollars"] for record in lines_of(chains)[7:])
    assert code == 3 and "--max-cost is reached" in out and 0 < spent <= 0.02
    assert max(billed(server).values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher", "self:tiny", "--batch-api"), "--batch-api requires --teacher openai:MODEL"),
        (("--batch-api", "--base-url", "http://a/v1", "http://b/v1"), "--batch-api takes one --base-url"),
        (("--batch-api", "--batch-discount", "1"), "must be in [0, 1); got 1"),
    ],
)
def test_options_that_do_not_fit_batches_are_refused(
    toy: Path, verb: Verb, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    words = ["annotate", "--dataset", "Toy", "--data_dir", toy, "--chains", tmp_path / "c.jsonl"]
    teacher = () if "--teacher" in options else ("--teacher", "openai:m")
    code, _, err = verb(*words, *teacher, *options)
    assert code == 2 and message in err


def test_a_damaged_journal_is_refused(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    chains = tmp_path / "chains.jsonl"
    journal_path(chains).write_text('{"version": 9}')
    code, _, err = verb(*arguments(toy, serve().url, chains), *BATCH)
    assert code == 1 and "cannot be read (version 9 is not 1)" in err
