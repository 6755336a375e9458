"""The argument parser of all verbs, and shared options and helpers."""

from __future__ import annotations

import argparse
import json
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from domainbed_reasoning.annotate.stats import describe_unknown, split_known
from domainbed_reasoning.chains.bundled import BUNDLED, ENDING, Bundle, read_bundle
from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.chains.image_names import require_image_names
from domainbed_reasoning.chains.matching import Matches, match_images
from domainbed_reasoning.chains.rules import MAX_WORDS, MIN_WORDS, Rules
from domainbed_reasoning.chains.store import ACCEPTED, Record, is_accepted, read_records
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.images.catalog import CHAIN_FILE, FolderScan, ImageFolder, scan
from domainbed_reasoning.images.user_datasets import find
from domainbed_reasoning.terminal import json_line

PROGRAM = "domainbed-reasoning"
FORMER_OPTIONS = {"--licence": "--license"}  # still accepted, not shown


class UsageError(Exception):
    """Options that cannot be combined; ends the verb with exit code 2."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that accepts ``--data_dir`` for ``--data-dir`` and keeps the layout of its epilog."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse ``args``, their options spelled with hyphens or, as DomainBed's, with underscores."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_hyphenated, words[:end]), *words[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\nRun `{self.prog} --help` for usage.\n")


def _hyphenated(word: str) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = name.replace("_", "-")
    return FORMER_OPTIONS.get(name, name) + equals + value


def add_dataset_arguments(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Add --dataset, --data-dir and --chains."""
    parser.add_argument("--dataset", required=required, help="PACS, VLCS, …, or your own (see `check --help`)")
    parser.add_argument("--data-dir", required=required, help="folder that contains the dataset's folder")
    add_chains_argument(parser, f"{CHAIN_FILE} in the dataset's folder")


