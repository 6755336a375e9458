"""Re-evaluates stored candidates with the current rules and options, without a teacher.

Manual verdicts (rejections without a rule, or by an unknown one) are kept, as are candidates for images that are not in
the dataset, and those whose text could not be stored unchanged (``unprintable``).
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.record import is_accepted
from domainbed_reasoning.chains.rules import RULES, Rules, Verdict, with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, Record, read_records, write_records


class _NothingChanged(Exception):
    """The file need not be written."""


def rejudge(path: Path, labels: Mapping[str, int], rules: Rules, write: bool = True) -> Counter[tuple[str, str]]:
    """Re-evaluate a chain file's candidates, and replace the file atomically.

    At most one candidate per image is accepted: the previously accepted one if it passes, else the first that does.

    Args:
        path: of the chain file.
        labels: class of every image of the dataset, by its path.
        rules: the current ones.
        write: False only counts the changes.

    Returns:
        The number of candidates by (old verdict, new verdict), each a rule or ``accepted``.

    Raises:
        ChainFileError: the file cannot be read, or another process is writing to it; it is left unchanged.
        OSError: it cannot be written; likewise.
    """
    changes: Counter[tuple[str, str]] = Counter()
    names = ImageLookup(labels)

    def read() -> Iterator[tuple[Record, Record]]:
        """Yield every record, as it is and with its image's path as on disk."""
        for _, record in read_records(path, repair=True):
            yield record, names.with_path_on_disk(record)

    def judged() -> Iterator[Record]:  # runs while the file is locked
        taken = {
            record["image"]
            for _, record in read()
            if _outcome(record) == ACCEPTED and (not _is_ours(record, labels) or _stays(record, labels, rules))
        }
        changed = False
        for record, found in read():
            new = record
            if _is_ours(found, labels):
                corrected = is_corrected(found, labels, rules)
                verdict = Verdict(True) if corrected else judge_again(found, labels, rules)
                if verdict.accepted and _outcome(record) != ACCEPTED and found["image"] in taken:
                    verdict = Verdict(False, "second", "the image already has an accepted chain")
                if verdict.accepted:
                    taken.add(found["image"])
                new = with_verdict(record, record["chain"] if corrected else raw_text(record), verdict)
                if corrected:
                    new |= {key: record[key] for key in ("raw", "normalized") if key in record}
                new["verified"] = rules.verified
            changes[_outcome(record), _outcome(new)] += 1
            changed |= new != record
            yield new
        if not changed or not write:
            raise _NothingChanged

    try:
        write_records(os.path.realpath(path), judged())  # a link keeps pointing to it
    except _NothingChanged:
        pass
    return changes


def raw_text(record: Record) -> str:
    """Return a candidate's original text."""
    return str(record.get("raw") or record["chain"])


def _stays(record: Record, labels: Mapping[str, int], rules: Rules) -> bool:
    return is_corrected(record, labels, rules) or judge_again(record, labels, rules).accepted


def is_corrected(record: Record, labels: Mapping[str, int], rules: Rules) -> bool:
    """Return whether a chain is another than its original text gives, and accepted as it is: corrected by hand.

    Args:
        record: of an image in ``labels``.
        labels: of the images.
        rules: by which the chain is judged.
    """
    if "raw" not in record or record["chain"] == record["raw"]:
        return False
    if record["chain"] == judge_again(record, labels, dataclasses.replace(rules, exact=False)).chain:
        return False
    own = rules.judge(record["chain"], labels[record["image"]])
    return own.accepted and own.chain is None


def _outcome(record: Record) -> str:
    return ACCEPTED if is_accepted(record) else str(record.get("rule") or "unnamed")


def _is_ours(record: Record, labels: Mapping[str, int]) -> bool:
    outcome = _outcome(record)
    return record["image"] in labels and (outcome == ACCEPTED or (outcome in RULES and outcome != "unprintable"))


def judge_again(record: Record, labels: Mapping[str, int], rules: Rules) -> Verdict:
    """Return the current rules' verdict on a stored candidate of an image in ``labels``."""
    finish = record.get("finish") or "stop"
    refused = record.get("refused") is True or finish == "content_filter"
    return rules.judge(raw_text(record), labels[record["image"]], finish=finish, refused=refused)
