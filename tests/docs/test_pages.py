"""The pages in docs/ and README.md: commands, links and claims, and the reference that is generated from the code."""

import argparse
import ast
import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

import domainbed_reasoning
from domainbed_reasoning import registry
from domainbed_reasoning.commands.arguments import PROGRAM, Parser
from domainbed_reasoning.commands.verbs import VERBS, add_command
from domainbed_reasoning.sweeps.launchers import jobs

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.rglob("*.md"))]
STAND_IN = CHECKOUT / "tests" / "standin" / "domainbed" / "scripts"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Of the examples in the pages: examples/plugin, and the TOML file of guides/own-data.md.
EXAMPLES = {"FocalRDMLDG", "PolygonsReasoning", "CameraReasoning"}


def name_of(path):
    return path.relative_to(CHECKOUT).as_posix()


def commands(text):
    """Yield the words of each command in the shell blocks of a page."""
    for language, block in FENCE.findall(text):
        if language in ("", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and not line.startswith(" "):
                    yield words


def check(words):
    """Fail unless the program at the head of ``words`` exists and takes the arguments after it."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == PROGRAM:
        parser = Parser(exit_on_error=False)
        add_command(parser, arguments[0])
        parser.parse_args(arguments[1:])
    elif program == "make":
        named = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in named for word in arguments if "=" not in word), words
    elif program in ("python", "python3") and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif program in ("python", "python3") and arguments[0] != "-c":
        assert (CHECKOUT / arguments[0]).is_file(), words


def check_module(module, arguments):
    if not module.startswith("domainbed."):
        path = CHECKOUT / module.replace(".", "/")
        here = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert here or importlib.util.find_spec(module), module
        return
    script = (STAND_IN / f"{module.rpartition('.')[2]}.py").read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"\b{option[2:]}\b", script), f"{module} has no {option}"
    for option, known in (
        ("--algorithm", {*registry.ALGORITHMS, *EXAMPLES, "ERM", "CORAL"}),
        ("--dataset", {*registry.DATASETS, *EXAMPLES}),
        ("--command_launcher", {*registry.LAUNCHERS, "local"}),
    ):
        assert set(values_of(arguments, option)) <= known, (option, arguments)
    for hparams in values_of(arguments, "--hparams"):
        assert set(json.loads(hparams)) <= {name for _, name in hparams_of_all()}, hparams


def values_of(arguments, option):
    """Return what follows ``option``, or its plural, up to the next option."""
    found = []
    for place, word in enumerate(arguments):
        if word in (option, f"{option}s"):
            rest = arguments[place + 1 :]
            end = next((i for i, other in enumerate(rest) if other.startswith("--")), len(rest))
            found += rest[:end]
    return found


def hparams_of_all():
    """Yield (algorithm or dataset, name) of every hyper-parameter."""
    for owner, target in (registry.ALGORITHMS | registry.DATASETS).items():
        yield from ((owner, name) for name in registry.load(target).HPARAMS)


@pytest.fixture(scope="module")
def reference():
    """The generated pages: path below docs/ → Markdown."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_reference_has_every_verb_option_hparam_and_public_name(reference):
    """And every algorithm and dataset by its name."""
    sections = re.split(r"^## ", reference["reference/commands.md"], flags=re.MULTILINE)
    of_verb = {section.partition("\n")[0]: section for section in sections}
    for verb in VERBS:
        parser = Parser()
        add_command(parser, verb)
        parsers = [parser]
        for action in parser._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
        for option in (option for one in parsers for action in one._actions for option in action.option_strings):
            assert option in ("-h", "--help") or f"`{option}" in of_verb[verb], f"{verb} {option}"
    for owner, name in hparams_of_all():
        assert f"\n| `{name}` |" in reference["reference/hparams.md"], f"{owner} {name}"
    for name in domainbed_reasoning.__all__:
        api = reference["reference/api.md"]
        assert f"\n::: domainbed_reasoning.{name}\n" in api or f"\n## {name}\n" in api, name
    for page, table in (("algorithms", registry.ALGORITHMS), ("datasets", registry.DATASETS)):
        for name in table:
            assert f"\n## {name}\n" in reference[f"reference/{page}.md"]


def test_every_default_in_the_reference_is_the_codes(reference):
    """`sarr_rounds` is 3 in its row, `micro_batch` 4 and on the embedded datasets 64."""
    page = reference["reference/hparams.md"]
    assert "| `sarr_rounds` | `3` |" in page and "| `micro_batch` | `4`; embedded: `64` |" in page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_in_the_pages_is_one_that_the_program_takes(page, tmp_path, monkeypatch):
    """Verbs and their options by the verb's own parser; stock scripts by their options, names and hyper-parameters."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check(words)
        except SystemExit:
            pytest.fail(f"{name_of(page)}: {shlex.join(words)}")


@pytest.mark.parametrize("page", ["tutorial", "guides/small-gpu"])
def test_quoted_output_of_plan_is_what_it_prints(page, verb):
    """A text block after a `plan` command has lines of its output; `...` stands for lines that are left out."""
    blocks = FENCE.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    quoted = [(first, text) for (_, first), (language, text) in itertools.pairwise(blocks) if language == "text"]
    assert quoted
    for command, text in quoted:
        code, printed, _ = verb(*shlex.split(command)[1:])
        assert code == 0 and set(text.splitlines()) - {"", "..."} <= set(printed.splitlines())


def test_every_claim_has_a_test_or_a_command_that_exists():
    """A claim is a row of claims.md, what is behind it a code span of its second column."""
    rows = re.findall(r"^\| (?!Claim|---)(.+?) \| (.+) \|$", (DOCS / "claims.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    for claim, behind in rows:
        named = re.findall(r"`([^`]+)`", behind)
        assert named, f"nothing is behind {claim!r}"
        for one in named:
            path, _, name = one.partition("::")
            if not name:
                check(shlex.split(one))
                continue
            assert (CHECKOUT / path).is_file(), one
            functions = ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8")))
            assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, one


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_a_page_names_exist(page):
    """Code spans that begin with one of the checkout's folders; the site's strict build checks links between pages."""
    text = page.read_text(encoding="utf-8")
    folders = "algorithms|benchmarks|datasets|docs|domainbed_reasoning|examples|results|sweeps|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)", text):
        assert (CHECKOUT / path).exists(), path
    if page.parent == CHECKOUT:
        for path in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (CHECKOUT / path).exists(), path


def test_environment_variables_are_those_that_the_code_reads():
    listed = set(re.findall(r"`(DOMAINBED_REASONING_\w+)`", (DOCS / "reference" / "environment.md").read_text()))
    folders = [CHECKOUT / name for name in ("domainbed_reasoning", "sweeps", "algorithms", "datasets")]
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.rglob("*.py"))]
    read = {name for source in sources for name in re.findall(r'"(DOMAINBED_REASONING_\w+)"', source)}
    assert jobs.JOBS in read and listed - {"DOMAINBED_REASONING_TEST_DATA"} == read


def test_the_picture_of_the_architecture_shows_the_folders_that_there_are():
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    titles = set(re.findall(r'font-weight="600"[^>]*>([^<]+)<', picture)) - {"DomainBed", "transformers", "registry"}
    package = CHECKOUT / "domainbed_reasoning"
    folders = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert titles == folders | {"algorithms", "datasets", "sweeps"}  # an sdist lacks the links of these


def test_the_readme_is_one_page_and_says_what_was_never_tried():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 110
    for page in ("index", "tutorial", "faq", "results/speed", "guides/small-gpu", "guides/several-gpus"):
        text = " ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split())
        assert "published checkpoint was trained" in text or "not been tried" in text or "Not measured:" in text, page
    assert "No published checkpoint was trained with it" in readme


@pytest.mark.parametrize("page, study", [
    ("README.md", "regimes"), ("results/regimes/README.md", "regimes"), ("results/miniature/README.md", "miniature"),
])  # fmt: skip
def test_intervals_in_the_text_are_those_of_the_studys_table(page, study):
    interval = re.compile(r"-?\d+\.\d ± \d+\.\d")
    quoted = interval.findall((CHECKOUT / page).read_text(encoding="utf-8"))
    table = (CHECKOUT / "results" / study / "table.md").read_text(encoding="utf-8")
    assert len(quoted) > 10 and not set(quoted) - set(interval.findall(table))
