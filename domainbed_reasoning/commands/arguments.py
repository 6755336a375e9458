"""What the data verbs share: which dataset, which chain file, and how they end on an error."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.chains.image_names import require_image_names
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.images.catalog import CHAIN_FILE, FolderScan, ImageFolder, scan
from domainbed_reasoning.images.user_datasets import find
from domainbed_reasoning.terminal import printable as printable  # the data verbs' name for it

Main = Callable[[Sequence[str] | None], int]


def make_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"domainbed-reasoning {verb}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_dataset_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --dataset, --data_dir (DomainBed's spelling) and --chains."""
    parser.add_argument("--dataset", required=required, help="PACS, VLCS, …, or one of your own (see `check --help`)")
    parser.add_argument(
        "--data_dir", "--data-dir", required=required, help="the folder that holds the dataset's folder"
    )
    parser.add_argument("--chains", type=Path, help=f"chain file (default: {CHAIN_FILE} in the dataset's folder)")


def open_dataset(given: argparse.Namespace, checked: bool = True) -> tuple[ImageFolder, FolderScan]:
    """Return the dataset and what lies on disk; set ``given.chains`` to its default.

    Args:
        given: the verb's arguments.
        checked: refuse images whose names no chain file can hold.

    Raises:
        ValueError: unknown dataset, or such a name.
        FileNotFoundError: it is not there.
    """
    dataset = find(given.dataset)
    on_disk = scan(dataset, given.data_dir)
    if checked:
        require_image_names(on_disk.root, (picture.path for picture in on_disk.pictures))
    if given.chains is None:
        given.chains = on_disk.root / CHAIN_FILE
    return dataset, on_disk


def class_names(dataset: ImageFolder, on_disk: FolderScan) -> tuple[str, ...]:
    """Return the names of the classes for prompts, in label order.

    Raises:
        ValueError: for names that no answer could tell apart.
    """
    names = tuple(dataset.class_name(folder) for folder in on_disk.classes)
    fault = check_class_names(names)
    if fault:
        raise ValueError(f"{dataset.name}: {fault}. Rename its folders, or give them names in [class_names].")
    return names


def json_object(option: str, text: str) -> dict[str, Any]:
    """Return the JSON object that was given for an option.

    Raises:
        ValueError: for anything else, with an example.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{option} is no JSON ({error}): write \'{{"quantize": "nf4"}}\'.') from error
    if not isinstance(found, dict):
        raise ValueError(f"{option} {text}: should be a JSON object, as in '{{\"lr\": 1e-4}}'.")
    return found


def counted(count: int, noun: str) -> str:
    """Return ``"1 image"`` or ``"2 images"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; halves of character pairs become question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def ends_with_message(main: Main) -> Main:
    """Print an expected error's message and return 1 instead of a traceback."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        from domainbed_reasoning.annotate.teacher import TeacherError

        try:
            return main(argv)
        except BrokenPipeError:  # `… | head`: the command line's to end
            raise
        except (ValueError, OSError, TeacherError) as error:
            print(printable(str(error)), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130

    return wrapped
