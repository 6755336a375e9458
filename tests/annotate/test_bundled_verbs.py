"""Verbs on a dataset with a bundle of chains: matching, browsing, exporting, statistics, and annotating the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.files import read_lines, write_lines
from domainbed_reasoning.annotate.rule_rates import measure_rules, rates_as_text
from domainbed_reasoning.chains.build_bundle import write_bundle
from domainbed_reasoning.chains.matching import _digest

Verb = Callable[..., tuple[int, str, str]]
NAMES = {"Alarm_Clock": "alarm clock", "Bike": "bike", "Mug": "mug"}


@pytest.fixture
def bundled(toy: Path, tmp_path: Path, chain_text: Callable[..., str]) -> Path:
    """Toy with a bundle of 17 of its 18 images; one concludes another class, one is named as no image on disk."""
    root = toy / "toy"
    images = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))[:-1]
    records: list[dict[str, Any]] = [
        {"image": image, "chain": chain_text(NAMES[image.split("/")[1]]), "sha256": _digest(root / image)}
        for image in images
    ]
    records[0] |= {"verdict": "rejected", "rule": "label", "reason": "mug", "chain": chain_text("mug")}
    records[1]["image"] = "art/Alarm_Clock/elsewhere.png"
    records.append({"image": "art/Bike/gone.png", "chain": chain_text("bike"), "sha256": "0" * 64})
    definition = tmp_path / "definitions" / "toy.toml"
    write_bundle(write_lines(tmp_path / "lines.jsonl", records), definition.with_name("toy.jsonl.xz"))
    with definition.open("a") as file:
        file.write('bundle = "toy.jsonl.xz"\n')
    return toy


def where(toy: Path, chains: str | Path | None = "bundled") -> list[object]:
    return ["--dataset", "Toy", "--data_dir", toy, *(["--chains", chains] if chains else [])]


def test_check_counts_matches_by_path_by_content_and_misses(bundled: Path, verb: Verb) -> None:
    for chains in ("bundled", None):
        code, out, _ = verb("check", *where(bundled, chains), "--no-images")
        assert code == 0 and "bundle toy.jsonl.xz (SHA-256 " in out and "16 of 18 images have a chain (88.9%)" in out
        assert "images matched by path: 16, by SHA-256: 1, not at all: 1; 1 image of the bundle not on disk" in out
        assert ("no chain file at" in out) == (chains is None)
    image = bundled / "toy" / "photo" / "Mug" / "Mug_0.png"
    image.with_name("twin.png").write_bytes(image.read_bytes())
    _, out, _ = verb("check", *where(bundled), "--no-images")
    assert out.count("1 file is a copy of another and shares its chain ('photo/Mug/twin.png' and") == 1


def test_check_accepts_unverified_chains_of_a_bundle_as_of_a_chain_file(
    toy: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    record = {"image": "art/Mug/Mug_0.png", "chain": chain_text("bike"), "verified": False, "verdict": "accepted"}
    record["sha256"] = _digest(toy / "toy" / record["image"])
    lines, definition = write_lines(tmp_path / "lines.jsonl", [record]), tmp_path / "definitions" / "toy.toml"
    write_bundle(lines, definition.with_name("toy.jsonl.xz"))
    definition.write_text(definition.read_text() + 'bundle = "toy.jsonl.xz"\n')
    for chains in (lines, "bundled"):
        code, out, _ = verb("check", *where(toy, chains), "--no-images")
        assert code == 0 and "PROBLEM" not in out and "1 of 18 images have a chain" in out
        assert "1 unverified chains conclude another class: left out of training" in out


def test_check_names_a_bundle_whose_digest_is_wrong(bundled: Path, verb: Verb, tmp_path: Path) -> None:
    (tmp_path / "definitions" / "toy.jsonl.xz").write_bytes(b"other")
    code, out, _ = verb("check", *where(bundled, None), "--no-images")
    assert code == 1 and out.count("PROBLEM") == 1 and "toy.jsonl.xz: its SHA-256 is" in out
    code, _, err = verb("stats", *where(bundled))
    assert code == 1 and "toy.jsonl.xz: its SHA-256 is" in err


def test_stats_card_browse_and_export_read_the_bundle(bundled: Path, verb: Verb, tmp_path: Path) -> None:
    code, out, _ = verb("stats", *where(bundled))
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert code == 0 and rows["all"][:4] == ["18", "17", "16", "88.9%"]
    assert "1 candidate is for an image that is not in the dataset." in out
    assert rows["label"][:4] == ["0", "of", "16", "(0.0%)"] and "1 of 1 (100.0%)" in out
    code, card, err = verb("card", *where(bundled))
    assert code == 0 and "`toy.jsonl.xz`: one JSON object" in card and 'lzma.open("toy.jsonl.xz", "rt"' in card
    assert _digest(tmp_path / "definitions" / "toy.jsonl.xz") in card
    code, out, _ = verb("browse", *where(bundled), "--output", tmp_path / "page.html")
    assert code == 0 and (tmp_path / "page.html").stat().st_size > 10_000
    code, out, _ = verb("export", tmp_path / "out.jsonl", "--format", "jsonl", *where(bundled), "--domains", "art")
    records = read_lines(tmp_path / "out.jsonl")
    assert code == 0 and "Wrote 8 chains" in out
    assert "art/Alarm_Clock/Alarm_Clock_1.png" in {record["image"] for record in records}  # its path on disk
    assert verb("export", tmp_path / "all.jsonl", "--format", "jsonl", *where(bundled), "--all")[1].startswith(
        "Wrote 17"
    )


def test_without_a_chain_file_the_error_names_the_bundle(bundled: Path, verb: Verb, tmp_path: Path) -> None:
    for words in (("stats",), ("card",), ("export", tmp_path / "x.jsonl", "--format", "jsonl")):
        code, _, err = verb(*words, *where(bundled, None))
        assert code == 1 and "Pass --chains bundled for the chains that come with Toy" in err


def test_bundle_is_read_only_and_a_missing_one_is_reported(bundled: Path, verb: Verb) -> None:
    for words in (("annotate", "--rejudge"), ("import", "lines.jsonl"), ("annotate", "--teacher", "self:tiny")):
        code, _, err = verb(*words, *where(bundled))
        assert code == 2 and "--chains bundled is read-only" in err
    code, _, err = verb("stats", "--dataset", "VLCS", "--data_dir", bundled, "--chains", "bundled")
    assert code == 1
    (bundled / "VLCS" / "Caltech101" / "bird").mkdir(parents=True)
    code, _, err = verb("stats", "--dataset", "VLCS", "--data_dir", bundled, "--chains", "bundled")
    assert code == 1 and "VLCS has no bundled chains. Pass the path of a chain file" in err


def test_a_file_called_bundled_is_named_by_a_path(
    bundled: Path, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "bundled", [])
    _, out, _ = verb("stats", *where(bundled, "./bundled"))
    assert "16 of" not in out and out.split("all ")[1].split()[:3] == ["18", "0", "0"]


def test_annotate_asks_only_for_images_that_the_bundle_lacks(
    bundled: Path, verb: Verb, serve: Any, tmp_path: Path
) -> None:
    """The one that it does not know and the one with a rejected chain; with --unverified the latter is done."""
    server = serve()
    teacher = ("--teacher", "openai:test", "--base-url", server.url, "--min-words", 10)
    code, out, _ = verb("annotate", *where(bundled, None), *teacher, "--unverified", "--dry-run")
    assert code == 0 and "17 images have chains in the bundle" in out and "1 of 18 without a chain" in out
    code, out, _ = verb("annotate", *where(bundled, None), *teacher)
    assert "16 images have chains in the bundle toy.jsonl.xz" in out
    asked = {record["image"] for record in read_lines(bundled / "toy" / "reasoning.jsonl")}
    assert asked == {"art/Alarm_Clock/Alarm_Clock_0.png", "photo/Mug/Mug_2.png"}
    _, out, _ = verb("annotate", *where(bundled, tmp_path / "mine.jsonl"), *teacher, "--dry-run")
    assert "18 of 18 without a chain" in out and "bundle" not in out


def test_rates_of_rules_are_counted_in_three_ways(chain_text: Callable[..., str]) -> None:
    """Two true chains, one of which speaks for its class; a wrong one, one that a person rejected, and a broken one."""
    labels = {f"{i}.png": 2 for i in range(5)}
    spoken_for = chain_text("mug").replace("The light may mislead.", "Therefore, it is a mug.")
    records = [
        {"image": "0.png", "chain": chain_text("mug")},
        {"image": "1.png", "chain": spoken_for},
        {"image": "2.png", "chain": chain_text("bike"), "verdict": "rejected", "rule": "label"},
        {"image": "3.png", "chain": chain_text("mug"), "verdict": "rejected", "rule": "blurred"},
        {"image": "4.png", "chain": "no chain", "verdict": "rejected", "rule": "stage_missing"},
    ]
    rates = measure_rules(records, labels, tuple(NAMES.values()))
    assert (rates.true, rates.wrong) == (2, 3) and rates.rejected == {"": 2}
    assert rates.found == {"label": 1, "": 1, "stage_missing": 1}
    assert rates.exchanged == {"label": 1, "contradiction": 1}
    rows = {line.split()[0]: line for line in rates_as_text(rates).splitlines()}
    assert rows["contradiction"].split("  ")[-1].strip() == "1 of 2 (50.0%)"
    assert "every rule: –, –, –" in rates_as_text(measure_rules([], {}, ("mug",)))


def test_the_divergence_analysis_takes_bundled_chains(test_data: Path, verb: Verb, tmp_path: Path) -> None:
    words = ("analyze", "divergence", "--encoder", "tiny", "--images", 2, "--output", tmp_path, "--chains", "bundled")
    code, out, err = verb(*words, "--dataset", "PACSReasoning", "--data_dir", test_data)
    assert code == 0, err
    assert list(tmp_path.glob("divergence_PACSReasoning_bundled_*"))
    code, _, err = verb(*words, "--dataset", "ShapesReasoning")
    assert code == 1 and "ShapesReasoning has no bundled chains." in err


def test_the_rates_in_the_docstring_of_the_rules_are_those_of_the_bundle() -> None:
    from domainbed_reasoning.chains import rules
    from domainbed_reasoning.chains.bundled import read_bundle

    assert rules.__doc__ is not None
    records = [record for _, record in read_bundle("PACS").lines][::10]
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    labels = {record["image"]: names.index(record["image"].split("/")[1]) for record in records}
    rates = measure_rules(records, labels, names)
    assert rates.rejected == {"": rates.true} and set(rates.found) <= {"label", ""}
    assert set(rates.exchanged) == {"label", "contradiction"}
    assert json.dumps("contradiction       0             0            676 (7.2%)")[1:-1] in rules.__doc__
