"""`domainbed-reasoning export`: a dataset's chains or, with ``--job``, a trained model, in other formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.chains.bundled import BUNDLED
from domainbed_reasoning.chains.formats import FORMATS, export_records
from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.chains.store import Record, is_accepted
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.commands.card import card_of
from domainbed_reasoning.files.local_paths import without_folders
from domainbed_reasoning.images.catalog import FolderScan, ImageFolder
from domainbed_reasoning.images.decode import file_below, image_size, without_metadata

DATASET = "dataset"  # a folder for the Hub
EXAMPLES = """\
  domainbed-reasoning export pacs.parquet --format messages --dataset PACS --data-dir DATA --embed-images
  domainbed-reasoning export pacs_internvl.jsonl --format internvl --dataset PACS --data-dir DATA
  domainbed-reasoning export pacs.json --format llava --dataset PACS --data-dir DATA --domains photo cartoon
  domainbed-reasoning export backup.parquet --format parquet --all --dataset PACS --data-dir DATA
  domainbed-reasoning export pacs_reasoning --format dataset --license cc-by-4.0 --dataset PACS --data-dir DATA
  domainbed-reasoning export --job sweep/1a2b3c...
  domainbed-reasoning export --job sweep/1a2b3c... --output rd-mldg-pacs-sketch --merge

formats: jsonl and parquet (this package's own), internvl (JSON lines), llava (JSON array), sharegpt (JSON array, for
LLaMA-Factory), messages (Parquet, for Hugging Face datasets and TRL). `import` reads all of them without loss.
dataset is a folder for `push`: all candidates in Parquet, and a dataset card. Chains
of images that are not in the dataset are excluded.

With --job, the output is adapter_config.json, adapter_model.safetensors and a model card, for
PeftModel.from_pretrained; with --merge, a model and processor for AutoModelForImageTextToText.from_pretrained.
`predict --job` accepts both.
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the arguments for chains and those for models."""
    chains = parser.add_argument_group("chains")
    chains.add_argument("file", nargs="?", type=Path, help="file to write")
    chains.add_argument("--format", choices=(*FORMATS, DATASET), help="required; see below")
    arguments.add_dataset_arguments(chains, required=False)
    chains.add_argument("--all", action="store_true", help="include rejected candidates (default: accepted chains)")
    chains.add_argument("--domains", nargs="+", help="only these domain folders, for example without the target domain")
    chains.add_argument("--embed-images", action="store_true", help="store the images in a messages file")
    chains.add_argument("--license", help="license of the chains in a dataset's card (default: other)")
    model = parser.add_argument_group("trained model")
    model.add_argument("--job", help="output folder of DomainBed's train or sweep")
    model.add_argument("--output", type=Path, help="folder to write (default: JOB/adapter or JOB/merged)")
    model.add_argument("--merge", action="store_true", help="export the whole model with the adapters merged")
    model.add_argument("--model", help="base model, if the job's path no longer exists")
    model.add_argument("--base-model-id", help="public name of the base model, such as OpenGVLab/InternVL3-8B-hf")
    arguments.add_trust_argument(model)


def run(args: argparse.Namespace) -> int:
    """Export chains or a model."""
    required = ("file", "format", "dataset", "data_dir")
    for_chains, for_models = (
        (*required, "chains", "all", "domains", "embed_images", "license"),
        ("output", "merge", "model", "base_model_id", "trust_remote_code"),
    )
    if missing := [name for name in required if not args.job and not getattr(args, name)]:
        raise arguments.UsageError(f"required: {', '.join(map(_option, missing))} (or --job to export a model)")
    if unused := [name for name in (for_chains if args.job else for_models) if getattr(args, name)]:
        conflict = "cannot be combined with" if args.job else "requires"
        raise arguments.UsageError(f"{', '.join(map(_option, unused))} {conflict} --job")
    return _export_model(args) if args.job else _export_chains(args)


def _option(name: str) -> str:
    return "FILE" if name == "file" else f"--{name.replace('_', '-')}"


def _export_model(args: argparse.Namespace) -> int:
    from domainbed_reasoning.jobs.export import export_adapters, export_merged  # imports torch

    output = args.output or Path(args.job, "merged" if args.merge else "adapter")
    export = export_merged if args.merge else export_adapters
    name = export(args.job, output, args.model, args.base_model_id, args.trust_remote_code)
    print(f"Wrote the {'merged model' if args.merge else 'adapters'} to {output}")
    if not args.base_model_id:
        print(f"The base model is recorded as {name!r}; set another name with --base-model-id.")
    return 0


def _export_chains(args: argparse.Namespace) -> int:
    dataset, on_disk = arguments.open_dataset(args)
    if args.chains != BUNDLED and args.file.resolve() == args.chains.resolve():
        raise ValueError(f"{args.file} is the chain file itself. Choose another file name.")
    for domain in args.domains or ():
        if domain not in on_disk.domains:
            raise ValueError(f"{dataset.name} has no domain {domain!r}. Available: {', '.join(on_disk.domains)}.")

    def wanted(record: Record) -> bool:
        return args.all or args.format == DATASET or is_accepted(record)

    records, unknown = arguments.read_candidates(args, dataset, on_disk, wanted, repair=False)
    if args.domains:
        domains = {picture.path: picture.domain for picture in on_disk.pictures}
        records = [record for record in records if domains[record["image"]] in args.domains]
    if args.format == DATASET:
        return _write_dataset(args, dataset, on_disk, records, unknown)
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
    if unknown:
        print(f"Excluded: {arguments.unknown_text(args, unknown)}")
    return 0


def _write_dataset(
    args: argparse.Namespace, dataset: ImageFolder, on_disk: FolderScan, records: list[Record], unknown: int
) -> int:
    """Write a folder for the Hub: every candidate in Parquet, and the card."""
    if args.file.exists() and (not args.file.is_dir() or any(args.file.iterdir())):
        raise ValueError(f"{args.file} is not an empty folder. Choose another, or remove it.")
    args.file.mkdir(parents=True, exist_ok=True)
    records = [_public(record) for record in records]
    file = args.file / "chains.parquet"
    count = export_records(file, "parquet", records)
    arguments.write_text(args.file / "README.md", card_of(dataset, on_disk, file, records, 0, args.license or "other"))
    print(f"Wrote {count:,} candidates and their card to {args.file}.")
    if unknown:
        print(f"Excluded: {arguments.unknown_text(args, unknown)}")
    return 0


def _public(record: Record) -> Record:
    """Return a record in which a teacher of this machine has its folder's name alone."""
    kind, colon, model = str(record.get("teacher", "")).partition(":")
    changed = {"teacher": f"{kind}{colon}{without_folders(model)}"} if colon and kind in ("hf", "self") else {}
    if isinstance(record.get("model"), str):
        changed["model"] = without_folders(record["model"])
    return {**record, **changed}


def _size_and_pixels(on_disk: FolderScan, image: str, embed: bool) -> tuple[int, int, bytes]:
    """Return an image's width, height and, to embed, its file without metadata."""
    path = file_below(on_disk.root, image) if embed else on_disk.root / image
    width, height = image_size(path)
    return width, height, without_metadata(path) if embed else b""
