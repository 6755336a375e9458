"""Endpoints that send invalid responses: an answer, a named failure, or an end, in bounded time and memory."""

from __future__ import annotations

import gzip
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders import servers
from builders.servers import annotate_words, ask, response
from domainbed_reasoning.annotate.teacher import NoAnswer, TeacherError
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.store import load_chains

KEY = "sk-planted-7d1f0c55e2"
GOOD = {"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}

Misbehave = Callable[[socket.socket], None]


def says(body: Any, **more: str) -> Misbehave:
    return lambda connection: connection.sendall(response(body, **more))


def completion(**changes: Any) -> Misbehave:
    return says(GOOD | changes)


def message(content: Any, **more: Any) -> Misbehave:
    return says(servers.completion(content, **more))


def raw(data: bytes) -> Misbehave:
    return lambda connection: connection.sendall(data)


def endless(head: bytes, part: bytes, pause: float = 0.0) -> Misbehave:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100_000):
            connection.sendall(part)
            time.sleep(pause)

    return send


def silent(connection: socket.socket) -> None:
    time.sleep(60)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
DEEP = b'{"choices": ' + b"[" * 100_000
BOMB = gzip.compress(bytes(64 << 20))

# name: (what the server does, the answer's text or an error and what it says)
SERVERS: dict[str, tuple[Misbehave, Any]] = {
    "a good answer": (completion(), "ok"),
    "JSON as HTML": (says(GOOD, kind="text/html"), "ok"),
    "JSON as an octet stream": (says(GOOD, kind="application/octet-stream"), "ok"),
    "a charset that is no text": (says(GOOD, kind="application/json; charset=hex"), "ok"),
    "a charset that packs": (says(GOOD, kind="application/json; charset=zlib_codec"), "ok"),
    "a charset that nobody has": (says(GOOD, kind="application/json; charset=../../etc"), "ok"),
    "UTF-16 by its charset": (says(GOOD, kind="application/json; charset=utf-16"), "ok"),
    "UTF-7 by its charset": (says(GOOD, kind="application/json; charset=utf-7"), "ok"),
    "content in parts": (message([{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]), "ok"),
    "tokens without end": (completion(usage={"prompt_tokens": 10**400, "completion_tokens": 3}), "ok"),
    "tokens below zero": (completion(usage={"prompt_tokens": -5, "completion_tokens": True}), "ok"),
    "tokens as text": (completion(usage={"prompt_tokens": "many", "completion_tokens": [1]}), "ok"),
    "usage as a list": (completion(usage=[1, 2]), "ok"),
    "a model without end": (completion(model="x" * 1_000_000), "ok"),
    "a model that is an object": (completion(model={"a": 1}), "ok"),
    "finish as an object": (message("ok", finish_reason={"a": 1}), "ok"),
    "nothing": (says(b""), (NoAnswer, "not a chat completion")),
    "HTML": (says(b"<html>gateway</html>", kind="text/html"), (NoAnswer, "not a chat completion")),
    "half of JSON": (says(b'{"choices": [{"mess'), (NoAnswer, "not a chat completion")),
    "a number": (says(b"7"), (NoAnswer, "not a chat completion")),
    "null": (says(b"null"), (NoAnswer, "not a chat completion")),
    "no choices": (says({"choices": []}), (NoAnswer, "not a chat completion")),
    "choices as an object": (says({"choices": {"0": 1}}), (NoAnswer, "not a chat completion")),
    "message as text": (says({"choices": [{"message": "x"}]}), (NoAnswer, "not a chat completion")),
    "content as a number": (message(7), (NoAnswer, "not a chat completion")),
    "content as null": (message(None), (NoAnswer, "contains no text")),
    "content of wrong parts": (message([7]), (NoAnswer, "not a chat completion")),
    "content of parts without text": (message([{"text": 7}]), (NoAnswer, "not a chat completion")),
    "nested without end": (says(DEEP), (NoAnswer, "not a chat completion")),
    "bytes that are no UTF-8": (says(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "\ufffd\ufffd"),
    "lone surrogates": (says(b'{"choices": [{"message": {"content": "\\ud800x"}}]}'), "\ud800x"),
    "5 MB of answer": (message("x" * 5_000_000), (NoAnswer, "exceeds")),
    "a length of 100 GB": (endless(LONG, b"x" * 65536), (NoAnswer, "exceeds")),
    "chunks without end": (endless(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"), (NoAnswer, "exceeds")),
    "a byte now and then": (endless(LONG, b" ", 0.05), (NoAnswer, "no complete answer within 0.6 seconds")),
    "a byte of the head now and then": (endless(b"HTTP/1.1 2", b"0", 0.05), (NoAnswer, "within 0.6|Connection")),
    "interim answers without end": (
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
        (NoAnswer, "within 0.6|Connection"),
    ),
    "headers without end": (
        endless(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"y" * 5000 + b"\r\n"),
        (NoAnswer, "Connection"),
    ),
    "gzip that was not asked for": (
        says(gzip.compress(b"{}"), Content_Encoding="gzip"),
        (NoAnswer, "content encoding 'gzip'"),
    ),
    "a gzip bomb": (says(BOMB, Content_Encoding="gzip"), (NoAnswer, "content encoding 'gzip'")),
    "silence": (silent, (NoAnswer, "[Tt]imed? ?out|within 0.6")),
    "a reset": (lambda connection: None, (NoAnswer, "Connection")),
    "no HTTP": (raw(b"220 mail.example.org ESMTP\r\n"), (NoAnswer, "Connection")),
    "a status of 999": (says(b"{}", status="999 Odd"), (NoAnswer, "999")),
    "404": (says({"error": {"message": "no model"}}, status="404 Not Found"), (TeacherError, "rejects every request")),
    "an error that is no object": (says(b'["x"]', status="400 Bad"), (NoAnswer, "HTTP 400")),
    "an error whose message is an object": (says({"error": {"message": {"a": 1}}}, status="400 B"), (NoAnswer, "400")),
    "an error that packs": (says(BOMB, status="500 E", Content_Encoding="gzip"), (NoAnswer, "content encoding")),
    "an error without end": (
        endless(LONG.replace(b"200 OK", b"500 Error"), b"x" * 65536),
        (NoAnswer, "exceeds"),
    ),
    "a wait of nan": (says(b"{}", status="429 Slow", Retry_After="nan"), (NoAnswer, "HTTP 429")),
    "a wait that has passed": (
        says(b"{}", status="429 S", Retry_After="Mon, 01 Jan 1990 00:00:00 GMT"),
        (NoAnswer, "429"),
    ),
    "a wait of nonsense": (says(b"{}", status="429 S", Retry_After="\xff,;"), (NoAnswer, "HTTP 429")),
    "a wait until a year without end": (
        says(b"{}", status="503 S", Retry_After="Mon, 01 Jan 99999999999999 00:00:00 GMT"),
        (NoAnswer, "HTTP 503"),
    ),
    "a wait until the year 0": (
        says(b"{}", status="503 S", Retry_After="Mon, 01 Jan 0000 00:00:00 +99999999999999"),
        (NoAnswer, "HTTP 503"),
    ),
    "a wait of minus infinity": (says(b"{}", status="429 S", Retry_After="-inf"), (NoAnswer, "HTTP 429")),
    "a wait of 400 digits": (says(b"{}", status="429 S", Retry_After="9" * 400), (NoAnswer, "HTTP 429")),
    "milliseconds of nothing": (
        says(b"{}", status="429 S", retry_after_ms="e", Retry_After=""),
        (NoAnswer, "HTTP 429"),
    ),
    **{
        f"an error in the charset {name}": (
            says({"error": {"message": "trouble"}}, kind=f"application/json; charset={name}", status="500 E"),
            (NoAnswer, "HTTP 500: trouble"),
        )
        for name in (
            "zlib",
            "idna",
            "undefined",
            "hex",
            "rot13",
            "punycode",
            "mbcs",
            "unicode_escape",
            "\xff",
            "x" * 999,
        )
    },
    "a shorter answer than its length": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"),
        (NoAnswer, "Connection"),
    ),
    "a longer answer than its length": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{}"),
        (NoAnswer, "not a chat completion"),
    ),
    "a length below zero": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"), (NoAnswer, "Connection")),
    "two lengths": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
        (NoAnswer, "Connection"),
    ),
    "an unknown packing": (says(GOOD, Content_Encoding="\xff, nothing"), (NoAnswer, "content encoding")),
    "an error of an unknown packing": (
        says(b"x", status="500 E", Content_Encoding="zstd"),
        (NoAnswer, "content encoding"),
    ),
    "one endless header": (
        endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"y" * 65536),
        (NoAnswer, "Connection"),
    ),
    "no content": (raw(b"HTTP/1.1 204 None\r\n\r\n"), (NoAnswer, "not a chat completion")),
    "another protocol": (raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"), (NoAnswer, "Connection|HTTP|no chat")),
    "a redirect to no address": (
        says(b"", status="307 T", Location="http://[::1"),
        ((NoAnswer, TeacherError), "Connection|redirects"),
    ),
    "an error nested without end": (says(DEEP, status="400 Bad"), (NoAnswer, "HTTP 400")),
    "an error of lone surrogates": (says(b'{"error": {"message": "\\ud800"}}', status="500 E"), (NoAnswer, "HTTP 500")),
    "a date without a day": (says(b"{}", status="503 S", Retry_After="99 Foo 99999 99:99:99"), (NoAnswer, "HTTP 503")),
}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SERVERS)
def test_misbehaving_server_is_handled_or_reported(name: str, liar: Any) -> None:
    misbehave, expected = SERVERS[name]
    server = liar(misbehave)
    timeout = 0.6 if "0.6" in str(expected) else 20
    if isinstance(expected, str):
        answer = ask(server.url, timeout)
        assert answer.text == expected
        assert answer.prompt_tokens in (None, 5) and answer.completion_tokens in (None, 3)
    else:
        error, failure = expected
        with pytest.raises(error, match=failure) as raised:
            ask(server.url, timeout)
        assert len(str(raised.value)) < 700 and KEY not in str(raised.value)


