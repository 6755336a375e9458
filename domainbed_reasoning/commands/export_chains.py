"""`domainbed-reasoning export FILE`: a chain file in the formats of others, with every chain's provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.annotate.stats import about_strangers, known_and_strange
from domainbed_reasoning.chains.formats import FORMATS, export_records
from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.chains.store import ACCEPTED, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.catalog import FolderScan
from domainbed_reasoning.images.decode import file_below, image_size, without_metadata

_EXAMPLES = """\
  domainbed-reasoning export pacs.parquet --format messages --dataset PACS --data_dir DATA --embed-images
  domainbed-reasoning export pacs_internvl.jsonl --format internvl --dataset PACS --data_dir DATA
  domainbed-reasoning export pacs.json --format llava --dataset PACS --data_dir DATA --domains photo cartoon
  domainbed-reasoning export backup.parquet --format parquet --all --dataset PACS --data_dir DATA

formats: jsonl (our own), parquet (our own), internvl (JSON lines), llava (JSON array), sharegpt (JSON array, as
LLaMA-Factory reads it), messages (Parquet, as Hugging Face datasets and TRL read it). `import` reads them all back;
nothing is lost. Chains of images that are not in the dataset are left out.

A trained model is exported with --job: `domainbed-reasoning export --job DIR`; `export --job DIR --help` says more.
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Export and say how many chains."""
    parser = arguments.make_parser("export", __doc__ or "", _EXAMPLES)
    parser.add_argument("file", type=Path, help="the new file")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="see below")
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--all", action="store_true", help="rejected candidates too (default: accepted chains)")
    parser.add_argument("--domains", nargs="+", help="only these domain folders, to leave a target domain out")
    parser.add_argument("--embed-images", action="store_true", help="put the images themselves into a messages file")
    given = parser.parse_args(argv)
    dataset, on_disk = arguments.open_dataset(given)
    if given.file.resolve() == given.chains.resolve():
        raise ValueError(f"{given.file} is the chain file itself; give another name.")
    for domain in given.domains or ():
        if domain not in on_disk.domains:
            raise ValueError(f"{dataset.name} has no domain folder {domain!r}; it has {', '.join(on_disk.domains)}.")
    records, strangers = known_and_strange(
        on_disk.pictures,
        (
            record
            for _, record in read_records(given.chains)
            if (given.all or record.get("verdict", ACCEPTED) == ACCEPTED)
            and (not given.domains or record["image"].split("/")[0] in given.domains)
        ),
    )
    question = q_reason(arguments.class_names(dataset, on_disk), dataset.subject)
    count = export_records(
        given.file,
        given.format,
        records,
        question,
        lambda image: _look_at(on_disk, image, given.embed_images),
        given.embed_images,
    )
    print(f"{count:,} chains written to {given.file} ({given.format})")
    if given.format == "messages" and not given.embed_images:
        print(f"Readers open its images by their paths below {on_disk.root}: start them there, or --embed-images.")
    if strangers:
        print(f"Left out: {about_strangers(strangers)}")
    return 0


def _look_at(on_disk: FolderScan, image: str, embed: bool) -> tuple[int, int, bytes]:
    """Return an image's size, and what is put into the file of it: its pixels alone, whoever made it."""
    path = file_below(on_disk.root, image) if embed else on_disk.root / image
    width, height = image_size(path)
    return width, height, without_metadata(path) if embed else b""
