"""Properties that hold for arbitrary input: parser, store, trie and rows, by hypothesis."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domainbed_reasoning.chains import store
from domainbed_reasoning.chains.chain import STAGE_TAGS, Chain, ChainError, conclusion_of, parse_chain
from domainbed_reasoning.chains.record import MAX_DEPTH, check_json_value, parse_json
from domainbed_reasoning.mllm.rows import build_rows, build_tree_rows, build_trie

CHAIN = Chain("I look.", "A thing.", "It has parts.", "None.", "dog").render()
CPU = torch.device("cpu")

pieces = st.sampled_from(
    [*STAGE_TAGS, "dog", " ", "\n", "<", "</", "\0", "\u2028", "<SUMMARY", "CONCLUSION>"]
) | st.text(max_size=4)


@settings(max_examples=300)
@given(parts=st.lists(pieces, max_size=24), at=st.integers(0, 200), cut=st.integers(0, 30))
def test_the_parser_takes_five_stages_and_nothing_else(parts: list[str], at: int, cut: int) -> None:
    """Pieces alone, and pieces in place of a part of a good chain."""
    for text in ("".join(parts), CHAIN[:at] + "".join(parts[:3]) + CHAIN[at + cut :]):
        try:
            chain = parse_chain(text)
        except ChainError as error:
            assert error.rule in ("missing", "order", "repeated", "nested", "empty", "outside")
            continue
        assert [text.count(tag) for tag in STAGE_TAGS] == [1] * len(STAGE_TAGS)
        assert conclusion_of(text) == chain.conclusion and parse_chain(chain.render()) == chain


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(value=json_values, depth=st.integers(0, 2 * MAX_DEPTH))
def test_json_is_read_as_it_was_written_and_its_depth_is_measured(value: Any, depth: int) -> None:
    text = "[" * depth + json.dumps(value) + "]" * depth
    read = parse_json(text)
    for _ in range(depth):
        (read,) = read
    assert read == value
    failure = check_json_value(parse_json(text))
    assert (failure is not None and "nested" in failure) == (depth + height(value) > MAX_DEPTH) or "NUL" in str(failure)


def height(value: Any) -> int:
    """Levels of a JSON value, 1 for what holds nothing."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(height, inner), default=0)


# What may happen to a chain file: a record is written, a writer dies while it writes (so many bytes of its line are
# there), the power goes (zeros), somebody edits (a line of nonsense).
events = st.lists(
    st.tuples(st.just("append"), st.integers(0, 9))
    | st.tuples(st.just("die"), st.integers(1, 200))
    | st.tuples(st.just("zeros"), st.integers(1, 99))
    | st.tuples(st.just("edit"), st.sampled_from([b"{}\n", b"nonsense\n", b"\n", b"\xff\n", b'{"image": "../x"}\n'])),
    max_size=12,
)


@settings(max_examples=150)
@given(happens=events)
def test_stored_records_survive_any_sequence_of_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: list[tuple[str, Any]]
) -> None:
    monkeypatch.setattr(store, "_RETRIES", 0)
    file = tmp_path / "chains.jsonl"
    file.write_bytes(b"")
    stored: list[str] = []
    for number, (what, how) in enumerate(happens):
        image = f"{number}.png"
        if what == "append":
            with contextlib.suppress(store.ChainFileError), store.ChainWriter(file) as writer:
                for copy in range(how):
                    writer.append({"image": f"{copy}/{image}", "chain": CHAIN})
                    stored.append(f"{copy}/{image}")
        elif what == "edit":
            if not file.read_bytes() or file.read_bytes().endswith(b"\n"):
                file.write_bytes(file.read_bytes() + how)
        elif file.read_bytes().endswith(b"\n"):  # only one writer can die, and in the middle of its last line
            line = json.dumps({"image": image, "chain": CHAIN}).encode()
            file.write_bytes(file.read_bytes() + (bytes(how) if what == "zeros" else line[: min(how, len(line) - 1)]))
    good = [found for _, found in store.read_lines(file) if not isinstance(found, store.ChainFileError)]
    assert [record["image"] for record in good] == stored


tokens = st.integers(1, 9)
targets = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=5)
prompts = st.lists(tokens, min_size=1, max_size=5)


@settings(max_examples=200)
@given(prompt=prompts, answers=targets)
def test_rows_supervise_every_target_token_where_its_past_was_fed(prompt: list[int], answers: list[list[int]]) -> None:
    rows = build_rows(prompt, answers, 0, CPU)
    row, position = rows.supervised
    predicted = [[] for _ in answers]  # type: list[list[int]]
    for r, p, token in zip(row.tolist(), position.tolist(), rows.targets[rows.target_mask].tolist(), strict=True):
        past = rows.input_ids[r, : p + 1][rows.attention_mask[r, : p + 1].bool()].tolist()
        assert past == prompt + answers[r][: len(predicted[r])]
        predicted[r].append(token)
    assert predicted == answers


@settings(max_examples=200)
@given(
    shared=prompts,
    ends=st.tuples(prompts, prompts),
    pairs=st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
)
def test_tree_rows_show_each_target_its_own_past_and_nothing_else(
    shared: list[int], ends: tuple[list[int], list[int]], pairs: list[tuple[list[int], list[int]]]
) -> None:
    both = (shared + ends[0], shared + ends[1])
    answers = ([a for a, _ in pairs], [b for _, b in pairs])
    rows = build_tree_rows(both, answers, 0, CPU)
    for branch, prompt, wanted in zip(rows.branches, both, answers, strict=True):
        row, position = branch.supervised
        predicted = [[] for _ in wanted]  # type: list[list[int]]
        for r, p, token in zip(
            row.tolist(), position.tolist(), branch.targets[branch.target_mask].tolist(), strict=True
        ):
            seen = rows.mask[r, 0, p].nonzero()[:, 0]
            past = prompt + wanted[r][: len(predicted[r])]
            assert rows.input_ids[r, seen].tolist() == past
            assert rows.position_ids[r, seen].tolist() == list(range(len(past)))
            predicted[r].append(token)
        assert predicted == wanted


@settings(max_examples=200)
@given(names=st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=8))
def test_a_trie_holds_every_name_and_shows_each_token_its_ancestors(names: list[list[int]]) -> None:
    ended = [[*name, 10] for name in names]
    trie = build_trie(ended)
    assert trie.tokens.shape == trie.depths.shape and trie.visible.shape == (len(trie.tokens),) * 2
    assert len(trie.tokens) == len({tuple(name[:n]) for name in names for n in range(1, len(name) + 1)})
    for name, path in zip(ended, trie.steps, strict=True):
        assert [token for _, token in path] == name
        for length, (node, _) in enumerate(path):
            if node < 0:
                assert length == 0
                continue
            ancestors = trie.visible[node].nonzero()[:, 0]
            assert trie.tokens[ancestors].tolist() == name[:length]
            assert int(trie.depths[node]) == length - 1 and (ancestors <= node).all()
