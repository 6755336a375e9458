"""The directions of the design, read from the imports: who may know whom, and what loads when."""

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
OURS = "domainbed_reasoning"
TOP_LEVEL = ("algorithms", "datasets", "sweeps")  # installed inside of the package
HEAVY = {"transformers", "peft", "bitsandbytes"}
# "nothing imports …": a recipe may import a launcher, the command line may import everything.
LEAVES = {"sweeps", "analysis", "benchmarks", "cli"}


def sources():
    """Yield (path inside of the package, file) of every module that is installed."""
    for file in sorted((CHECKOUT / OURS).rglob("*.py")):
        yield file.relative_to(CHECKOUT / OURS).with_suffix("").as_posix(), file
    for folder in TOP_LEVEL:
        for file in sorted((CHECKOUT / folder).rglob("*.py")):
            yield file.relative_to(CHECKOUT).with_suffix("").as_posix(), file


def imports(node, at_import_only=False):
    """Return the dotted names that the code imports; ``from a import b`` is ``a.b``."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import at line {child.lineno}"
            names |= {f"{child.module}.{alias.name}" for alias in child.names}
        elif at_import_only and (isinstance(child, ast.FunctionDef) or _is_type_checking(child)):
            continue
        names |= imports(child, at_import_only)
    return names


def _is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


MODULES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in sources()}


def packages(name):
    """Return the top-level packages that a module imports anywhere."""
    return {imported.partition(".")[0] for imported in imports(MODULES[name])}


def wings(name):
    """Return which of our own parts a module imports, as in ``chains`` or ``algorithms``."""
    return {imported.split(".")[1] for imported in imports(MODULES[name]) if imported.startswith(f"{OURS}.")}


def test_there_is_something_to_look_at():
    assert {
        "chains",
        "register",
        "algorithms/base",
        "datasets/base",
        "sweeps/parallel",
        "mllm/loading",
    } <= MODULES.keys()


@pytest.mark.parametrize("name", ["chains", "prompts", "record", "store", "registry"])
def test_the_core_knows_neither_torch_nor_domainbed(name):
    assert not packages(name) & {"torch", "torchvision", "domainbed", *HEAVY}


@pytest.mark.parametrize("name", ["losses", "batching", "scoring", "selflabel"])
def test_the_method_knows_torch_but_neither_domainbed_nor_model_families(name):
    assert not packages(name) & {"domainbed", *HEAVY}
    assert not wings(name) & {"mllm", "algorithms", "datasets", "register"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mllm/")])
def test_the_door_to_models_knows_no_algorithm_and_no_domainbed(name):
    assert not wings(name) & {"algorithms", "datasets", "register"}
    assert "domainbed" not in packages(name)


@pytest.mark.parametrize("name", MODULES)
def test_algorithms_and_datasets_never_import_each_other(name):
    if name.startswith("algorithms/"):
        assert "datasets" not in wings(name)
    if name.startswith("datasets/"):
        assert "algorithms" not in wings(name)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_the_leaves(name):
    if name != "cli" and not name.startswith("verbs/"):
        own = {name.partition("/")[0]}
        assert not wings(name) & (LEAVES - own)


@pytest.mark.parametrize("name", MODULES)
def test_language_model_libraries_load_inside_of_functions_of_the_one_adapter(name):
    """A DomainBed command that uses none of our algorithms must not pay for them."""
    loaded = {imported.partition(".")[0] for imported in imports(MODULES[name], at_import_only=True)}
    if not name.startswith("mllm/"):
        assert not packages(name) & {"peft", "bitsandbytes"}
        assert not loaded & HEAVY


def test_domainbed_is_known_to_these_alone():
    allowed = {"register", "algorithms/resumable", "datasets/base", "datasets/image_folders", "datasets/shapes"}
    allowed |= {"datasets/custom_folders", "algorithms/stock_dataset"}  # users' own image folders; names of stock ones
    allowed |= {"algorithms/records", "sweeps/demo"}  # the splits that train.py draws; the names of the domains
    allowed |= {"preflight"}  # what is known of a job before it is built
    allowed |= {"analysis/material"}  # a job's dataset, as its job was given it
    allowed |= {"collect/selection", "sweeps/miniature"}  # DomainBed's own selection; its folders of jobs
    assert {name for name in MODULES if "domainbed" in packages(name)} <= allowed


def test_the_folder_datasets_is_no_package():
    """With an `__init__.py` it would shadow Hugging Face's `datasets` wherever Python starts in the checkout."""
    assert not (CHECKOUT / "datasets" / "__init__.py").exists()
