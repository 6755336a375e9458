"""The output files of an analysis (table, text and plot), which never overwrite those of another command."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from domainbed_reasoning.files.plain import read_plain_text

_COMMAND = "command: "
_SUFFIXES = (".txt", ".csv", ".png")


@dataclass(frozen=True)
class Results:
    """The files of one analysis.

    Attributes:
        folder: existing folder of the files.
        name: name of all files, without suffix.
        command: the command that writes them.
        as_json: whether the verb prints JSON.
    """

    folder: pathlib.Path
    name: str
    command: str
    as_json: bool = False

    def path(self, suffix: str) -> pathlib.Path:
        """Return the path of the file with that suffix, such as ``.csv`` or ``_answers.csv``."""
        return self.folder / f"{self.name}{suffix}"

    def text(self, summary: str) -> str:
        """Return the content of the text file: the summary, then the command."""
        return f"{summary}\n{_COMMAND}{self.command}\n"


def results_at(folder: pathlib.Path, name: str, command: str) -> Results:
    """Return the files that an analysis writes, after creating the folder.

    Files of the same command are overwritten; if another or an unknown command wrote them, the name gets a number.

    Args:
        folder: folder of the files.
        name: the analysis and its subject.
        command: the command being run.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        results = Results(folder, name if number == 1 else f"{name}-{number}", command)
        taken = [path for path in map(results.path, _SUFFIXES) if path.exists()]
        if not taken or _command_of(results.path(".txt")) == command:
            return results
        number += 1


def _command_of(path: pathlib.Path) -> str | None:
    """Return the command that wrote a text file; None if unknown."""
    lines = read_plain_text(path, errors="replace").splitlines() if path.is_file() else []
    found = lines[-1] if lines else ""
    return found.removeprefix(_COMMAND) if found.startswith(_COMMAND) else None
