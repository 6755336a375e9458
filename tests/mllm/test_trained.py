"""Loading a trained job: DomainBed's checkpoint, plain PEFT, plain transformers, and `predict`."""

import dataclasses
import json
import pathlib
import re
import shutil

import peft
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.chat import chat_inputs
from builders.training import write_trained_job
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.jobs.export import export_adapters, export_merged
from domainbed_reasoning.jobs.model_card import public_settings
from domainbed_reasoning.jobs.predict import Predictor, load_job
from domainbed_reasoning.jobs.trained import JobError, read_job
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.pixels import from_picture


@pytest.fixture(scope="session")
def trained(family_folder, algorithm_on, minibatches):
    """Two steps of MTCT with a learning rate that moves every answer."""
    algorithm = algorithm_on(family_folder, "MTCT", lr=2e-2, lr_schedule="constant", micro_batch=8, max_new_tokens=12)
    for _ in range(2):
        algorithm.update(minibatches)
    return algorithm.eval()


@pytest.fixture(scope="session")
def job(trained, family_folder, tmp_path_factory) -> pathlib.Path:
    return write_trained_job(trained, tmp_path_factory.mktemp("jobs") / "job")


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> list[str]:
    """Three PNG files of unequal sizes."""
    folder, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(3)
    names = []
    for index, (height, width) in enumerate([(40, 40), (50, 30), (33, 61)]):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        names.append(str(folder / f"{index}.png"))
        Image.fromarray(pixels.numpy()).save(names[-1])
    return names


def logits(network, folder, images):
    """Return the logits of a plain forward of one question about one image."""
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    inputs = chat_inputs(processor, picture, "What is it?")
    inputs.pop("num_patches", None)
    with torch.no_grad():
        return network.eval()(**inputs).logits


def test_a_killed_job_reloads_to_equal_answers(trained, job, family_folder, algorithm_on, minibatches):
    """A new process: fresh adapters, DomainBed's checkpoint, the same scores to the last bit."""
    checkpoint = torch.load(job / "model.pkl", weights_only=True)
    fresh = algorithm_on(family_folder, "MTCT", max_new_tokens=12).eval()
    images = minibatches[0][0]
    untrained = fresh.mllm.class_scores(images, fresh.q_cls, fresh.task.class_names)
    fresh.load_state_dict(checkpoint["model_dict"])
    expected = trained.mllm.class_scores(images, trained.q_cls, trained.task.class_names)
    again = fresh.mllm.class_scores(images, fresh.q_cls, fresh.task.class_names)
    assert torch.equal(again, expected)
    assert (untrained - expected).abs().max() > 0.1


