"""Build the model: fetch, compose, see, align, measure. Rerun to resume.

python -m pip install -r examples/real_small/requirements.txt
python -m examples.real_small.build --output ~/models/real-small --pacs ~/data/PACS
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import resource
import sys
import time
from typing import Any

import torch
import transformers

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.adapters import LoraSettings
from examples.real_small import fetch
from examples.real_small.align import Alignment, split, stages
from examples.real_small.compose import compose, read_language_model, read_tower
from examples.real_small.measure import one_of_four, zero_shot
from examples.real_small.pictures import emoji, features, photographs

SEED = 0
LORA = LoraSettings(rank=16, alpha=32, towers="language")
ASKED = 200  # held-out pictures


class Clock:
    """Wall and processor minutes of each part, summed over restarts and kept in a file.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.minutes: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}

    def __call__(self, part: str, wall: float, cpu: float) -> None:
        """Add the time since ``wall`` and ``cpu`` (seconds of `time.time` and `time.process_time`) to a part."""
        entry = self.minutes.setdefault(part, {"wall": 0.0, "cpu": 0.0})
        entry["wall"] = round(entry["wall"] + (time.time() - wall) / 60, 2)
        entry["cpu"] = round(entry["cpu"] + (time.process_time() - cpu) / 60, 2)
        replace_text(self.file, json.dumps(self.minutes))


def digest(folder: pathlib.Path) -> str:
    """Return the SHA-256 of a model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Build the model and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the finished model")
    parser.add_argument("--work", type=pathlib.Path, help="folder of downloads and checkpoints (OUTPUT.work)")
    parser.add_argument("--samples", default=fetch.SAMPLES, help="URL or path of the ImageNet samples' repository")
    parser.add_argument("--regress_steps", type=int, default=1500)
    parser.add_argument("--name_steps", type=int, default=500)
    parser.add_argument("--chain_steps", type=int, default=100)
    parser.add_argument("--warm_start", type=pathlib.Path, help="folder with a trained projector and adapters")
    parser.add_argument("--pacs", type=pathlib.Path, help="PACS's folder, to measure zero-shot accuracy by domain")
    args = parser.parse_args(argv)
    if args.pacs and not args.pacs.expanduser().is_dir():
        parser.error(f"--pacs {args.pacs} is not a folder")
    output: pathlib.Path = args.output.expanduser()
    work: pathlib.Path = args.work or output.with_name(f"{output.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    clock = Clock(work / "minutes.json")

    wall, cpu = time.time(), time.process_time()
    packages = {package.name: fetch.fetch(package, work / "packages") for package in fetch.PACKAGES}
    clone = fetch.clone_samples(args.samples, work / "packages")
    clock("fetch", wall, cpu)

    wall, cpu = time.time(), time.process_time()
    tower = read_tower(packages[fetch.TOWER.name])
    composed = work / "composed"
    if not (composed / "config.json").is_file():
        torch.manual_seed(SEED)
        model, processor = compose(*read_language_model(packages[fetch.LANGUAGE_MODEL.name]), tower)
        processor.save_pretrained(composed)
        model.to(torch.bfloat16).save_pretrained(composed.with_suffix(".part"))
        for file in composed.with_suffix(".part").iterdir():  # config.json is the last to arrive
            if file.name != "config.json":
                file.replace(composed / file.name)
        (composed.with_suffix(".part") / "config.json").replace(composed / "config.json")
        del model
        clock("compose", wall, cpu)

    wall, cpu = time.time(), time.process_time()
    vendors = [packages[vendor.name] for vendor in (fetch.GOOGLE, fetch.TWITTER)]
    pictures = emoji(packages[fetch.OPENMOJI.name], vendors) + (photographs(clone) if clone else [])
    seen = features(tower.to(memory_format=torch.channels_last).forward_features, pictures, work / "features", SEED)
    clock("features", wall, cpu)

    plan = stages(args.regress_steps, args.name_steps, args.chain_steps)
    torch.manual_seed(SEED)
    mllm = load_mllm(str(composed), lora=LORA, dtype="bfloat16", device="cpu")
    alignment = Alignment(mllm.eval(), pictures, seen, SEED)
    if args.warm_start:
        alignment.warm_start(args.warm_start.expanduser())
    curves = alignment.run(plan, work / "alignment.pt")
    clock.minutes["align"] = dict(zip(("wall", "cpu"), (round(s / 60, 2) for s in alignment.seconds()), strict=True))
    save(alignment, composed, output)

    wall, cpu = time.time(), time.process_time()
    train_set, held_out = split(pictures)
    built = load_mllm(str(output), dtype="bfloat16", device="cpu").eval()
    record: dict[str, Any] = {
        "command": " ".join(["python -m examples.real_small.build", *(sys.argv[1:] if argv is None else argv)]),
        "seed": SEED,
        "warm_start": args.warm_start is not None,
        "packages": {package.name: [package.version, package.license] for package in fetch.PACKAGES},
        "photographs": clone is not None,
        "pictures": {"trained": len(train_set), "held_out": len(held_out)},
        "names": len({picture.name for picture in pictures}),
        "stages": curves,
        "nearest_name_held_out": round(alignment.nearest_name(held_out), 3),
        "one_of_four_held_out": round(one_of_four(built, pictures, held_out, ASKED, SEED), 3),
        "zero_shot": zero_shot(built, args.pacs.expanduser()) if args.pacs else None,
    }
    clock("measure", wall, cpu)
    record |= {
        "minutes": clock.minutes,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "size_mb": round((output / "model.safetensors").stat().st_size / 1e6),
        "parameters": sum(weight.numel() for weight in built.base.parameters()),
        "sha256": digest(output),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    replace_text(output / "record.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def save(alignment: Alignment, composed: pathlib.Path, output: pathlib.Path) -> None:
    """Merge projector and adapters in float32 into the composed model and save it in bfloat16, with its processor.

    Args:
        alignment: after training.
        composed: the model that it started from.
        output: where the finished model goes; its ``config.json`` is written last.
    """
    mllm = load_mllm(str(composed), lora=LORA, dtype="float32", device="cpu")
    with torch.no_grad():
        for name, weight in mllm.base.model.multi_modal_projector.named_parameters():
            weight.copy_(alignment.values[f"projector.{name}"])
        for name, weight in mllm.adapters().items():
            weight.copy_(alignment.values[name])
    merged = mllm.merge()
    merged.processor.save_pretrained(output)
    merged.base.to(torch.bfloat16).save_pretrained(output)


if __name__ == "__main__":
    main()
