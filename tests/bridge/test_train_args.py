"""Finding the arguments of the DomainBed job of this process, however it was started."""

import argparse

import pytest

from builders.processes import as_train_script
from domainbed_reasoning.bridge.train_args import job_arguments, recognized_arguments

ARGUMENTS = {
    "algorithm": "ERM",
    "dataset": "Debug28",
    "test_envs": [0],
    "steps": 7,
    "output_dir": "out",
    "trial_seed": 0,
    "holdout_fraction": 0.2,
}


def namespace(**changes):
    return argparse.Namespace(**ARGUMENTS | changes)


def run(code, name="__main__", **given):
    """Run code as a module of that name, and return what it asks for as ``found``."""
    module = {"__name__": name, "job_arguments": job_arguments, "namespace": namespace, **given}
    exec(code, module)
    return module["found"]


@pytest.mark.parametrize("name", ["__main__", "domainbed.scripts.train_mine", "mine"])
def test_arguments_are_found_in_the_module_that_runs(name):
    assert run("args = namespace()\nfound = job_arguments()", name).steps == 7


def test_arguments_are_found_in_main_whatever_they_are_called():
    code = "def main():\n    opt = namespace(steps=9)\n    return job_arguments()\nfound = main()"
    assert run(code).steps == 9


def test_arguments_of_a_trainer_object_are_found():
    code = """
class Trainer:
    def __init__(self, args):
        self.args = args
    def fit(self):
        return job_arguments()
found = Trainer(namespace()).fit()"""
    assert run(code).steps == 7


def test_the_innermost_arguments_count():
    """A base's copy with another target, handed to a function."""
    code = "args = namespace()\ndef one(own):\n    return job_arguments()\nfound = one(namespace(test_envs=[2]))"
    assert run(code).test_envs == [2]


def test_arguments_of_the_main_module_are_found_by_a_thread(monkeypatch):
    as_train_script(monkeypatch, args=namespace())
    assert job_arguments().steps == 7


def test_a_sweeps_arguments_are_no_jobs(monkeypatch):
    as_train_script(
        monkeypatch, args=argparse.Namespace(algorithms=["ERM"], datasets=["Debug28"], steps=7, output_dir="out")
    )
    assert job_arguments() is None


@pytest.mark.parametrize("lost", ["output_dir", "test_envs", "trial_seed", "holdout_fraction", "steps"])
def test_a_train_script_that_lacks_an_argument_is_refused_naming_it(lost):
    """Its job would train by the default schedule, and leave nothing to resume."""
    args = argparse.Namespace(**{name: value for name, value in ARGUMENTS.items() if name != lost})
    with pytest.raises(ValueError, match=f"arguments of this train script lack {lost}, by DomainBed's names"):
        run("found = job_arguments()", args=args)
    assert run("found = ask()", args=args, ask=recognized_arguments) is None


def test_some_other_namespace_is_not_taken_for_a_train_scripts():
    assert run("found = job_arguments()", args=argparse.Namespace(algorithm="ERM", dataset="Debug28")) is None


def test_a_job_that_is_done_is_not_taken_for_running_by_what_evaluates_it(tmp_path):
    """An evaluation makes the job's arguments from its checkpoint; the job's records are not its to move."""
    code = "args = namespace(output_dir=folder)\nfound = job_arguments()"
    assert run(code, folder=str(tmp_path)) is not None
    (tmp_path / "done").write_text("done")
    assert run(code, folder=str(tmp_path)) is None
    assert run(code, folder=str(tmp_path), __file__="/clone/domainbed/scripts/train.py") is not None


def test_asking_keeps_no_model_alive_in_the_callers_function():
    """Before Python 3.13 a function's frame keeps the dictionary of its variables."""
    import gc
    import weakref

    import torch

    model = torch.nn.Linear(1, 1)
    gone = weakref.ref(model)
    assert job_arguments() is None
    del model
    gc.collect()
    assert gone() is None


def test_a_test_run_is_not_a_job():
    assert job_arguments() is None
