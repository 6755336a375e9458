"""An OpenAI-compatible server on loopback, for the tests: chat completions of a real tiny model, or of a script with
faults.

    python tests/annotate/teacher_server.py --backend canned --faults 0.3 --log requests.jsonl
    python tests/annotate/teacher_server.py --backend mllm --model tiny

It prints its port, then serves until it is ended. The canned answers follow from the request alone (image and seed), so
that two runs that ask the same get the same; a fault comes only at the first arrival of a request, so that a retry gets
the answer. The log has a line for every request that arrived and for every answer that was written.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from batch_endpoints import BATCH_FAULTS, Batches

FAILURES = ("429", "500", "503", "hang", "cut", "broken", "empty", "html", "reset")

Answer = tuple[str, int]  # text, completion tokens

# How real models write a chain: blemishes of form that change nothing of what it says.
STYLES: dict[str, Callable[[str], str]] = {
    "think": lambda text: f"<think>\nIs it <SUMMARY>? Perhaps a mug.\n</think>\n\n{text}",
    "thought": lambda text: f"Perhaps a mug.\n</think>\n{text}",
    "fence": lambda text: f"```xml\n{text}\n```",
    "lower": lambda text: re.sub(r"</?[A-Z]+>", lambda tag: tag.group().lower(), text),
    "bold": lambda text: re.sub(r"(</?[A-Z]+>)", r"**\1**", text),
    "heading": lambda text: re.sub(r"</[A-Z]+>", "", re.sub(r"<([A-Z]+)>", r"## \1\n", text)),
    "preamble": lambda text: f"Sure, here is my answer:\n\n{text}\n\nI hope this helps!",
    "article": lambda text: text.replace("<CONCLUSION>", "<CONCLUSION>A ").replace("</CONCLUSION>", ".</CONCLUSION>"),
    "sentence": lambda text: re.sub(r"<CONCLUSION>(.*?)</", r"<CONCLUSION>The answer is **\1**.</", text),
    "hopeless": lambda text: f"\x1b[31m{text}".replace("<CAPTION>", ""),
}


def canned(question: str, image: bytes, seed: int) -> str:
    """Return a chain, good or bad, that follows from the image and the seed."""
    digest = hashlib.sha256(image + str(seed).encode()).digest()
    names = re.search(r"following options: (.*?)\.\n", question).group(1).split(", ")
    name = names[digest[0] % len(names)]
    if digest[1] < 20:
        return "I'm sorry, but I can't help with identifying what is in this image."
    words = " ".join(f"detail{byte}" for byte in digest)
    stages = {
        "SUMMARY": "I will look at the outline, the parts and the surface.",
        "CAPTION": f"A picture with {words}.",
        "REASONING": "The visible parts are weighed one after the other; their proportions decide.",
        "REFLECTION": "The background might mislead, so it was left out of account.",
        "CONCLUSION": name,
    }
    if digest[1] < 50:
        del stages["REFLECTION"]
    return "\n".join(f"<{stage}>{text}</{stage}>" for stage, text in stages.items())


class TinyModel:
    """Answers with a real model, in batches."""

    def __init__(self, model: str, batch: int = 32):
        import torch

        from domainbed_reasoning.mllm import load_mllm

        torch.set_num_threads(1)
        self.mllm = load_mllm(model, device="cpu")
        self.mllm.eval()
        self.batch = batch
        self.waiting: queue.Queue[tuple[Any, queue.Queue[Answer]]] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, body: dict[str, Any], question: str, image: bytes) -> Answer:
        reply: queue.Queue[Answer] = queue.Queue()
        self.waiting.put(((body, question, image), reply))
        return reply.get()

    def _serve(self) -> None:
        while True:
            items = [self.waiting.get()]
            time.sleep(0.02)
            while len(items) < self.batch and not self.waiting.empty():
                items.append(self.waiting.get())
            for (_, reply), answer in zip(items, self._generate([item for item, _ in items]), strict=True):
                reply.put(answer)

    def _generate(self, items: list[Any]) -> list[Answer]:
        import numpy
        import torch
        from PIL import Image

        edge = self.mllm.image_size
        images = []
        for _, _, data in items:
            with Image.open(io.BytesIO(data)) as picture:
                small = numpy.array(picture.convert("RGB").resize((edge, edge)))
            images.append(torch.from_numpy(small).permute(2, 0, 1))
        body, question, _ = items[0]
        torch.manual_seed(body.get("seed", 0))
        with torch.no_grad():
            texts = self.mllm.generate(
                torch.stack(images), question, body["max_tokens"], body["temperature"], body.get("top_p", 1.0)
            )
        return [(text, len(self.mllm.tokenizer(text)["input_ids"])) for text in texts]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        raw = self.rfile.read(length)
        if len(raw) < length:  # its sender was killed
            self.close_connection = True
            return None
        if self.path in ("/v1/files", "/v1/batches"):
            return self.server.batches.post(self, raw)
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": f"no such path: {self.path}"}})
        body = json.loads(raw)
        question, image, key = read_request(body)
        failure = self.server.failure(key)
        self.server.log({"event": "arrived", "key": key, "fault": failure, "headers": dict(self.headers), "body": body})
        if failure and not self._misbehave(failure):
            return None
        time.sleep(self.server.options.delay)
        text, tokens = self.server.answer(body, question, image)
        if self.server.options.style:
            text = STYLES[self.server.options.style](text)
        if self.server.options.always_key:
            text = f"Your key is {self.headers.get('Authorization', '').removeprefix('Bearer ')}."
        if self._send(200, completion(body, text, len(question) // 4 + 64, tokens, self.server.options.field)):
            self.server.log({"event": "answered", "key": key})
        return None

    def do_GET(self) -> None:
        self.server.batches.get(self)

    def _misbehave(self, failure: str) -> bool:
        """Simulate the failure ``fault``; return whether to answer as well."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if failure == "429":
            self._send(429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, {"Retry-After": "0.2"})
        elif failure in ("500", "503"):
            self._send(int(failure), {"error": {"message": f"trouble with your key {key}"}})
        elif failure == "hang":
            time.sleep(self.server.options.hang)
            self.close_connection = True
        elif failure == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "<SUMMARY>I will')
            self.wfile.flush()
            self.close_connection = True
        elif failure == "broken":
            self._send_raw(200, b'{"choices": [{"message": {"content": "<SUMMARY>', "application/json")
        elif failure == "empty":
            self._send(200, {"choices": []})
        elif failure == "html":
            self._send_raw(200, b"<html>gateway</html>", "text/html")
        elif failure == "reset":
            self.close_connection = True
        elif failure == "filter":
            self._send(400, {"error": {"message": "flagged", "code": "content_filter"}})
        elif failure == "quota":
            self._send(429, {"error": {"message": "no credit", "code": "insufficient_quota"}})
        elif failure == "key":
            self._send(401, {"error": {"message": f"Incorrect API key provided: {key}."}})
        elif failure == "bad":
            self._send(400, {"error": {"message": "image too large"}})
        return False

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> bool:
        return self._send_raw(status, json.dumps(body).encode(), "application/json", headers)

    def _send_raw(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> bool:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            self.close_connection = True
            return False
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""


class Server(ThreadingHTTPServer):
    """Holds the options, the model and the log."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, options: argparse.Namespace):
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options = options
        self.answer: Callable[[dict[str, Any], str, bytes], Answer]
        if options.backend == "mllm":
            self.answer = TinyModel(options.model)
        else:
            self.answer = _answer_canned
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        self._log = options.log.open("a") if options.log else None
        self.tools = completion, read_request
        self.batches = Batches(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about killed clients, and report errors of the server itself."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def failure(self, key: str) -> str:
        """Return the failure to simulate for this request, empty for none."""
        options = self.options
        with self._lock:
            arrivals = self._seen[key] = self._seen.get(key, 0) + 1
        if options.always:
            return str(options.always)
        digest = hashlib.sha256(key.encode()).digest()
        if arrivals > 1 or digest[0] >= 256 * options.faults:
            return ""
        return str(options.kinds[digest[1] % len(options.kinds)])

    def log(self, entry: dict[str, Any]) -> None:
        """Write a line of the log."""
        if self._log:
            if not self.options.bodies:
                entry.pop("body", None)
                entry.pop("headers", None)
            with self._lock:
                self._log.write(json.dumps(entry) + "\n")
                self._log.flush()


def read_request(body: dict[str, Any]) -> tuple[str, bytes, str]:
    """Return question, image, and the key that tells requests apart: by image and seed."""
    parts = body["messages"][-1]["content"]
    question = next(part["text"] for part in parts if part["type"] == "text")
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    image = base64.b64decode(url.partition(",")[2])
    return question, image, hashlib.sha256(image).hexdigest()[:16] + f":{body.get('seed')}"


def _answer_canned(body: dict[str, Any], question: str, image: bytes) -> Answer:
    text = canned(question, image, body.get("seed", 0))
    return text, len(text) // 4


def message_of(text: str, field: str) -> dict[str, Any]:
    """Return a message that has its text where ``field`` says."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if field == "reasoning_content":
        return message | {"content": None, field: text}
    if field == "parts":
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Perhaps a mug."}]}
        return message | {"content": [thought, *({"type": "text", "text": part} for part in (text[:50], text[50:]))]}
    return message


def completion(
    body: dict[str, Any], text: str, prompt_tokens: int, completion_tokens: int, field: str = "content"
) -> dict[str, Any]:
    """Return a chat completion as OpenAI's endpoint has it."""
    finish = "length" if completion_tokens >= body.get("max_tokens", 1 << 30) else "stop"
    message = message_of(text, field)
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"] + "-2026",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("canned", "mllm"), default="canned")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests whose first arrival fails")
    parser.add_argument("--kinds", nargs="+", default=FAILURES)
    parser.add_argument("--always", help="this failure for every request")
    parser.add_argument("--always-key", action="store_true", help="tell everybody their key")
    parser.add_argument("--style", choices=STYLES, help="how answers are written")
    parser.add_argument("--field", default="content", help="where a message has its text")
    parser.add_argument("--hang", type=float, default=5.0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--bodies", action="store_true", help="log headers and bodies too")
    parser.add_argument("--batch-polls", type=int, default=1, help="looks at a batch until it has ended")
    parser.add_argument("--batch-faults", type=float, default=0.0, help="share of requests that fail at first")
    parser.add_argument("--batch-kinds", nargs="+", default=BATCH_FAULTS)
    parser.add_argument("--refuses", nargs="+", default=(), help="parameters that a request in a batch must not have")
    parser.add_argument("--batch-fail", help="every batch fails as a whole, with this message")
    parser.add_argument("--batch-hold", type=float, default=0.0, help="seconds from a batch's creation to the reply")
    parser.add_argument("--batch-silent", action="store_true", help="no reply to the first creation of a batch")
    parser.add_argument("--tell-pid", action="store_true", help="begin the log with the process id")
    server = Server(parser.parse_args())
    if server.options.tell_pid:
        server.log({"event": "pid", "pid": os.getpid()})
    print(server.server_address[1], flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
