"""The public names: lazy, typed, and working as documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import domainbed_reasoning
from builders.files import HPARAMS, TASK, chain_text, define_toy, write_chains, write_images, write_job, write_lines
from domainbed_reasoning import Rules, chains_of, load_job
from domainbed_reasoning.chains.build_bundle import write_bundle

SOURCE = Path(domainbed_reasoning.__file__)


def test_importing_the_package_imports_neither_torch_nor_domainbed():
    code = "import sys, domainbed_reasoning as d; dir(d); d.__version__\n"
    code += "print(sorted({'torch', 'numpy', 'pandas', 'domainbed', 'PIL'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE.parent.parent)!r})\n{code}"]
    assert subprocess.check_output(command, text=True).strip() == "[]"


def test_every_public_name_is_there_and_type_checkers_see_it():
    tree = ast.parse(SOURCE.read_text())
    typed = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) == set(domainbed_reasoning.__all__) <= set(dir(domainbed_reasoning))
    for name, module in typed.items():
        assert f"domainbed_reasoning.{domainbed_reasoning._MODULES[name]}" == module
        assert getattr(domainbed_reasoning, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'load_jobs'"):
        domainbed_reasoning.load_jobs  # noqa: B018


@pytest.fixture
def job(tmp_path):
    """A zero-shot job of the tiny model."""
    task = TASK | {"algorithm": "MLLMZeroShot", "hparams": HPARAMS | {"model": "tiny"}}
    return load_job(write_job(tmp_path / "job", task, {"model_dict": {}, "args": {}}), answer="both")


def test_a_job_answers_one_picture_or_a_list_of_them(job):
    picture = Image.new("RGB", (48, 48), "red")
    one = job.predict(picture)
    assert one.class_name in ("dog", "cat") and set(one.scores) == {"dog", "cat"} and one.chain is not None
    assert job.predict([picture, picture]) == [one, one] == job([picture, picture])


def test_the_loss_of_a_sample_is_the_negative_log_of_what_its_class_is_scored(job):
    """Alone and beside a chain: the two paths of a row do not see each other."""
    picture, chain = Image.new("RGB", (48, 48), "red"), chain_text("dog")
    scores = job.mllm.class_scores(job._to_bytes(picture)[None], job.job.q_cls, ["dog", "cat"])
    for index, name in enumerate(("dog", "cat")):
        alone, both = job.loss(picture, name), job.loss(picture, name, chain)
        assert alone.label == pytest.approx(-float(scores[0, index]), rel=1e-4) and alone.chain is None
        assert both.label == pytest.approx(alone.label, rel=1e-4) and both.chain is not None and both.chain > 0
    with pytest.raises(ValueError, match="Unknown class 'dgo'. Did you mean 'dog'"):
        job.loss(picture, "dgo")


def test_chains_of_a_dataset_and_their_verdicts(tmp_path, monkeypatch):
    root = define_toy(monkeypatch, tmp_path) / "toy"
    images = write_images(root, ("a", "b"), ("dog", "cat"), 1)
    file = write_chains(root, images[:3])
    chains = chains_of("Toy", tmp_path / "data")
    assert list(chains) == images[:3] and chains_of("ToyReasoning", str(tmp_path / "data"), file) == chains
    write_bundle(file, tmp_path / "toy.jsonl.xz")
    define_toy(monkeypatch, tmp_path, 'bundle = "toy.jsonl.xz"\n')
    write_lines(file, [{"image": images[0], "chain": chain_text("dog", "another")}])
    merged = chains_of("Toy", tmp_path / "data")
    assert set(merged) == set(images[:3]) and merged[images[0]] != chains[images[0]]
    assert chains_of("Toy", tmp_path / "data", "bundled") == chains
    rules = Rules(("dog", "cat"), min_words=1)
    assert rules.judge(chains["a/dog/0.png"], label=0).accepted
    verdict = rules.judge(chains["a/dog/0.png"], label=1)
    assert (verdict.rule, verdict.reason) == ("label", "the conclusion is 'dog', the label 'cat'")
    with pytest.raises(FileNotFoundError):
        chains_of("Toy", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Unknown image-folder dataset"):
        chains_of("Toys", tmp_path / "data")
