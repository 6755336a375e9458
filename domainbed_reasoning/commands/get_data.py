"""`domainbed-reasoning get-data`: a dataset's folders as DomainBed expects them, with the published counts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from domainbed_reasoning.commands import hub_repository
from domainbed_reasoning.commands.arguments import Parser, UsageError
from domainbed_reasoning.commands.check import compare
from domainbed_reasoning.images import camera_traps, obtain, sources
from domainbed_reasoning.images.catalog import STOCK

HUB = "hub:"
EXAMPLES = """\
  domainbed-reasoning get-data PACS --from hub:flwrlabs/pacs --data-dir DATA
  domainbed-reasoning get-data OfficeHome --from hub:flwrlabs/office-home --data-dir DATA
  domainbed-reasoning get-data VLCS --from ~/Downloads/VLCS.tar.gz --data-dir DATA
  domainbed-reasoning get-data TerraIncognita --from /mnt/old/terra_incognita --data-dir DATA
  domainbed-reasoning get-data TerraIncognita --from eccv_18_all_images_sm.tar.gz \
      --annotations eccv_18_annotations.tar.gz --data-dir DATA

The source is a dataset on the Hub (Parquet files with columns for image, domain and class; requires pyarrow), a folder,
or a zip or tar archive. Its paths name a domain and a class, as in anything/photo/dog/1.jpg; what else it contains is
ignored. Image files are copied byte for byte; `check --chains bundled` shows how many of them bundled chains match, for
some copies are encoded anew.

The last command takes LILA's two archives of Caltech Camera Traps, packed or unpacked: as in DomainBed's script, images
of four locations and ten classes are chosen by their annotations.

The dataset appears in DATA once its images per domain and class are those published; with --any-counts in any case.
Rerun the command to resume. Mind the dataset's license.
"""


def add_arguments(parser: Parser) -> None:
    """Add the dataset, the source and the folder."""
    parser.add_argument("dataset", choices=obtain.DATASETS)
    parser.add_argument("--from", dest="source", required=True, help="hub:USER/NAME, a folder, or an archive")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that will contain the dataset's folder")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--annotations",
        type=Path,
        help="for TerraIncognita: LILA's annotations, a folder or an archive",
    )
    parser.add_argument("--any-counts", action="store_true", help="accept other counts than the published ones")


def run(args: argparse.Namespace) -> int:
    """Write the images, compare the counts, and return 1 if they differ."""
    dataset = STOCK[args.dataset]
    if args.annotations and (dataset.name != "TerraIncognita" or args.source.startswith(HUB)):
        raise ValueError("--annotations is for TerraIncognita from a folder or an archive. Omit it.")
    with hub_repository.without_token():
        source, place = _source_of(args)
        writer = obtain.Writer(dataset, args.data_dir, source)
        try:
            place(writer)
        finally:
            writer.close()
    print(f"Wrote {writer.written:,} images; {writer.kept:,} were there already.")
    if not writer.written + writer.kept and args.annotations:
        raise sources.SourceError(f"{args.source} has none of {dataset.name}'s images in {args.annotations}.")
    if not writer.written + writer.kept:
        raise sources.SourceError(
            f"{args.source} has no image below a domain and a class of {dataset.name}: expected paths such as "
            f"{next(iter(dataset.domains))}/{(dataset.classes or ('Chair',))[0]}/1.jpg."
        )
    on_disk = writer.scan()
    problems = [*compare(dataset, on_disk), *obtain.count_problems(dataset, on_disk)]
    for problem in problems:
        print(f"PROBLEM {problem}")
    if problems and not args.any_counts:
        print(f"Left in {writer.folder}. Pass --any-counts to accept it, or remove it and use another source.")
        return 1
    writer.finish()
    print(f"{dataset.name} is in {writer.final}")
    return 0


def _source_of(args: argparse.Namespace) -> tuple[str, Callable[[obtain.Writer], None]]:
    """Return what tells the source from others, and what writes its images."""
    if not args.source.startswith(HUB):
        path = Path(args.source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist. Pass hub:USER/NAME, a folder, or an archive.")

        def place(writer: obtain.Writer) -> None:
            others = obtain.place_all(writer, sources.open_source(path))
            if others:
                print(f"{others:,} images are not below a domain and a class, and were ignored.")

        def place_annotated(writer: obtain.Writer) -> None:
            annotated = camera_traps.read_annotations(args.annotations, writer.dataset)
            others = obtain.place_annotated(writer, sources.open_source(path), annotated)
            print(f"{others:,} images are of other locations or classes, and were ignored.")

        if args.annotations:
            return f"{sources.identity(path)}, {sources.identity(args.annotations)}", place_annotated
        return sources.identity(path), place

    from domainbed_reasoning.hub import data, fetch  # imports huggingface_hub

    try:
        name = hub_repository.repo_id(args.source.removeprefix(HUB).removeprefix("datasets/"))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--from: {HUB} {error}") from error
    remote = fetch.list_files(name, "dataset", args.revision, lambda file: file.endswith(".parquet"))
    print(f"{name} at {remote.commit[:12]}: {len(remote.files)} Parquet files, {remote.bytes:,} bytes.")
    return f"{HUB}{name}@{remote.commit}", lambda writer: data.place_remote(writer, remote)
