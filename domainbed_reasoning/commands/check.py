"""`domainbed-reasoning check`: a dataset on disk, and its chains, against what they should be."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from domainbed_reasoning.chains.image_names import ImageLookup, composed, image_name_problems
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.chains.rules import MAX_WORDS, MIN_WORDS, Rules
from domainbed_reasoning.chains.store import ACCEPTED, ChainFileError, read_lines
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.catalog import IMAGE_EXTENSIONS, STOCK, FolderScan, ImageFolder, check_domain_order
from domainbed_reasoning.images.decode import read_rgb, reject_truncated_images
from domainbed_reasoning.images.user_datasets import custom_datasets, find, other_classes

_EXAMPLES = """\
  domainbed-reasoning check --dataset PACS --data_dir DATA
  domainbed-reasoning check --dataset TerraIncognita --data_dir DATA --no-images
  domainbed-reasoning check --list

A dataset of your own is one TOML file in ~/.config/domainbed-reasoning/datasets/, or anywhere that the variable
DOMAINBED_REASONING_DATASETS names (files or folders). DomainBed then knows it as Camera and as CameraReasoning:

  name = "Camera"
  folder = "camera"                  # below --data_dir: camera/<domain>/<class>/<image>
  environments = ["day", "night"]    # a short name for each domain folder, in sorted order
  subject = "animal"                 # optional: "What type of animal is in this photo?"

  [class_names]                      # optional: class folder = name in prompts; else "Red_Fox" is "red fox"
  Felis_catus = "house cat"

The exit code is 1 if something is wrong, else 0.
"""

# Faults of one kind that are printed before the rest is only counted.
_SHOWN = 10


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Print what is there and what is wrong; return 1 if anything is."""
    parser = arguments.make_parser("check", __doc__ or "", _EXAMPLES)
    arguments.add_dataset_arguments(parser, required=False)
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument("--list", action="store_true", help="list the image-folder datasets that are known")
    given = parser.parse_args(argv)
    if given.list:
        others = {name: find(name) for name in other_classes()}
        for dataset in (STOCK | custom_datasets() | others).values():
            print(
                f"{dataset.name:<16} {dataset.folder}/  {len(dataset.environments)} domains, subject: {dataset.subject}"
            )
        return 0
    if not given.dataset or not given.data_dir:
        parser.error("--dataset and --data_dir are wanted (or --list)")
    asked_for = given.chains
    dataset, on_disk = arguments.open_dataset(given, checked=False)
    print(f"{dataset.name} at {arguments.printable(str(on_disk.root))}")
    faults = list(compare(dataset, on_disk))
    names = list(image_name_problems(picture.path for picture in on_disk.pictures))
    faults += _shortened(names, "names of images cannot be used")
    print_prompt(dataset, on_disk)
    print_others(on_disk, given.chains)
    if not given.no_images:
        faults += broken_images(on_disk)
    if asked_for and not asked_for.exists():
        faults.append(f"{asked_for}: there is no such chain file (--chains).")
    else:
        faults += check_chains(given.chains, dataset, on_disk)
    for fault in faults:
        print(arguments.printable(f"FAULT {fault}"))
    if faults and dataset.obtain:
        print(f"To get what is missing: {dataset.obtain} Website: {dataset.website or 'none known'}")
    print(f"{len(faults)} fault(s)." if faults else "No faults.")
    return 1 if faults else 0


def compare(dataset: ImageFolder, on_disk: FolderScan) -> Iterator[str]:
    """Print the counts beside the published ones and yield what is wrong with domains, classes and counts."""
    found = on_disk.per_domain()
    width = max(map(len, [*on_disk.domains, *dataset.domains, "domain"]))
    print(f"  {'domain':<{width}} {'images':>8} {'published':>10}")
    for domain in sorted({*on_disk.domains, *dataset.domains}):
        expected = dataset.domains.get(domain)
        published = "–" if expected is None else format(expected, ",")
        print(arguments.printable(f"  {domain:<{width}} {found[domain]:>8,} {published:>10}"))
    total = len(on_disk.pictures)
    print(f"  {'all':<{width}} {total:>8,} {'–' if dataset.total is None else format(dataset.total, ','):>10}")
    if len(on_disk.domains) != len(dataset.environments):
        names = ", ".join(on_disk.domains)
        yield f"{len(on_disk.domains)} domain folders ({names}), but {len(dataset.environments)} are known."
    if fault := check_domain_order(dataset, on_disk.domains):
        yield fault
    for domain in dataset.domains:
        if domain not in on_disk.domains:
            yield f"the domain folder {domain!r} is missing."
    for domain in on_disk.domains:
        if dataset.domains and domain not in dataset.domains:
            yield f"the folder {domain!r} is none of its domains; DomainBed would take it for one."
    if dataset.num_classes is not None and len(on_disk.classes) != dataset.num_classes:
        yield f"{len(on_disk.classes)} classes, {dataset.num_classes} published."
    for name in dataset.classes:
        if name not in on_disk.classes:
            yield f"the class folder {name!r} is missing."
    if dataset.file is not None:
        known = {composed(label) for label in on_disk.classes}
        for name in dataset.readable:
            if composed(name) not in known:
                near = difflib.get_close_matches(name, on_disk.classes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                yield f"{dataset.file}: [class_names] names {name!r}, which is no class folder.{hint}"
    for domain, label in on_disk.missing:
        yield f"{domain}/{label} has no image: DomainBed would fail, or number the classes of {domain} otherwise."
    others = dict(dataset.other_totals)
    if total in others:
        print(f"  {total:,} images: {others[total]}.")
    elif dataset.total is not None and total != dataset.total:
        hint = "".join(f"; {count:,} in {which}" for count, which in dataset.other_totals)
        yield f"{total:,} images, {dataset.total:,} published{hint}."


def print_prompt(dataset: ImageFolder, on_disk: FolderScan) -> None:
    """Print the question that is asked of every image, and which class folder has which name in it."""
    names = [dataset.class_name(folder) for folder in on_disk.classes]
    wrapped = [f"question: {q_cls(names, dataset.subject)}"]
    wrapped.append(
        "class folders: " + ", ".join(f"{folder} → {name}" for folder, name in zip(on_disk.classes, names, strict=True))
    )
    for text in wrapped:
        print(arguments.printable(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="    ")))


