"""The datasheet of a chain file, as a Hugging Face dataset card, filled from the data.

The questions are those of Gebru et al., "Datasheets for Datasets" (arXiv 1803.09010), as far as a chain file answers
them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import __version__
from domainbed_reasoning.annotate.stats import Groups, total
from domainbed_reasoning.chains.rules import RULES
from domainbed_reasoning.chains.store import ACCEPTED
from domainbed_reasoning.images.catalog import FolderScan, ImageFolder

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_card(
    dataset: ImageFolder,
    on_disk: FolderScan,
    chains: Path,
    records: Sequence[Mapping[str, Any]],
    strangers: int,
    groups: Groups,
    questions: Mapping[str, str],
    licence: str = "other",
) -> str:
    """Return the card.

    Args:
        dataset: what the chains are about.
        on_disk: its images.
        chains: the chain file.
        records: what it holds of these images.
        strangers: its candidates of other images.
        groups: its counts.
        questions: prompt version → prompt, of the prompts that this version of the project writes.
        licence: of the chains, as the Hub names it.
    """
    every = total(groups)["all"]
    name = f"{dataset.name}-Reasoning"
    names = [dataset.class_name(folder) for folder in on_disk.classes]
    accepted = [record for record in records if record.get("verdict", ACCEPTED) == ACCEPTED]
    is_packed = chains.suffix == ".xz"
    needed, opener, mode = ("import lzma\n", "lzma.open", ', "rt", encoding="utf-8"') if is_packed else ("", "open", "")
    head = {
        "pretty_name": name,
        "license": licence,
        "language": ["en"],
        "task_categories": ["image-classification", "visual-question-answering"],
        "tags": ["domain-generalization", "chain-of-thought", "multimodal", "domainbed"],
        "size_categories": [next((size for limit, size in _SIZES if len(records) < limit), "n>1M")],
        "source_datasets": [dataset.name],
    }
    # JSON is YAML; so whatever a name holds is quoted rightly.
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    parts = [
        f"---\n{front}\n---",
        f"# {name}",
        f"Five-stage reasoning chains for images of {dataset.name}: {every.chains:,} of {every.images:,} images "
        f"({every.coverage:.1%}) have an accepted chain, drawn from {every.candidates:,} candidates, all of which are "
        "kept with their verdicts.",
        "## Motivation",
        "For training multimodal models that reason their way to a class and generalise to unseen domains, after "
        "“Reasoning-Driven Multimodal LLM for Domain Generalization” (arXiv 2602.23777). Made with "
        f"domainbed-reasoning {__version__}.",
        "## Composition",
        f"- Images: {dataset.website or dataset.name}; they are not part of this file. `image` is the path below the "
        f"folder `{dataset.folder}/`.\n"
        f"- Classes ({len(on_disk.classes)}): {', '.join(_inline(name) for name in names)}.\n"
        f"- Domains ({len(on_disk.domains)}): {', '.join(map(_inline, on_disk.domains))}.\n"
        f"- Chain: `<SUMMARY>`, `<CAPTION>`, `<REASONING>`, `<REFLECTION>`, `<CONCLUSION>`; {_lengths(every.words)}.",
        _coverage(groups),
        "## Collection",
        _teachers(records),
        _conditioning(accepted),
        *_prompts(records, questions),
        "## Rejection",
        _rejection(every.candidates, every.accepted, every.rules),
        "## Uses and limits",
        "- Chains of a target domain must not be trained on; leave its folder out.\n"
        "- Chains are written by a model: they may describe what is not there. The rules look at form, at the "
        "conclusion and at outright contradictions, not at every statement.\n"
        "- Filtering by the true label makes accepted chains easier than the images: see coverage by class.\n"
        f"- The images' own terms apply to the images ({dataset.website or 'see their source'}), and the "
        "teacher's terms to its text.",
        "## Files",
        f"`{chains.name}`: one JSON object a line, {_lines(len(records), strangers)}, SHA-256 `{_sha256(chains)}`. "
        f"Keys: {', '.join(f'`{key}`' for key in _keys(records))}.",
        f"```python\nimport json\n{needed}\n"
        f'with {opener}("{chains.name}"{mode}) as file:\n'
        "    records = [json.loads(line) for line in file]\n"
        'accepted = {r["image"]: r["chain"] for r in records if r.get("verdict", "accepted") == "accepted"}\n```',
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(known: int, strangers: int) -> str:
    others = f", {strangers:,} of them of images that are not in the dataset and not counted here" if strangers else ""
    return f"{known + strangers:,} lines{others}"


def _lengths(words: Sequence[int]) -> str:
    if not words:
        return "no chain is accepted yet"
    return f"{min(words)} to {max(words)} words, {sum(words) / len(words):.0f} on average"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_inline, line)) + " |" for line in lines)


def _inline(text: str) -> str:
    """Return a text of strangers so that it stays within its line and cell and is no HTML."""
    shown = "".join(char if char.isprintable() else " " for char in text[:300])
    return " ".join(shown.split()).replace("|", "\\|").replace("<", "&lt;")


def _coverage(groups: Groups) -> str:
    sums = total(groups, 0)
    rows = [
        [name, f"{group.images:,}", f"{group.chains:,}", f"{group.coverage:.1%}", f"{group.acceptance:.1%}"]
        for name, group in sums.items()
    ]
    by_class = total(groups, 1)
    rows += [
        [name, f"{group.images:,}", f"{group.chains:,}", f"{group.coverage:.1%}", f"{group.acceptance:.1%}"]
        for name, group in by_class.items()
    ]
    return _table(["domain or class", "images", "chains", "coverage", "candidates accepted"], rows)


def _teachers(records: Sequence[Mapping[str, Any]]) -> str:
    counts: Counter[tuple[str, ...]] = Counter()
    for record in records:
        sampling = record.get("sampling") or {}
        settings = ", ".join(f"{key} {value}" for key, value in sampling.items() if key != "seed") or "unknown"
        counts[
            str(record.get("teacher", "unknown")),
            str(record.get("model", "")) or "–",
            str(record.get("prompt_version", "unknown")),
            settings,
        ] += 1
    rows = [[*key, f"{amount:,}"] for key, amount in counts.most_common()]
    times = sorted(str(record["time"]) for record in records if "time" in record)
    when = f"\n\nWritten between {_inline(times[0])} and {_inline(times[-1])}." if times else ""
    return _table(["teacher", "answered as", "prompt", "sampling", "candidates"], rows) + when


def _conditioning(accepted: Sequence[Mapping[str, Any]]) -> str:
    told = Counter(record.get("label_conditioned") for record in accepted)
    verified = sum(record.get("verified") is True for record in accepted)
    return (
        f"Of {len(accepted):,} accepted chains {told[False]:,} were written with the label withheld, {told[True]:,} by "
        f"a teacher that was told the label, {told[None]:,} do not say. {verified:,} were "
        "checked against the true label."
    )


def _prompts(records: Sequence[Mapping[str, Any]], questions: Mapping[str, str]) -> list[str]:
    used = Counter(str(record.get("prompt_version")) for record in records)
    return [
        f"Prompt `{version}`:\n\n```text\n{questions[version]}\n```"
        for version, _ in used.most_common()
        if version in questions
    ]


def _rejection(candidates: int, accepted: int, rules: Mapping[str, int]) -> str:
    share = accepted / candidates if candidates else 0.0
    first = f"{accepted:,} of {candidates:,} candidates were accepted ({share:.1%}). A candidate is rejected by the "
    rows = [[f"`{rule}`", meaning, f"{rules.get(rule, 0):,}"] for rule, meaning in RULES.items()]
    rows += [
        [f"`{rule}`", "another project's rule", f"{amount:,}"] for rule, amount in rules.items() if rule not in RULES
    ]
    table = _table(["rule", "meaning", "rejected"], rows)
    return f"{first}first rule that it breaks:\n\n{table}"


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_inline(key.replace("`", "'")) for key in dict.fromkeys(key for record in records for key in record)][:100]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
