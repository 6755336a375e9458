"""Base-to-new datasets: half of the classes for training, the other half as targets, each asked with its own names."""

import argparse
import itertools
import json
import math

import pytest
import torch
from domainbed import datasets, hparams_registry

from builders.files import chain_text, read_lines, write_chains, write_images, write_lines
from builders.training import build, build_dataset, minibatches
from domainbed_reasoning import registry
from domainbed_reasoning.analysis.data import build_data
from domainbed_reasoning.bridge.samples import ids_of, task_of
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.datasets.user_datasets import base_to_new_class
from domainbed_reasoning.images import user_datasets as custom
from domainbed_reasoning.jobs.answers import AnswerRecords, write_task
from domainbed_reasoning.jobs.model_card import model_card
from domainbed_reasoning.jobs.trained import read_job
from domainbed_reasoning.method.answering import Questions
from domainbed_reasoning.mllm.generation import TextGenerator

DOMAINS, CLASSES = ["art_painting", "cartoon", "photo"], ["cat", "dog", "guitar"]
CREATURES = "ClearCreaturesBaseToNew"
SMALL = {"target_per_class": 2, "max_new_tokens": 112}


@pytest.fixture
def pacs(tmp_path):
    """A PACS with three domains, three classes of two images each, and a chain for every image."""
    write_chains(tmp_path / "PACS", write_images(tmp_path / "PACS", DOMAINS, CLASSES, 2))
    return tmp_path


def batch_of(dataset, env, count=6):
    return torch.utils.data.default_collate([dataset[env][index] for index in range(count)])


def test_the_first_half_of_the_classes_is_base_and_chains_of_new_ones_are_not_read(pacs):
    """Of three classes cat and dog; images come from all domains, and labels are the whole dataset's."""
    dataset, hparams = build_dataset("RDMLDG", "PACSBaseToNew", (1,), pacs, model="tiny", batch_size=2)
    task = task_of(hparams)
    assert dataset.num_classes == 3 and task.environments == ("base", "new") and task.class_names == tuple(CLASSES)
    assert [list(labels) for labels in task.labels] == [[0, 0, 1, 1] * 3, [2] * 6]
    assert set(task.images[1]) == {f"{domain}/guitar/{i}.png" for domain in DOMAINS for i in range(2)}
    assert task.classes_offered(0) == task.classes_offered() == (0, 1) and task.classes_offered(1) == (2,)
    assert len(task.chains) == 12 and {env for env, _ in task.chains} == {0}
    x, y = dataset[1][3]
    assert ids_of(x).tolist() == [1, 3] and y == 2 and x.dtype == torch.uint8


def test_questions_offer_the_names_of_their_environment(pacs):
    _, hparams = build_dataset("RDMLDG", "PACSBaseToNew", (1,), pacs, model="tiny", batch_size=2)
    of_training, of_new = (Questions.of(task_of(hparams), hparams, env) for env in (None, 1))
    assert of_training.class_names == ("cat", "dog") and "guitar" not in of_training.q_cls + of_training.q_reason
    assert of_new.class_names == ("guitar",) and "cat" not in of_new.q_cls + of_new.q_reason


@pytest.mark.parametrize("target", [0, 1])
def test_a_baseline_gets_the_stock_twins_hparams_and_images(pacs, target):
    """Its labels are those of the whole dataset: it cannot name classes that it was not trained on."""
    hparams = hparams_registry.default_hparams("ERM", "PACS")
    assert hparams_registry.default_hparams("ERM", "PACSBaseToNew") == hparams
    write_images(pacs / "PACS", ["sketch"], CLASSES, 2)
    ours = datasets.PACSBaseToNew(str(pacs), [target], hparams | {"batch_size": 2, "data_augmentation": False})
    stock = datasets.PACS(str(pacs), [target], hparams | {"data_augmentation": False})
    pairs = [(x, y) for env in stock for x, y in env]
    assert [y for _, y in ours[0]] == [y for _, y in pairs if y < 2] and {y for _, y in ours[1]} == {2}
    for (x, _), expected in zip(ours[1], (x for x, y in pairs if y == 2), strict=True):
        assert torch.equal(x, expected)


def test_a_dataset_with_one_class_is_refused(tmp_path):
    write_images(tmp_path / "PACS", DOMAINS, ["cat"], 2)
    with pytest.raises(ValueError, match="has 1 class, but base and new classes need two"):
        build_dataset("LabelSFT", "PACSBaseToNew", (1,), tmp_path, model="tiny")


