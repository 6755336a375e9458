"""The reasoning datasets on generated image folders, and on real PACS images where available."""

import random
import types

import numpy as np
import pytest
import torch
from domainbed import datasets, hparams_registry
from PIL import Image

from builders.files import chain_text, read_lines, write_chains, write_images, write_lines
from builders.training import build_dataset
from domainbed_reasoning import registry
from domainbed_reasoning.bridge import steps as steps_of_domainbed
from domainbed_reasoning.bridge.samples import ids_of, task_of
from domainbed_reasoning.chains.store import ChainFileError
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.answering import misled
from domainbed_reasoning.method.task import Task

DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
CLASSES = ["dog", "guitar"]


@pytest.fixture
def pacs(tmp_path):
    """A small PACS: four domains, two classes, three images each, and a chain for every image."""
    pixels = np.random.RandomState(0)

    def picture(*_):
        return Image.fromarray(pixels.randint(0, 256, (60, 70, 3), dtype=np.uint8))

    write_chains(tmp_path / "PACS", write_images(tmp_path / "PACS", DOMAINS, CLASSES, 3, picture))
    return tmp_path


def write(data_dir, lines):
    write_lines(data_dir / "PACS" / "reasoning.jsonl", lines)


def read(data_dir):
    return read_lines(data_dir / "PACS" / "reasoning.jsonl")


def build(data_dir, algorithm="RDMLDG", name="PACSReasoning", **changes):
    return build_dataset(algorithm, name, data_dir=data_dir, **{"model": "tiny", **changes})


@pytest.mark.parametrize("algorithm", ["ERM", "CORAL"])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_baseline_gets_the_hparams_and_the_tensors_of_the_stock_twin(pacs, algorithm, seed):
    if seed == 0:
        drawn = [hparams_registry.default_hparams(algorithm, name) for name in ("PACS", "PACSReasoning")]
    else:
        drawn = [hparams_registry.random_hparams(algorithm, name, seed) for name in ("PACS", "PACSReasoning")]
    assert drawn[0] == drawn[1]
    batches = []
    for name, hparams in zip(("PACS", "PACSReasoning"), drawn, strict=True):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        dataset = vars(datasets)[name](str(pacs), [3], hparams)
        batches.append([env[i] for env in dataset for i in range(len(env))])
        assert (dataset.N_STEPS, dataset.CHECKPOINT_FREQ, dataset.N_WORKERS) == (5001, 300, 8)
    for (x, y), (ours_x, ours_y) in zip(*batches, strict=True):
        assert type(ours_x) is torch.Tensor
        assert torch.equal(x, ours_x) and y == ours_y


