"""`export --job` and `predict` on incomplete job folders: an answer, or a one-line error."""

import json
import shutil

import pytest
import torch
from PIL import Image

from builders.files import link_to, make_folder, write
from builders.training import write_trained_job
from domainbed_reasoning import __main__ as cli


@pytest.fixture(scope="session")
def whole(folder_of, algorithm_on, tmp_path_factory):
    """A job as DomainBed's train script leaves it, with adapters as they begin."""
    algorithm = algorithm_on(folder_of("SmolVLM"), "MTCT", micro_batch=8, max_new_tokens=12)
    folder = write_trained_job(algorithm, tmp_path_factory.mktemp("odd") / "job")
    answers = {"env2": {"out": {"n": 3, "label": 0.5, "chain": None, "unparsed": None}}}
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


ODD = {
    "gone": lambda path: path.unlink(missing_ok=True), "folder": make_folder, "empty": write(b""),
    "{}": write(b"{}"),
    "[]": write(b"[]"), "null": write(b"null"), "number": write(b"5"), "NaN": write(b'{"env2": NaN, "step": NaN}'),
    "text": write(b"no JSON"), "no UTF-8": write(b"\xff\xfe{}"), "NULs": write(b"\0" * 99),
    "deep": write(b"[" * 99_999),
    "dangling": link_to("nowhere"), "circle": link_to("task.json"), "digits": write(b"1" * 9999),
    "lists": write(b'{"env2": [1], "env2_in_acc": [1], "environment": {"out": 3}, "step": "x"}'),
    "zip": write(b"PK\x03\x04" + b"\0" * 50), "half a pair": write(b'{"env2": {"out": {"label": "\\ud800"}}}'),
}  # fmt: skip
FILES = ("task.json", "results.jsonl", "answers.json", "model.pkl")
TASK = ("algorithm", "dataset", "class_names", "environments", "test_envs", "hparams", "prompt_version", "subject")
HPARAMS = ("model", "answer", "eval_batch", "lora_rank", "lora_alpha", "lora_targets", "votes", "dtype", "lr")
VALUES = (None, True, "", "x", "\x1b[31m\u202e", [], [1], {}, {"a": [1]}, -1, 1.5, float("nan"), 10**399, ["a", "a"])
PICKLES = {
    "list": [], "none": None, "no adapters": {"model_dict": {}}, "listed": {"model_dict": [1]},
    "number as a name": {"model_dict": {1: torch.zeros(8, 8)}}, "no tensor": {"model_dict": {"a": 1}},
    "stranger": {"model_dict": {"a.lora_A.default.weight": torch.zeros(8, 8)}},
    "bytes as a name": {"model_dict": {b"x": torch.zeros(8, 8)}},
    "integers": {"model_dict": {"a": torch.zeros(8, 8).int()}},
}  # fmt: skip


@pytest.fixture
def odd(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "odd")


def printed(capsys, *arguments):
    """Run a verb; return its exit code and what it says, which is a line where it fails."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("Loading weights")]
    assert "\x1b" not in out + err and "Traceback" not in err
    assert code == 0 or (len(lines) == 1 and len(lines[0]) < 1000), err
    return code, err


def both(capsys, folder, tmp_path):
    """Run both verbs; a failed export leaves nothing that the next would find in its way."""
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40)).save(image)
    output = tmp_path / "exported"
    shutil.rmtree(output, ignore_errors=True)
    code, err = printed(capsys, "export", "--job", folder, "--output", output)
    assert code == 0 or not output.exists() or not list(output.iterdir())
    predicted, _ = printed(capsys, "predict", "--job", folder, "--answer", "label", image)
    return code, predicted, err


def test_the_whole_job_is_exported_and_predicts(odd, capsys, tmp_path):
    assert both(capsys, odd, tmp_path)[:2] == (0, 0)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ODD)
def test_invalid_files(odd, file, kind, capsys, tmp_path):
    ODD[kind](odd / file)
    exported, predicted, err = both(capsys, odd, tmp_path)
    if file in ("task.json", "model.pkl"):
        assert (exported, predicted) == (1, 1) and str(odd) in err
    else:  # what `predict` does not ask for
        assert predicted == 0


@pytest.mark.parametrize("name", [*TASK, *(f"hparams.{name}" for name in HPARAMS)])
def test_invalid_task_values(odd, name, capsys, tmp_path):
    task = json.loads((odd / "task.json").read_text())
    for value in VALUES:
        changed = json.loads(json.dumps(task))
        where = changed["hparams"] if "." in name else changed
        where[name.rpartition(".")[2]] = value
        (odd / "task.json").write_text(json.dumps(changed))
        output = tmp_path / "exported"
        shutil.rmtree(output, ignore_errors=True)
        printed(capsys, "export", "--job", odd, "--output", output)


@pytest.mark.parametrize("name", PICKLES)
def test_invalid_checkpoints(odd, name, capsys, tmp_path):
    torch.save(PICKLES[name], odd / "model.pkl")
    exported, _, err = both(capsys, odd, tmp_path)
    assert exported == 1 and err


@pytest.mark.parametrize("file", ["config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "empty", "{}", "[]", "text", "no UTF-8", "deep", "zip", "dangling"])
def test_invalid_export_files(odd, file, kind, capsys, tmp_path):
    ODD[kind](odd / file)
    both(capsys, odd, tmp_path)


def test_missing_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("nowhere", "file", "circle", "a\nb\x1b[31m", "x" * 300):
        assert both(capsys, tmp_path / name, tmp_path)[:2] == (1, 1)


def test_no_export_carries_the_folder_of_its_base_model(whole, capsys, tmp_path):
    """Its own name instead, said once; another where one is asked for; the hub's where the folder says it."""
    model = json.loads((whole / "task.json").read_text())["hparams"]["model"]
    for more, name in (([], "SmolVLM"), (["--base-model-id", "org/name"], "org/name")):
        output = tmp_path / f"out{len(more)}"
        assert cli.main(["export", "--job", str(whole), "--output", str(output), *more]) == 0
        assert capsys.readouterr().out.count(f"The base model is recorded as {name!r}") == (0 if more else 1)
        config = json.loads((output / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name and config["peft_type"] == "LORA"
        card = (output / "README.md").read_text()
        assert model not in card and ("base_model: org/name" in card) == bool(more)


@pytest.mark.parametrize(
    ("folder", "config", "name"),
    [
        ("my-model", "{}", "my-model"),
        ("my-model", '{"_name_or_path": "OpenGVLab/InternVL3-8B-hf"}', "OpenGVLab/InternVL3-8B-hf"),
        ("my-model", '{"_name_or_path": "/home/me/model"}', "my-model"),
        ("my-model", '{"_name_or_path": "../model"}', "my-model"),
        ("my-model", "[]", "my-model"),
        ("models--org--a.b-c/snapshots/0123", "{}", "org/a.b-c"),
    ],
)
def test_a_folder_is_known_by_its_hub_id_or_its_own_name(tmp_path, folder, config, name):
    from domainbed_reasoning.jobs.export import public_name

    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(config)
    assert public_name(str(tmp_path / folder)) == name
    assert public_name("OpenGVLab/InternVL3-8B-hf") == "OpenGVLab/InternVL3-8B-hf" and public_name("tiny") == "tiny"
