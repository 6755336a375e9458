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

CHECKOUT = Path(__file__).resolve().parent.parent
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
                said = pipe.read()
            assert os.waitpid(child, 0)[1] == 0, said
            return said.strip()
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
        "import domainbed_reasoning.register",
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
    """Where no `.pth` file started the hook, ``import domainbed_reasoning.register`` does everything."""
    code = """
    sys = __import__("sys")
    del sys.modules["_domainbed_reasoning_hook"]
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "_domainbed_reasoning_hook"]
    import domainbed.algorithms, domainbed.datasets
    assert "MTCT" not in domainbed.algorithms.ALGORITHMS
    import domainbed_reasoning.register
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


def test_a_foreign_class_of_the_same_name_is_a_clash(forked):
    code = """
    from domainbed import algorithms
    class MTCT: pass
    algorithms.MTCT = MTCT
    from domainbed_reasoning import register
    try:
        register.publish(algorithms)
    except RuntimeError as error:
        print(error)
    """
    assert "another algorithm 'MTCT' already, __main__.MTCT" in forked(code)


def test_a_foreign_launcher_of_the_same_name_is_a_clash(forked):
    code = """
    from domainbed import command_launchers
    from domainbed_reasoning import register
    command_launchers.REGISTRY["parallel"] = print
    try:
        register.publish(command_launchers)
    except RuntimeError as error:
        print(error)
    """
    assert "another launcher 'parallel' already, builtins.print" in forked(code)


def test_a_package_that_is_gone_leaves_domainbed_alone(tmp_path):
    """Only the hook's file is left: DomainBed imports as if nothing had ever been installed."""
    (tmp_path / "_domainbed_reasoning_hook.py").write_text((CHECKOUT / "_domainbed_reasoning_hook.py").read_text())
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path[:0] = {[str(STAND_IN), str(tmp_path)]!r}; sys.path += {packages!r}\n{HOOK}\n"
        "from domainbed import algorithms; print('ERM' in algorithms.ALGORITHMS, 'RDMLDG' in algorithms.ALGORITHMS)"
    )
    # -S reads no `.pth` file, so an editable install of the package is not found either.
    assert _output([sys.executable, "-S", "-c", code], cwd=tmp_path) == "True False"


def test_a_broken_class_module_is_named(forked, tmp_path):
    code = """
    from domainbed_reasoning import registry
    registry.ALGORITHMS["MTCT"] = "domainbed_reasoning_broken:MTCT"
    try:
        import domainbed.algorithms
    except ImportError as error:
        print(error)
    """
    (tmp_path / "domainbed_reasoning_broken.py").write_text("1 / 0\n")
    said = forked(code, path=[tmp_path])
    assert "cannot add 'MTCT' to DomainBed, because importing domainbed_reasoning_broken failed: ZeroDivision" in said


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