def test_exported_adapters_loaded_in_plain_peft_give_equal_logits(trained, job, family_folder, images, tmp_path):
    export_adapters(job, tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(family_folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = logits(trained.mllm.network, family_folder, images)
    torch.testing.assert_close(logits(loaded, family_folder, images), expected, rtol=0, atol=0)
    bare = AutoModelForImageTextToText.from_pretrained(family_folder, dtype=torch.float32)
    assert (logits(bare, family_folder, images) - expected).abs().max() > 1e-2


def test_a_merged_export_gives_close_logits_and_keeps_its_processor(trained, job, family_folder, images, tmp_path):
    export_merged(job, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(trained.mllm.network, family_folder, images)
    torch.testing.assert_close(logits(merged, tmp_path / "merged", images), expected, rtol=1e-3, atol=1e-2)


def test_predict_equals_the_algorithm_on_files(trained, job, files):
    edge = from_picture(trained.mllm.image_size)
    pixels = torch.stack([edge(Image.open(name).convert("RGB")) for name in files])
    names = trained.task.class_names
    scores = trained.mllm.class_scores(pixels, trained.q_cls, names).softmax(1)
    by_label = Predictor(job, "label")(files)
    for row, prediction in enumerate(by_label):
        assert prediction.image == files[row] and prediction.chain is None
        assert prediction.class_name == names[int(scores[row].argmax())] == prediction.label_class
        torch.testing.assert_close(
            torch.tensor([prediction.scores[name] for name in names]), scores[row], rtol=1e-3, atol=1e-4
        )
    one = Predictor(job, "label")
    for image in (files[0], pathlib.Path(files[0]), Image.open(files[0])):
        alone = one(image)
        assert alone.scores == pytest.approx(by_label[0].scores, abs=2e-6)  # convolutions differ by the batch's size
        assert dataclasses.replace(alone, image=files[0], scores=by_label[0].scores) == by_label[0]
    both = Predictor(job, "both")(files)
    chains = trained.mllm.generate(pixels, trained.q_reason, 12)
    assert [prediction.chain for prediction in both] == chains
    assert [prediction.label_class for prediction in both] == [prediction.class_name for prediction in by_label]


def test_a_job_that_votes_predicts_by_vote(folder_of, algorithm_on, files, tmp_path, monkeypatch):
    """As the algorithm's own answers: three chains an image at the votes' temperature, the same for the same images."""
    algorithm = algorithm_on(folder_of("SmolVLM"), "MLLMZeroShot", max_new_tokens=12, votes=3, vote_temperature=0.9)
    folder = write_trained_job(algorithm, tmp_path / "job")
    predictor = Predictor(folder)
    assert predictor(files) == predictor(files)
    asked = []

    def generate(self, images, question, max_new_tokens, *sampling):
        asked.append(sampling)
        answer = "axe" if len(asked) % 3 == 1 else "dog house"
        return [f"<CONCLUSION>{answer}</CONCLUSION>"] * len(images)

    monkeypatch.setattr(type(algorithm.mllm), "generate", generate)
    assert [prediction.class_name for prediction in predictor(files)] == ["dog house"] * 3
    edge = from_picture(algorithm.mllm.image_size)
    pixels = torch.stack([edge(Image.open(name).convert("RGB")) for name in files])
    assert algorithm.predict(pixels).argmax(1).tolist() == [algorithm.task.class_names.index("dog house")] * 3
    assert asked == [(0.9,)] * 6


def test_exported_folders_predict_as_the_job(job, files, tmp_path):
    export_adapters(job, tmp_path / "adapter")
    export_merged(job, tmp_path / "merged")
    expected = Predictor(job, "label")(files)
    assert Predictor(tmp_path / "adapter", "label")(files) == expected
    for one, other in zip(Predictor(tmp_path / "merged", "label")(files), expected, strict=True):
        assert one.class_name == other.class_name
    with pytest.raises(JobError, match="base would replace it. Omit --model"):
        read_job(tmp_path / "merged").load("base")


# -- one family is enough for what follows --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def one_job(folder_of, algorithm_on, minibatches, tmp_path_factory) -> pathlib.Path:
    algorithm = algorithm_on(folder_of("SmolVLM"), "MTCT", micro_batch=8, max_new_tokens=12)
    algorithm.update(minibatches)
    return write_trained_job(algorithm, tmp_path_factory.mktemp("jobs") / "job")


def test_model_card_has_data_target_settings_and_accuracy(one_job, tmp_path):
    export_adapters(one_job, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "# MTCT on PACSReasoning, target domain: sketch" in card
    assert "- Trained on the source domains: art, photo" in card
    assert "| sketch | target | 70.0 | 70.0 | – | – |" in card
    assert "| lora_rank | 8 |" in card and "dog, alarm clock, dog house, axe" in card
    assert "library_name: peft" in card


def test_export_and_predict_verbs(one_job, files, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["export", "--job", str(one_job), "--output", str(output)]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in output.iterdir()}
    capsys.readouterr()
    assert cli.main(["predict", "--job", str(output), "--json", "--answer", "both", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == files
    assert set(lines[0]) == {"image", "class_name", "scores", "label_class", "chain_class", "chain"}
    assert list(lines[0]["scores"]) == ["dog", "alarm clock", "dog house", "axe"]
    assert cli.main(["predict", "--job", str(one_job), "--answer", "label", files[0]]) == 0
    image, name, score = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (image, name) == (files[0], lines[0]["label_class"]) and 0 <= float(score) <= 1
    assert cli.main(["export", "--job", str(one_job), "--output", str(output)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_predict_among_other_classes_asks_both_questions_with_them(one_job, files, capsys):
    names = ["red fox", "lynx", "dog"]
    predictor = load_job(one_job, "both", class_names=names)
    job, mllm = read_job(one_job), predictor.mllm
    pixels = torch.stack([from_picture(mllm.image_size)(Image.open(name).convert("RGB")) for name in files])
    expected = mllm.class_scores(pixels, q_cls(names, job.subject), names).softmax(1)
    found = predictor(files)
    assert [one.label_class for one in found] == [names[best] for best in expected.argmax(1).tolist()]
    assert [one.chain for one in found] == mllm.generate(pixels, q_reason(names, job.subject), 12)
    assert [list(one.scores) for one in found] == [names] * len(files)
    assert predictor.loss(files[0], "lynx").label > 0
    command = ["predict", "--job", str(one_job), "--answer", "label", "--json", "--class-names"]
    assert cli.main([*command, "red fox, lynx,dog", *files]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    torch.testing.assert_close(
        torch.tensor([list(line["scores"].values()) for line in printed]), expected, rtol=1e-3, atol=1e-4
    )
    for refused, reason in (
        ("lynx", "class_names must be a list of at least two names; got .'lynx'."),
        ("Lynx,lynx", "two classes have the name 'lynx'"),
        ("lynx,", "the class name '' is blank"),
    ):
        assert cli.main([*command, refused, *files]) == 1
        assert re.search(reason, capsys.readouterr().err)
    with pytest.raises(ValueError, match="must be a list .*got 'lynx'"):
        load_job(one_job, class_names="lynx")


def test_unparsed_chain_is_reported_beside_the_label_answer(one_job, files, monkeypatch, capsys):
    names = read_job(one_job).class_names
    texts = ["no class", Chain("I look.", "A thing.", "It fits.", "Nothing misleads.", names[1]).render()]
    monkeypatch.setattr("domainbed_reasoning.jobs.predict.answering_chains", lambda *_: texts)
    assert cli.main(["predict", "--job", str(one_job), "--answer", "chain", *files[:2]]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(files[:2])))
    assert first.endswith("\t(from the class-name path: the chain names no class)")
    assert second == f"{files[1]}\t{names[1]}\t1.000"


def test_a_conclusion_is_read_as_the_job_read_it(one_job, files, tmp_path, monkeypatch):
    """Jobs of before there was a tolerant reader read exactly."""
    job = read_job(one_job)
    texts = [f"Sure! <conclusion>**A {job.class_names[1]}.**</conclusion>"]
    monkeypatch.setattr("domainbed_reasoning.jobs.predict.answering_chains", lambda *_: texts)
    saved = json.loads((one_job / "task.json").read_text())
    assert saved.pop("format_version") == 2 and saved["hparams"].pop("answer_matching") == "tolerant"
    earlier = tmp_path / "earlier"
    shutil.copytree(one_job, earlier)
    (earlier / "task.json").write_text(json.dumps(saved))
    for folder, concluded in ((one_job, job.class_names[1]), (earlier, None)):
        [answer] = Predictor(str(folder), "chain")(files[:1])
        assert (answer.chain_class, answer.chain) == (concluded, texts[0])


def test_a_job_without_a_version_is_upgraded_by_export_and_a_newer_one_is_refused(one_job, tmp_path):
    """Jobs from before votes, matching and versions: their hyper-parameters are those of that time."""
    old = shutil.copytree(one_job, tmp_path / "old")
    task = json.loads((old / "task.json").read_text())
    new = {"votes", "vote_temperature", "answer_matching"}
    task["hparams"] = {name: value for name, value in task["hparams"].items() if name not in new}
    assert task.pop("format_version") == 2
    (old / "task.json").write_text(json.dumps(task))
    export_adapters(old, tmp_path / "adapter")
    upgraded = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert upgraded["format_version"] == 2
    public = public_settings(task["hparams"]) | {"model": task["hparams"]["model"]}
    assert upgraded["hparams"] == public | {"votes": 1, "vote_temperature": 0.7, "answer_matching": "exact"}
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        assert file.metadata() == {"format": "pt", "domainbed_reasoning.format_version": "2"}
    tensors, adapters = safetensors.torch.load_file(weights), read_job(old).adapters
    for metadata in ({"format": "pt"}, None):  # version 1: of earlier exports, and of PEFT
        safetensors.torch.save_file(tensors, weights, metadata)
        again = read_job(tmp_path / "adapter").adapters
        assert again.keys() == adapters.keys() and all(torch.equal(again[name], adapters[name]) for name in again)
    for version, reason in (
        ("3", "version 3, .* up to version 2. Upgrade domainbed-reasoning"),
        ("x", "must be a number; got 'x'"),
    ):
        safetensors.torch.save_file(tensors, weights, {"domainbed_reasoning.format_version": version})
        with pytest.raises(JobError, match=f"adapter_model.safetensors: .*{reason}"):
            read_job(tmp_path / "adapter")
    for version, reason in (
        (3, "version 3, .* up to version 2. Upgrade domainbed-reasoning"),
        (0, "'format_version' cannot be 0"),
    ):
        (old / "task.json").write_text(json.dumps(task | {"format_version": version}))
        with pytest.raises(JobError, match=f"task.json.*{reason}"):
            read_job(old)


def test_unreadable_images_are_named_and_the_others_answered(one_job, files, tmp_path, capsys):
    """Six images of which three cannot be read, in batches of eval_batch: three answers, three errors, exit code 1."""
    empty, absent = tmp_path / "empty.png", tmp_path / "absent.png"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes(pathlib.Path(files[0]).read_bytes()[:-100])
    given = [str(absent), files[0], str(empty), files[1], files[2], str(cut)]
    command = ["predict", "--job", str(one_job), "--answer", "label"]
    assert cli.main([*command, "--json", *given]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["image"] for line in printed.out.splitlines()] == files
    *failures, summary = printed.err.splitlines()[-4:]
    for path, failure in zip((absent, empty, cut), failures, strict=True):
        assert f"'{path}' is not a readable image: " in failure and failure.endswith("Replace or remove it.")
    assert "No such file" in failures[0]
    assert summary == "3 of 6 images could not be read."
    assert cli.main([*command, str(empty)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("1 of 1 image could not be read.\n")


def test_errors_suggest_fixes(one_job, files, tmp_path, capsys):
    with pytest.raises(JobError, match="contains no task.json.*Pass an output folder"):
        read_job(tmp_path)
    shutil.copy(one_job / "task.json", tmp_path)
    with pytest.raises(JobError, match="contains no model.pkl.*--skip_model_save"):
        read_job(tmp_path)
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(JobError, match="damaged"):
        read_job(tmp_path)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match="no.png' is not a readable image"):
        Predictor(one_job)([tmp_path / "no.png"])
    with pytest.raises(ValueError, match="answer must be one of chain, label, both; got 'loud'"):
        Predictor(one_job, "loud")
    assert cli.main(["predict", "--job", str(tmp_path), *files]) == 1
    assert "damaged" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(one_job, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    shutil.copy(one_job / "task.json", tmp_path)
    torch.save({"model_dict": {"a": Evil()}}, tmp_path / "model.pkl")
    with pytest.raises(JobError, match="contains more than tensors"):
        read_job(tmp_path)


def test_truncated_checkpoint_is_reported(one_job, tmp_path):
    shutil.copy(one_job / "task.json", tmp_path)
    whole = (one_job / "model.pkl").read_bytes()
    (tmp_path / "model.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JobError, match="model.pkl cannot be read .*: it is truncated"):
        read_job(tmp_path)


def test_adapters_of_another_rank_are_refused(one_job, folder_of):
    job = read_job(one_job)
    job.hparams["lora_rank"] = 4
    with pytest.raises(ValueError, match=r"do not match this model: .* has shape \(8, .*and \(4, "):
        job.load()


def test_a_zero_shot_job_predicts_and_exports_nothing(folder_of, algorithm_on, files, tmp_path):
    algorithm = algorithm_on(folder_of("SmolVLM"), "MLLMZeroShot", max_new_tokens=12)
    folder = write_trained_job(algorithm, tmp_path / "zero")
    assert len(Predictor(folder, "label")(files)) == 3
    with pytest.raises(JobError, match="MLLMZeroShot trains no adapters"):
        export_adapters(folder, tmp_path / "out")


def test_a_quantized_job_merges_into_unquantized_weights(folder_of, algorithm_on, minibatches, files, tmp_path):
    algorithm = algorithm_on(folder_of("SmolVLM"), "MTCT", micro_batch=8, quantize="nf4")
    algorithm.update(minibatches)
    folder = write_trained_job(algorithm, tmp_path / "job")
    assert Predictor(folder, "label").mllm.quantized
    export_merged(folder, tmp_path / "merged")
    assert not load_mllm(str(tmp_path / "merged")).quantized
    assert len(Predictor(tmp_path / "merged", "label")(files)) == 3
