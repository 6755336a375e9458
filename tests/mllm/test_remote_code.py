"""A checkpoint's own Python code runs where the user says so, and never because a job or a folder says so."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from builders import remote_code
from builders.training import build_dataset, write_trained_job
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning import load_job
from domainbed_reasoning.analysis.checkpoints import open_checkpoint
from domainbed_reasoning.analysis.data import data_of_job
from domainbed_reasoning.annotate.local import LocalTeacher
from domainbed_reasoning.annotate.teacher import TeacherError
from domainbed_reasoning.jobs.export import export_adapters, export_merged
from domainbed_reasoning.jobs.trained import read_job
from domainbed_reasoning.mllm import ModelError, findings, load_mllm
from domainbed_reasoning.mllm.loading import image_edge

REFUSED = "Python code of its own.*does not run unless you allow it.*trust_remote_code.*--trust-remote-code"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The checkpoint's folder, and a private folder for copies of its code."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODE_RAN", str(folder / "ran"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(findings, "cache_folder", lambda: folder / "cache")
        patch.syspath_prepend(str(folder / "modules"))
        yield remote_code.build(folder / "own_model")


@pytest.fixture
def ran(own):
    """``ran()``: whether the checkpoint's code has run since the test began."""
    file = own.parent / "ran"
    file.unlink(missing_ok=True)
    return file.exists


@pytest.fixture(scope="module")
def job(own, algorithm_on, minibatches, tmp_path_factory):
    """A job that was trained with the code, and the class scores of its model."""
    algorithm = algorithm_on(str(own), "MTCT", trust_remote_code=True, lr=1e-2, micro_batch=8, max_new_tokens=8)
    algorithm.update(minibatches)
    folder = write_trained_job(algorithm.eval(), tmp_path_factory.mktemp("jobs") / "job")
    images = minibatches[0][0].as_subclass(torch.Tensor)[:2]
    return folder, images, algorithm.mllm.class_scores(images, algorithm.q_cls, algorithm.task.class_names)


def test_code_does_not_run_unless_it_is_allowed(own, ran):
    for ask in (load_mllm, image_edge):
        with pytest.raises(ModelError, match=REFUSED):
            ask(str(own))
    assert not ran()
    mllm = load_mllm(str(own), trust_remote_code=True)
    assert type(mllm.base).__name__ == "OwnForConditionalGeneration" and type(mllm.processor).__name__ == "OwnProcessor"


def test_the_hparam_allows_it_in_training_from_the_datasets_first_look_at_the_model(own):
    dataset, _ = build_dataset("MTCT", model=str(own), trust_remote_code=True)
    assert dataset[0][0][0].shape == (3, 32, 32)
    with pytest.raises(ModelError, match=REFUSED):
        build_dataset("MTCT", model=str(own))


def test_a_job_that_was_trained_with_its_code_needs_the_option_again(job, ran, tmp_path):
    folder, images, expected = job
    assert json.loads((folder / "task.json").read_text())["hparams"]["trust_remote_code"] is True
    names = read_job(folder).class_names
    asks = {
        "predict": lambda **word: load_job(folder, **word).mllm.class_scores(images, read_job(folder).q_cls, names),
        "export": lambda **word: export_adapters(folder, tmp_path / f"adapters{len(word)}", **word),
        "analysis": lambda **word: open_checkpoint(str(folder), **word).load(),
        "its base model": lambda **word: open_checkpoint(str(folder), **word).untrained().load(),
    }
    for ask in asks.values():
        with pytest.raises(ModelError, match=REFUSED + ".*a job that was trained with its code needs the option"):
            ask()
    assert not ran()
    scores = [ask(trust_remote_code=True) for ask in asks.values()][0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)


def test_an_analysis_reads_images_by_the_callers_word(job, ran, tmp_path):
    one = dataclasses.replace(read_job(job[0]), dataset="ShapesReasoning", test_envs=(3,), folder=tmp_path)
    assert one.hparams["trust_remote_code"] is True
    with pytest.raises(ModelError, match=REFUSED):
        data_of_job(one)
    assert not ran()
    allowed = dataclasses.replace(one, trust_remote_code=True)
    assert data_of_job(allowed).task.dataset == "ShapesReasoning"


def test_a_merged_folder_carries_the_code_and_needs_the_option(job, ran, tmp_path):
    folder, images, expected = job
    export_merged(folder, tmp_path / "merged", trust_remote_code=True)
    assert (tmp_path / "merged" / "modeling_own.py").is_file()
    ran.__self__.unlink(missing_ok=True)
    with pytest.raises(ModelError, match=REFUSED):
        load_job(tmp_path / "merged")
    assert not ran()
    mllm = load_job(tmp_path / "merged", trust_remote_code=True).mllm
    scores = mllm.class_scores(images, read_job(folder).q_cls, read_job(folder).class_names)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)


def test_the_verbs_have_the_option(own, job, ran, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    doctor = ["doctor", "--model", str(own)]
    predict = ["predict", "--job", str(job[0]), "--answer", "label", str(tmp_path / "photo.png")]
    for words in (doctor, predict):
        assert cli.main(words) == 1
        said = capsys.readouterr()
        assert "--trust-remote-code" in said.out + said.err and not ran()
    for words in (doctor, predict):
        assert cli.main([*words, "--trust-remote-code"]) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--trust-remote-code"])


def test_a_teacher_with_code_needs_the_option(own, ran):
    with pytest.raises(TeacherError, match=REFUSED):
        LocalTeacher(str(own))
    assert not ran() and LocalTeacher(str(own), trust_remote_code=True).name.startswith("hf:")


def test_a_checkpoint_whose_code_is_no_image_text_model_is_named(own, tmp_path):
    folder = remote_code.build(tmp_path / "other_model")
    remote_code.change(folder / "config.json", auto_map={"AutoConfig": remote_code.AUTO_MAP["AutoConfig"]})
    with pytest.raises(ModelError, match="AutoModelForImageTextToText, which its auto_map lacks"):
        load_mllm(str(folder), trust_remote_code=True)


def test_a_processor_alone_may_have_the_code(own, ran, tmp_path):
    folder = remote_code.build(tmp_path / "plain_model")
    plain = {"model_type": "vipllava", "architectures": ["VipLlavaForConditionalGeneration"], "auto_map": None}
    remote_code.change(folder / "config.json", **plain)
    (folder / "configuration_own.py").unlink()
    (folder / "modeling_own.py").unlink()
    with pytest.raises(ModelError, match=REFUSED):
        load_mllm(str(folder))
    assert type(load_mllm(str(folder), trust_remote_code=True).processor).__name__ == "OwnProcessor"
