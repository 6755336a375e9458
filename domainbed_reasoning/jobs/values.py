"""Validation of the values in a job's files that tables and reports use: their types and ranges.

A job with an invalid value is reported and left out; the other jobs of its sweep are not affected.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from domainbed_reasoning.files import format_version

TASK_VERSION = 2  # of task.json, see `format_version`
MAX_DOMAINS = 1000  # DomainNet has 6
_MAX_NAME = 200  # characters
_MAX_TEXT = 10_000  # characters
_MOST = 1 << 53  # JSON's readers agree on integers up to here

ACCURACY = re.compile(r"env([0-9]+)_(in|out|uda)_acc")
_ENVIRONMENT = re.compile(r"env[0-9]+")
_OF_ROUND = re.compile(r"sarr([0-9]+)_(accepted|well_formed)")
_SHARES = ("well_formed", "updated")

_HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which cannot be encoded

# (test, description of valid values)
_Kind = tuple[Callable[[Any], bool], str]


def is_evaluated(record: Mapping[str, Any]) -> bool:
    """Return whether a record's accuracies were measured.

    Before the hparam ``first_evaluation``, all answers are class 0; a job's last evaluation is always measured.
    """
    first = (record.get("hparams") or {}).get("first_evaluation", 0)
    return not isinstance(first, int) or bool(record["step"] + 1 >= first)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _MOST  # NaN is not


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return _is_text(value)
    # Weights may be tiny and bounds huge, but nothing has more digits than a float.
    finite = isinstance(value, int | float) and abs(value) <= _MOST**4 and not math.isnan(value)
    return value is None or isinstance(value, bool) or finite


def _is_text(value: Any, most: int = _MAX_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= most and not _HALF.search(value)


def _is_name(value: Any) -> bool:
    return _is_text(value, _MAX_NAME) and bool(value)


def _is_environments(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(env) and env < MAX_DOMAINS for env in value)


_WHOLE: _Kind = (_is_whole, "an integer >= 0")
_AMOUNT: _Kind = (lambda value: _is_number(value) and value >= 0, "a number >= 0")
_SHARE: _Kind = (lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
_SHARE_OR_NONE: _Kind = (lambda value: value is None or _SHARE[0](value), "a number in [0, 1] or null")
_NAME: _Kind = (_is_name, f"a string of 1 to {_MAX_NAME} characters")
_NAME_OR_NONE: _Kind = (lambda value: value is None or _is_name(value), f"a string of 1 to {_MAX_NAME} characters")
_OBJECT: _Kind = (lambda value: isinstance(value, dict), "an object")
_OBJECT_OR_NONE: _Kind = (lambda value: value is None or isinstance(value, dict), "an object")
_SCALAR: _Kind = (_is_scalar, "a finite number, string, boolean or null")
_SETTING: _Kind = (
    lambda value: _is_scalar(value) or isinstance(value, list) and all(map(_is_scalar, value)),
    f"{_SCALAR[1]}, or a list of these",
)

# The arguments of the train script that a record must have.
ARGS: dict[str, _Kind] = {
    "algorithm": _NAME,
    "dataset": _NAME,
    "test_envs": (_is_environments, f"a list of domain indices below {MAX_DOMAINS}"),
    "trial_seed": _WHOLE,
    "hparams_seed": _WHOLE,
}


def has_args(record: Any) -> bool:
    """Return whether a record identifies its job."""
    args = record.get("args") if isinstance(record, dict) else None
    return isinstance(args, dict) and all(name in args and kind[0](args[name]) for name, kind in ARGS.items())


def record_problem(record: Mapping[str, Any]) -> str:
    """Return the problems of a record's values, given that it has all keys of DomainBed's records."""
    return next(_record_problems(record), "")


def _record_problems(record: Mapping[str, Any]) -> Iterator[str]:
    yield from metric_problems(record)
    yield from _problem(record, "args", _OBJECT)
    yield from _problem(record, "hparams", _OBJECT_OR_NONE)
    for name in (name for part in (record["args"], record.get("hparams") or {}) for name in part):
        if not _is_text(name, _MAX_NAME):
            yield f"{ascii(name):.60} is not a name of at most {_MAX_NAME} characters"
    for name in record["args"]:
        yield from _problem(record["args"], name, ARGS.get(name, _SETTING), "--")
    for name in record.get("hparams") or {}:
        yield from _problem(record["hparams"], name, _SETTING, "hparam ")


def metric_problems(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a record's metrics."""
    yield from _problem(record, "step", _WHOLE)
    for name in record:
        if name in ("step_time", "mem_gb"):
            yield from _problem(record, name, _AMOUNT)
        elif name in _SHARES:
            yield from _problem(record, name, _SHARE)
        elif found := ACCURACY.fullmatch(name) or _OF_ROUND.fullmatch(name):
            if len(found[1]) > 3:
                yield f"{name:.60} has an index of {MAX_DOMAINS} or more"
            yield from _problem(record, name, _SHARE)


