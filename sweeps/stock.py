"""DomainBed's own commands, printed so that they can be typed, and run from inside of its folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.sweeps.launchers.processes import ended_by_sigterm

# Of our hparams, those that may be paths.
_PATHS = ("model", "clip_model", "chains")
_EMBEDDED_MODEL = "tiny"


def located(path: str) -> str:
    """Return what is here by its absolute path, as jobs run in DomainBed's folder; a hub id and the rest unchanged."""
    here = Path(path).expanduser()
    return str(here.absolute()) if path not in ("", _EMBEDDED_MODEL) and here.exists() else path


def with_located(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hparams whose paths are absolute."""
    return {
        name: located(value) if name in _PATHS and isinstance(value, str) else value for name, value in hparams.items()
    }


def stock_command(script: str, *arguments: str) -> list[str]:
    """Return the words of a command of DomainBed, as its users type them."""
    return ["python", "-m", f"domainbed.scripts.{script}", *arguments]


def choose_domainbed(stand_in: str = "") -> Path:
    """Return the folder of the DomainBed that this and the stock commands use.

    Args:
        stand_in: folder of the tests' stand-in, for a demonstration where there is no other; "" for none.

    Raises:
        SystemExit: there is none.
    """
    folder = upstream.use_domainbed()
    if folder is None and stand_in:
        print(
            "No DomainBed is here and it could not be fetched: this runs on the stand-in of the tests, a small "
            "implementation of DomainBed's interface. `domainbed-reasoning get-domainbed` fetches the real one.\n"
        )
        os.environ[upstream.VARIABLE] = str(Path(stand_in).absolute())
        folder = upstream.use_domainbed()
    if folder is None:
        raise SystemExit(upstream.MISSING)
    return folder


def run_stock(script: str, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> None:
    """Print and run one stock command from inside of DomainBed's folder.

    Raises:
        SystemExit: it failed.
    """
    run_command(stock_command(script, *arguments), cwd, environment)


def run_command(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
    """Print and run a command that starts with `python`, which means this interpreter.

    Raises:
        SystemExit: it failed.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    with ended_by_sigterm():
        process = subprocess.Popen([sys.executable, *command[1:]], cwd=cwd, env=environment)
        try:
            exit_code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached the sweep too, which ends its jobs
            raise
        except SystemExit:
            process.terminate()
            process.wait()
            raise
    if exit_code:
        raise SystemExit(f"The command above ended with exit code {exit_code}.")
