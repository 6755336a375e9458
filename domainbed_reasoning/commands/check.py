"""`domainbed-reasoning check`: validates a dataset's folders and counts, its images and its chains."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.bundled import BUNDLED, bundle_path
from domainbed_reasoning.chains.image_names import ImageLookup, composed, image_name_problems
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.chains.rules import MAX_WORDS, MIN_WORDS, Rules, Verdict
from domainbed_reasoning.chains.store import ChainFileError, Record, is_accepted, read_lines
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.catalog import IMAGE_EXTENSIONS, STOCK, FolderScan, ImageFolder, check_domain_order
from domainbed_reasoning.images.decode import read_rgb, reject_truncated_images
from domainbed_reasoning.images.user_datasets import custom_datasets, find, other_classes
from domainbed_reasoning.terminal import counted

EXAMPLES = """\
  domainbed-reasoning check --dataset PACS --data-dir DATA
  domainbed-reasoning check --dataset TerraIncognita --data-dir DATA --no-images
  domainbed-reasoning check --dataset PACS --data-dir DATA --chains bundled
  domainbed-reasoning check --list

Define your own dataset in a TOML file in ~/.config/domainbed-reasoning/datasets/ or in a file or folder listed in
$DOMAINBED_REASONING_DATASETS. DomainBed then lists this example as Camera and CameraReasoning:

  name = "Camera"
  folder = "camera"                  # below --data-dir: camera/<domain>/<class>/<image>
  environments = ["day", "night"]    # a short name for each domain folder, in sorted order
  subject = "animal"                 # optional: "What type of animal is in this photo?"
  bundle = "camera.jsonl.xz"         # optional: chains that come with it, relative to this file
  table = "images.csv"               # optional, in the folder: a row an image, with path, label, domain and any split,
                                     # as CSV, TSV, JSON Lines or Parquet; no class folders are needed then
  splits = ["train"]                 # optional, with a table: rows of these splits alone

  [columns]                          # optional, with a table: what its columns are called
  path = "file"

  [class_names]                      # optional names for prompts; the default for Red_Fox is "red fox"
  Felis_catus = "house cat"

