"""Published figures: GPUs, datasets, the configs of the paper's models, and the paper's results.

Standard library only. The paper is arXiv 2602.23777 (ICLR 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from domainbed_reasoning.registry import ALGORITHMS, TWINS
from domainbed_reasoning.registry import BASE_TO_NEW as BASE_TO_NEW_ENDING


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        gib: memory.
        tflops: dense bfloat16 peak.
        bandwidth: bytes per second.
    """

    gib: float
    tflops: float
    bandwidth: float


GPUS = {
    "H200": Gpu(131, 989, 4.8e12),
    "H100": Gpu(74.5, 989, 3.35e12),
    "A100-80": Gpu(74.5, 312, 2.04e12),
    "A100-40": Gpu(37, 312, 1.56e12),
    "L40S": Gpu(44.7, 362, 0.86e12),
    "A6000": Gpu(44.7, 155, 0.77e12),
    "RTX4090": Gpu(22.4, 165, 1.01e12),
    "RTX3090": Gpu(22.4, 71, 0.94e12),
    "L4": Gpu(22.4, 121, 0.3e12),
}


@dataclass(frozen=True)
class Data:
    """A public dataset.

    Attributes:
        images: number of images in all domains.
        domains: number of domains.
        classes: number of classes.
    """

    images: int
    domains: int
    classes: int


DATA = {
    "VLCS": Data(10_729, 4, 5),
    "PACS": Data(9_991, 4, 7),
    "OfficeHome": Data(15_588, 4, 65),
    "TerraIncognita": Data(24_788, 4, 10),
    "DomainNet": Data(586_575, 6, 345),
    "SVIRO": Data(56_000, 10, 7),
}

