"""Settings for an architecture from another package: the example, clashes, and entries that cannot be used."""

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from builders import architectures
from builders.processes import CHECKOUT
from domainbed_reasoning import Family
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.bridge import plugins
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.mllm import ModelError, family_plugins, findings, load_mllm, trials
from domainbed_reasoning.mllm.loading import config_of, image_edge
from domainbed_reasoning.mllm.pixels import resize
from domainbed_reasoning.sweeps.costs import shape_of

ROW = """
from domainbed_reasoning import Family
ROW = Family("Mine", lambda p: 32, lambda e, g: {}, False, len, "", "me/it")
"""


@pytest.fixture
def forget():
    """``forget()`` has the next load look for entry points anew; so does the end of the test."""

    def clear():
        family_plugins.discover.cache_clear()
        family_plugins._warn.cache_clear()
        family_plugins._used.clear()

    clear()
    yield clear
    clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example plug-in, installed with pip into a folder of its own."""
    root = tmp_path_factory.mktemp("plugin")
    shutil.copytree(CHECKOUT / "examples" / "plugin", root / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", root / "site", root / "source"], check=True)
    return root / "site"


@pytest.fixture(scope="module")
def aya(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "cache_folder", lambda: cache)
        yield str(architectures.build("AyaVision", tmp_path_factory.mktemp("models") / "aya"))


@pytest.fixture
def installed(site, aya, forget, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    return aya


def test_without_the_entry_there_are_no_tiles_and_no_costs(aya, forget):
    with pytest.raises(ModelError, match="AyaVisionForConditionalGeneration does not tile images"):
        load_mllm(aya, max_tiles=4)
    with pytest.raises(ModelError, match="costs of AyaVisionForConditionalGeneration cannot be estimated"):
        shape_of(aya)


def test_the_examples_entry_gives_tiles_and_costs(installed, images):
    """Four tiles and a thumbnail have five times the image tokens of one; scores equal transformers' own of a row."""
    one, four = load_mllm(installed), load_mllm(installed, max_tiles=4).eval()
    assert (
        (one.family.name, one.image_size, four.image_size)
        == ("Aya Vision", 32, 64)
        == (
            "Aya Vision",
            image_edge(installed),
            image_edge(installed, 4),
        )
    )
    tokens = [mllm.prompt("?")["input_ids"][0].tolist().count(mllm.base.config.image_token_id) for mllm in (one, four)]
    assert tokens[1] == 5 * tokens[0] == 5 * shape_of(installed).image_tokens and shape_of(installed, 4).tiles == 5
    names = ["dog", "an axe"]
    scores = four.class_scores(images[:2], q_cls(names), names)
    picture = Image.fromarray(resize(images[:1], 64)[0].permute(1, 2, 0).numpy())
    turn = [{"type": "image", "image": picture}, {"type": "text", "text": q_cls(names)}]
    inputs = four.processor.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"crop_to_patches": True, "min_patches": 4, "max_patches": 4},
    )
    for column, name in enumerate(names):
        target = torch.tensor([four.target(name)])
        ids = torch.cat([inputs["input_ids"], target], dim=1)
        with torch.no_grad():
            logits = four.base(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].log_softmax(-1)
        expected = logits[-target.shape[1] - 1 : -1].gather(1, target[0][:, None]).sum()
        torch.testing.assert_close(scores[0, column], expected, rtol=1e-5, atol=1e-3)


def test_it_trains_with_tiles_and_its_code_is_in_the_jobs_key(installed, algorithm_on, minibatches):
    algorithm = algorithm_on(installed, "MTCT", max_tiles=4, lr=1e-2, micro_batch=4, max_new_tokens=8)
    few = [(x[:2], y[:2]) for x, y in minibatches]
    losses = [algorithm.update(few)["loss"] for _ in range(3)]
    assert losses[-1] < losses[0]
    assert family_plugins.used_modules() == {"aya_vision"}
    assert list(plugins.code_of_modules(family_plugins.used_modules())) == ["aya_vision"]


def test_doctor_names_the_entry_and_probes_it(installed, capsys):
    assert cli.main(["doctor", "--model", installed]) == 0
    said = capsys.readouterr().out
    assert "Aya Vision: settings of aya_vision:AYA_VISION of domainbed-reasoning-focal 0.1.0, tried out below" in said
    cli.main(["doctor"])
    assert "ok    model family AyaVisionForConditionalGeneration (aya_vision:AYA_VISION of" in capsys.readouterr().out


