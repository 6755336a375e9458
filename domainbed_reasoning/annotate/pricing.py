"""Costs of annotation: tokens, dollars and hours, estimated beforehand and limited during a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterable, Mapping
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

# Assumed until the chain file has enough candidates of this teacher. Completion: the 112 real chains of the test data
# have 130 words on average, about 210 tokens with their tags. The others are guesses and printed as such.
ASSUMED_COMPLETION_TOKENS = 210
ASSUMED_ACCEPTANCE = 0.8
ASSUMED_SECONDS = 6.0
ENOUGH = 10

# More tokens than any request can have; larger reported counts are ignored.
_MAX_TOKENS = 10_000_000

# Polling interval of a request that fits the budget only if others cost less than reserved.
_POLL_SECONDS = 0.05

# OpenAI's models that count patches of 32x32 pixels, with their multipliers (guide to images and vision).
_PATCH_FACTORS = {"gpt-4.1-mini": 1.62, "gpt-4.1-nano": 2.46, "gpt-5-mini": 1.62, "gpt-5-nano": 2.46, "o4-mini": 1.72}


def price_of(teacher: str) -> tuple[float, float] | None:
    """Return dollars per million tokens, input and output; zero for local models, None if unknown."""
    kind, _, model = teacher.partition(":")
    if kind != "openai":
        return 0.0, 0.0
    known = [start for start in PRICES if model.startswith(start)]
    return PRICES[max(known, key=len)] if known else None


def cost(
    price: tuple[float, float] | None, prompt_tokens: float | None, completion_tokens: float | None
) -> float | None:
    """Return the cost of one answer in dollars; None if price or tokens are unknown."""
    if price is None or prompt_tokens is None or completion_tokens is None:
        return None
    return (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


def image_tokens(model: str, width: int, height: int) -> int:
    """Return the approximate number of prompt tokens of an image.

    GPT-4o and 4.1: 85 plus 170 per tile of 512 pixels, the short side scaled down to 768 (OpenAI's guide); 33 times as
    many for GPT-4o-mini. GPT-4.1-mini and similar models: one per 32×32 pixels, times a factor. Others: one per 28×28
    pixels, as in the Qwen-VL family. A prefix of the model's name, as in ``openai/gpt-4o``, is ignored.
    """
    model = model.rpartition("/")[2]
    factor = next((factor for start, factor in _PATCH_FACTORS.items() if model.startswith(start)), None)
    if factor:
        return math.ceil(math.ceil(width / 32) * math.ceil(height / 32) * factor)
    if not model.startswith(("gpt-4o", "gpt-4.1")):
        return math.ceil(width / 28) * math.ceil(height / 28)
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return (2833 + 5667 * tiles) if model.startswith("gpt-4o-mini") else (85 + 170 * tiles)


def text_tokens(text: str) -> int:
    """Return the approximate number of tokens of a text: one per four characters."""
    return math.ceil(len(text) / 4)


def request_tokens(model: str, question: str, edge: int) -> int:
    """Return an estimate of the maximum number of prompt tokens of a request.

    Args:
        model: the server's name of the model.
        question: its text; counted twice, as four characters per token may be too many.
        edge: longest edge of an image, in pixels.
    """
    return image_tokens(model, edge, edge) + 2 * text_tokens(question)


@dataclass(frozen=True)
class Habits:
    """A teacher's averages: measured if ``measured`` is at least `ENOUGH`, else assumed.

    Attributes:
        measured: number of candidates of this teacher.
        prompt_tokens: of a request.
        completion_tokens: of an answer.
        acceptance: share of candidates accepted, in (0, 1].
        seconds: per answer.
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
        prompt_tokens: of a request; an estimate for lack of measurements.
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
        seconds=_mean((record.get("seconds") or None for record in own), ASSUMED_SECONDS),  # 0 in batches
    )


def _mean(values: Iterable[Any], otherwise: float) -> float:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else otherwise


@dataclass(frozen=True)
class CostEstimate:
    """Estimate of a run: requests, tokens, dollars (None: price unknown) and hours."""

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
) -> CostEstimate:
    """Return the estimate for the remaining images.

    Args:
        candidates_left: remaining candidates per image; drawing ends at the first accepted one.
        habit: the teacher's averages.
        price: dollars per million tokens.
        concurrency: maximum parallel requests.
        requests_per_minute: rate limit.
    """
    miss = 1.0 - habit.acceptance
    # E[draws] of at most k with success probability p: 1 + (1-p) + … + (1-p)^(k-1).
    requests = sum((1.0 - miss**left) / habit.acceptance for left in candidates_left)
    prompt_tokens = requests * habit.prompt_tokens
    completion_tokens = requests * habit.completion_tokens
    dollars = cost(price, prompt_tokens, completion_tokens)
    seconds = requests * habit.seconds / concurrency
    if requests_per_minute:
        seconds = max(seconds, 60.0 * requests / requests_per_minute)
    return CostEstimate(requests, prompt_tokens, completion_tokens, dollars, seconds / 3600.0)


