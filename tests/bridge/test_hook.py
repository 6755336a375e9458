"""The import hook in fresh interpreters, as the `.pth` file starts it: import orders, reloads, clashes, silence."""

import contextlib
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest

from domainbed_reasoning import registry

CHECKOUT = Path(__file__).resolve().parents[2]
STAND_IN = CHECKOUT / "tests" / "standin"
HOOK = "import _domainbed_reasoning_hook"
OURS = ("domainbed", "domainbed_reasoning", "_domainbed_reasoning_hook")


@pytest.fixture
def forked(domainbed_root):
    """``forked(code)`` runs code where DomainBed and we have not been imported yet, and returns what it prints.

    A fork of this process, which has torch imported already: a tenth of a second where an interpreter takes five.
    """
    from domainbed import algorithms, datasets  # noqa: F401 - what they import need not be imported in every fork

    def run(code, path=()):
        read, write = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            with open(read) as pipe:
                printed = pipe.read()
            assert os.waitpid(child, 0)[1] == 0, printed
            return printed.strip()
        status = 1
        with open(write, "w") as pipe, contextlib.redirect_stdout(pipe):
            try:
                for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
                    del sys.modules[name]
                sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "_domainbed_reasoning_hook"]
                sys.path[:0] = [*map(str, path), str(domainbed_root), str(CHECKOUT)]
                exec(f"{HOOK}\n{textwrap.dedent(code)}", {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc(file=pipe)
        os._exit(status)

    return run


def in_an_interpreter(root, code, *flags, cwd):
    """Return what a fresh interpreter prints that runs ``code`` after the hook, with the DomainBed in ``root``."""
    # -I ignores PYTHONPATH, so the folders are put on sys.path as the first thing that happens.
    first = f"import sys; sys.path[:0] = {[str(root), str(CHECKOUT)]!r}\n{HOOK}\n"
    return _output([sys.executable, *flags, "-c", first + code], cwd=cwd)


def _output(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHECK = """
from domainbed import algorithms, command_launchers, datasets, hparams_registry
from domainbed_reasoning import registry
for names, module, ours in (
    (algorithms.ALGORITHMS, algorithms, registry.ALGORITHMS),
    (datasets.DATASETS, datasets, registry.DATASETS),
):
    for name in ours:
        assert names.count(name) == 1, name
        assert vars(module)[name] is registry.load(ours[name]), name
assert command_launchers.REGISTRY["parallel"] is registry.load(registry.LAUNCHERS["parallel"])
assert hparams_registry.default_hparams("RDMLDG", "ShapesReasoning")["algorithm"] == "RDMLDG"
print("published")
"""


@pytest.mark.parametrize(
    "first",
    [
        "import domainbed.algorithms",
        "import domainbed.command_launchers, domainbed.hparams_registry, domainbed.datasets",
        "import domainbed_reasoning.algorithms.rd_mldg",
        "import domainbed_reasoning.datasets.shapes",
        "import domainbed_reasoning.datasets.base, domainbed_reasoning.algorithms.base",
        "import _domainbed_reasoning_hook",
    ],
)
def test_names_are_published_whatever_is_imported_first(forked, first):
    """Class modules import their stock counterpart, which publishes the class modules: no order may trip over that."""
    assert forked(f"{first}\n{CHECK}") == "published"


def test_isolated_interpreters_publish_too(tmp_path):
    """-I is -E and -s and more."""
    assert in_an_interpreter(STAND_IN, CHECK, "-I", cwd=tmp_path) == "published"


def test_reload_publishes_again_and_once(forked):
    code = """
    import importlib
    from domainbed import algorithms, command_launchers, datasets, hparams_registry
    for module in (algorithms, datasets, hparams_registry, command_launchers):
        importlib.reload(module)
        importlib.reload(module)
    assert not hasattr(hparams_registry._hparams.stock_hparams, "stock_hparams")  # wrapped once
    """
    assert forked(textwrap.dedent(code) + CHECK) == "published"


def test_registries_imported_before_the_hook_are_published_by_hand(forked):
    """Where no `.pth` file started the hook, ``import _domainbed_reasoning_hook`` does everything."""
    code = """
    sys = __import__("sys")
    del sys.modules["_domainbed_reasoning_hook"]
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "_domainbed_reasoning_hook"]
    import domainbed.algorithms, domainbed.datasets
    assert "MTCT" not in domainbed.algorithms.ALGORITHMS
    import _domainbed_reasoning_hook
    """
    assert forked(textwrap.dedent(code) + CHECK) == "published"


def test_spawned_children_know_our_names(tmp_path):
    (tmp_path / "child.py").write_text(
        f"{HOOK}\ndef count():\n"
        "    from domainbed import algorithms\n    return algorithms.ALGORITHMS.count('RDMLDG')\n"
    )
    code = (
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport multiprocessing, child\n"
        "with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.apply(child.count))"
    )
    assert in_an_interpreter(STAND_IN, code, cwd=tmp_path) == "1"


def test_a_foreign_class_of_the_same_name_stays_and_is_named(forked):
    code = """
    from domainbed import algorithms
    class MTCT: pass
    algorithms.MTCT = MTCT
    from domainbed_reasoning.bridge import register
    print(*register.publish(algorithms))
    assert algorithms.MTCT is MTCT
    """
    assert "already has another algorithm 'MTCT', __main__.MTCT" in forked(code)


def test_a_foreign_launcher_of_the_same_name_stays_and_is_named(forked):
    code = """
    from domainbed import command_launchers
    from domainbed_reasoning.bridge import register
    command_launchers.REGISTRY["parallel"] = print
    print(*register.publish(command_launchers))
    assert command_launchers.REGISTRY["parallel"] is print
    """
    assert "already has another launcher 'parallel', builtins.print" in forked(code)


def test_uninstalled_package_leaves_domainbed_unchanged(tmp_path):
    """Only the hook's file is left: DomainBed imports as if nothing had ever been installed."""
    (tmp_path / "_domainbed_reasoning_hook.py").write_text((CHECKOUT / "_domainbed_reasoning_hook.py").read_text())
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path[:0] = {[str(STAND_IN), str(tmp_path)]!r}; sys.path += {packages!r}\n"
        f"sys.modules['domainbed_reasoning'] = None\n{HOOK}\n"  # importing it raises what a missing package does
        "from domainbed import algorithms; print('ERM' in algorithms.ALGORITHMS, 'RDMLDG' in algorithms.ALGORITHMS)"
    )
    # -S reads no `.pth` file: the hook that runs is the file's alone.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True False"), done.stderr
    assert "domainbed-reasoning: " not in done.stderr


STOCK_LIVES = """
from domainbed import algorithms, command_launchers, datasets, hparams_registry
assert algorithms.get_algorithm_class("ERM") and datasets.get_dataset_class("Debug28")
assert hparams_registry.default_hparams("ERM", "Debug28")["resnet18"] in (True, False)
assert "local" in command_launchers.REGISTRY
print("stock lives")
"""
REFUSALS = """
def refusal(use):
    try:
        return use()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def test_a_broken_class_module_leaves_the_rest_and_says_why_when_it_is_used(forked, tmp_path):
    """One line of warning, though the registries are published again with each of the others that is imported."""
    code = """
    import sys
    sys.stderr = sys.stdout
    from domainbed_reasoning import registry
    registry.ALGORITHMS["MTCT"] = registry.ALGORITHMS["SARR"] = "domainbed_reasoning_broken:MTCT"
    registry.DATASETS["PACSReasoning"] = "domainbed_reasoning_broken:PACSReasoning"
    """
    use = """
    print(refusal(lambda: algorithms.get_algorithm_class("MTCT")((3, 8, 8), 2, 1, {})))
    print(refusal(lambda: hparams_registry.default_hparams("MTCT", "PACS")))
    print(refusal(lambda: datasets.num_environments("PACSReasoning")))
    print(refusal(lambda: vars(datasets)["PACSReasoning"]("", [0], {})))
    assert not {"MTCT", "SARR"} & set(algorithms.ALGORITHMS) and "PACSReasoning" not in datasets.DATASETS
    from domainbed_reasoning.bridge import hparam_names, register
    hparam_names.check_hparams(hparams_registry.default_hparams("RDMLDG", "ShapesReasoning"), "RDMLDG")
    registry.ALGORITHMS["MTCT"] = "domainbed_reasoning.algorithms.mtct:MTCT"
    assert register.publish(algorithms) and "MTCT" in algorithms.ALGORITHMS  # SARR's place is still empty
    """
    (tmp_path / "domainbed_reasoning_broken.py").write_text("1 / 0\n")
    code = "\n".join(map(textwrap.dedent, (code, STOCK_LIVES, REFUSALS, use)))
    lines = forked(code, path=[tmp_path]).splitlines()
    cause = "importing domainbed_reasoning_broken failed: ZeroDivisionError: division by zero"
    warnings = [line for line in lines if line.startswith("domainbed-reasoning: ")]
    assert [line.partition(" cannot")[0] for line in warnings] == [
        "domainbed-reasoning: MTCT, SARR",
        "domainbed-reasoning: PACSReasoning",
    ]
    assert all(cause in line and "`domainbed-reasoning doctor`" in line for line in warnings)
    assert lines[-5] == "stock lives"
    assert all(line.startswith("ImportError: ") and cause in line for line in lines[-4:])


@pytest.mark.parametrize(
    "failure",
    [
        "sys.modules['domainbed_reasoning.registry'] = None",
        "sys.modules['domainbed_reasoning.bridge.register'] = None",
        "sys.modules['domainbed_reasoning.bridge.versions'] = None",
        "sys.modules['domainbed_reasoning.jobs.replay_log'] = None",
        "sys.modules['domainbed_reasoning.files.atomic'] = None",
        "sys.modules['tqdm'] = sys.modules['safetensors'] = sys.modules['psutil'] = None",
        "sys.modules['domainbed_reasoning'] = type(sys)('domainbed_reasoning')",
        "os.environ['DOMAINBED_REASONING_DATASETS'] = '/nowhere/at/all.toml'",
    ],
)
def test_stock_stays_importable_whatever_fails_in_ours_with_one_warning_a_cause(forked, failure):
    lines = forked(f"import os, sys\nsys.stderr = sys.stdout\n{failure}\n{STOCK_LIVES}").splitlines()
    assert lines[-1] == "stock lives"
    assert len(lines) == len(set(lines)) and all(line.startswith("domainbed-reasoning: ") for line in lines[:-1])
    assert len(lines) > 1 or "tqdm" in failure


def test_invalid_dataset_file_only_disables_its_own_dataset(forked, tmp_path):
    good = 'folder = "f"\nenvironments = ["a", "b"]\nname = '
    names = ("Camera", "Broken =", "ImageFolder", "ReasoningImageFolder", "MultipleDomainDataset")
    for number, name in enumerate(names):
        (tmp_path / f"{number}.toml").write_text(good + f'"{name}"\n')
    code = f"import os, sys\nsys.stderr = sys.stdout\nos.environ['DOMAINBED_REASONING_DATASETS'] = {str(tmp_path)!r}\n"
    use = """
    assert datasets.DATASETS[-3:] == ["Camera", "CameraReasoning", "CameraBaseToNew"], datasets.DATASETS[-5:]
    assert hparams_registry.default_hparams("RDMLDG", "CameraReasoning")["algorithm"] == "RDMLDG"
    print(refusal(lambda: hparams_registry.default_hparams("ERM", "BrokenReasoning")))
    print(refusal(lambda: datasets.get_dataset_class("ReasoningImageFolderReasoning")("", [0], {})))
    """
    lines = forked("\n".join((code, STOCK_LIVES, REFUSALS, textwrap.dedent(use)))).splitlines()
    for file in ("1.toml", "3.toml", "4.toml"):
        assert sum(file in line for line in lines if line.startswith("domainbed-reasoning: ")) == 1, lines
    assert "DatasetFileError: " in lines[-2] and "1.toml" in lines[-2]
    assert "ImportError: " in lines[-1] and "3.toml" in lines[-1] and "is used by this package" in lines[-1]


def test_a_system_without_file_locks_and_forks_has_every_name(forked):
    """What Python has not on Windows: fcntl, some of os, some signals."""
    code = """
    import os, signal, sys
    for name in ("fcntl", "pwd", "grp", "resource", "termios"):
        sys.modules[name] = None
    gone = "fork killpg getuid geteuid getpgid setsid waitid WEXITED WNOHANG WNOWAIT P_PID pread sched_getaffinity"
    for name in gone.split():
        delattr(os, name)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"):
        delattr(signal, name)
    """
    assert forked(textwrap.dedent(code) + CHECK) == "published"


DELEGATES = """
import sys, importlib.util
class Delegating:
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("domainbed"):
            return None
        {guard}
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                return spec
finder = Delegating()
"""


@pytest.mark.parametrize("place", [0, 1, -1])
def test_coexists_with_another_delegating_finder(forked, place):
    place = f"sys.meta_path.insert({place}, finder)\n" if place >= 0 else "sys.meta_path.append(finder)\n"
    assert forked(DELEGATES.format(guard="pass") + place + CHECK) == "published"


def test_foreign_algorithm_that_rejects_our_datasets_does_not_break_our_jobs(forked):
    """It is asked on each dataset until one is known to it; one that cannot be asked has no names that we know."""
    code = """
    from domainbed import algorithms, hparams_registry
    from domainbed_reasoning.bridge import hparam_names, register
    stock = hparams_registry._hparams.stock_hparams
    def of_a_fork(algorithm, dataset, seed):
        found = stock(algorithm, dataset, seed)
        if algorithm == "MIRO":
            found["ld"] = ({"VLCS": 0.1, "OfficeHome": 0.1}[dataset], 0.2)
        elif algorithm == "Broken":
            raise SystemError("on purpose")
        return found
    hparams_registry._hparams = register._with_ours(of_a_fork)
    algorithms.ALGORITHMS += ["Broken", "MIRO"]
    for name in ("MTCT", "RDMLDG"):
        hparam_names.check_hparams(hparams_registry.default_hparams(name, "ShapesReasoning") | {"ld": 1}, name)
    try:
        hparam_names.check_hparams({"ldd": 1}, "MTCT")
    except ValueError as error:
        print(error)
    """
    assert "Unknown hparam of MTCT 'ldd'" in forked(code)


def test_hparams_alone_import_neither_torchvision_nor_our_classes(tmp_path):
    code = (
        "from domainbed import hparams_registry\n"
        "hparams_registry.default_hparams('ERM', 'PACSReasoning')\n"
        "print(sorted({'torchvision', 'transformers', 'domainbed.algorithms'} & set(sys.modules)))"
    )
    assert in_an_interpreter(STAND_IN, code, cwd=tmp_path) == "[]"


def test_stock_commands_import_no_language_model_libraries(run_stock, domainbed_root, tmp_path):
    """A stock algorithm on a stock dataset trains without transformers, peft and bitsandbytes ever being imported."""
    arguments = ["--dataset", "Debug28", "--algorithm", "ERM", "--steps", 1, "--hparams", '{"batch_size": 4}']
    arguments += ["--data_dir", tmp_path, "--output_dir", tmp_path / "job"]
    done = run_stock(domainbed_root, "train", *arguments, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in imported
    assert not {"transformers", "peft", "bitsandbytes"} & imported
    assert (tmp_path / "job" / "done").exists()


def test_the_cached_clone_is_found_where_nothing_else_is(domainbed_root, tmp_path):
    """`python -m domainbed…` works from anywhere, and a clone as the working directory wins over the cached one."""
    variables = {**os.environ, "DOMAINBED_REASONING_DOMAINBED": str(domainbed_root), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", f"{HOOK}; import domainbed; print(domainbed.__file__)"]
    assert _output(command, cwd=tmp_path, env=variables) == str(domainbed_root / "domainbed" / "__init__.py")

    own = tmp_path / "domainbed" / "__init__.py"
    own.parent.mkdir()
    own.touch()
    assert _output(command, cwd=tmp_path, env=variables) == str(own)


def test_the_hook_itself_imports_nothing_but_sys():
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); before = set(sys.modules); {HOOK}\n"
    code += "print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['_domainbed_reasoning_hook']"


def test_every_registered_target_exists():
    for targets in (registry.ALGORITHMS, registry.DATASETS, registry.LAUNCHERS):
        for name, target in targets.items():
            assert registry.load(target).__name__ == target.partition(":")[2], name
