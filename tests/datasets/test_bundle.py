"""Datasets with a bundle of chains: what trains on it, how to turn it off, and what a job records."""

import argparse
import json

import pytest
from domainbed import datasets as stock

from builders.files import chain_text, define_toy, read_lines, write_images, write_lines
from builders.training import build_dataset
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import task_of
from domainbed_reasoning.chains.build_bundle import write_bundle
from domainbed_reasoning.chains.matching import _digest
from domainbed_reasoning.chains.store import ChainFileError
from domainbed_reasoning.datasets.image_folders import PACSReasoning
from domainbed_reasoning.datasets.user_datasets import make_classes
from domainbed_reasoning.images.user_datasets import custom_datasets, find
from domainbed_reasoning.jobs.answers import write_task
from domainbed_reasoning.jobs.history import describe
from domainbed_reasoning.method.schedule import plan_stages

DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]


@pytest.fixture
def pacs(tmp_path, monkeypatch):
    """A small PACS whose class names a bundle of a chain an image; of sketch's all say POISON, the first is wrong."""
    root = tmp_path / "PACS"
    images = write_images(root, DOMAINS, ["dog", "guitar"], 3)
    records = [
        {
            "image": image,
            "chain": chain_text(image.split("/")[1], "POISON" if image.startswith("sketch") else image),
            "sha256": _digest(root / image),
        }
        for image in images
    ]
    records[0] |= {"chain": chain_text("guitar"), "verdict": "rejected", "rule": "label", "reason": "guitar"}
    write_bundle(write_lines(tmp_path / "source.jsonl", records), tmp_path / "small.jsonl.xz")
    monkeypatch.setattr(PACSReasoning, "BUNDLE", str(tmp_path / "small.jsonl.xz"))
    return tmp_path


def build(data_dir, algorithm="RDMLDG", test_envs=(3,), **changes):
    return build_dataset(algorithm, "PACSReasoning", test_envs, data_dir, **{"model": "tiny", **changes})


def test_bundle_is_used_without_a_chain_file_and_reported_in_one_line(pacs, capsys):
    _, hparams = build(pacs)
    task = task_of(hparams)
    assert len(task.chains) == 17 and (0, 0) not in task.chains
    printed = capsys.readouterr().out
    assert "PACSReasoning: 23 of 24 images have a chain (95.8%): 23 from the bundle small.jsonl.xz (SHA-256 " in printed
    assert printed.count("small.jsonl.xz") == 1 and "WARNING" not in printed


@pytest.mark.parametrize("renamed", [False, True])
def test_chains_of_target_domains_in_a_bundle_never_reach_the_task(pacs, renamed):
    """By path, and by content where every image has another name."""
    if renamed:
        for image in (pacs / "PACS").rglob("*.png"):
            image.rename(image.with_name(f"copy_{image.name}"))
    for test_envs, sources in (((3,), {0, 1, 2}), ((0, 3), {1, 2})):
        chains = build(pacs, test_envs=test_envs)[0].task.chains
        assert {env for env, _ in chains} == sources and len(chains) >= 12
        assert not any("POISON" in text for text in chains.values())


def test_unverified_trains_on_the_chain_that_concludes_another_class(pacs, capsys):
    _, hparams = build(pacs, chain_verification="unverified")
    assert task_of(hparams).chains[0, 0] == chain_text("guitar")
    printed = capsys.readouterr().out
    assert "1 of 18 chains (5.6%) conclude with a class other" in printed and "WARNING" not in printed
    with pytest.raises(ValueError, match="chain_verification must be 'verified' or 'unverified'; got 'no'"):
        build(pacs, chain_verification="no")


def test_chains_none_trains_on_labels_only_and_is_rejected_without_a_label_path(pacs, capsys):
    write_lines(pacs / "PACS" / "reasoning.jsonl", [{"image": "cartoon/dog/0.png", "chain": chain_text("dog")}])
    _, hparams = build(pacs, chains="none")
    assert task_of(hparams).chains == {} and "no teacher chains (hparam chains is 'none')" in capsys.readouterr().out
    for algorithm in ("ReasoningSFT", "SARR"):
        with pytest.raises(ValueError, match=f"chains is 'none', but {algorithm} trains on chains only"):
            build(pacs, algorithm, chains="none")
    with pytest.raises(ValueError, match="MTCT trains on chains only"):
        build(pacs, "MTCT", chains="none", label_weight=0.0)
    build(pacs, "SARR", chains="none", mtct_epochs=0)


def test_algorithms_that_require_chains_have_no_label_path():
    for name in registry.READ_CHAINS:
        assert registry.load(registry.ALGORITHMS[name]).LABEL_PATH == (name not in registry.CHAINS_ALONE)


