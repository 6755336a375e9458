"""A trained job in the formats of the Hugging Face libraries, with a model card."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.jobs.job_files import RESULTS, numbered_lines, read_object
from domainbed_reasoning.jobs.trained import TASK_FILE, JobError, TrainedJob, read_job
from domainbed_reasoning.jobs.values import ACCURACY, answers_problem, metric_problems
from domainbed_reasoning.mllm.loading import add_lora, empty_network, resolve


def export_adapters(
    folder: str | pathlib.Path, output: pathlib.Path, model: str | None = None, base_model_id: str | None = None
) -> str:
    """Write a job's adapters in PEFT's format: ``PeftModel.from_pretrained(base, output)`` loads them.

    The base model's weights are not read.

    Args:
        folder: of the job.
        output: folder to write: adapter_config.json, adapter_model.safetensors, README.md and task.json.
        model: the base model, if the job's path no longer exists.
        base_model_id: public name of the base model; None: see `public_name`.

    Returns:
        The name of the base model that the adapters record.

    Raises:
        ValueError: for a job without trained adapters, or an output folder that is not empty.
    """
    job, name, card = _prepare(folder, output, model, base_model_id, merged=False)
    network: Any = empty_network(model or job.model)[0]
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
    network.save_pretrained(output, state_dict=dict(job.adapters))
    for config in network.peft_config.values():  # PEFT recorded the local folder
        config.base_model_name_or_path = name
        config.save_pretrained(output)
    _accompany(job, output, card)
    return name


def export_merged(
    folder: str | pathlib.Path, output: pathlib.Path, model: str | None = None, base_model_id: str | None = None
) -> str:
    """Write the base model with a job's adapters merged into it, and its processor.

    Adapters trained on quantized weights are merged into the unquantized ones.

    Args:
        folder: of the job.
        output: folder to write.
        model: the base model, if the job's path no longer exists.
        base_model_id: public name of the base model; None: see `public_name`.

    Returns:
        The name of the base model in the model card.

    Raises:
        ValueError: for a job without trained adapters, or an output folder that is not empty.
    """
    job, name, card = _prepare(folder, output, model, base_model_id, merged=True)
    merged = job.load(model, quantize="none").merge()
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
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not pathlib.Path(name).exists():
        return name
    return folder.resolve().name


_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _trained(folder: str | pathlib.Path) -> TrainedJob:
    job = read_job(folder)
    if not job.adapters:
        raise JobError(f"{job.folder}: {job.algorithm} trains no adapters, so there is nothing to export.")
    return job


def _prepare(
    folder: str | pathlib.Path, output: pathlib.Path, model: str | None, base_model_id: str | None, merged: bool
) -> tuple[TrainedJob, str, str]:
    """Create the output folder; return the job, the base model's name and the model card."""
    job = _trained(folder)
    name = base_model_id or public_name(model or str(job.hparams["model"]))
    card = model_card(job, merged, name)
    if output.is_dir() and any(output.iterdir()):
        raise JobError(f"{output} is not empty. Choose another --output, or remove the folder.")
    output.mkdir(parents=True, exist_ok=True)
    return job, name, card


