"""The API key never appears, in part or encoded, nor reaches a proxy; account names go to OpenAI only."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import re
import socket
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders.servers import annotate_words, ask, response
from domainbed_reasoning.annotate.connection import guarded_client
from domainbed_reasoning.annotate.openai import OpenAITeacher
from domainbed_reasoning.annotate.redaction import redact
from domainbed_reasoning.annotate.teacher import NoAnswer, TeacherError

KEY = "sk-proj-Zq8/vT4+wX7nB2mK9-planted_55"
RUNS = [KEY[i : i + 8] for i in range(len(KEY) - 7)]


def shows_key(text: str) -> list[str]:
    """Return the runs of eight of the key's characters in a text."""
    return [run for run in RUNS if run.casefold() in text.casefold()]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def all_percent(text: str) -> str:
    return "".join(f"%{ord(char):02x}" for char in text)


ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in capitals": str.upper,
    "URL-encoded": lambda text: urllib.parse.quote(text, safe=""),
    "URL-encoded, every character": all_percent,
    "JSON": lambda text: json.dumps(text).replace("/", "\\/"),
    "JSON, every character": lambda text: "".join(f"\\u{ord(char):04X}" for char in text),
    "Python": lambda text: "".join(f"\\x{ord(char):02x}" for char in text),
    "HTML": lambda text: "".join(f"&#{ord(char)};" for char in text),
    "HTML, hexadecimal": lambda text: "".join(f"&#x{ord(char):x};" for char in text),
    "hexadecimal digits": lambda text: text.encode().hex(),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 behind a user's name": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(f"me:{text}:".encode()).decode().rstrip("="),
}
DECODINGS: list[Callable[[str], str]] = [
    str,
    urllib.parse.unquote,
    html.unescape,
    lambda text: re.sub(r"\\(?:u00|x)(..)", lambda found: chr(int(found[1], 16)), text).replace("\\/", "/"),
]


@pytest.mark.parametrize("part", [KEY, KEY[:-1], KEY[1:], KEY[5:20], KEY[:8], KEY[-8:]])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_run_of_the_key_is_found_in_every_encoding(encoding: str, part: str) -> None:
    text = f"before {ENCODINGS[encoding](part)} after"
    clean = redact(text, KEY)
    assert "[key]" in clean and clean.startswith("before ") and clean.rstrip('"').endswith(" after")
    for decoded in DECODINGS:
        assert not shows_key(decoded(clean))
    left = max(clean.removeprefix("before ").removesuffix(" after").split("[key]"), key=len)
    assert len(left) < 24, "of base64, what surrounds the sure digits, and no run"


def test_text_without_the_key_is_unchanged() -> None:
    text = "100% of the dogs \\ cats &#38; sk-proj planted %41\\u0041 " + KEY[:7]
    assert redact(text, KEY) == text and redact(text, "") == text
    assert redact("the empty room is not-needed", "EMPTY") == "the empty room is not-needed"
    assert redact("my abcd, not abce", "abcd") == "my [key], not abce"


@pytest.mark.parametrize("offset", [66, 74])
@pytest.mark.parametrize("status", [200, 401, 500])
def test_an_error_is_redacted_before_it_is_cut(status: int, offset: int, liar: Any) -> None:
    """The key stands where a bound of 80, 300 or 500 characters cuts: not even its first characters are left."""
    for fill in (offset, offset + 220, offset + 410):
        data = ("x" * fill + KEY + " and " + KEY[3:]).encode()
        whole = response(data, f"{status} No", "text/plain")
        server = liar(lambda connection, whole=whole: connection.sendall(whole))
        with pytest.raises((NoAnswer, TeacherError)) as error:
            ask(server.url)
        assert not shows_key(str(error.value)) and KEY[:5] not in str(error.value)


CHAIN = (
    "<SUMMARY>I look at {}.</SUMMARY><CAPTION>A thing.</CAPTION><REASONING>It has parts.</REASONING>"
    "<REFLECTION>None.</REFLECTION><CONCLUSION>bike</CONCLUSION>"
)


