"""--max-cost is a hard limit, for billed requests without an answer, underestimates, and unreported usage."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders.files import read_lines
from builders.servers import annotate_words
from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.pricing import Budget, BudgetSpent
from domainbed_reasoning.annotate.teacher import MAX_EDGE, q_teacher
from domainbed_reasoning.chains.chain import Chain

IN, OUT = 2.0, 10.0  # dollars per million tokens
CHAIN = Chain("I look.", "A thing.", "It has two wheels and a frame.", "Nothing misleads.", "bike").render()


def completion(content: Any = CHAIN, finish: str | None = "stop", usage: Any = (1000, 100)) -> tuple[int, Any]:
    """Return a response that reports so many tokens of prompt and answer."""
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {"choices": [{"message": {"content": content}, "finish_reason": finish}], "usage": usage}


def dollars(prompt_tokens: int, completion_tokens: int) -> float:
    return (prompt_tokens * IN + completion_tokens * OUT) / 1e6


@pytest.fixture
def annotate(toy: Path, verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """``annotate(server, …)`` runs the verb on the toy's 8 images and returns exit code and all output."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(server: Any, *more: object) -> tuple[int, str]:
        words = annotate_words(toy, server.url, tmp_path / "c.jsonl", "--price", IN, OUT, "--retries", 2, *more)
        code, out, err = verb(*words)
        return code, out + err

    return run


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_answer_truncated_while_thinking_is_a_paid_candidate(
    content: Any, finish: str, scripted: Any, annotate: Any, tmp_path: Path
) -> None:
    """$0.00968 an answer: five fit into $0.05. None is asked for twice, each is stored with its tokens."""
    server = scripted(lambda body: completion(content, finish, (1000, 768)))
    code, out = annotate(server, "--max-cost", 0.05)
    stored = read_lines(tmp_path / "c.jsonl")
    seeds = [body["seed"] for body in server.bodies()]
    assert code == 3 and len(seeds) == len(set(seeds)) == len(stored) == 5
    assert {record["rule"] for record in stored} == {"cut"} and {record["chain"] for record in stored} == {""}
    assert sum(record["usage"]["dollars"] for record in stored) == pytest.approx(5 * dollars(1000, 768))
    assert "5,000 tokens in, 3,840 out, $0.0484" in out and "larger --max-tokens" in out


def test_larger_max_tokens_retries_truncated_answers_with_new_seeds(
    scripted: Any, annotate: Any, tmp_path: Path
) -> None:
    server = scripted(lambda body: completion(None, "length") if body["max_tokens"] < 900 else completion())
    code, out = annotate(server, "--candidates", 2)
    assert "16 candidates truncated at --max-tokens" in out and "a larger --candidates" not in out
    assert "Nothing to do" in annotate(server, "--candidates", 2)[1]
    code, out = annotate(server, "--candidates", 2, "--max-tokens", 900)
    assert code == 0 and "8 of 8 images got a chain" in out
    seeds = [body["seed"] for body in server.bodies()]
    assert len(seeds) == len(set(seeds)) == 24


def test_answer_without_text_is_judged_and_not_retried(scripted: Any, annotate: Any, tmp_path: Path) -> None:
    server = scripted(lambda body: completion(None))
    code, out = annotate(server, "--candidates", 1)
    assert code in (0, 1) and len(server.bodies()) == len(read_lines(tmp_path / "c.jsonl")) == 8


# What a server does of every second request: what comes of it is billed, and nobody says how much.
LOST: dict[str, Callable[[dict[str, Any]], tuple[int, Any] | None]] = {
    "hangs up": lambda body: None,
    "500": lambda body: (500, {"error": {"message": "trouble"}}),
    "504": lambda body: (504, {"error": {"message": "upstream timed out"}}),
    "408": lambda body: (408, {"error": {"message": "too slow"}}),
    "no completion": lambda body: (200, {"choices": []}),
    "no usage": lambda body: completion(usage=None),
    "usage of nothing": lambda body: completion(usage=(0, 0)),
    "usage of the prompt alone": lambda body: completion(usage={"prompt_tokens": 1000}),
    "content filter": lambda body: (400, {"error": {"message": "flagged", "code": "content_filter"}}),
}


@pytest.mark.parametrize("kind", LOST)
def test_possibly_billed_requests_stay_reserved(kind: str, scripted: Any, annotate: Any, tmp_path: Path) -> None:
    """Every request that arrives is billed at 3000 tokens and all of its answer's, reported or not."""
    turn, lock, billed = itertools.count(), threading.Lock(), [0.0]
    most = dollars(3000, 768)

    def answer(body: dict[str, Any]) -> tuple[int, Any] | None:
        with lock:
            billed[0] += most
            number = next(turn)
        return LOST[kind](body) if number % 2 else completion("no chain", "stop", (3000, 768))

    code, out = annotate(scripted(answer), "--max-cost", 0.1)
    assert code == 3 and "--max-cost 0.1 is reached" in out and billed[0] <= 0.1
    assert billed[0] >= 0.1 - most, "the limit is made use of"
    lost = next(turn) // 2
    assert f"{lost} requests without reported usage" in out and f"${lost * most:.4f}" in out


def test_a_request_that_was_refused_or_never_arrived_costs_nothing(scripted: Any, annotate: Any) -> None:
    turn = itertools.count()
    server = scripted(lambda body: completion() if next(turn) % 3 == 2 else (429, {"error": {"message": "slow"}}))
    code, out = annotate(server, "--max-cost", 0.05, "--concurrency", 1)
    assert code == 0 and "without reported" not in out and f"${8 * dollars(1000, 100):.4f}" in out


