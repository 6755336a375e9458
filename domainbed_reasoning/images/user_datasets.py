"""A user's own images as DomainBed datasets, in class folders or listed in a table, described by a small TOML file.

The files are found in ``<config folder>/domainbed-reasoning/datasets/*.toml`` (the config folder is
``$XDG_CONFIG_HOME`` or ``~/.config``) and under the paths, files or folders, in ``$DOMAINBED_REASONING_DATASETS``, so
that every process of a sweep finds them. Each makes ``<Name>``, ``<Name>Reasoning`` and ``<Name>BaseToNew``::

    name = "Camera"                      # datasets Camera, CameraReasoning and CameraBaseToNew
    folder = "camera"                    # below --data_dir: camera/<domain>/<class>/<image>
    environments = ["day", "night"]      # one short name a domain folder, in sorted order
    subject = "animal"                   # optional, "object": "What type of animal is in this photo?"
    checkpoint_freq = 300                # optional: steps between two evaluations
    bundle = "camera.jsonl.xz"           # optional: chains that come with it, a path from this file's folder

    table = "images.csv"                 # optional, in the folder: its rows list the images, wherever below it they are
    splits = ["train", "val"]            # optional, with a table: rows of these splits alone

    [columns]                            # optional, with a table: what its columns are called
    path = "file"                        # path, label, domain and split where not given

    [class_names]                        # optional: class folder = name in prompts; else "Red_Fox" is "red fox"
    Felis_catus = "house cat"

With a table, ``environments`` are values of its domain column, in any order, and classes the values of its label
column, sorted. It is CSV, TSV, JSON Lines or Parquet, see `table`.
"""

from __future__ import annotations

import keyword
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.bundled import ENDING
from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.files.plain import open_plain
from domainbed_reasoning.images.catalog import STOCK, ImageFolder
from domainbed_reasoning.images.table import COLUMNS, ENDINGS
from domainbed_reasoning.registry import BASE_TO_NEW, DATASETS, EMBEDDED_DATASETS, load, plain_name, unknown

PATHS_VARIABLE = "DOMAINBED_REASONING_DATASETS"
MODULE = "domainbed_reasoning.datasets.user_datasets"  # module of the dataset classes

_KEYS: dict[str, type] = {
    "name": str,
    "folder": str,
    "environments": list,
    "subject": str,
    "checkpoint_freq": int,
    "bundle": str,
    "table": str,
    "splits": list,
    "columns": dict,
    "class_names": dict,
}
# DomainBed's datasets that are not image folders.
_OF_DOMAINBED = frozenset(
    "Debug28 Debug224 ColoredMNIST RotatedMNIST WILDSCamelyon WILDSFMoW SpawriousO2O_easy SpawriousO2O_medium "
    "SpawriousO2O_hard SpawriousM2M_easy SpawriousM2M_medium SpawriousM2M_hard".split()
)
_REQUIRED = ("name", "folder", "environments")

# A description has a few hundred bytes, or a few hundred thousand with thousands of class names. The parser's time is
# quadratic in the length of a line.
MAX_BYTES = 1 << 18
_MAX_LINE_BYTES = 2_000
_MAX_WORDS = 100  # characters of a name or subject


