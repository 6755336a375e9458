"""Probe the importable DomainBed and record its behavior.

``python probe.py OBSERVATIONS.json RECORDS``; RECORDS is a folder that ``records.py`` filled.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pathlib
import random
import runpy
import shlex
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from domainbed import algorithms, command_launchers, datasets, hparams_registry, model_selection
from domainbed.lib import fast_data_loader, misc, reporting
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

NAMES = ["ERM", "IRM", "GroupDRO", "Mixup", "CORAL"]
SETS_SHARED = ["Debug28", "Debug224", "VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "SVIRO"]
PROBES: dict[str, Callable[[], Any]] = {}


def probe(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a function to what is observed."""
    PROBES[function.__name__] = function
    return function


def command(script: str, *words: str, answer: str = "", alter_sys: bool = False) -> dict[str, Any]:
    """Run one of the scripts as ``python -m`` does, and return its output and exit status."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        sys.argv, sys.stdin = [script, *words], io.StringIO(answer)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module(f"domainbed.scripts.{script}", run_name="__main__", alter_sys=alter_sys)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
    return {"out": out.getvalue(), "err": err.getvalue(), "status": status}


def message(function: Callable[[], Any]) -> str:
    """Return the type and text of what a call raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of every bit of a tensor."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@probe
def names() -> Any:
    """Lists, attributes and errors."""
    attributes = ("ENVIRONMENTS", "N_STEPS", "CHECKPOINT_FREQ", "N_WORKERS", "INPUT_SHAPE")
    return {
        "algorithms": [name for name in algorithms.ALGORITHMS if name in NAMES],
        "datasets": [name for name in datasets.DATASETS if name in SETS_SHARED],
        "launchers": sorted(set(command_launchers.REGISTRY) & {"local", "dummy", "multi_gpu"}),
        "classes": {n: {a: getattr(datasets.get_dataset_class(n), a) for a in attributes} for n in SETS_SHARED},
        "counts": {n: datasets.num_environments(n) for n in SETS_SHARED},
        "errors": [
            message(lambda: algorithms.get_algorithm_class("Nope")),
            message(lambda: datasets.get_dataset_class("Nope")),
            message(lambda: algorithms.Algorithm((3, 28, 28), 2, 2, {}).update([])),
            message(lambda: algorithms.Algorithm((3, 28, 28), 2, 2, {}).predict(torch.zeros(1))),
        ],
        "stores_the_same_hparams": all(
            (algorithms.get_algorithm_class(n)((3, 28, 28), 2, 2, h).hparams is h)
            for n in NAMES
            for h in [hparams_registry.default_hparams(n, "Debug28")]
        ),
    }


@probe
def seeds() -> Any:
    """Seeds and splits."""
    parts = {}
    for size, n, seed in ((10, 3, 5), (16, 3, 0), (7, 0, 1), (5, 5, 2)):
        held, rest = misc.split_dataset(list(range(100, 100 + size)), n, seed)
        parts[f"{size} {n} {seed}"] = [[held[i] for i in range(len(held))], [rest[i] for i in range(len(rest))]]
    arguments = [(0,), (1, "a"), ("Debug28", "ERM", [0], 0, 0), ([1, 2],), (3, 4)]
    return {"hashes": [misc.seed_hash(*each) for each in arguments], "splits": parts}


@probe
def measures() -> Any:
    """Weights, accuracy and rows."""

    class Fixed(torch.nn.Module):
        def predict(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return x

    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [5.0, 1.0, 2.0]])
    data = TensorDataset(scores, torch.tensor([0, 2, 0, 1]))
    loader, network, rows = torch.utils.data.DataLoader(data, 3), Fixed(), io.StringIO()
    with contextlib.redirect_stdout(rows):
        misc.print_row(["name", "b" * 20, 1 / 8, 3, True, np.float64(2)], colwidth=12)
        misc.print_row(["name", 0.5, None], colwidth=6, latex=True)
    return {
        "balanced": misc.make_weights_for_balanced_classes([(0, 1), (0, 1), (0, 0), (0, 2)]).tolist(),
        "accuracy": misc.accuracy(network, loader, None, "cpu"),
        "weighted": misc.accuracy(network, loader, torch.tensor([1.0, 2.0, 3.0, 4.0]), "cpu"),
        "training_again": network.training,
        "rows": rows.getvalue(),
    }


@probe
def hparams() -> Any:
    """Default and random values."""
    found = {}
    for algorithm in NAMES:
        for dataset in SETS_SHARED:
            draws = [hparams_registry.random_hparams(algorithm, dataset, seed) for seed in (1, 2, 12345)]
            found[f"{algorithm} {dataset}"] = [hparams_registry.default_hparams(algorithm, dataset), *draws]
    return found


