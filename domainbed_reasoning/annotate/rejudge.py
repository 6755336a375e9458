"""Judging stored candidates again, by today's rules and options, without a teacher.

Verdicts that a person wrote stay: rejections without a rule, or by one that is not ours. So do candidates of images
that are not in the dataset, and those whose text could not be stored as it came (``unprintable``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from domainbed_reasoning.chains.rules import RULES, Rules, Verdict, with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, Record, read_records, write_records


class _NothingChanged(Exception):
    """The file need not be written."""


def rejudge(path: Path, labels: Mapping[str, int], rules: Rules, write: bool = True) -> Counter[tuple[str, str]]:
    """Judge a chain file's candidates again, and write it anew, at once or not at all.

    Of an image at most one candidate stays accepted: the one that was if it passes, else the first that does.

    Args:
        path: of the chain file.
        labels: class of every image of the dataset, by its path.
        rules: today's.
        write: whether to write it, or to say only what would change.

    Returns:
        candidates by (what they were, what they are): a rule, or ``accepted``.

    Raises:
        ChainFileError: for a file that cannot be read, or that another process writes to; it stays as it was.
        OSError: if it cannot be written; likewise.
    """
    became: Counter[tuple[str, str]] = Counter()

    def judged() -> Iterator[Record]:  # runs while the file is locked
        taken = {
            record["image"]
            for _, record in read_records(path, repair=True)
            if _outcome(record) == ACCEPTED
            and (not _is_ours(record, labels) or judge_again(record, labels, rules).accepted)
        }
        changed = False
        for _, record in read_records(path, repair=True):
            new = record
            if _is_ours(record, labels):
                verdict = judge_again(record, labels, rules)
                if verdict.accepted and _outcome(record) != ACCEPTED and record["image"] in taken:
                    verdict = Verdict(False, "second", "the image has an accepted chain already")
                if verdict.accepted:
                    taken.add(record["image"])
                new = with_verdict(record, raw_text(record), verdict) | {"verified": rules.verified}
            became[_outcome(record), _outcome(new)] += 1
            changed |= new != record
            yield new
        if not changed or not write:
            raise _NothingChanged

    try:
        write_records(os.path.realpath(path), judged())  # a link keeps pointing to it
    except _NothingChanged:
        pass
    return became


def raw_text(record: Record) -> str:
    """Return a candidate's text as it came."""
    return str(record.get("raw") or record["chain"])


def _outcome(record: Record) -> str:
    return ACCEPTED if record.get("verdict", ACCEPTED) == ACCEPTED else str(record.get("rule") or "unnamed")


def _is_ours(record: Record, labels: Mapping[str, int]) -> bool:
    outcome = _outcome(record)
    return record["image"] in labels and (outcome == ACCEPTED or (outcome in RULES and outcome != "unprintable"))


def judge_again(record: Record, labels: Mapping[str, int], rules: Rules) -> Verdict:
    """Return the verdict of today's rules on a stored candidate of an image in ``labels``."""
    finish = record.get("finish") or "stop"
    refused = record.get("refused") is True or finish == "content_filter"
    return rules.judge(raw_text(record), labels[record["image"]], finish=finish, refused=refused)