# Configs of the paper's models, for machines without them and without access to the hub.
_INTERNVIT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
_QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 28, "vocab_size": 151_674}
KNOWN_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenGVLab/InternVL3-8B-hf": (
        "InternVLForConditionalGeneration",
        {
            "vision_config": _INTERNVIT,
            "text_config": {
                **_QWEN2, "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            "tie_word_embeddings": False,
        },
    ),
    "OpenGVLab/InternVL3-2B-hf": (
        "InternVLForConditionalGeneration",
        {
            "vision_config": _INTERNVIT,
            "text_config": {
                **_QWEN2, "hidden_size": 1536, "intermediate_size": 8_960, "num_attention_heads": 12,
                "num_key_value_heads": 2,
            },
            "tie_word_embeddings": False,
        },
    ),
    "llava-hf/llava-1.5-7b-hf": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                "projection_dim": 768,
            },
            "text_config": {"model_type": "llama", "vocab_size": 32_064},
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A row of the paper's tables.

    Attributes:
        method: its name in the paper.
        backbone: its network.
        accuracies: DomainBed's name of the dataset → mean accuracy over its target domains, in percent.
        algorithm: our or DomainBed's name of the same method; empty if there is none.
    """

    method: str
    backbone: str
    accuracies: Mapping[str, float]
    algorithm: str = ""

    @property
    def average(self) -> float:
        """Mean over the datasets, in percent, rounded half up to a hundredth as the paper prints it."""
        return round(sum(self.accuracies.values()) / len(self.accuracies) + 1e-9, 2)


def _four(*accuracies: float) -> dict[str, float]:
    return dict(zip(("PACS", "VLCS", "OfficeHome", "TerraIncognita"), accuracies, strict=True))


def _two(*accuracies: float) -> dict[str, float]:
    return dict(zip(("OfficeHome", "TerraIncognita"), accuracies, strict=True))


MAIN_RESULTS = (
    Result("CORAL", "ResNet-50", _four(86.20, 78.80, 68.70, 47.60), "CORAL"),
    Result("SMOS", "ResNet-50", _four(89.40, 79.80, 71.60, 55.40)),
    Result("SWAD", "ViT-B/16", _four(91.30, 79.40, 76.90, 45.40)),
    Result("CLIP zero-shot", "ViT-B/16", _four(96.20, 81.70, 82.00, 33.40), "CLIPZeroShot"),
    Result("CLIP-LoRA", "ViT-B/16", _four(97.10, 83.10, 83.90, 55.70), "CLIPLoRA"),
    Result("SIMPLE+", "ViT-B/16", _four(99.00, 82.70, 87.70, 59.00)),
    Result("DGCLDTP", "ViT-B/16", _four(97.03, 84.79, 87.65, 63.27)),
    Result("GPT-4o zero-shot", "MLLM", _four(97.83, 85.41, 90.12, 60.49)),
    Result("InternVL3-8B zero-shot", "InternVL3-8B", _four(96.26, 85.67, 85.10, 46.84), "MLLMZeroShot"),
    Result("RD-MLDG", "InternVL3-8B", _four(98.13, 87.03, 91.73, 70.65), "RDMLDG"),
)
ABLATION = (
    Result("zero-shot", "InternVL3-8B", _two(85.10, 46.84), "MLLMZeroShot"),
    Result("label only (CLS)", "InternVL3-8B", _two(89.39, 66.69), "LabelSFT"),
    Result("reasoning only", "InternVL3-8B", _two(88.76, 64.56), "ReasoningSFT"),
    Result("MTCT", "InternVL3-8B", _two(90.58, 67.19), "MTCT"),
    Result("SARR without MTCT", "InternVL3-8B", _two(90.91, 65.29), "SARR"),
    Result("MTCT + SARR", "InternVL3-8B", _two(91.73, 70.65), "RDMLDG"),
)
# TerraIncognita's accuracy in percent after N rounds of SARR; 0 is MTCT. Flat after 3.
SARR_ROUNDS = {0: 67.19, 1: 70.06, 2: 70.59, 3: 70.65}
# Average accuracy in percent, trained on one source domain; the datasets and sources averaged over are not known here.
SINGLE_SOURCE = {"RDMLDG": 89.37, "best baseline": 62.03}
# Accuracy on new classes and its harmonic mean with that on base classes, in percent, before and after RD-MLDG.
BASE_TO_NEW_DATASET = "FGVC-Aircraft"
BASE_TO_NEW = {"before": (15.44, 19.01), "RDMLDG": (24.33, 34.63)}
# Percent of the self-labeled chains that were kept, in the first round and at the end.
SELF_LABELS_KEPT = (100 - 39.5, 100 - 14.8)

# The paper's settings, by the names of our hyper-parameters.
PAPER_HPARAMS: dict[str, Any] = {
    "answer": "chain",
    "model": "OpenGVLab/InternVL3-8B-hf",
    "quantize": "none",
    "lora_rank": 8,
    "lora_targets": "both",
    "lr": 5e-4,
    "mtct_epochs": 3,
    "sarr_epochs": 3,
    "sarr_rounds": 3,
    "label_weight": 1.0,
    "chain_weight": 1.0,
    "gradient_balance": "none",
    "chain_weighting": "constant",
    "sarr_filter": "conclusion",
    "sarr_votes": 1,
    "votes": 1,
    "average_adapters": False,
    "init_adapter": None,
}
# The settings among these that make it a different method than the paper's.
METHOD_HPARAMS = (
    "answer", "label_weight", "chain_weight", "gradient_balance", "chain_weighting", "sarr_filter",
    "sarr_votes", "votes", "average_adapters", "init_adapter",
)  # fmt: skip
PAPER_BATCH = 128  # over all source domains
# Networks of the other methods, from the paper's tables.
OTHERS_HPARAMS: dict[str, dict[str, Any]] = {
    "CORAL": {"resnet18": False, "vit": False},
    **dict.fromkeys(("CLIPZeroShot", "CLIPLoRA"), {"clip_model": "openai/clip-vit-base-patch16"}),
}


def settings_of(algorithm: str) -> Mapping[str, Any]:
    """Return the paper's settings of an algorithm, by the names of hyper-parameters; empty if it reports none.

    Args:
        algorithm: DomainBed's or our name.
    """
    if algorithm in OTHERS_HPARAMS or algorithm not in ALGORITHMS:
        return OTHERS_HPARAMS.get(algorithm, {})
    return PAPER_HPARAMS | ({"answer": "label"} if algorithm == "LabelSFT" else {})


def by_classes(data: Data) -> Data:
    """Return the counts of a dataset split by base and new classes: two environments with half of the names each."""
    return replace(data, domains=2, classes=-(-data.classes // 2))


def data_of(dataset: str) -> Data | None:
    """Return the counts of DomainBed's or our dataset of that name; None if they are not published."""
    data = DATA.get(TWINS.get(dataset, dataset))
    return by_classes(data) if data is not None and dataset.endswith(BASE_TO_NEW_ENDING) else data


def result_of(algorithm: str, dataset: str) -> float | None:
    """Return the paper's accuracy of an algorithm on a dataset, in percent; None if it reports none.

    Args:
        algorithm: DomainBed's or our name.
        dataset: DomainBed's name.
    """
    rows = (row for row in (*MAIN_RESULTS, *ABLATION) if row.algorithm == algorithm)
    return next((row.accuracies[dataset] for row in rows if dataset in row.accuracies), None)


def find_gpu(name: str) -> Gpu:
    """Return a GPU's data sheet by its name, ignoring case and punctuation.

    Raises:
        ValueError: for an unknown GPU.
    """
    plain = "".join(char for char in name.upper() if char.isalnum()).removeprefix("NVIDIA").removesuffix("GB")
    for known, gpu in GPUS.items():
        if plain == known.upper().replace("-", ""):
            return gpu
    raise ValueError(f"Unknown GPU {name!r}. Available: {', '.join(GPUS)}.")
