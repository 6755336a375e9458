"""Target domains and validation splits never influence training: with any content, every step is the same.

Two runs of one job, their trajectories compared bit for bit. In the second the target domain's pixels, labels and
chains are others, and so are those of the source domains' validation splits.
"""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry
from domainbed.lib import misc
from domainbed.lib.fast_data_loader import InfiniteDataLoader
from PIL import Image

from builders.files import chain_text
from domainbed_reasoning import registry
from domainbed_reasoning.chains.build_bundle import write_bundle
from domainbed_reasoning.datasets.user_datasets import make_classes
from domainbed_reasoning.images import shapes
from domainbed_reasoning.images import user_datasets as custom

CLASSES = ["0", "1"]
IMAGES = 5  # a class and domain: ten a domain, of which two are its validation split
TARGET = 1
HOLDOUT = 0.2
FOLDERS = [name for name in registry.DATASETS if name not in registry.RENDERED and name.endswith("Reasoning")]


def validation(env, size):
    """Return the indices of an environment's validation split, as DomainBed's train script draws it."""
    out, _ = misc.split_dataset(range(size), int(size * HOLDOUT), misc.seed_hash(0, env))
    return {int(out[i]) for i in range(len(out))}


def write_folders(root, cls, poisoned):
    """A small copy of an image-folder dataset with a chain an image.

    Poison: the pixels and chains of the target and of the validation splits are others, and the target's two class
    folders change places.
    """
    pixels = np.random.RandomState(0)
    names = [cls.READABLE.get(name, name) for name in CLASSES]
    lines = []
    for env in range(len(cls.ENVIRONMENTS)):
        held_out = validation(env, IMAGES * len(CLASSES))
        for label, folder in enumerate(CLASSES):
            place = root / cls.FOLDER / f"domain{env:02}" / folder
            place.mkdir(parents=True)
            for index in range(IMAGES):
                array = pixels.randint(0, 256, (32, 32, 3), dtype=np.uint8)
                is_poison = poisoned and (env == TARGET or label * IMAGES + index in held_out)
                Image.fromarray(255 - array if is_poison else array).save(place / f"{index}.png")
                text = chain_text(
                    names[1 - label] if is_poison else names[label], "POISON" if is_poison else f"{env} {index}"
                )
                lines.append({"image": f"domain{env:02}/{folder}/{index}.png", "chain": text})
    if poisoned:
        domain = root / cls.FOLDER / f"domain{TARGET:02}"
        for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
            shutil.move(domain / old, domain / new)
    (root / cls.FOLDER / "reasoning.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def trajectory(root, cls, name, poisoned):
    """Train as DomainBed's script does, target domain left out.

    Returns each step's values, the final state, the texts trained on, and the scores of source images afterwards.
    """
    hparams = hparams_registry.default_hparams(
        name, cls.__name__ if cls.__name__ in registry.DATASETS else "PACSReasoning"
    )
    small = {"model": "tiny", "max_new_tokens": 16, "batch_size": 2, "mtct_epochs": 1, "workers": 0, "dtype": "float32"}
    small |= {"clip_model": "tiny", "clip_epochs": 1}
    small |= {"sarr_rounds": 1, "sarr_epochs": 1, "temperature": 0.7, "both_answers": False}
    hparams |= {key: value for key, value in small.items() if key in hparams}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    dataset = cls(str(root), [TARGET], hparams)
    if poisoned:  # labels of the validation splits, which lie in folders of their own
        for env, images in enumerate(dataset):
            for index in validation(env, len(images)):
                images.labels[index] = (images.labels[index] + 1) % dataset.num_classes
    splits = [misc.split_dataset(env, int(len(env) * HOLDOUT), misc.seed_hash(0, i)) for i, env in enumerate(dataset)]
    loaders = [
        InfiniteDataLoader(dataset=in_, weights=None, batch_size=2, num_workers=0)
        for i, (_, in_) in enumerate(splits)
        if i != TARGET
    ]
    algorithm = algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, len(loaders), hparams)
    seen = []
    if hasattr(algorithm, "mllm"):
        log_likelihoods = algorithm.mllm.target
        algorithm.mllm.target = lambda answer: seen.append(answer) or log_likelihoods(answer)
    batches = zip(*loaders, strict=True)
    steps = min(dataset.N_STEPS, 8)
    values = [algorithm.update([tuple(batch) for batch in next(batches)]) for _ in range(steps)]
    images = torch.stack([splits[0][1][i][0] for i in range(3)])
    return values, algorithm.state_dict(), seen, algorithm.eval().predict(images)


