"""A trained job in the formats of the Hugging Face libraries, with a model card."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.jobs.model_card import HUB_ID, model_card, public_settings
from domainbed_reasoning.jobs.trained import TASK_FILE, JobError, TrainedJob, read_job, read_task
from domainbed_reasoning.mllm.adapter_files import PEFT_WEIGHTS, VERSION, VERSION_KEY
from domainbed_reasoning.mllm.adapters import add_lora
from domainbed_reasoning.mllm.loading import empty_network, resolve
from domainbed_reasoning.mllm.opening import hub_arguments, loading


def export_adapters(
    folder: str | pathlib.Path,
    output: pathlib.Path,
    model: str | None = None,
    base_model_id: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a job's adapters in PEFT's format: ``PeftModel.from_pretrained(base, output)`` loads them.

    The base model's weights are not read.

    Args:
        folder: of the job.
        output: folder to write: adapter_config.json, adapter_model.safetensors, the processor, README.md and task.json.
        model: the base model, if the job's path no longer exists.
        base_model_id: public name of the base model; None: see `public_name`.
        trust_remote_code: whether Python files of the base model run; what the job was trained with does not count.

    Returns:
        The name of the base model that the adapters record.

    Raises:
        ValueError: for a job without trained adapters, or an output folder that is not empty.
    """
    job, name, card = _prepare(folder, output, model, base_model_id, trust_remote_code, merged=False)
    network: Any = empty_network(model or job.model, job.revision(model), trust_remote_code)[0]
    settings = job.lora()
    assert settings is not None
    try:
        network = add_lora(network, settings, job.adapters)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise JobError(
            f"{job.folder}: its adapters do not fit {name} ({reason}). Pass the job's base model with --model."
        ) from error
    for config in network.peft_config.values():
        config.inference_mode = True
    network.save_pretrained(output, state_dict=dict(job.adapters), save_embedding_layers=False)  # none are adapted
    _write_version(output / PEFT_WEIGHTS)
    for config in network.peft_config.values():  # PEFT recorded the local folder
        config.base_model_name_or_path = name
        config.revision = job.revision(model)
        config.save_pretrained(output)
    _save_processor(model or job.model, output, job.revision(model), trust_remote_code)
    _accompany(job, output, card)
    return name


def export_merged(
    folder: str | pathlib.Path,
    output: pathlib.Path,
    model: str | None = None,
    base_model_id: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write the base model with a job's adapters merged into it, and its processor.

    Adapters trained on quantized weights are merged into the unquantized ones.

    Args:
        folder: of the job.
        output: folder to write.
        model: the base model, if the job's path no longer exists.
        base_model_id: public name of the base model; None: see `public_name`.
        trust_remote_code: whether Python files of the base model run; what the job was trained with does not count.

    Returns:
        The name of the base model in the model card.

    Raises:
        ValueError: for a job without trained adapters, or an output folder that is not empty.
    """
    job, name, card = _prepare(folder, output, model, base_model_id, trust_remote_code, merged=True)
    merged = job.load(model, quantize="none").merge()
    merged.network.config._name_or_path = name
    merged.network.save_pretrained(output)
    merged.processor.save_pretrained(output)
    _accompany(job, output, card)
    return name


def public_name(model: str) -> str:
    """Return the name of a base model on other machines.

    Args:
        model: what `load_mllm` loads.

    Returns:
        A hub id: the one passed, that of a folder in the hub's cache or the one in the folder's config.json; else the
        folder's name.
    """
    folder = pathlib.Path(model).expanduser()
    if not folder.is_dir():
        return model
    cached = _CACHED.search(folder.resolve().as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}"
    try:
        name = parse_json(read_plain_text(folder / "config.json")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not pathlib.Path(name).exists():
        return name
    return folder.resolve().name


_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")


def _trained(folder: str | pathlib.Path, trust_remote_code: bool) -> TrainedJob:
    job = read_job(folder, trust_remote_code=trust_remote_code)
    if not job.adapters:
        raise JobError(f"{job.folder}: {job.algorithm} trains no adapters, so there is nothing to export.")
    return job


def _prepare(
    folder: str | pathlib.Path,
    output: pathlib.Path,
    model: str | None,
    base_model_id: str | None,
    trust_remote_code: bool,
    merged: bool,
) -> tuple[TrainedJob, str, str]:
    """Create the output folder; return the job, the base model's name and the model card."""
    job = _trained(folder, trust_remote_code)
    name = base_model_id or public_name(model or str(job.hparams["model"]))
    card = model_card(job, merged, name, job.revision(model))
    if output.is_dir() and any(output.iterdir()):
        raise JobError(f"{output} is not empty. Choose another --output, or remove the folder.")
    output.mkdir(parents=True, exist_ok=True)
    return job, name, card


def _accompany(job: TrainedJob, output: pathlib.Path, card: str) -> None:
    """Add the model card, and the task, which `predict` needs."""
    (output / "README.md").write_text(card, encoding="utf-8")
    task = read_task(job.folder)
    task["hparams"] = public_settings(task["hparams"]) | {"model": task["hparams"]["model"]}
    (output / TASK_FILE).write_text(json.dumps(task, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_version(weights: pathlib.Path) -> None:
    """Add the version of the format to the metadata of exported adapters."""
    import safetensors.torch

    metadata = {"format": "pt", VERSION_KEY: str(VERSION)}
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights, metadata)


def _save_processor(model: str, output: pathlib.Path, revision: str | None, trust_remote_code: bool) -> None:
    """Write the base model's processor, so that `AutoProcessor.from_pretrained(output)` loads it."""
    import transformers

    where, arguments = resolve(model, revision), hub_arguments(revision, trust_remote_code)
    with loading(model, where):
        transformers.AutoProcessor.from_pretrained(where, **arguments).save_pretrained(output)