@pytest.mark.parametrize("encoding", ["as it is", "in capitals", "URL-encoded", "JSON, every character", "base64"])
def test_no_part_of_the_key_is_stored_or_printed_or_logged(
    encoding: str, liar: Any, toy: Path, start_verb: Any, tmp_path: Path
) -> None:
    """Answer, model, reason to stop, status line, headers and error all hold it; the libraries' own log is on."""
    part = ENCODINGS[encoding](KEY[2:-2])
    body = {"choices": [{"message": {"content": CHAIN.format(part)}, "finish_reason": part}], "model": part}
    turn = iter(range(1000))

    def answer(connection: socket.socket) -> None:
        refused = next(turn) % 2
        sent = {"error": {"message": part, "param": part, "code": part}} if refused else body
        reason = part.replace("\n", " ")
        connection.sendall(response(sent, f"{500 if refused else 200} {reason}", X_Request_Id=reason))

    words = annotate_words(toy, liar(answer).url, tmp_path / "c.jsonl", "--candidates", 1, "--retries", 1)
    child = start_verb(*words, OPENAI_API_KEY=KEY, OPENAI_LOG="debug")
    out, err = child.communicate()
    stored = (tmp_path / "c.jsonl").read_text()
    assert "[key]" in stored and "Traceback" not in err
    for text in (out, err, stored):
        for decoded in DECODINGS:
            assert not shows_key(decoded(text))
        assert not any(base64.b64encode(f"{'_' * n}{KEY[2:]}".encode()).decode()[8:28] in text for n in range(3))


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_no_proxy_is_used_for_this_machine(
    variable: str, host: str, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"choices": [{"message": {"content": "direct"}, "finish_reason": "stop"}]}
    proxy = scripted(lambda body: (200, {"choices": [{"message": {"content": "through the proxy"}}]}))
    monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
    server = scripted(lambda body: (200, answer))
    if host == "127.0.0.2":  # nobody listens there, and still no proxy is asked
        with pytest.raises(TeacherError, match=f"http://127.0.0.2:{port}/v1 cannot be reached"):
            ask(f"http://{host}:{port}/v1")
    else:
        assert ask(f"http://{host}:{server.port}/v1").text == "direct"
    assert proxy.requests == []


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://127.0.0.1:1", "http://["])
def test_unusable_proxy_is_ignored_for_this_machine(proxy: str, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    server = scripted(lambda body: (200, {"choices": [{"message": {"content": "direct"}}]}))
    assert ask(server.url).text == "direct"
    if "nonsense" in proxy:
        with pytest.raises(TeacherError, match="HTTPS_PROXY or ALL_PROXY cannot be used.*NO_PROXY"):
            OpenAITeacher("m", base_url="https://teacher.example.org/v1")


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("https://teacher.example.org/v1", True),  # encrypted to its end
        ("http://teacher.example.org/v1", False),
        ("http://10.0.0.7:8000/v1", False),
        ("https://127.0.0.1:1/v1", False),
        ("https://localhost/v1", False),
        ("http://[::1]:1/v1", False),
        ("https://[::1]:1/v1", False),
    ],
)
def test_proxy_is_only_used_for_encrypted_connections(url: str, proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("CLUSTER_KEY", KEY)
    client = guarded_client(openai, 1.0, url)
    mounted = [transport for transport in client._mounts.values() if transport is not None]
    asyncio.run(client.aclose())
    assert bool(mounted) == proxied


@pytest.mark.parametrize(
    ("url", "goes"),
    [
        (None, True),
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("https://notapi.openai.com/v1", False),
        ("https://api.openai.com.example.org/v1", False),
        ("https://teacher.example.org/v1", False),
        ("http://127.0.0.1:1/v1", False),
    ],
)
def test_account_names_are_only_sent_to_openai(url: str | None, goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-planted-4410")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-planted-77")
    headers = str(OpenAITeacher("m", base_url=url)._client.default_headers)
    assert ("org-planted-4410" in headers, "proj-planted-77" in headers) == (goes, goes)
