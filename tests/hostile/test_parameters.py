"""Endpoints that reject a parameter: it is omitted once, and the user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from builders.files import read_lines
from builders.servers import annotate_words
from domainbed_reasoning.annotate.parameters import Parameters
from domainbed_reasoning.annotate.teacher import Request, TeacherError

REQUEST = Request("Which?", b"jpeg", seed=7, max_tokens=9, temperature=1.0, top_p=0.5)
ALL = {"seed": 7, "top_p": 0.5, "temperature": 1.0, "max_tokens": 9}
CHAIN = (
    "<SUMMARY>I look.</SUMMARY><CAPTION>A thing.</CAPTION><REASONING>It has parts.</REASONING>"
    "<REFLECTION>None.</REFLECTION><CONCLUSION>bike</CONCLUSION>"
)

# As servers word it: OpenAI, FastAPI and pydantic, vLLM, gateways, plain text.
REFUSALS: dict[str, tuple[Any, str]] = {
    "param": ({"error": {"message": "Unsupported.", "param": "seed", "code": "unsupported_parameter"}}, "seed"),
    "unsupported value": (
        {"error": {"message": "'temperature' does not support 0.5 with this model.", "param": "temperature"}},
        "temperature",
    ),
    "message": ({"error": {"message": "Unrecognized request argument supplied: seed", "param": None}}, "seed"),
    "error as text": ({"error": "unknown field `top_p`"}, "top_p"),
    "message above": ({"message": "temperature is deprecated", "type": "invalid_request_error"}, "temperature"),
    "detail as text": ({"detail": "Extra inputs are not permitted: seed"}, "seed"),
    "detail as a list": (
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs", "input": ALL}]},
        "seed",
    ),
    "detail of several": (
        {"detail": [{"loc": ["body", "top_p"], "msg": "x"}, {"loc": ["body", "temperature"], "msg": "x"}]},
        "top_p",
    ),
    "a list printed into a message": (
        {"object": "error", "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'input': 7}]"},
        "seed",
    ),
    "either of two": ({"error": {"message": "temperature and top_p cannot both be given"}}, "top_p"),
    "camel case": ({"error": {"message": 'Unknown name "topP" at generation_config'}}, "top_p"),
    "plain text": ("seed: not supported", "seed"),
    "max_tokens": (
        {"error": {"message": "'max_tokens' is not supported. Use 'max_completion_tokens'.", "param": "max_tokens"}},
        "max_tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_only_the_rejected_parameter_is_omitted(name: str) -> None:
    refusal, blamed = REFUSALS[name]
    parameters = Parameters("m")
    text = refusal if isinstance(refusal, str) else json.dumps(refusal)
    assert blamed in str(parameters.adapt(parameters.of(REQUEST), text))
    expected = {key: value for key, value in ALL.items() if key != blamed}
    if blamed == "max_tokens":
        expected["max_completion_tokens"] = 9
    assert parameters.of(REQUEST) == expected
    # Another request that was under way is sent again, without a word.
    assert parameters.adapt(ALL, text) == "" and parameters.of(REQUEST) == expected


@pytest.mark.parametrize(
    "refusal",
    [
        {"error": {"message": "image too large"}},
        {"error": {"message": "Invalid image", "param": "messages.[0].content.[0].image_url"}},
        {"error": {"message": "no such model; we seeded and tempered it"}},
        {"detail": [{"loc": ["body", "messages", 0], "msg": "Field required", "input": ALL}]},
        {"error": {"message": "max_tokens is too large: 9. This model supports at most 4."}},
        {"error": {"message": "maximum context length is 5 tokens, max_tokens 9", "param": "max_tokens"}},
        "",
        "[" * 100_000,
    ],
)
def test_unrelated_rejection_omits_nothing(refusal: Any) -> None:
    parameters = Parameters("m")
    text = refusal if isinstance(refusal, str) else json.dumps(refusal)
    assert parameters.adapt(ALL, text) is None and parameters.of(REQUEST) == ALL


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        *((name, True) for name in ("gpt-5-mini", "openai/gpt-5-mini", "azure/o3", "openrouter/openai/o4-mini", "o1")),
        *((name, False) for name in ("gpt-4o", "openai/gpt-oss-120b", "o1ive-7b", "o3/llama", "gpt-50", "my-o3")),
    ],
)
def test_reasoning_models_are_known_by_the_last_part_of_their_name(model: str, reasons: bool) -> None:
    expected = {"seed": 7, "max_completion_tokens": 9} if reasons else ALL
    assert Parameters(model).of(REQUEST) == expected


def test_unsupported_token_limit_is_omitted_unless_the_cost_requires_it() -> None:
    refusal = '{"error": {"message": "unknown argument max_completion_tokens or max_tokens"}}'
    parameters, strict = Parameters("m"), Parameters("m", needs_limit=True)
    for one in (parameters, strict):
        assert one.adapt(one.of(REQUEST), refusal) == "max_completion_tokens is sent instead of max_tokens from now on"
    assert "omitted" in str(parameters.adapt(parameters.of(REQUEST), refusal))
    assert "max_tokens" in Parameters.omitted(parameters.of(REQUEST))
    with pytest.raises(TeacherError, match="--max-cost cannot bound"):
        strict.adapt(strict.of(REQUEST), refusal)


def annotate(server: Any, toy: Path, verb: Any, *more: object) -> tuple[int, str, str, list[dict[str, Any]]]:
    chains = toy / "c.jsonl"
    code, out, err = verb(*annotate_words(toy, server.url, chains, "--candidates", 1, "--retries", 0, *more))
    return code, out, err, read_lines(chains) if chains.exists() else []


@pytest.mark.parametrize("status", [400, 422, 200])
@pytest.mark.parametrize("refused", [["seed"], ["temperature", "top_p"], ["max_tokens"], ["seed", "max_tokens"]])
def test_run_continues_without_rejected_parameters_and_reports_them_once(
    status: int, refused: list[str], scripted: Any, toy: Path, verb: Any
) -> None:
    """A server that takes no such parameter, and names one of them at a time; eight images, eight at a time."""

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        found = [name for name in refused if name in body]
        if found:
            return status, {"error": {"message": f"Unsupported parameter: {found[0]}", "param": found[0]}}
        return 200, {"choices": [{"message": {"content": CHAIN}, "finish_reason": "stop"}]}

    server = scripted(answer)
    code, out, err, records = annotate(server, toy, verb, "--concurrency", 8)
    assert code == 0 and len(records) == 8, err
    assert err.count("rejects a parameter") == len(refused)
    assert all(f"{name} is omitted" in err or f"instead of {name}" in err for name in refused)
    left_out = {*refused} - {"max_tokens"}  # sent by its other name
    assert all({*ALL} - {*record["sampling"]} == left_out for record in records)
    assert len(server.requests) <= 8 * (1 + len(refused))


def test_parameter_can_be_omitted_from_the_start(scripted: Any, toy: Path, verb: Any) -> None:
    server = scripted(lambda body: (200, {"choices": [{"message": {"content": CHAIN}}]}))
    more = ("--omit-parameter", "seed", "--omit-parameter", "top_p")
    code, _, _, records = annotate(server, toy, verb, *more)
    assert code == 0 and all("seed" not in body and "top_p" not in body for body in server.bodies())
    assert all({*record["sampling"]} == {"temperature", "max_tokens"} for record in records)
    more = ("--omit-parameter", "max_tokens", "--max-cost", 1, "--price", 1, 1)
    code, _, err, _ = annotate(server, toy, verb, *more)
    assert code == 2 and "--max-cost" in err


def test_unknown_parameter_rejection_suggests_the_option(scripted: Any, toy: Path, verb: Any) -> None:
    server = scripted(lambda body: (422, {"detail": "an extra field is not permitted"}))
    code, out, _, _ = annotate(server, toy, verb)
    assert code == 1 and "--omit-parameter omits a parameter" in out and len(server.requests) == 8
