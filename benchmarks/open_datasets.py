"""How long large datasets take to open, and in how much memory: class folders of DomainNet's shape, and a table.

    python -m benchmarks.open_datasets [--images 1000000] [--chains 10000] [--root EMPTY_FOLDER]

Writes a tree of 6 domains and 345 classes whose images are hard links of a few small JPEGs, so that what is measured is
the package's own work, not the disk's. Each case runs in a process of its own: the dataset is opened as a job does, its
splits are drawn and its images identified for resuming. A line a case gives seconds of the processor, memory beyond the
imports (peak, and what stays), bytes an image, files opened, and the limits; the exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from PIL import Image

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
CLASSES = 345
LINKS = 50_000  # of one file: some file systems allow 65,000
# Limits, an image: 60 s and 1 GB for a million.
MICROSECONDS, BYTES = 60, 1000
CASES = ("folders", "folders, chains", "table", "table, chains", "scan")


def write_tree(root: pathlib.Path, count: int) -> None:
    """Write the images, the table and the files that describe both datasets."""
    originals = root / "originals"
    originals.mkdir(parents=True)
    files = []
    for number in range(count // LINKS + 1):
        files.append(originals / f"{number}.jpg")
        Image.new("RGB", (64, 64), (number, 9, 9)).save(files[-1])
    folder = root / "data" / "big"
    with (root / "images.csv").open("w") as table:
        table.write("path,label,domain\n")
        for index in range(count):
            domain, label = DOMAINS[index % 6], f"class_{index // 6 % CLASSES:03d}"
            place = f"{domain}/{label}"
            if index < 6 * CLASSES:
                (folder / place).mkdir(parents=True)
            path = f"{place}/{domain}_{index:07d}.jpg"
            os.link(files[index // LINKS], folder / path)
            table.write(f"{path},{label},{domain}\n")
    os.rename(root / "images.csv", folder / "images.csv")
    environments = json.dumps(DOMAINS)
    described = f'folder = "big"\nenvironments = {environments}\n'
    (root / "folders.toml").write_text(f'name = "BigFolders"\n{described}')
    (root / "table.toml").write_text(f'name = "BigTable"\ntable = "images.csv"\n{described}')


def write_chains(root: pathlib.Path, count: int) -> None:
    """Write chains of the first images."""
    from domainbed_reasoning.chains.chain import Chain

    with (root / "chains.jsonl").open("w") as file:
        for index in range(count):
            domain, label = DOMAINS[index % 6], f"class_{index // 6 % CLASSES:03d}"
            chain = Chain(
                "I look.", "A thing.", "It fits. " * 40, "Nothing misleads.", label.replace("_", " ")
            ).render()
            file.write(json.dumps({"image": f"{domain}/{label}/{domain}_{index:07d}.jpg", "chain": chain}) + "\n")


def resident(peak: bool = False) -> int:
    """Return the bytes of memory that this process has, or had at most."""
    key = "VmHWM" if peak else "VmRSS"
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def measure(root: pathlib.Path, case: str, chains: bool) -> dict[str, Any]:
    """Open a dataset in this process, as a job does; return what it took."""
    from benchmarks.measure import use_domainbed

    use_domainbed()
    from domainbed import datasets, hparams_registry

    from domainbed_reasoning.images.catalog import scan
    from domainbed_reasoning.images.user_datasets import find
    from domainbed_reasoning.jobs import answers, history
    from domainbed_reasoning.mllm import load_mllm

    del load_mllm
    opened = [0]
    name = "BigTable" if case.startswith("table") else "BigFolders"
    algorithm = "MTCT" if chains else "LabelSFT"
    hparams = hparams_registry.default_hparams(algorithm, f"{name}Reasoning") | {"model": "tiny"}
    if chains:
        hparams["chains"] = str(root / "chains.jsonl")
    datasets.BigFoldersReasoning  # noqa: B018 - imported
    before = resident()
    sys.addaudithook(lambda event, _: opened.__setitem__(0, opened[0] + (event == "open")))
    began, clock = time.process_time(), time.perf_counter()
    if case == "scan":
        kept: Any = scan(find(name), root / "data")
        seconds, count, identified = time.process_time() - began, len(kept.pictures), 0.0
    else:
        kept = vars(datasets)[f"{name}Reasoning"](str(root / "data"), [5], hparams)
        seconds, task = time.process_time() - began, kept.task
        args = argparse.Namespace(holdout_fraction=0.2, trial_seed=0, test_envs=[5])
        splits = answers._splits(task, args)
        began = time.process_time()
        history._images_digest(task)
        identified, count = time.process_time() - began, len(splits)
    return {
        "images": count,
        "seconds": seconds,
        "identified": identified,
        "clock": time.perf_counter() - clock,
        "peak": resident(peak=True) - before,
        "stays": resident() - before,
        "opened": opened[0],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure each case in a process of its own; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--root", type=pathlib.Path, help="where the images are written, and stay (default: nowhere)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.case:
        print(json.dumps(measure(given.root, given.case, given.case.endswith("chains"))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = given.root or pathlib.Path(folder)
        if not (root / "table.toml").exists():
            write_tree(root, given.images)
        write_chains(root, given.chains)
        missed = 0
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.open_datasets", "--case", case, "--root", str(root)]
            environ = {**os.environ, "DOMAINBED_REASONING_DATASETS": str(root)}
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            count, seconds = found["images"], found["seconds"] + found["identified"]
            slow, large = 1e6 * seconds / count, found["peak"] / count
            passed = slow <= MICROSECONDS and large <= BYTES
            missed += not passed
            print(
                f"{case:<16} {count:>9,} images: {found['seconds']:5.1f} s to open, {found['identified']:4.1f} s to "
                f"identify ({slow:.1f} µs an image, limit {MICROSECONDS}; {found['clock']:.0f} s by the clock); "
                f"peak {found['peak'] / 1e6:,.0f} MB ({large:.0f} bytes an image, limit {BYTES}), stays "
                f"{found['stays'] / 1e6:,.0f} MB; "
                f"{found['opened']:,} files opened; {'pass' if passed else 'MISSED'}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
