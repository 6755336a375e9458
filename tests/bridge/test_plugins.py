"""Users' algorithms and datasets: entry points, modules, name clashes, and plug-ins that fail."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from builders.processes import CHECKOUT, VERB

STAND_IN = CHECKOUT / "tests" / "standin"
EXAMPLE = CHECKOUT / "examples" / "plugin"
FOCAL = """
from domainbed_reasoning import RDMLDG, Hparam
from domainbed_reasoning.hparam_checks import FROM_0
class Focal(RDMLDG):
    HPARAMS = {**RDMLDG.HPARAMS, "focal_gamma": Hparam(2.0, None, "here", allowed=FROM_0)}
"""
LOOK = """
from domainbed import algorithms, datasets, hparams_registry
print("ERM" in algorithms.ALGORITHMS, "RDMLDG" in algorithms.ALGORITHMS, "Debug28" in datasets.DATASETS)
print([name for name in algorithms.ALGORITHMS if algorithms.ALGORITHMS.count(name) > 1])
print([name for name in algorithms.ALGORITHMS[-3:] if "Focal" in name], algorithms.ERM.__module__)
"""


@pytest.fixture
def python(tmp_path):
    """``python(code, module="…")`` runs code after the hook, beside plug-ins; returns output and error lines."""

    def run(code, plugins="", **files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('pack__', 'pack/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        first = f"import sys; sys.path[:0] = {[str(STAND_IN), str(tmp_path), str(CHECKOUT)]!r}\n"
        first += "import _domainbed_reasoning_hook\n"
        variables = {**os.environ, "DOMAINBED_REASONING_PLUGINS": plugins, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", first + textwrap.dedent(code)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if line.startswith("domainbed-reasoning: ")]
        return done.stdout.splitlines(), warnings

    run.folder = tmp_path
    return run


def install(folder, name, groups, version="1.0"):
    """Leave what pip leaves of a distribution: its name and its entry points."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[domainbed_reasoning.{group}]", *(f"{point} = {target}" for point, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_a_module_and_a_distribution_add_their_classes(python):
    install(python.folder, "a-focal", {"algorithms": {"Focal": "first:Focal"}})
    code = """
    print(hparams_registry.default_hparams("Focal", "ShapesReasoning")["focal_gamma"])
    print(hparams_registry.default_hparams("FocalTwo", "ShapesReasoning")["algorithm"])
    from domainbed_reasoning.bridge import plugins
    print(*plugins.found(), sep="; ")
    """
    second = FOCAL.replace("class Focal", "class _Base") + "class FocalTwo(_Base):\n    pass\n"
    out, warnings = python(LOOK + textwrap.dedent(code), "second, ", first=FOCAL, second=second)
    assert out[0] == "True True True" and out[1] == "[]"
    assert out[2] == "['Focal', 'FocalTwo'] domainbed.algorithms"
    assert out[3:5] == ["2.0", "FocalTwo"]
    assert out[5] == (
        "algorithm Focal (first:Focal of a-focal 1.0); "
        "algorithm FocalTwo (second:FocalTwo of $DOMAINBED_REASONING_PLUGINS)"
    )
    assert not warnings


@pytest.mark.parametrize(
    "first", ["from mine import Focal", "import domainbed.datasets", "import domainbed.hparams_registry"]
)
def test_a_plug_in_is_published_whatever_is_imported_first(python, first):
    """Also where the user imports it: its own import of DomainBed publishes names before its classes exist."""
    code = """
    from domainbed import hparams_registry
    print(hparams_registry.default_hparams("Focal", "ShapesReasoning")["focal_gamma"])
    from domainbed import algorithms, datasets
    print(algorithms.get_algorithm_class("Focal").__name__, algorithms.ALGORITHMS.count("Focal"))
    """
    out, warnings = python(f"{first}\n{textwrap.dedent(code)}", "mine", mine=FOCAL)
    assert out == ["2.0", "Focal 1"] and not warnings


BROKEN = {
    "raises at import": ("1 / 0", "mine is left out: ZeroDivisionError: division by zero"),
    "ends the process": ("raise SystemExit('usage')", "mine is left out: SystemExit: usage"),
    "recurses": ("def f(): f()\nf()", "mine is left out: RecursionError: "),
    "imports itself in a circle": ("import other", "mine is left out: ImportError: cannot import name 'Focal'"),
    "does not compile": ("class", "mine is left out: SyntaxError: "),
    "is empty": ("", "it defines neither an algorithm nor a dataset"),
    "has no base class of ours": (
        "from domainbed.algorithms import ERM\nclass Mine(ERM): pass",
        "algorithm Mine (mine:Mine of $DOMAINBED_REASONING_PLUGINS) is left out: it must be a subclass of "
        "domainbed_reasoning.MLLMAlgorithm",
    ),
    "is a stock dataset": (
        "from domainbed.datasets import Debug28\nclass Mine(Debug28): pass",
        "it must be a subclass of domainbed_reasoning.ReasoningDataset",
    ),
    "has a value for a row": (
        FOCAL.replace('Hparam(2.0, None, "here", allowed=FROM_0)', "2.0"),
        "HPARAMS['focal_gamma'] must be a domainbed_reasoning.Hparam; got 2.0",
    ),
    "has a default that is not allowed": (
        FOCAL.replace("2.0", "-1.0"),
        "the default of HPARAMS['focal_gamma'] must be a number of 0 or more; got -1.0",
    ),
    "has a default that is no JSON": (FOCAL.replace("2.0", "{1}"), "is not JSON serializable"),
    "draws what is not allowed": (
        FOCAL.replace("2.0, None", "2.0, lambda random: -random.rand()"),
        "the sample of HPARAMS['focal_gamma'] must be a number of 0 or more",
    ),
    "has a sampler that raises": (FOCAL.replace("2.0, None", "2.0, lambda random: 1 / 0"), "ZeroDivisionError"),
    "lacks its base class's rows": (
        FOCAL.replace("**RDMLDG.HPARAMS, ", ""),
        "HPARAMS lacks answer, answer_matching, attn_implementation, average_adapters, batch_size, …",
    ),
    "has no rows": (FOCAL.partition("HPARAMS =")[0] + "HPARAMS = None", "HPARAMS must be a dictionary of"),
    "takes a stock name": (FOCAL.replace("Focal", "ERM"), "the name is taken by domainbed.algorithms.ERM"),
    "takes one of ours": (
        FOCAL.replace("class Focal", "class MTCT"),
        "the name is taken by domainbed_reasoning.algorithms.mtct:MTCT of domainbed-reasoning",
    ),
    "has one domain": (
        "from domainbed_reasoning import ReasoningDataset\n"
        "class Mine(ReasoningDataset):\n    ENVIRONMENTS, CLASS_NAMES = ['a'], ['x', 'y']",
        "ENVIRONMENTS must name at least two domains",
    ),
}


def test_unusable_plug_ins_are_skipped_with_one_warning_each_and_stock_works(python):
    """All at once: none of them keeps the others, DomainBed or this package from working."""
    modules = {f"mine{number}": text for number, (text, _) in enumerate(BROKEN.values())}
    circle = list(BROKEN).index("imports itself in a circle")
    modules["other"] = f"from mine{circle} import Focal"
    modules["sound"] = FOCAL.replace("class Focal", "class FocalToo")
    out, warnings = python(LOOK, ",".join(name for name in modules if name != "other"), **modules)
    assert out == ["True True True", "[]", "['FocalToo'] domainbed.algorithms"]
    assert len(warnings) == len(BROKEN), warnings
    for number, (name, (_, cause)) in enumerate(BROKEN.items()):
        cause = cause.replace("mine", f"mine{number}")
        assert any(f"mine{number}" in line and cause in line for line in warnings), (name, warnings)


def test_of_two_plug_ins_of_one_name_the_later_is_left_out_with_one_warning_that_names_both(python):
    install(python.folder, "b-late", {"algorithms": {"Focal": "late:Focal"}})
    install(python.folder, "a-early", {"algorithms": {"Focal": "early:Focal"}})
    out, warnings = python(LOOK + "print(algorithms.Focal.__module__)", "early", early=FOCAL, late=FOCAL)
    assert out[2:] == ["['Focal'] domainbed.algorithms", "early"]  # which the variable names too, and counts once
    assert len(warnings) == 1
    left_out = "Focal (late:Focal of b-late 1.0) is left out: the name is taken by algorithm Focal (early:Focal of a-"
    assert left_out in warnings[0]


def test_an_entry_point_that_is_missing_or_misnamed_says_so_where_it_is_used(python):
    install(
        python.folder,
        "gone",
        {
            "algorithms": {"Gone": "no_such_module:Gone", "Other": "mine:Focal", "Nothing": "mine:Nothing"},
            "datasets": {"GoneReasoning": "no_such_module:GoneReasoning"},
        },
    )
    code = """
    for use in (
        lambda: algorithms.get_algorithm_class("Gone")((3, 8, 8), 2, 1, {}),
        lambda: vars(datasets)["GoneReasoning"](None, [0], {}),
    ):
        try:
            use()
        except ImportError as error:
            print(error)
    """
    out, warnings = python(LOOK + textwrap.dedent(code), mine=FOCAL)
    assert out[:3] == ["True True True", "[]", "[] domainbed.algorithms"]
    assert len(warnings) == 4
    assert (
        all("No module named 'no_such_module'" in line and "of gone 1.0" in line for line in out[3:]) and len(out) == 5
    )
    assert any("the entry point must have the name of its class, 'Focal'" in line for line in warnings)


def test_without_plug_ins_nothing_is_imported_for_them(python):
    out, warnings = python(
        "from domainbed import hparams_registry as h; h.default_hparams('ERM', 'Debug28')\n"
        "print('torchvision' in sys.modules, 'domainbed.algorithms' in sys.modules)"
    )
    assert out == ["False False"] and not warnings


def run_verb(folder, *arguments, plugins="focal_rdmldg,polygons", **variables):
    path = os.pathsep.join(map(str, [EXAMPLE, folder, STAND_IN, CHECKOUT]))
    variables = {**os.environ, "PYTHONPATH": path, "DOMAINBED_REASONING_PLUGINS": plugins, **variables}
    command = [sys.executable, "-c", f"import _domainbed_reasoning_hook\n{VERB}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)


@pytest.mark.slow
def test_plan_and_doctor_know_the_users_algorithms_and_datasets(tmp_path):
    plan = ("plan", "--algorithm", "FocalRDMLDG", "--dataset", "PolygonsReasoning", "--model", "tiny")
    done = run_verb(tmp_path, *plan, "--hparams", '{"focal_gamma": 1}')
    assert "FocalRDMLDG on PolygonsReasoning (360 images, 3 domains, 3 classes)" in done.stdout, done.stderr
    done = run_verb(tmp_path, *plan, "--hparams", '{"focal_gamma": -1}')
    assert done.returncode == 1 and "hparam focal_gamma must be a number of 0 or more; got -1." in done.stderr
    (tmp_path / "broken.py").write_text("1 / 0")
    done = run_verb(tmp_path, "doctor", plugins="focal_rdmldg,polygons,broken")
    assert "ok    algorithm FocalRDMLDG (focal_rdmldg:FocalRDMLDG of $DOMAINBED_REASONING_PLUGINS)" in done.stdout
    assert "ok    dataset PolygonsReasoning (polygons:PolygonsReasoning" in done.stdout
    assert "note  broken is left out: ZeroDivisionError: division by zero" in done.stdout


@pytest.mark.slow
def test_check_and_annotate_know_a_plug_ins_image_folders(tmp_path):
    """A module beside the user's scripts, found from the working directory, as `python -m` finds it."""
    from builders.files import write_chains, write_images

    images = write_images(tmp_path / "gadgets", ("a", "b"), ("mug", "bike"), 2)
    write_chains(tmp_path / "gadgets", images)
    (tmp_path / "gadgets_here.py").write_text(
        "from domainbed import datasets as stock\n"
        "from domainbed_reasoning.datasets.image_folders import ReasoningImageFolder\n"
        "class GadgetsReasoning(ReasoningImageFolder, stock.MultipleEnvironmentImageFolder):\n"
        "    FOLDER, SUBJECT, ENVIRONMENTS = 'gadgets', 'gadget', ['A', 'B']\n"
    )
    options = ("--dataset", "Gadgets", "--data-dir", tmp_path)
    done = run_verb(tmp_path, "check", *options, plugins="gadgets_here", PYTHONPATH=f"{STAND_IN}{os.pathsep}{CHECKOUT}")
    assert "What type of gadget is in this photo?" in done.stdout, done.stdout + done.stderr
    assert "8 of 8 images have a chain" in done.stdout
    assert "Gadgets          gadgets/" in run_verb(tmp_path, "check", "--list", plugins="gadgets_here").stdout
    done = run_verb(tmp_path, "annotate", *options, "--teacher", "self:tiny", "--dry-run", plugins="gadgets_here")
    assert done.returncode == 0, done.stderr
    done = run_verb(tmp_path, "check", *options, plugins="no_such_module")
    assert done.returncode == 1
    assert "the plug-in no_such_module is left out: ModuleNotFoundError" in done.stderr
    assert "Unknown image-folder dataset 'Gadgets'" in done.stderr


@pytest.mark.slow
def test_a_changed_plug_in_is_another_job(python):
    """Its own module and those beside it that it imports, or its whole package; others' code does not count."""
    code = """
    from domainbed import algorithms
    import json
    from domainbed_reasoning.bridge import plugins
    print(json.dumps([plugins.code_of("Focal", "ShapesReasoning"), plugins.code_of("RDMLDG", "Debug28")]))
    """
    files = {"mine": "import losses\n" + FOCAL, "losses": "GAMMA = 2\n", "unrelated": ""}
    first, none = json.loads(python(code, "mine", **files)[0][0])
    assert list(first) == ["mine"] and not none
    assert json.loads(python(code, "mine", unrelated="x = 1\n")[0][0])[0] == first
    assert json.loads(python(code, "mine", losses="GAMMA = 3\n")[0][0])[0] != first
    package = json.loads(python(code, "pack.mine", pack____init__="", pack__mine=FOCAL, pack__more="")[0][0])[0]
    assert list(package) == ["pack"]
    assert json.loads(python(code, "pack.mine", pack__more="x = 1\n")[0][0])[0] != package