@pytest.mark.parametrize("answer", ["label", "chain"])
@pytest.mark.parametrize("failure", ["label", "wrong"])
def test_each_environment_is_answered_with_its_own_names(answer, failure):
    """The scores of new classes are those of a model asked with their six names alone, after the six base classes."""
    dataset, algorithm = build(
        "MLLMZeroShot", CREATURES, test_envs=(1,), answer=answer, on_parse_failure=failure, **SMALL
    )
    algorithm.eval()
    for env, other in ((0, 1), (1, 0)):
        x, y = batch_of(dataset, env, 12)
        scores = algorithm.predict(x)
        offered = list(algorithm.task.classes_offered(env))
        assert torch.isinf(scores[:, list(algorithm.task.classes_offered(other))]).all()
        assert torch.isfinite(scores[:, offered]).all()
        assert scores.shape == (12, 13 if (answer, failure) == ("chain", "wrong") else 12)
        assert set(y.tolist()) <= set(offered) and (scores.argmax(1) == y).float().mean() > 0.3
        if answer == "label":
            asked = Questions.of(algorithm.task, algorithm.hparams, env)
            expected = algorithm.mllm.class_scores(algorithm.pixels(x), asked.q_cls, asked.class_names)
            torch.testing.assert_close(scores[:, offered], expected)


def test_images_of_both_environments_in_one_batch_are_refused():
    dataset, algorithm = build("MLLMZeroShot", CREATURES, test_envs=(1,), **SMALL)
    both = torch.utils.data.default_collate([dataset[0][0], dataset[1][0]])[0]
    with pytest.raises(ValueError, match=r"several environments \(base, new\) in one batch"):
        algorithm.eval().predict(both)


def test_chains_of_an_evaluation_are_generated_ahead_with_each_environments_question(tmp_path, monkeypatch):
    dataset, algorithm = build("MLLMZeroShot", CREATURES, test_envs=(1,), both_answers=False, **SMALL)
    for env in dataset.datasets:
        env.labels = env.labels[:3]
    splits = {(env, index): "in" for env, index in itertools.product(range(2), range(3))}
    algorithm.session.records = AnswerRecords(algorithm.task, tmp_path, splits, algorithm.hparams)
    asked, stream = [], TextGenerator.stream

    def streamed(self, images, question, *more):
        for answer in stream(self, images, question, *more):
            asked.append(question)
            yield answer

    monkeypatch.setattr(TextGenerator, "stream", streamed)
    algorithm.eval()
    for env in range(2):
        algorithm.predict(batch_of(dataset, env, 3)[0])
        assert asked == [Questions.of(algorithm.task, algorithm.hparams, own).q_reason for own in (0, 0, 0, 1, 1, 1)]


def test_a_chain_that_concludes_a_class_of_the_other_environment_names_no_class(tmp_path):
    """For new images "kas lun" is not offered, "mip tov" is; for base images the other way round."""
    _, algorithm = build("MLLMZeroShot", CREATURES, test_envs=(1,), **SMALL)
    splits = {(env, index): "in" for env in range(2) for index in range(2)}
    records = AnswerRecords(algorithm.task, tmp_path, splits, algorithm.hparams)
    chains = [chain_text("kas lun"), chain_text("mip tov")]
    for env in range(2):
        records.add(torch.tensor([[env, 0], [env, 1]]), chains, [0, 0], last=True)
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert [line["chain_answer"] for line in lines] == ["kas lun", None, None, "mip tov"]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [answers[env]["in"]["unparsed"] for env in ("env0", "env1")] == [0.5, 0.5]


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("keep", ["conclusion", "consistent"])
def test_self_labels_are_judged_by_the_classes_of_training_in_both_directions(target, keep):
    """The embedded model recognizes many creatures, whose chains are kept; labels 6 to 11 are new."""
    rounds = {"mtct_epochs": 0, "sarr_rounds": 1, "sarr_epochs": 1, "sarr_filter": keep}
    dataset, algorithm = build("RDMLDG", CREATURES, test_envs=(target,), **rounds, **SMALL)
    values = algorithm.update(minibatches(dataset, (target,), 12))
    assert values["sarr1_accepted"] > (0.3 if keep == "conclusion" else 0.1) and math.isfinite(values["loss"])