class DatasetFileError(ValueError):
    """An invalid TOML file of a dataset; the message gives file, problem and fix."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}. See `domainbed-reasoning check --help` for an example of such a file.")


def find(name: str, environ: Mapping[str, str] | None = None) -> ImageFolder:
    """Return the image-folder dataset of that name, with or without the suffix ``Reasoning`` or ``BaseToNew``.

    Stock and custom ones need neither torch nor DomainBed; other classes of `datasets/` are imported.

    Raises:
        ValueError: for an unknown name, with the closest match; or an invalid dataset file.
    """
    plain = plain_name(name)
    if plain in STOCK:
        return STOCK[plain]
    known, errors = usable_datasets(environ)
    if plain in known:
        return known[plain]
    for registered in (f"{plain}Reasoning", name):
        if registered in DATASETS and (described := _of_class(registered)):
            return described
    if errors:  # one of these files may describe it
        raise errors[0]
    raise unknown("image-folder dataset", name, {*STOCK, *known, *other_classes()})


def other_classes() -> list[str]:
    """Return the names of registered image-folder datasets that are only described by their class."""
    names = [
        name
        for name in DATASETS
        if name not in EMBEDDED_DATASETS
        and not name.endswith(BASE_TO_NEW)
        and name.removesuffix("Reasoning") not in STOCK
    ]
    return [described.name for name in names if (described := _of_class(name))]


def _of_class(name: str) -> ImageFolder | None:
    """Return the description of a registered dataset, from its class; None if it has no folder."""
    cls = load(DATASETS[name])
    if not hasattr(cls, "FOLDER"):
        return None
    return ImageFolder(
        name=name.removesuffix("Reasoning"),
        folder=cls.FOLDER,
        environments=tuple(cls.ENVIRONMENTS),
        subject=cls.SUBJECT,
        readable=dict(cls.READABLE),
        bundle=cls.BUNDLE,
        checkpoint_freq=cls.CHECKPOINT_FREQ,
        table=getattr(cls, "TABLE", None),
        columns=dict(getattr(cls, "COLUMNS", {})),
        splits=getattr(cls, "SPLITS", None),
        obtain=(cls.__doc__ or "").strip().partition("\n")[0],
    )


def custom_datasets(environ: Mapping[str, str] | None = None) -> dict[str, ImageFolder]:
    """Return the user's datasets by name, in sorted order.

    Args:
        environ: the environment variables; None for this process's.

    Raises:
        DatasetFileError: for a file that cannot be read or is invalid, or a name that is taken.
    """
    found, errors = usable_datasets(environ)
    if errors:
        raise errors[0]
    return found


def usable_datasets(environ: Mapping[str, str] | None = None) -> tuple[dict[str, ImageFolder], list[DatasetFileError]]:
    """Return the user's datasets by name, in sorted order, and the errors of invalid files."""
    found: dict[str, ImageFolder] = {}
    errors: list[DatasetFileError] = []
    for path in dataset_files(os.environ if environ is None else environ):
        try:
            if not path.is_file():
                raise DatasetFileError(path, f"named in ${PATHS_VARIABLE}, but no such file or folder exists")
            dataset = read_dataset(path)
            if dataset.name in found:
                taken = f"the name {dataset.name!r} is taken by {found[dataset.name].file}"
                raise DatasetFileError(path, f"{taken}; rename or remove one of them")
            found[dataset.name] = dataset
        except DatasetFileError as error:
            errors.append(error)
    return {name: found[name] for name in sorted(found)}, errors


def targets(datasets: Mapping[str, ImageFolder]) -> dict[str, str]:
    """Return ``"module:name"`` of the classes of custom datasets: as named, with ``Reasoning`` and ``BaseToNew``."""
    return {f"{name}{end}": f"{MODULE}:{name}{end}" for name in datasets for end in ("", "Reasoning", BASE_TO_NEW)}


def dataset_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the paths of the TOML files, the config folder's first, including missing ones that are named."""
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    places = [Path(config, "domainbed-reasoning", "datasets")]
    listed = [Path(place) for place in environ.get(PATHS_VARIABLE, "").split(os.pathsep) if place]
    seen = set()
    for place in places + listed:
        if place.is_dir():
            files = sorted(place.glob("*.toml"))
        else:
            files = [place] if place in listed else []
        for file in files:
            if (resolved := file.resolve()) not in seen:
                seen.add(resolved)
                yield resolved