def same(one, other):
    values, state, seen, scores = one
    other_values, other_state, other_seen, other_scores = other
    assert repr(values) == repr(other_values), "a step differs"
    assert state.keys() == other_state.keys()
    for key, value in state.items():
        other = other_state[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    assert seen == other_seen and not any("POISON" in text for text in seen)
    assert torch.equal(scores, other_scores)


def folder_pair(cls, name, tmp_path):
    clean = trajectory(write_folders(tmp_path / "clean", cls, False), cls, name, False)
    return clean, trajectory(write_folders(tmp_path / "poisoned", cls, True), cls, name, True)


@pytest.mark.parametrize("name", list(registry.ALGORITHMS))
def test_poison_changes_no_step_of_any_algorithm(name, tmp_path):
    same(*folder_pair(datasets.get_dataset_class("PACSReasoning"), name, tmp_path))


@pytest.mark.parametrize("dataset", [name for name in FOLDERS if name != "PACSReasoning"])
def test_poison_changes_no_step_on_any_image_folder_dataset(dataset, tmp_path):
    same(*folder_pair(datasets.get_dataset_class(dataset), "RDMLDG", tmp_path))


def write_classes(root, poisoned):
    """PACS with four classes in two domains, and a chain for each image; the new classes "2" and "3" are poisoned."""
    pixels = np.random.RandomState(0)
    lines = []
    for domain, label, index in itertools.product(("art", "photo"), range(4), range(IMAGES)):
        place = root / "PACS" / domain / str(label)
        place.mkdir(parents=True, exist_ok=True)
        array, is_poison = pixels.randint(0, 256, (32, 32, 3), dtype=np.uint8), poisoned and label > 1
        Image.fromarray(255 - array if is_poison else array).save(place / f"{index}.png")
        text = chain_text("0", "POISON") if is_poison else chain_text(str(label), f"{domain} {index}")
        lines.append({"image": f"{domain}/{label}/{index}.png", "chain": text})
    (root / "PACS" / "reasoning.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.mark.parametrize("name", list(registry.ALGORITHMS))
def test_images_and_chains_of_new_classes_change_no_step(name, tmp_path):
    """Trained on the classes "0" and "1"; all that differs is what "2" and "3" look like, and their chains."""
    cls = datasets.get_dataset_class("PACSBaseToNew")
    roots = (write_classes(tmp_path / text, text == "poisoned") for text in ("clean", "poisoned"))
    same(*(trajectory(root, cls, name, False) for root in roots))


def test_poison_in_a_bundle_of_chains_changes_no_step(tmp_path, monkeypatch):
    """The same chains, but from the bundle that the dataset class names."""
    cls, runs = datasets.get_dataset_class("PACSReasoning"), []
    for name, poisoned in (("clean", False), ("poisoned", True)):
        root = write_folders(tmp_path / name, cls, poisoned)
        file = root / cls.FOLDER / "reasoning.jsonl"
        write_bundle(file, root / "chains.jsonl.xz")
        file.unlink()
        monkeypatch.setattr(cls, "BUNDLE", str(root / "chains.jsonl.xz"))
        runs.append(trajectory(root, cls, "RDMLDG", poisoned))
    same(*runs)


def test_poison_changes_no_step_on_a_users_own_dataset(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text('name = "Own"\nfolder = "own"\nenvironments = ["a", "b", "c"]\n')
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", str(tmp_path / "own.toml"))
    _, cls = make_classes(custom.custom_datasets()["Own"])
    same(*folder_pair(cls, "RDMLDG", tmp_path))


def test_poison_changes_no_step_on_the_rendered_dataset(monkeypatch):
    """ShapesReasoning is drawn, not read: for the poisoned run its renderer draws, names and tells something else."""
    from domainbed_reasoning.datasets import shapes as module

    cls = datasets.get_dataset_class("ShapesReasoning")
    clean = trajectory(None, cls, "RDMLDG", False)
    render, label, tell = shapes.render, shapes.label, shapes.chain

    def is_poison(domain, index):
        return domain == TARGET or index in validation(domain, shapes.SIZE_OF_DOMAIN)

    monkeypatch.setattr(
        shapes, "render", lambda d, i, **more: Image.new("RGB", (48, 48)) if is_poison(d, i) else render(d, i, **more)
    )
    monkeypatch.setattr(shapes, "label", lambda d, i: (label(d, i) + (d == TARGET)) % len(shapes.CLASS_NAMES))
    monkeypatch.setattr(
        shapes, "chain", lambda d, i, *of: chain_text("POISON", "POISON") if is_poison(d, i) else tell(d, i, *of)
    )
    module._picture.cache_clear()
    poisoned = trajectory(None, cls, "RDMLDG", True)
    module._picture.cache_clear()
    same(clean, poisoned)


@pytest.mark.parametrize("dataset", [name for name in registry.RENDERED if name != "ShapesReasoning"])
def test_poison_changes_no_step_on_rendered_creatures(dataset, monkeypatch):
    """As on ShapesReasoning: for the poisoned run the class draws, names and tells something else."""
    cls = datasets.get_dataset_class(dataset)
    clean = trajectory(None, cls, "RDMLDG", False)
    picture, labels, tell = cls.picture, cls.labels, cls.chain

    def is_poison(self, env, index):
        return env == TARGET or index in validation(env, len(labels(self, env)))

    def drawn(self, env, index):
        return Image.new("RGB", (48, 48)) if is_poison(self, env, index) else picture(self, env, index)

    def named(self, env):
        return [(label + (env == TARGET)) % self.num_classes for label in labels(self, env)]

    def told(self, env, index):
        return chain_text("POISON", "POISON") if is_poison(self, env, index) else tell(self, env, index)

    for name, poison in (("picture", drawn), ("labels", named), ("chain", told)):
        monkeypatch.setattr(cls, name, poison)
    same(clean, trajectory(None, cls, "RDMLDG", True))


def test_poison_in_training_data_is_detected(tmp_path):
    """The comparison can fail: other pixels in one source image change the first step."""
    cls = datasets.get_dataset_class("PACSReasoning")
    clean = trajectory(write_folders(tmp_path / "clean", cls, False), cls, "LabelSFT", False)
    root = write_folders(tmp_path / "other", cls, False)
    for file in (root / cls.FOLDER / "domain00").rglob("*.png"):
        Image.new("RGB", (32, 32)).save(file)
    with pytest.raises(AssertionError, match="a step differs"):
        same(clean, trajectory(root, cls, "LabelSFT", False))


@pytest.mark.parametrize("name", ["RDMLDG"])
def test_the_same_arguments_give_the_same_numbers(name, tmp_path):
    """On a CPU, with sampled self-labels: nothing but the seeds decides."""
    cls = datasets.get_dataset_class("PACSReasoning")
    root = write_folders(tmp_path, cls, False)
    same(trajectory(root, cls, name, False), trajectory(root, cls, name, False))
