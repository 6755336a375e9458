"""The `browse` page: self-contained, safe against HTML in chains, and correct in a real browser."""

from __future__ import annotations

import base64
import gzip
import html.parser
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.processes import browser

Verb = Callable[..., tuple[int, str, str]]

HOSTILE = (
    '</script><script>document.title="TAKEN"</script>',
    "<img src=x onerror=\"document.title='TAKEN'\">",
    '"><svg onload=document.title="TAKEN">',
    "{{data}} {{script}} {{policy}}",
    "<!-- -->]]>",
    "\u202eexe.gnp\u202c zero\u200bwidth",
    "x" * 5000,
    "__proto__",
)


@pytest.fixture
def page(toy: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str]) -> Path:
    """A page about Toy: hostile texts in every field of some images, and images without a candidate."""
    records: list[dict[str, Any]] = []
    images = sorted(path.relative_to(toy / "toy").as_posix() for path in (toy / "toy").rglob("*.png"))
    for image, text in zip(images, HOSTILE, strict=False):
        chain = chain_text(text, text)
        records.append({"image": image, "chain": chain, "verdict": "accepted", "teacher": text})
        records.append({"image": image, "chain": text, "verdict": "rejected", "rule": text[:50], "reason": text})
        records.append({"image": image, "chain": "", "verdict": "rejected", "rule": "refusal", text[:40]: text})
    (toy / "toy" / "reasoning.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    path = tmp_path / "page.html"
    code, out, err = verb("browse", "--dataset", "Toy", "--data_dir", toy, "--output", path)
    assert code == 0 and str(path) in out, err
    return path


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page and the contents of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self._block: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._block = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._block = None

    def handle_data(self, data: str) -> None:
        if self._block:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data.strip()


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements


def test_the_page_loads_nothing_and_allows_its_own_script_alone(page: Path) -> None:
    elements = parsed(page.read_text("utf-8"))
    assert not [tag for tag, _ in elements.found if tag in ("link", "iframe", "object", "embed", "base", "img")]
    assert all("src" not in attrs and "href" not in attrs for _, attrs in elements.found)
    policy = next(attrs["content"] for _, attrs in elements.found if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and len(re.findall("'sha256-[^']+'", policy)) == 2


def test_page_content_equals_the_chain_file(page: Path, toy: Path, lines_of: Any) -> None:
    blocks = parsed(page.read_text("utf-8")).blocks
    unpacked = {name: json.loads(gzip.decompress(base64.b64decode(blocks[name]))) for name in ("index", "text0")}
    kept = [
        {"image": image[0], **record}
        for image, own in zip(unpacked["index"]["images"], unpacked["text0"], strict=True)
        for record in own
    ]
    assert kept == lines_of(toy / "toy" / "reasoning.jsonl")
    assert len(blocks["thumb0"].split("\n")) == 18 and unpacked["index"]["names"][0] == "alarm clock"


def in_browser(page: Path, view: str, folder: Path) -> str:
    """Return the page as a real browser has it after its script ran."""
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom"]
    command += ["--virtual-time-budget=10000", f"file://{page}#{view}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    return done.stdout


def shown(dom: str) -> dict[str, str]:
    """Return the texts of the elements with an id, roughly."""
    return dict(re.findall(r'id="(\w+)"[^>]*>([^<]*)<', dom))


@pytest.mark.browser
@pytest.mark.parametrize("view", ["", "verdict=rejected", "view=gallery", "search=title"])
def test_hostile_chains_are_shown_as_text_and_do_nothing(page: Path, tmp_path: Path, view: str) -> None:
    dom = in_browser(page, view, tmp_path / "browser")
    assert "<title>Toy: chains</title>" in dom
    elements = parsed(dom)
    assert {tag for tag, _ in elements.found} <= {
        *("html head meta title style body header h1 p form select option input span button main nav noscript".split()),
        *("script article div img dl dt dd details summary pre mark dialog figure".split()),
    }
    assert all(attrs["src"].startswith("data:image/webp;") for tag, attrs in elements.found if tag == "img")  # type: ignore[union-attr]
    assert not [name for _, attrs in elements.found for name in attrs if name.startswith("on")]
    if view == "":
        assert "&lt;img src=x onerror=" in dom and ">U+202E<" in dom


@pytest.mark.browser
@pytest.mark.parametrize(
    ("view", "count"),
    [
        ("", "1–8 of 8"),
        ("verdict=all", "1–12 of 18"),
        ("verdict=all&page=2", "13–18 of 18"),
        ("verdict=all&page=99", "13–18 of 18"),
        ("verdict=all&view=gallery", "1–18 of 18"),
        ("verdict=all&domain=photo", "1–9 of 9"),
        ("verdict=all&domain=photo&label=Mug", "1–3 of 3"),
        ("verdict=accepted", "1–8 of 8"),
        ("verdict=exhausted", "0 images"),
        ("verdict=none", "1–10 of 10"),
        ("rule=refusal", "1–8 of 8"),
        ("search=document.title", "1–3 of 3"),
        ("verdict=all&search=ALARM_CLOCK_2", "1–2 of 2"),
    ],
)
def test_filters_search_and_pages_work(page: Path, tmp_path: Path, view: str, count: str) -> None:
    assert shown(in_browser(page, view, tmp_path / "browser"))["where"] == count


@pytest.mark.browser
def test_a_page_without_any_candidates_shows_all_images_and_of_others_says_how_many_are_hidden(
    page: Path, toy: Path, verb: Verb, tmp_path: Path
) -> None:
    assert shown(in_browser(page, "", tmp_path / "browser"))["totals"].endswith("; 10 without candidates are hidden")
    (toy / "toy" / "reasoning.jsonl").write_text("")
    assert verb("browse", "--dataset", "Toy", "--data_dir", toy, "--output", page)[0] == 0
    now = shown(in_browser(page, "", tmp_path / "browser"))
    assert now["where"] == "1–12 of 18" and "hidden" not in now["totals"]


@pytest.mark.browser
def test_a_click_enlarges_an_image_and_another_closes_it(page: Path, tmp_path: Path) -> None:
    """The page's own listeners, called by a script that a copy of the page allows."""
    text = page.read_text("utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    click = """
    setTimeout(() => {
      document.querySelector(".zoom").click();
      const large = document.getElementById("large");
      document.title = [large.open, large.querySelectorAll("img").length, large.querySelector(".path").textContent];
      large.click();
      document.title += "," + large.open;
    }, 3000);"""
    (tmp_path / "clicking.html").write_text(text.replace("</body>", f"<script>{click}</script></body>"), "utf-8")
    dom = in_browser(tmp_path / "clicking.html", "", tmp_path / "browser")
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None and re.fullmatch(r"true,1,art/\w+/\w+.png,false", title[1])
