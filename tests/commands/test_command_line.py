"""The command `domainbed-reasoning`: its parser, `doctor` and `get-domainbed`."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builders.processes import git
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning import __version__, registry
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.commands import doctor
from domainbed_reasoning.commands.arguments import Parser
from domainbed_reasoning.commands.verbs import FORMER_VERBS, GROUPS, VERBS, add_command

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


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"  domainbed-reasoning {verb}" in capsys.readouterr().out


def test_help_lists_the_verbs_in_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if line.startswith("  ") and line.split()[0] in VERBS]
    assert [line.split()[0] for line in listed] == [verb for verbs in GROUPS.values() for verb in verbs]
    assert all(len(line) < 100 for line in listed) and {f"{group}:" for group in GROUPS} <= set(lines)


def test_unknown_verb_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doktor"])
    assert ended.value.code == 2
    assert "Did you mean 'doctor'?" in capsys.readouterr().err


@pytest.mark.parametrize("former", FORMER_VERBS)
def test_former_verbs_still_work(former, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([former, "--help"])
    assert ended.value.code == 0 and f"usage: domainbed-reasoning {FORMER_VERBS[former]} " in capsys.readouterr().out


def parsers(parser):
    """Yield a parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_accepted_in_both_spellings_and_shown_in_one(verb):
    parser = Parser()
    add_command(parser, verb)
    for one in parsers(parser):
        for action in one._actions:
            action.required = False
            assert not [option for option in action.option_strings if "_" in option]
        positionals = [action for action in one._actions if not action.option_strings]
        for action in [action for action in one._actions if "_" in action.dest and action.option_strings]:
            of_kind = {"hparams": "{}", "batch_discount": "0.5"}
            value = action.choices[0] if action.choices else of_kind.get(action.dest, "1")
            values = [] if action.nargs == 0 else [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            for positional in positionals:
                positional.nargs = "?"
            hyphens, underscores = (
                one.parse_args([o, *values]) for o in (action.option_strings[0], f"--{action.dest}")
            )
            assert vars(hyphens) == vars(underscores)


def test_a_name_after_two_hyphens_keeps_its_spelling():
    parser = Parser()
    parser.add_argument("--a-b")
    parser.add_argument("file")
    assert vars(parser.parse_args(["--a_b", "c_d", "--", "--e_f"])) == {"a_b": "c_d", "file": "--e_f"}


def test_the_former_spelling_of_license_still_works():
    parser = Parser()
    add_command(parser, "card")
    args = parser.parse_args(["--dataset", "PACS", "--data_dir", "d", "--licence", "mit"])
    assert args.license == "mit" and args.data_dir == "d"
    assert "licence" not in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "required: FILE, --format, --dataset, --data-dir (or --job"),
        (["export", "--job", "j", "--format", "jsonl"], "--format cannot be combined with --job"),
        (
            ["export", "f", "--format", "jsonl", "--dataset", "PACS", "--data_dir", "d", "--merge"],
            "--merge requires --job",
        ),
        (["check"], "--dataset and --data-dir are required"),
        (["plan", "--dataset", "PACS", "--gpus", "0"], "argument --gpus: must be positive; got 0"),
        (["report", "sweep", "--examples", "x"], "argument --examples: must be an integer; got 'x'"),
        (["plan", "--dataset", "PACS", "--hparams", "{"], "argument --hparams: invalid JSON (Expecting"),
        (["study", "ablation", "--hparams", "lr=1"], "argument --hparams: invalid JSON (Expecting"),
        (["study", "ablation", "--hparams", "[1]"], "argument --hparams: must be a JSON object such as"),
        (["study", "--launch"], "--launch requires the name of a study"),
    ],
)
def test_wrong_usage_exits_with_2_and_points_to_the_help(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in errors and f"Run `domainbed-reasoning {arguments[0]} --help` for usage." in errors


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "domainbed_reasoning", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert done.stdout.strip() == __version__


def test_bash_completes_verbs_options_and_choices(capsys):
    """The script is loaded into a real bash and asked for completions."""
    pytest.importorskip("shtab")
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, expected in {
        "an": {"annotate", "analyze"},
        "check --data": {"--data-dir", "--dataset"},
        "analyze entropy --after": {"--after", "--after-own"},
        "collect sweep --format mark": {"markdown"},
    }.items():
        line = f"COMP_WORDS=(domainbed-reasoning {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
        code = f'{script}\n{line}\n_shtab_domainbed_reasoning\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert set(done.stdout.split()) == expected, done.stderr


def test_zsh_gets_a_completion_script(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef domainbed-reasoning")


def test_help_imports_no_torch():
    code = "import sys; from domainbed_reasoning.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{code}assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_get_domainbed_clones_the_pinned_commit_once(cache, upstream_root, capsys):
    if upstream.problem_with(upstream_root):
        pytest.skip(f"{upstream_root} {upstream.problem_with(upstream_root)}")
    assert cli.main(["get-domainbed", "--from", str(upstream_root)]) == 0
    clone = cache / f"DomainBed-{upstream.COMMIT[:7]}"
    assert upstream.problem_with(clone) is None
    assert [path.name for path in cache.iterdir()] == [clone.name]  # nothing of the cloning is left beside it
    assert cli.main(["get-domainbed", "--from", "/nowhere"]) == 0  # nothing is fetched again

    (clone / "domainbed" / "algorithms.py").write_text("")
    assert cli.main(["get-domainbed", "--from", str(upstream_root)]) == 1
    assert "has files that differ from its commit. Remove that folder" in capsys.readouterr().err


def test_a_repository_without_the_pinned_commit_is_refused_and_leaves_nothing(cache, other_repository, capsys):
    assert cli.main(["get-domainbed", "--from", str(other_repository)]) == 1
    assert "--from" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_unreachable_source_error_suggests_a_fix(cache, tmp_path, capsys):
    assert cli.main(["get-domainbed", "--from", str(tmp_path / "nowhere")]) == 1
    errors = capsys.readouterr().err
    assert f"could not get {tmp_path / 'nowhere'}" in errors
    assert "--from URL|PATH" in errors
    assert not cache.exists()


def test_clone_at_another_commit_is_detected(other_repository):
    assert "is at commit" in upstream.problem_with(other_repository)
    assert "not the pinned one" in upstream.describe(other_repository)
    (other_repository / "more").touch()
    assert upstream.describe(other_repository).endswith("modified")


def test_a_folder_inside_of_another_repository_is_not_a_clone(other_repository):
    (other_repository / "inside").mkdir()
    assert upstream.commit_of(other_repository / "inside") is None


def test_stand_in_is_distinguished_from_upstream():
    assert upstream.is_stand_in(CHECKOUT / "tests" / "standin")
    assert "stand-in" in upstream.describe(CHECKOUT / "tests" / "standin")


def test_doctor_finds_our_names_in_the_registries():
    found = list(doctor.check_registries())
    assert [finding.fatal for finding in found] == [False] * 3
    for name in [*registry.ALGORITHMS, *registry.DATASETS, *registry.LAUNCHERS]:
        assert any(name in finding.text for finding in found), name


def test_doctor_says_what_is_missing_and_how_to_fix_it(monkeypatch, capsys):
    """Nothing is importable as DomainBed: that prevents training, and the exit code says so."""
    monkeypatch.setattr(upstream, "importable_domainbed", lambda: None)
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "ERROR DomainBed not found" in output
    assert "fix: domainbed-reasoning get-domainbed" in output


def test_doctor_compares_versions_with_what_the_package_requires(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=99", "pytest", "nothing-of-this-name>=1"])
    too_old, there, absent = doctor.check_requirements()
    assert too_old.fatal
    assert too_old.fix == 'pip install "torch>=99"'
    assert not there.fatal
    assert absent == doctor.Finding(
        "nothing-of-this-name is not installed", 'pip install "nothing-of-this-name>=1"', True
    )


def test_broken_pipe_is_not_an_error():
    """`domainbed-reasoning doctor | head -1`: the pipe is closed before anything is written."""
    command = [
        sys.executable,
        "-c",
        "import sys; from domainbed_reasoning.__main__ import main; sys.exit(main(['doctor']))",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert "BrokenPipe" not in errors


def test_doctor_looks_for_the_weights_that_baselines_download(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fifty, eighteen = doctor.check_backbones()
    assert str(tmp_path / "hub" / "checkpoints") in fifty.fix and "resnet50-0676ba61.pth" in fifty.fix
    assert "ERM" in fifty.text and not fifty.fatal and "resnet18-f37072fd.pth" in eighteen.fix
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").touch()
    fifty, _ = doctor.check_backbones()
    assert not fifty.fix


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_exits_with_130_and_without_a_traceback(verb, monkeypatch, capsys):
    def interrupted(parser, verb):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "add_command", interrupted)
    assert cli.main([verb]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_doctor_names_the_extras_of_users_and_what_they_are_for(monkeypatch):
    required = ["torch>=2", 'no-such-server>=1; extra == "teacher"', 'no-such-checker; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: required)
    by_extra = {finding.text.partition(":")[0]: finding for finding in doctor.check_extras()}
    assert by_extra.keys() == doctor.EXTRAS.keys()
    assert by_extra.pop("teacher") == doctor.Finding(
        "teacher: no-such-server not installed (only for teachers on OpenAI-compatible servers)",
        'pip install "domainbed-reasoning[teacher]"',
    )
    assert not any(finding.fix for finding in by_extra.values())


def test_every_extra_is_of_users_or_of_a_checkout():
    extras = doctor.metadata.metadata(doctor.DISTRIBUTION).get_all("Provides-Extra")
    assert set(extras) == {*doctor.EXTRAS, "bench", "dev", "docs", "integrations"}


def test_doctor_names_a_package_that_is_newer_than_tested(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=2"])
    monkeypatch.setattr(doctor, "TESTED", {"torch": "1.0"})
    (finding,) = doctor.check_requirements()
    assert "is newer than 1.0, the newest tested version" in finding.text
    assert 'pip install "torch<=1.0"' in finding.fix and not finding.fatal


def test_doctor_reports_a_missing_api(monkeypatch):
    assert list(doctor.missing_interfaces()) == []
    monkeypatch.setattr(doctor, "INTERFACES", (("torch", "torch.nn:NoSuchLayer"), ("torch", "torch.gone:thing")))
    gone, broken = doctor.check_interfaces()
    assert gone.fatal and "torch.nn:NoSuchLayer" in gone.text and 'pip install "torch<=' in gone.fix
    assert "torch.gone:thing (ModuleNotFoundError" in broken.text


@pytest.mark.parametrize("arguments", [["collect", ""], ["report", "--output", " "], ["study", "x", "--output_dir="]])
def test_an_argument_that_is_empty_is_refused_by_every_verb(arguments, capsys):
    """A variable of the shell that is not set must not mean the working directory, or everything."""
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert f"{arguments[0]}: an argument is empty" in capsys.readouterr().err
