"""Record which code ran a job: ``versions.json`` beside results.jsonl, written once by every train job.

DomainBed prints versions of Python, torch and a few others. What decides the numbers as well is the commit of this
package and of DomainBed, whether files differed from it, the libraries of the language models, and the GPU. An
installed wheel has no commit: a digest of the source files says which code it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import domainbed_reasoning
from domainbed_reasoning.bridge import plugins, upstream
from domainbed_reasoning.bridge.train_args import recognized_arguments
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

FILE = "versions.json"
OURS = "domainbed-reasoning"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def record_for_job(ranks: int = 1) -> None:
    """Write the versions of this process's job; does nothing outside of a job or when called again.

    Args:
        ranks: the number of processes that share the job, recorded if there are several.
    """
    args = recognized_arguments()
    if args is not None:
        _record(str(args.output_dir), args.algorithm, args.dataset, ranks)


@functools.cache
def _record(folder: str, algorithm: str, dataset: str, ranks: int) -> None:
    try:
        used = plugins.code_of(algorithm, dataset)
        found = current() | ({"plug-ins": used} if used else {}) | ({"ranks": ranks} if ranks > 1 else {})
        replace_text(Path(folder) / FILE, json.dumps(found, indent=1) + "\n")
    except Exception as error:  # must not stop the job
        _log.warning("Could not record the versions of this job: %s: %s", type(error).__name__, error)


def current() -> dict[str, Any]:
    """Return the versions of this process: commits (None outside of a git clone), source digests, libraries, device."""
    domainbed, digests = upstream.importable_domainbed(), source_digests()
    ours = {"version": domainbed_reasoning.__version__, "digest": digests[OURS], **_commit(_checkout())}
    theirs: dict[str, Any] = {}
    if domainbed:
        stand_in = upstream.is_stand_in(domainbed)
        theirs = {"stand_in": stand_in, "digest": digests["DomainBed"], **_commit(domainbed)}
    return {
        OURS: ours,
        "DomainBed": theirs,
        "libraries": {"Python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}},
        "device": _device(),
    }


@functools.cache
def source_digests() -> dict[str, str]:
    """Return the SHA-256 of this package's and of DomainBed's source files, by name of the package.

    A regular install, an editable one and a checkout of the same files have the same digest. It is read once a process,
    when a job starts: files that change later are not those that run.

    Raises:
        OSError: a file cannot be read.
    """
    ours = _files_below(Path(domainbed_reasoning.__file__).parent, OURS)
    for part in ("algorithms", "datasets", "sweeps"):  # they are elsewhere in a checkout
        spec = importlib.util.find_spec(f"domainbed_reasoning.{part}")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            ours |= _files_below(Path(folder), f"{OURS}/{part}")
    hook = importlib.util.find_spec("_domainbed_reasoning_hook")
    if hook is not None and hook.origin:
        ours["hook"] = Path(hook.origin)
    domainbed = upstream.importable_domainbed()
    theirs = _files_below(domainbed / "domainbed", "domainbed") if domainbed else {}
    theirs = {name: path for name, path in theirs.items() if path.suffix == ".py"}  # results may be there, too
    return {OURS: _digest(ours), "DomainBed": _digest(theirs)}


def _files_below(folder: Path, name: str) -> dict[str, Path]:
    """Return a package's files by their relative names, without caches and editor files."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    shown = {inner: path for inner, path in files.items() if not any(part.startswith(".") for part in inner.parts)}
    return {f"{name}/{inner.as_posix()}": path for inner, path in shown.items()}


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def _checkout() -> Path:
    """Return the folder that is a git clone where the package runs from a checkout."""
    return Path(domainbed_reasoning.__file__).resolve().parent.parent


def _commit(folder: Path) -> dict[str, Any]:
    """Return the commit that is checked out in a folder, and whether files differ from it."""
    commit = upstream.commit_of(folder) if (folder / ".git").exists() else None  # calls git only in a clone
    return {"commit": commit, "modified": upstream.is_modified(folder) if commit else None}


def installed(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    """Return the name of the GPU that a job of this process takes, or CPU; "" where torch has not been loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "CPU"


def spelt(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions as a person reads them, by name; what is not known, or no versions at all, is left out."""
    parts = {
        name: part if isinstance(part := recorded.get(name), dict) else {} for name in (OURS, "DomainBed", "libraries")
    }
    ours, domainbed = parts[OURS], parts["DomainBed"]
    found = {
        OURS: _sentence(ours.get("version"), ours),
        "DomainBed": _sentence("stand-in" if domainbed.get("stand_in") is True else None, domainbed),
        **{str(name): _sentence(version, {}) for name, version in parts["libraries"].items()},
        "device": _sentence(recorded.get("device"), {}),
    }
    return {name: text for name, text in found.items() if text}


def _sentence(version: Any, part: Mapping[str, Any]) -> str:
    words = [version] if isinstance(version, str) and version else []
    if isinstance(commit := part.get("commit"), str):
        words.append(f"commit {commit[:12]}")
        words += ["modified"] if part.get("modified") is True else []
    has_commit = isinstance(part.get("commit"), str) and part.get("modified") is not True
    if isinstance(digest := part.get("digest"), str) and not has_commit:
        words.append(f"files {digest[:12]}")
    return ", ".join(words)
