"""One door to transformers, peft and bitsandbytes, which load inside of it only when a model is asked for."""

from domainbed_reasoning.mllm.adapters import LoraSettings
from domainbed_reasoning.mllm.families import ModelError
from domainbed_reasoning.mllm.load import load_mllm
from domainbed_reasoning.mllm.model import MLLM

__all__ = ["MLLM", "LoraSettings", "ModelError", "load_mllm"]
