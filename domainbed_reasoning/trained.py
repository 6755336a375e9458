"""What a job trained, read back without DomainBed: its task, its settings and its adapters.

Three kinds of folder: a DomainBed job (``task.json`` and ``model.pkl``), and the two that `export` makes of one: an
adapter folder of PEFT and a merged model.
"""

from __future__ import annotations

import json
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.mllm import MLLM, LoraSettings, load_mllm
from domainbed_reasoning.prompts import PROMPT_VERSION, q_cls, q_reason

TASK_FILE = "task.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"


class JobError(ValueError):
    """A folder that holds no trained model: the message names the fault and the cure."""


@dataclass(frozen=True)
class TrainedJob:
    """A trained model, not yet loaded.

    Attributes:
        folder: where it lies.
        algorithm: name of the algorithm.
        dataset: name of the dataset.
        subject: the noun of the question.
        class_names: in label order.
        environments: names of the domains.
        test_envs: numbers of the target domains.
        hparams: of the job.
        adapters: trained tensors by their names in the PEFT model; empty for a zero-shot or a merged model.
        model: what `load_mllm` loads: the base model, or the folder itself where the adapters are merged.
    """

    folder: pathlib.Path
    algorithm: str
    dataset: str
    subject: str
    class_names: tuple[str, ...]
    environments: tuple[str, ...]
    test_envs: tuple[int, ...]
    hparams: Mapping[str, Any]
    adapters: Mapping[str, torch.Tensor]
    model: str

    @property
    def q_cls(self) -> str:
        """The question of the classification path."""
        return q_cls(self.class_names, self.subject)

    @property
    def q_reason(self) -> str:
        """The question of the reasoning path."""
        return q_reason(self.class_names, self.subject)

    def lora(self) -> LoraSettings | None:
        """Return the adapters that the job trained; None without any."""
        if not self.adapters:
            return None
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_projector")
        return LoraSettings(*(self.hparams[name] for name in names))

    def load(self, model: str | None = None, dtype: str | None = None, quantize: str | None = None) -> MLLM:
        """Load the model with its trained adapters, in evaluation mode.

        Args:
            model: a base model in place of the job's, which may lie elsewhere on this machine.
            dtype: in place of the job's.
            quantize: in place of the job's.

        Raises:
            ModelError: for a base model that cannot be used.
            ValueError: for adapters that do not fit it.
        """
        mllm = load_mllm(
            model or self.model,
            lora=self.lora(),
            dtype=dtype or self.hparams["dtype"],
            quantize=quantize or self.hparams["quantize"],
            max_tiles=self.hparams["max_tiles"],
        )
        if self.adapters:
            mllm.load_adapters(self.adapters)
        return mllm.eval()


def read_job(folder: str | pathlib.Path, checkpoint: str = "model.pkl") -> TrainedJob:
    """Return the trained model in ``folder``: a job of DomainBed's train or sweep, or what `export` made of one.

    Args:
        folder: of the job.
        checkpoint: DomainBed's file in it; ``model_step19.pkl`` and others are there after
            ``--save_model_every_checkpoint``.

    Raises:
        JobError: for a folder that is none of these, or a job that has not saved its model.
    """
    path = pathlib.Path(folder).expanduser()
    try:
        said = json.loads((path / TASK_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JobError(
            f"{path} holds no {TASK_FILE}: it is no job of an MLLM algorithm. Give the folder that DomainBed's train "
            "or sweep wrote (with results.jsonl and model.pkl), or one that `domainbed-reasoning export` wrote."
        ) from error
    except json.JSONDecodeError as error:
        raise JobError(f"{path / TASK_FILE} is damaged ({error}): run the job again.") from error
    if said["prompt_version"] != PROMPT_VERSION:
        raise JobError(
            f"{path}: the model was asked with prompts of version {said['prompt_version']}, and version "
            f"{PROMPT_VERSION} is installed: use domainbed-reasoning {said['version']}."
        )
    hparams, model = said["hparams"], said["hparams"]["model"]
    if (path / _PEFT_WEIGHTS).is_file():
        adapters = _peft_adapters(path / _PEFT_WEIGHTS)
    elif (path / "config.json").is_file():
        adapters, model, hparams = {}, str(path), {**hparams, "quantize": "none"}
    else:
        adapters = _checkpoint(path / checkpoint)["model_dict"]
    return TrainedJob(
        folder=path,
        algorithm=said["algorithm"],
        dataset=said["dataset"],
        subject=said["subject"],
        class_names=tuple(said["class_names"]),
        environments=tuple(said["environments"]),
        test_envs=tuple(said["test_envs"]),
        hparams=hparams,
        adapters=adapters,
        model=model,
    )


def _checkpoint(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise JobError(
            f"{file.parent} holds no {file.name}: the job has not reached its first checkpoint, or ran with "
            "--skip_model_save."
        )
    try:  # tensors and plain values only: a checkpoint from elsewhere must not run code
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise JobError(
            f"{file} cannot be read: it is cut short, as by a job that was killed while it saved, or holds more than "
            f"tensors and plain values ({str(error).splitlines()[0]}). Run the job again."
        ) from error
    return checkpoint


def _peft_adapters(file: pathlib.Path) -> dict[str, torch.Tensor]:
    """Return PEFT's saved tensors under the names that they have in the model, with the adapter's."""
    import safetensors.torch

    saved = safetensors.torch.load_file(file)
    return {name.removesuffix(".weight") + ".default.weight": tensor for name, tensor in saved.items()}
