"""A server with scripted responses, a small dataset, and the verbs."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builders.files import define_toy, write_images
from builders.servers import response


class Liar:
    """Accepts connections on loopback, reads a request and does what ``misbehave(connection)`` does.

    Attributes:
        requests: everything that was received, a connection each.
        connections: that were accepted, those without a request among them.
    """

    def __init__(self, misbehave: Callable[[socket.socket], None], certificate: Path | None = None):
        self.requests: list[bytes] = []
        self.request = threading.local()
        self.connections = 0
        self._misbehave = misbehave
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def bodies(self) -> list[Any]:
        """Return the JSON bodies that were received."""
        return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in self.requests]

    @property
    def url(self) -> str:
        return f"http{'s' if self._context else ''}://127.0.0.1:{self.port}/v1"

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(600)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            data = b""
            while b"\r\n\r\n" not in data:
                part = connection.recv(1 << 16)
                if not part:
                    return
                data += part
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(next((n for n in head.lower().split(b"\r\n") if n.startswith(b"content-length")), b":0")[15:])
            while len(body) < length:
                part = connection.recv(1 << 16)
                if not part:
                    return
                body += part
            self.requests.append(head + b"\r\n\r\n" + body)
            self.request.body = body
            self._misbehave(connection)
        except OSError:  # the client has hung up, as it should
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self.ended.set()
        self._socket.close()


@pytest.fixture
def liar() -> Iterator[Callable[..., Liar]]:
    """``liar(misbehave)`` starts such a server."""
    running: list[Liar] = []

    def start(misbehave: Callable[[socket.socket], None], certificate: Path | None = None) -> Liar:
        running.append(Liar(misbehave, certificate))
        return running[-1]

    yield start
    for server in running:
        server.close()


Script = Callable[[dict[str, Any]], "tuple[int, Any] | None"]


@pytest.fixture
def scripted(liar: Any) -> Callable[[Script], Liar]:
    """``scripted(script)`` starts a server that sends what ``script(request)`` returns: a status and a JSON value.

    None hangs up.
    """

    def start(script: Script) -> Liar:
        def answer(connection: socket.socket) -> None:
            reply = script(json.loads(server.request.body))
            if reply is None:
                return
            connection.sendall(response(reply[1], f"{reply[0]} X"))

        server: Liar = liar(answer)
        return server

    return start


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data_dir of a dataset Toy of two domains and two classes with two images each."""
    data_dir = define_toy(monkeypatch, tmp_path)
    write_images(data_dir / "toy", ("art", "photo"), ("Bike", "Mug"), 2)
    return data_dir
