"""Annotating against a real server: failures, rate limits, kills, and the content of requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.pipeline import Summary, plan
from domainbed_reasoning.annotate.run_report import report
from domainbed_reasoning.annotate.teacher import Request, read_picture
from domainbed_reasoning.chains.store import load_chains
from domainbed_reasoning.commands import annotate
from domainbed_reasoning.images.catalog import Picture

KEY = "sk-test-0123456789"
Verb = Callable[..., tuple[int, str, str]]


def arguments(toy: Path, url: str, chains: Path) -> list[object]:
    return [
        *("annotate", "--dataset", "Toy", "--data_dir", toy, "--chains", chains),
        *("--teacher", "openai:test", "--base-url", url, "--min-words", 10),
    ]


def without_times(records: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return records by image and attempt, without what differs between any two runs."""
    return {
        (record["image"], record["attempt"]): {k: v for k, v in record.items() if k not in ("time", "seconds")}
        for record in records
    }


def test_every_candidate_is_kept_with_verdict_reason_and_provenance(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains = tmp_path / "chains.jsonl"
    code, out, _ = verb(*arguments(toy, serve().url, chains), "--price", 2, 8)
    records = lines_of(chains)
    assert code == 0 and f"{len(records)} candidates" in out
    by_image = Counter(record["image"] for record in records)
    assert len(by_image) == 18 and max(by_image.values()) <= 4
    for image in by_image:
        own = [record for record in records if record["image"] == image]
        assert [record["attempt"] for record in own] == list(range(len(own)))
        # Drawn only until one is accepted.
        assert all(record["verdict"] == "rejected" and record["rule"] and record["reason"] for record in own[:-1])
        assert own[-1]["verdict"] == "accepted" or len(own) == 4
    one = records[0]
    assert one["teacher"] == "openai:test" and one["model"] == "test-2026" and one["label_conditioned"] is False
    assert set(one["sampling"]) == {"temperature", "top_p", "max_tokens", "seed"} and len(one["sha256"]) == 64
    usage = one["usage"]
    assert usage["dollars"] == pytest.approx((usage["prompt_tokens"] * 2 + usage["completion_tokens"] * 8) / 1e6)
    assert load_chains(chains)


def test_transient_errors_only_cost_time(toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any) -> None:
    """429, 500, 503, hanging, cut off, broken, empty, HTML and reset: each comes, the store is that of a calm run."""
    calm, stormy = tmp_path / "calm.jsonl", tmp_path / "stormy.jsonl"
    verb(*arguments(toy, serve().url, calm))
    server = serve("--faults", "0.6", "--hang", "6")
    code, _, err = verb(*arguments(toy, server.url, stormy), "--timeout", 3, "--concurrency", 16)
    assert code == 0, err
    assert without_times(lines_of(stormy)) == without_times(lines_of(calm))
    assert len({event["fault"] for event in server.events() if event.get("fault")}) >= 5


def test_retry_after_is_respected(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five answers of 429 that ask for 0.2 seconds: as much is slept after each."""
    server = serve("--faults", "1", "--kinds", "429")
    slept: list[float] = []
    sleep = asyncio.sleep

    def noting(seconds: float, *result: Any) -> Any:
        slept.append(seconds)
        return sleep(seconds, *result)

    monkeypatch.setattr(asyncio, "sleep", noting)
    code, _, _ = verb(*arguments(toy, server.url, tmp_path / "c.jsonl"), "--concurrency", 1, "--max-requests", 5)
    assert code == 3
    assert slept.count(0.2) == 5
    assert sum(event["event"] == "arrived" for event in server.events()) == 10


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("key", "rejects every request (HTTP 401: Incorrect API key provided: [key].). Check the key"),
        ("quota", "no credit left"),
    ],
)
def test_permanent_errors_end_the_run_without_showing_the_key(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("--always", failure)
    code, out, err = verb(*arguments(toy, server.url, tmp_path / "c.jsonl"), "--concurrency", 1)
    assert code == 1 and message in err
    assert KEY not in out + err
    assert len(server.events()) == 1


def test_the_key_is_in_no_file_and_no_output(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server echoes the key in its errors; the run still never shows it, nor writes it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chains = tmp_path / "chains" / "c.jsonl"
    server = serve("--always", "500")
    code, out, err = verb(*arguments(toy, server.url, chains), "--retries", 0)
    assert code == 1 and "[key]" in err and "no answer after 1 attempt;" in err
    more = verb(*arguments(toy, serve("--always-key").url, chains), "--candidates", 1)
    assert "Your key is [key]." in chains.read_text("utf-8")
    assert KEY not in out + err + "".join(more[1:])
    assert all(KEY.encode() not in path.read_bytes() for path in chains.parent.iterdir())


def test_a_missing_key_for_openai_itself_is_named(toy: Path, verb: Verb) -> None:
    code, _, err = verb("annotate", "--dataset", "Toy", "--data_dir", toy, "--teacher", "openai:gpt-4o")
    assert code == 1 and "OPENAI_API_KEY is not set" in err
    assert not (toy / "toy" / "reasoning.jsonl").exists()


def test_nothing_to_do_within_a_limit_is_reported(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    """Two images are done, sixteen are not."""
    command = arguments(toy, serve("--always-key").url, tmp_path / "c.jsonl")
    verb(*command, "--limit", 2, "--candidates", 1)
    for more in ((), ("--dry-run",)):
        _, out, _ = verb(*command, "--limit", 2, "--candidates", 1, *more)
        assert "Nothing to do: of the first 2 images (--limit), every image has" in out and "(18 images" in out


def test_unknown_cost_is_not_zero(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    """The model test has no list price; for several models, the number without one is reported."""
    code, out, _ = verb(*arguments(toy, serve().url, tmp_path / "c.jsonl"))
    assert code == 0 and "cost unknown." in out and "$" not in out
    assert "$0.0300 plus 3 of unknown cost." in report(Summary(accepted=5, dollars=0.03, unpriced=3), 5)
    assert "$0.0000." in report(Summary(), 5)


def test_content_filter_is_a_refusal_and_a_bad_image_is_retried_later(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains = tmp_path / "c.jsonl"
    verb(*arguments(toy, serve("--always", "filter").url, chains), "--candidates", 1)
    assert {record["rule"] for record in lines_of(chains)} == {"refusal"}
    code, out, _ = verb(*arguments(toy, serve("--always", "bad").url, tmp_path / "d.jsonl"), "--concurrency", 16)
    assert code == 1 and "18 images got no answer" in out and "image too large" in out
    assert not (tmp_path / "d.jsonl").exists() and "browse" not in out


def test_max_cost_is_never_exceeded_and_max_requests_is_exact(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    chains = tmp_path / "c.jsonl"
    url = serve().url
    code, out, _ = verb(*arguments(toy, url, chains), "--price", 10, 10, "--max-cost", 0.06, "--max-tokens", 500)
    spent = sum(record["usage"]["dollars"] for record in lines_of(chains))
    assert code == 3 and "--max-cost" in out
    assert 0.03 < spent <= 0.06
    code, _, _ = verb(*arguments(toy, url, tmp_path / "d.jsonl"), "--max-requests", 7, "--concurrency", 5)
    assert code == 3 and len(lines_of(tmp_path / "d.jsonl")) == 7
    code, _, err = verb(*arguments(toy, url, chains), "--max-cost", 1)
    assert code == 2 and "price of openai:test is unknown" in err


def test_what_another_run_wrote_while_the_teacher_was_loading_is_not_asked_again(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run begins after this one has planned its work, and ends before this one opens the file."""
    chains, server, load = tmp_path / "c.jsonl", serve(), annotate._teacher

    def slow(args: Any) -> Any:
        monkeypatch.setattr(annotate, "_teacher", load)
        assert verb(*arguments(toy, server.url, chains))[0] == 0
        return load(args)

    monkeypatch.setattr(annotate, "_teacher", slow)
    code, out, _ = verb(*arguments(toy, server.url, chains))
    keys = [event["key"] for event in server.events() if event["event"] == "answered"]
    assert code == 0 and len(keys) == len(set(keys)) == len(lines_of(chains))
    load_chains(chains)  # refuses a second accepted chain of an image


def test_a_dry_run_leaves_out_images_that_cannot_be_read(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    (toy / "toy" / "art" / "Mug" / "Mug_0.png").write_bytes(b"no image")
    code, out, _ = verb(*arguments(toy, serve().url, tmp_path / "c.jsonl"), "--dry-run", "--price", 1, 1)
    assert code == 0 and "18 of 18 without a chain" in out


def test_batches_tell_no_seconds_and_few_candidates_are_not_none() -> None:
    batch = {"teacher": "t", "seconds": 0.0, "usage": {}, "verdict": "accepted"}
    assert cost.habits([batch] * 20, "t", 100).seconds == cost.ASSUMED_SECONDS
    assert cost.habits([batch, *[batch | {"seconds": 3.0}] * 19], "t", 100).seconds == 3.0


def test_dry_run_sends_nothing_and_measures_once_it_can(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    chains = tmp_path / "c.jsonl"
    server = serve()
    code, out, _ = verb(*arguments(toy, server.url, chains), "--dry-run", "--price", 1, 1)
    assert code == 0 and "18 of 18 without a chain" in out and "assumed" in out
    assert not server.events() and not chains.exists()
    verb(*arguments(toy, server.url, chains), "--max-requests", 12)
    before = len(server.events())
    code, out, _ = verb(*arguments(toy, server.url, chains), "--dry-run", "--price", 1, 1)
    assert "measured on 12" in out and len(server.events()) == before


def test_unreadable_image_is_reported_and_the_run_continues(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as DomainBed's modules leave it
    broken = toy / "toy" / "art" / "Mug" / "Mug_0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    code, out, _ = verb(*arguments(toy, serve().url, tmp_path / "c.jsonl"))
    assert code == 1 and "1 image could not be read" in out and "art/Mug/Mug_0.png" in out
    assert len({record["image"] for record in lines_of(tmp_path / "c.jsonl")}) == 17


@pytest.mark.parametrize("kills", [5])
def test_repeatedly_killed_run_ends_with_the_same_store_without_repeated_requests(
    toy: Path, serve: Any, start_verb: Any, verb: Verb, tmp_path: Path, lines_of: Any, kills: int
) -> None:
    """No request arrives again whose answer the store had when its asker was killed."""
    calm, killed = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl"
    verb(*arguments(toy, serve().url, calm))
    server = serve("--delay", "0.1")
    dice = random.Random(0)
    for _ in range(kills):
        seen = len(server.events())
        child = start_verb(*arguments(toy, server.url, killed), "--concurrency", 3)
        while len(server.events()) < seen + 3 and child.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        time.sleep(0.3)
        stored = {record["sampling"]["seed"] for record in lines_of(killed)}
        mark = len(server.events())
        verb(*arguments(toy, server.url, killed), "--max-requests", 2, "--concurrency", 1)
        later = {int(event["key"].partition(":")[2]) for event in server.events()[mark:]}
        assert not later & stored
    code, _, _ = verb(*arguments(toy, server.url, killed))
    assert code == 0
    assert without_times(lines_of(killed)) == without_times(lines_of(calm))


def test_interrupt_completes_requests_in_progress(
    toy: Path, serve: Any, start_verb: Any, tmp_path: Path, lines_of: Any
) -> None:
    server = serve("--delay", "0.4")
    child = start_verb(*arguments(toy, server.url, tmp_path / "c.jsonl"), "--concurrency", 2)
    while len(server.events()) < 4:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=600)
    assert child.returncode == 3, err
    assert "Stopped early: interrupted" in out
    answered = [event for event in server.events() if event["event"] == "answered"]
    assert len(lines_of(tmp_path / "c.jsonl")) == len(answered)


# ---- the label is withheld ----


def test_a_request_has_no_field_that_could_hold_a_label_or_a_path() -> None:
    assert set(Request.__dataclass_fields__) == {
        "question",
        "image",
        "seed",
        "max_tokens",
        "temperature",
        "top_p",
    }


def test_requests_do_not_depend_on_the_label(toy: Path, serve: Any, verb: Verb, tmp_path: Path) -> None:
    """The same pixels in every class folder and domain, with the label in file name, EXIF and comment: one request.

    Each class folder gets a copy under a name that tells its label. If anything of a request followed from the label,
    the requests of two folders would differ; they are equal, byte for byte and header for header.
    """
    picture = Image.open(toy / "toy" / "art" / "Mug" / "Mug_0.png").convert("RGB")
    for folder in (toy / "toy").glob("*/*"):
        shutil.rmtree(folder)
        folder.mkdir()
        told = Image.Exif()
        told[270] = f"This is a {folder.name}"
        picture.save(folder / f"{folder.name}_GT_{folder.name}.png", exif=told, comment=folder.name)
    server = serve("--bodies")
    verb(*arguments(toy, server.url, tmp_path / "c.jsonl"), "--unverified", "--candidates", 1)
    requests = [event for event in server.events() if event["event"] == "arrived"]
    assert len(requests) == 6
    asked = {json.dumps([event["body"], event["headers"]], sort_keys=True) for event in requests}
    assert len(asked) == 1


def test_every_class_is_named_once_among_the_options_in_one_order_and_nowhere_else(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path
) -> None:
    server = serve("--bodies")
    verb(*arguments(toy, server.url, tmp_path / "c.jsonl"))
    requests = [event["body"] for event in server.events() if event["event"] == "arrived"]
    questions = set()
    for body in requests:
        image, text = body["messages"][0]["content"]
        questions.add(text["text"])
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        sent = Image.open(io.BytesIO(data))
        assert not sent.getexif() and set(sent.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        rest = {**body, "messages": [{**body["messages"][0], "content": []}]}
        for name in ("alarm", "bike", "mug", "Toy", "art", "photo"):
            assert name.casefold() not in json.dumps(rest).casefold()
    assert len(questions) == 1
    question = questions.pop()
    assert "following options: alarm clock, bike, mug." in question
    assert all(question.count(name) == 1 for name in ("alarm clock", "bike", "mug"))


def test_the_order_of_requests_does_not_follow_the_labels() -> None:
    """Every round of the plan has each domain and class once, in an order that changes from round to round."""
    pictures = [Picture(f"{d}/{c}/{i}.jpg", d, c) for d in "ab" for c in "xyz" for i in range(20)]
    jobs = plan(pictures, "xyz", [], "t", "1", 4)
    rounds = [[(job.picture.domain, job.picture.label) for job in jobs[i : i + 6]] for i in range(0, 120, 6)]
    assert all(len(set(one)) == 6 for one in rounds)
    assert len({tuple(one) for one in rounds}) > 15
    assert len({tuple(job.picture.path for job in plan(pictures, "xyz", [], "t", "1", 4)) for _ in range(2)}) == 1


def test_plan_skips_finished_images_and_counts_earlier_candidates() -> None:
    pictures = [Picture(f"a/x/{i}.jpg", "a", "x") for i in range(4)]
    records = [
        {"image": "a/x/0.jpg"},
        {"image": "a/x/1.jpg", "verdict": "rejected", "teacher": "t", "prompt_version": "1"},
        {"image": "a/x/2.jpg", "verdict": "rejected", "teacher": "t", "prompt_version": "1"},
        {"image": "a/x/2.jpg", "verdict": "rejected", "teacher": "t", "prompt_version": "1"},
        {"image": "a/x/3.jpg", "verdict": "rejected", "teacher": "another", "prompt_version": "1"},
        {"image": "a/x/3.jpg", "verdict": "rejected", "teacher": "t", "prompt_version": "0"},
    ]
    jobs = {job.picture.path: job.asked for job in plan(pictures, ["x"], records, "t", "1", 2)}
    assert jobs == {"a/x/1.jpg": 1, "a/x/3.jpg": 0}


def test_attempts_go_on_after_the_latest_where_lines_were_deleted() -> None:
    """An attempt that is asked again would count as one whose answer is there."""
    ours = {"image": "a/x/0.jpg", "verdict": "rejected", "teacher": "t", "prompt_version": "1"}
    for attempts, following in (([1], 2), ([0, 3], 4), ([2, 0], 3), ([None, None], 2)):
        records = [ours | ({} if attempt is None else {"attempt": attempt}) for attempt in attempts]
        (job,) = plan([Picture("a/x/0.jpg", "a", "x")], ["x"], records, "t", "1", 9)
        assert (job.first, job.asked) == (following, len(attempts))


def test_the_time_of_a_dry_run_counts_the_requests_a_minute_of_every_endpoint(
    toy: Path, verb: Verb, tmp_path: Path
) -> None:
    """18 images at one request a minute; at four endpoints a quarter of it."""
    words = (
        "annotate",
        "--dataset",
        "Toy",
        "--data_dir",
        toy,
        "--chains",
        tmp_path / "c.jsonl",
        "--teacher",
        "openai:x",
    )
    urls = [f"http://127.0.0.1:{port}/v1" for port in (1, 2, 3, 4)]
    minutes = []
    for some in (urls[:1], urls):
        code, out, err = verb(*words, "--base-url", *some, "--rpm", 1, "--candidates", 1, "--dry-run")
        assert code == 0, err
        minutes.append(float(re.search(r"time +about ([\d.]+) minutes", out)[1]))
    assert minutes[0] == pytest.approx(4 * minutes[1], rel=0.2)


# ---- cost ----


def test_gpt_4o_counts_an_image_of_pacs_as_one_tile_and_a_large_one_as_six() -> None:
    """227×227: one tile, 85 + 170. 2048×1536 is scaled to 1024×768, two by two tiles; 3072×1024: to 2304×768, then
    the long side's limit of 2048 comes first: 2048×683, four by two tiles."""
    assert cost.image_tokens("gpt-4o", 227, 227) == 255
    assert cost.image_tokens("gpt-4o", 2048, 1536) == 85 + 4 * 170
    assert cost.image_tokens("gpt-4o", 3072, 1024) == 85 + 8 * 170
    assert cost.image_tokens("gpt-4o-mini", 227, 227) == 2833 + 5667
    assert cost.image_tokens("Qwen", 224, 224) == 64


def test_estimate_draws_until_one_is_accepted() -> None:
    """Half are accepted, four candidates: 1 + 1/2 + 1/4 + 1/8 = 1.875 requests an image; with one left, 1."""
    habit = cost.Habits(100, 1000, 200, 0.5, 3.6)
    will = cost.estimate([4, 4, 1], habit, (1.0, 10.0), concurrency=2)
    assert will.requests == pytest.approx(4.75)
    assert will.dollars == pytest.approx(4.75 * (1000 * 1 + 200 * 10) / 1e6)
    assert will.hours == pytest.approx(4.75 * 3.6 / 2 / 3600)


def test_read_picture_gives_domainbeds_pixels_without_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # "rotate me", which DomainBed's loader does not
    Image.new("RGB", (30, 20), (10, 200, 30)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    data, sha256 = read_picture(tmp_path / "a.jpg")
    sent = Image.open(io.BytesIO(data))
    assert sent.size == (30, 20) and not sent.getexif() and len(sha256) == 64
    Image.new("RGB", (3000, 1000)).save(tmp_path / "b.png")
    assert Image.open(io.BytesIO(read_picture(tmp_path / "b.png")[0])).size == (768, 256)


# ---- a model in this process ----


def test_a_local_model_writes_candidates_in_batches_and_names_itself(
    toy: Path, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    """The embedded model knows nothing of Toy; its words are kept all the same, each with its verdict."""
    where = ("--dataset", "Toy", "--data_dir", toy, "--chains", tmp_path / "c.jsonl", "--max-tokens", 12)
    code, out, err = verb("annotate", *where, "--teacher", "self:tiny", "--candidates", 2, "--batch", 8)
    records = lines_of(tmp_path / "c.jsonl")
    assert code == 1, err  # nothing was accepted
    assert 30 <= len(records) <= 36 and {record["teacher"] for record in records} == {"self:tiny"}
    # Bootstrap asks exactly what training asks: q_reason, without advice on form.
    assert {record["prompt_version"] for record in records} == {"1"}
    assert all(record["usage"]["dollars"] == 0 and record["usage"]["prompt_tokens"] > 20 for record in records)
    assert f"{len(records)} candidates" in out and "$0.0000" in out


def test_missing_model_error_suggests_a_fix(toy: Path, verb: Verb, tmp_path: Path) -> None:
    code, _, err = verb("annotate", "--dataset", "Toy", "--data_dir", toy, "--teacher", f"hf:{tmp_path}")
    assert code == 1 and "config.json" in err
    assert not (toy / "toy" / "reasoning.jsonl").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--teacher", "gpt-4o"), "openai:MODEL, hf:MODEL or self:MODEL"),
        ((), "--teacher is required"),
        (("--teacher", "self:tiny", "--candidates", 0), "argument --candidates: must be positive; got 0"),
        (("--teacher", "self:tiny", "--top-p", 2), "argument --top-p: must be in (0, 1]; got 2"),
        (
            ("--teacher", "self:tiny", "--max-words", 0, "--min-words", 0),
            "--max-words must be at least 1 (--min-words)",
        ),
        (
            ("--teacher", "self:tiny", "--max-words", 20, "--min-words", 30),
            "--max-words must be at least 30 (--min-words)",
        ),
        (("--teacher", "self:tiny", "--price", "-1", 2), "argument --price: must be non-negative; got -1"),
        (("--teacher", "self:tiny", "--price", 1, "nan"), "argument --price: must be a finite number; got 'nan'"),
        (("--teacher", "self:tiny", "--max-cost", "inf"), "argument --max-cost: must be a finite number"),
        (("--teacher", "self:tiny", "--rpm", "nan"), "argument --rpm: must be a finite number"),
        (("--teacher", "self:tiny", "--temperature", "nan"), "argument --temperature: must be a finite number"),
    ],
)
def test_wrong_usage_is_named_with_exit_code_2(toy: Path, verb: Verb, wrong: tuple[object, ...], message: str) -> None:
    code, _, err = verb("annotate", "--dataset", "Toy", "--data_dir", toy, *wrong)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--rejudge", "--chains", "missing.jsonl"), "Chain file missing.jsonl does not exist"),
        (("--teacher", "openai:m", "--base-url", "http://u:secret@localhost/v1"), "must not contain a password"),
        (("--teacher", "self:tiny", "--dataset", "Tyo"), "Did you mean 'Toy'"),
    ],
)
def test_missing_files_are_named(toy: Path, verb: Verb, wrong: tuple[object, ...], message: str) -> None:
    code, out, err = verb("annotate", "--dataset", "Toy", "--data_dir", toy, *wrong)
    assert code == 1 and message in err and "secret" not in out + err


def test_the_real_server_with_the_embedded_model_answers(
    toy: Path, serve: Any, verb: Verb, tmp_path: Path, lines_of: Any
) -> None:
    server = serve("--backend", "mllm", "--model", "tiny")
    verb(*arguments(toy, server.url, tmp_path / "c.jsonl"), "--prompt", "task", "--max-tokens", 12, "--candidates", 1)
    records = lines_of(tmp_path / "c.jsonl")
    assert len(records) == 18 and all(record["chain"].startswith("<SUMMARY>") for record in records)
