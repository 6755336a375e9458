"""The command `domainbed-reasoning`: its verbs, what doctor sees, and where get-domainbed puts a clone."""

import subprocess
import sys
from pathlib import Path

import pytest

from builders.processes import git
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning import registry
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.commands import doctor

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no DomainBed chosen by the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(upstream.VARIABLE, raising=False)
    return tmp_path / "cache" / "domainbed-reasoning"


@pytest.fixture
def other_repository(tmp_path):
    """A git repository that is not DomainBed."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "file").touch()
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        git(folder, *command)
    return folder


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"  domainbed-reasoning {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doktor"])
    assert "Did you mean 'doctor'?" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = "import sys; from domainbed_reasoning.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{code}assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_get_domainbed_clones_the_pinned_commit_once(cache, upstream_root, capsys):
    if upstream.fault_of(upstream_root):
        pytest.skip(f"{upstream_root} {upstream.fault_of(upstream_root)}")
    assert cli.main(["get-domainbed", "--from", str(upstream_root)]) == 0
    clone = cache / f"DomainBed-{upstream.COMMIT[:7]}"
    assert upstream.fault_of(clone) is None
    assert [path.name for path in cache.iterdir()] == [clone.name]  # nothing of the cloning is left beside it
    assert cli.main(["get-domainbed", "--from", "/nowhere"]) == 0  # nothing is fetched again

    (clone / "domainbed" / "algorithms.py").write_text("")
    assert cli.main(["get-domainbed", "--from", str(upstream_root)]) == 1
    assert "has files that differ from its commit. Remove that folder" in capsys.readouterr().err


def test_a_repository_without_the_pinned_commit_is_refused_and_leaves_nothing(cache, other_repository, capsys):
    assert cli.main(["get-domainbed", "--from", str(other_repository)]) == 1
    assert "--from" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_a_source_that_cannot_be_reached_is_named_with_the_cure(cache, tmp_path, capsys):
    assert cli.main(["get-domainbed", "--from", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert f"could not get {tmp_path / 'nowhere'}" in said
    assert "--from URL|PATH" in said
    assert not cache.exists()


def test_a_clone_at_another_commit_is_told_apart(other_repository):
    assert "is at commit" in upstream.fault_of(other_repository)
    assert "not the pinned one" in upstream.describe(other_repository)
    (other_repository / "more").touch()
    assert upstream.describe(other_repository).endswith("modified")


def test_a_folder_inside_of_another_repository_is_not_a_clone(other_repository):
    (other_repository / "inside").mkdir()
    assert upstream.commit_of(other_repository / "inside") is None


def test_the_stand_in_is_told_apart_from_upstream():
    assert upstream.is_stand_in(CHECKOUT / "tests" / "standin")
    assert "stand-in" in upstream.describe(CHECKOUT / "tests" / "standin")


def test_doctor_finds_our_names_in_the_registries():
    found = list(doctor.examine_registries())
    assert [finding.stops_training for finding in found] == [False] * 3
    for name in [*registry.ALGORITHMS, *registry.DATASETS, *registry.LAUNCHERS]:
        assert any(name in finding.what for finding in found), name


def test_doctor_says_what_is_missing_and_how_it_is_mended(monkeypatch, capsys):
    """Nothing is importable as DomainBed: that stops training, and the exit code says so."""
    monkeypatch.setattr(upstream, "importable_domainbed", lambda: None)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAULT no DomainBed is found" in said
    assert "cure: domainbed-reasoning get-domainbed" in said


def test_doctor_compares_versions_with_what_the_package_requires(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=99", "pytest", "nothing-of-this-name>=1"])
    too_old, there, absent = doctor.examine_requirements()
    assert too_old.stops_training
    assert too_old.cure == 'pip install "torch>=99"'
    assert not there.stops_training
    assert absent == doctor.Finding("nothing-of-this-name is missing", 'pip install "nothing-of-this-name>=1"', True)


def test_a_reader_that_leaves_early_is_no_error_to_show():
    """`domainbed-reasoning doctor | head -1`: the pipe is closed before anything is written."""
    command = [
        sys.executable,
        "-c",
        "import sys; from domainbed_reasoning.__main__ import main; sys.exit(main(['doctor']))",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert "BrokenPipe" not in said


def test_doctor_looks_for_the_weights_that_baselines_download(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fifty, eighteen = doctor.examine_backbones()
    assert str(tmp_path / "hub" / "checkpoints") in fifty.cure and "resnet50-0676ba61.pth" in fifty.cure
    assert "ERM" in fifty.what and not fifty.stops_training and "resnet18-f37072fd.pth" in eighteen.cure
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").touch()
    fifty, _ = doctor.examine_backbones()
    assert not fifty.cure


@pytest.mark.parametrize("verb", cli.VERBS)
def test_ctrl_c_is_one_sentence_in_every_verb(verb, monkeypatch, capsys):
    def interrupted(target):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "load", interrupted)
    assert cli.main([verb]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_doctor_names_a_package_that_is_newer_than_tried(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=2"])
    monkeypatch.setattr(doctor, "TRIED", {"torch": "1.0"})
    (finding,) = doctor.examine_requirements()
    assert "is newer than 1.0, the newest that this was tried with" in finding.what
    assert 'pip install "torch<=1.0"' in finding.cure and not finding.stops_training


def test_doctor_names_an_interface_that_is_gone(monkeypatch):
    assert list(doctor.missing_interfaces()) == []
    monkeypatch.setattr(doctor, "INTERFACES", (("torch", "torch.nn:NoSuchLayer"), ("torch", "torch.gone:thing")))
    gone, broken = doctor.examine_interfaces()
    assert gone.stops_training and "torch.nn:NoSuchLayer" in gone.what and 'pip install "torch<=' in gone.cure
    assert "torch.gone:thing (ModuleNotFoundError" in broken.what


@pytest.mark.parametrize("arguments", [["collect", ""], ["report", "--output", " "], ["study", "x", "--output_dir="]])
def test_an_argument_that_is_empty_is_refused_by_every_verb(arguments, capsys):
    """A variable of the shell that is not set must not mean the working directory, or everything."""
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert f"{arguments[0]}: an argument is empty" in capsys.readouterr().err
