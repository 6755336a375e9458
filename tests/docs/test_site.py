"""The site as mkdocs builds it: strictly, and without a request to another host."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import domainbed_reasoning

CHECKOUT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="the site's tools are not installed: pip install -e '.[docs]'")


class Loaded(HTMLParser):
    """Collects what a browser fetches for a page without being asked: not the targets of links."""

    def __init__(self):
        super().__init__()
        self.addresses = []
        self.classes = set()

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.classes |= set(values.get("class", "").split())
        fetched = [values.get(name, "") for name in ("src", "srcset", "poster", "data")]
        fetched += [values.get("href", "")] if tag == "link" else []
        fetched += re.findall(r"url\(([^)]+)\)", values.get("style", ""))
        self.addresses += filter(None, fetched)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, offline: a warning fails the build, and so does a request that needs a proxy."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_built_pages_load_nothing_from_another_host(site):
    """Scripts, styles, fonts and images lie in the site. Mermaid and repository facts would come from elsewhere."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        elsewhere = [address for address in loaded.addresses if re.match(r"([a-z]+:)?//", address.strip())]
        assert not elsewhere, f"{page.name}: {elsewhere}"
        assert not loaded.classes & {"mermaid", "md-source"}, page.name
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*[\"']?([a-z]+:)?//", text), style.name


def test_the_built_reference_has_every_public_name_with_its_docstring(site):
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in domainbed_reasoning.__all__:
        assert re.search(rf'<h2 [^>]*id="[^"]*{name.lower()}"', page, re.IGNORECASE), name
        first = (getattr(domainbed_reasoning, name).__doc__ or "").split(".")[0].split("`")[0].split("\n")[0]
        assert first and re.sub(r"<[^>]+>", "", page).count(first.split(",")[0].strip()), name
