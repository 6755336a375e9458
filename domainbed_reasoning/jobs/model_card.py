"""The model card of a trained job: data, target domain, accuracy, settings, how to load it."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.files.local_paths import without_folders
from domainbed_reasoning.jobs.job_files import RESULTS, numbered_lines, read_object
from domainbed_reasoning.jobs.trained import JobError, TrainedJob
from domainbed_reasoning.jobs.values import ACCURACY, answers_problem, metric_problems
from domainbed_reasoning.registry import EMBEDDED_MODELS

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(job: TrainedJob, merged: bool, base_model: str, revision: str | None = None) -> str:
    """Return the README.md of an exported model: data, target domain, accuracy, settings, how to load it.

    Args:
        job: the job.
        merged: whether the whole model is exported; else the adapters alone.
        base_model: public name of the base model.
        revision: of its repository on the hub; None is its main branch.

    Raises:
        JobError: results.jsonl or answers.json has an invalid value.
    """
    targets = ", ".join(_domain(job, env) for env in job.test_envs) or "none"
    sources = ", ".join(_domain(job, env) for env in range(len(job.environments)) if env not in job.test_envs)
    on_hub = bool(HUB_ID.fullmatch(base_model))
    record, answers = _last_evaluation(job)
    data = huggingface_hub.ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=["domain-generalization", "domainbed"],
        model_name=f"{job.algorithm} on {job.dataset}" if record else None,
        eval_results=list(_model_index(job, record)) or None,
    )
    settings = "\n".join(
        f"| {name} | {json.dumps(value)} |"
        for name, value in sorted((public_settings(job.hparams) | {"model": base_model}).items())
    )
    load = _LOAD_MERGED if merged else _LOAD_ADAPTERS
    if base_model in EMBEDDED_MODELS.values():
        needed = "from domainbed_reasoning.mllm.loading import resolve\n"
        base = f"resolve({json.dumps(base_model)})"
    else:
        needed, base = "", json.dumps(base_model if on_hub else f"FOLDER OF {base_model}")
    if revision is not None:
        base += f", revision={json.dumps(revision)}"
    return f"---\n{data.to_yaml()}\n---" + _CARD.format(
        algorithm=job.algorithm,
        dataset=job.dataset,
        targets=targets,
        sources=sources or "none recorded",
        kind="the adapters merged into its weights" if merged else "LoRA adapters",
        model=base_model,
        classes=", ".join(job.class_names),
        accuracy=_accuracy_table(job, record, answers),
        asked=_asked(job),
        label=q_cls(job.names_of_training, job.subject),
        chain=q_reason(job.names_of_training, job.subject),
        load=load.format(needed=needed, base=base),
        settings=settings,
    )


_LOAD_ADAPTERS = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
{needed}base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, "THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")"""

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

{asked} For the class name alone:

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


def _asked(job: TrainedJob) -> str:
    """Say which questions the card shows: if environments have classes of their own, those of training."""
    if not job.offered:
        return "The model was prompted with these questions, after the image."
    own = " ".join(f"{_domain(job, env)}: {', '.join(names)}." for env, names in enumerate(job.offered))
    return (
        "The model was trained with these questions, after the image. In an evaluation, they offer the classes of the "
        f"image's environment. {own} `predict --class-names` selects the classes to offer; without it, all are."
    )


def _domain(job: TrainedJob, env: int) -> str:
    return job.environments[env] if env < len(job.environments) else f"environment {env}"


def public_settings(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as other machines may read them: of local files and folders their names alone."""
    return {name: without_folders(value) if isinstance(value, str) else value for name, value in hparams.items()}


def _last_evaluation(job: TrainedJob) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the last record of results.jsonl and answers.json; {} where they do not exist.

    Raises:
        JobError: one of them has an invalid value.
    """
    damage: list[str] = []
    record = _last_record(job.folder / RESULTS, damage)
    answers = read_object(job.folder / "answers.json", answers_problem, damage) or {}
    if damage:
        raise JobError(f"{job.folder} is damaged: {damage[0]}. Correct the file, or rerun the job.")
    return record, answers


def _model_index(job: TrainedJob, record: Mapping[str, Any]) -> Iterator[huggingface_hub.EvalResult]:
    """Yield the accuracy on each target domain, as DomainBed's tables have it, and on the others' held-out images."""
    for env in range(len(job.environments)):
        split = "in" if env in job.test_envs else "out"
        value = record.get(f"env{env}_{split}_acc")
        if value is not None:
            role = "target domain" if env in job.test_envs else "source domain, held out"
            yield huggingface_hub.EvalResult(
                task_type="image-classification",
                dataset_type=job.dataset.removesuffix("Reasoning").lower(),
                dataset_name=f"{job.dataset.removesuffix('Reasoning')}, {_domain(job, env)} ({role})",
                dataset_config=_domain(job, env),
                dataset_split=split,
                metric_type="accuracy",
                metric_value=round(100 * value, 2),
                metric_name=f"Accuracy in percent, answer: {job.hparams['answer']}",
            )


def _accuracy_table(job: TrainedJob, record: Mapping[str, Any], answers: Mapping[str, Any]) -> str:
    """Return the last evaluation's accuracies in percent: DomainBed's, then those of both answers where recorded."""
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