def print_others(on_disk: FolderScan, chains: Path) -> None:
    """Print how many files are not taken for images, by ending; hidden ones, Thumbs.db and chain files left out."""
    pictures = {picture.path for picture in on_disk.pictures}
    endings: Counter[str] = Counter()
    for place, _, names in os.walk(on_disk.root, followlinks=True):
        for name in names:
            path = Path(place, name).relative_to(on_disk.root)
            hidden = any(part.startswith(".") for part in path.parts) or name == "Thumbs.db"
            is_chains = path.suffix == ".jsonl" or (on_disk.root / path).absolute() == chains.absolute()
            if path.as_posix() not in pictures and not hidden and not is_chains:
                ending = path.suffix.lower() or "no ending"
                endings[f"{ending} in no class folder" if ending in IMAGE_EXTENSIONS else ending] += 1
    if endings:
        listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(10))
        more = ", …" if len(endings) > 10 else ""
        total = endings.total()
        what = "1 file is not taken for an image" if total == 1 else f"{total:,} files are not taken for images"
        print(arguments.printable(f"  {what}: {listed}{more}"))


def broken_images(on_disk: FolderScan) -> list[str]:
    """Decode every image and return the faults, the first few by name."""
    from tqdm import tqdm

    paths = [on_disk.root / picture.path for picture in on_disk.pictures]
    with reject_truncated_images(), ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(_fault_of, paths), total=len(paths), unit="image", leave=False))
    faults = [fault for fault in results if fault]
    print(f"  {len(paths) - len(faults):,} of {len(paths):,} images can be decoded")
    return _shortened(faults, "images cannot be decoded")


def _fault_of(path: Path) -> str:
    """Return why an image cannot be decoded to its end, empty if it can."""
    try:
        if not path.stat().st_size:
            return f"{path}: an empty file"
        read_rgb(path)
    except OSError as error:
        return str(error)
    return ""


def check_chains(path: Path, dataset: ImageFolder, on_disk: FolderScan) -> list[str]:
    """Print the coverage of a chain file and return what is wrong with its lines."""
    if not path.exists():
        print(f"  no chains at {path}; make them with `domainbed-reasoning annotate`")
        return []
    labels = {picture.path: on_disk.classes.index(picture.label) for picture in on_disk.pictures}
    names = ImageLookup(labels)
    rules = Rules(arguments.class_names(dataset, on_disk), MIN_WORDS, MAX_WORDS, exact=True)
    faults: list[str] = []
    accepted: Counter[str] = Counter()
    candidates = 0
    for number, record in read_lines(path):
        place = f"{path}, line {number}"
        if isinstance(record, ChainFileError):
            faults.append(str(record))
            continue
        candidates += 1
        image = names.find(record["image"])
        if image is None:
            faults.append(f"{place}: no image {record['image']!r} is in the dataset")
        elif record.get("verdict", ACCEPTED) == ACCEPTED:
            accepted[image] += 1
            if accepted[image] == 2:
                faults.append(f"{place}: a second accepted chain of {image!r}")
            verdict = rules.judge(record["chain"], labels[image] if record.get("verified", True) else None)
            if not verdict.accepted:
                faults.append(
                    f"{place}: accepted, but by the rule {verdict.rule!r} it is not: {verdict.reason}. "
                    "`annotate --rejudge` mends its form or rejects it."
                )
    share = len(accepted) / len(labels) if labels else 0.0
    print(
        f"  {path}: {candidates:,} candidates; {len(accepted):,} of {len(labels):,} images have a chain ({share:.1%})"
    )
    return _shortened(faults, "lines of the chain file are wrong")


def _shortened(faults: list[str], what: str) -> list[str]:
    if len(faults) <= _SHOWN:
        return faults
    return [*faults[:_SHOWN], f"… {len(faults):,} {what} in all."]