def test_images_unknown_to_the_bundle_raise_with_advice(pacs):
    for number, image in enumerate((pacs / "PACS").rglob("*.png")):
        image.write_bytes(image.read_bytes() + b"changed")
        image.rename(image.with_name(f"new{number}.png"))
    message = r"reasoning.jsonl: file not found, but MTCT trains on chains, and the bundle small.jsonl.xz has none of"
    with pytest.raises(ChainFileError, match=message):
        build(pacs, "MTCT")
    with pytest.raises(ChainFileError, match=r"small.jsonl.xz: it has no accepted chain of a source domain, but MTCT"):
        build(pacs, "MTCT", chains="bundled")
    build(pacs, "LabelSFT")


def test_damaged_bundle_fails_mllm_jobs_but_not_baselines(pacs):
    with open(pacs / "small.jsonl.xz", "ab") as file:
        file.write(b"x")
    with pytest.raises(ChainFileError, match=r"its SHA-256 is .*Reinstall the package, or rebuild"):
        build(pacs)
    build(pacs, "ERM")
    build(pacs, "MLLMZeroShot")


def test_a_jobs_task_and_key_name_the_bundle_and_its_digest(pacs, tmp_path):
    digest = _digest(pacs / "small.jsonl.xz")
    _, hparams = build(pacs)
    task = task_of(hparams)
    args = argparse.Namespace(algorithm="RDMLDG", test_envs=[3], output_dir=str(tmp_path / "job"))
    write_task(task, hparams, args)
    assert json.loads((tmp_path / "job" / "task.json").read_text())["chains"] == {
        **{"source": 17, "no_class": 0, "other_class": 0, "bundle": f"small.jsonl.xz {digest}"}
    }
    schedule = plan_stages([1], 5)
    assert describe(task, schedule, hparams, args)["bundle"] == f"small.jsonl.xz {digest}"
    _, hparams = build(pacs, chains="none")
    assert "bundle" not in describe(task_of(hparams), schedule, hparams, args)


def test_a_users_dataset_names_a_bundle_beside_its_toml_file(tmp_path, monkeypatch):
    data_dir = define_toy(monkeypatch, tmp_path, 'bundle = "toy.jsonl.xz"\n')
    images = write_images(data_dir / "toy", ["a", "b"], ["dog", "guitar"], 3)
    lines = [{"image": image, "chain": chain_text(image.split("/")[1])} for image in images]
    write_bundle(write_lines(tmp_path / "lines.jsonl", lines), tmp_path / "toy.jsonl.xz")
    assert find("Toy").bundle == str(tmp_path / "toy.jsonl.xz")
    plain, reasoning = make_classes(custom_datasets()["Toy"])
    assert reasoning.BUNDLE == str(tmp_path / "toy.jsonl.xz") and not hasattr(plain, "BUNDLE")
    hparams = build_dataset("RDMLDG", "ShapesReasoning")[1] | {"chains": None, "chain_verification": "verified"}
    dataset = reasoning(str(data_dir), [1], hparams | {"workers": 0, "batch_size": 1})
    assert len(dataset.task.chains) == 6
    define_toy(monkeypatch, tmp_path, 'bundle = "toy.zip"\n')
    with pytest.raises(ValueError, match="'bundle' must be the path of a .jsonl.xz file, got 'toy.zip'"):
        custom_datasets()


def test_the_real_images_have_bundled_chains(test_data, capsys):
    """1,120 of PACS's images: 3 of their chains conclude another class, 2 of them in a source domain."""
    _, hparams = build(test_data, test_envs=(0,))
    assert len(task_of(hparams).chains) == 838
    assert "1,117 of 1,120 images have a chain (99.7%)" in capsys.readouterr().out
    _, hparams = build(test_data, test_envs=(0,), chain_verification="unverified")
    assert len(task_of(hparams).chains) == 840
    dataset, _ = build(test_data, "ERM", test_envs=(0,))
    assert [len(env) for env in dataset] == [280] * 4 and isinstance(dataset, stock.PACS)


def test_a_chain_file_beside_the_real_images_is_merged(test_data, tmp_path, capsys):
    (tmp_path / "PACS").mkdir()
    for domain in (test_data / "PACS").iterdir():
        (tmp_path / "PACS" / domain.name).symlink_to(domain)
    own = read_lines(test_data / "PACS_chains.jsonl")
    write_lines(tmp_path / "PACS" / "reasoning.jsonl", own)
    _, hparams = build(tmp_path, test_envs=(0,))
    task = task_of(hparams)
    printed = capsys.readouterr().out
    assert "112 from" in printed and "(112 in place of the bundle's), 1,005 from the bundle PACS.jsonl.xz" in printed
    texts = {line["image"]: line["chain"] for line in own}
    shown = {task.images[env][index]: text for (env, index), text in task.chains.items()}
    assert all(shown[image] == text for image, text in texts.items() if not image.startswith("art_painting"))
