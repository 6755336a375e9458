"""Several endpoints behind one teacher: work is spread, a dead one is set aside, no image is asked twice."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Verb = Callable[..., tuple[int, str, str]]


def arguments(toy: Path, chains: Path, *urls: str) -> list[object]:
    words = ("annotate", "--dataset", "Toy", "--data_dir", toy, "--chains", chains, "--min-words", 10)
    return [*words, "--teacher", "openai:test", "--base-url", *urls]


def answers(records: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    return {(record["image"], record["attempt"]): record["chain"] for record in records}


def answered(*servers: Any) -> Counter[str]:
    return Counter(event["key"] for server in servers for event in server.events() if event["event"] == "answered")


@pytest.fixture
def closed() -> str:
    """The URL of a port on which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


def test_work_is_spread_and_the_chains_are_those_of_one_endpoint(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    alone, pooled = tmp_path / "alone.jsonl", tmp_path / "pooled.jsonl"
    verb(*arguments(toy, alone, serve().url))
    servers = [serve("--delay", "0.05") for _ in range(2)]
    code, _, err = verb(*arguments(toy, pooled, *(server.url for server in servers)), "--concurrency", 2)
    assert code == 0 and "set aside" not in err
    assert answers(lines_of(pooled)) == answers(lines_of(alone))
    assert max(answered(*servers).values()) == 1
    shares = [len(answered(server)) for server in servers]
    assert min(shares) >= sum(shares) // 4


@pytest.mark.parametrize("dead", ["closed", "key"])
def test_an_endpoint_that_cannot_be_used_is_set_aside_with_one_warning(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, closed: str, dead: str
) -> None:
    chains, server = tmp_path / "chains.jsonl", serve()
    url = closed if dead == "closed" else serve("--always", "key").url
    code, _, err = verb(*arguments(toy, chains, url, server.url))
    assert code == 0
    assert err.count("is set aside for the rest of this run") == 1 and "1 of 2 endpoints left" in err and url in err
    assert len({record["image"] for record in lines_of(chains)}) == 18
    assert max(answered(server).values()) == 1


def test_an_endpoint_that_dies_during_the_run_loses_no_image(
    toy: Path, serve: Any, start_verb: Any, tmp_path: Path, lines_of: Any
) -> None:
    chains, stays = tmp_path / "chains.jsonl", serve("--delay", "0.2")
    dies = serve("--delay", "0.2", "--tell-pid")
    child = start_verb(*arguments(toy, chains, dies.url, stays.url), "--concurrency", 2)
    while not answered(dies):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    os.kill(next(event["pid"] for event in dies.events() if event["event"] == "pid"), signal.SIGKILL)
    _, err = child.communicate()
    assert child.returncode == 0, err
    assert err.count("is set aside") == 1
    assert len({record["image"] for record in lines_of(chains)}) == 18
    assert max(answered(dies, stays).values()) == 1


def test_an_endpoint_that_never_answers_is_set_aside_and_its_images_are_left_for_the_next_run(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """What it may have answered is not asked elsewhere in this run."""
    chains, broken, server = tmp_path / "chains.jsonl", serve("--always", "500"), serve("--delay", "0.05")
    options = ("--retries", 0, "--concurrency", 1)
    code, out, err = verb(*arguments(toy, chains, broken.url, server.url), *options)
    assert code == 1 and "3 images got no answer" in out
    assert err.count("is set aside") == 1 and "3 requests in a row got no answer" in err
    assert verb(*arguments(toy, chains, server.url))[0] == 0
    assert len({record["image"] for record in lines_of(chains)}) == 18


def test_without_a_live_endpoint_the_run_ends(toy: Path, verb: Verb, tmp_path: Path, closed: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        other = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        chains = tmp_path / "chains.jsonl"
        code, _, err = verb(*arguments(toy, chains, closed, other), "--retries", 0)
    assert code == 1 and "cannot be reached" in err and err.count("is set aside") == 1


def test_an_endpoint_that_is_named_twice_is_refused(toy: Path, verb: Verb, tmp_path: Path, closed: str) -> None:
    code, _, err = verb(*arguments(toy, tmp_path / "chains.jsonl", closed, f"{closed}/"))
    assert code == 1 and "twice" in err