class Whereabouts(Dataset):
    """Items that say which process made them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


@probe
def loaders() -> Any:
    """The two loaders."""
    torch.manual_seed(3)
    items = list(range(10))
    fast = fast_data_loader.FastDataLoader(items, batch_size=4, num_workers=0)
    passes = [[batch.tolist() for batch in fast] for _ in range(2)]
    away = fast_data_loader.FastDataLoader(Whereabouts(), batch_size=4, num_workers=1)
    workers = [{int(p) for _, where in away for p in where} for _ in range(2)]
    drawn = {}
    for name, weights in (("uniform", None), ("weighted", torch.tensor([0.0, 0, 1, 3, 0, 0, 0, 0, 0, 0]))):
        torch.manual_seed(4)
        endless = fast_data_loader.InfiniteDataLoader(items, weights=weights, batch_size=4, num_workers=0)
        stream = iter(endless)
        drawn[name] = [next(stream).tolist() for _ in range(50)]
    return {
        "passes": passes,
        "length": len(fast),
        "same_worker": workers[0] == workers[1] and os.getpid() not in workers[0] and len(workers[0]) == 1,
        "drawn": drawn,
        "endless_length": message(lambda: len(endless)).partition(":")[0],
    }


@probe
def updates() -> Any:
    """One step of each algorithm; ERM's against a step by hand."""
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 1, 0, 1, 0])) for _ in range(2)]
    found: dict[str, Any] = {}
    for name in NAMES:
        table = hparams_registry.default_hparams(name, "Debug28")
        table["weight_decay"] = 0.01
        algorithm = algorithms.get_algorithm_class(name)((3, 28, 28), 2, 2, table)
        twin = copy.deepcopy(algorithm.network)
        values = [algorithm.update(batches) for _ in range(2)]
        found[name] = {"keys": sorted(values[0]), "types": sorted({type(v).__name__ for v in values[0].values()})}
        found[name]["predicts"] = list(algorithm.predict(batches[0][0]).shape)
        if name == "ERM":
            optimizer = torch.optim.Adam(twin.parameters(), lr=table["lr"], weight_decay=0.01)
            by_hand = []
            for _ in range(2):
                scores = twin(torch.cat([x for x, _ in batches]))
                loss = -torch.log_softmax(scores, 1)[torch.arange(12), torch.cat([y for _, y in batches])].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                by_hand.append(loss.item())
            pairs = zip(twin.parameters(), algorithm.network.parameters(), strict=True)
            found["by_hand"] = {
                "losses": [[value["loss"] for value in values], by_hand],
                "gap": max((a - b).abs().max().item() for a, b in pairs),
            }
        if name == "CORAL":
            same = algorithms.CORAL((3, 28, 28), 2, 2, table).update([batches[0], batches[0]])
            found["coral_of_equal_batches"] = same["penalty"]
        if name == "GroupDRO":
            found["group_weights"] = algorithm.q.tolist()
    return found


