"""DomainBed's own commands, printed and run in its folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.registry import EMBEDDED_MODELS
from domainbed_reasoning.sweeps.launchers.processes import ended_by_sigterm

# Of our hparams, those that may be paths.
_PATHS = ("model", "clip_model", "chains", "init_adapter")


def located(path: str) -> str:
    """Return an existing path as an absolute one, as jobs run in DomainBed's folder; hub ids are unchanged."""
    here = Path(path).expanduser()
    return str(here.absolute()) if path not in ("", *EMBEDDED_MODELS.values()) and here.exists() else path


def with_located(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hparams with absolute paths."""
    return {
        name: located(value) if name in _PATHS and isinstance(value, str) else value for name, value in hparams.items()
    }


def stock_command(script: str, *arguments: str) -> list[str]:
    """Return a command of DomainBed as a list of words."""
    return ["python", "-m", f"domainbed.scripts.{script}", *arguments]


def choose_domainbed(stand_in: str = "") -> Path:
    """Return the folder of the DomainBed that this and the stock commands use.

    Args:
        stand_in: folder of the tests' stand-in, used if DomainBed is missing; "" for none.

    Raises:
        SystemExit: DomainBed was not found.
    """
    folder = upstream.use_domainbed()
    if folder is None and stand_in:
        print(
            "DomainBed was not found and could not be downloaded. Using the tests' stand-in, a small implementation of "
            "its interface; run `domainbed-reasoning get-domainbed` to download DomainBed.\n"
        )
        os.environ[upstream.VARIABLE] = str(Path(stand_in).absolute())
        folder = upstream.use_domainbed()
    if folder is None:
        raise SystemExit(upstream.MISSING)
    return folder


def run_stock(script: str, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> None:
    """Print and run one stock command in DomainBed's folder.

    Raises:
        SystemExit: the command failed.
    """
    run_command(stock_command(script, *arguments), cwd, environment)


def run_command(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
    """Print and run a command that starts with `python`, which means this interpreter.

    Raises:
        SystemExit: the command failed.
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
        raise SystemExit(f"The command above failed with exit code {exit_code}.")
