"""`domainbed-reasoning export FILE`: chains in other formats, with their provenance."""

from __future__ import annotations

import argparse

from domainbed_reasoning.annotate.stats import about_strangers, known_and_strange
from domainbed_reasoning.chains.formats import export_records
from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.chains.store import ACCEPTED, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.catalog import OnDisk
from domainbed_reasoning.images.decode import file_below, image_size, without_metadata


def run(args: argparse.Namespace) -> int:
    """Export the chains and print their number."""
    dataset, on_disk = arguments.open_dataset(args)
    if args.file.resolve() == args.chains.resolve():
        raise ValueError(f"{args.file} is the chain file itself. Choose another file name.")
    for domain in args.domains or ():
        if domain not in on_disk.domains:
            raise ValueError(f"{dataset.name} has no domain {domain!r}. Available: {', '.join(on_disk.domains)}.")
    records, strangers = known_and_strange(
        on_disk.pictures,
        (
            record
            for _, record in read_records(args.chains)
            if (args.all or record.get("verdict", ACCEPTED) == ACCEPTED)
            and (not args.domains or record["image"].split("/")[0] in args.domains)
        ),
    )
    question = q_reason(arguments.class_names(dataset, on_disk), dataset.subject)
    count = export_records(
        args.file,
        args.format,
        records,
        question,
        lambda image: _size_and_pixels(on_disk, image, args.embed_images),
        args.embed_images,
    )
    print(f"Wrote {count:,} chains to {args.file} ({args.format}).")
    if args.format == "messages" and not args.embed_images:
        print(f"Image paths are relative to {on_disk.root}. Read the file from there or use --embed-images.")
    if strangers:
        print(f"Excluded: {about_strangers(strangers)}")
    return 0


def _size_and_pixels(on_disk: OnDisk, image: str, embed: bool) -> tuple[int, int, bytes]:
    """Return an image's width, height and, to embed, its file without metadata."""
    path = file_below(on_disk.root, image) if embed else on_disk.root / image
    width, height = image_size(path)
    return width, height, without_metadata(path) if embed else b""
