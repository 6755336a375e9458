"""check, stats and card on data with known errors and statistics."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import ImageFile

from domainbed_reasoning.chains.chain import count_words

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chains(toy: Path, chain_text: Callable[..., str]) -> Path:
    """Four images of Toy with six candidates: three accepted, three rejected."""
    good, usage = chain_text("mug"), {"prompt_tokens": 100, "completion_tokens": 10, "dollars": 0.5}
    common = {"teacher": "openai:x", "prompt_version": "teacher-1/1", "label_conditioned": False, "verified": True}
    records = [
        {"image": "art/Mug/Mug_0.png", "chain": "no", "verdict": "rejected", "rule": "stage_missing", "usage": usage},
        {"image": "art/Mug/Mug_0.png", "chain": good, "verdict": "accepted", "usage": usage},
        {"image": "art/Mug/Mug_1.png", "chain": good, "verdict": "accepted", "usage": usage},
        {"image": "photo/Bike/Bike_0.png", "chain": good, "verdict": "rejected", "rule": "label"},
        {"image": "photo/Bike/Bike_0.png", "chain": "I cannot", "verdict": "rejected", "rule": "refusal"},
        {"image": "photo/Mug/Mug_2.png", "chain": good, "verdict": "accepted"},
    ]
    path = toy / "toy" / "reasoning.jsonl"
    path.write_text("".join(json.dumps(common | record) + "\n" for record in records), "utf-8")
    return path


def test_check_of_valid_data_reports_no_problems(toy: Path, chains: Path, verb: Verb) -> None:
    code, out, _ = verb("check", "--dataset", "Toy", "--data_dir", toy)
    assert code == 0 and "No problems." in out
    assert "6 candidates; 3 of 18 images have a chain (16.7%)" in out and "18 of 18 images can be decoded" in out


def test_check_shows_the_question_and_which_folder_has_which_name_in_it(toy: Path, chains: Path, verb: Verb) -> None:
    _, out, _ = verb("check", "--dataset", "Toy", "--data_dir", toy, "--no-images")
    words = " ".join(out.split())
    assert (
        "question: What type of thing is in this photo? Choose from the following options: alarm clock, bike" in words
    )
    assert "class folders: Alarm_Clock → alarm clock, Bike → bike, Mug → mug" in words


def test_check_reports_every_problem(
    toy: Path, chains: Path, verb: Verb, chain_text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as DomainBed's modules leave it
    root = toy / "toy"
    whole = (root / "art" / "Bike" / "Bike_0.png").read_bytes()
    (root / "art" / "Bike" / "Bike_0.png").write_bytes(whole[: len(whole) // 2])
    (root / "art" / "Bike" / "Bike_1.png").write_bytes(b"")
    (root / "art" / "Bike" / "Bike_2.png").write_text("<html>not found</html>")
    for path in (root / "photo" / "Alarm_Clock").iterdir():
        path.unlink()
    (root / "__MACOSX").mkdir()
    with chains.open("a") as file:
        file.write("{torn in the middle\n")
        file.write(json.dumps({"image": "art/Mug/Mug_0.png", "chain": chain_text("mug")}) + "\n")
        file.write(json.dumps({"image": "art/Mug/Mug_9.png", "chain": chain_text("mug")}) + "\n")
        file.write(json.dumps({"image": "photo/Mug/Mug_0.png", "chain": chain_text("bike")}) + "\n")
    code, out, _ = verb("check", "--dataset", "Toy", "--data_dir", toy)
    failures = [line for line in out.splitlines() if line.startswith("PROBLEM")]
    assert code == 1
    for expected in (
        "3 domain folders (__MACOSX, art, photo); expected 2",
        "photo/Alarm_Clock has no image",
        "Bike_0.png' is not a readable image: OSError",
        "Bike_1.png is empty",
        "Bike_2.png' is not a readable image: not one of JPEG",
        "line 7: ",
        "line 8: second accepted chain of 'art/Mug/Mug_0.png'",
        "line 9: the dataset has no image 'art/Mug/Mug_9.png'",
        "line 10: accepted, but violates the rule 'label'",
    ):
        assert sum(expected in failure for failure in failures) == 1, expected


def test_check_reports_class_names_without_a_folder(toy: Path, verb: Verb, tmp_path: Path) -> None:
    with (tmp_path / "definitions" / "toy.toml").open("a") as file:
        file.write('[class_names]\nBike = "bicycle"\nAlarmClock = "clock"\n')
    code, out, _ = verb("check", "--dataset", "Toy", "--data_dir", toy)
    assert code == 1 and out.count("PROBLEM") == 1
    assert (
        "toy.toml: [class_names] contains 'AlarmClock', which is not a class folder. Did you mean 'Alarm_Clock'?" in out
    )


def test_check_fails_for_a_missing_chain_file(toy: Path, verb: Verb, tmp_path: Path) -> None:
    """One that nobody named may be missing: there are no chains yet."""
    where = ("--dataset", "Toy", "--data_dir", toy)
    code, out, _ = verb("check", *where, "--chains", tmp_path / "typo.jsonl")
    assert code == 1 and f"PROBLEM Chain file {tmp_path / 'typo.jsonl'} does not exist" in out
    code, out, _ = verb("check", *where)
    assert code == 0 and "create one with `domainbed-reasoning annotate`" in out


def test_check_counts_other_files_by_extension(toy: Path, chains: Path, verb: Verb) -> None:
    where = ("--dataset", "Toy", "--data_dir", toy)
    assert "not loaded" not in verb("check", *where)[1]
    for name in ("a.gif", "b.GIF", "c.heic", "Thumbs.db", ".DS_Store", "notes"):
        (toy / "toy" / "art" / "Mug" / name).touch()
    (toy / "toy" / "art" / "lost.png").touch()
    (toy / "toy" / "old.jsonl").touch()
    (toy / "toy" / "art" / "Mug" / ".cache").mkdir()
    (toy / "toy" / "art" / "Mug" / ".cache" / "x.bin").touch()
    code, out, _ = verb("check", *where)
    assert code == 0
    assert "5 files not loaded as images: 2 .gif, 1 " in out
    assert "1 .heic" in out and "1 without extension" in out and "1 .png outside class folders" in out


def test_check_of_the_real_images_reports_missing_counts(test_data: Path, verb: Verb) -> None:
    where = ("--dataset", "PACS", "--data_dir", test_data, "--chains", test_data / "PACS_chains.jsonl")
    code, out, _ = verb("check", *where)
    assert code == 1 and "1,120 of 1,120 images can be decoded" in out
    assert "PROBLEM 1,120 images; 9,991 published." in out and out.count("PROBLEM") == 1
    assert "112 of 1,120 images have a chain (10.0%)" in out and "download_pacs" in out


def test_check_of_a_missing_dataset_says_how_to_obtain_it(tmp_path: Path, verb: Verb) -> None:
    code, _, err = verb("check", "--dataset", "VLCS", "--data_dir", tmp_path)
    assert code == 1 and "does not exist" in err and "download.download_vlcs" in err


def test_stats_count_by_domain_and_class(toy: Path, chains: Path, verb: Verb, tmp_path: Path) -> None:
    code, out, _ = verb("stats", "--dataset", "Toy", "--data_dir", toy)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert code == 0
    # images, tried, chains, coverage, candidates, accepted, words, tokens in, tokens out, $
    words = str(count_words(json.loads(chains.read_text().splitlines()[1])["chain"]))
    assert rows["art"] == ["9", "2", "2", "22.2%", "3", "66.7%", words, "300", "30", "1.50"]
    assert rows["photo"] == ["9", "2", "1", "11.1%", "3", "33.3%", words, "0", "0", "–"]
    assert rows["all"][-1] == "1.50" and "3 of 6 candidates have no recorded cost." in out
    assert rows["Mug"][:4] == ["6", "3", "3", "50.0%"] and rows["all"][:4] == ["18", "4", "3", "16.7%"]
    assert "3 candidates rejected:" in out and "33.3%  refusal" in out
    code, _, _ = verb("stats", "--dataset", "Toy", "--data_dir", toy, "--csv", tmp_path / "c.csv")
    table = list(csv.DictReader(io.StringIO((tmp_path / "c.csv").read_text())))
    assert len(table) == 6
    bike = next(row for row in table if (row["domain"], row["class"]) == ("photo", "Bike"))
    assert (bike["candidates"], bike["chains"]) == ("2", "0")
    assert (bike["rejected_label"], bike["rejected_refusal"]) == ("1", "1")
    assert sum(float(row["dollars"] or 0) for row in table) == 1.5
    assert (bike["dollars"], bike["unpriced"]) == ("", "2")


def test_card_has_yaml_a_hub_accepts_and_the_numbers_of_the_data(
    toy: Path, chains: Path, verb: Verb, tmp_path: Path
) -> None:
    import yaml

    path = tmp_path / "README.md"
    code, _, _ = verb("card", "--dataset", "Toy", "--data_dir", toy, "--output", path, "--licence", "cc-by-4.0")
    text = path.read_text("utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert code == 0 and head["license"] == "cc-by-4.0" and head["pretty_name"] == "Toy-Reasoning"
    assert head["size_categories"] == ["n<1K"] and head["language"] == ["en"]
    assert "3 of 18 images (16.7%) have an accepted chain, drawn from 6 candidates" in text
    assert "| art | 9 | 2 | 22.2% | 66.7% |" in text and "3 of 6 candidates were accepted (50.0%)" in text
    assert "Of 3 accepted chains, 3 were generated without the label" in text
    assert "What type of thing is in this photo? Choose from the following options: alarm clock, bike, mug." in text
    assert "Do not train on chains of the target domain" in text
    import hashlib

    assert hashlib.sha256(chains.read_bytes()).hexdigest() in text


def test_outputs_make_their_folders(toy: Path, chains: Path, verb: Verb, tmp_path: Path) -> None:
    for name, option in (("stats", "--csv"), ("card", "--output"), ("browse", "--output")):
        path = tmp_path / name / "deep" / "file"
        code, _, err = verb(name, "--dataset", "Toy", "--data_dir", toy, option, path)
        assert code == 0 and path.is_file(), err
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_a_store_of_25000_images_costs_a_write_and_a_look_a_chain_and_bounded_memory(
    tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    """In a process of its own, for its memory. 100,000 candidates: a write each, a sync for every 256, and one reading.

    Counted and not timed, as the machine may be slow or busy: what grew with the square would count so.
    """
    import subprocess
    import sys

    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc, which is not here")
    code = f"""
