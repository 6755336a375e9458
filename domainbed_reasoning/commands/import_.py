"""`domainbed-reasoning import`: chains from other formats, judged and added to a dataset's chain file."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections import Counter
from pathlib import Path

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.formats import ExchangeError, import_records
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.rules import with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, REJECTED, ChainWriter, Record, is_accepted, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.files.plain import MAX_IMAGE_BYTES, read_plain
from domainbed_reasoning.images.catalog import FolderScan

EXAMPLES = """\
  domainbed-reasoning import PACS_chains.jsonl --dataset PACS --data-dir DATA --teacher gpt-4o --label-conditioned no
  domainbed-reasoning import train.parquet --dataset VLCS --data-dir DATA
  domainbed-reasoning import llava.json --dataset PACS --data-dir DATA --chains mine.jsonl --unverified

The format is detected: this package's JSON lines or Parquet; InternVL, LLaVA or ShareGPT conversations as JSON lines or
a JSON array; Hugging Face messages as Parquet. Image paths may have leading folders, as in /data/PACS/photo/….
Rows with a verdict keep it, except accepted rows that are not valid chains; other rows are judged as in `annotate`.
Rows that the chain file already contains are skipped. A second accepted chain of an image is stored as rejected, with
the rule `second`.
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the file, its provenance and the rules."""
    parser.add_argument("file", type=Path, help="file to import")
    arguments.add_json(parser)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--teacher", default="unknown", help="author of rows without one (default: %(default)s)")
    parser.add_argument(
        "--label-conditioned", choices=("yes", "no"), help="whether the teacher saw the label (default: unknown)"
    )
    arguments.add_rule_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Import and print the number of rows by outcome."""
    with contextlib.ExitStack() as opened:
        return _import(args, opened)


def _import(args: argparse.Namespace, opened: contextlib.ExitStack) -> int:
    dataset, on_disk = arguments.open_dataset(args, writes=True)
    labels = on_disk.labels()
    rules = arguments.rules_of(args, arguments.class_names(dataset, on_disk))
    names = ImageLookup(labels)
    writer = opened.enter_context(ChainWriter(args.chains, leave_empty=False))  # first, as another run may be writing
    existing = list(read_records(args.chains, repair=True))
    existing = [(number, names.with_path_on_disk(record)) for number, record in existing]
    seen = {_key(record) for _, record in existing}
    accepted = {record["image"] for _, record in existing if is_accepted(record)}
    counts: Counter[str] = Counter()
    # All rows are read and judged before the first is written: an invalid row leaves the chain file unchanged.
    records = []
    for number, record in import_records(args.file, check_paths=False):
        image = _path_below(record["image"], names)
        if image is None:
            raise ExchangeError(
                f"{args.file}, row {number}: {dataset.name} at {on_disk.root} has no image {record['image']!r}."
            )
        record = {**record, "image": image}
        record = _completed(record, on_disk, args.teacher, _KNOWN[args.label_conditioned])
        if _key(record) in seen:
            counts["skipped, already in the chain file"] += 1
            continue
        seen.add(_key(record))
        if "verdict" not in record:
            verdict = rules.judge(record["chain"], labels[image])
            record = with_verdict({**record, "verified": rules.verified}, record["chain"], verdict)
        if record["verdict"] == ACCEPTED:
            try:
                parse_chain(record["chain"])
            except ChainError as error:
                record |= {"verdict": REJECTED, "rule": f"stage_{error.rule}", "reason": str(error)}
        if record["verdict"] == ACCEPTED:
            if image in accepted:
                record |= {"verdict": REJECTED, "rule": "second", "reason": "the image already has an accepted chain"}
            accepted.add(image)
        counts[record["verdict"] + (f" ({record['rule']})" if "rule" in record else "")] += 1
        records.append(record)
    for record in records:
        writer.append(record)
    if args.json:
        arguments.print_json(
            {"rows": counts.total(), "written": len(records), "chains": args.chains, "outcomes": dict(counts)}
        )
        return 0
    print(f"Read {counts.total():,} rows from {args.file}, wrote {len(records):,} to {args.chains}")
    for outcome, count in counts.most_common():
        print(f"  {count:>7,}  {outcome}")
    return 0


def _key(record: Record) -> tuple[str, str, object, object]:
    return record["image"], record.get("raw") or record["chain"], record.get("teacher"), record.get("attempt")


def _path_below(image: str, known: ImageLookup) -> str | None:
    """Return the path among ``known`` that ``image`` ends with, or None."""
    path = image.replace("\\", "/")
    if found := known.find(path):
        return found
    steps = path.split("/")
    if ".." in steps:
        return None
    tails = (known.find("/".join(steps[cut:])) for cut in range(1, len(steps)))  # longest first
    return next((tail for tail in tails if tail is not None), None)


_KNOWN = {"yes": True, "no": False, None: None}


def _completed(record: Record, on_disk: FolderScan, teacher: str, label_conditioned: bool | None) -> Record:
    """Return the record with complete provenance."""
    sha256 = record.get("sha256")
    if not sha256:
        sha256 = hashlib.sha256(read_plain(on_disk.root / record["image"], MAX_IMAGE_BYTES)).hexdigest()
    return {
        **record,
        "teacher": record.get("teacher", teacher),
        "label_conditioned": record.get("label_conditioned", label_conditioned),
        "sha256": sha256,
    }
