"""Child processes with limited memory and CPU time, for reading untrusted files.

For formats whose libraries set no limits: a small file may request any amount of memory or time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PACKAGES = Path(__file__).parents[2]
_CODE = """\
import sys
sys.path.append(sys.argv[1])
import importlib
importlib.import_module(sys.argv[2]).in_child(*sys.argv[3:])
"""


@contextlib.contextmanager
def child(module: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that calls ``module.in_child(*arguments)``, and kill it when the block ends.

    Args:
        module: of this package; its `in_child` calls `take_output`, and `limit` before it opens the file.
        arguments: of the call.
        environment: more variables.
    """
    command = [sys.executable, "-c", _CODE, str(_PACKAGES), module, *arguments]
    # No network access for Hugging Face libraries, even if a file names a hub id.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables
    )
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        process.wait()


def take_output() -> BinaryIO:
    """Return the pipe to the parent process, and discard whatever libraries print from now on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def limit(memory: int, seconds: int) -> None:
    """Limit this process from now on, where the system supports it.

    Args:
        memory: additional bytes.
        seconds: additional CPU time.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds)
    with contextlib.suppress(OSError):  # Linux only
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)


def _lower(what: int, wanted: int) -> None:
    import resource

    hard = resource.getrlimit(what)[1]
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (wanted, hard))
