"""Untrusted base models: loaded, or rejected by folder and file; no downloads, and none of their code runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import import_utils

from builders.processes import environment, run_python
from domainbed_reasoning.mllm import ModelError, load_mllm
from domainbed_reasoning.mllm.loading import TINY, config_of, image_edge


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid untrusted model, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; ``text__name`` is the key ``name`` within ``text_config``."""
    config = json.loads(file.read_text()) if file.exists() else {}
    for key, value in values.items():
        *within, name = key.split("__")
        place = config
        for step in within:
            place = place[f"{step}_config"]
        place[name] = value
    file.write_text(json.dumps(config))


def test_valid_model_loads_and_is_inspected_once(model: Path, tmp_path: Path) -> None:
    load_mllm(str(model))
    (passed,) = (tmp_path / "cache" / "domainbed-reasoning" / "probed").iterdir()
    before = passed.stat().st_mtime_ns
    assert image_edge(str(model)) == load_mllm(str(model)).image_size
    assert passed.stat().st_mtime_ns == before


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a kernel for attention": ({"attn_implementation": "evil/kernel"}, "requests a kernel from the hub, 'evil/kernel'"),
    "a kernel, as transformers saves it": ({"_attn_implementation": "evil/kernel:f"}, "requests a kernel"),
    "a kernel of the language model": ({"text___attn_implementation": "paged|evil/kernel@main"}, "requests a kernel"),
    "a kernel of the vision model": ({"vision__attn_implementation": "evil/kernel"}, "requests a kernel"),
    "a kernel of one tower by name": ({"attn_implementation": {"text_config": "evil/kernel"}}, "requests a kernel"),
    "kernels": ({"use_kernels": True}, "requests kernels"),
    "weights in 8 bits": ({"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
    "a quantization of nonsense": ({"quantization_config": [[1]]}, "already quantized"),
    "a quantization of the language model": ({"text__quantization_config": {"quant_method": "mxfp4"}}, "quantized"),
    "10**7 layers": ({"text__num_hidden_layers": 10**7}, "'num_hidden_layers' must be at most 4,096, got 10000000"),
    "10**7 layers of vision": (
        {"vision__num_hidden_layers": 10**7},
        "'num_hidden_layers' must be at most 4,096, got 10000000",
    ),
    "a vocabulary of 10**9": ({"text__vocab_size": 10**9}, "'vocab_size' must be at most 4,194,304, got 1000000000"),
    "a vocabulary that the weights lack": (
        {"text__vocab_size": 4_000_000},
        "describes .* parameters, but",
    ),
    "a width that the weights lack": ({"text__hidden_size": 1 << 16}, "describes|cannot load"),
    "a number of 400 digits": ({"text__hidden_size": 10**400}, "'hidden_size' must be at most 1,048,576, got 1000"),
    "another model's backbone": ({"vision__use_pretrained_backbone": True}, "would be downloaded"),
    "nested without end": ({"text__deep": json.loads("[" * 200 + "]" * 200)}, "nested more than"),
    "a width as text": ({"text__hidden_size": "wide"}, "transformers cannot load"),
    "a tower of a kind that nobody knows": ({"text__model_type": "nonsense"}, "transformers cannot load"),
    "no number of heads": ({"text__num_attention_heads": 0}, "transformers cannot load"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused_by_its_file(model: Path, name: str) -> None:
    values, failure = CONFIGS[name]
    change(model / "config.json", **values)
    with pytest.raises(ModelError, match=f"(?s){model}.*({failure})") as error:
        load_mllm(str(model))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_images_of_a_billion_pixels_a_side_are_refused(model: Path) -> None:
    file = model / (
        "preprocessor_config.json" if (model / "preprocessor_config.json").exists() else "processor_config.json"
    )
    config = json.loads(file.read_text())
    (config.get("image_processor") or config)["size"] = {"height": 10**9, "width": 10**9}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"images of 1,000,000,000 pixels per side"):
        load_mllm(str(model))


TEMPLATES: dict[str, tuple[str, str]] = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "memory or time limit"),
    "eats memory": (
        "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "more|memory or time limit|cannot be used",
    ),
    "multiplies": ("{{ 'x' * 10 ** 10 }}", "memory or time limit|cannot be used"),
    "says much": ("{{ 'x' * 10 ** 7 }}", "longer than 1,048,576 characters"),
    "is none": ("{% for %}", "cannot be used"),
    "climbs out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be used"),
}


