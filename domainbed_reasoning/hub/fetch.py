"""Files of a repository on the Hub: listed at one commit, downloaded by name, checked, resumed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.hub.publish import MARKS, HubError, is_transferred

_MARK = "domainbed-reasoning"  # file that names what is being downloaded
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its name, size in bytes, and SHA-256 where the Hub stores it as a large file."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        repo_id: user or organization, and name.
        repo_type: ``model`` or ``dataset``.
        commit: hash.
        files: that were chosen.
    """

    repo_id: str
    repo_type: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def list_files(repo_id: str, repo_type: str, revision: str | None, wanted: Callable[[str], bool]) -> Remote:
    """Return the files of a repository whose names are ``wanted`` and safe.

    Raises:
        HubError: none is.
        OSError: there is no such repository, or the Hub cannot be reached.
    """
    info: Any = huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
    files = tuple(
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
        if _PLAIN_NAME.fullmatch(file.rfilename) and wanted(file.rfilename)
    )
    if not files:
        raise HubError(f"{repo_id} has no file of the expected kind.")
    return Remote(repo_id, repo_type, str(info.sha), files)


def list_export(repo_id: str, repo_type: str, revision: str | None = None) -> Remote:
    """Return the files of an export that was pushed.

    Raises:
        HubError: the repository holds none.
        OSError: as `list_files`.
    """
    remote = list_files(repo_id, repo_type, revision, lambda name: is_transferred(repo_type, name))
    if not {file.name for file in remote.files} & set(MARKS[repo_type]):
        raise HubError(f"{repo_id} has none of {', '.join(MARKS[repo_type])}, so it is not an export of this package.")
    return remote


def download(remote: Remote, folder: Path) -> None:
    """Download the files into a folder that is new, empty, or holds an interrupted download of the same files.

    Raises:
        HubError: the folder holds something else, or a file is not what the Hub lists.
        OSError: the Hub cannot be reached, or the folder cannot be written.
    """
    state = folder / ".cache" / "huggingface"  # of huggingface_hub; in a home folder, its cache for everything
    mark, ours = state / _MARK, f"{remote.repo_id}@{remote.commit}"
    if folder.is_dir() and any(folder.iterdir()) and not (mark.is_file() and read_plain_text(mark) == ours):
        raise HubError(f"{folder} is not empty. Choose another --output, or remove the folder.")
    state.mkdir(parents=True, exist_ok=True)
    replace_text(mark, ours)
    for file in remote.files:
        path = Path(
            huggingface_hub.hf_hub_download(
                remote.repo_id, file.name, repo_type=remote.repo_type, revision=remote.commit, local_dir=folder
            )
        )
        check(path, file)
    shutil.rmtree(folder / ".cache")


def download_to_cache(remote: Remote, file: RemoteFile) -> Path:
    """Download one file into the Hub's cache folder, or find it there, and return its path.

    Raises:
        HubError: it is not what the Hub lists.
        OSError: the Hub cannot be reached.
    """
    path = huggingface_hub.hf_hub_download(
        remote.repo_id, file.name, repo_type=remote.repo_type, revision=remote.commit
    )
    check(Path(path), file)
    return Path(path)


def check(path: Path, file: RemoteFile) -> None:
    """Refuse a downloaded file that has another size or digest than the Hub lists.

    Raises:
        HubError: it has; it has been removed.
    """
    right = path.stat().st_size == file.size
    if right and file.sha256 is not None:
        with path.open("rb") as opened:
            right = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    if not right:
        path.resolve().unlink()  # in the Hub's cache, `path` is a link to it
        path.unlink(missing_ok=True)
        raise HubError(f"{file.name} differs from what the Hub lists. Rerun the command to download it again.")
