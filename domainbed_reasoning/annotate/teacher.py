"""The interface of teachers: requests and answers.

A `Request` has no field for the label, the image's path or its domain, so they cannot leak. The image is sent as
re-encoded pixels, without its file name (SVIRO's contain the label) and EXIF data, and the seed is derived from the
image's bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from domainbed_reasoning.annotate.pricing import Budget
from domainbed_reasoning.chains.chain import STAGES
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_reason
from domainbed_reasoning.files.plain import MAX_IMAGE_BYTES, read_plain
from domainbed_reasoning.images.decode import read_rgb

# Longest edge of sent images in pixels: GPT-4o scales the short side of high-detail images down to it.
MAX_EDGE = 768

TEACHER_PROMPT_VERSION = f"teacher-1/{PROMPT_VERSION}"

_FOR_TEACHERS = (
    "Write each stage once, in this order and between its own tags, with nothing outside of them, in {words} words "
    "altogether. In {conclusion} write one option exactly as it is spelt above and nothing else. Rely on what can be "
    "seen; whether you are sure or not, choose one option."
)


@dataclass(frozen=True)
class Request:
    """One question about one image.

    Attributes:
        question: the prompt.
        image: JPEG bytes, RGB, without metadata.
        seed: for sampling; from the image's bytes and the number of the attempt.
        max_tokens: maximum number of new tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling in (0, 1].
    """

    question: str
    image: bytes
    seed: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        text: the candidate.
        finish: ``stop``, ``length``, or another finish reason of the teacher.
        refused: whether the teacher refused to answer.
        prompt_tokens: as counted by the teacher; None if not reported.
        completion_tokens: likewise.
        seconds: from request to answer.
        model: as named in the response (GPT-4o names its snapshot).
        omitted: settings of the request, by their names in `Request`, that were not sent.
    """

    text: str
    finish: str = "stop"
    refused: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    model: str = ""
    omitted: tuple[str, ...] = ()


class TeacherError(RuntimeError):
    """The teacher cannot be used; ends the run."""


class NoAnswer(RuntimeError):
    """No answer for this image after all retries; the next run requests it again."""


class Unreachable(NoAnswer):
    """The server could not be connected to: nothing was sent, so that another may be asked."""


class Teacher(Protocol):
    """A model that generates chains.

    Attributes:
        name: written to every record, for example ``openai:gpt-4o``.
        endpoint: URL of its server; empty without one.
        concurrency: maximum parallel requests.
    """

    name: str
    endpoint: str
    concurrency: int

    async def answer(self, request: Request, budget: Budget) -> Answer:
        """Return the answer.

        Args:
            request: question and image.
            budget: in which every attempt, retries included, is reserved and settled.

        Raises:
            BudgetSpent: the budget does not allow another attempt.
            NoAnswer: this request got no answer.
            TeacherError: the teacher cannot be used.
        """
        ...

    async def close(self) -> None:
        """Close connections and threads."""
        ...


def q_teacher(class_names: Sequence[str], subject: str = "object", words: str = "100 to 170") -> str:
    """Return q_reason with formatting instructions for a teacher that was not trained on chains."""
    instructions = _FOR_TEACHERS.format(words=words, conclusion=f"<{STAGES[-1]}>")
    return f"{q_reason(class_names, subject)}\n{instructions}"


def read_picture(path: Path) -> tuple[bytes, str]:
    """Return an image as JPEG bytes to be sent, and the SHA-256 of its file.

    The pixels are those of DomainBed's loader (RGB, no EXIF rotation), scaled down to `MAX_EDGE`.

    Raises:
        OSError: it cannot be read, or is too large, truncated or not an image.
    """
    from PIL import Image

    raw = read_plain(path, MAX_IMAGE_BYTES)
    pixels = read_rgb(raw, path)
    if max(pixels.size) > MAX_EDGE:
        pixels.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    pixels.info.clear()
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue(), hashlib.sha256(raw).hexdigest()


def seed_of(image: bytes, attempt: int) -> int:
    """Return the seed of an attempt, in [0, 2**31)."""
    return int.from_bytes(hashlib.sha256(image + bytes([attempt & 255])).digest()[:4], "big") >> 1