def read_dataset(path: Path) -> ImageFolder:
    """Return the dataset that a TOML file describes.

    Raises:
        DatasetFileError: if it cannot be read, is not TOML, lacks a key, or has an unknown key or an invalid value.
    """
    try:
        with open_plain(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise DatasetFileError(path, f"larger than {MAX_BYTES} bytes")
        if max(map(len, text.splitlines()), default=0) > _MAX_LINE_BYTES:
            raise DatasetFileError(path, f"has a line longer than {_MAX_LINE_BYTES} bytes")
        table = tomllib.loads(text.decode("utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise DatasetFileError(path, f"cannot be read ({error.strerror})") from error
    except DatasetFileError:
        raise
    except RecursionError as error:
        raise DatasetFileError(path, "not TOML: arrays, tables or keys are nested too deeply") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number with thousands of digits
        raise DatasetFileError(path, f"not TOML: {str(error):.200}") from error
    _check(path, table)
    return ImageFolder(
        name=table["name"],
        folder=table["folder"].rstrip("/"),
        environments=tuple(table["environments"]),
        subject=table.get("subject", "object"),
        readable=dict(table.get("class_names", {})),
        bundle=str(path.parent / table["bundle"]) if "bundle" in table else None,
        checkpoint_freq=table.get("checkpoint_freq", 300),
        obtain=f"It is described in {path}; its folder must contain {table.get('table', '<domain>/<class>/<image>')}.",
        file=path,
        table=table.get("table"),
        columns=dict(table.get("columns", {})),
        splits=tuple(table["splits"]) if "splits" in table else None,
    )


def _check(path: Path, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key not in _KEYS:
            raise DatasetFileError(path, str(unknown("key", key[:40], _KEYS)).rstrip("."))
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise DatasetFileError(path, f"{key!r} must be a {_KEYS[key].__name__}, got {value!r:.80}")
    for key in _REQUIRED:
        if key not in table:
            raise DatasetFileError(path, f"the key {key!r} is missing")
    name = table["name"]
    usable = name.isidentifier() and not keyword.iskeyword(name) and name[0].isupper() and len(name) <= _MAX_WORDS
    if not usable or name.endswith(("Reasoning", BASE_TO_NEW)):
        rule = f"a Python name that begins with a capital and does not end in 'Reasoning' or '{BASE_TO_NEW}'"
        raise DatasetFileError(path, f"'name' must be {rule}, got {name!r:.80}")
    if name in STOCK or name in _OF_DOMAINBED:
        raise DatasetFileError(path, f"{name!r} is one of DomainBed's own datasets; choose another name")
    if f"{name}Reasoning" in DATASETS:
        raise DatasetFileError(
            path, f"'{name}Reasoning' is one of this package's datasets, or a plug-in's; choose another name"
        )
    if not _is_below(table["folder"]):
        raise DatasetFileError(path, f"'folder' must be below --data_dir, got {table['folder']!r:.80}")
    _check_table(path, table)
    environments = table["environments"]
    if len(environments) < 2 or not all(isinstance(item, str) and _is_single_line(item) for item in environments):
        raise DatasetFileError(path, f"'environments' must name at least two domains, got {environments!r:.80}")
    if len(set(environments)) < len(environments):
        raise DatasetFileError(path, f"'environments' has duplicate names: {environments!r:.80}")
    if not _is_single_line(table.get("subject", "object")):
        raise DatasetFileError(path, f"'subject' must be a single-line noun, got {table['subject']!r:.80}")
    if not 1 <= table.get("checkpoint_freq", 1) < 1 << 31:
        raise DatasetFileError(path, "'checkpoint_freq' must be in [1, 2**31)")
    if not _is_single_line(bundle := table.get("bundle", ENDING)) or not bundle.endswith(ENDING):
        raise DatasetFileError(path, f"'bundle' must be the path of a {ENDING} file, got {bundle!r:.80}")
    names = table.get("class_names", {})
    for key, value in names.items():
        if not isinstance(value, str) or not _is_single_line(value):
            raise DatasetFileError(
                path, f"'class_names' must map {key[:80]!r} to a single-line name, got {value!r:.80}"
            )
    if problem := check_class_names(list(names.values())):
        raise DatasetFileError(path, f"'class_names': {problem}")


def _check_table(path: Path, table: Mapping[str, Any]) -> None:
    listing = table.get("table")
    if listing is None:
        for key in ("splits", "columns"):
            if key in table:
                raise DatasetFileError(path, f"{key!r} needs 'table', the file that lists the images")
        return
    if not _is_below(listing) or not listing.lower().endswith(ENDINGS):
        rule = f"the path of a {', '.join(ENDINGS)} file below 'folder'"
        raise DatasetFileError(path, f"'table' must be {rule}, got {listing!r:.80}")
    splits = table.get("splits", ["train"])
    if not splits or not all(isinstance(item, str) and _is_single_line(item) for item in splits):
        raise DatasetFileError(path, f"'splits' must name at least one split, got {splits!r:.80}")
    for key, value in table.get("columns", {}).items():
        if key not in COLUMNS:
            raise DatasetFileError(path, str(unknown("column", key[:40], COLUMNS)).rstrip("."))
        if not isinstance(value, str) or not _is_single_line(value):
            raise DatasetFileError(path, f"'columns' must map {key!r} to a single-line name, got {value!r:.80}")


def _is_below(text: str) -> bool:
    """Return whether a path stays below the folder that it starts from."""
    folder = Path(text)
    climbs = folder.is_absolute() or ".." in folder.parts or not folder.parts or folder.parts[0].startswith("~")
    return not climbs and "\\" not in text and text.isprintable()


def _is_single_line(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) <= _MAX_WORDS
