"""Fixtures of the data pipeline: small image folders and a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageDraw

from builders.files import plain_picture, read_lines, write_images
from builders.processes import environment
from domainbed_reasoning.chains.chain import Chain

SERVER = Path(__file__).with_name("teacher_server.py")
CLASSES = ("Alarm_Clock", "Bike", "Mug")
DOMAINS = ("art", "photo")


def _chain_text(conclusion: str, about: str = "round") -> str:
    """Return a chain that passes the rules."""
    reasoning = (
        f"The outline is {about} and the parts are few; their size relative to each other, the way in which they are "
        "joined and the surface all point in one direction, which none of the other options would explain as well."
    )
    chain = Chain("I look at the parts.", "A thing on a table.", reasoning, "The light may mislead.", conclusion)
    return chain.render()


@pytest.fixture(scope="session")
def chain_text() -> Callable[..., str]:
    """``chain_text("mug")`` is a chain that passes the rules and concludes so."""
    return _chain_text


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the tester's own datasets, server and key out of the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("DOMAINBED_REASONING_DATASETS", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data_dir with the dataset Toy: two domains, three classes, three different images each."""
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    definitions.joinpath("toy.toml").write_text(
        'name = "Toy"\nfolder = "toy"\nenvironments = ["A", "P"]\nsubject = "thing"\n', "utf-8"
    )
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", str(definitions))
    data_dir = tmp_path / "data"

    def picture(domain: int, label: int, index: int) -> Image.Image:
        image = plain_picture(domain, label, index)
        ImageDraw.Draw(image).ellipse((5 + index, 5, 30, 30), fill=(200, 40 * index, 80 * label))
        return image

    write_images(data_dir / "toy", DOMAINS, CLASSES, 3, picture, "{label}_{index}.png")
    return data_dir


class Server(NamedTuple):
    """A running teacher server."""

    url: str
    log: Path

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of its log."""
        return read_lines(self.log)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve("--faults", "0.3")`` starts a server and returns it; all stop with the test."""
    running = []

    def start(*arguments: str) -> Server:
        log = tmp_path / f"requests{len(running)}.jsonl"
        log.touch()
        command = [sys.executable, str(SERVER), "--log", str(log), *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        running.append(child)
        assert child.stdout is not None
        return Server(f"http://127.0.0.1:{int(child.stdout.readline())}/v1", log)

    yield start
    for child in running:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture(scope="session")
def lines_of() -> Callable[[Path], list[dict[str, Any]]]:
    """``lines_of(path)`` is what the lines of a JSON lines file say."""
    return read_lines
