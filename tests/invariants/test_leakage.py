"""Target domains reach nothing that is trained: whatever is in them, every algorithm takes the same steps."""

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

from domainbed_reasoning import registry
from domainbed_reasoning.chains import Chain

DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
CLASSES = ["dog", "guitar"]
TARGET = 1


def chain(name, caption):
    return Chain("I look.", caption, "It fits.", "Nothing misleads.", name).render()


def write_pacs(root, poisoned):
    """A small PACS with a chain an image. Poison: the target's pixels, labels and chains are others."""
    pixels = np.random.RandomState(0)
    lines = []
    for env, domain in enumerate(DOMAINS):
        for name in CLASSES:
            folder = root / "PACS" / domain / name
            folder.mkdir(parents=True)
            for index in range(5):
                array = pixels.randint(0, 256, (50, 50, 3), dtype=np.uint8)
                is_poison = poisoned and env == TARGET
                Image.fromarray(255 - array if is_poison else array).save(folder / f"{index}.png")
                text = chain("guitar" if is_poison else name, "POISON" if is_poison else f"{domain} {index}")
                lines.append({"image": f"{domain}/{name}/{index}.png", "chain": text})
    if poisoned:  # the labels: the two class folders change places
        folder = root / "PACS" / DOMAINS[TARGET]
        shutil.move(folder / "dog", folder / "x")
        shutil.move(folder / "guitar", folder / "dog")
        shutil.move(folder / "x", folder / "guitar")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "PACS" / "reasoning.jsonl").write_text(text)
    return root


def trajectory(root, name):
    """Train as DomainBed's script does, target domain left out; return each step's values and the final adapters."""
    hparams = hparams_registry.default_hparams(name, "PACSReasoning")
    hparams |= {
        "model": "tiny",
        "clip_model": "tiny",
        "clip_epochs": 1,
        "max_new_tokens": 30,
        "batch_size": 2,
        "mtct_epochs": 1,
        "workers": 0,
        "dtype": "float32",
    }
    if "sarr_rounds" in hparams:
        hparams |= {"sarr_rounds": 1, "sarr_epochs": 1, "temperature": 0.7}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    dataset = datasets.get_dataset_class("PACSReasoning")(str(root), [TARGET], hparams)
    splits = [misc.split_dataset(env, int(len(env) * 0.2), misc.seed_hash(0, i)) for i, env in enumerate(dataset)]
    loaders = [
        InfiniteDataLoader(dataset=in_, weights=None, batch_size=2, num_workers=0)
        for i, (_, in_) in enumerate(splits)
        if i != TARGET
    ]
    algorithm = algorithms.get_algorithm_class(name)(dataset.input_shape, 2, 3, hparams)
    seen = []
    if hasattr(algorithm, "mllm"):
        log_likelihoods = algorithm.mllm.target
        algorithm.mllm.target = lambda answer: seen.append(answer) or log_likelihoods(answer)
    batches = zip(*loaders, strict=True)
    values = [algorithm.update([tuple(batch) for batch in next(batches)]) for _ in range(dataset.N_STEPS)]
    return values, algorithm.state_dict(), seen


@pytest.mark.parametrize("name", list(registry.ALGORITHMS))
def test_poisoned_targets_change_no_step(name, tmp_path):
    values, adapters, seen = trajectory(write_pacs(tmp_path / "clean", False), name)
    others, other_adapters, others_seen = trajectory(write_pacs(tmp_path / "poisoned", True), name)
    assert values == others
    assert adapters.keys() == other_adapters.keys()
    assert all(torch.equal(adapters[key], other_adapters[key]) for key in adapters)
    assert seen == others_seen and not any("POISON" in text for text in seen)
