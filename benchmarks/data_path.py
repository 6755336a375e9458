"""Our loader's images against stock DomainBed's, on the same files: 227 x 227 JPEGs like PACS's, in one process.

Training: DomainBed crops, flips, jitters and greys at 224 pixels; ours squeezes to the model's 448, as bytes.
Evaluation: both only resize, so they are compared at one size, 224.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import small_internvl
from benchmarks.measure import REPEATS, BenchmarkRow, interleaved, medians, ratio_of, use_domainbed
from domainbed_reasoning import registry
from domainbed_reasoning.chains.chain import Chain

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PER_CLASS = 16
BATCH = 32


def write_images(root: pathlib.Path) -> str:
    """Write pictures in PACS's layout; return the data folder."""
    dice = np.random.RandomState(0)
    lines = []
    for domain in DOMAINS:
        for name in CLASSES:
            folder = root / "PACS" / domain / name
            folder.mkdir(parents=True)
            for index in range(PER_CLASS):
                coarse = Image.fromarray(dice.randint(0, 256, (24, 24, 3), dtype=np.uint8))
                fine = np.asarray(coarse.resize((227, 227), Image.Resampling.BICUBIC), dtype=np.int16)
                noisy = (fine + dice.randint(-8, 9, fine.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)
                chain = Chain("look", "a thing", "its parts", "nothing", name).render()
                lines.append(json.dumps({"image": f"{domain}/{name}/{index}.jpg", "chain": chain}))
    (root / "PACS" / "reasoning.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root)


def loaders(root: str, model: str) -> dict[str, Any]:
    """Return stock's and our first environment, for training (a source domain) and for evaluation (the target)."""
    from domainbed import datasets, hparams_registry

    stock = hparams_registry.default_hparams("ERM", "PACS")
    ours = hparams_registry.default_hparams("MTCT", "PACSReasoning") | {"model": model}
    cls = vars(datasets)
    environments = {}
    for use, target in (("training", 3), ("evaluation", 0)):
        environments["stock", use] = cls["PACS"](root, [target], stock)[0]
        environments["ours", use] = cls["PACSReasoning"](root, [target], dict(ours))[0]
    return environments


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of the data path."""
    use_domainbed()
    assert "PACSReasoning" in registry.DATASETS
    from domainbed.lib.fast_data_loader import FastDataLoader

    root = write_images(work / "data")
    large = small_internvl.build(work / "448", small_internvl.SCORING)
    small = small_internvl.build(work / "224", small_internvl.SCORING, edge=224)
    rows = []
    for use, model, edge in (("training", large, 448), ("evaluation", small, 224)):
        environments = loaders(root, model)

        def read(whose: str, use: str = use, environments: dict[str, Any] = environments) -> int:
            loader = FastDataLoader(environments[whose, use], batch_size=BATCH, num_workers=0)
            return sum(len(x) for x, _ in loader)

        assert read("ours") == read("stock") == len(CLASSES) * PER_CLASS
        ours, stock = environments["ours", use], environments["stock", use]
        assert ours[0][0].shape == (3, edge, edge) and ours[0][0].dtype == torch.uint8
        same = [ours[i][1] for i in range(len(ours))] == [stock[i][1] for i in range(len(stock))]
        seconds = interleaved({"ours": lambda: read("ours"), "stock": lambda: read("stock")}, repeats)  # noqa: B023
        middle, ratio = medians(seconds), ratio_of(seconds, "ours", "stock")
        rows.append(
            BenchmarkRow(
                f"loading {len(ours)} images for {use}, {edge} pixels",
                "stock DomainBed's loader, 224 pixels",
                middle["ours"],
                middle["stock"],
                "s",
                float("nan"),
                "at most 1.10 times: 0.91",
                ratio <= 1.10,
                "same labels" if same else "LABELS DIFFER",
            )
        )
    return rows