def _accompany(job: TrainedJob, output: pathlib.Path, card: str) -> None:
    """Add the model card, and the task, which `predict` needs."""
    (output / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(job.folder / TASK_FILE, output / TASK_FILE)


def model_card(job: TrainedJob, merged: bool, base_model: str) -> str:
    """Return the README.md of an exported model: data, target domain, accuracy, settings, how to load it.

    Args:
        job: the job.
        merged: whether the whole model is exported; else the adapters alone.
        base_model: public name of the base model.

    Raises:
        JobError: results.jsonl or answers.json has an invalid value.
    """
    targets = ", ".join(_domain(job, env) for env in job.test_envs) or "none"
    sources = ", ".join(_domain(job, env) for env in range(len(job.environments)) if env not in job.test_envs)
    on_hub = bool(_HUB_ID.fullmatch(base_model))
    header = ["---", *([f"base_model: {base_model}"] if on_hub else [])]
    header += [
        "library_name: " + ("transformers" if merged else "peft"),
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- domain-generalization",
        "- domainbed",
        "---",
    ]
    settings = "\n".join(
        f"| {name} | {json.dumps(value)} |"
        for name, value in sorted((dict(job.hparams) | {"model": base_model}).items())
    )
    folder = resolve("tiny") if base_model == "tiny" else base_model if on_hub else f"FOLDER OF {base_model}"
    load = _LOAD_MERGED if merged else _LOAD_ADAPTERS.format(model=folder)
    return "\n".join(header) + _CARD.format(
        algorithm=job.algorithm,
        dataset=job.dataset,
        targets=targets,
        sources=sources or "none recorded",
        kind="the adapters merged into its weights" if merged else "LoRA adapters",
        model=base_model,
        classes=", ".join(job.class_names),
        accuracy=_accuracy_table(job),
        label=job.q_cls,
        chain=job.q_reason,
        load=load,
        settings=settings,
    )


_LOAD_ADAPTERS = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
base = AutoModelForImageTextToText.from_pretrained("{model}")
model = PeftModel.from_pretrained(base, "THIS FOLDER")
processor = AutoProcessor.from_pretrained("{model}")"""

_LOAD_MERGED = """from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")"""

_CARD = """

# {algorithm} on {dataset}, target domain: {targets}

A multimodal LLM tuned for domain generalization with {algorithm} (RD-MLDG, arXiv 2602.23777): {kind}, base model
`{model}`.

- Dataset: {dataset}; classes: {classes}
- Trained on the source domains: {sources}
- Target domain, never trained on: {targets}

## Accuracy

{accuracy}

## Questions

The model was prompted with these questions, after the image. For the class name alone:

```
{label}
```

For a five-stage chain:

```
{chain}
```

## Use

```
domainbed-reasoning predict --job THIS FOLDER image.jpg
```

```python
{load}
```

## Settings

| hparam | value |
|---|---|
{settings}
"""


def _domain(job: TrainedJob, env: int) -> str:
    return job.environments[env] if env < len(job.environments) else f"environment {env}"


def _accuracy_table(job: TrainedJob) -> str:
    """Return the last evaluation's accuracies in percent: DomainBed's, then those of both answers where recorded."""
    damage: list[str] = []
    record = _last_record(job.folder / RESULTS, damage)
    answers = read_object(job.folder / "answers.json", answers_problem, damage) or {}
    if damage:
        raise JobError(f"{job.folder} is damaged: {damage[0]}. Correct the file, or rerun the job.")
    environments = sorted({int(found[1]) for key in record if (found := ACCURACY.fullmatch(key))})
    if not environments:
        return "Not evaluated yet."
    lines = [
        f"DomainBed's evaluation at step {record.get('step', '?')}, in percent; answer: {job.hparams['answer']}. "
        "*in*: trained on, in source domains; *out*: held out. By chain, a chain that names no class counts as wrong.",
        "",
        "| domain | role | in | out | out, by label | out, by chain |",
        "|---|---|---|---|---|---|",
    ]
    for env in environments:
        role = "target" if env in job.test_envs else "source"
        both = (answers.get(f"env{env}") or {}).get("out") or {}
        cells = [record.get(f"env{env}_in_acc"), record.get(f"env{env}_out_acc"), both.get("label"), both.get("chain")]
        lines.append(f"| {_domain(job, env)} | {role} | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _last_record(path: pathlib.Path, damage: list[str]) -> dict[str, Any]:
    """Return the last complete record of a results.jsonl, {} without one; problems are added to ``damage``."""
    last: dict[str, Any] = {}
    for number, line in numbered_lines(path, damage):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # the job was killed while it wrote this line
            continue
        if isinstance(found, dict):
            last = found
            damage += [f"{path.name}, line {number}: {problem}" for problem in metric_problems(found)]
    return last
