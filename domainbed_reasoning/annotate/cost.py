"""What annotating costs: tokens, money and hours, beforehand and as it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# US dollars per million tokens, input and output, by the beginning of the model's name: list prices of OpenAI's pricing
# page as of 2025. They change; --price overrides them.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o-2024-05-13": (5.00, 15.00),
    "gpt-4o": (2.50, 10.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1": (2.00, 8.00),
}

# Assumed until the chain file holds enough of this teacher's own candidates. Completion: the 112 real chains of the
# test data have 130 words on average, about 210 tokens with their tags. The rest are guesses and printed as such.
ASSUMED_COMPLETION_TOKENS = 210
ASSUMED_ACCEPTANCE = 0.8
ASSUMED_SECONDS = 6.0
ENOUGH = 10


def price_of(teacher: str) -> tuple[float, float] | None:
    """Return dollars per million tokens, input and output; zero for local models, None if unknown."""
    kind, _, model = teacher.partition(":")
    if kind != "openai":
        return 0.0, 0.0
    known = [start for start in PRICES if model.startswith(start)]
    return PRICES[max(known, key=len)] if known else None


def cost(price: tuple[float, float] | None, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
    """Return the cost of one answer in dollars; None if price or tokens are unknown."""
    if price is None or prompt_tokens is None or completion_tokens is None:
        return None
    return (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


def image_tokens(model: str, width: int, height: int) -> int:
    """Return about how many prompt tokens an image is.

    GPT-4o and 4.1: 85 and 170 for each tile of 512 pixels, the short side scaled down to 768 (OpenAI's guide); the mini
    models count 33 times as many. Others: one token for each 28×28 pixels, as the Qwen-VL family has it.
    """
    if not model.startswith(("gpt-4o", "gpt-4.1")):
        return math.ceil(width / 28) * math.ceil(height / 28)
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return (2833 + 5667 * tiles) if model.startswith("gpt-4o-mini") else (85 + 170 * tiles)


def text_tokens(text: str) -> int:
    """Return about how many tokens a text has: one for each four characters."""
    return math.ceil(len(text) / 4)


@dataclass(frozen=True)
class Habits:
    """How a teacher answers, on average: measured where ``measured`` candidates are enough, else assumed.

    Attributes:
        measured: candidates of this teacher that were looked at.
        prompt_tokens: of a request.
        completion_tokens: of an answer.
        acceptance: share of candidates accepted, in (0, 1].
        seconds: from question to answer.
    """

    measured: int
    prompt_tokens: float
    completion_tokens: float
    acceptance: float
    seconds: float


def habits(records: Iterable[Mapping[str, Any]], teacher: str, prompt_tokens: int) -> Habits:
    """Return the habits of ``teacher`` from its candidates among ``records``.

    Args:
        records: of a chain file.
        teacher: its name.
        prompt_tokens: of a request, as estimated, for want of a measurement.
    """
    own = [record for record in records if record.get("teacher") == teacher]
    if len(own) < ENOUGH:
        return Habits(len(own), prompt_tokens, ASSUMED_COMPLETION_TOKENS, ASSUMED_ACCEPTANCE, ASSUMED_SECONDS)
    usage = [record.get("usage") or {} for record in own]
    accepted = sum(record.get("verdict") == "accepted" for record in own)
    return Habits(
        measured=len(own),
        prompt_tokens=_mean((item.get("prompt_tokens") for item in usage), prompt_tokens),
        completion_tokens=_mean((item.get("completion_tokens") for item in usage), ASSUMED_COMPLETION_TOKENS),
        acceptance=max(accepted, 0.5) / len(own),
        seconds=_mean((record.get("seconds") for record in own), ASSUMED_SECONDS),
    )


def _mean(values: Iterable[Any], otherwise: float) -> float:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else otherwise


@dataclass(frozen=True)
class Estimate:
    """What a run will take: requests, tokens, dollars (None: price unknown) and hours."""

    requests: float
    prompt_tokens: float
    completion_tokens: float
    dollars: float | None
    hours: float


def estimate(
    candidates_left: Iterable[int],
    habit: Habits,
    price: tuple[float, float] | None,
    concurrency: int,
    requests_per_minute: float | None = None,
) -> Estimate:
    """Return what the images that are left will take.

    Args:
        candidates_left: for each image, how many candidates may still be drawn; drawing ends at the first accepted one.
        habit: how the teacher answers.
        price: dollars per million tokens.
        concurrency: requests under way at a time.
        requests_per_minute: rate limit.
    """
    miss = 1.0 - habit.acceptance
    # E[draws] of at most k with success probability p: 1 + (1-p) + … + (1-p)^(k-1).
    requests = sum((1.0 - miss**left) / habit.acceptance for left in candidates_left)
    prompt_tokens = requests * habit.prompt_tokens
    completion_tokens = requests * habit.completion_tokens
    dollars = None if price is None else (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6
    seconds = requests * habit.seconds / concurrency
    if requests_per_minute:
        seconds = max(seconds, 60.0 * requests / requests_per_minute)
    return Estimate(requests, prompt_tokens, completion_tokens, dollars, seconds / 3600.0)


class Budget:
    """Holds a run within ``--max-cost`` and ``--max-requests``.

    Every request reserves its dearest outcome (all its tokens) before it is sent, so that no number of requests under
    way can exceed the limit; what it really cost replaces the reservation.

    Args:
        max_cost: dollars; None: no limit.
        max_requests: candidates asked for in this run; None: no limit.
    """

    def __init__(self, max_cost: float | None = None, max_requests: int | None = None):
        """Begin with nothing spent."""
        self.spent = 0.0
        self.requests = 0
        self._reserved = 0.0
        self._max_cost = max_cost
        self._max_requests = max_requests

    def reserve(self, dearest: float | None) -> bool:
        """Return whether a request that costs at most ``dearest`` dollars may be sent, and reserve its place."""
        if self._max_requests is not None and self.requests >= self._max_requests:
            return False
        amount = dearest or 0.0
        if self._max_cost is not None and self.spent + self._reserved + amount > self._max_cost:
            return False
        self.requests += 1
        self._reserved += amount
        return True

    def may_wait(self) -> bool:
        """Return whether a refused request may fit once those under way have shown their real cost."""
        within_requests = self._max_requests is None or self.requests < self._max_requests
        return within_requests and self._reserved > 1e-12

    def settle(self, dearest: float | None, real: float | None) -> None:
        """Replace a reservation by what the request cost; None for one whose cost nobody knows keeps it."""
        self._reserved = max(0.0, self._reserved - (dearest or 0.0))
        self.spent += (dearest or 0.0) if real is None else real