@pytest.mark.parametrize(
    "name", [pytest.param("loops", marks=pytest.mark.slow), *[n for n in TEMPLATES if n != "loops"]]
)
def test_a_hostile_chat_template_is_refused_by_its_file(model: Path, name: str) -> None:
    template, failure = TEMPLATES[name]
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"(?s){model}/chat_template.jinja.*({failure})"):
        load_mllm(str(model))


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[1]"),
        ("config.json", b""),
        ("config.json", b"[" * 100_000),
        ("generation_config.json", b"\xff\xfe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_named(model: Path, file: str, data: bytes) -> None:
    (model / file).write_bytes(data)
    with pytest.raises(ModelError, match=str(model)):
        load_mllm(str(model))


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("kind", ["a pipe", "endless", "a terabyte"])
def test_irregular_or_endless_files_are_rejected(model: Path, file: str, kind: str) -> None:
    (model / file).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(model / file)
    elif kind == "endless":
        (model / file).symlink_to("/dev/zero")
    else:
        with (model / file).open("wb") as sparse:
            sparse.truncate(1 << 40)
    with pytest.raises(ModelError, match=f"(?s){model}"):
        load_mllm(str(model))


def test_tokenizer_with_catastrophic_backtracking_is_rejected(model: Path) -> None:
    config = json.loads((model / "tokenizer.json").read_text())
    pattern = {
        "type": "Split",
        "pattern": {"Regex": "(a ?|a a ?)+$x|((a )+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }
    config["pre_tokenizer"] = pattern
    (model / "tokenizer.json").write_text(json.dumps(config))
    try:
        load_mllm(str(model))
    except ModelError as error:
        assert f"{model}/tokenizer.json" in str(error)


def test_adapters_in_place_of_a_model_are_refused(model: Path) -> None:
    """transformers would load the base model that they name."""
    change(model / "adapter_config.json", base_model_name_or_path="evil/model", peft_type="LORA")
    with pytest.raises(ModelError, match="adapter_config.json: this is a folder of adapters"):
        load_mllm(str(model))


def test_config_is_validated_before_planning(model: Path) -> None:
    change(model / "config.json", text__num_hidden_layers=10**7)
    for ask in (config_of, image_edge):
        with pytest.raises(ModelError, match="num_hidden_layers"):
            ask(str(model))


# `kernels` as it would be installed: whatever is asked of it is written down.
_KERNELS = """
import os
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def asked(*arguments, **named):
        if name == "get_kernel":
            open(os.environ["TRAP"], "a").write(f"{name} {arguments}\\n")
            raise RuntimeError("no network")
        return lambda function: function
    return asked
"""
_LOAD = """
import socket, sys
def refuse(*arguments, **named):
    print("NETWORK", arguments)
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from domainbed_reasoning.mllm import LoraSettings, ModelError, load_mllm
try:
    load_mllm(sys.argv[1], lora=LoraSettings(2, 4))
    print("LOADED")
except ModelError as error:
    print(error)
from domainbed_reasoning.commands import doctor
print(list(doctor.examine_interfaces()))
"""


def run(model: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Load a model in a process where `kernels` is installed and every connection is written down."""
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")  # transformers ignores others
    (tmp_path / "lib" / "kernels").mkdir(parents=True)
    (tmp_path / "lib" / f"kernels-{version}.dist-info").mkdir()
    metadata = tmp_path / "lib" / f"kernels-{version}.dist-info" / "METADATA"
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (tmp_path / "lib" / "kernels" / "__init__.py").write_text(_KERNELS)
    variables = environment(tmp_path / "lib", TRAP=str(tmp_path / "trap"))
    env = {name: value for name, value in variables.items() if not name.endswith("_OFFLINE")}
    return run_python("-c", _LOAD, model, env=env, cwd=tmp_path)


@pytest.mark.parametrize("kind", ["sound", "a kernel"])
def test_nothing_is_downloaded_and_no_kernel_requested_if_installed(model: Path, tmp_path: Path, kind: str) -> None:
    if kind == "a kernel":
        change(model / "config.json", attn_implementation="evil/kernel")
    done = run(model, tmp_path)
    assert ("LOADED" if kind == "sound" else "requests a kernel from the hub") in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "trap").exists() and "NETWORK" not in done.stdout
    assert "Failed to load" not in done.stderr and "pip install kernels" not in done.stderr
