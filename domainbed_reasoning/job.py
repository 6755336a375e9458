"""The DomainBed job that runs in this process: what its command line says and its objects are not told.

The stock train script passes an algorithm its hyper-parameters and a dataset its target environments as well, but
neither the number of steps (``--steps`` replaces the dataset's), nor the seed of the in/out splits, nor the folder that
it writes to. Stages need the first, and the records beside `results.jsonl` the others. The script keeps all of them in
a global of `__main__`.
"""

from __future__ import annotations

import argparse
import re
import sys

TRAIN_SCRIPT = "domainbed.scripts.train"
NAME_OF_JOB = re.compile("[0-9a-f]{32}")  # the sweep names a job's folder by the MD5 of its arguments
_NEEDED = ("algorithm", "dataset", "test_envs", "steps", "output_dir", "trial_seed", "holdout_fraction")


def job_arguments() -> argparse.Namespace | None:
    """Return the arguments of the train script that runs in this process; None where none does (a test, a notebook)."""
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) != TRAIN_SCRIPT:
        return None
    args = getattr(main, "args", None)
    if isinstance(args, argparse.Namespace) and all(hasattr(args, name) for name in _NEEDED):
        return args
    return None
