"""The two questions asked about every image, as functions of the task.

q_cls is the paper's (arXiv 2602.23777, "What type of object is in this photo? Choose from the following options:"),
verbatim for every stock dataset; only user datasets and the embedded one may use another noun. The wording of q_reason
is not published. Ours is q_cls followed by the instruction to write the five stages, so that both questions share image
and options as a common prefix, which training and scoring compute once.
"""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_reasoning.chains.chain import STAGES

PROMPT_VERSION = "1"

_INSTRUCTION = (
    "Answer in five stages: {tags}. Say how you will go about it, describe the image, reason from the visible parts "
    "to the options, check what could mislead, and conclude with the name of one option alone."
)


def q_cls(class_names: Sequence[str], subject: str = "object") -> str:
    """Return the question of the classification path, to be answered with the class name alone."""
    return f"What type of {subject} is in this photo? Choose from the following options: {', '.join(class_names)}."


def q_reason(class_names: Sequence[str], subject: str = "object") -> str:
    """Return the question of the reasoning path, to be answered with a five-stage chain."""
    tags = ", ".join(f"<{stage}>…</{stage}>" for stage in STAGES)
    return f"{q_cls(class_names, subject)}\n{_INSTRUCTION.format(tags=tags)}"


def readable_name(folder: str) -> str:
    """Return the readable name of a class folder: ``Alarm_Clock`` becomes ``alarm clock``."""
    return " ".join(folder.replace("_", " ").split()).lower()
