"""Untrusted trained models: loaded, or rejected with file and fix; none of their code runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.files import HPARAMS, TASK, torch_bytes, write_job
from domainbed_reasoning.jobs.trained import JobError, read_job
from domainbed_reasoning.mllm import LoraSettings, load_mllm


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="session")
def adapters() -> dict[str, torch.Tensor]:
    mllm = load_mllm("tiny", lora=LoraSettings(2, 4))
    return {name: weight.detach().clone() for name, weight in mllm.adapters().items()}


def test_a_file_of_the_job_in_place_of_its_folder_is_named(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "job", TASK, {"model_dict": {}})
    with pytest.raises(JobError, match=r"model.pkl is a file. Pass the job's folder"):
        read_job(folder / "model.pkl")


def test_valid_job_loads(tmp_path: Path, adapters: dict[str, torch.Tensor]) -> None:
    job = read_job(write_job(tmp_path / "job", TASK, {"model_dict": adapters}))
    assert job.load().adapters().keys() == adapters.keys()


def test_names_that_training_accepts_are_read(tmp_path: Path, adapters: dict[str, torch.Tensor]) -> None:
    """Joiners of Persian and Indic scripts and hard blanks are no control characters; so many tiles and votes train."""
    task = TASK | {
        "class_names": ["کتاب\u200cخانه", "क्\u200dष"],
        "environments": ["hard\u00a0blank", "wide\u3000blank", "\U0001f469\u200d\U0001f52c", "c"],
        "hparams": HPARAMS | {"max_tiles": 100, "votes": 2000, "lora_dropout": 0.9995},
    }
    job = read_job(write_job(tmp_path / "job", task, {"model_dict": adapters}))
    assert job.class_names == tuple(task["class_names"]) or list(job.class_names) == task["class_names"]


TASKS: dict[str, tuple[Any, str]] = {
    "a list": ([TASK], "expected a JSON object"),
    "nothing in it": ({}, "'algorithm' is missing"),
    "nested without end": (b"[" * 100_000, "damaged .*nested"),
    "not UTF-8": (b"\xff\xfe{}", "damaged"),
    "a key twice": (b'{"algorithm": "a", "algorithm": "b"}', "duplicate key"),
    "hparams as list": (TASK | {"hparams": []}, "'hparams' cannot be"),
    "no model": (TASK | {"hparams": {k: v for k, v in HPARAMS.items() if k != "model"}}, "trains no multimodal LLM"),
    "no dtype": (TASK | {"hparams": {k: v for k, v in HPARAMS.items() if k != "dtype"}}, "'dtype' is missing"),
    "model as list": (TASK | {"hparams": HPARAMS | {"model": ["tiny"]}}, "'model' cannot be"),
    "a batch of 0": (TASK | {"hparams": HPARAMS | {"eval_batch": 0}}, "'eval_batch' cannot be"),
    "10**12 new tokens": (TASK | {"hparams": HPARAMS | {"max_new_tokens": 10**12}}, "'max_new_tokens' cannot be"),
    "10**9 votes": (TASK | {"hparams": HPARAMS | {"votes": 10**9}}, "'votes' cannot be"),
    "10**9 tiles": (TASK | {"hparams": HPARAMS | {"max_tiles": 10**9}}, "'max_tiles' cannot be"),
    "unknown tiling": (TASK | {"hparams": HPARAMS | {"tiling": "round"}}, "'tiling' cannot be"),
    "a rank of 10**9": (TASK | {"hparams": HPARAMS | {"lora_rank": 10**9}}, "'lora_rank' cannot be"),
    "another rank": (
        TASK | {"hparams": HPARAMS | {"lora_rank": 60_000}},
        "has rank 2, but task.json has lora_rank 60000",
    ),
    "a dropout of 2": (TASK | {"hparams": HPARAMS | {"lora_dropout": 2}}, "'lora_dropout' cannot be"),
    "no class": (TASK | {"class_names": []}, "'class_names' cannot be"),
    "a class as number": (TASK | {"class_names": ["dog", 3]}, "'class_names' cannot be"),
    "two classes of one name": (TASK | {"class_names": ["dog", "Dog"]}, "two classes have the name"),
    "a class name of a tag": (TASK | {"class_names": ["dog", "</CONCLUSION>"]}, "a stage tag"),
    "escape sequences": (TASK | {"subject": "\x1b[2J"}, "'subject' cannot be"),
    "test_envs as text": (TASK | {"test_envs": "12"}, "'test_envs' cannot be"),
    "another prompt version": (TASK | {"prompt_version": "999"}, "Use domainbed-reasoning 0.1.0"),
    "offered classes as text": (TASK | {"offered": "dog"}, "'offered' cannot be"),
    "offered classes of one environment": (TASK | {"offered": [["dog"]]}, "'offered' is of 1 environments, not 2"),
    "an offered class of another dataset": (
        TASK | {"offered": [["dog"], ["zebra"]]},
        "'offered' contains 'zebra', which is not a class",
    ),
    "prompt version as object": (TASK | {"prompt_version": {"a": 1}}, "'prompt_version' cannot be"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_hostile_task_is_refused(tmp_path: Path, name: str, adapters: dict[str, torch.Tensor]) -> None:
    task, failure = TASKS[name]
    with pytest.raises(JobError, match=f"(?s)job.*{failure}") as error:
        read_job(write_job(tmp_path / "job", task, {"model_dict": adapters}))
    assert len(str(error.value)) < 700


def packed(data: bytes) -> bytes:
    """The same archive, its parts deflated."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


