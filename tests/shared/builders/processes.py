"""Child processes: their environment, verbs and scripts as processes, waiting, git, a browser."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
VERB = "import sys; from domainbed_reasoning.__main__ import main; sys.exit(main(sys.argv[1:]))"
TRAIN_SCRIPT = "domainbed.scripts.train"


def environment(*folders: object, **variables: str) -> dict[str, str]:
    """Return the variables of a process that imports from ``folders`` first, then from this checkout."""
    path = [*map(str, folders), str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **variables}


def run_python(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> Any:
    """Run this interpreter to its end in `environment()` or ``env``, and return its exit code and output."""
    command = [sys.executable, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 3600, **options}
    return subprocess.run(command, env=env or environment(), **options)


def start_verb(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Start ``domainbed-reasoning …`` as a process."""
    command, pipe = [sys.executable, "-c", VERB, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(**variables))


def wait_until(condition: Callable[[], Any], seconds: float = 1800) -> None:
    """Return once the condition is true; a missing file counts as not yet."""
    for _ in range(int(20 * seconds)):
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not true after {seconds:.0f} seconds")


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def git(folder: Path, *command: str) -> None:
    """Run git in a folder, as somebody who has a name."""
    author = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    subprocess.run(["git", "-C", str(folder), *author, *command], check=True, capture_output=True)


def browser() -> str:
    """Return the path of a Chromium; skips the test where none is installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


def as_train_script(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Make `__main__` of this process look like the stock train script with these variables."""
    main = types.ModuleType("__main__")
    main.__spec__ = importlib.machinery.ModuleSpec(TRAIN_SCRIPT, None)
    vars(main).update(variables)
    monkeypatch.setitem(sys.modules, "__main__", main)
