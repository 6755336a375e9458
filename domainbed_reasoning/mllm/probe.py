"""Check the small files of an untrusted base model before transformers reads them.

What they may ask for is checked here: numbers in bounds, no kernels of the hub, no quantization of their own, adapters
that would be fetched, a tokenizer and a chat template that end. The last two run in a process of their own; a folder
that has passed is remembered by a digest of these files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.record import check_json_value
from domainbed_reasoning.files import confined
from domainbed_reasoning.files.cache import cache_folder
from domainbed_reasoning.files.plain import MAX_DESCRIPTION_BYTES, open_plain, read_plain, read_plain_text
from domainbed_reasoning.mllm.families import ModelError

# The files of a model besides its weights; from the hub, these are downloaded first.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_WEIGHTS = ("*.safetensors", "*.bin")
_MAX_SMALL_BYTES = 64 << 20  # Gemma's tokenizer.json has 33 MB
_VERSION = "1"  # of these checks

# The largest whole number that a key of these configs may have, by the first pattern that its name matches.
_CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json")
_BOUNDS = (
    (re.compile("vocab"), 1 << 22),  # first, for Gemma's vocab_size_per_layer_input
    (re.compile("layer|depth|block|stage|expert"), 1 << 12),
    (re.compile("image_seq_len|num_image_tokens|tokens_per_image"), 1 << 16),
    (re.compile("patches|tiles|frames|heads|channels|groups"), 1 << 16),
    (re.compile("image_size|_dim|hidden_size|intermediate_size"), 1 << 20),
    (re.compile(""), 1 << 31),
)
_MEMORY, _SECONDS, _TEMPLATE_SECONDS = 2 << 30, 60, 20  # of memory: bytes; of the processor: for all, for a template
_MAX_RENDERED = 1 << 20  # characters of two turns
_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which object is it?"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
_TOO_MUCH = "it exceeds the memory or time limit for such a file"


def require_sound(model: str, folder: Path) -> None:
    """Reject a base model whose small files could run code, download anything or never terminate.

    Args:
        model: its name, for the message.
        folder: that contains it.

    Raises:
        ModelError: if it is rejected.
    """
    _require_sound(model, folder, digest_of(model, folder))


def digest_of(model: str, folder: Path) -> str:
    """Return a digest of a base model's small files.

    Raises:
        ModelError: if a file cannot be read.
    """
    digest = hashlib.sha256(_VERSION.encode())
    for path in _files(model, folder):
        data = _read(model, path, _MAX_SMALL_BYTES)
        digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _require_sound(model: str, folder: Path, digest: str) -> None:
    for name in _CONFIGS:
        if (folder / name).exists():
            _check_config(model, folder / name)
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that it names, from the hub, in place of this one.
        raise _error(model, folder / "adapter_config.json", "this is a folder of adapters, which load another model")
    passed = cache_folder() / "probed" / digest
    if passed.exists():
        return
    _run_tokenizer_and_template(model, folder)
    with contextlib.suppress(OSError):  # a cache that cannot be written is skipped
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _files(model: str, folder: Path) -> Iterator[Path]:
    """Yield the small files sorted by name; weights must be regular files, too."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            continue
        if any(map(path.match, _WEIGHTS)):
            try:
                open_plain(path).close()
            except OSError as error:
                raise _error(model, path, str(error.strerror)) from error
        elif any(map(path.match, SMALL_FILES)):
            yield path


def _read(model: str, path: Path, most: int) -> bytes:
    try:
        return read_plain(path, most)
    except OSError as error:
        raise _error(model, path, str(error.strerror)) from error


def _check_config(model: str, path: Path) -> None:
    data = _read(model, path, MAX_DESCRIPTION_BYTES)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _error(model, path, f"not valid JSON ({str(error):.200})") from error
    if not isinstance(config, dict):
        raise _error(model, path, f"expected a JSON object, got {type(config).__name__}")
    problem = check_json_value(config) or _problem_of(config)
    if problem:
        raise _error(model, path, problem)