NAME = "base_model.model.model.layers.0.lora_A.default.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a list": (lambda _: [1], "contains no 'model_dict'"),
    "no tensors": (lambda _: {"args": {}}, "contains no 'model_dict'"),
    "tensors as list": (lambda _: {"model_dict": [torch.ones(2, 2)]}, "contains no 'model_dict'"),
    "numbers for tensors": (lambda _: {"model_dict": {NAME: 3}}, "is not a floating-point matrix"),
    "keys that are numbers": (lambda _: {"model_dict": {3: torch.ones(2)}}, "is not a floating-point matrix"),
    "a tensor of integers": (
        lambda _: {"model_dict": {NAME: torch.ones(2, 2, dtype=torch.long)}},
        "not a floating-point matrix",
    ),
    "a scalar": (lambda _: {"model_dict": {NAME: torch.ones(())}}, "is not a floating-point matrix"),
    "10**12 rows of one number": (
        lambda _: {"model_dict": {NAME: torch.ones(1, 1).expand(10**12, 1)}},
        "larger than its storage",
    ),
    "NaN": (lambda _: {"model_dict": {NAME: torch.full((2, 3), float("nan"))}}, "contains NaN or infinity"),
    "stride 0": (lambda _: {"model_dict": {NAME: torch.ones(2, 1).expand(2, 1 << 35)}}, "larger than its storage"),
    "windows that overlap": (
        lambda _: {"model_dict": {NAME: torch.ones(9).as_strided((2, 4), (1, 1))}},
        "repeated elements",
    ),
    "code": (lambda path: {"model_dict": {NAME: Evil(path)}}, "contains more than tensors"),
    "code beside the tensors": (lambda path: {"model_dict": {}, "args": Evil(path)}, "contains more than tensors"),
    "code in the old format": (
        lambda path: torch_bytes({"model_dict": Evil(path)}, _use_new_zipfile_serialization=False),
        "not an archive of torch.save",
    ),
    "a plain pickle of code": (lambda path: pickle.dumps(Evil(path)), "cannot be read"),
    "a bytearray of a terabyte": (lambda _: pickle.dumps((bytearray, 1)), "contains no 'model_dict'|cannot be read"),
    "packed": (lambda _: packed(torch_bytes({"model_dict": {NAME: torch.zeros(2, 1 << 20)}})), "is compressed"),
    "nothing": (lambda _: b"", "cannot be read"),
    "text": (lambda _: b"not found", "cannot be read"),
    "half an archive": (lambda _: torch_bytes({"model_dict": {NAME: torch.ones(2, 999)}})[:3000], "cannot be read"),
    "zeros": (lambda _: bytes(5000), "cannot be read"),
    "opcodes of nonsense": (lambda _: b"\x80\x02" + bytes(range(256)), "cannot be read"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    make, failure = CHECKPOINTS[name]
    trap = tmp_path / "owned"
    with pytest.raises(JobError, match=f"(?s)job.*({failure})") as error:
        read_job(write_job(tmp_path / "job", TASK, make(trap)))
    assert not trap.exists() and len(str(error.value)) < 800


def test_damaged_checkpoint_is_rejected_or_loads_the_same_values(
    tmp_path: Path, adapters: dict[str, torch.Tensor]
) -> None:
    """A byte is changed in 60 places of the file."""
    whole = torch_bytes({"model_dict": adapters})
    for place in range(0, len(whole), len(whole) // 60):
        data = bytearray(whole)
        data[place] ^= 0x41
        try:
            job = read_job(write_job(tmp_path / "job", TASK, bytes(data)))
        except JobError:
            continue
        assert all(isinstance(value, torch.Tensor) for value in job.adapters.values())


@pytest.mark.parametrize("data", [b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}", bytes(100)])
def test_a_hostile_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TASK))
    (folder / "adapter_model.safetensors").write_bytes(data)
    if data.startswith(b"\x02"):  # a sound file without tensors: a job that trained nothing
        assert read_job(folder).adapters == {}
        return
    with pytest.raises(JobError, match="adapter_model.safetensors cannot be read"):
        read_job(folder)


@pytest.mark.parametrize("kind", ["no config", "nonsense", "its own code", "weights as a pickle", "half the weights"])
def test_a_hostile_merged_model_is_refused_and_runs_nothing(tmp_path: Path, kind: str, verb: Any) -> None:
    import shutil

    from domainbed_reasoning.mllm.loading import TINY

    folder, trap = tmp_path / "job", tmp_path / "owned"
    shutil.copytree(TINY, folder)
    (folder / "task.json").write_text(json.dumps(TASK | {"hparams": HPARAMS | {"model": "x"}}))
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").write_text("{}")
    elif kind == "nonsense":
        (folder / "config.json").write_text(json.dumps(config | {"text_config": 7}))
    elif kind == "its own code":
        (folder / "own.py").write_text(f"import os; os.mkdir({str(trap)!r})")
        own = {"auto_map": {"AutoConfig": "own.A", "AutoModelForImageTextToText": "own.B"}, "model_type": "own"}
        (folder / "config.json").write_text(json.dumps(config | own))
    elif kind == "weights as a pickle":
        weights.unlink()
        torch.save({"lm_head.weight": Evil(trap)}, folder / "pytorch_model.bin")
    else:
        weights.write_bytes(weights.read_bytes()[:5000])
    image = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (9, 9)).save(image)
    code, out, err = verb("predict", "--job", folder, image)
    assert code == 1 and err and out == "" and "Traceback" not in err
    assert not trap.exists()