def test_clip_is_trained_and_asked_with_the_names_of_an_environment():
    """Trained on new classes, 6 to 11, its loss is the cross-entropy over their six scores alone."""
    dataset, algorithm = build("CLIPLoRA", CREATURES, test_envs=(0,), clip_epochs=1, target_per_class=2)
    ((x, y),) = minibatches(dataset, (0,), 12)
    expected = torch.nn.functional.cross_entropy(algorithm.predict(x)[:, 6:], y - 6)
    assert algorithm.update([(x, y)])["loss"] == pytest.approx(float(expected), rel=1e-4)
    for env in range(2):
        x, _ = batch_of(dataset, env)
        scores = algorithm.eval().predict(x)
        offered = algorithm.task.classes_offered(env)
        assert scores.shape == (6, 12) and torch.isfinite(scores).sum() == 36
        assert set(scores.argmax(1).tolist()) <= set(offered)


def test_the_model_card_shows_the_questions_of_training(tmp_path):
    """Base names are in both questions, new ones in neither; the card says what an evaluation asks."""
    hparams = {"model": "tiny", "batch_size": 2}
    dataset, hparams = build_dataset("MLLMZeroShot", CREATURES, (1,), **hparams, **SMALL)
    task = task_of(hparams)
    names = argparse.Namespace(algorithm="MLLMZeroShot", output_dir=str(tmp_path), test_envs=[1])
    write_task(task, hparams, names)
    torch.save({"model_dict": {}}, tmp_path / "model.pkl")
    job = read_job(tmp_path)
    base, new = (tuple(task.class_names[label] for label in task.classes_offered(env)) for env in range(2))
    assert job.offered == (base, new) and job.names_of_training == base
    card = model_card(job, False, "tiny")
    questions = card.partition("## Questions")[2].partition("## Use")[0].split("```")[1::2]
    assert [text.strip("\n") for text in questions] == [q(base, task.subject) for q in (q_cls, q_reason)]
    assert f"new: {', '.join(new)}." in card and "`predict --class-names` selects" in card


def test_a_users_dataset_and_a_table_have_base_and_new_classes(tmp_path, monkeypatch):
    """Two classes in two splits as domains: what FGVC-Aircraft and the like need."""
    paths = write_images(tmp_path / "planes", ["test", "train"], ["A320", "B747"], 3)
    (tmp_path / "planes.toml").write_text(
        'name = "Planes"\nfolder = "planes"\nenvironments = ["test", "train"]\nsubject = "aircraft"\n'
    )
    rows = [f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in paths]
    (tmp_path / "planes" / "list.csv").write_text("\n".join(["path,label,domain", *rows]) + "\n")
    (tmp_path / "listed.toml").write_text(
        'name = "Listed"\nfolder = "planes"\nenvironments = ["test", "train"]\ntable = "list.csv"\n'
    )
    files = f"{tmp_path / 'planes.toml'}:{tmp_path / 'listed.toml'}"
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", files)
    write_lines(
        tmp_path / "planes" / "reasoning.jsonl", [{"image": p, "chain": chain_text(p.split("/")[1])} for p in paths]
    )
    for name, described in custom.custom_datasets().items():
        assert custom.find(f"{name}BaseToNew") is not None and f"{name}BaseToNew" in custom.targets({name: described})
        hparams = hparams_registry.default_hparams("MTCT", "PACSReasoning") | {"model": "tiny", "batch_size": 2}
        dataset = base_to_new_class(described)(str(tmp_path), [1], hparams)
        assert [len(env) for env in dataset] == [6, 6] and len(task_of(hparams).chains) == 6
        assert task_of(hparams).subject == described.subject


def test_analyses_refuse_environments_with_different_questions():
    with pytest.raises(ValueError, match="the questions of its environments offer different classes"):
        build_data(CREATURES, None, [1])


def test_every_image_folder_dataset_has_base_and_new_classes():
    stock = {twin for name, twin in registry.TWINS.items() if name not in registry.RENDERED}
    assert {f"{name}{registry.BASE_TO_NEW}" for name in stock} <= registry.DATASETS.keys()
    for name in stock:
        ours = vars(datasets)[f"{name}{registry.BASE_TO_NEW}"]
        assert ours.FOLDER == vars(datasets)[f"{name}Reasoning"].FOLDER
        assert ours.BUNDLE == vars(datasets)[f"{name}Reasoning"].BUNDLE
        assert ours.READABLE == vars(datasets)[f"{name}Reasoning"].READABLE
        assert datasets.num_environments(f"{name}{registry.BASE_TO_NEW}") == 2
