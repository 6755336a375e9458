"""Planted keys are searched for in files, output, process lists, and requests to other hosts."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders.processes import environment, run_python
from builders.servers import response
from domainbed_reasoning.annotate.openai import OpenAITeacher
from domainbed_reasoning.annotate.teacher import TeacherError

OURS = "sk-planted-a9f3e1c07b"
# What else may stand in the environment of a job.
PLANTED = {
    "OPENAI_API_KEY": OURS,
    "OPENAI_ORG_ID": "org-planted-4410",
    "OPENAI_PROJECT_ID": "proj-planted-0093",
    "HF_TOKEN": "hf_planted_55aa90",
    "AWS_SECRET_ACCESS_KEY": "aws-planted-90d1",
    "WANDB_API_KEY": "wandb-planted-77",
    "GITHUB_TOKEN": "ghp_planted_31",
}
SECRETS = [*PLANTED.values()]


def found_in(folder: Path) -> list[str]:
    """Return the files below a folder whose name or bytes hold a planted secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path) for path in files for secret in SECRETS if secret in str(path) or secret.encode() in path.read_bytes()
    ]


def command_lines(secret: str) -> list[str]:
    """Return the command lines, of any process, that hold a secret."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if secret in text:
            found.append(text)
    return found


CHAIN = (
    "<SUMMARY>I look at {key}.</SUMMARY><CAPTION>A thing.</CAPTION><REASONING>It has parts.</REASONING>"
    "<REFLECTION>None.</REFLECTION><CONCLUSION>bike</CONCLUSION>"
)
FAILURES = {
    "an answer that quotes it": response({"choices": [{"message": {"content": CHAIN.format(key=OURS)}}]}),
    "500 that quotes it": response({"error": {"message": f"trouble with {OURS}"}}, "500 Error"),
    "401 that quotes it": response({"error": {"message": f"bad key {OURS}", "code": OURS, "type": OURS}}, "401 No"),
    "400 that quotes it in its code": response({"error": {"message": "bad", "code": OURS, "param": OURS}}, "400 Bad"),
    "429 that quotes it": response({"error": {"message": OURS}}, "429 Slow"),
    "no JSON but the key": response(OURS),
    "a redirect that holds it": response({}, "307 T").replace(
        b"Content-T", b"Location: /" + OURS.encode() + b"\r\nContent-T"
    ),
    "a header that holds it": response({}, "503 Busy").replace(
        b"Content-Type", f"X-Key: {OURS}\r\nContent-Type".encode()
    ),
    "no HTTP but the key": OURS.encode() + b"\r\n\r\n",
}


ENDING = ("401 that quotes it", "a redirect that holds it")


@pytest.mark.parametrize("failures", [[name for name in FAILURES if name not in ENDING], *([name] for name in ENDING)])
def test_annotate_leaves_no_key_anywhere(
    failures: list[str], toy: Path, liar: Any, start_verb: Any, tmp_path: Path
) -> None:
    """A process of its own with every library's debug output on: files, screen, command lines.

    The faults come in turn; 8 images with two tries each meet all of them.
    """
    turn = itertools.cycle(failures)
    server = liar(lambda connection: connection.sendall(FAILURES[next(turn)]))
    child = start_verb(
        "annotate", "--dataset", "Toy", "--data_dir", toy, "--teacher", "openai:m", "--base-url", server.url,
        "--chains", tmp_path / "out" / "c.jsonl", "--candidates", 1, "--retries", 1, "--concurrency", 8,
        "--min-words", 1, "--unverified",
        **PLANTED, OPENAI_LOG="debug", TMPDIR=str(tmp_path), HOME=str(tmp_path),
    )  # fmt: skip
    seen: list[str] = []
    while child.poll() is None:
        seen += command_lines(OURS)
        time.sleep(0.1)
    out, err = child.communicate()
    assert "Traceback" not in err and len(server.requests) >= len(failures)
    assert not any(secret in out + err for secret in SECRETS)
    assert found_in(tmp_path) == [] and seen == []
    sent = b"".join(server.requests)
    assert OURS.encode() in sent, "the server it is meant for does get it"
    assert not any(value.encode() in sent for value in SECRETS if value != OURS)


@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_training_leaves_no_secret_anywhere(run_stock: Any, domainbed_root: Path, tmp_path: Path) -> None:
    hparams = {"model": "tiny", "batch_size": 2, "max_new_tokens": 4, "mtct_epochs": 1, "both_answers": False}
    done = run_stock(
        domainbed_root, "train", "--dataset", "ShapesReasoning", "--algorithm", "LabelSFT", "--test_envs", 0,
        "--hparams", json.dumps(hparams | {"answer": "label"}), "--steps", 1, "--output_dir", tmp_path / "job",
        cwd=tmp_path, env={**PLANTED, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert {"task.json", "results.jsonl", "model.pkl", "out.txt"} <= {
        path.name for path in (tmp_path / "job").iterdir()
    }
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    assert found_in(tmp_path) == []


@pytest.mark.parametrize("name", [OURS, "hf_abcDEF123", "sk-a b", "OPENAI-KEY"])
def test_key_passed_as_the_variable_name_is_not_repeated(name: str) -> None:
    with pytest.raises(TeacherError, match="--key-env takes the name") as error:
        OpenAITeacher("m", base_url="http://localhost:1/v1", key_variable=name)
    assert name not in str(error.value)


@pytest.mark.parametrize("value", ["sk-x\nX-Evil: 1", "sk-\u00e9", "sk-\x1b[2J"])
def test_a_key_that_would_break_a_header_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(TeacherError, match="is not a valid key") as error:
        OpenAITeacher("m", base_url="http://localhost:1/v1")
    assert value not in str(error.value)


@pytest.mark.parametrize(
    ("url", "failure"),
    [
        ("http://teacher.example.org/v1", "not encrypted: .OPENAI_API_KEY is not sent"),
        ("http://10.0.0.7:8000/v1", "not encrypted"),
        ("http://localhost.example.org/v1", "not encrypted"),
        ("https://user:sk-planted-a9f3e1c07b@example.org/v1", "must not contain a password"),
        ("https://example.org/v1?key=sk-planted-a9f3e1c07b", "must not contain a password or query"),
        ("ftp://example.org/v1", "must start with https"),
        ("file:///etc/passwd", "must start with https"),
        ("example.org/v1", "must start with https"),
        ("https://", "name a host"),
    ],
)
def test_a_url_that_would_show_the_key_is_refused(url: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OURS)
    with pytest.raises(TeacherError, match=failure) as error:
        OpenAITeacher("m", base_url=url)
    assert OURS not in str(error.value)


def test_loopback_and_a_servers_own_key_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OURS)
    monkeypatch.setenv("CLUSTER_KEY", "abcd")
    for url in ("http://localhost:1/v1", "http://127.0.0.9:1/v1", "http://[::1]:1/v1", "https://example.org/v1"):
        OpenAITeacher("m", base_url=url)
    OpenAITeacher("m", base_url="http://node07:8000/v1", key_variable="CLUSTER_KEY")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A self-signed certificate of 127.0.0.1 with its key, made by openssl."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        done = subprocess.run(
            [*command.split(), "-keyout", file, "-out", f"{file}.crt"], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no openssl, which makes the test's certificate")
    assert done.returncode == 0, done.stderr
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    yield file


def test_untrusted_certificate_is_rejected_before_the_key_is_sent(
    certificate: Path, liar: Any, toy: Path, start_verb: Any, tmp_path: Path
) -> None:
    server = liar(lambda connection: connection.sendall(response({})), certificate)
    common = ("annotate", "--dataset", "Toy", "--data_dir", toy, "--teacher", "openai:m", "--base-url", server.url)
    child = start_verb(*common, "--concurrency", 1, "--chains", tmp_path / "c.jsonl", **PLANTED)
    out, err = child.communicate()
    assert child.returncode == 1 and "untrusted certificate" in err and "SSL_CERT_FILE" in err
    assert server.requests == [] and server.connections == 1  # it is not tried again
    # The suggested fix works.
    child = start_verb(
        *common, "--retries", 0, "--chains", tmp_path / "c.jsonl", **PLANTED, SSL_CERT_FILE=f"{certificate}.crt"
    )
    out, err = child.communicate()
    assert "certificate" not in err and server.requests and OURS not in out + err


OBSERVED = """
import socket, sys
def refuse(self, address, *more):
    raise AssertionError(f"CONNECTED {address}")
