"""Select DomainBed: that in the working directory, else the importable one, else the pinned clone in the cache.

So it is for all verbs and for what they start, and for ``python -m domainbed…``.

Upstream is on no package registry; its users clone it. `domainbed-reasoning get-domainbed` does so at the commit that
this package was written for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from domainbed_reasoning.files.cache import NoCacheFolder, cache_folder
from domainbed_reasoning.files.plain import read_plain, read_plain_text

COMMIT = "b93c22a1cfc3b2428398272c1a116c8de1f4139e"
URL = "https://github.com/facebookresearch/DomainBed"
VARIABLE = "DOMAINBED_REASONING_DOMAINBED"
STAND_IN_MARK = "STANDIN = True"
MISSING = (
    "DomainBed was not found. Run from inside your own clone, or fetch one with `domainbed-reasoning get-domainbed`."
)


def cached_clone() -> Path:
    """Return the folder of the pinned clone, whether it exists: ``$DOMAINBED_REASONING_DOMAINBED`` or in the cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return cache_folder() / f"DomainBed-{COMMIT[:7]}"


def find_cached_spec() -> ModuleSpec | None:
    """Return the import spec of `domainbed` in the cached clone; None without a clone."""
    clone = _usable_clone()
    return None if clone is None else PathFinder.find_spec("domainbed", [str(clone)])


def use_domainbed() -> Path | None:
    """Make this process import the selected DomainBed, and return its folder; None without any.

    A console script has its own folder on `sys.path`, where ``python -m`` has the working directory.
    """
    with suppress(FileNotFoundError):  # a working directory that has been deleted
        here = Path.cwd()
        if _holds_domainbed(here) and not sys.flags.safe_path and "domainbed" not in sys.modules:
            sys.path.insert(0, str(here))
    folder = importable_domainbed()
    if folder is None:
        folder = _usable_clone()  # without the hook, imports do not find it
    spec = importlib.util.find_spec("domainbed")
    if folder is not None and getattr(spec, "origin", None) is None:  # a folder of that name without a package hides it
        sys.path.insert(0, str(folder))
    return folder


def importable_domainbed() -> Path | None:
    """Return the folder of the `domainbed` package that an import would load, without importing it."""
    loaded = getattr(sys.modules.get("domainbed"), "__file__", None)
    if loaded:
        return Path(loaded).parent.parent
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec("domainbed", None) if find_spec else None
        if spec is not None:
            return Path(spec.origin).parent.parent if spec.origin else None
    return None


def _usable_clone() -> Path | None:
    """Return the cached clone if it exists."""
    try:
        clone = cached_clone()
    except NoCacheFolder:
        return None
    return clone if _holds_domainbed(clone) else None


def _holds_domainbed(folder: Path) -> bool:
    return (folder / "domainbed" / "__init__.py").is_file()


