"""A report reads only regular files of a sweep's folder: no links, scripts or pipes."""

import json
import os

import pytest
from PIL import Image

from domainbed_reasoning.results.report import content, read_report
from domainbed_reasoning.results.report.markdown import render_markdown
from domainbed_reasoning.results.report.page import render_page

CHAIN = "".join(f"<{s}>dax</{s}>\n" for s in ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n%%EOF\n"


@pytest.fixture
def page_of(write_job, monkeypatch):
    monkeypatch.setattr(content.plot_styles, "has_matplotlib", lambda: False)

    def page():
        report = read_report(write_job.folder, examples=9)
        return render_page(report) + render_markdown(report)

    return page


def test_analyses_are_regular_files_of_the_sweep(write_job, tmp_path, page_of):
    write_job("one")
    (tmp_path / "out").mkdir()
    for name in ("secret.txt", "secret.csv"):
        (tmp_path / "out" / name).write_text("SECRET,x\n1,2\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "secret.png")
    folder = write_job.folder / "analysis"
    folder.mkdir()
    (folder / "a.txt").symlink_to("/etc/passwd")
    (folder / "b.csv").symlink_to(tmp_path / "out" / "secret.csv")
    (folder / "c.png").symlink_to(tmp_path / "out" / "secret.png")
    (folder / "d").symlink_to(tmp_path / "out")
    (folder / "e.txt").symlink_to("/dev/zero")
    (folder / "f.txt").symlink_to("f.txt")
    os.mkfifo(folder / "g.csv")
    (folder / "h.png").write_bytes(EPS)
    (folder / "i.png").write_text("SECRET")
    (folder / "j.csv").write_text("head\n" + "x" * 200_000 + "\n")
    (folder / "k.csv").write_text("head,n\n" + "1" * 400 + "," + "2" * 100_000 + "\n")
    with open(folder / "l.txt", "wb") as file:
        file.truncate(1 << 40)
    (folder / "<script>`m.csv").write_text("")
    (folder / "n.txt").write_text("KEPT")
    page = page_of()
    assert "KEPT" in page and "root:" not in page and "SECRET" not in page and "data:image/png" not in page
    assert len(page) < 100_000 and page.count("Left out: analysis/") == 2 * 9
    assert "<script>" not in page.replace(r"\<script\>", "").replace(r"\<script>", "")


def test_a_folder_of_analyses_that_is_a_link_is_left_out(write_job, tmp_path, page_of):
    write_job("one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("SECRET")
    (write_job.folder / "analysis").symlink_to(tmp_path / "out")
    assert "SECRET" not in page_of()


def test_examples_open_images_with_the_common_decoder(write_job, tmp_path, page_of, monkeypatch):
    """A script named .jpg, a link out, a pipe: not shown, and no program is started for them."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript is started"))
    folder = tmp_path / "data" / "PACS" / "sketch"
    folder.mkdir(parents=True)
    (folder / "eps.jpg").write_bytes(EPS)
    Image.new("RGB", (99, 99)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (99, 99)).save(folder / "good.png")
    job = write_job("one", "MTCT", "PACSReasoning", target=3, args={"data_dir": str(tmp_path / "data")})
    row = {"env": 3, "index": 0, "label": "dax", "label_answer": None, "chain_answer": "dax", "chain": CHAIN}
    names = ("eps.jpg", "link.png", "pipe.png", "good.png")
    lines = [json.dumps({**row, "image": f"sketch/{name}"}) for name in names]
    (job / "predictions.jsonl").write_text("\n".join(lines))
    page = page_of()
    assert page.count("data:image/webp") == 1 and page.count("image not found") == 3


def test_dataset_inside_a_sweep_folder_cannot_escape_it(write_job, tmp_path, page_of):
    (tmp_path / "private").mkdir()
    Image.new("RGB", (99, 99)).save(tmp_path / "private" / "a.png")
    data = write_job.folder / "data"
    job = write_job("one", "MTCT", "PACSReasoning", target=3, args={"data_dir": str(data)})
    data.mkdir()
    (data / "PACS").symlink_to(tmp_path / "private")
    row = {"env": 3, "index": 0, "label": "dax", "label_answer": None, "chain_answer": "dax", "chain": CHAIN}
    (job / "predictions.jsonl").write_text(json.dumps({**row, "image": "a.png"}))
    assert "data:image/webp" not in page_of()