def test_a_kind_of_rows_that_does_not_hold_is_not_used(aya, forget, monkeypatch, tmp_path, capsys):
    """Aya's sliding windows are no plain attention: found out, said, and computed a row at a time."""
    wrong = (CHECKOUT / "examples" / "plugin" / "aya_vision.py").read_text().replace('tree=""', 'tree="plain"')
    install(tmp_path, "wrong", {"AyaVisionForConditionalGeneration": "wrong_rows:AYA_VISION"})
    (tmp_path / "wrong_rows.py").write_text(wrong)
    monkeypatch.syspath_prepend(str(tmp_path))
    mllm = load_mllm(aya)
    assert mllm.family.tree == "" and mllm.family.findings.batch
    assert "Aya Vision: computed by the general path" in capsys.readouterr().out


def install(folder, name, points):
    """Leave what pip leaves of a distribution: its name and its entry points."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{family_plugins.GROUP}]", *(f"{point} = {target}" for point, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_of_two_entries_for_one_architecture_the_later_is_left_out_with_one_warning(
    forget, monkeypatch, tmp_path, capsys
):
    install(tmp_path, "b-late", {"AyaVisionForConditionalGeneration": "late_row:ROW"})
    install(tmp_path, "a-early", {"AyaVisionForConditionalGeneration": "early_row:ROW"})
    for name in ("late_row", "early_row"):
        (tmp_path / f"{name}.py").write_text(ROW)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert family_plugins.entry_of("AyaVisionForConditionalGeneration").target == "early_row:ROW"
    config_of("tiny"), config_of("tiny")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert lines == [
        "WARNING: the plug-in model family AyaVisionForConditionalGeneration (late_row:ROW of b-late 1.0) is left out: "
        "the architecture is taken by model family AyaVisionForConditionalGeneration (early_row:ROW of a-early 1.0)."
    ]


BROKEN = {
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "ends the process": ("raise SystemExit('usage')", "SystemExit: usage"),
    "has no such name": ("", "AttributeError: .*ROW"),
    "is no family": ("ROW = {}", r"it must be a domainbed_reasoning.Family; got \{\}"),
    "has no example": (ROW.replace('"me/it"', '""'), "example must be a non-empty string; got ''"),
    "has a name of ours": (ROW.replace("Mine", "InternVL3"), "the name 'InternVL3' is taken by domainbed-reasoning's"),
    "has a number for a function": (ROW.replace("lambda p: 32", "32"), "tile_edge must be a function; got 32"),
    "has rows of another kind": (ROW.replace('len, ""', 'len, "fast"'), "tree must be '', 'plain', 'rope', 'windows'"),
}


def test_entries_that_cannot_be_used_are_left_out_and_nothing_else_fails(forget, monkeypatch, tmp_path, capsys):
    points = {f"Model{number}": f"broken{number}:ROW" for number in range(len(BROKEN))}
    install(tmp_path, "broken", points | {"InternVLForConditionalGeneration": "sound:ROW", "Sound": "sound:ROW"})
    for number, (text, _) in enumerate(BROKEN.values()):
        (tmp_path / f"broken{number}.py").write_text(text)
    (tmp_path / "sound.py").write_text(ROW)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config_of("tiny")[1].name == "InternVL3"
    assert family_plugins.entry_of("Sound").family.name == "Mine"
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == len(BROKEN) + 1
    for number, (name, (_, problem)) in enumerate(BROKEN.items()):
        assert any(f"broken{number}:ROW of broken 1.0" in line and re.search(problem, line) for line in lines), name
    taken = "InternVLForConditionalGeneration (sound:ROW of broken 1.0) is left out: the architecture is taken by Inter"
    assert any(taken in line for line in lines)


def test_an_entry_has_no_findings_of_its_own(installed):
    (plugin,) = family_plugins.discover()
    found = trials.Findings("", True, True, True, True, 4, 0.0, 0.0)
    with pytest.raises(ValueError, match="findings must be None"):
        family_plugins._check(plugin, dataclasses.replace(plugin.family, findings=found), [])
    assert isinstance(plugin.family, Family)
