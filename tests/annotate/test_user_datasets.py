"""A user's image folders: found by every process, registered under two names, errors reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domainbed_reasoning import registry
from domainbed_reasoning.datasets.user_datasets import make_classes
from domainbed_reasoning.images.catalog import STOCK, scan
from domainbed_reasoning.images.user_datasets import DatasetFileError, custom_datasets, find, read_dataset

GOOD = 'name = "Camera"\nfolder = "camera"\nenvironments = ["day", "night"]\n'


def write(folder: Path, text: str, name: str = "camera.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8")
    return folder / name


def test_files_are_found_in_the_config_folder_and_under_the_variables_paths(tmp_path: Path) -> None:
    write(tmp_path / "config" / "domainbed-reasoning" / "datasets", GOOD)
    other = write(tmp_path / "other", GOOD.replace("Camera", "Other"), "o.toml")
    more = write(tmp_path / "more", GOOD.replace("Camera", "More"))
    environ = {
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "DOMAINBED_REASONING_DATASETS": f"{other}:{more.parent}",
    }
    assert list(custom_datasets(environ)) == ["Camera", "More", "Other"]
    assert find("MoreReasoning", environ).folder == "camera"
    with pytest.raises(ValueError, match="Did you mean 'Camera'"):
        find("Camrea", environ)
    broken = environ | {"DOMAINBED_REASONING_DATASETS": str(tmp_path / "nowhere")}
    assert find("PACSReasoning", broken).name == "PACS" and find("Camera", broken).folder == "camera"
    with pytest.raises(ValueError, match="nowhere: named in .*, but no such file"):  # it may describe More
        find("More", broken)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("name = ", "not TOML"),
        ('name = "A"\nfolder = "a"\n', "the key 'environments' is missing"),
        (GOOD + "subjct = 'x'\n", "Unknown key 'subjct'. Did you mean 'subject'"),
        (GOOD.replace('"camera"', "3"), "'folder' must be a str"),
        (GOOD.replace("Camera", "My Camera"), "'name' must be a Python name"),
        (GOOD.replace("Camera", "CameraReasoning"), "does not end in 'Reasoning'"),
        (GOOD.replace("Camera", "PACS"), "one of DomainBed's own"),
        (GOOD.replace("Camera", "RotatedMNIST"), "one of DomainBed's own"),
        (GOOD.replace("Camera", "Debug28"), "one of DomainBed's own"),
        (GOOD.replace("Camera", "Shapes"), "'ShapesReasoning' is one of this package's datasets, or a plug-in's"),
        (GOOD.replace('"camera"', '"../camera"'), "must be below --data_dir"),
        (GOOD.replace('["day", "night"]', '["day"]'), "at least two domains"),
        (GOOD + "checkpoint_freq = 0\n", "'checkpoint_freq' must be in"),
        (GOOD + "checkpoint_freq = true\n", "must be a int"),
        (GOOD + '[class_names]\na = "Red  fox"\nb = "red fox"\n', "two classes have the name 'red fox'"),
    ],
)
def test_invalid_file_error_gives_file_and_problem(tmp_path: Path, text: str, failure: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DatasetFileError, match=failure) as error:
        read_dataset(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "failure"),
    [("MultipleDomainDataset", "already has {!r}"), ("ReasoningImageFolder", "{!r} is used by this package")],
)
def test_name_collision_with_domainbed_is_reported_and_stock_works(
    tmp_path: Path, domainbed_root: Path, run_stock: Any, name: str, failure: str
) -> None:
    """Nobody is told to uninstall or mend this package for it."""
    path = write(tmp_path, GOOD.replace("Camera", name))
    done = run_stock(
        domainbed_root,
        "train",
        *("--data_dir", tmp_path, "--dataset", "Debug28", "--algorithm", "ERM", "--output_dir", tmp_path / "out"),
        *("--steps", 1, "--hparams", '{"batch_size": 4}'),
        cwd=tmp_path,
        env={"DOMAINBED_REASONING_DATASETS": str(path)},
    )
    (printed,) = [line for line in done.stderr.splitlines() if line.startswith("domainbed-reasoning: ")]
    assert str(path) in printed and failure.format(name) in printed and "install" not in printed


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert read_dataset(write(tmp_path, "\ufeff" + GOOD)).name == "Camera"


def test_duplicate_names_and_missing_paths_are_rejected(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "a.toml")
    write(tmp_path, GOOD, "b.toml")
    environ = {"HOME": str(tmp_path), "DOMAINBED_REASONING_DATASETS": str(tmp_path)}
    with pytest.raises(DatasetFileError, match="is taken by .*a.toml"):
        custom_datasets(environ)
    environ["DOMAINBED_REASONING_DATASETS"] = str(tmp_path / "none")
    with pytest.raises(DatasetFileError, match="no such file or folder"):
        custom_datasets(environ)


def test_domainbeds_own_commands_know_the_dataset_under_both_names(
    toy: Path, domainbed_root: Path, run_stock: Any, tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    """A stock sweep lists jobs on both, and stock training runs ERM on each with the same first numbers."""
    path = toy / "toy" / "reasoning.jsonl"
    path.write_text(json.dumps({"image": "art/Mug/Mug_0.png", "chain": chain_text("mug")}) + "\n", "utf-8")
    small = json.dumps({"batch_size": 2, "resnet18": True, "data_augmentation": False})
    arguments = ("--data_dir", toy, "--datasets", "Toy", "ToyReasoning", "--algorithms", "ERM", "MLLMZeroShot")
    done = run_stock(
        domainbed_root,
        "sweep",
        *("launch", *arguments, "--command_launcher", "dummy", "--skip_confirmation"),
        *("--output_dir", tmp_path / "sweep", "--n_trials", 1, "--n_hparams", 1),
        *("--single_test_envs", "--hparams", small),
        cwd=tmp_path,
    )
    assert done.stdout.count("Dummy launcher") == 8
    assert "ToyReasoning" in done.stdout


@pytest.mark.parametrize("name", ["Toy", "ToyReasoning"])
def test_domains_that_are_listed_in_another_order_than_their_folders_are_refused(
    toy: Path, verb: Any, tmp_path: Path, name: str
) -> None:
    """With "photo" first, numbers of art would be printed under photo; "P" and "a" say nothing of the order."""
    file = tmp_path / "definitions" / "toy.toml"
    file.write_text(file.read_text().replace('["A", "P"]', '["Photo", "A"]'))
    message = f"{file}: 'environments' lists Photo, A, the sorted domain folders are art, photo"
    code, out, _ = verb("check", "--dataset", name, "--data_dir", toy, "--no-images")
    assert code == 1 and f"PROBLEM {message}" in out
    cls = next(cls for cls in make_classes(find("Toy")) if cls.__name__ == name)
    with pytest.raises(ValueError, match=re.escape(message) + ".*the order of their folders"):
        cls(str(toy), [1], {"data_augmentation": False})


def test_a_class_without_an_image_in_a_domain_is_named_with_both(toy: Path) -> None:
    for path in (toy / "toy" / "photo" / "Bike").iterdir():
        path.unlink()
    for cls in make_classes(find("Toy")):
        with pytest.raises(FileNotFoundError, match="no image of the class 'Bike' in the domain 'photo'"):
            cls(str(toy), [1], {"data_augmentation": False})


def test_domains_with_other_classes_are_refused_for_baselines_too(toy: Path) -> None:
    """DomainBed numbers the classes of each domain by themselves."""
    (toy / "toy" / "photo" / "Bike").rename(toy / "toy" / "photo" / "Zebra")
    for cls in make_classes(find("Toy")):
        with pytest.raises(ValueError, match=r"art and photo have different class folders \(Bike, Zebra\)"):
            cls(str(toy), [1], {"data_augmentation": False})


def test_an_mllm_gets_readable_names_the_subject_and_the_chains(
    toy: Path, domainbed_root: Path, run_stock: Any, tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    path = toy / "toy" / "reasoning.jsonl"
    lines = [{"image": f"art/Mug/Mug_{i}.png", "chain": chain_text("mug")} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    hparams = json.dumps({"model": "tiny", "batch_size": 2, "workers": 0, "max_new_tokens": 4})
    run_stock(
        domainbed_root,
        "train",
        *("--data_dir", toy, "--dataset", "ToyReasoning", "--algorithm", "MTCT", "--test_envs", 1),
        *("--hparams", hparams, "--steps", 2, "--output_dir", tmp_path / "out", "--skip_model_save"),
        cwd=tmp_path,
    )
    assert (tmp_path / "out" / "done").exists()
    out = (tmp_path / "out" / "out.txt").read_text()
    assert "ToyReasoning, art: 3 of 9 images have a chain" in out
    assert out.count("The model tiny was never trained on photographs") == 1


def test_verbs_support_new_dataset_classes(
    toy: Path, verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CONTRIBUTING has it: one class, one line in the table of names; no TOML file, no entry in the catalog."""
    monkeypatch.delenv("DOMAINBED_REASONING_DATASETS")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "new_dataset.py").write_text(
        "from domainbed import datasets as stock\n"
        "from domainbed_reasoning.datasets.image_folders import ReasoningImageFolder\n"
        "class GadgetsReasoning(ReasoningImageFolder, stock.MultipleEnvironmentImageFolder):\n"
        "    FOLDER, SUBJECT, ENVIRONMENTS = 'toy', 'gadget', ['A', 'P']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setitem(registry.DATASETS, "GadgetsReasoning", "new_dataset:GadgetsReasoning")
    for name in ("Gadgets", "GadgetsReasoning"):
        code, out, err = verb("check", "--dataset", name, "--data_dir", toy)
        assert code == 0 and "What type of gadget is in this photo?" in out and "18 of 18 images" in out, out + err
    assert "Gadgets          toy/  2 domains, subject: gadget" in verb("check", "--list")[1]
    code, out, err = verb("annotate", "--dataset", "Gadgets", "--data_dir", toy, "--teacher", "self:tiny", "--dry-run")
    assert code == 0 and "18" in out, err
    with pytest.raises(ValueError, match="Did you mean 'Gadgets'"):
        find("Gadgetz")
    with pytest.raises(ValueError, match="Unknown image-folder dataset 'ShapesReasoning'"):
        find("ShapesReasoning")


def test_plan_counts_a_user_dataset_on_disk(toy: Path, verb: Any) -> None:
    for name in ("Toy", "ToyReasoning"):
        code, out, _ = verb("plan", "--dataset", name, "--data_dir", toy, "--model", "tiny")
        assert code == 0 and "RDMLDG on Toy (18 images, 2 domains, 3 classes)" in out
    code, _, err = verb("plan", "--dataset", "Toy", "--model", "tiny")
    assert code == 1 and "Pass --data-dir, the folder that contains toy/" in err


def test_the_catalog_agrees_with_the_dataset_classes() -> None:
    for name, dataset in STOCK.items():
        cls = registry.load(registry.DATASETS[f"{name}Reasoning"])
        assert (cls.FOLDER, cls.SUBJECT, dict(cls.READABLE)) == (
            dataset.folder,
            dataset.subject,
            dict(dataset.readable) if cls.READABLE else {},
        )
        assert tuple(cls.ENVIRONMENTS) == dataset.environments
        assert len(dataset.domains) == len(dataset.environments)


def test_published_counts_add_up_to_the_published_totals() -> None:
    totals = {"PACS": 9991, "VLCS": 10729, "OfficeHome": 15588, "TerraIncognita": 24330, "DomainNet": 586575}
    assert {name: STOCK[name].total for name in totals} == totals
    assert STOCK["SVIRO"].total is None and STOCK["SVIRO"].other_totals[0][0] == 56000
    assert 4879 + 9767 + 4020 + 6122 == STOCK["TerraIncognita"].other_totals[0][0] == 24788


def test_scan_follows_image_folder(toy: Path) -> None:
    (toy / "toy" / "art" / "Mug" / "deep").mkdir()
    (toy / "toy" / "art" / "Mug" / "deep" / "x.JPEG").touch()
    (toy / "toy" / "art" / "Mug" / "notes.txt").touch()
    (toy / "toy" / "README.md").touch()
    on_disk = scan(find("Toy"), toy)
    assert on_disk.domains == ("art", "photo") and on_disk.classes == ("Alarm_Clock", "Bike", "Mug")
    assert on_disk.per_domain() == {"art": 10, "photo": 9} and not on_disk.missing
    from torchvision.datasets import ImageFolder

    for domain in on_disk.domains:
        theirs = [path for path, _ in ImageFolder(str(on_disk.root / domain)).samples]
        ours = [str(on_disk.root / picture.path) for picture in on_disk.pictures if picture.domain == domain]
        assert ours == theirs