def fetch_clone(source: str = URL) -> Path:
    """Clone ``source`` into the cache folder at the pinned commit; do nothing if a sound clone is there.

    The clone is made beside its final place and renamed when it has been checked, so an interrupted one leaves nothing.

    Args:
        source: URL or path of a DomainBed repository.

    Returns:
        The clone's folder.

    Raises:
        RuntimeError: git is missing or fails, or the clone is not the pinned commit.
    """
    folder = cached_clone()
    if folder.exists():
        problem = problem_with(folder)
        if problem:
            raise RuntimeError(f"{folder} {problem}. Remove that folder and rerun get-domainbed.")
        return folder
    if shutil.which("git") is None:
        raise RuntimeError(
            "git is not installed: install it, or clone DomainBed elsewhere and copy it to " + str(folder)
        )
    # Without a network this fails immediately, where a clone may hang.
    _git("ls-remote", "--", source, "HEAD", timeout=_PROBE_SECONDS, source=source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cloning-", dir=folder.parent) as temporary:
        clone = Path(temporary) / "DomainBed"
        _git("clone", "--quiet", "--no-checkout", "--", source, str(clone), timeout=_CLONE_SECONDS, source=source)
        _git("-C", str(clone), "checkout", "--quiet", "--detach", COMMIT, timeout=_CLONE_SECONDS, source=source)
        problem = problem_with(clone)
        if problem:
            raise RuntimeError(f"The clone of {_without_password(source)} {problem}.")
        os.rename(clone, folder)
    return folder


def problem_with(folder: Path) -> str | None:
    """Return why ``folder`` is not the unmodified pinned commit, as a predicate, or None."""
    commit = commit_of(folder)
    if commit is None:
        return "is not a git clone"
    if commit != COMMIT:
        return f"is at commit {commit}, not {COMMIT}"
    if is_modified(folder):
        return "has files that differ from its commit"
    if not _holds_domainbed(folder):
        return "has no package `domainbed`"
    return None


def commit_of(folder: Path) -> str | None:
    """Return the commit that is checked out in ``folder``, if that is the top of a git clone."""
    found = _look_up(folder)
    if found is None:
        return None
    top, commit = found[:2]
    return commit if Path(top).resolve() == folder.resolve() else None


def _look_up(folder: Path) -> list[str] | None:
    """Return top, commit, folder of objects and file of excluded names of the clone that ``folder`` is in."""
    asked = ("--show-toplevel", "HEAD", "--git-path", "objects", "--git-path", "info/exclude")
    output = _ask_git("-C", str(folder), "rev-parse", *asked)
    lines = (output or "").splitlines()
    return lines if len(lines) == 4 else None


def is_modified(folder: Path) -> bool | None:
    """Return whether files of the clone were changed or added; None if git cannot tell.

    The clone's own configuration can name programs (hooks, fsmonitor, filters), which `git status` would run. So its
    files are compared with its commit by way of an empty repository of ours that borrows its objects.
    """
    found = _look_up(folder)
    if found is None:
        return None
    top, commit, objects, exclude = found
    with tempfile.TemporaryDirectory(prefix="domainbed-reasoning-") as ours:
        if _ask_git("init", "--quiet", "--bare", "--template=", ours) is None:
            return None
        Path(ours, "objects", "info").mkdir(exist_ok=True)
        Path(ours, "objects", "info", "alternates").write_text(f"{Path(folder, objects).absolute()}\n", "utf-8")
        git = ("-c", "core.bare=false", "--git-dir", ours, "--work-tree", top)
        with contextlib.suppress(OSError):
            Path(ours, "info").mkdir(exist_ok=True)
            Path(ours, "info", "exclude").write_bytes(read_plain(Path(folder, exclude), _MAX_EXCLUDE_BYTES))
        status = ("-C", top, "status", "--porcelain", "--ignore-submodules=all")
        if _ask_git(*git, "update-ref", "HEAD", commit) is None or _ask_git(*git, "read-tree", commit) is None:
            return None
        output = _ask_git(*git, *status)
    return None if output is None else bool(output)


def describe(folder: Path) -> str:
    """Describe the DomainBed in ``folder``: upstream and its commit, modified or not, or the stand-in."""
    if is_stand_in(folder):
        return "the stand-in of domainbed-reasoning's tests, not upstream: for trying things out only"
    commit = commit_of(folder)
    if commit is None:
        return "not a git clone, so its commit is unknown"
    modified = ", modified" if is_modified(folder) else ""
    return (
        f"the pinned upstream commit{modified}"
        if commit == COMMIT
        else f"commit {commit}, not the pinned one{modified}"
    )


def is_stand_in(folder: Path) -> bool:
    """Return whether the DomainBed in ``folder`` is the stand-in of our tests."""
    package = folder / "domainbed" / "__init__.py"
    return package.is_file() and STAND_IN_MARK in read_plain_text(package, errors="replace").splitlines()


# Clones of other users on a shared machine are accepted for reading: nothing that they configure is run.
_GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false")
_ASK_SECONDS = 30
_MAX_EXCLUDE_BYTES = 1 << 20
_PROBE_SECONDS = 30
_CLONE_SECONDS = 600


def _ask_git(*question: str) -> str | None:
    # No environment variables or configuration: the user's filters must not run on untrusted files.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_OPTIONAL_LOCKS": "0"}
    environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_REPLACE_OBJECTS": "1"}
    try:
        asked = subprocess.run(
            [*_GIT, *question],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_ASK_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _git(*command: str, timeout: float, source: str) -> None:
    fix = (
        "If it is unreachable, pass a mirror or an existing clone: `domainbed-reasoning get-domainbed --from "
        "URL|PATH`, or run from inside your own clone. `make demo` and `make test` work without it."
    )
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    shown = _without_password(source)
    try:
        done = subprocess.run([*_GIT, *command], capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"git got no answer from {shown} within {timeout:.0f} s.\n{fix}") from None
    if done.returncode:
        output = done.stderr.strip().replace(source, shown)
        raise RuntimeError(f"git could not get {shown}:\n{_without_password(output)}\n{fix}")


def _without_password(text: str) -> str:
    """Return ``text`` without what stands before the host in a URL: a user's name, a password, a token."""
    return re.sub(r"://[^/@\s]+@", "://", text)
