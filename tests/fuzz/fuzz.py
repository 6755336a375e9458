"""Coverage-guided fuzzing of the chain parser and the store, by atheris (libFuzzer); `make fuzz` runs it.

    python tests/fuzz/fuzz.py parser --seconds 300
    python tests/fuzz/fuzz.py store --seconds 300

What is found is written to ``crash-…`` in the working directory; each find becomes a row of tests/hostile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.append(str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["domainbed_reasoning"]):
    from domainbed_reasoning.chains import chain as chains
    from domainbed_reasoning.chains import formats as exchange
    from domainbed_reasoning.chains import record, store

GOOD = chains.Chain("I look.", "An animal.", "It has paws.", "Fur may mislead.", "dog").render()


def parser(data: bytes) -> None:
    """What parses is what it says, comes back from its own rendering, and is refused in no other way than its own."""
    text = data.decode("utf-8", "surrogateescape")
    concluded = chains.conclusion_of(text)
    chains.match_class(concluded, ("dog", "bob cat", ""))
    try:
        chain = chains.parse_chain(text)
    except chains.ChainError as error:
        assert error.rule in ("missing", "order", "repeated", "nested", "empty", "outside") and str(error)
        return
    assert chains.parse_chain(chain.render()) == chain
    assert concluded == chain.conclusion and all(vars(chain).values())
    positions = [text.index(tag) for tag in chains.STAGE_TAGS]
    assert positions == sorted(positions)


def storing(data: bytes) -> None:
    """Any bytes can be read line by line; a writer keeps every good record that was there, or refuses the file."""
    path = _FOLDER / "chains.jsonl"
    path.write_bytes(data)
    before = [found for _, found in store.read_lines(path) if not isinstance(found, store.ChainFileError)]
    for found in before:
        assert record.check_record(found) is None
        json.dumps(found, allow_nan=False).encode()
    with contextlib.suppress(store.ChainFileError):
        store.load_chains(path)
    try:
        with store.ChainWriter(path) as writer:
            assert path.read_bytes().startswith(data[: len(data) - writer.cut_bytes])
            writer.append({"image": "new.jpg", "chain": GOOD})
    except store.ChainFileError:
        assert path.read_bytes() == data
    else:
        after = [found for _, found in store.read_lines(path) if not isinstance(found, store.ChainFileError)]
        assert after == [*before, {"image": "new.jpg", "chain": GOOD}]
    with contextlib.suppress(exchange.ExchangeError, store.ChainFileError):
        for _, found in exchange.import_records(path):
            json.dumps(found, allow_nan=False)


_TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes], list[str]]] = {
    "parser": (
        parser,
        [GOOD.encode(), GOOD.replace("\n", "").encode(), b"<CONCLUSION>dog</CONCLUSION>"],
        [*chains.STAGE_TAGS, "\\xed\\xa0\\x80", "<", "</", "\\x00", "bob_cat", "\\xe2\\x80\\xa8"],
    ),
    "store": (
        storing,
        [
            json.dumps({"image": "a/b.jpg", "chain": GOOD}).encode() + b"\n",
            b'\xef\xbb\xbf{"image":"a","chain":"x","verdict":"rejected","usage":{"dollars":0.5},"attempt":1}\r\n\n{"im',
            b'[{"image":"a","conversations":[{"from":"gpt","value":"x"}]},{"images":["b"],"messages":[]}]',
        ],
        ['\\"image\\":', '\\"chain\\":', '\\"verdict\\":', '\\"accepted\\"', '\\"usage\\":{', "\\\\ud800", "\\\\u0000"]
        + ["\\x0a", "\\x00", "NaN", "1e999", "[[[[", "../", "\\xef\\xbb\\xbf", '\\"conversations\\":', '\\"value\\":'],
    ),
}
_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def main() -> None:
    """Run one target; libFuzzer prints what it did."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=_TARGETS)
    options.add_argument("--seconds", type=int, default=300)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    run, seeds, words = _TARGETS[given.target]
    store._RETRIES = 0  # no other process writes
    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    dictionary = _FOLDER / "words"
    dictionary.write_text("".join(f'"{word}"\n' for word in words), "utf-8")
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-max_total_time={given.seconds}", f"-dict={dictionary}", f"-seed={given.seed}"]
        + ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"],
        run,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
