"""What a built model can do, by the package's own class scores."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from domainbed_reasoning.chains.prompts import q_cls, readable_name
from domainbed_reasoning.mllm.pixels import from_picture
from examples.real_small.align import LONGEST_NAME, short_names
from examples.real_small.pictures import Picture, draw
from examples.real_small.questions import options_for
from examples.real_small.sample import images_in


@torch.no_grad()
def one_of_four(mllm: Any, pictures: Sequence[Picture], held_out: Sequence[int], count: int, seed: int) -> float:
    """Return the share of held-out pictures whose name scores highest among four; chance is 0.25.

    Args:
        mllm: the model.
        pictures: all pictures.
        held_out: indices of those that were not trained on.
        count: at most so many of them are asked about.
        seed: of the choice of pictures and options.
    """
    rng, names = random.Random(seed), short_names(pictures)
    asked = [index for index in held_out if len(pictures[index].name.split()) <= LONGEST_NAME]
    asked = rng.sample(asked, min(count, len(asked)))
    right = 0
    for index in tqdm(asked, desc="held-out pictures", unit="picture"):
        picture = pictures[index]
        options = options_for(picture.name, picture, names, 4, rng)
        pixels = torch.from_numpy(np.array(draw(picture.path, 0, rng))).permute(2, 0, 1)[None]
        scores = mllm.class_scores(pixels, q_cls(options), options)[0]
        right += options[int(scores.argmax())] == picture.name
    return right / len(asked)


@torch.no_grad()
def zero_shot(mllm: Any, folder: pathlib.Path, rows: int = 16) -> dict[str, dict[str, float]]:
    """Return for each domain of an image folder the accuracy of the label path and how often each class is answered.

    Args:
        mllm: the model.
        folder: ``<domain>/<class>/<image>``.
        rows: images at a time.
    """
    domains = sorted(path for path in folder.iterdir() if path.is_dir())
    classes = sorted(path.name for path in domains[0].iterdir() if path.is_dir())
    names = [readable_name(name) for name in classes]
    to_pixels = from_picture(mllm.image_size)
    result = {}
    for domain in domains:
        files = [(label, path) for label, name in enumerate(classes) for path in images_in(domain / name)]
        answers = []
        for start in tqdm(range(0, len(files), rows), desc=domain.name, unit="batch"):
            pixels = torch.stack(
                [to_pixels(Image.open(path).convert("RGB")) for _, path in files[start : start + rows]]
            )
            answers += mllm.class_scores(pixels, q_cls(names), names).argmax(1).tolist()
        right = sum(answer == label for answer, (label, _) in zip(answers, files, strict=True))
        shares = {name: round(answers.count(at) / len(files), 3) for at, name in enumerate(names)}
        result[domain.name] = {"images": len(files), "accuracy": round(right / len(files), 4), "answered": shares}
    return result
