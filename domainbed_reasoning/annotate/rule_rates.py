"""How often each rule fires on true chains, on wrong chains, and on true chains with a replaced conclusion.

A chain is true if it concludes its image's class and was not manually rejected. A rule that fires on true chains loses
data; one that never fires on the others is useless. Each chain counts for the first rule that it violates, so `label`
counts what no other rule detects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from domainbed_reasoning.annotate.rejudge import judge_again, raw_text
from domainbed_reasoning.chains.reader import read_conclusion
from domainbed_reasoning.chains.record import ACCEPTED, Record
from domainbed_reasoning.chains.rules import RULES, Rules


@dataclass
class RuleRates:
    """Counts of chains, and of the first rules that they violate.

    Attributes:
        true: number of true chains.
        wrong: number of other candidates.
        rejected: true chains by rule.
        found: wrong chains by rule; those that violate no rule under "".
        exchanged: true chains with the conclusion replaced by another class, by rule.
    """

    true: int = 0
    wrong: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    exchanged: Counter[str] = field(default_factory=Counter)


def measure_rules(records: Iterable[Record], labels: Mapping[str, int], class_names: tuple[str, ...]) -> RuleRates:
    """Return the rates of the rules, with their default bounds, on stored candidates.

    Args:
        records: of images of the dataset.
        labels: class of every image, by its path.
        class_names: class names in the prompts, in label order.
    """
    rules, rates = Rules(class_names), RuleRates()
    for record in records:
        label = labels[record["image"]]
        by_a_person = record.get("verdict", ACCEPTED) != ACCEPTED and record.get("rule") not in RULES
        reading = read_conclusion(raw_text(record), class_names)
        rule = judge_again(record, labels, rules).rule
        if by_a_person or reading.answer != label:
            rates.wrong += 1
            rates.found[rule] += 1
            continue
        rates.rejected[rule] += 1
        if len(class_names) > 1:
            other = (label + 1 + rates.true % (len(class_names) - 1)) % len(class_names)
            opening, _, rest = reading.text.rpartition("<CONCLUSION>")
            text = f"{opening}<CONCLUSION>{class_names[other]}</CONCLUSION>{rest.partition('</CONCLUSION>')[2]}"
            rates.exchanged[rules.judge(text, label).rule] += 1
        rates.true += 1
    return rates


def rates_as_text(rates: RuleRates) -> str:
    """Return the rates as a table with one line per rule that fires."""
    columns = (
        (rates.rejected, rates.true),
        (rates.found, rates.wrong),
        (rates.exchanged, rates.exchanged.total()),
    )
    firing = [rule for rule in RULES if any(counts[rule] for counts, _ in columns)]
    lines = [
        "rules with default bounds; each chain counts for the first rule that it violates:",
        f"  {'rule':<19} {'true rejected':>22} {'wrong found':>22} {'other conclusion found':>24}",
    ]
    for rule in firing:
        cells = [_share(counts[rule], total) for counts, total in columns]
        lines.append(f"  {rule:<19} {cells[0]:>22} {cells[1]:>22} {cells[2]:>24}")
    rest = ", ".join(_share(0, total) for _, total in columns)
    lines.append(f"  {'other rules' if firing else 'every rule'}: {rest}")
    return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / total:.1%})" if total else "–"
