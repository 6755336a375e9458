"""Datasets from tables, as stock scripts run them: baselines, MLLM algorithms, chains by path and by SHA-256."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from builders.domainbeds import STAND_IN, UPSTREAM
from builders.files import chain_text, read_lines, write_lines
from builders.processes import environment
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.chains.build_bundle import write_bundle

DOMAINS, CLASSES = ("day", "night"), ("bike", "mug")
TOML = 'name = "Camera"\nfolder = "camera"\nenvironments = ["night", "day"]\ntable = "images.csv"\n'


@pytest.fixture
def camera(tmp_path):
    """Twelve images in one folder without any order, listed by a table; the same as class folders; definitions."""
    data, pixels = tmp_path / "data", np.random.RandomState(0)
    (data / "camera" / "all").mkdir(parents=True)
    rows, chains = ["path,label,domain,split"], []
    for index in range(24):
        domain, label = DOMAINS[index % 2], CLASSES[index // 2 % 2]
        image = Image.fromarray(pixels.randint(0, 256, (40, 50, 3), dtype=np.uint8))
        path = f"all/{index:02d}.png"
        image.save(data / "camera" / path)
        folder = data / "folders" / {"night": "0_night", "day": "1_day"}[domain] / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:02d}.png")
        rows.append(f"{path},{label},{domain},{'test' if index >= 20 else 'train'}")
        chains.append({"image": path, "chain": chain_text(label, path)})
    (data / "camera" / "images.csv").write_text("\n".join(rows) + "\n")
    write_lines(data / "camera" / "reasoning.jsonl", chains)
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    (definitions / "camera.toml").write_text(TOML)
    (definitions / "folders.toml").write_text('name = "Folders"\nfolder = "folders"\nenvironments = ["n", "d"]\n')
    return tmp_path


def run(place, script, **variables):
    """Run Python code in a process that knows the definitions; return its last line as JSON."""
    environ = environment(UPSTREAM or STAND_IN) | {
        "DOMAINBED_REASONING_DATASETS": str(place / "definitions"),
        **variables,
    }
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


START = """
import hashlib, json, random, sys
import numpy as np, torch
from domainbed import datasets, hparams_registry

def build(name, algorithm, test_envs=(1,), **changes):
    hparams = hparams_registry.default_hparams(algorithm, name) | changes
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    return vars(datasets)[name]("data", list(test_envs), hparams)

def digest(dataset):
    # The folders' order within a domain is by class and name, the table's by row: items are compared as a set.
    items = [(hashlib.sha256(x.numpy().tobytes()).hexdigest(), int(y)) for env in dataset for x, y in env]
    return sorted(items)
"""


def test_a_baseline_gets_the_tensors_and_hparams_of_class_folders(camera):
    """Without augmentation, which draws random numbers in the order of images."""
    said = run(
        camera,
        START
        + """
names = ("Camera", "CameraReasoning", "Folders")
table, twin, folders = (build(name, "ERM", data_augmentation=False) for name in names)
print(json.dumps({
    "equal": digest(table) == digest(folders) == digest(twin),
    "sizes": [len(env) for env in table], "shape": table.input_shape, "classes": table.num_classes,
    "steps": [(d.N_STEPS, d.CHECKPOINT_FREQ, d.N_WORKERS) for d in (table, folders)],
    "hparams": hparams_registry.default_hparams("ERM", "Camera") == hparams_registry.default_hparams("ERM", "Folders"),
    "listed": [name in datasets.DATASETS for name in ("Camera", "CameraReasoning")],
    "environments": datasets.num_environments("Camera"),
}))""",
    )
    assert said["equal"] and said["hparams"] and said["listed"] == [True, True] and said["environments"] == 2
    assert said["sizes"] == [12, 12] and said["shape"] == [3, 224, 224] and said["classes"] == 2
    assert said["steps"][0] == said["steps"][1]


def test_an_mllm_algorithm_gets_images_names_and_source_chains_by_path(camera):
    said = run(
        camera,
        START
        + """
from domainbed_reasoning.bridge.samples import ids_of
d = build("CameraReasoning", "MTCT", model="tiny")
x, y = d[1][4]
print(json.dumps({"shape": x.shape, "ids": ids_of(x).tolist(), "y": y, "image": d.task.images[1][4],
    "chains": sorted({env for env, _ in d.task.chains}), "count": len(d.task.chains), "classes": d.task.class_names,
    "domains": d.task.environments}))""",
    )
    assert said["shape"] == [3, 48, 48] and said["ids"] == [1, 4]
    assert said["image"] == "all/08.png" and said["y"] == 0
    assert said["chains"] == [0] and said["count"] == 12  # none of the target's
    assert said["classes"] == ["bike", "mug"] and said["domains"] == ["night", "day"]


def test_chains_of_a_bundle_are_found_by_sha_256(camera):
    """The bundle is of copies with other names and folders; one line's image is in the table's other class."""
    from hashlib import sha256

    lines = []
    for index in range(12):
        content = (camera / "data" / "camera" / "all" / f"{index:02d}.png").read_bytes()
        label = CLASSES[index // 2 % 2]
        line = {"image": f"x/{label}/{index}.png", "chain": chain_text(label), "sha256": sha256(content).hexdigest()}
        lines.append(line | {"verdict": "accepted"})
    write_lines(camera / "chains.jsonl", lines)
    write_bundle(camera / "chains.jsonl", camera / "definitions" / "camera.jsonl.xz")
    (camera / "definitions" / "camera.toml").write_text(TOML + 'bundle = "camera.jsonl.xz"\n')
    said = run(
        camera,
        START
        + """
