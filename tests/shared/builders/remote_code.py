"""A tiny checkpoint that comes with Python code of its own: config, model and processor named by its auto_map."""

from __future__ import annotations

import json
import pathlib

from builders import architectures

_CONFIGURATION = """
import os
from transformers import VipLlavaConfig

open(os.environ["CODE_RAN"], "a").write("configuration\\n")


class OwnConfig(VipLlavaConfig):
    model_type = "own_vlm"
"""
_MODELING = """
from transformers import VipLlavaForConditionalGeneration
from .configuration_own import OwnConfig


class OwnForConditionalGeneration(VipLlavaForConditionalGeneration):
    config_class = OwnConfig
"""
_PROCESSING = """
from transformers import LlavaProcessor


class OwnProcessor(LlavaProcessor):
    pass
"""
FILES = {"configuration_own": _CONFIGURATION, "modeling_own": _MODELING, "processing_own": _PROCESSING}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForImageTextToText": "modeling_own.OwnForConditionalGeneration",
}


def change(file: pathlib.Path, **values: object) -> None:
    """Set keys of a JSON file; None deletes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def build(folder: pathlib.Path) -> pathlib.Path:
    """Build the checkpoint, whose code appends a line to the file ``$CODE_RAN`` when it is imported."""
    architectures.build("ViP-LLaVA", folder)
    for name, code in FILES.items():
        (folder / f"{name}.py").write_text(code)
    own = {"model_type": "own_vlm", "architectures": ["OwnForConditionalGeneration"], "auto_map": AUTO_MAP}
    change(folder / "config.json", **own)
    processor = {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}
    change(folder / "processor_config.json", **processor)
    change(folder / "tokenizer_config.json", processor_class="OwnProcessor")
    return folder