@probe
def images() -> Any:
    """Image folders: order, transforms, errors."""
    made = np.random.RandomState(0)
    for environment in ("sketch", "art_painting", "photo", "cartoon"):
        for label in ("dog", "cat"):
            folder = pathlib.Path("data/PACS", environment, label)
            folder.mkdir(parents=True)
            pixels = made.randint(0, 256, (40, 30 + 5 * len(label), 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((300, 260)).save(folder / "one.png")
    table = {"data_augmentation": True}
    dataset = datasets.PACS("data", [1], table)
    plain = datasets.PACS("data", [], {"data_augmentation": False})
    generic = datasets.MultipleEnvironmentImageFolder("data/PACS", [0, 1, 2, 3], True, table)
    training = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        training += [digest(dataset[environment][0][0]) for environment in (0, 2, 3)]
    return {
        "folders": [os.path.basename(environment.root) for environment in dataset],
        "classes": dataset[0].classes,
        "shape": list(dataset.input_shape),
        "num_classes": dataset.num_classes,
        "labels": [[label for _, label in environment] for environment in plain],
        "evaluation": [digest(x) for environment in plain for x, _ in environment],
        "generic": [digest(x) for environment in generic for x, _ in environment],
        "test_environment": [digest(x) for x, _ in dataset[1]],
        "training": training,
        "missing": message(lambda: datasets.VLCS("data", [0], table)).partition(":")[0],
    }


@probe
def debug() -> Any:
    """The Debug sets, seeded."""
    found = {}
    for name in ("Debug28", "Debug224"):
        torch.manual_seed(0)
        dataset = datasets.get_dataset_class(name)("nowhere", [0], {})
        labels = [int(y) for environment in dataset for _, y in environment]
        found[name] = [len(dataset), list(dataset.input_shape), dataset.num_classes, dataset.N_WORKERS, labels]
        found[name].append([digest(environment[0][0]) for environment in dataset])
    return found


@probe
def flags() -> Any:
    """The usage line of each command."""
    scripts = ("train", "sweep", "collect_results", "list_top_hparams")
    return {script: command(script, "--no-such-flag") for script in scripts}


@probe
def sweep() -> Any:
    """A sweep from launch to clean-up."""
    common = [
        "--algorithms",
        "ERM",
        "CORAL",
        "--datasets",
        "Debug28",
        "--data_dir",
        "a b",
        "--command_launcher",
        "dummy",
    ]
    common += ["--n_hparams", "2", "--n_trials", "2", "--output_dir", "jobs"]
    found = {"declined": command("sweep", "launch", *common, answer="n\n")}
    found["nothing_made"] = not os.path.exists("jobs")
    found["launched"] = command("sweep", "launch", *common, answer="y\n")
    folders = sorted(os.listdir("jobs"))
    for folder in folders[:3]:
        pathlib.Path("jobs", folder, "done").write_text("done")
    found["again"] = command("sweep", "launch", *common, "--skip_confirmation")
    found["deleted"] = command("sweep", "delete_incomplete", *common, answer="yes\n")
    found["left"], found["done"] = sorted(os.listdir("jobs")), folders[:3]
    options = ["--steps", "7", "--hparams", '{"lr": 0.5}', "--single_test_envs", "--skip_confirmation"]
    options += ["--n_hparams_from", "1", "--holdout_fraction", "0.1", "--output_dir", "other"]
    found["options"] = command("sweep", "launch", *common, *options)
    return found


@probe
def training() -> Any:
    """Three short runs, with the data loaded in this process."""
    datasets.MultipleDomainDataset.N_WORKERS = 0
    common = ["--data_dir", "nowhere", "--dataset", "Debug28", "--hparams", '{"batch_size": 4}', "--seed", "1"]
    runs = {
        "erm": ["--algorithm", "ERM", "--steps", "4", "--checkpoint_freq", "2"],
        "pair": ["--algorithm", "IRM", "--steps", "2", "--checkpoint_freq", "5", "--test_envs", "0", "2"],
        "adapt": ["--algorithm", "ERM", "--steps", "2", "--task", "domain_adaptation", "--uda_holdout_fraction", "0.5"],
        "random": ["--algorithm", "CORAL", "--steps", "1", "--hparams_seed", "3", "--trial_seed", "2"],
    }
    runs["pair"] += ["--save_model_every_checkpoint"]
    runs["random"] += ["--skip_model_save"]
    found = {}
    for name, words in runs.items():
        result = command("train", *common, *words, "--output_dir", name)
        records = [json.loads(line) for line in pathlib.Path(name, "results.jsonl").read_text().splitlines()]
        found[name] = {"records": records, "files": sorted(os.listdir(name)), "status": result["status"]}
        found[name]["line"] = pathlib.Path(name, "results.jsonl").read_text().splitlines()[0]
        found[name]["out"] = pathlib.Path(name, "out.txt").read_text()
        if "model.pkl" in found[name]["files"]:
            model = torch.load(f"{name}/model.pkl", weights_only=False)
            found[name]["model"] = {key: value for key, value in model.items() if key != "model_dict"}
            found[name]["weights"] = sorted({key.partition(".")[0] for key in model["model_dict"]})
    found["unknown"] = message(lambda: command("train", *common, "--dataset", "Nope", "--output_dir", "u"))
    return found


@probe
def visit() -> Any:
    """A dataset and an algorithm of someone else's."""
    met: list[Any] = []

    class Visitor(algorithms.ERM):
        def __init__(self, shape: Any, classes: int, domains: int, hparams: dict[str, Any]) -> None:
            super().__init__(shape, classes, domains, hparams)
            args = sys.modules["__main__"].args
            same = met.pop() is hparams
            met.extend([[args.steps, args.output_dir, args.test_envs], [list(shape), classes, domains], same])

    class Sights(datasets.Debug28):
        N_STEPS = 1

        def __init__(self, root: str, test_envs: list[int], hparams: dict[str, Any]) -> None:
            super().__init__(root, test_envs, hparams)
            self.N_STEPS, self.CHECKPOINT_FREQ, self.N_WORKERS = 3, 2, 0
            met.append(hparams)

    algorithms.Visitor, datasets.Sights = Visitor, Sights
    words = ["--algorithm", "Visitor", "--dataset", "Sights", "--data_dir", "x", "--output_dir", "visit"]
    words += ["--test_envs", "1", "--hparams", '{"batch_size": 4}']
    command("train", *words, alter_sys=True)
    records = pathlib.Path("visit/results.jsonl").read_text().splitlines()
    return {"met": met, "records": [json.loads(line) for line in records]}


@probe
def visiting_launcher() -> Any:
    """A launcher of someone else's, which runs the jobs in this process."""
    ran: list[str] = []

    def here(commands: list[str]) -> None:
        for line in commands:
            python, dash_m, module, *words = shlex.split(line)
            assert (python, dash_m, module) == ("python", "-m", "domainbed.scripts.train")
            ran.append(line)
            command("train", *words)

    datasets.MultipleDomainDataset.N_WORKERS = 0
    command_launchers.REGISTRY["here"] = here
    words = "--algorithms ERM --datasets Debug28 --n_hparams 1 --n_trials 1 --single_test_envs --steps 1".split()
    words += ["--command_launcher", "here", "--data_dir", "x", "--output_dir", "here", "--skip_confirmation"]
    command("sweep", "launch", *words, "--hparams", '{"batch_size": 4}')
    records = [json.loads(file.read_text()) for file in pathlib.Path("here").glob("*/results.jsonl")]
    done = len(list(pathlib.Path("here").glob("*/done")))
    table = command("collect_results", "--input_dir", "here")["out"]
    return {"commands": len(ran), "done": done, "records": records, "table": table}


@probe
def local_launcher() -> Any:
    """The serial launcher."""
    command_launchers.REGISTRY["local"](["echo first >> log", "exit 3", "echo third >> log"])
    return pathlib.Path("log").read_text()


@probe
def tables() -> Any:
    """The tables of seeded records, the same files for both implementations: their order on disk matters."""
    found: dict[str, Any] = {"sets": {}, "lists": {}}
    for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
        found["sets"][folder.name] = {}
        for kind, words in (("txt", []), ("tex", ["--latex"])):
            if any(folder.glob("*/results.jsonl")) or kind == "txt":
                result = command("collect_results", "--input_dir", str(folder), *words)
                kept = (folder / f"results.{kind}").read_text()
                found["sets"][folder.name][kind] = {"printed": result["out"], "kept": kept}
    for algorithm, dataset, environment in (("ERM", "Debug28", "1"), ("Mixup", "OfficeHome", "2")):
        words = ["--input_dir", f"{sys.argv[2]}/ties", "--dataset", dataset, "--algorithm", algorithm]
        found["lists"][f"{algorithm} {dataset}"] = command("list_top_hparams", *words, "--test_env", environment)["out"]
    return found


@probe
def selection() -> Any:
    """Two hparams seeds, two steps, worked by hand in the test."""
    folder = pathlib.Path("by_hand")

    def job(name: str, hparams_seed: int, test_envs: list[int], steps: list[list[float]]) -> None:
        (folder / name).mkdir(parents=True)
        args = {"trial_seed": 0, "dataset": "Debug28", "algorithm": "ERM", "test_envs": test_envs}
        with open(folder / name / "results.jsonl", "w") as file:
            for step, values in enumerate(steps):
                record = {"step": step, "args": {**args, "hparams_seed": hparams_seed}, "hparams": {}}
                keys = [f"env{e}_{s}_acc" for e in range(3) for s in ("in", "out")]
                file.write(json.dumps(record | dict(zip(keys, values, strict=True))) + "\n")

    job("a", 0, [0], [[0.11, 0.9, 0.5, 0.2, 0.5, 0.4], [0.12, 0.1, 0.5, 0.6, 0.5, 0.2]])
    job("b", 1, [0], [[0.13, 0.2, 0.5, 0.1, 0.5, 0.3], [0.14, 0.8, 0.5, 0.3, 0.5, 0.3]])
    job("c", 0, [0, 1], [[0.0, 0.0, 0.7, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.0, 0.0, 0.0]])
    job("d", 0, [0, 2], [[0.0, 0.0, 0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.9, 0.0]])
    job("e", 1, [0, 1], [[0.0, 0.0, 0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.9, 0.0, 0.0, 0.0]])
    groups = reporting.get_grouped_records(reporting.load_records(str(folder)))
    (mine,) = [group["records"] for group in groups if group["test_env"] == 0]
    (other,) = [group["records"] for group in groups if group["test_env"] == 1]
    found: dict[str, Any] = {"groups": [[group["test_env"], len(group["records"])] for group in groups]}
    for name in ("IIDAccuracySelectionMethod", "LeaveOneOutSelectionMethod", "OracleSelectionMethod"):
        method = getattr(model_selection, name)
        ranking = [{k: float(v) for k, v in choice.items()} for choice, _ in method.hparams_accs(mine)]
        found[name] = {"name": method.name, "ranking": ranking, "chosen": method.sweep_acc(mine)}
        found[name]["only_pairs"] = method.sweep_acc(other)
    return found


def main(argv: list[str]) -> None:
    """Run every probe and write the observations."""
    torch.set_num_threads(1)
    found = {name: function() for name, function in PROBES.items()}
    with open(argv[1], "w") as file:
        json.dump(found, file, default=lambda value: value.item())


if __name__ == "__main__":
    main(sys.argv)