d = build("CameraReasoning", "MTCT", model="tiny", chains="bundled")
names = {d.task.images[env][index] for env, index in d.task.chains}
print(json.dumps(sorted(names)))""",
    )
    assert said == [f"all/{index:02d}.png" for index in range(1, 12, 2)]  # of the source domain, night


def test_domains_of_a_table_are_its_columns_not_its_folders(camera, monkeypatch):
    """All images are in one folder, and a folder that is called like a domain has the other's."""
    rows = (camera / "data" / "camera" / "images.csv").read_text().replace("all/01.png,", "day/01.png,")
    (camera / "data" / "camera" / "images.csv").write_text(rows)
    chains = read_lines(camera / "data" / "camera" / "reasoning.jsonl")
    chains[1]["image"] = "day/01.png"
    write_lines(camera / "data" / "camera" / "reasoning.jsonl", chains)
    (camera / "data" / "camera" / "day").mkdir()
    (camera / "data" / "camera" / "all" / "01.png").rename(camera / "data" / "camera" / "day" / "01.png")
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", str(camera / "definitions"))
    words = ["--dataset", "Camera", "--data_dir", str(camera / "data"), "--format", "jsonl", "--domains", "day"]
    assert cli.main(["export", str(camera / "day.jsonl"), *words]) == 0
    assert {one["image"] for one in read_lines(camera / "day.jsonl")} == {f"all/{i:02d}.png" for i in range(0, 24, 2)}


def test_a_sweep_of_a_baseline_and_an_mllm_algorithm_ends_in_stock_tables(camera, either_domainbed):
    """Stock's sweep and collect_results, with rows of one split alone."""
    (camera / "definitions" / "camera.toml").write_text(TOML + 'splits = ["train"]\n')
    environ = environment(either_domainbed) | {
        "DOMAINBED_REASONING_DATASETS": str(camera / "definitions"),
        "XDG_CACHE_HOME": str(camera / "cache"),
    }

    def stock(module, *words):
        command = [sys.executable, "-m", f"domainbed.scripts.{module}", *map(str, words)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=camera)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    hparams = {"batch_size": 2, "model": "tiny", "answer": "label", "both_answers": False, "resnet18": True}
    words = ("--data_dir", camera / "data", "--dataset", "CameraReasoning", "--algorithm", "LabelSFT", "--test_envs", 1)
    out = camera / "out" / "job"
    stock("train", *words, "--steps", 2, "--hparams", json.dumps(hparams), "--output_dir", out)
    record = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    assert {"env0_in_acc", "env1_out_acc"} <= record.keys()
    assert (out / "done").exists()
    table = stock("collect_results", "--input_dir", camera / "out")
    assert "CameraReasoning" in table and "LabelSFT" in table


def test_a_plugins_class_reads_its_table(camera):
    (camera / "my_images.py").write_text(
        "from domainbed_reasoning.datasets.image_tables import ReasoningImageTable\n\n\n"
        "class MyImages(ReasoningImageTable):\n"
        '    FOLDER, TABLE = "camera", "images.csv"\n    ENVIRONMENTS = ["day", "night"]\n    SPLITS = ("train",)\n'
    )
    said = run(
        camera,
        START
        + """
from domainbed_reasoning.images.catalog import scan
from domainbed_reasoning.images.user_datasets import find
d, e = build("MyImages", "LabelSFT", model="tiny"), build("MyImages", "ERM")
count = len(scan(find("MyImages"), "data").pictures)
print(json.dumps([*map(len, d), *map(len, e), count]))""",
        DOMAINBED_REASONING_PLUGINS="my_images",
        PYTHONPATH=os.pathsep.join([str(camera), environment(UPSTREAM or STAND_IN)["PYTHONPATH"]]),
    )
    assert said == [10, 10, 10, 10, 20]


def test_an_image_that_is_listed_and_missing_is_named_before_training(camera):
    (camera / "data" / "camera" / "all" / "05.png").unlink()
    said = run(
        camera,
        START
        + """
try:
    build("CameraReasoning", "LabelSFT", model="tiny")
except ValueError as error:
    print(json.dumps(str(error)))""",
    )
    assert "1 unreadable images" in said and "05.png" in said


def test_of_many_images_some_are_checked_and_it_is_said(camera, monkeypatch, capsys):
    from domainbed_reasoning.datasets import image_folders

    monkeypatch.setattr(image_folders, "_ALL_UP_TO", 10)
    monkeypatch.setattr(image_folders, "_CHECKED", 6)
    folder = camera / "data" / "camera"
    looked_at = []
    monkeypatch.setattr(image_folders, "check_header", looked_at.append)
    names = [f"all/{index:02d}.png" for index in range(24)]
    image_folders.check_images(folder, [names[:12], names[12:]])
    assert sorted(looked_at) == [folder / name for name in names[::4]]
    assert "6 of 24 images are checked before training" in capsys.readouterr().out