def reported_tokens(text: str) -> tuple[int | None, int | None]:
    """Return the reported tokens of prompt and answer, each None if not reported.

    Tokens that only ``total_tokens`` includes, such as thinking tokens of some servers, count as the answer's.
    """
    try:
        usage = json.loads(text)["usage"]
        prompt, completion, total = (
            _count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    if prompt and total and total >= prompt:
        completion = max(completion or 0, total - prompt)
    return prompt or None, completion


def _count(value: Any) -> int | None:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS else None


class BudgetSpent(Exception):
    """No further request may be sent; the message names the limit."""


@dataclass
class AttemptCost:
    """The known cost of one attempt of a request.

    Attributes:
        free: it was rejected before anything was computed, or never sent.
        prompt_tokens: as counted by the teacher; None if not reported.
        completion_tokens: likewise.
    """

    free: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Budget:
    """Keeps a run within ``--max-cost`` and ``--max-requests``.

    Each attempt, retries included, reserves its maximum cost before it is sent: question, image and every token of the
    answer. The actual cost replaces the reservation once the teacher reports it; an attempt that may have been billed
    without a report (a time-out, an invalid response) keeps it. If the teacher counts more tokens than estimated, all
    reservations are raised; until its first report, one attempt is sent at a time. So the limit is only exceeded if one
    request is billed for more tokens than any earlier one.

    Args:
        price: dollars per million tokens, input and output; None if unknown.
        prompt_tokens: maximum of a request, question and image.
        max_tokens: of an answer.
        max_cost: dollars; None: no limit.
        max_requests: candidates requested in this run; None: no limit.

    Attributes:
        spent: known cost in dollars.
        unknown: attempts that may have been billed without reported usage.
        requests: candidates requested.
        prompt_tokens: reported total.
        completion_tokens: reported total.
    """

    def __init__(
        self,
        price: tuple[float, float] | None = None,
        prompt_tokens: int = 0,
        max_tokens: int = 0,
        max_cost: float | None = None,
        max_requests: int | None = None,
    ):
        """Begin with nothing spent."""
        self.spent = 0.0
        self.unknown = self.requests = self.prompt_tokens = self.completion_tokens = 0
        self._price = price
        self._most_prompt, self._most_completion = prompt_tokens, max_tokens
        self._max_cost = max_cost
        self._max_requests = max_requests
        self._under_way = 0
        self._has_report = False
        self._ended = False

    @property
    def dearest(self) -> float:
        """The maximum cost of one attempt in dollars, as far as is known; 0 if the price is unknown."""
        return cost(self._price, self._most_prompt, self._most_completion) or 0.0

    @property
    def unknown_dollars(self) -> float:
        """The maximum cost of the attempts of unknown cost, in dollars."""
        return self.unknown * self.dearest

    def observe(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Raise reservations to the tokens that the teacher reported for a request."""
        self._most_prompt = max(self._most_prompt, prompt_tokens or 0)
        self._most_completion = max(self._most_completion, completion_tokens or 0)
        self._has_report = True

    def begin_request(self) -> None:
        """Count a candidate that is about to be requested.

        Raises:
            BudgetSpent: ``max_requests`` is reached.
        """
        if self._max_requests is not None and self.requests >= self._max_requests:
            raise BudgetSpent(f"--max-requests {self._max_requests} is reached")
        self.requests += 1

    @contextlib.asynccontextmanager
    async def attempt(self) -> AsyncIterator[AttemptCost]:
        """Reserve an attempt, if necessary after others have been settled, and settle it when the block ends.

        Raises:
            BudgetSpent: it does not fit into what ``max_cost`` leaves, or `end` was called.
        """
        while not self._ended and not self._fits():
            if not self._under_way:
                unknown = f" and up to ${self.unknown_dollars:.4f} of unknown cost" if self.unknown else ""
                raise BudgetSpent(
                    f"--max-cost {self._max_cost:g} is reached: ${self.spent:.4f} spent{unknown}; one more request may "
                    f"cost ${self.dearest:.4f}"
                )
            await asyncio.sleep(_POLL_SECONDS)
        if self._ended:
            raise BudgetSpent("the run is ending")
        self._under_way += 1
        made = AttemptCost()
        try:
            yield made
        finally:
            self._under_way -= 1
            self._settle(made)

    def reserve(self, count: int = 1, sent: bool = False) -> bool:
        """Reserve attempts that are settled later by `settle`; return False, and reserve none, if they do not fit.

        The requests of a batch are sent at once: before the teacher's first report the estimate is what is reserved.

        Args:
            count: of attempts.
            sent: whether an earlier run has sent them, so that they count in any case.
        """
        if self._max_cost is not None and self.dearest and not sent:
            if self.spent + (self.unknown + self._under_way + count) * self.dearest > self._max_cost:
                return False
        self._under_way += count
        return True

    def settle(self, made: AttemptCost) -> None:
        """Settle an attempt that was reserved by `reserve`."""
        self._under_way -= 1
        self._settle(made)

    def end(self) -> None:
        """Allow no further attempts."""
        self._ended = True

    def _fits(self) -> bool:
        if self._max_cost is None or not self.dearest:
            return True
        if self._under_way and not self._has_report:
            return False
        return self.spent + (self.unknown + self._under_way + 1) * self.dearest <= self._max_cost

    def _settle(self, made: AttemptCost) -> None:
        if made.free:
            return
        self.observe(made.prompt_tokens, made.completion_tokens)
        self.prompt_tokens += made.prompt_tokens or 0
        self.completion_tokens += made.completion_tokens or 0
        real = cost(self._price, made.prompt_tokens, made.completion_tokens)
        if real is None:
            self.unknown += 1
        else:
            self.spent += real
