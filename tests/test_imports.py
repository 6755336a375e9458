"""The layers of the package, read from the imports: folders import lower layers only, without cycles.

From the ground up:

1. `files`, `registry`, `hparam_checks`, `terminal`, `interrupt`, `plot_styles`: what everything may use
2. `chains`: the text format and its store
3. `images`, `mllm`, `method`: side by side; the method never knows the models
4. `bridge`: the only folder that imports `domainbed`, apart from the base classes of algorithms and datasets
5. `jobs`: what a training job saves, resumes, records, and predicts
6. `algorithms`, `datasets`: never each other
7. `analysis`, `annotate`, `hub`, `results`, `tracking`
8. `sweeps`
9. `commands`
10. `__main__`

`transformers`, `peft`, and `bitsandbytes` load inside functions of `mllm`: a baseline's job does not pay for them.
"""

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
OURS = "domainbed_reasoning"
TOP_LEVEL = ("algorithms", "datasets", "sweeps")  # installed inside of the package
HEAVY = {"transformers", "peft", "bitsandbytes"}
# Floors of the house: a folder imports folders of lower floors, never of its own or a higher one.
FLOORS = (
    {"files", "registry", "hparam_checks", "terminal", "interrupt", "plot_styles"},
    {"chains"},
    {"images", "mllm", "method"},
    {"bridge"},
    {"jobs"},
    {"algorithms", "datasets"},
    {"analysis", "annotate", "hub", "results", "tracking"},
    {"sweeps"},
    {"commands"},
    {"__main__"},
)
# Their base classes are DomainBed's.
BASE_CLASSES = {
    "algorithms/in_session",
    "datasets/base",
    "datasets/image_folders",
    "datasets/base_to_new",
    "datasets/image_tables",
    "datasets/reasoning_dataset",
    "datasets/user_datasets",
}


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


def parts_of(name):
    """Return the modules of ours that a module imports, as in ``mllm/loading``."""
    found = set()
    for imported in imports(MODULES[name]):
        steps = imported.split(".")
        if steps[0] == OURS:
            candidates = ["/".join(steps[1:end]) for end in range(len(steps), 1, -1)]
            found |= set([one for one in candidates if one in MODULES or f"{one}/__init__" in MODULES][:1])
    return {f"{one}/__init__" if f"{one}/__init__" in MODULES else one for one in found} - {name}


def floor(name):
    return next(level for level, folders in enumerate(FLOORS) if name.partition("/")[0] in folders)


def test_modules_are_found():
    assert {"chains/chain", "bridge/register", "algorithms/base", "datasets/base", "sweeps/demo"} <= MODULES.keys()
    assert "method/schedule" in parts_of("method/task") and floor("commands/plan") > floor("chains/chain")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_run_one_way(name):
    """From a folder to those of lower floors: `method` never imports `mllm`, `chains` knows nobody."""
    own = name.partition("/")[0]
    for other in parts_of(name) - {"__init__"}:
        there = other.partition("/")[0]
        ground = {own, there} <= FLOORS[0]
        assert there == own or ground or floor(other) < floor(name), f"{name} imports {other}"


def test_imports_are_acyclic():
    left = {name: parts_of(name) for name in MODULES}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"files in circles: {sorted(left)}"


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("chains/", "images/")) or name == "registry"]
)
def test_the_core_loads_no_torch(name):
    assert not packages(name) & {"torch", "torchvision", *HEAVY}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_bridge_imports_domainbed(name):
    assert "domainbed" not in packages(name) or name.startswith("bridge/") or name in BASE_CLASSES


@pytest.mark.parametrize("name", MODULES)
def test_language_model_libraries_load_lazily_in_one_adapter(name):
    """A DomainBed command that uses none of our algorithms must not pay for them."""
    loaded = {imported.partition(".")[0] for imported in imports(MODULES[name], at_import_only=True)}
    if not name.startswith("mllm/") and name != "sweeps/miniature/tiny_model":  # which builds the embedded model
        assert not packages(name) & {"peft", "bitsandbytes"}
        assert not loaded & HEAVY


def test_datasets_folder_is_not_a_package():
    """With an `__init__.py` it would shadow Hugging Face's `datasets` wherever Python starts in the checkout."""
    assert not (CHECKOUT / "datasets" / "__init__.py").exists()