def add_chains_argument(parser: argparse._ActionsContainer, default: str) -> None:
    """Add --chains, a path or ``bundled``; ``default`` is for its help."""
    text = f"chain file, or {BUNDLED!r} for the chains that come with the dataset (default: {default})"
    parser.add_argument("--chains", type=lambda text: text if text == BUNDLED else Path(text), help=text)


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add --json, whose output is one line: `print_json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; NaN and infinity become null, and what JSON lacks becomes a string."""
    print(as_json(value))


def as_json(value: Any) -> str:
    """Return the line that `print_json` prints."""
    return json_line(_plain(value), sys.stdout)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def add_trust_argument(parser: argparse._ActionsContainer) -> None:
    """Add --trust-remote-code."""
    text = "run the Python files that come with the model; what a job or folder records allows nothing"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def add_rule_arguments(parser: Parser) -> None:
    """Add the options of the rules by which chains are accepted."""
    parser.add_argument("--unverified", action="store_true", help="accept conclusions that are not the true class")
    parser.add_argument("--exact", action="store_true", help="accept only chains in canonical form; do not normalize")
    for name, default in (("--min-words", MIN_WORDS), ("--max-words", MAX_WORDS)):
        parser.add_argument(name, type=non_negative(int), default=default, help="per chain (default: %(default)s)")


def rules_of(args: argparse.Namespace, names: tuple[str, ...]) -> Rules:
    """Return the rules for a dataset with these class names.

    Raises:
        UsageError: --max-words is below --min-words or 1.
    """
    if args.max_words < (least := max(1, args.min_words)):
        raise UsageError(f"--max-words must be at least {least} (--min-words); got {args.max_words}")
    return Rules(names, args.min_words, args.max_words, verified=not args.unverified, exact=args.exact)


def positive(kind: type[int] | type[float], most: float = math.inf) -> Callable[[str], float]:
    """Return an argument type: a finite number above 0 and at most ``most``."""
    interval = "positive" if most == math.inf else f"in (0, {most:g}]"
    return _number(kind, lambda value: 0 < value <= most, interval)


def non_negative(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return an argument type: a finite number, 0 or above."""
    return _number(kind, lambda value: value >= 0, "non-negative")


def _number(kind: type[int] | type[float], allowed: Callable[[float], bool], interval: str) -> Callable[[str], float]:
    noun = "an integer" if kind is int else "a finite number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value != value or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"must be {noun}; got {text!r}")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {interval}; got {text}")
        return value

    return parse


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in an option's value; an argument type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON ({error}); expected, for example, '{{\"lr\": 1e-4}}'") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"lr\": 1e-4}}'; got {text}")
    return value


def open_dataset(
    args: argparse.Namespace, checked: bool = True, writes: bool = False
) -> tuple[ImageFolder, FolderScan]:
    """Return the dataset and its files; set ``args.chains`` to its default.

    Args:
        args: the verb's arguments.
        checked: reject images whose names a chain file cannot store.
        writes: whether the verb writes to the chain file.

    Raises:
        ValueError: for an unknown dataset, an invalid image name, or ``bundled`` without a bundle.
        FileNotFoundError: its folder does not exist.
        UsageError: the verb would write to the bundle.
    """
    if writes and args.chains == BUNDLED:
        raise UsageError("--chains bundled is read-only; pass the path of the chain file to write")
    dataset = find(args.dataset)
    on_disk = scan(dataset, args.data_dir)
    if checked:
        require_image_names(on_disk.root, (picture.path for picture in on_disk.pictures))
    if args.chains == BUNDLED and dataset.bundle is None:
        raise ValueError(f"{dataset.name} has no bundled chains. Pass the path of a chain file with --chains.")
    if args.chains is None:
        args.chains = on_disk.root / CHAIN_FILE
    return dataset, on_disk


def matched_bundle(dataset: ImageFolder, on_disk: FolderScan) -> tuple[Bundle, Matches]:
    """Return the dataset's bundle and its matches with the images on disk.

    Raises:
        ChainFileError: if the bundle cannot be used.
    """
    bundle = read_bundle(str(dataset.bundle))
    images = [picture.path for picture in on_disk.pictures]
    return bundle, match_images(bundle.lines, images, on_disk.root, by_folder=dataset.table is None)


def read_candidates(
    args: argparse.Namespace,
    dataset: ImageFolder,
    on_disk: FolderScan,
    wanted: Callable[[Record], bool] = lambda record: True,
    repair: bool = True,
) -> tuple[list[Record], int]:
    """Return the candidates of images in the dataset, and the number of other candidates.

    Sets ``args.chains`` to the bundle's path if it is ``bundled``.

    Args:
        args: the verb's arguments, after `open_dataset`.
        dataset: the dataset.
        on_disk: its files.
        wanted: filter on candidates.
        repair: ignore a partial last line of a chain file.

    Raises:
        ChainFileError: for a chain file or bundle that cannot be used.
    """
    if args.chains == BUNDLED:
        bundle, matches = matched_bundle(dataset, on_disk)
        args.chains = bundle.path
        for note in matches.notes():
            print(note, file=sys.stderr)
        absent = set(matches.absent)
        known = [record for _, record in matches.lines(bundle.lines) if wanted(record)]
        return known, sum(record["image"] in absent and wanted(record) for _, record in bundle.lines)
    if dataset.bundle is not None and not args.chains.exists():
        raise FileNotFoundError(
            f"{args.chains} does not exist. Pass --chains bundled for the chains that come with {dataset.name}, or "
            "create the file with `domainbed-reasoning annotate` or `import`."
        )
    records: Iterable[Record] = (record for _, record in read_records(args.chains, repair=repair))
    return split_known(on_disk.pictures, filter(wanted, records))


def bundled_records(dataset: ImageFolder, on_disk: FolderScan, unverified: bool) -> list[Record]:
    """Return the accepted candidates of the dataset's bundle, without texts, and print that their images are skipped.

    Args:
        dataset: the dataset, which has a bundle.
        on_disk: its files.
        unverified: whether candidates that conclude another class count as accepted.

    Raises:
        ChainFileError: if the bundle cannot be used.
    """
    bundle, matches = matched_bundle(dataset, on_disk)
    kept = (ACCEPTED, "label") if unverified else (ACCEPTED,)
    records = [
        {**record, "verdict": ACCEPTED, "chain": "", "raw": ""}
        for _, record in matches.lines(bundle.lines)
        if (ACCEPTED if is_accepted(record) else record.get("rule")) in kept
    ]
    for note in matches.notes():
        print(note, file=sys.stderr)
    if count := len({record["image"] for record in records}):
        have = "image has a chain" if count == 1 else "images have chains"
        print(
            f"{count:,} {have} in the bundle {bundle} and will be skipped. To annotate all images, pass --chains FILE."
        )
    return records


def unknown_text(args: argparse.Namespace, count: int) -> str:
    """Return a message about ``count`` candidates for images that are not in the dataset."""
    return describe_unknown(count, are_listed=not args.chains.name.endswith(ENDING))


def class_names(dataset: ImageFolder, on_disk: FolderScan) -> tuple[str, ...]:
    """Return the class names used in prompts, in label order.

    Raises:
        ValueError: if answers could not distinguish two of them.
    """
    names = dataset.class_names(on_disk.classes)
    problem = check_class_names(names)
    if problem:
        raise ValueError(f"{dataset.name}: {problem}. Rename the class folders or set [class_names].")
    return names


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; unpaired surrogates become question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))
