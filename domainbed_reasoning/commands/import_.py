"""`domainbed-reasoning import`: chains from other formats into a dataset's chain file, judged by the same rules."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.formats import ExchangeError, import_records
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.rules import MAX_WORDS, MIN_WORDS, Rules, with_verdict
from domainbed_reasoning.chains.store import ACCEPTED, REJECTED, ChainWriter, Record, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.files.plain import MAX_IMAGE_BYTES, read_plain
from domainbed_reasoning.images.catalog import FolderScan

_EXAMPLES = """\
  domainbed-reasoning import PACS_chains.jsonl --dataset PACS --data_dir DATA --teacher gpt-4o --label-conditioned no
  domainbed-reasoning import train.parquet --dataset VLCS --data_dir DATA
  domainbed-reasoning import llava.json --dataset PACS --data_dir DATA --chains mine.jsonl --unverified

The format is told from the file: our own JSON lines or Parquet; InternVL, LLaVA or ShareGPT conversations as JSON lines
or a JSON array; Hugging Face messages as Parquet. Image paths may begin with other folders, as in /data/PACS/photo/….
A row that has a verdict keeps it, unless it is accepted and no chain; another is judged by the rules of `annotate`.
A row that the chain file holds is left out; a second accepted chain of an image is kept as rejected, by the rule
`second`.
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Import and say what became of the rows."""
    parser = arguments.make_parser("import", __doc__ or "", _EXAMPLES)
    parser.add_argument("file", type=Path, help="what to import")
    arguments.add_dataset_arguments(parser)
    parser.add_argument(
        "--teacher", default="unknown", help="who wrote chains that do not say so (default: %(default)s)"
    )
    parser.add_argument(
        "--label-conditioned", choices=("yes", "no"), help="whether the teacher was told the label (default: not known)"
    )
    parser.add_argument("--unverified", action="store_true", help="do not ask that the conclusion be the true class")
    parser.add_argument("--exact", action="store_true", help="accept perfectly formed chains only: normalize nothing")
    parser.add_argument("--min-words", type=int, default=MIN_WORDS, help="of a chain (default: %(default)s)")
    parser.add_argument("--max-words", type=int, default=MAX_WORDS, help="of a chain (default: %(default)s)")
    given = parser.parse_args(argv)
    dataset, on_disk = arguments.open_dataset(given)
    labels = {picture.path: on_disk.classes.index(picture.label) for picture in on_disk.pictures}
    rules = Rules(
        arguments.class_names(dataset, on_disk),
        given.min_words,
        given.max_words,
        verified=not given.unverified,
        exact=given.exact,
    )
    names = ImageLookup(labels)
    there = list(read_records(given.chains, repair=True)) if given.chains.exists() else []
    there = [(number, names.with_path_on_disk(record)) for number, record in there]
    seen = {_key(record) for _, record in there}
    accepted = {record["image"] for _, record in there if record.get("verdict", ACCEPTED) == ACCEPTED}
    counts: Counter[str] = Counter()
    # Everything is read and judged before the first line is written: a bad row leaves the chain file as it was.
    records = []
    for number, record in import_records(given.file, check_paths=False):
        image = _path_below(record["image"], names)
        if image is None:
            raise ExchangeError(
                f"{given.file}, row {number}: no image {record['image']!r} is in {dataset.name} at {on_disk.root}."
            )
        record = {**record, "image": image}
        record = _completed(record, on_disk, given.teacher, _KNOWN[given.label_conditioned])
        if _key(record) in seen:
            counts["left out, the chain file has them"] += 1
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
                record |= {"verdict": REJECTED, "rule": "second", "reason": "the image has an accepted chain already"}
            accepted.add(image)
        counts[record["verdict"] + (f" ({record['rule']})" if "rule" in record else "")] += 1
        records.append(record)
    with ChainWriter(given.chains) as writer:
        for record in records:
            writer.append(record)
    print(f"{given.file}: {counts.total():,} rows, {len(records):,} written to {given.chains}")
    for what, count in counts.most_common():
        print(arguments.printable(f"  {count:>7,}  {what}"))
    return 0


def _key(record: Record) -> tuple[str, str, object, object]:
    return record["image"], record.get("raw") or record["chain"], record.get("teacher"), record.get("attempt")


def _path_below(image: str, known: ImageLookup) -> str | None:
    """Return which of the ``known`` paths below the dataset's folder ``image`` means, or None."""
    path = image.replace("\\", "/")
    if found := known.find(path):
        return found
    steps = path.split("/")
    if ".." in steps:
        return None
    # The shortest beginning is cut: domain and class are the last folders but few.
    tails = (known.find("/".join(steps[cut:])) for cut in range(1, len(steps)))
    return next((tail for tail in tails if tail is not None), None)


_KNOWN = {"yes": True, "no": False, None: None}


def _completed(record: Record, on_disk: FolderScan, teacher: str, label_conditioned: bool | None) -> Record:
    """Return the record with the provenance that every chain has."""
    sha256 = record.get("sha256")
    if not sha256:
        sha256 = hashlib.sha256(read_plain(on_disk.root / record["image"], MAX_IMAGE_BYTES)).hexdigest()
    return {
        **record,
        "teacher": record.get("teacher", teacher),
        "label_conditioned": record.get("label_conditioned", label_conditioned),
        "sha256": sha256,
    }
