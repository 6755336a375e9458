"""Image file names that a chain file cannot contain, and names in two Unicode normal forms."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from builders.files import chain_text, write_images, write_lines
from builders.training import build_dataset
from domainbed_reasoning.annotate.pipeline import plan
from domainbed_reasoning.bridge.samples import task_of
from domainbed_reasoning.chains.chain import match_class
from domainbed_reasoning.chains.image_names import ImageLookup, image_name_problems
from domainbed_reasoning.chains.store import ChainFileError, load_chains
from domainbed_reasoning.images.catalog import STOCK, scan

LONG = "The outline is round and the parts are few; " * 5
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
UNUSABLE = {
    "latin-1": b"photo/dog/caf\xe9.png",
    "backslash": b"photo/dog/a\\b.png",
    "latin-1 folder": b"photo/dog/\xfcbung/0.png",
    "backslash folder": b"photo/dog/a\\b/0.png",
}


def picture(data: Path, path: bytes, shade: int = 0) -> None:
    place = os.path.join(os.fsencode(data / "PACS"), path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "wb") as file:
        Image.new("RGB", (20, 20), (shade, 9, 9)).save(file, "PNG")


@pytest.fixture
def pacs(tmp_path: Path) -> Path:
    """A PACS of three images a domain and class, without chains."""
    write_images(tmp_path / "PACS", DOMAINS, CLASSES, 3)
    return tmp_path


def write_chains(data: Path, images: dict[str, str]) -> None:
    lines = [{"image": image, "chain": chain_text(name, reasoning=LONG)} for image, name in images.items()]
    write_lines(data / "PACS" / "reasoning.jsonl", lines)


def all_chains(data: Path) -> dict[str, str]:
    return {one.path: one.label for one in scan(STOCK["PACS"], data).pictures}


def build(data: Path, algorithm: str = "MTCT") -> tuple[Any, dict[str, Any]]:
    return build_dataset(algorithm, "PACSReasoning", data_dir=data, model="tiny")


@pytest.mark.parametrize("name", UNUSABLE.values(), ids=UNUSABLE)
def test_unstorable_image_name_is_reported_immediately(pacs: Path, verb: Any, name: bytes, tmp_path: Path) -> None:
    write_chains(pacs, all_chains(pacs))
    picture(pacs, name)
    shown = ascii(os.fsdecode(name))
    common = ("--dataset", "PACS", "--data_dir", pacs)
    code, out, _ = verb("check", *common)
    assert code == 1 and sum(shown in line and "Rename" in line for line in out.splitlines()) == 1
    for command in (
        ("annotate", "--teacher", "self:tiny"),
        ("annotate", "--teacher", "self:tiny", "--dry-run"),
        ("stats",),
        ("card", "--output", tmp_path / "card.md"),
        ("browse", "--output", tmp_path / "page.html"),
        ("export", tmp_path / "out.json", "--format", "llava"),
        ("import", pacs / "PACS" / "reasoning.jsonl"),
    ):
        code, out, err = verb(command[0], *command[1:], *common)
        assert code == 1 and shown in err and "Rename" in err, (command, out, err)
    with pytest.raises(ValueError, match="Rename") as raised:
        build(pacs)
    assert shown in str(raised.value)
    build(pacs, "ERM")  # stock takes any name


def test_a_job_on_such_a_name_ends_before_training(
    pacs: Path, domainbed_root: Path, run_stock: Any, tmp_path: Path
) -> None:
    write_chains(pacs, all_chains(pacs))
    picture(pacs, UNUSABLE["latin-1"])
    done = run_stock(
        domainbed_root, "train", "--data_dir", pacs, "--dataset", "PACSReasoning", "--algorithm", "MTCT",
        "--test_envs", "3", "--steps", "1", "--hparams", '{"model": "tiny", "batch_size": 2}',
        "--output_dir", tmp_path / "out", cwd=tmp_path, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr  # the train script copies what it prints to out.txt
    assert done.returncode and "is not UTF-8. Rename it" in printed and "caf\\udce9.png" in printed
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize("on_disk, in_chains", [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_chains_find_their_images_whatever_the_unicode_form(
    pacs: Path, verb: Any, on_disk: str, in_chains: str, tmp_path: Path
) -> None:
    picture(pacs, f"photo/dog/{on_disk}.png".encode())
    images = {f"photo/dog/{in_chains}.png": "dog"}
    write_chains(pacs, images)
    _, hparams = build(pacs)
    task = task_of(hparams)
    assert task is not None
    ((env, index),) = task.chains
    assert task.images[env][index] == f"photo/dog/{on_disk}.png"
    common = ("--dataset", "PACS", "--data_dir", pacs)
    assert "1 of 85 images have a chain" in verb("check", *common)[1]
    assert "are not in the dataset" not in verb("stats", *common)[1]
    assert "Wrote 1 chains to" in verb("export", tmp_path / "out.json", "--format", "llava", *common)[1]
    # The image has a chain already, under whichever name; into an empty file the name goes as on disk.
    code, out, err = verb("import", tmp_path / "out.json", *common)
    assert code == 0 and "rejected (second)" in out, err
    assert verb("import", tmp_path / "out.json", *common, "--chains", tmp_path / "new.jsonl")[0] == 0
    assert json.loads((tmp_path / "new.jsonl").read_text("utf-8"))["image"] == f"photo/dog/{on_disk}.png"


def test_annotated_image_is_not_requested_again_in_another_unicode_form(pacs: Path) -> None:
    picture(pacs, f"photo/dog/{NFD}.png".encode())
    found = scan(STOCK["PACS"], pacs)
    names = ImageLookup(one.path for one in found.pictures)
    records = [names.with_path_on_disk({"image": f"photo/dog/{NFC}.png", "chain": ""})]
    jobs = plan(found.pictures, found.classes, records, "t", "1", 4, None)
    assert len(jobs) == len(found.pictures) - 1 and NFD not in "".join(job.picture.path for job in jobs)


def test_two_chains_of_an_image_in_two_forms_are_two(pacs: Path) -> None:
    picture(pacs, f"photo/dog/{NFC}.png".encode())
    write_chains(pacs, {f"photo/dog/{NFC}.png": "dog", f"photo/dog/{NFD}.png": "dog"})
    with pytest.raises(ChainFileError, match="line 2: a second accepted chain"):
        load_chains(pacs / "PACS" / "reasoning.jsonl", [f"photo/dog/{NFC}.png"])


def test_two_images_of_the_same_name_in_two_forms_are_refused(pacs: Path, verb: Any) -> None:
    write_chains(pacs, all_chains(pacs))
    for form in (NFC, NFD):
        picture(pacs, f"photo/dog/{form}.png".encode())
    assert "the same name in two Unicode forms" in verb("check", "--dataset", "PACS", "--data_dir", pacs)[1]
    with pytest.raises(ValueError, match="the same name in two Unicode forms"):
        build(pacs)


def test_a_class_folder_may_be_in_another_form_in_another_domain(pacs: Path, verb: Any) -> None:
    """One class, whose name in prompts is the composed one, and the answer is read in either form."""
    for domain in DOMAINS:
        for name in CLASSES[1:]:
            for file in (pacs / "PACS" / domain / name).iterdir():
                file.unlink()
            (pacs / "PACS" / domain / name).rmdir()
        (pacs / "PACS" / domain / "dog").rename(pacs / "PACS" / domain / "zebra")
        form = NFC if domain == "photo" else NFD
        for index in range(3):
            picture(pacs, f"{domain}/{form}/{index}.png".encode())
    found = scan(STOCK["PACS"], pacs)
    assert len(found.classes) == 2 and not found.missing and len(found.pictures) == 24
    write_chains(pacs, {one.path: NFD if one.label != "zebra" else "zebra" for one in found.pictures})
    dataset, hparams = build(pacs)
    task = task_of(hparams)
    assert task is not None and task.class_names == (NFC, "zebra") and len(task.chains) == 18
    assert match_class(NFD, task.class_names) == match_class(NFC, task.class_names) == 0


def test_unusual_but_storable_names_are_accepted(pacs: Path, verb: Any, tmp_path: Path) -> None:
    odd = ["line\nbreak", "\x1b[31mred", "\u202etxt", " ", "#?%2e", "'\"", "x" * 250, "\U0001f415", "UPPER"]
    for name in odd:
        picture(pacs, f"photo/dog/{name}.{'PNG' if name == 'UPPER' else 'png'}".encode())
    write_chains(pacs, all_chains(pacs))
    _, hparams = build(pacs)
    task = task_of(hparams)
    assert task is not None and len(task.chains) == 63 + len(odd)
    common = ("--dataset", "PACS", "--data_dir", pacs)
    for command in (
        ("check", *common),
        ("stats", *common),
        ("browse", "--output", tmp_path / "page.html", *common),
        ("export", tmp_path / "out.json", "--format", "llava", *common),
        ("import", tmp_path / "out.json", *common),
    ):
        _, out, err = verb(*command)
        assert not any(char in out + err for char in "\x1b\u202e"), command
        assert "Traceback" not in err and "Rename" not in out + err, (command, out, err)


def test_name_problems_are_found_without_a_disk() -> None:
    names = ["a/b/0.png", "a/b/\udce9.png", "C:/b/0.png", "a/b\\0.png", f"a/{NFC}", f"a/{NFD}"]
    failures = list(image_name_problems(names))
    assert len(failures) == 4
    assert all("Rename" in failure for failure in failures)
    assert not list(image_name_problems(["a/b/0.png", f"a/{NFC}", f"b/{NFD}"]))
