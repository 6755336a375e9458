"""Bundles of chains: built, checked by digest, matched to images by path or content, and merged with a chain file."""

import hashlib
import json
import lzma
import re

import pytest

from builders.files import chain_text, read_lines, write_images, write_lines
from domainbed_reasoning.chains import bundled
from domainbed_reasoning.chains.build_bundle import KEPT, main, pack, write_bundle
from domainbed_reasoning.chains.bundled import bundle_path, read_bundle
from domainbed_reasoning.chains.matching import match_images
from domainbed_reasoning.chains.record import ChainFileError
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import ACCEPTED
from domainbed_reasoning.chains.training_chains import load_training_chains

CLASSES = ("dog", "horse")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def toy(tmp_path):
    """A folder of 2 domains, 2 classes, 2 images each, and a bundle of a chain an image; one concludes wrongly."""
    root = tmp_path / "toy"
    images = write_images(root, ["a", "b"], CLASSES, 2)
    records = [
        {"image": image, "chain": chain_text(image.split("/")[1], image), "sha256": sha256(root / image), "seconds": 1}
        for image in images
    ]
    wrong = {"verdict": "rejected", "rule": "label", "reason": "concludes 'horse'", "chain": chain_text("horse")}
    records[0] |= wrong
    target = tmp_path / "toy.jsonl.xz"
    write_bundle(write_lines(tmp_path / "source.jsonl", records), target)
    return root, images, str(target)


def load(toy, choice=None, unverified=None, images=None):
    root, all_images, bundle = toy
    return load_training_chains(choice, root / "reasoning.jsonl", bundle, images or all_images, unverified)


def test_bundle_bytes_do_not_depend_on_line_order_or_dropped_keys(toy, tmp_path, capsys):
    lines = read_lines(tmp_path / "source.jsonl")
    again = tmp_path / "again.jsonl.xz"
    assert main([str(write_lines(tmp_path / "reversed.jsonl", lines[::-1])), str(again)]) == 0
    assert again.read_bytes() == (tmp_path / "toy.jsonl.xz").read_bytes()
    assert sha256(again) in capsys.readouterr().out
    unpacked = [json.loads(line) for line in lzma.decompress(again.read_bytes()).decode().splitlines()]
    assert [record["image"] for record in unpacked] == sorted(record["image"] for record in lines)
    assert {key for record in unpacked for key in record} <= set(KEPT)
    with pytest.raises(ValueError, match=re.escape("must end in .jsonl.xz; got 'x.xz'")):
        write_bundle(tmp_path / "source.jsonl", tmp_path / "x.xz")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"SHA-256 is [0-9a-f]{12}…, but toy.jsonl.xz.sha256"),
        (lambda path: bundled.digest_path(path).write_text("0" * 64), "says 000000000000…"),
        (lambda path: bundled.digest_path(path).write_text(""), "says nothing"),
        (lambda path: bundled.digest_path(path).unlink(), "cannot be read .*sha256"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: resealed(path, bytes(100)), "cannot be decompressed"),
        (lambda path: resealed(path, path.read_bytes()[:-20]), "truncated"),
        (lambda path: resealed(path, path.read_bytes() + path.read_bytes()), "followed by other data"),
        (lambda path: resealed(path, lzma.compress(b'{"image": "a"}\n')), "line 1: the key 'chain' is missing"),
        (lambda path: resealed(path, lzma.compress(b'{"image": "a", "ch')), "line 1: incomplete"),
    ],
)
def test_a_damaged_bundle_is_refused_and_nothing_of_it_is_used(toy, tmp_path, spoil, message):
    spoil(tmp_path / "toy.jsonl.xz")
    with pytest.raises(ChainFileError, match=message):
        load(toy)


def resealed(path, data):
    path.write_bytes(data)
    bundled.digest_path(path).write_text(hashlib.sha256(data).hexdigest())