def test_every_stock_image_folder_dataset_has_its_reasoning_twin():
    stock = ["VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "SVIRO"]
    for name in stock:
        ours, twin = vars(datasets)[f"{name}Reasoning"], vars(datasets)[name]
        assert issubclass(ours, twin)
        assert ours.ENVIRONMENTS == twin.ENVIRONMENTS
        assert ours.CHECKPOINT_FREQ == twin.CHECKPOINT_FREQ
        assert f"{name}Reasoning" in datasets.DATASETS
        assert datasets.num_environments(f"{name}Reasoning") == len(twin.ENVIRONMENTS)


def test_an_mllm_algorithm_gets_bytes_at_its_models_resolution_that_know_their_sample(pacs):
    dataset, hparams = build(pacs)
    x, y = dataset[1][4]
    assert x.shape == (3, 48, 48) and x.dtype == torch.uint8
    assert ids_of(x).tolist() == [1, 4]
    task = task_of(hparams)
    assert y == task.labels[1][4] == 1
    assert task.images[1][4] == "cartoon/guitar/1.png"
    assert task.class_names == ("dog", "guitar")
    assert task.chains[1, 4] == chain_text("guitar", "cartoon/guitar/1.png")


def test_chains_of_target_domains_never_reach_the_task(pacs):
    """Poison: the target's chains say what no source chain says; not one is in what training sees."""
    lines = read(pacs)
    for line in lines:
        if line["image"].startswith("sketch/"):
            line["chain"] = chain_text("guitar", "POISON")
    write(pacs, lines)
    _, hparams = build(pacs, test_envs=(3,))
    chains = task_of(hparams).chains
    assert len(chains) == 18 and {env for env, _ in chains} == {0, 1, 2}
    assert not any("POISON" in text for text in chains.values())
    _, hparams = build(pacs, test_envs=(0, 3))
    assert {env for env, _ in task_of(hparams).chains} == {1, 2}


def test_the_share_of_images_with_a_chain_is_printed(pacs, capsys):
    write(pacs, [line for line in read(pacs) if "/0." in line["image"]])
    build(pacs)
    assert "PACSReasoning, cartoon: 2 of 6 images have a chain (33.3%)" in capsys.readouterr().out


def test_methods_without_a_reasoning_path_need_no_chain_file(pacs):
    (pacs / "PACS" / "reasoning.jsonl").unlink()
    build(pacs, "LabelSFT")
    build(pacs, "MLLMZeroShot")
    with pytest.raises(ChainFileError, match=r"reasoning.jsonl.*annotate"):
        build(pacs, "MTCT")


@pytest.mark.parametrize("algorithm", ["ReasoningSFT", "MTCT", "SARR", "RDMLDG"])
def test_chain_file_without_source_chains_is_rejected_by_algorithms_that_train_on_chains(pacs, algorithm):
    """Rejected ones of sources and accepted ones of the target alone: it would train on nothing, loss 0."""
    lines = read(pacs)
    for line in lines:
        if not line["image"].startswith("sketch/"):
            line["verdict"] = "rejected"
    write(pacs, lines)
    message = rf"reasoning.jsonl: it has no accepted chain of a source domain, but {algorithm} .*annotate.*'chains'"
    with pytest.raises(ChainFileError, match=message):
        build(pacs, algorithm)
    write(pacs, [])
    with pytest.raises(ChainFileError, match=message):
        build(pacs, algorithm)
    build(pacs, "LabelSFT")
    build(pacs, "MLLMZeroShot")
    build(pacs, "ERM")
    if "sarr_rounds" in hparams_registry.default_hparams(algorithm, "PACSReasoning"):
        build(pacs, algorithm, mtct_epochs=0)  # bootstrap


@pytest.mark.parametrize("chains", [None, "nowhere.jsonl"])
def test_missing_chain_file_error_names_the_hparam_and_alternatives(pacs, chains):
    (pacs / "PACS" / "reasoning.jsonl").unlink()
    with pytest.raises(ValueError, match="file not found, but RDMLDG trains") as error:
        build(pacs, "RDMLDG", chains=chains)
    for word in ("the hparam 'chains'", "`domainbed-reasoning annotate`", "LabelSFT", "ShapesReasoning requires no"):
        assert word in str(error.value)
    with pytest.raises(FileNotFoundError, match="ShapesReasoning requires no data"):
        build(pacs / "elsewhere", "RDMLDG")


def test_chain_file_can_be_elsewhere(pacs, tmp_path):
    elsewhere = tmp_path / "mine.jsonl"
    (pacs / "PACS" / "reasoning.jsonl").rename(elsewhere)
    _, hparams = build(pacs, chains=str(elsewhere))
    assert len(task_of(hparams).chains) == 18


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[4].update(chain="no tags"), "line 5: .*not have the five stages"),
        (lambda lines: lines[2].update(image="art_painting/dog/9.png"), "line 3: image .*9.png"),
        (lambda lines: lines[1].pop("chain"), "line 2: the key 'chain' is missing"),
    ],
)
def test_invalid_chain_file_fails_before_training_and_names_the_line(pacs, spoil, message):
    lines = read(pacs)
    spoil(lines)
    write(pacs, lines)
    with pytest.raises(ChainFileError, match=message):
        build(pacs)


def test_an_unreadable_image_is_named_before_training(pacs):
    broken = pacs / "PACS" / "photo" / "dog" / "1.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"unreadable images: .*photo/dog/1.png"):
        build(pacs)


def test_missing_dataset_error_suggests_a_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VLCSReasoning: folder .*VLCS not found.*check --dataset VLCSR"):
        build(tmp_path, name="VLCSReasoning")


def test_a_missing_or_an_extra_domain_folder_is_named(pacs):
    (pacs / "PACS" / "extra" / "dog").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="5 domain folders.*extra.*expected 4"):
        build(pacs)


@pytest.mark.parametrize("algorithm", ["ERM", "RDMLDG"])
def test_a_class_without_an_image_in_a_domain_is_named_with_both(pacs, algorithm):
    """torchvision names the class alone, and there are four domains."""
    for path in (pacs / "PACS" / "photo" / "guitar").iterdir():
        path.unlink()
    message = r"PACSReasoning: no image of the class 'guitar' in the domain 'photo' \(.*PACS.photo.guitar\)"
    with pytest.raises(FileNotFoundError, match=message):
        build(pacs, algorithm)


