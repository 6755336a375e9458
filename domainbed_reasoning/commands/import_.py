"""`domainbed-reasoning import`: chains from other formats, judged and added to a dataset's chain file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
from collections import Counter
from pathlib import Path

import tqdm

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.formats import ExchangeError, import_records
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.rules import with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, REJECTED, ChainWriter, Record, is_accepted, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.files.plain import MAX_IMAGE_BYTES, read_plain
from domainbed_reasoning.images.catalog import FolderScan
from domainbed_reasoning.terminal import counted

EXAMPLES = """\
  domainbed-reasoning import PACS_chains.jsonl --dataset PACS --data-dir DATA --teacher gpt-4o --label-conditioned no
  domainbed-reasoning import train.parquet --dataset VLCS --data-dir DATA
  domainbed-reasoning import llava.json --dataset PACS --data-dir DATA --chains mine.jsonl --unverified

The format is detected: this package's JSON lines or Parquet; InternVL, LLaVA or ShareGPT conversations as JSON lines or
a JSON array; Hugging Face messages as Parquet. Image paths may have leading folders, as in /data/PACS/photo/….
Rows with a verdict keep it, except accepted rows that are not valid chains; other rows are judged as in `annotate`.
Rows of images that the dataset does not have are left out and counted. Where a row has the SHA-256 of its image, the
file with that digest is taken, whatever its path. Rows that the chain file already contains are skipped. A second
accepted chain of an image is stored as rejected, with the rule `second`.
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
    digests = _Digests(on_disk)
    absent: list[str] = []
    for number, record in import_records(args.file, check_paths=False):
        image = _path_below(record["image"], names)
        if given := record.get("sha256"):
            image = digests.image_of(given, image)
        if image is None:
            absent.append(f"row {number}: {record['image']!r}")
            counts["left out, no such image"] += 1
            continue
        record = {"sha256": given or digests.of(image), **record, "image": image}
        record = _completed(record, args.teacher, _KNOWN[args.label_conditioned])
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
    if absent and len(absent) == counts.total():
        raise ExchangeError(f"{args.file}, {absent[0]}: {dataset.name} at {on_disk.root} has none of these images.")
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
    if absent:
        print(f"  The first row of an image that {dataset.name} does not have is {absent[0]}.")
    if digests.moved:
        print(f"  {counted(digests.moved, 'row')} matched by SHA-256: at their paths there are other images.")
    if digests.unlike:
        print(
            f"  {counted(digests.unlike, 'row')} matched by path alone: the files differ from those of the chains "
            "(SHA-256), which re-encoding explains. Check some with `domainbed-reasoning browse`."
        )
    return 0


class _Digests:
    """SHA-256 of the dataset's files, computed when needed.

    Attributes:
        moved: rows whose image is at another path than theirs.
        unlike: rows whose path has another file than theirs, which is nowhere.
    """

    def __init__(self, on_disk: FolderScan):
        self.on_disk, self.moved, self.unlike = on_disk, 0, 0
        self._known: dict[str, str] = {}  # by image

    def of(self, image: str) -> str:
        """Return the digest of an image's file."""
        if image not in self._known:
            data = read_plain(self.on_disk.root / image, MAX_IMAGE_BYTES)
            self._known[image] = hashlib.sha256(data).hexdigest()
        return self._known[image]

    @functools.cached_property
    def _images(self) -> dict[str, str]:
        pictures = tqdm.tqdm(self.on_disk.pictures, "SHA-256 of images", disable=None, leave=False)
        return {self.of(picture.path): picture.path for picture in pictures}

    def image_of(self, digest: str, image: str | None) -> str | None:
        """Return the image with that digest, else ``image``, which has the row's path; None without either."""
        if image is not None and self.of(image) == digest:
            return image
        if (found := self._images.get(digest)) is not None:
            self.moved += image is not None
            return found
        self.unlike += image is not None
        return image


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


def _completed(record: Record, teacher: str, label_conditioned: bool | None) -> Record:
    """Return the record with complete provenance."""
    return {
        **record,
        "teacher": record.get("teacher", teacher),
        "label_conditioned": record.get("label_conditioned", label_conditioned),
    }
