"""The job key: everything that determines a job's numbers, and nothing else."""

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.jobs import history as resume
from domainbed_reasoning.jobs.history import describe
from domainbed_reasoning.jobs.replay_log import Progress, key_of
from domainbed_reasoning.method.schedule import plan_stages
from domainbed_reasoning.method.task import Task

COMMIT = "b93c22a1cfc3b2428398272c1a116c8de1f4139e"


class Job:
    """A job on two domains of two images each, with a model in a folder and a CLIP in the cache of the hub."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        images = [[f"{domain}/dog/{index}.png" for index in range(2)] for domain in ("art", "photo")]
        for number, name in enumerate(name for names in images for name in names):
            (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / name).write_bytes(bytes(10 + number))
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text("{}")
        (root / "model" / "model.safetensors").write_bytes(bytes(10))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
        self.download(COMMIT)
        (root / "adapter").mkdir()
        (root / "adapter" / "adapter_config.json").write_text("{}")
        (root / "adapter" / "adapter_model.safetensors").write_bytes(bytes(10))
        self.hparams = {"model": str(root / "model"), "clip_model": "some/clip", "lr": 1e-3, "resume": True}
        self.hparams["init_adapter"] = str(root / "adapter")
        self.args = argparse.Namespace(algorithm="RDMLDG", output_dir=str(root / "out"), trial_seed=0, steps=None)
        self.task = Task(
            dataset="Toy",
            class_names=("dog",),
            environments=("art", "photo"),
            test_envs=(1,),
            labels=[[0, 0], [0, 0]],
            images=images,
            chains={(0, 0): "a chain"},
            folder=str(root / "data"),
            schedule=plan_stages([1, 1], 5),
        )

    def download(self, commit):
        """Do what a download from the hub does to its cache."""
        model = self.root / "hub" / "models--some--clip"
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / "main").write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")

    def describe(self):
        return json.loads(json.dumps(describe(self.task, self.task.schedule, self.hparams, self.args)))

    def set_task(self, **changes):
        self.task = dataclasses.replace(self.task, **changes)

    def touch(self, name):
        """Change a file's time alone."""
        stat = os.stat(self.root / name)
        os.utime(self.root / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    def edit(self, package, name):
        """Change a source file of a package, in a copy that stands for the installed one."""
        installed = {
            "domainbed-reasoning": Path(versions.domainbed_reasoning.__file__).parent,
            "DomainBed": versions.upstream.importable_domainbed() / "domainbed",
        }[package]
        copy = shutil.copytree(installed, self.root / "site" / installed.name)
        (copy / name).write_text((copy / name).read_text() + "# another code\n")
        if package == "DomainBed":
            self.monkeypatch.setattr(versions.upstream, "importable_domainbed", lambda: copy.parent)
        else:
            self.monkeypatch.setattr(versions.domainbed_reasoning, "__file__", str(copy / "__init__.py"))
        versions.source_digests.cache_clear()

    def upgrade(self, name):
        """Have another version of a library."""
        installed = resume.installed
        self.monkeypatch.setattr(resume, "installed", lambda library: "99" if library == name else installed(library))


@pytest.fixture
def job(tmp_path, monkeypatch):
    versions.source_digests.cache_clear()
    yield Job(tmp_path, monkeypatch)
    monkeypatch.undo()
    versions.source_digests.cache_clear()


CHANGES = {
    "a hyper-parameter": ("hparams", lambda job: job.hparams.update(lr=2e-3)),
    "an argument": ("args", lambda job: setattr(job.args, "trial_seed", 1)),
    "the folder": ("args", lambda job: setattr(job.args, "output_dir", "elsewhere")),
    "a chain": ("chains", lambda job: job.set_task(chains={(0, 0): "another chain"})),
    "a further chain": ("chains", lambda job: job.set_task(chains={(0, 0): "a chain", (0, 1): "a chain"})),
    "the class names": ("task", lambda job: job.set_task(class_names=("hound",))),
    "the subject": ("task", lambda job: job.set_task(subject="animal")),
    "the schedule": ("task", lambda job: job.set_task(schedule=plan_stages([2, 1], 5))),
    "a label": ("images", lambda job: job.set_task(labels=[[0, 1], [0, 0]])),
    "an image's name": ("images", lambda job: job.set_task(images=[job.task.images[0][:1], job.task.images[1]])),
    "an image's size": ("images", lambda job: (job.root / "data/photo/dog/1.png").write_bytes(bytes(99))),
    "an image's time": ("images", lambda job: job.touch("data/art/dog/0.png")),
    "a target image's time": ("images", lambda job: job.touch("data/photo/dog/0.png")),
    "the model's weights": ("models", lambda job: (job.root / "model/model.safetensors").write_bytes(bytes(11))),
    "the model's time": ("models", lambda job: job.touch("model/config.json")),
    "a file of the model": ("models", lambda job: (job.root / "model/adapter_config.json").write_text("{}")),
    "the adapter to start from": (
        "init_adapter",
        lambda job: (job.root / "adapter/adapter_model.safetensors").write_bytes(bytes(9) + b"1"),
    ),
    "the hub model's commit": ("models", lambda job: job.download("0" * 40)),
    "this package's code": ("code", lambda job: job.edit("domainbed-reasoning", "method/objective.py")),
    "a folder of this package": ("code", lambda job: job.edit("domainbed-reasoning", "mllm/model.py")),
    "the embedded model": ("code", lambda job: job.edit("domainbed-reasoning", "mllm/tiny_model/config.json")),
    "DomainBed's code": ("code", lambda job: job.edit("DomainBed", "lib/misc.py")),
    "torch": ("versions", lambda job: job.upgrade("torch")),
    "transformers": ("versions", lambda job: job.upgrade("transformers")),
    "peft": ("versions", lambda job: job.upgrade("peft")),
    "numpy": ("versions", lambda job: job.upgrade("numpy")),
    "pillow": ("versions", lambda job: job.upgrade("pillow")),
    "the prompts": ("versions", lambda job: job.monkeypatch.setattr(resume, "PROMPT_VERSION", "another")),
    "the device": ("device", lambda job: job.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_job_key_covers_everything_that_determines_results(job, name):
    part, change = CHANGES[name]
    before = job.describe()
    change(job)
    after = job.describe()
    assert key_of(after) != key_of(before)
    assert [key for key in before if before[key] != after[key]] == [part]


def test_the_same_job_has_the_same_key(job):
    """Also in another process, which reads the source files again, after bytecode and hidden files have come."""
    before = key_of(job.describe())
    versions.source_digests.cache_clear()
    job.set_task(chains=dict(reversed(job.task.chains.items())))
    assert key_of(job.describe()) == before


def test_a_wheel_and_the_checkout_that_it_was_built_from_are_the_same_code(job, monkeypatch):
    """Installed, three folders are inside of the package that stand beside it in a checkout."""
    in_checkout = versions.source_digests()["domainbed-reasoning"]
    package = Path(versions.domainbed_reasoning.__file__).parent
    copy = shutil.copytree(package, job.root / "site" / "domainbed_reasoning")
    folders = {}
    for part in ("algorithms", "datasets", "sweeps"):
        spec = versions.importlib.util.find_spec(f"domainbed_reasoning.{part}")
        folders[part] = spec.submodule_search_locations[0]
        shutil.copytree(folders[part], copy / part, dirs_exist_ok=True)
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "losses.cpython-311.pyc").write_bytes(b"bytecode")
    (copy / ".losses.py.swp").write_bytes(b"an editor's")
    monkeypatch.setattr(versions.domainbed_reasoning, "__file__", str(copy / "__init__.py"))
    versions.source_digests.cache_clear()
    assert versions.source_digests()["domainbed-reasoning"] == in_checkout


def test_progress_of_other_code_is_ignored_with_one_message(job, monkeypatch, capsys):
    """As a job finds it that is started again after an upgrade: by the same arguments, with nothing of two codes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.root / "cache"))
    (job.root / "out").mkdir()
    job.set_task(folder="")  # a dataset that draws its images
    first = resume.history_of(job.task, job.task.schedule, job.hparams, job.args)
    first.progress.record_step({"loss": 1.0, "stage": 0.0}, [])
    first.save(1, lambda: {}, now=True)
    first.progress.close()
    again = resume.history_of(job.task, job.task.schedule, job.hparams, job.args)
    assert again.replays and "is not used" not in capsys.readouterr().out
    again.progress.close()
    job.edit("DomainBed", "algorithms.py")
    other = resume.history_of(job.task, job.task.schedule, job.hparams, job.args)
    printed = capsys.readouterr().out
    assert not other.replays
    assert f"{first.progress.folder} is not used, because code changed" in printed
    assert printed.count("Starting from step 0") == 1
    other.progress.close()


def test_records_are_in_order_without_resume(job, monkeypatch):
    """`"resume": false` keeps no progress; earlier records of the same job are set aside all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.root / "cache"))
    (job.root / "out").mkdir()
    record = json.dumps({"step": 0, "args": vars(job.args)}) + "\n"
    (job.root / "out" / "results.jsonl").write_text(record)
    assert resume.history_of(job.task, job.task.schedule, job.hparams | {"resume": False}, job.args) is None
    assert not (job.root / "out" / "results.jsonl").exists()
    assert (job.root / "out" / "results.earlier.jsonl").read_text() == record
    assert not (job.root / "cache").exists()


def test_unmovable_records_abort_the_start_and_release_the_lock(job, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.root / "cache"))
    (job.root / "out" / "results.earlier.jsonl").mkdir(parents=True)
    (job.root / "out" / "results.jsonl").write_text(json.dumps({"step": 0, "args": vars(job.args)}) + "\n")
    with pytest.raises(OSError, match="results.earlier.jsonl"):
        resume.history_of(job.task, job.task.schedule, job.hparams, job.args)
    Progress(job.describe()).close()