def test_domains_with_other_classes_are_refused(pacs):
    (pacs / "PACS" / "photo" / "guitar").rename(pacs / "PACS" / "photo" / "horse")
    with pytest.raises(ValueError, match="art_painting and photo have different class folders .guitar, horse"):
        build(pacs)


def test_stages_are_laid_out_from_the_size_of_the_source_domains(pacs):
    """Sources 3 x 6 images, 1 held out each: 15; batches of 3 x 2 = 6: 3 steps an epoch, 9 a stage of 3 epochs."""
    for name, steps in (("RDMLDG", 4 * 9 + 1), ("MTCT", 9 + 1)):
        dataset, hparams = build(pacs, name, batch_size=2)
        epochs = registry.load(registry.ALGORITHMS[name]).stages(hparams)
        assert steps_of_domainbed.lay_out_steps(dataset.task, epochs, hparams).n_steps == steps
        assert (dataset.N_STEPS, dataset.CHECKPOINT_FREQ) == (steps, 9)


def test_shapes_are_the_same_images_for_baselines_and_mllms():
    stock = vars(datasets)["ShapesReasoning"](None, [2], hparams_registry.default_hparams("ERM", "ShapesReasoning"))
    assert stock.input_shape == (3, 28, 28) and len(stock) == 4 and stock.num_classes == len(shapes.CLASS_NAMES)
    x, y = stock[2][5]
    picture = shapes.render(2, 5, misleading=True)
    ours, hparams = build(None, name="ShapesReasoning", test_envs=(2,))
    big, label = ours[2][5]
    assert torch.equal(big.as_subclass(torch.Tensor), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    small = torch.from_numpy(np.array(picture.resize((28, 28), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(x, small, rtol=0, atol=0.02)
    assert y == label == shapes.label(2, 5)
    assert {env for env, _ in task_of(hparams).chains} == {0, 1, 3}


def test_shapes_have_the_cue_and_the_target_size_that_are_asked_for():
    """Of baselines and MLLM methods alike; with rho 0 a misleading background is as random as an honest one."""
    wanted = {"rho": 0.0, "target_per_class": 3}
    hparams = hparams_registry.default_hparams("ERM", "ShapesReasoning") | wanted
    stock = vars(datasets)["ShapesReasoning"](None, [2], hparams)
    ours, of_ours = build(None, name="ShapesReasoning", test_envs=(2,), **wanted)
    for dataset in (stock, ours):
        assert [len(env) for env in dataset] == [140, 140, 21, 140]
    task = task_of(of_ours)
    assert [len(names) for names in task.images] == [140, 140, 21, 140] == [len(own) for own in task.labels]
    for env, misleading in ((2, True), (0, False)):
        picture = shapes.render(env, 1, misleading=misleading, rho=0.0)
        seen = ours[env][1][0].as_subclass(torch.Tensor)
        assert torch.equal(seen, torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        assert not torch.equal(seen, build(None, name="ShapesReasoning", test_envs=(2,))[0][env][1][0])


def test_shapes_are_described_by_the_teacher_that_is_asked_for():
    _, hparams = build(None, name="ShapesReasoning", test_envs=(2,), teacher="other")
    assert task_of(hparams).chains[0, 4] == shapes.chain(0, 4, "other") != shapes.chain(0, 4)


def test_augmentation_is_off_for_mllms_unless_asked_for_and_never_on_targets(pacs):
    plain, _ = build(pacs)
    assert torch.equal(plain[0][0][0], plain[0][0][0])
    augmented, _ = build(pacs, data_augmentation=True)
    assert not torch.equal(augmented[0][0][0], augmented[0][0][0])
    assert torch.equal(augmented[3][0][0], plain[3][0][0])


def test_real_chains_of_real_images_load(test_data):
    dataset, hparams = build(test_data, chains=str(test_data / "PACS_chains.jsonl"))
    task = task_of(hparams)
    assert len(task.chains) == 84  # 28 of each of three source domains
    assert [len(env) for env in dataset] == [280] * 4
    for (env, index), text in task.chains.items():
        assert f"<CONCLUSION>{task.class_names[task.labels[env][index]]}</CONCLUSION>" in text


def test_registry_and_classes_agree():
    for name, target in registry.DATASETS.items():
        assert registry.load(target) is vars(datasets)[name]


def test_chains_that_all_conclude_no_class_are_refused_before_training(pacs):
    """The reader of answers finds no class in any of them: a model that learns them answers nothing."""
    write(pacs, [{**line, "chain": chain_text("some animal or other")} for line in read(pacs)])
    with pytest.raises(ValueError, match=r"18 of 18 chains \(100.0%\) conclude with no class.*some animal or other"):
        build(pacs)
    build(pacs, "LabelSFT")  # learns from no chain


def test_conclusions_are_counted_as_the_job_reads_them(pacs, capsys):
    """A sentence around the class name is an answer, unless ``answer_matching`` is exact."""
    write(
        pacs, [{**line, "chain": chain_text(f"The answer is a {line['image'].split('/')[1]}.")} for line in read(pacs)]
    )
    build(pacs)
    assert "WARNING" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"18 of 18 chains \(100.0%\) conclude with no class.*The answer is a dog\."):
        build(pacs, answer_matching="exact")


def test_chains_that_conclude_no_class_or_a_wrong_one_are_reported(pacs, capsys):
    """Of 18 source chains 3 name no class and 3 another; those of the target domain count for neither."""
    lines = read(pacs)
    for line in lines:
        domain, name, file = line["image"].split("/")
        if file == "0.png" and name == "dog":
            line["chain"] = chain_text("some animal or other")
        elif file == "0.png":
            line["chain"] = chain_text("dog")
    write(pacs, lines)
    dataset, hparams = build(pacs)
    printed = capsys.readouterr().out
    assert "WARNING: 3 of 18 chains (16.7%) conclude with no class of the dataset" in printed
    assert "of 'art_painting/dog/0.png' (dog), concludes: 'some animal or other'" in printed
    assert "3 of 18 chains (16.7%) conclude with a class other than their image's" in printed
    assert "They are left out; chain_verification 'unverified' would train on them" in printed
    assert "art_painting: 5 of 6 images have a chain" in printed
    nothing, other = misled(task_of(hparams))
    assert (len(nothing), len(other)) == (3, 0) and len(task_of(hparams).chains) == 15
    _, hparams = build(pacs, chain_verification="unverified")
    assert [len(found) for found in misled(task_of(hparams))] == [3, 3]


def test_a_file_of_wrong_conclusions_alone_is_refused(pacs):
    write(pacs, [line | {"chain": chain_text("dog")} for line in read(pacs) if "/dog/" not in line["image"]])
    with pytest.raises(ValueError, match=r"conclude with a class other .*, so none is left to train on"):
        build(pacs)


def test_correct_chains_cause_no_warning(pacs, capsys):
    build(pacs)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "given", "holdout", "steps"),
    [("MTCT", {}, 0.2, 6), ("CLIPLoRA", {}, 0.2, 6), ("MTCT", {}, 0.5, 4), ("MTCT", {"batch_size": 4}, 0.2, 11)],
)
def test_an_epoch_is_the_sources_training_images_alone(monkeypatch, name, given, holdout, steps):
    """Domains of 104, 50, 9 and a target of 1000 images. A fifth held out, 84 + 40 + 8 = 132 are left: 3 x 8 a step,
    5.5 steps. With validation they would be 163 and 7 steps, with the target 932 and 30; rounded down, 5 steps.

    Half held out: 52 + 25 + 5 = 82, 3.4 steps. 3 x 4 a step: 11.
    """
    args = types.SimpleNamespace(algorithm=name, holdout_fraction=holdout, steps=None)
    monkeypatch.setattr(steps_of_domainbed, "job_arguments", lambda: args)
    algorithm = registry.load(registry.ALGORITHMS[name])
    hparams = {key: hparam.default for key, hparam in algorithm.HPARAMS.items()} | {"batch_size": 8} | given
    task = Task("Toy", ("a",), test_envs=(3,), labels=[[0] * size for size in (104, 50, 9, 1000)])
    schedule = steps_of_domainbed.lay_out_steps(task, algorithm.stages(hparams), hparams)
    epochs = sum(algorithm.stages(hparams))
    assert schedule.n_steps == epochs * steps + 1


def test_an_epoch_of_one_source_leaves_every_target_out(monkeypatch):
    """Single-source generalization: 50 images, 40 of them to train on, 8 a step."""
    monkeypatch.setattr(steps_of_domainbed, "job_arguments", lambda: None)
    task = Task("Toy", ("a",), test_envs=(0, 2), labels=[[0] * size for size in (1000, 50, 700)])
    assert steps_of_domainbed.lay_out_steps(task, [3], {"batch_size": 8}).n_steps == 3 * 5 + 1