def _problem_of(config: dict[str, Any]) -> str | None:
    """Return what is not allowed in a config; None without a problem."""
    level: list[tuple[str, Any]] = list(config.items())
    while level:
        for path, value in level:
            key = path.rpartition(".")[2]
            name = key.lower()
            if "implementation" in path.lower() and isinstance(value, str) and re.search(r"[/|:@]", value):
                return f"{path!r} requests a kernel from the hub, {value!r:.80}; code from the hub is never run"
            if "kernel" in name and "use" in name and value:
                return f"{key!r} requests kernels from the hub; code from the hub is never run"
            if name in ("quantization_config", "compression_config") and value:
                return "its weights are already quantized; pass the unquantized model and set the hparam 'quantize'"
            if name == "use_pretrained_backbone" and value:
                return f"{key!r} requests the weights of another model, which would be downloaded"
            if isinstance(value, int) and not isinstance(value, bool):
                most = next(most for pattern, most in _BOUNDS if pattern.search(name))
                if abs(value) > most:
                    return f"{key!r} must be at most {most:,}, got {str(value):.40}"
        level = [
            (f"{path}.{inner}" if isinstance(value, dict) else path, item)
            for path, value in level
            if isinstance(value, dict | list)
            for inner, item in (value.items() if isinstance(value, dict) else enumerate(value))
        ]
    return None


def _error(model: str, path: Path, problem: str) -> ModelError:
    return ModelError(
        f"model {model!r}: {path}: {problem}. Download the model again from its publisher, or pass another."
    )


# ---- in a process of its own ----


def _run_tokenizer_and_template(model: str, folder: Path) -> None:
    with confined.child(__name__, str(folder)) as process:
        answers: Any = process.stdout
        name: str | None = ""
        while name is not None:
            try:
                name, problem = pickle.load(answers)  # of our own process
            except (EOFError, pickle.UnpicklingError):
                if process.wait() > 0:
                    raise ModelError(
                        f"model {model!r}: {folder} could not be checked: the checking process exited with code "
                        f"{process.returncode}. Run `domainbed-reasoning doctor`."
                    ) from None
                raise _error(model, folder / (name or "config.json"), _TOO_MUCH) from None
            if problem:
                raise _error(model, folder / (name or ""), problem)


def in_child(place: str) -> None:
    """Report the name of each file that is checked, and its problem if there is one; finally None."""
    answers = confined.take_output()
    import tokenizers
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template

    def report(name: str | None, problem: str | None = None) -> None:
        answers.write(pickle.dumps((name, problem)))
        answers.flush()

    confined.limit(_MEMORY, _SECONDS)
    folder, name, doing = Path(place), "", "reading it"
    try:
        read: dict[str, Any] = {}
        for path in sorted(folder.glob("*.json")):
            name = path.name
            report(name)
            read[name] = json.loads(read_plain(path, _MAX_SMALL_BYTES))
        name = "tokenizer.json"
        if name in read:
            report(name)
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / name))
            tokenizer.encode("Which object is it? <SUMMARY>" + "a " * 100 + "0" * 100 + " " * 100)
        for name, template in _templates(folder, read):
            report(name)
            confined.limit(_MEMORY, _TEMPLATE_SECONDS)
            for conversation, opens in (([_QUESTION], True), ([_QUESTION, _ANSWER], False)):
                doing = f"rendering {'a question about an image' if opens else 'a question and its answer'}"
                rendered = render(
                    [conversation], chat_template=template, add_generation_prompt=opens, **_special_tokens(read)
                )
                if len(str(rendered)) > _MAX_RENDERED:
                    raise ValueError(f"a rendered question is longer than {_MAX_RENDERED:,} characters")
        name = ""
        report(None)
    except MemoryError:
        report(name, _TOO_MUCH)
    except BaseException as error:  # panics of Rust libraries are not Exceptions
        report(name, f"it cannot be used: {doing} failed ({type(error).__name__}: {str(error):.200})")


def _templates(folder: Path, read: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the file and the text of each chat template that transformers may choose."""
    if (folder / "chat_template.jinja").exists():
        yield "chat_template.jinja", read_plain_text(folder / "chat_template.jinja", _MAX_SMALL_BYTES)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        config = read.get(name)
        found = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(found, list):  # of {name, template}
            found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = found.get("default") if isinstance(found, dict) else found
        if isinstance(found, str):
            yield name, found


def _special_tokens(read: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that templates can use, such as ``bos_token``."""
    configs = {**(read.get("special_tokens_map.json") or {}), **(read.get("tokenizer_config.json") or {})}
    tokens = {}
    for name, value in configs.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return tokens
