"""The content of a report, independent of the output format: sections of tables, figures, texts and examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from domainbed_reasoning.results.tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph; text between backticks is code."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands, or the output of a program.

    Attributes:
        caption: what it is.
        text: the code.
        language: for syntax highlighting in Markdown; "text" for plain text.
    """

    caption: str
    text: str
    language: str = "sh"


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        caption: what it shows and how to read it.
        described: alternative text.
        kind: its media type, ``image/svg+xml`` or ``image/png``.
        data: its bytes.
    """

    caption: str
    described: str
    kind: str
    data: bytes


def verdict(chain_answer: object, label: object) -> str:
    """Return ``right``, ``wrong``, or ``no class`` for a chain's conclusion, None if it names no class."""
    return "no class" if chain_answer is None else "right" if chain_answer == label else "wrong"


@dataclass(frozen=True)
class Example:
    """One image of a target domain with a model's answers.

    Attributes:
        image: its name.
        picture: thumbnail as WebP; None if the image was not found.
        label: its true class.
        label_answer: by the classification path; None where not asked.
        chain_answer: the class that the chain concludes with; None where it names none.
        stages: stage → text; empty if the chain cannot be parsed.
        chain: as the model wrote it.
    """

    image: str
    picture: bytes | None
    label: str
    label_answer: str | None
    chain_answer: str | None
    stages: Mapping[str, str]
    chain: str

    @property
    def verdict(self) -> str:
        """``right``, ``wrong``, or ``no class``."""
        return verdict(self.chain_answer, self.label)


@dataclass(frozen=True)
class Examples:
    """The examples of one target domain.

    Attributes:
        caption: which domain, and how often the model is right there.
        shown: the examples.
    """

    caption: str
    shown: tuple[Example, ...]


@dataclass(frozen=True)
class Details:
    """Collapsible blocks.

    Attributes:
        title: their summary.
        blocks: in order.
        opened: whether they are expanded initially.
    """

    title: str
    blocks: tuple[Block, ...]
    opened: bool = False


Block = Text | Code | Figure | Table | Examples | Details


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading.

    Attributes:
        title: its heading.
        anchor: its name in links.
        blocks: in order.
    """

    title: str
    anchor: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: its heading.
        lead: a summary of one or two sentences.
        sections: in order.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