The exit code is 1 if there are problems.
"""

# Maximum number of listed problems of each kind; the rest is counted.
_SHOWN = 10


def add_arguments(parser: arguments.Parser) -> None:
    """Add the dataset and what to check."""
    arguments.add_dataset_arguments(parser, required=False)
    arguments.add_json(parser)
    parser.add_argument("--no-images", action="store_true", help="do not decode the images")
    parser.add_argument("--list", action="store_true", help="list the known image-folder datasets")


def run(args: argparse.Namespace) -> int:
    """Print counts and problems; return 1 if there are problems."""
    if args.list:
        others = {name: find(name) for name in other_classes()}
        known = (STOCK | custom_datasets() | others).values()
        if args.json:
            listed = ("name", "folder", "environments", "subject")
            arguments.print_json([{name: getattr(dataset, name) for name in listed} for dataset in known])
            return 0
        for dataset in known:
            domains = len(dataset.environments)
            print(f"{dataset.name:<16} {dataset.folder}/  {domains} domains, subject: {dataset.subject}")
        return 0
    if not args.dataset or not args.data_dir:
        raise arguments.UsageError("--dataset and --data-dir are required (or use --list)")
    chain_file = args.chains
    dataset, on_disk = arguments.open_dataset(args, checked=False)
    if args.json:
        with contextlib.redirect_stdout(io.StringIO()):
            problems = find_problems(args, dataset, on_disk, chain_file)
        arguments.print_json(as_dict(dataset, on_disk, problems))
        return 1 if problems else 0
    problems = find_problems(args, dataset, on_disk, chain_file)
    for problem in problems:
        print(f"PROBLEM {problem}")
    if problems and dataset.obtain:
        print(f"To download the dataset: {dataset.obtain} Website: {dataset.website or 'unknown'}")
    print(f"{counted(len(problems), 'problem')}." if problems else "No problems.")
    return 1 if problems else 0


def as_dict(dataset: ImageFolder, on_disk: FolderScan, problems: Sequence[str]) -> dict[str, Any]:
    """Return counts and problems for --json."""
    found, names = on_disk.per_domain(), dataset.class_names(on_disk.classes)
    return {
        "dataset": dataset.name,
        "folder": on_disk.root,
        "domains": {
            domain: {"images": found[domain], "published": dataset.domains.get(domain)}
            for domain in sorted({*on_disk.domains, *dataset.domains})
        },
        "images": len(on_disk.pictures),
        "published": dataset.total,
        "classes": dict(zip(on_disk.classes, names, strict=True)),
        "question": q_cls(names, dataset.subject),
        "problems": list(problems),
    }


def find_problems(
    args: argparse.Namespace, dataset: ImageFolder, on_disk: FolderScan, chain_file: Path | str | None
) -> list[str]:
    """Print counts and return the problems of folders, images and chains.

    Args:
        args: the verb's arguments.
        dataset: the dataset.
        on_disk: its files.
        chain_file: --chains as it was passed.
    """
    is_bundle = chain_file == BUNDLED
    print(f"{dataset.name} at {on_disk.root}")
    problems = list(compare(dataset, on_disk))
    names = list(image_name_problems(picture.path for picture in on_disk.pictures))
    problems += _shortened(names, "unusable image names")
    print_prompt(dataset, on_disk)
    print_others(on_disk, bundle_path(str(dataset.bundle)) if is_bundle else args.chains)
    if not args.no_images:
        problems += broken_images(on_disk)
    if is_bundle:
        problems += check_bundle(dataset, on_disk)
    elif chain_file and not Path(chain_file).exists():
        problems.append(f"Chain file {chain_file} does not exist (--chains).")
    else:
        problems += check_chains(args.chains, dataset, on_disk)
        if chain_file is None and dataset.bundle is not None:
            problems += check_bundle(dataset, on_disk)
    return problems


def compare(dataset: ImageFolder, on_disk: FolderScan) -> Iterator[str]:
    """Print the counts beside the published ones and yield problems of domains, classes and counts."""
    found = on_disk.per_domain()
    width = max(map(len, [*on_disk.domains, *dataset.domains, "domain"]))
    print(f"  {'domain':<{width}} {'images':>8} {'published':>10}")
    for domain in sorted({*on_disk.domains, *dataset.domains}):
        expected = dataset.domains.get(domain)
        published = "–" if expected is None else format(expected, ",")
        print(f"  {domain:<{width}} {found[domain]:>8,} {published:>10}")
    total = len(on_disk.pictures)
    print(f"  {'all':<{width}} {total:>8,} {'–' if dataset.total is None else format(dataset.total, ','):>10}")
    if len(on_disk.domains) != len(dataset.environments):
        names = ", ".join(on_disk.domains)
        yield f"{len(on_disk.domains)} domain folders ({names}); expected {len(dataset.environments)}."
    if problem := check_domain_order(dataset, on_disk.domains):
        yield problem
    for domain in dataset.domains:
        if domain not in on_disk.domains:
            yield f"Domain folder {domain!r} is missing."
    for domain in on_disk.domains:
        if dataset.domains and domain not in dataset.domains:
            yield f"Folder {domain!r} is not a domain of {dataset.name}, but DomainBed would load it as one."
    if dataset.num_classes is not None and len(on_disk.classes) != dataset.num_classes:
        yield f"{len(on_disk.classes)} classes; {dataset.num_classes} published."
    for name in dataset.classes:
        if name not in on_disk.classes:
            yield f"Class folder {name!r} is missing."
    if dataset.file is not None:
        known = {composed(label) for label in on_disk.classes}
        for name in dataset.readable:
            if composed(name) not in known:
                near = difflib.get_close_matches(name, on_disk.classes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                yield f"{dataset.file}: [class_names] contains {name!r}, which is not a class folder.{hint}"
    for domain, label in on_disk.missing:
        yield f"{domain}/{label} has no images: DomainBed would fail or assign other labels in {domain}."
    others = dict(dataset.other_totals)
    if total in others:
        print(f"  {total:,} images: {others[total]}.")
    elif dataset.total is not None and total != dataset.total:
        hint = "".join(f"; {count:,} in {which}" for count, which in dataset.other_totals)
        yield f"{total:,} images; {dataset.total:,} published{hint}."


def print_prompt(dataset: ImageFolder, on_disk: FolderScan) -> None:
    """Print the question asked about every image, and the class folders with their prompt names."""
    names = dataset.class_names(on_disk.classes)
    wrapped = [f"question: {q_cls(names, dataset.subject)}"]
    wrapped.append(
        "class folders: " + ", ".join(f"{folder} → {name}" for folder, name in zip(on_disk.classes, names, strict=True))
    )
    for text in wrapped:
        print(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="    "))


def print_others(on_disk: FolderScan, chains: Path) -> None:
    """Print the number of other files by extension, without hidden files, Thumbs.db and chain files."""
    pictures = {picture.path for picture in on_disk.pictures}
    endings: Counter[str] = Counter()
    for place, _, names in os.walk(on_disk.root, followlinks=True):
        for name in names:
            path = Path(place, name).relative_to(on_disk.root)
            hidden = any(part.startswith(".") for part in path.parts) or name == "Thumbs.db"
            is_chains = path.suffix == ".jsonl" or (on_disk.root / path).absolute() == chains.absolute()
            if path.as_posix() not in pictures and not hidden and not is_chains:
                ending = path.suffix.lower() or "without extension"
                endings[f"{ending} outside class folders" if ending in IMAGE_EXTENSIONS else ending] += 1
    if endings:
        listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(10))
        more = ", …" if len(endings) > 10 else ""
        total = endings.total()
        print(f"  {counted(total, 'file')} not loaded as images: {listed}{more}")


def broken_images(on_disk: FolderScan) -> list[str]:
    """Decode every image and return the problems, shortened."""
    from tqdm import tqdm

    paths = [on_disk.root / picture.path for picture in on_disk.pictures]
    with reject_truncated_images(), ThreadPoolExecutor() as pool:
        decoded = pool.map(_decoding_error, paths)
        results = list(tqdm(decoded, total=len(paths), unit="image", leave=False, disable=None))
    problems = [problem for problem in results if problem]
    print(f"  {len(paths) - len(problems):,} of {len(paths):,} images can be decoded")
    return _shortened(problems, "undecodable images")


def _decoding_error(path: Path) -> str:
    """Return why an image cannot be decoded completely, or an empty string."""
    try:
        if not path.stat().st_size:
            return f"{path} is empty."
        read_rgb(path)
    except OSError as error:
        return str(error)
    return ""


def check_chains(path: Path, dataset: ImageFolder, on_disk: FolderScan) -> list[str]:
    """Print the coverage of a chain file and return the problems of its lines."""
    if not path.exists():
        print(f"  no chain file at {path}; create one with `domainbed-reasoning annotate`")
        return []
    labels = on_disk.labels()
    names = ImageLookup(labels)
    rules = Rules(arguments.class_names(dataset, on_disk), MIN_WORDS, MAX_WORDS, exact=True)
    problems: list[str] = []
    accepted: Counter[str] = Counter()
    candidates = misled = 0
    for number, record in read_lines(path):
        place = f"{path}, line {number}"
        if isinstance(record, ChainFileError):
            problems.append(str(record))
            continue
        candidates += 1
        image = names.find(record["image"])
        if image is None:
            problems.append(f"{place}: the dataset has no image {record['image']!r}.")
        elif is_accepted(record):
            accepted[image] += 1
            if accepted[image] == 2:
                problems.append(f"{place}: second accepted chain of {image!r}.")
            verdict, is_misled = _judged(record, labels[image], rules)
            misled += is_misled
            if not verdict.accepted:
                problems.append(
                    f"{place}: accepted, but violates the rule {verdict.rule!r}: {verdict.reason}. "
                    "Run `annotate --rejudge` to normalize or reject it."
                )
    share = len(accepted) / len(labels) if labels else 0.0
    print(
        f"  {path}: {candidates:,} candidates; {len(accepted):,} of {len(labels):,} images have a chain ({share:.1%})"
    )
    _print_misled(misled)
    return _shortened(problems, "invalid lines in the chain file")


def check_bundle(dataset: ImageFolder, on_disk: FolderScan) -> list[str]:
    """Print how the images match the dataset's bundle, and return the bundle's problems."""
    try:
        bundle, matches = arguments.matched_bundle(dataset, on_disk)
    except ChainFileError as error:
        return [str(error)]
    lines = list(matches.lines(bundle.lines))
    accepted = {record["image"] for _, record in lines if is_accepted(record)}
    labels = on_disk.labels()
    share = len(accepted) / len(labels) if labels else 0.0
    print(f"  bundle {bundle}: {len(accepted):,} of {len(labels):,} images have a chain ({share:.1%})")
    print(
        f"    images matched by path: {len(matches.by_path):,}, by SHA-256: {len(matches.by_digest):,}, not at all: "
        f"{len(labels.keys() - matches.by_path.keys() - matches.by_digest.keys()):,}; "
        f"{counted(len(matches.absent), 'image')} of the bundle not on disk"
    )
    for note in matches.notes():
        print(f"    {note}")
    rules = Rules(arguments.class_names(dataset, on_disk), MIN_WORDS, MAX_WORDS, exact=True)
    problems = []
    misled = 0
    for line, record in lines:
        if is_accepted(record):
            verdict, is_misled = _judged(record, labels[record["image"]], rules)
            misled += is_misled
            if not verdict.accepted:
                place = f"{bundle.path}, line {line} ({record['image']})"
                problems.append(f"{place}: accepted, but violates the rule {verdict.rule!r}: {verdict.reason}.")
    _print_misled(misled)
    return _shortened(problems, "invalid lines in the bundle")


def _judged(record: Record, label: int, rules: Rules) -> tuple[Verdict, bool]:
    """Return the verdict on an accepted line, and whether it is unverified and concludes another class."""
    if record.get("verified", True):
        return rules.judge(record["chain"], label), False
    return rules.judge(record["chain"]), rules.judge(record["chain"], label).rule == "label"


def _print_misled(count: int) -> None:
    if count:
        print(
            f"    {count:,} unverified chains conclude another class: left out of training, unless with the hparam "
            "chain_verification 'unverified'"
        )


def _shortened(problems: list[str], what: str) -> list[str]:
    if len(problems) <= _SHOWN:
        return problems
    return [*problems[:_SHOWN], f"… {len(problems):,} {what} in total."]