def test_gigabyte_response_takes_a_few_megabytes(liar: Any) -> None:
    server = liar(endless(LONG, b"x" * (1 << 20)))
    tracemalloc.start()
    with pytest.raises(NoAnswer):
        ask(server.url)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


ECHOES = {
    "as it is": message(f"Your key is {KEY}."),
    "escaped": says(b'{"choices": [{"message": {"content": "Your key is \\u0073k-planted-7d1f0c55e2."}}]}'),
    "as the model's name": completion(model=KEY),
    "as the reason to stop": message("ok", finish_reason=KEY),
    "as a refusal": says({"choices": [{"message": {"content": None, "refusal": f"No, {KEY}"}}]}),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_key_that_is_echoed_is_in_no_answer(name: str, liar: Any) -> None:
    answer = ask(liar(ECHOES[name]).url)
    assert KEY not in repr(answer) and "[key]" in repr(answer)


@pytest.mark.parametrize(
    ("status", "to"),
    [
        ("307 Temporary Redirect", "http://localhost:{port}/v1/chat/completions"),
        ("308 Permanent Redirect", "http://127.0.0.2:{port}/v1/chat/completions"),
        ("302 Found", "http://localhost:{port}/steal"),
        ("301 Moved", "//localhost:{port}/steal"),
        ("303 See Other", "/elsewhere"),
        ("307 Temporary Redirect", "file:///etc/passwd"),
        ("300 Choices", "http://localhost:{port}/?key=" + KEY),
    ],
)
def test_a_redirect_is_named_and_not_followed(liar: Any, status: str, to: str) -> None:
    other = liar(completion())
    server = liar(says(b"", status=status, Location=to.format(port=other.port)))
    with pytest.raises(TeacherError, match="redirects .* is not followed.*--base-url") as error:
        ask(server.url)
    assert other.requests == [] and len(server.requests) == 1 and KEY not in str(error.value)


def test_a_chain_beyond_what_is_kept_is_not_accepted(liar: Any, toy: Path, verb: Any) -> None:
    """Some words of 50,000 letters: few words, yet longer than a record's text may be."""
    texts = ["I will look.", "w" * 50_000 + " a b", "It is so. " + "v" * 60_000, "Nothing misleads me here."]
    chain = Chain(*texts, "bike").render()
    chains = toy / "chains.jsonl"
    server = liar(message(chain))
    code, _, _ = verb(*annotate_words(toy, server.url, chains, "--candidates", 1, "--min-words", 3))
    assert code == 1  # nothing was accepted
    assert load_chains(chains) == {} and chains.read_text().count('"verdict":"rejected"') == 8


def test_escape_sequences_of_a_server_do_not_reach_the_terminal(liar: Any, toy: Path, verb: Any) -> None:
    server = liar(says({"error": {"message": "\x1b]0;owned\x07\x1b[2J\u202e"}}, status="401 No"))
    code, out, err = verb(
        "annotate", "--dataset", "Toy", "--data_dir", toy, "--teacher", "openai:m", "--base-url", server.url,
        "--chains", toy / "c.jsonl", "--concurrency", 1,
    )  # fmt: skip
    assert code == 1 and "rejects every request" in err
    assert not any(char in out + err for char in "\x1b\x07\u202e")
