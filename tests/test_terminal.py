"""Terminal output is printable: no verb passes on control sequences of names, logs or answers."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from builders.files import define_toy, write_images
from builders.processes import environment, run_python
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.sweeps.launchers.jobs import Failure, end_of, parse_job, report
from domainbed_reasoning.terminal import is_terminal, json_line, one_line, printable, printable_streams

CHECKOUT = Path(__file__).resolve().parent.parent
NASTY = "a\x1b]0;TAKEN\x07\x9b31m\u202etxt.exe\u2066\x7f\ud800\u2028z"
OBEYED = set("\x1b\x07\x9b\u202e\u2066\x7f\ud800\u2028")


def test_control_characters_are_escaped_and_the_rest_is_unchanged():
    assert printable(NASTY) == r"a\x1b]0;TAKEN\x07\x9b31m\u202etxt.exe\u2066\x7f\ud800\u2028z"
    for kept in (
        "plain\n\ttext",
        "é 日本語 　",
        "\U0001f468\u200d\U0001f469",
        "\u0646\u0645\u06cc\u200c\u062e",
        "e\u0301",
    ):
        assert printable(kept) == kept
    assert printable("a\rb\r\n") == "a\\rb\\r\n" and one_line("a\nb\tc") == "a\\nb\\tc"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_can_print_all(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.write(printable(f"{NASTY} é – … ± 日 \U0001f415", stream))
    stream.flush()
    printed = stream.buffer.getvalue().decode(encoding)
    assert not OBEYED & set(printed)
    if encoding == "ascii":
        assert printed.endswith(r"z \xe9 - ... +/- \u65e5 \U0001f415")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_output_is_equivalent(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    value = {NASTY: [NASTY, "é\U0001f415\n"]}
    line = json_line(value, stream)
    line.encode(encoding)
    assert json.loads(line) == value and not OBEYED & set(line)


def test_a_progress_bar_still_moves(monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with printable_streams():
        for _ in tqdm(range(3), file=sys.stderr, desc="\x1b[31m"):
            pass
    assert sys.stderr.getvalue().count("\r") >= 2 and "\x1b[31m" not in sys.stderr.getvalue()


def test_a_train_script_whose_output_is_doubled_can_print_all(monkeypatch):
    """DomainBed's own stream has no encoding; the file that it writes beside has the locale's."""

    class Tee:
        def write(self, text):
            text.encode("ascii")

    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    print(printable(f"{NASTY} é", Tee()), file=Tee())


def test_the_end_of_a_log_is_text_and_a_long_log_is_not_read_whole(tmp_path, capsys):
    job = parse_job(f"python -m domainbed.scripts.train --algorithm ERM --output_dir {tmp_path}")
    with open(job.log, "wb") as log:
        log.truncate(1 << 40)
        log.seek(0, os.SEEK_END)
        log.write(("\nfirst\n" + NASTY.replace("\ud800", "").replace("\u2028", "") + "\nlast\n").encode())
    assert end_of(job.log)[-1] == "last"
    report([Failure(job, 1)], 2)
    printed = capsys.readouterr().out
    assert "last" in printed and not OBEYED & set(printed)


@pytest.fixture
def nasty_data(tmp_path, monkeypatch):
    """A dataset of a user's whose domain, class and image carry commands, and non-ASCII letters."""
    data_dir = define_toy(monkeypatch, tmp_path)
    domains, classes = ("art\x1b[31m\u202e", "zé"), ("Bike", "Mug–\x9b1m")
    write_images(data_dir / "toy", domains, classes, 1, name="{index}\x1b]0;x\x07.png")
    return data_dir


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    "verb",
    [
        ["check"], ["stats"], ["card"], ["browse", "--output", "p\x1b[31m.html"], 
        ["annotate", "--chains", "c\x1b[31m.jsonl"],
        ["export", "\x1b[31m.jsonl", "--format", "jsonl"], ["import", "\x1b[31m"], ["stats", "--chains", "\x1b[31m"],
        ["collect", "\x1b[31m"], ["report", "\x1b[31m"], ["plan", "--algorithm", "\x1b[31m"], ["study", "\x1b[31m"],
        ["predict", "--job", "\x1b[31m", "x"], ["export", "--job", "\x1b[31m"], ["jobs", "--clear", "\x1b[31m"],
        ["analyze", "sarr-rounds", "\x1b[31m"], ["\x1b[31m"], ["check", "--\x1b[31m"],
    ],
    ids=lambda verb: ascii(" ".join(verb)),
)  # fmt: skip
def test_no_verb_prints_control_characters(nasty_data, verb, encoding, tmp_path, monkeypatch):
    """Whatever the verb says of these names, on a terminal of either encoding."""
    if verb[0] in ("check", "stats", "card", "browse", "annotate", "import", "export", "plan") and "--job" not in verb:
        verb = [*verb, "--dataset", "Toy", *(["--data_dir", str(nasty_data)] if verb[0] != "plan" else [])]
    if verb[0] in ("stats", "card", "browse", "export") and not {"--job", "--chains"} & set(verb):
        chains = tmp_path / "chains.jsonl"
        record = {"image": "zé/Bike/0\x1b]0;x\x07.png", "chain": "x\x9b", "teacher": "t\x1b[31m", "rule": "r\x1b"}
        chains.write_text(json.dumps(record) + "\n")
        verb = [*verb, "--chains", str(chains)]
    monkeypatch.chdir(tmp_path)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    try:
        cli.main(verb)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
    printed = "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert printed and not OBEYED & set(printed)


def test_check_and_stats_print_on_an_ascii_terminal(nasty_data, tmp_path):
    """As processes, whose streams Python opens, in a locale that is not UTF-8 either."""
    env = environment(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    (tmp_path / "chains.jsonl").write_text("")
    for verb in ("check", "stats"):
        options = ("--dataset", "Toy", "--data_dir", nasty_data, "--chains", tmp_path / "chains.jsonl")
        done = run_python("-m", "domainbed_reasoning", verb, *options, env=env, text=False)
        assert done.returncode == 0, done.stderr
        assert b"codec" not in done.stderr and done.stdout.isascii() and done.stdout.count(b"\n") > 2


def test_training_prints_a_domains_name_as_text(capsys):
    from domainbed_reasoning.datasets.base import report_chains
    from domainbed_reasoning.method.task import Task

    report_chains(Task("Toy", ("a", "b"), ("art\x1b[31m\u202e", "zé"), (1,), labels=[[0], [1]]), True)
    assert capsys.readouterr().out == "Toy, art\\x1b[31m\\u202e: 0 of 1 images have a chain (0.0%)\n"


def test_a_stream_that_also_writes_a_file_is_no_terminal():
    """DomainBed's `misc.Tee` replaces the standard streams of a job and lacks `isatty`."""

    class Tee:
        pass

    class Terminal:
        def isatty(self):
            return True

    assert is_terminal(Terminal()) and not any(map(is_terminal, (Tee(), io.StringIO(), None)))
