"""Annotating PACS end to end with a tiny local teacher behind a real server, killed twenty times.

    python benchmarks/annotate_pacs.py --data_dir DATA --work FOLDER [--kills 20]

1. The embedded model is tuned for a few minutes to write short chains about PACS (it has never seen a photo), on every
   second image; that is the teacher. What it says is worthless: the point is that it is a real model that samples.
2. It is served on loopback in the format of OpenAI's endpoint (`tests/annotate/teacher_server.py`).
3. `annotate` runs over all images: once undisturbed, once killed with SIGKILL at random moments and started again.

Printed: images an hour; requests repeated, which arrived again although their answer was in the store when the asker
was killed (must be 0); requests that were under way at a kill; chains lost, whose record was in the store at a kill
and is not at the end (must be 0).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from domainbed_reasoning.chains.chain import Chain  # noqa: E402
from domainbed_reasoning.chains.prompts import q_reason  # noqa: E402
from domainbed_reasoning.chains.store import read_records  # noqa: E402
from domainbed_reasoning.images.catalog import STOCK, scan  # noqa: E402

SIDE = {"art_painting": "brush strokes", "cartoon": "flat colors", "photo": "fine grain", "sketch": "thin lines"}


def lesson(domain: str, label: str) -> str:
    """Return the chain that the teacher learns for an image."""
    return Chain(
        "I look at the outline, the parts and the surface.",
        f"One thing in {SIDE[domain]}.",
        f"The outline and the parts fit {label} better than any other option, for those would have other parts.",
        "The surface may mislead, so the parts decide.",
        label,
    ).render()


def make_teacher(data_dir: Path, folder: Path, steps: int, batch: int = 32) -> None:
    """Tune the embedded model on lessons and save it."""
    import numpy
    import torch
    from PIL import Image

    from domainbed_reasoning.mllm import load_mllm

    torch.manual_seed(0)
    on_disk = scan(STOCK["PACS"], data_dir)
    pictures = on_disk.pictures[::2]
    mllm = load_mllm("tiny", device="cpu")
    edge = mllm.image_size

    def pixels(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return torch.from_numpy(numpy.array(image.convert("RGB").resize((edge, edge)))).permute(2, 0, 1)

    images = torch.stack([pixels(on_disk.root / picture.path) for picture in pictures])
    question = q_reason(on_disk.classes)
    answers = [lesson(picture.domain, picture.label) for picture in pictures]
    network = mllm.network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch,), generator=draw)
        encoded = mllm.encode(images[rows])
        log_likelihoods, mask = mllm.log_likelihoods(encoded, question, [answers[row] for row in rows.tolist()])
        loss = -(log_likelihoods * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"teacher: step {step}, {loss.item():.3f} nats a token, {time.monotonic() - began:.0f} s", flush=True)
    network.eval().save_pretrained(folder)
    mllm.processor.save_pretrained(folder)


def environment() -> dict[str, str]:
    """Return the variables of the processes that are started."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


def start_annotate(args: argparse.Namespace, port: int, chains: Path) -> subprocess.Popen[str]:
    """Start ``domainbed-reasoning annotate``."""
    code = "import sys; from domainbed_reasoning.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "annotate", "--dataset", "PACS", "--data_dir", str(args.data_dir)]
    command += ["--teacher", "openai:tiny-pacs", "--base-url", f"http://127.0.0.1:{port}/v1", "--prompt", "task"]
    command += ["--chains", str(chains), "--max-tokens", "200", "--concurrency", "32", "--temperature", "0.7"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the whole lines of the server's log."""
    lines = log.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def seeds_in(chains: Path) -> set[int]:
    """Return which requests the store has the answers of: seeds follow from image and attempt."""
    if not chains.exists():
        return set()
    return {record["sampling"]["seed"] for _, record in read_records(chains, repair=True)}


def run_with_kills(args: argparse.Namespace, port: int, log: Path, chains: Path, work: int) -> dict[str, int]:
    """Annotate, killing the process at random moments; return what was repeated and lost.

    Args:
        given: the arguments.
        port: of the server.
        log: of the server.
        chains: the store.
        work: requests that the undisturbed run took; the kills spread over so many.
    """
    dice = random.Random(0)
    start = len(read_log(log))
    repeated = under_way = kills = 0
    known: set[int] = set()
    ever: set[int] = set()
    while True:
        mark = len(read_log(log))
        child = start_annotate(args, port, chains)
        # An arrival and an answer are two lines of the log.
        target = mark + dice.randint(1, max(2, 3 * work // max(1, args.kills)))
        while child.poll() is None and not (kills < args.kills and len(read_log(log)) >= target):
            time.sleep(dice.uniform(0.02, 0.15))
        if child.poll() is None and kills < args.kills:
            child.send_signal(signal.SIGKILL)
            kills += 1
        out = child.communicate()[0]
        arrived = [int(e["key"].partition(":")[2]) for e in read_log(log)[mark:] if e["event"] == "arrived"]
        repeated += sum(seed in known for seed in arrived)
        known = seeds_in(chains)
        ever |= known
        under_way += sum(seed not in known for seed in arrived)
        if child.returncode != -signal.SIGKILL:
            print(out)
            break
        time.sleep(0.2)
    return {
        "kills": kills,
        "requests in all": sum(e["event"] == "arrived" for e in read_log(log)[start:]),
        "requests under way at a kill, asked again": under_way,
        "requests repeated": repeated,
        "chains lost": len(ever - known),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    teacher = args.work / "teacher"
    if not (teacher / "config.json").exists():
        make_teacher(args.data_dir, teacher, args.steps)
    log = args.work / "requests.jsonl"
    log.unlink(missing_ok=True)
    log.touch()
    server = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "tests" / "annotate" / "teacher_server.py")]
        + ["--backend", "mllm", "--model", str(teacher), "--log", str(log)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        calm, killed = args.work / "calm.jsonl", args.work / "killed.jsonl"
        for chains in (calm, killed):
            chains.unlink(missing_ok=True)
        began = time.monotonic()
        print(start_annotate(args, port, calm).communicate()[0])
        seconds = time.monotonic() - began
        records = [record for _, record in read_records(calm)]
        images = len({record["image"] for record in records})
        print(f"undisturbed: {images} images in {seconds:.0f} s, {3600 * images / seconds:,.0f} images an hour")
        result = run_with_kills(args, port, log, killed, len(records))
        again = Counter((record["image"], record["attempt"]) for _, record in read_records(killed))
        result["candidates stored twice"] = sum(count > 1 for count in again.values())
        for what, count in result.items():
            print(f"{what}: {count}")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