def test_a_bundle_larger_than_the_limit_is_not_unpacked(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "_MAX_BYTES", 3000)
    resealed(tmp_path / "toy.jsonl.xz", lzma.compress(bytes(1 << 20)))
    with pytest.raises(ChainFileError, match="larger than 3,000 bytes"):
        load(toy)


def test_bundle_is_the_default_and_its_coverage_is_reported(toy):
    loaded = load(toy)
    assert sorted(loaded.texts) == toy[1][1:]
    digest = sha256(bundle_path(toy[2]))[:12]
    assert loaded.summary == f"7 of 8 images have a chain (87.5%): 7 from the bundle toy.jsonl.xz (SHA-256 {digest})."
    assert loaded.bundle == f"toy.jsonl.xz {sha256(bundle_path(toy[2]))}" and not loaded.warnings


def test_chain_file_takes_precedence_and_sources_are_reported(toy):
    root, images, _ = toy
    own = [{"image": images[0], "chain": chain_text("dog", "mine")}, {"image": images[5], "chain": chain_text("dog")}]
    write_lines(root / "reasoning.jsonl", own)
    loaded = load(toy)
    assert len(loaded.texts) == 8 and "mine" in loaded.texts[images[0]]
    assert loaded.texts[images[5]] == own[1]["chain"]
    assert f"8 of 8 images have a chain (100.0%): 2 from {root / 'reasoning.jsonl'} (1 in place of" in loaded.summary
    assert "6 from the bundle" in loaded.summary
    write_lines(root / "reasoning.jsonl", [own[0], own[0]])
    with pytest.raises(ChainFileError, match=r"reasoning.jsonl, line 2: a second accepted chain of 'a/dog/0.png'"):
        load(toy)


def test_another_choice_replaces_the_bundle_or_turns_chains_off(toy, tmp_path):
    root, images, _ = toy
    file = write_lines(tmp_path / "mine.jsonl", [{"image": images[3], "chain": chain_text("horse")}])
    write_lines(root / "reasoning.jsonl", [{"image": images[4], "chain": chain_text("dog", "of the folder")}])
    loaded = load(toy, str(file))
    assert list(loaded.texts) == [images[3]] and (loaded.summary, loaded.bundle) == ("", "")
    assert "of the folder" not in load(toy, "bundled").texts[images[4]]
    assert load(toy, "none").texts == {} and load(toy, "none").bundle == ""
    with pytest.raises(ValueError, match="has no bundle"):
        load_training_chains("bundled", root / "reasoning.jsonl", None, images)


def test_unverified_adds_chains_rejected_only_by_the_label_rule(toy, tmp_path):
    """As if no label had been known, the first candidate counts; one that breaks another rule never does."""
    root, images, _ = toy
    rules = Rules(CLASSES, min_words=0, verified=False)
    loaded = load(toy, unverified=rules)
    assert len(loaded.texts) == 8 and loaded.texts[images[0]] == chain_text("horse")
    label = {"verdict": "rejected", "rule": "label"}
    lines = [
        {"image": images[1], "chain": f"Sure!\n{chain_text('A horse.')}", **label},
        {"image": images[1], "chain": chain_text("dog", "right, but later")},
        {"image": images[2], "chain": chain_text("dog", reasoning="Clearly, it is a horse."), **label},
        {"image": images[3], "chain": chain_text("horse"), "verdict": "rejected", "rule": "picture"},
    ]
    file = write_lines(tmp_path / "mine.jsonl", lines)
    assert load(toy, str(file), rules).texts == {images[1]: chain_text("horse")}
    assert load(toy, str(file)).texts == {images[1]: lines[1]["chain"]}