import collections, json, os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from domainbed_reasoning.chains import store
from domainbed_reasoning.chains.store import ChainWriter, load_chains
calls = collections.Counter()
def counted(place, name):
    there = getattr(place, name)
    def call(*given, **named):
        calls[name] += 1
        return there(*given, **named)
    setattr(place, name, call)
for name in ("write", "fsync"):
    counted(os, name)
for name in ("parse_json", "check_record", "parse_chain"):
    counted(store, name)
path, chain = {str(tmp_path / "c.jsonl")!r}, {chain_text("mug", "long " * 110)!r}
more = {{"teacher": "openai:gpt-4o", "sha256": "0" * 64, "reason": "…" * 30, "seconds": 1.5}}
with ChainWriter(path, sync_seconds=float("inf")) as writer:
    for i in range(25_000):
        for k in range(4):
            verdict = "accepted" if k == 3 else "rejected"
            writer.append({{"image": f"a/b/{{i}}.jpg", "chain": chain, "attempt": k, "verdict": verdict, **more}})
appended = dict(calls)
calls.clear()
known = {{f"a/b/{{i}}.jpg" for i in range(25_000)}}
chains = load_chains(path, known)
# Not getrusage: its peak is inherited from the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([len(chains), appended, calls, int(peak.split()[1]) / 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, appended, opened, megabytes = json.loads(done.stdout)
    assert count == 25_000
    assert appended == {"check_record": 100_000, "write": 100_000, "fsync": 1 + 391}  # the folder's, and of 256 each
    assert opened == {"parse_json": 100_000, "check_record": 100_000, "parse_chain": 25_000}
    assert megabytes < 300


def test_candidates_of_missing_images_are_counted_and_excluded(
    toy: Path, chains: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    """To the three accepted chains of Toy come two of images of another dataset."""
    unknown = [{"image": f"other/{i}.png", "chain": chain_text("mug"), "teacher": "stranger"} for i in range(2)]
    with chains.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in unknown)
    where = ("--dataset", "Toy", "--data_dir", toy)
    message = "2 candidates are for images that are not in the dataset; `check` lists them."
    _, out, _ = verb("stats", *where)
    assert message in out
    _, card, err = verb("card", *where)
    assert message in err and "stranger" not in card.partition("## Files")[0]
    assert "3 of 18 images (16.7%) have an accepted chain, drawn from 6 candidates" in card
    assert "Of 3 accepted chains, 3 were generated" in card and "8 lines, 2 of them for images that are not" in card
    assert message in verb("browse", *where, "--output", tmp_path / "b.html")[1]
    code, out, _ = verb("export", tmp_path / "e.jsonl", "--format", "internvl", *where)
    assert code == 0 and "Wrote 3 chains to" in out and f"Excluded: {message}" in out
