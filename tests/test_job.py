"""What a process knows of the DomainBed job that it runs."""

import argparse
import importlib.machinery
import sys
import types

import pytest

from domainbed_reasoning.job import TRAIN_SCRIPT, job_arguments

ARGUMENTS = {
    "algorithm": "ERM",
    "dataset": "Debug28",
    "test_envs": [0],
    "steps": 7,
    "output_dir": "out",
    "trial_seed": 0,
    "holdout_fraction": 0.2,
}


@pytest.fixture
def as_main(monkeypatch):
    """Stand in for `__main__` as runpy sets it up for ``python -m``."""

    def install(name, args):
        main = types.ModuleType("__main__")
        main.__spec__ = importlib.machinery.ModuleSpec(name, None)
        main.args = args
        monkeypatch.setitem(sys.modules, "__main__", main)

    return install


def test_the_train_script_is_recognised(as_main):
    as_main(TRAIN_SCRIPT, argparse.Namespace(**ARGUMENTS))
    assert job_arguments().steps == 7


def test_other_scripts_with_arguments_are_not_jobs(as_main):
    as_main("domainbed.scripts.sweep", argparse.Namespace(**ARGUMENTS))
    assert job_arguments() is None


def test_a_train_script_without_these_arguments_is_not_taken_for_one(as_main):
    as_main(TRAIN_SCRIPT, argparse.Namespace(algorithm="ERM"))
    assert job_arguments() is None


def test_a_test_run_is_not_a_job():
    assert job_arguments() is None