def test_renamed_copies_are_matched_by_content_and_only_they_are_read(toy, monkeypatch):
    root, images, _ = toy
    (root / images[6]).rename(root / "b/horse/other.png")
    named = [*images[:6], "b/horse/other.png", images[7]]
    read = []
    from domainbed_reasoning.chains import matching

    digest = matching._digest
    monkeypatch.setattr(matching, "_digest", lambda path: read.append(path.name) or digest(path))
    loaded = load(toy, images=named)
    assert read == ["other.png"]
    assert loaded.texts["b/horse/other.png"] == chain_text("horse", images[6])
    assert "7 from the bundle" in loaded.summary and "1 of them matched by SHA-256" in loaded.summary


def test_content_takes_precedence_over_the_path(toy):
    """Two images have changed names, and one of them is called as none of the bundle: content decides for all."""
    root, images, bundle = toy
    (root / images[6]).rename(root / "b/horse/x.png")
    (root / images[7]).rename(root / images[6])
    matches = match_images(read_bundle(bundle).lines, [*images[:7], "b/horse/x.png"], root)
    assert matches.by_digest == {"b/horse/x.png": images[6], images[6]: images[7]}
    assert matches.renamed == (images[6],) and matches.absent == ()
    (note,) = matches.notes()
    assert note.startswith("1 image has the path of another image in the bundle") and images[6] in note


def test_files_of_the_same_content_share_a_chain_within_their_class_and_are_reported(toy):
    root, images, bundle = toy
    for copy in ("b/dog/copy.png", "a/horse/copy.png"):
        (root / copy).write_bytes((root / images[1]).read_bytes())
    named = [*images, "b/dog/copy.png", "a/horse/copy.png"]
    loaded = load(toy, images=named)
    assert loaded.texts["b/dog/copy.png"] == loaded.texts[images[1]] and "a/horse/copy.png" not in loaded.texts
    assert [warning.split(" (")[0] for warning in loaded.warnings] == [
        "1 file is a copy of another and shares its chain",
        "1 image is in another class folder than in the bundle and gets no bundled chain",
    ]


def test_subset_or_unknown_images_leave_lines_absent_and_images_without_a_chain(toy):
    root, images, bundle = toy
    (root / "a/dog/strange.png").write_bytes(b"other")
    matches = match_images(read_bundle(bundle).lines, [images[1], "a/dog/strange.png", "a/dog/gone.png"], root)
    assert matches.by_path == {images[1]: images[1]} and not matches.by_digest
    assert len(matches.absent) == 7 and not list(matches.notes())


def test_the_bundle_of_pacs_is_valid_and_matches_its_card():
    """Every accepted line passes every rule, and the card's table is of these lines."""
    bundle = read_bundle("PACS")
    records = [record for _, record in bundle.lines]
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    rules = Rules(names)
    accepted = [record for record in records if record["verdict"] == ACCEPTED]
    assert (len(records), len(accepted)) == (9472, 9413) and len({record["sha256"] for record in records}) == 9472
    for record in accepted[::20]:
        assert rules.judge(record["chain"], names.index(record["image"].split("/")[1])).accepted
    card = bundle.path.with_name("PACS.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (\w+) \|((?: [\d.,%]+ \|){5})$", card, re.M))
    groups = {"all": records}
    for record in records:
        for name in record["image"].split("/")[:2]:
            groups.setdefault(name, []).append(record)
    for name, group in groups.items():
        _, chains, _, rejected, share, _ = (cell.strip() for cell in rows[name].split("|"))
        wrong = sum(record["verdict"] != ACCEPTED for record in group)
        assert (chains, rejected) == (f"{len(group):,}", str(wrong)), name
        assert share == f"{1 - wrong / len(group):.2%}", name


@pytest.mark.slow
def test_the_bundle_of_pacs_is_built_from_the_shared_chains(test_data):
    source = test_data / "PACS_reasoning.jsonl"
    if not source.exists():
        pytest.skip(f"no {source}")
    assert lzma.decompress(pack(source)) == lzma.decompress(bundle_path("PACS").read_bytes())
    assert str(source.parent).encode() not in lzma.decompress(pack(source))
