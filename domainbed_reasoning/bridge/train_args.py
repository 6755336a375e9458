"""The DomainBed job of this process: command-line arguments that DomainBed does not pass to its objects.

The train script passes an algorithm its hyper-parameters and a dataset its target environments as well, but neither the
number of steps (``--steps`` replaces the dataset's), nor the seed of the in/out splits, nor the folder that it writes
to. Stages need the first, and the records beside `results.jsonl` the others. The script keeps all of them in an
`argparse.Namespace`, which is looked for in the functions and modules that are being executed: however the script was
started, whatever it is called, and whether it has a ``main``.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TRAIN_SCRIPT = "domainbed.scripts.train"
NAME_OF_JOB = re.compile("[0-9a-f]{32}")  # the sweep names a job's folder by the MD5 of its arguments
DEFAULT_HOLDOUT = 0.2  # DomainBed's default
_NEEDED = ("algorithm", "dataset", "test_envs", "steps", "output_dir", "trial_seed", "holdout_fraction")
_OF_TRAINING = ("steps", "trial_seed", "holdout_fraction", "checkpoint_freq", "hparams_seed")
_OURS = "domainbed_reasoning"


def job_arguments() -> argparse.Namespace | None:
    """Return the arguments of the train script in this process; None outside of one (a test, a notebook).

    Raises:
        ValueError: a script's arguments name an algorithm and a dataset to train, but lack what a job needs.
    """
    args, missing = _search()
    if missing:
        raise ValueError(
            f"The arguments of this train script lack {', '.join(missing)}, by DomainBed's names. Without them steps, "
            f"splits and the folder of the results are unknown: add them to its argparse.Namespace, or run `python -m "
            f"{TRAIN_SCRIPT}`."
        )
    return args


def recognized_arguments() -> argparse.Namespace | None:
    """Return what `job_arguments` does, or None where it would raise; used for stock algorithms, too."""
    return _search()[0]


def values_of_callers() -> Iterator[list[Any]]:
    """Yield the variables of callers outside of this package, innermost first.

    Of each: the values of its local variables, of its ``self``'s attributes, and of its module's globals.
    """
    for _, values in _callers():
        yield values


def _search() -> tuple[argparse.Namespace | None, list[str]]:
    """Return the innermost arguments of a job, or else what the innermost incomplete ones lack."""
    missing: list[str] = []
    for module, values in _callers():
        for value in values:
            if not isinstance(value, argparse.Namespace | types.SimpleNamespace):
                continue
            lacking = [name for name in _NEEDED if not hasattr(value, name)]
            if not lacking and not _is_past(module, value):
                return value if isinstance(value, argparse.Namespace) else argparse.Namespace(**vars(value)), []
            if {"algorithm", "dataset"}.isdisjoint(lacking) and any(hasattr(value, name) for name in _OF_TRAINING):
                missing = missing or lacking
    return None, missing


def _is_past(module: Mapping[str, Any], args: Any) -> bool:
    """Return whether arguments belong to a finished job that another script than DomainBed's reads."""
    spec, file = module.get("__spec__"), str(module.get("__file__", ""))
    stock = getattr(spec, "name", None) == TRAIN_SCRIPT or Path(file).parts[-3:] == ("domainbed", "scripts", "train.py")
    return not stock and Path(str(args.output_dir), "done").is_file()


def _callers() -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
    """Yield the globals and variables of each caller outside of this package; those of `__main__` last."""
    frame: types.FrameType | None = sys._getframe(1)
    seen = set()
    while frame is not None:
        module = frame.f_globals
        if str(module.get("__name__", "")).partition(".")[0] != _OURS:
            values = _locals(frame)
            if id(module) not in seen:
                seen.add(id(module))
                values += module.values()
            yield module, values
        frame = frame.f_back
    main = vars(sys.modules["__main__"])
    if id(main) not in seen:
        yield main, list(main.values())


def _locals(frame: types.FrameType) -> list[Any]:
    variables = frame.f_locals
    if variables is frame.f_globals:
        return []
    values = list(variables.values())
    if "self" in variables:
        values += getattr(variables["self"], "__dict__", {}).values()
    # Before Python 3.13 a function's dictionary stays with its frame. A model in it would outlive its last use there.
    torch = sys.modules.get("torch")
    if sys.version_info < (3, 13) and torch is not None and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        for name in [name for name, value in variables.items() if isinstance(value, torch.nn.Module)]:
            del variables[name]
    return values