def answers_problem(answers: Mapping[str, Any]) -> str:
    """Return the problems of the content of answers.json."""
    return next(_answers_problems(answers), "")


def _answers_problems(answers: Mapping[str, Any]) -> Iterator[str]:
    for env in filter(_ENVIRONMENT.fullmatch, answers):
        yield from _problem(answers, env, _OBJECT_OR_NONE)
        for split in answers[env] or {}:
            yield from _problem(answers[env], split, _OBJECT_OR_NONE, f"{env}, ")
            for name in ("label", "chain", "chain_or_label", "unparsed", "well_formed"):
                yield from _problem(answers[env][split] or {}, name, _SHARE_OR_NONE, f"{env}, {split:.20}, ")


def task_problem(task: Mapping[str, Any]) -> str:
    """Return the problems of the values in task.json that tables use."""
    names: _Kind = (
        lambda value: isinstance(value, list) and len(value) <= MAX_DOMAINS and all(map(_is_name, value)),
        "a list of names",
    )
    if newer := format_version.newer_than(TASK_VERSION, task.get(format_version.KEY)):
        return f"{newer}. {format_version.UPGRADE}"
    kinds = {format_version.KEY: _WHOLE, "environments": names, "version": _NAME_OR_NONE}
    return next((problem for name, kind in kinds.items() for problem in _problem(task, name, kind)), "")


def versions_problem(versions: Mapping[str, Any]) -> str:
    """Return the problems of the content of versions.json."""
    return next(_versions_problems(versions), "")


def _versions_problems(versions: Mapping[str, Any]) -> Iterator[str]:
    for part in ("domainbed-reasoning", "DomainBed", "libraries"):
        yield from _problem(versions, part, _OBJECT_OR_NONE)
        for name in versions.get(part) or {}:
            yield from _problem(versions[part], name, _SCALAR if part != "libraries" else _NAME_OR_NONE, f"{part}, ")


def prediction_problem(row: Any) -> str:
    """Return the problems of a line of predictions.jsonl."""
    if not isinstance(row, dict):
        return "not an object"
    text: _Kind = (lambda value: isinstance(value, str), "a string")
    text_or_none: _Kind = (lambda value: value is None or isinstance(value, str), "a string or null")
    kinds = {"env": _WHOLE, "index": _WHOLE, "image": text, "label": text}
    kinds |= dict.fromkeys(("label_answer", "chain_answer", "chain"), text_or_none)
    absent = [name for name in kinds if name not in row and name != "index"]
    if absent:
        return f"lacks {', '.join(absent)}"
    return next((problem for name, kind in kinds.items() for problem in _problem(row, name, kind)), "")


def _problem(values: Mapping[str, Any], name: str, kind: _Kind, of: str = "") -> Iterator[str]:
    """Yield a problem if the value is present and not of its kind."""
    if name in values and not kind[0](values[name]):
        yield f"{of}{name:.60} must be {kind[1]}, got {reprlib.repr(values[name])}"
