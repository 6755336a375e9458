"""Several processes on one file or folder: correct, or rejected with a clear message, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.files import chain_text, read_lines, write_chains, write_images
from builders.processes import environment, wait_until
from builders.servers import annotate_words, completion, response
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter, load_chains, write_records

CHAIN = chain_text("bike", reasoning="It has parts.")
ANSWER = response(completion(CHAIN))


@pytest.fixture
def annotator(toy: Path, liar: Any, start_verb: Any) -> Callable[[], subprocess.Popen[str]]:
    """Starts an annotator of Toy whose server answers when ``annotator.go`` is set."""
    pytest.importorskip("openai")
    go = threading.Event()

    def answer(connection: Any) -> None:
        go.wait(600)
        connection.sendall(ANSWER)

    server = liar(answer)

    def start() -> subprocess.Popen[str]:
        words = annotate_words(toy, server.url, toy / "c.jsonl", "--candidates", 1)
        child: subprocess.Popen[str] = start_verb(*words)
        return child

    start.go, start.server = go, server  # type: ignore[attr-defined]
    return start


def test_concurrent_annotate_and_import_are_rejected_without_loss(toy: Path, annotator: Any, verb: Any) -> None:
    first = annotator()
    wait_until(lambda: len(annotator.server.requests) == 8)
    second = annotator()
    _, err = second.communicate()
    assert second.returncode == 1 and f"another process (process {first.pid}) is writing to it" in err
    rows = toy / "rows.jsonl"
    rows.write_text(json.dumps({"image": "art/Bike/0.png", "chain": CHAIN}) + "\n")
    code, _, err = verb("import", rows, "--dataset", "Toy", "--data_dir", toy, "--chains", toy / "c.jsonl")
    assert code == 1 and "is writing to it" in err
    with pytest.raises(ChainFileError, match="is writing to it"):
        write_records(toy / "c.jsonl", [{"image": "x.png", "chain": CHAIN}])
    annotator.go.set()
    first.communicate()
    assert first.returncode == 0 and len(load_chains(toy / "c.jsonl")) == 8
    third = annotator()
    out, _ = third.communicate()
    assert "Nothing to do" in out and len(annotator.server.requests) == 8


def test_alternating_writers_lose_nothing(tmp_path: Path) -> None:
    """Three processes open the file again and again; one that is refused tries again."""
    file = tmp_path / "c.jsonl"
    code = f"""
import sys
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter
done = 0
while done < 20:
    try:
        with ChainWriter({str(file)!r}, sync_records=1 << 60) as writer:
            writer.append({{"image": f"{{sys.argv[1]}}/{{done}}.png", "chain": "x", "verdict": "rejected"}})
            print(f"{{sys.argv[1]}}/{{done}}.png", flush=True)
            done += 1
    except ChainFileError as error:
        assert "is writing to it" in str(error), error
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for n in range(3)
    ]
    printed = [line for child in writers for line in child.communicate()[0].split()]
    assert all(child.returncode == 0 for child in writers) and len(printed) == 60
    assert sorted(json.loads(line)["image"] for line in file.read_text().splitlines()) == sorted(printed)


def test_a_writer_notices_that_its_file_was_replaced_while_it_opened_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainbed_reasoning.chains import locked

    file = tmp_path / "c.jsonl"
    file.write_text("")
    lock, calls = locked.lock, []

    def replaced_before(handle: int, path: str) -> bool:
        if not calls:
            other = tmp_path / "other"
            other.write_text("")
            os.replace(other, path)
        calls.append(path)
        return lock(handle, path)

    monkeypatch.setattr(locked, "lock", replaced_before)
    with ChainWriter(file) as writer:
        writer.append({"image": "a.png", "chain": CHAIN})
    assert len(calls) == 2 and list(load_chains(file)) == ["a.png"]


def test_concurrent_reader_sees_only_complete_records(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("")
    code = f"""
from domainbed_reasoning.chains.store import ChainWriter
long = {CHAIN!r}.replace("parts", "parts " * 3000)
with ChainWriter({str(file)!r}, sync_records=1 << 60, sync_seconds=1e9) as writer:
    for i in range(1500):
        writer.append({{"image": f"{{i}}.png", "chain": long}})
"""
    child = subprocess.Popen([sys.executable, "-c", code], env=environment())
    counts = [0]
    while child.poll() is None:
        chains = load_chains(file)
        assert list(chains) == [f"{i}.png" for i in range(len(chains))]
        counts.append(len(chains))
    assert child.returncode == 0 and len(load_chains(file)) == 1500
    assert counts == sorted(counts) and len(set(counts)) > 2


@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_two_jobs_on_one_folder_at_once_give_the_same_numbers_bit_for_bit(
    tmp_path: Path, run_stock: Any, domainbed_root: Path
) -> None:
    """Same arguments, same numbers: two processes side by side, with sampling, dropout and self-labeling."""
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(0)

    def picture(*_: int) -> Any:
        return Image.fromarray(pixels.randint(0, 256, (40, 40, 3), dtype=np.uint8))

    pacs, domains = tmp_path / "data" / "PACS", ("art_painting", "cartoon", "photo", "sketch")
    write_chains(pacs, write_images(pacs, domains, ("dog", "guitar"), 5, picture))
    hparams = {"model": "tiny", "batch_size": 2, "max_new_tokens": 12, "mtct_epochs": 1, "sarr_rounds": 1}
    hparams |= {"sarr_epochs": 1, "temperature": 1.0, "lora_dropout": 0.1, "both_answers": False, "workers": 0}
    results: dict[int, list[dict[str, Any]]] = {}

    def run(job: int) -> None:
        folder = tmp_path / f"job{job}"
        run_stock(
            domainbed_root, "train", "--data_dir", tmp_path / "data", "--dataset", "PACSReasoning", "--algorithm",
            "RDMLDG", "--test_envs", 1, "--steps", 4, "--hparams", json.dumps(hparams),
            "--output_dir", folder, cwd=tmp_path,
        )  # fmt: skip
        results[job] = read_lines(folder / "results.jsonl")

    threads = [threading.Thread(target=run, args=(job,)) for job in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changing = {"step_time", "args", "mem_gb"}
    numbers = {
        job: [{key: value for key, value in record.items() if key not in changing} for record in records]
        for job, records in results.items()
    }
    assert numbers[0] == numbers[1] and len(numbers[0]) >= 2 and "loss" in numbers[0][-1]
    import torch

    one, other = (torch.load(tmp_path / f"job{n}" / "model.pkl", weights_only=True)["model_dict"] for n in (0, 1))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
