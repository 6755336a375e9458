"""No test asserts how long something takes: machines may be slow, busy, or both.

A file is read as code: a clock's reading, or what was computed from one, is compared by order nowhere, and a process,
a thread or an event is waited for generously.
"""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
FILES = sorted(path for path in TESTS.rglob("*.py") if not path.is_relative_to(TESTS / "standin"))
CLOCKS = re.compile(
    r"(time|monotonic|perf_counter|process_time|thread_time|clock_gettime)(_ns)?|now|utcnow|getmtime|getctime"
    r"|st_[mac]time(_ns)?|ru_[us]time|timeit|default_timer|times"
)
WAITS = {
    "run": None,
    "communicate": None,
    "check_output": None,
    "check_call": None,
    "wait": 0,
    "join": None,
    "wait_for": 1,
}
GENEROUS = 300


def reads_clock(node: ast.AST, tainted: set[str]) -> bool:
    """Whether a clock's reading, or a name that holds one, is within the expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            function = part.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            module = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            if CLOCKS.fullmatch(name) and (
                name not in ("time", "times", "now") or module in ("time", "os", "datetime")
            ):
                return True
            if name == "now" and module.endswith("datetime"):
                return True
        elif isinstance(part, ast.Attribute) and re.fullmatch(r"st_[mac]time(_ns)?|ru_[us]time", part.attr):
            return True
        elif isinstance(part, ast.Name) and part.id in tainted:
            return True
    return False


def named_as_time(node: ast.AST) -> bool:
    """Whether the expression is a variable, an attribute or an item whose name says that it is a duration."""
    name = getattr(node, "id", None) or getattr(node, "attr", None)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name = node.slice.value
    return isinstance(name, str) and bool(re.fullmatch(r"(\w+_)?(elapsed|duration|took|seconds|step_time)", name))


def findings_of(source: str) -> list[str]:
    """Return the lines of the code that compare a time by order, or wait for too short."""
    tree, found = ast.parse(source), []
    tainted: set[str] = set()
    for _ in range(3):  # names computed from names
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.AugAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if reads_clock(node.value, tainted):
                    tainted |= {
                        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
                    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops
        ):
            if any(reads_clock(part, tainted) or named_as_time(part) for part in [node.left, *node.comparators]):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            place = WAITS[node.func.attr]
            given = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            given += node.args[place : place + 1] if place is not None else []
            for value in given:
                if isinstance(value, ast.Constant) and isinstance(value.value, int | float) and value.value < GENEROUS:
                    found.append(f"line {node.lineno}: {ast.unparse(node)} waits for less than {GENEROUS} seconds")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_asserts_a_time(path: Path) -> None:
    assert findings_of(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "start = time.monotonic(); f(); assert time.monotonic() - start < 5",
        "start = time.perf_counter_ns(); f(); took = time.perf_counter_ns() - start; assert not took >= 5",
        "before = path.stat().st_mtime; assert path.stat().st_mtime - before < 1",
        "assert os.path.getmtime(a) > os.path.getmtime(b)",
        "if datetime.now() > end: raise AssertionError",
        "assert timeit.timeit(f) < 0.1",
        "assert row['seconds'] < 3",
        "assert max(os.times()) < 3",
        "assert resource.getrusage(who).ru_utime < 3",
        "child.wait(5)",
        "subprocess.run(command, timeout=30)",
        "thread.join(timeout=1.5)",
    ],
)
def test_every_spelling_is_found(code: str) -> None:
    assert len(findings_of(code)) == 1


def test_modification_times_and_generous_timeouts_are_allowed() -> None:
    assert findings_of("before = p.stat().st_mtime_ns\nassert p.stat().st_mtime_ns == before\nchild.wait(600)") == []


def test_hypothesis_has_no_deadline_or_speed_check() -> None:
    """Its default lets a test fail whose example takes 200 ms, as a busy machine makes any take."""
    assert settings.default.deadline is None and HealthCheck.too_slow in settings.default.suppress_health_check
    own = re.compile(r"@settings\(.*(deadline|suppress_health_check)")
    assert [path for path in FILES if own.search(path.read_text("utf-8"))] == []