def look_up(host, *more, **others):
    raise AssertionError(f"LOOKED UP {host}")
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = look_up
"""


UNASKED = """
import _domainbed_reasoning_hook, domainbed_reasoning
from domainbed import algorithms, datasets, hparams_registry
from domainbed_reasoning.__main__ import main
from domainbed_reasoning.mllm import load_mllm
load_mllm("tiny")
main(["doctor"])
main(["plan", "--dataset", "ShapesReasoning", "--model", "tiny"])
main(["check", "--list"])
print("REACHED THE END")
"""


def test_nothing_is_downloaded_without_a_request(tmp_path: Path) -> None:
    """Every connection and every look-up of a name is an error; HF_HUB_OFFLINE is not set."""
    from domainbed import datasets

    variables = environment(Path(datasets.__file__).parents[1], HF_HOME=str(tmp_path))
    env = {name: value for name, value in variables.items() if not name.endswith("_OFFLINE")}
    done = run_python("-c", OBSERVED + UNASKED, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "REACHED THE END" in done.stdout, done.stderr
    assert "CONNECTED" not in done.stdout + done.stderr and "LOOKED UP" not in done.stdout + done.stderr


def test_offline_mode_is_respected_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    from domainbed_reasoning.mllm import ModelError, load_mllm

    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set.*hf download"):
        load_mllm("OpenGVLab/InternVL3-8B-hf")


@pytest.mark.parametrize(
    "source", ["https://user:sk-planted-a9f3e1c07b@127.0.0.1:9/x.git", "--upload-pack=touch owned"]
)
def test_get_domainbed_shows_no_token_and_takes_no_options_for_git(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Any
) -> None:
    monkeypatch.setenv("DOMAINBED_REASONING_DOMAINBED", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    code, out, err = verb("get-domainbed", f"--from={source}")
    assert code == 1 and "git could not get" in err and OURS not in out + err
    assert list(tmp_path.iterdir()) == []