def test_possible_cost_of_a_timeout_stays_reserved(liar: Any, annotate: Any) -> None:
    """Nothing is ever answered: 0.01 dollars a request are all that is known."""
    ended = threading.Event()
    server = liar(lambda connection: ended.wait(600))
    code, out = annotate(server, "--max-cost", 0.025, "--timeout", 0.5, "--max-tokens", 1000)
    ended.set()
    assert code == 3 and 1 <= len(server.requests) <= 2 and "without reported usage" in out


@pytest.mark.parametrize("reported", [(9000, 100), (1000, 4000), (30_000, 4000)])
def test_higher_token_counts_raise_reservations(reported: tuple[int, int], scripted: Any, annotate: Any) -> None:
    server = scripted(lambda body: completion("no chain", "stop", reported))
    limit = 4.5 * dollars(*reported)
    code, out = annotate(server, "--max-cost", limit, "--concurrency", 8)
    assert code == 3 and len(server.bodies()) * dollars(*reported) <= limit and server.bodies()
    # Started again, it knows from the file what a request costs.
    before = len(server.bodies())
    code, out = annotate(server, "--max-cost", 0.9 * dollars(*reported))
    assert code == 3 and len(server.bodies()) == before


def test_an_answer_that_cannot_be_used_is_counted_by_its_report(scripted: Any, annotate: Any) -> None:
    answer = completion()[1] | {"choices": []}
    code, out = annotate(scripted(lambda body: (200, answer)), "--max-cost", 0.05, "--retries", 0)
    assert code == 1 and "8,000 tokens in, 800 out, $0.0240" in out and "8 images got no answer" in out


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 3}, (10, 3)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 500}, (10, 490)),  # thinking, counted apart
        ({"prompt_tokens": 10, "total_tokens": 13}, (10, 3)),
        ({"prompt_tokens": 10.0, "completion_tokens": 3.0}, (10, 3)),
        ({"prompt_tokens": 0, "completion_tokens": 3}, (None, 3)),
        ({"prompt_tokens": 10, "completion_tokens": -3}, (10, None)),
        ({"prompt_tokens": float("1e300"), "completion_tokens": True}, (None, None)),
        ([], (None, None)),
        (None, (None, None)),
    ],
)
def test_tokens_are_read_from_what_is_reported_or_unknown(usage: Any, tokens: Any) -> None:
    assert cost.reported_tokens(json.dumps({"usage": usage})) == tokens


def reserve(budget: Budget, **outcome: Any) -> None:
    async def once() -> None:
        async with budget.attempt() as made:
            for name, value in outcome.items():
                setattr(made, name, value)

    asyncio.run(once())


def test_unknown_cost_is_settled_as_the_maximum() -> None:
    """Prices of 1 and 10: 1000 and 100 tokens are $0.002. Three fit into $0.007; refused ones do not count."""
    budget = Budget((1.0, 10.0), 1000, 100, max_cost=0.007)
    reserve(budget, free=True)
    reserve(budget)
    assert (budget.spent, budget.unknown, budget.unknown_dollars) == (0, 1, pytest.approx(0.002))
    reserve(budget, prompt_tokens=1000)
    reserve(budget, completion_tokens=100)
    assert budget.spent == 0 and budget.unknown_dollars == pytest.approx(0.006)
    with pytest.raises(BudgetSpent, match=r"up to \$0.0060 of unknown cost; one more request may cost \$0.0020"):
        reserve(budget)


def test_a_real_cost_takes_the_place_of_the_reservation() -> None:
    """$0.0005 each: of $0.0071, ten leave $0.0021, room for one of $0.002 at most; eleven do not."""
    budget = Budget((1.0, 10.0), 1000, 100, max_cost=0.0071)
    for _ in range(11):
        reserve(budget, prompt_tokens=400, completion_tokens=10)
    assert budget.spent == pytest.approx(11 * 0.0005)
    with pytest.raises(BudgetSpent):
        reserve(budget)


def test_highest_observed_usage_applies_to_past_and_future_reservations() -> None:
    """A request of unknown cost was held at $0.002; one that is counted at $0.02 says that it may have cost that."""
    budget = Budget((1.0, 10.0), 1000, 100, max_cost=0.05)
    reserve(budget)
    reserve(budget, prompt_tokens=19_000, completion_tokens=100)
    assert budget.spent == pytest.approx(0.02) and budget.unknown_dollars == pytest.approx(0.02)
    with pytest.raises(BudgetSpent):
        reserve(budget)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("gpt-4o", 85 + 170 * 4),
        ("openai/gpt-4o-2024-11-20", 85 + 170 * 4),
        ("gpt-4o-mini", 2833 + 5667 * 4),
        ("gpt-4.1-mini", 934),  # 24 × 24 patches of 32 pixels × 1.62
        ("openai/gpt-4.1-nano", 1417),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28 * 28),
    ],
)
def test_a_reservation_holds_the_largest_image_that_is_sent(model: str, tokens: int) -> None:
    question = q_teacher(["bike", "mug"])
    assert cost.request_tokens(model, question, MAX_EDGE) == tokens + 2 * cost.text_tokens(question)


def test_limit_below_the_image_cost_sends_nothing(scripted: Any, annotate: Any) -> None:
    """The toy's question is some 200 tokens, an image up to 784: at $1 a token of the prompt, $700 are too few."""
    server = scripted(lambda body: completion())
    code, out = annotate(server, "--price", 1e6, 0, "--max-cost", 700)
    assert code == 3 and server.requests == [] and "--max-cost 700 is reached: $0.0000 spent" in out
