"""Files and folders: JSON lines, image folders, chains, and other objects in a file's place."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.prompts import PROMPT_VERSION

# A sound task.json of the embedded model.
HPARAMS: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "quantize": "none",
    "max_tiles": 1,
    "answer": "label",
    "eval_batch": 4,
    "max_new_tokens": 4,
    "lora_rank": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "lora_targets": "both",
    "lora_projector": False,
}
TASK: dict[str, Any] = {
    "algorithm": "LabelSFT",
    "dataset": "PACSReasoning",
    "subject": "object",
    "class_names": ["dog", "cat"],
    "environments": ["art", "photo"],
    "test_envs": [1],
    "prompt_version": PROMPT_VERSION,
    "version": "0.1.0",
    "hparams": HPARAMS,
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write a JSON lines file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def chain_text(conclusion: str, caption: str = "A thing.", reasoning: str = "It fits.") -> str:
    """Return a well-formed chain that concludes so."""
    return Chain("I look.", caption, reasoning, "Nothing misleads.", conclusion).render()


def plain_picture(domain: int, label: int, index: int) -> Image.Image:
    """Return a picture of one color, another for each of up to three domains, four classes and five images."""
    return Image.new("RGB", (40, 40), (90 * domain, 60 * label, 50 * index))


def write_images(
    root: Path,
    domains: Iterable[str],
    classes: Iterable[str],
    count: int,
    picture: Callable[[int, int, int], Image.Image] = plain_picture,
    name: str = "{index}.png",
) -> list[str]:
    """Write ``root/domain/class/name`` images, and return their paths below ``root``."""
    written = []
    for domain_number, domain in enumerate(domains):
        for class_number, label in enumerate(classes):
            (root / domain / label).mkdir(parents=True)
            for index in range(count):
                written.append(f"{domain}/{label}/{name.format(index=index, label=label)}")
                picture(domain_number, class_number, index).save(root / written[-1])
    return written


def define_toy(monkeypatch: pytest.MonkeyPatch, folder: Path, more: str = "") -> Path:
    """Let the process know a dataset Toy of two domains, and return its data_dir, still without images."""
    file = folder / "toy.toml"
    file.write_text(f'name = "Toy"\nfolder = "toy"\nenvironments = ["a", "b"]\n{more}', "utf-8")
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", str(file))
    return folder / "data"


def write_chains(root: Path, images: Iterable[str]) -> Path:
    """Write ``root/reasoning.jsonl`` with a chain an image that concludes its class folder's name."""
    lines = [{"image": image, "chain": chain_text(image.split("/")[1], image)} for image in images]
    return write_lines(root / "reasoning.jsonl", lines)


def torch_bytes(value: Any, **options: Any) -> bytes:
    """Return what `torch.save` writes."""
    import torch

    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def write_job(folder: Path, task: Any, checkpoint: Any) -> Path:
    """Write a job's ``task.json`` and ``model.pkl``, of values or of bytes as they are."""
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_bytes(task if isinstance(task, bytes) else json.dumps(task).encode())
    (folder / "model.pkl").write_bytes(checkpoint if isinstance(checkpoint, bytes) else torch_bytes(checkpoint))
    return folder


# In a file's place; each takes its path.


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def make_terabyte(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def link_to(target: str | Path) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)
