"""Loads a trained job without DomainBed: its task, settings and adapters.

Three kinds of folders are supported: a DomainBed job (``task.json`` and ``model.pkl``), and the two kinds that `export`
writes: PEFT adapters and a merged model.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_cls, q_reason
from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.hparam_checks import REVISION
from domainbed_reasoning.jobs.saved_tensors import load_tensors
from domainbed_reasoning.jobs.values import TASK_VERSION
from domainbed_reasoning.mllm import MLLM, LoraSettings, ModelError, load_mllm
from domainbed_reasoning.mllm.adapter_files import PEFT_WEIGHTS, peft_tensors, version_problem

TASK_FILE = "task.json"
# What jobs of version 1 of task.json had before there were these hyper-parameters.
_VERSION_1 = {
    "votes": 1, "vote_temperature": 0.7, "answer_matching": "exact", "revision": None,
    "lora_variant": "lora", "lora_target_modules": None,
}  # fmt: skip
_SQUARE = {"tiling": "square"}  # of jobs from before there was a choice


class JobError(ValueError):
    """The folder contains no trained model that can be used."""


@dataclass(frozen=True)
class TrainedJob:
    """A trained model, not yet loaded.

    Attributes:
        folder: that contains it.
        algorithm: name of the algorithm.
        dataset: name of the dataset.
        subject: the noun in the question.
        class_names: in label order.
        environments: names of the domains.
        test_envs: numbers of the target domains.
        hparams: of the job.
        adapters: trained tensors by their names in the PEFT model; empty for a zero-shot or a merged model.
        model: what `load_mllm` loads: the base model, or the folder itself if the adapters are merged.
        trust_remote_code: whether Python files of the base model run: the caller's word, never the job's own.
        offered: per environment, the class names that its questions offered; empty if all did.
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
    trust_remote_code: bool = False
    offered: tuple[tuple[str, ...], ...] = ()

    @property
    def names_of_training(self) -> tuple[str, ...]:
        """The class names that the questions offered in training, in label order."""
        if not self.offered:
            return self.class_names
        names = {name for env, own in enumerate(self.offered) if env not in self.test_envs for name in own}
        return tuple(name for name in self.class_names if name in names)

    @property
    def q_cls(self) -> str:
        """The question of the classification path."""
        return q_cls(self.class_names, self.subject)

    @property
    def q_reason(self) -> str:
        """The question of the reasoning path."""
        return q_reason(self.class_names, self.subject)

    @property
    def chain_settings(self) -> tuple[int, int, int, float, bool]:
        """How the job answers by chains: max new tokens, batch size, votes, temperature, exact matching."""
        hparams = self.hparams
        voting = hparams["votes"], hparams["vote_temperature"]
        return hparams["max_new_tokens"], hparams["eval_batch"], *voting, self.exact_answers

    @property
    def exact_answers(self) -> bool:
        """Whether the job reads conclusions exactly, see `reader.read_conclusion`."""
        return bool(self.hparams["answer_matching"] == "exact")

    def lora(self) -> LoraSettings | None:
        """Return the settings of the trained adapters; None without any."""
        if not self.adapters:
            return None
        settings = LoraSettings.of(self.hparams)
        averages = self.hparams.get("average_adapters") is True
        if not averages or (count := summed_adapters(self.adapters, settings.rank)) == 1:
            return settings
        grown = math.sqrt(count) if settings.variant == "rslora" else count  # alpha / rank, or / √rank, stays
        return dataclasses.replace(settings, rank=count * settings.rank, alpha=grown * settings.alpha)

    def revision(self, model: str | None = None) -> str | None:
        """Return the revision of the hub's repository that is read: the job's, unless ``model`` replaces its own."""
        revision: str | None = self.hparams["revision"] if (model or self.model) == self.hparams["model"] else None
        return revision

    def load(self, model: str | None = None, dtype: str | None = None, quantize: str | None = None) -> MLLM:
        """Load the model with its trained adapters, in evaluation mode.

        Args:
            model: base model, if the job's path no longer exists.
            dtype: default: the job's.
            quantize: default: the job's.

        Raises:
            ModelError: if the base model cannot be used.
            ValueError: if the adapters do not fit it.
            JobError: if the model's files cannot be loaded, or ``model`` would replace a merged model.
        """
        if model and self.model == str(self.folder):
            raise JobError(f"{self.folder} contains the whole trained model: {model} would replace it. Omit --model.")
        try:
            mllm = load_mllm(
                model or self.model,
                lora=self.lora(),
                adapters=self.adapters or None,
                dtype=dtype or self.hparams["dtype"],
                quantize=quantize or self.hparams["quantize"],
                max_tiles=self.hparams["max_tiles"],
                tiling=self.hparams["tiling"],
                revision=self.revision(model),
                trust_remote_code=self.trust_remote_code,
            )
        except ValueError:
            raise
        except Exception as error:  # on untrusted files the libraries may raise anything
            raise JobError(
                f"{model or self.model}: the model cannot be loaded ({type(error).__name__}: {str(error):.300}). Pass "
                "another with --model, or download it again."
            ) from error
        return mllm.eval()


def read_job(folder: str | pathlib.Path, checkpoint: str = "model.pkl", trust_remote_code: bool = False) -> TrainedJob:
    """Return the trained model in ``folder``: a job of DomainBed's train or sweep, or an export of one.

    Args:
        folder: of the job.
        checkpoint: DomainBed's file in it, such as ``model_step19.pkl`` after ``--save_model_every_checkpoint``.
        trust_remote_code: whether Python files that come with the base model run, whatever the job's own hparam says.

    Raises:
        JobError: if it is neither, or the job has not saved its model.
    """
    path = pathlib.Path(folder).expanduser()
    task = read_task(path)
    if task["prompt_version"] != PROMPT_VERSION:
        raise JobError(
            f"{path}: the model was trained with prompt version {task['prompt_version']!r:.20}; this version has "
            f"{PROMPT_VERSION!r}. Use domainbed-reasoning {task.get('version', 'of that time')!s:.20}."
        )
    hparams, model = task["hparams"], task["hparams"]["model"]
    if (path / PEFT_WEIGHTS).is_file():
        adapters = _peft_adapters(path / PEFT_WEIGHTS)
    elif (path / "config.json").is_file():
        adapters, model, hparams = {}, str(path), {**hparams, "quantize": "none"}
    else:
        adapters = _checkpoint(path / checkpoint)
    _check_adapters(path, adapters, hparams)
    return TrainedJob(
        folder=path,
        algorithm=task["algorithm"],
        dataset=task["dataset"],
        subject=task["subject"],
        class_names=tuple(task["class_names"]),
        environments=tuple(task["environments"]),
        test_envs=tuple(task["test_envs"]),
        hparams=hparams,
        adapters=adapters,
        model=model,
        trust_remote_code=trust_remote_code,
        offered=tuple(map(tuple, task.get("offered", ()))),
    )


def read_task(path: pathlib.Path) -> dict[str, Any]:
    """Return the content of a folder's task.json, validated and upgraded to the current version of its format.

    Raises:
        JobError: if the file is missing or damaged, or a newer version of this package wrote it.
    """
    file = path / TASK_FILE
    try:
        task: dict[str, Any] = parse_json(read_plain_text(file))
    except FileNotFoundError as error:
        raise JobError(
            f"{path} contains no {TASK_FILE}, so it is not a job of an MLLM algorithm. Pass an output folder of "
            "DomainBed's train or sweep (with results.jsonl and model.pkl), or of `domainbed-reasoning export`."
        ) from error
    except NotADirectoryError as error:
        raise JobError(f"{path} is a file. Pass the job's folder.") from error
    except (ValueError, OSError) as error:
        raise JobError(f"{file} is damaged ({_reason(error):.200}). Rerun the job.") from error
    if isinstance(task, dict):
        task = {format_version.KEY: 1, **task}
        if newer := format_version.newer_than(TASK_VERSION, task[format_version.KEY]):
            raise JobError(f"{file}: {newer}. {format_version.UPGRADE}.")
    problem = _problem(task, _TASK)
    if not problem and "model" not in task["hparams"]:
        raise JobError(f"{path}: {task['algorithm']:.80} trains no multimodal LLM. Pass a job of an MLLM algorithm.")
    if not problem and task[format_version.KEY] == 1:
        task |= {format_version.KEY: TASK_VERSION, "hparams": {**_VERSION_1, **task["hparams"]}}
    if not problem:
        task |= {"hparams": {**_SQUARE, **task["hparams"]}}
        problem = _offered_problem(task)
    problem = problem or _problem(task["hparams"], _HPARAMS) or check_class_names(task["class_names"])
    if problem:
        raise JobError(f"{file} is damaged ({problem}). Restore the original file, or rerun the job.")
    return task


def _text(value: Any) -> bool:
    """Return whether a value is text on one line; folder names may contain joiners and hard blanks."""
    if not isinstance(value, str) or not 0 < len(value) < 4096:
        return False
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _offered_problem(task: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the classes that each environment offered, which are recorded if some offered fewer."""
    offered = task.get("offered", [])
    if not isinstance(offered, list) or not all(map(_texts, offered)):
        return f"'offered' cannot be {offered!r:.80}"
    if offered and len(offered) != len(task["environments"]):
        return f"'offered' is of {len(offered)} environments, not {len(task['environments'])}"
    unknown = sorted({name for names in offered for name in names} - set(task["class_names"]))
    return f"'offered' contains {unknown[0]!r:.80}, which is not a class" if unknown else None


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


# Valid values of a task and of its hyper-parameters: name → test.
_TASK: dict[str, Callable[[Any], bool]] = {
    format_version.KEY: _whole(1, TASK_VERSION),
    "algorithm": _text,
    "dataset": _text,
    "subject": _text,
    "class_names": lambda value: _texts(value) and bool(value),
    "environments": _texts,
    "test_envs": lambda value: isinstance(value, list) and all(map(_whole(0, 1 << 20), value)),
    "prompt_version": _text,
    "hparams": lambda value: isinstance(value, dict),
}
_HPARAMS: dict[str, Callable[[Any], bool]] = {
    "model": _text,
    "revision": REVISION.holds,
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "quantize": _one_of("none", "nf4", "int8"),
    "max_tiles": _whole(1, 1 << 20),
    "tiling": _one_of("square", "dynamic"),
    "answer": _one_of("chain", "label"),
    "eval_batch": _whole(1, 1 << 20),
    "max_new_tokens": _whole(1, 1 << 20),
    "votes": _whole(1, 1 << 20),
    "vote_temperature": _number(0, 1 << 20),
    "answer_matching": _one_of("tolerant", "exact"),
}
_LORA: dict[str, Callable[[Any], bool]] = {
    "lora_rank": _whole(1, 1 << 16),
    "lora_alpha": _number(0, 1 << 20),
    "lora_dropout": _number(0, 1),
    "lora_targets": _one_of("both", "vision", "language"),
    "lora_projector": lambda value: isinstance(value, bool),
    "lora_variant": _one_of("lora", "rslora", "dora"),
    "lora_target_modules": lambda value: value is None or (_texts(value) and bool(value)),
}


def _problem(values: Any, tests: Mapping[str, Callable[[Any], bool]]) -> str | None:
    if not isinstance(values, dict):
        return f"expected a JSON object, got {type(values).__name__}"
    for name, is_valid in tests.items():
        if name not in values:
            return f"{name!r} is missing"
        if not is_valid(values[name]):
            return f"{name!r} cannot be {values[name]!r:.80}"
    return None


def _check_adapters(path: pathlib.Path, adapters: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
    """Reject invalid adapters before a model of the size that they claim is built."""
    if not adapters:
        return
    problem = _problem(hparams, _LORA)
    if problem:
        raise JobError(f"{path / TASK_FILE} is damaged ({problem}). Restore the original file.")
    rank, count = hparams["lora_rank"], 1
    if hparams.get("average_adapters") is True:
        count = summed_adapters(adapters, rank)
    for name, tensor in adapters.items():
        is_magnitude = isinstance(name, str) and ".lora_magnitude_vector." in name
        dimensions = (1, 4) if is_magnitude and hparams["lora_variant"] == "dora" else (2, 4)  # 4: of convolutions
        is_matrix = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() in dimensions
        if not isinstance(name, str) or not is_matrix:
            raise JobError(f"{path}: the adapter {str(name)!r:.200} is not a floating-point matrix. Rerun the job.")
        if not is_magnitude and (found := tensor.shape[0 if ".lora_A." in name else 1]) != count * rank:
            raise JobError(
                f"{path}: the adapter {name!r:.200} has rank {found}, but {TASK_FILE} has lora_rank {rank}. Use both "
                "files of one job."
            )
        if not torch.isfinite(tensor).all():
            raise JobError(f"{path}: the adapter {name!r:.200} contains NaN or infinity: training diverged.")


def summed_adapters(adapters: Mapping[str, Any], rank: int) -> int:
    """Return how many adapters of a rank are summed in one, as in the average of `method.average`; 1 for another."""
    ranks = {tensor.shape[0] for name, tensor in adapters.items() if ".lora_A." in str(name) and tensor.dim() == 2}
    largest = max(ranks, default=rank)
    return largest // rank if len(ranks) == 1 and largest % rank == 0 else 1


def _checkpoint(file: pathlib.Path) -> dict[str, Any]:
    """Return the trained tensors of one of DomainBed's checkpoints."""
    if not file.exists():
        others = sorted(path.name for path in file.parent.glob("model*.pkl"))
        why = (
            f"it has {', '.join(others)}; train with --save_model_every_checkpoint to save one per evaluation"
            if others
            else "the job has not reached its first checkpoint, or ran with --skip_model_save"
        )
        raise JobError(f"{file.parent} contains no {file.name}: {why}.")
    try:
        checkpoint = load_tensors(file)
    except (ValueError, OSError) as error:
        raise JobError(
            f"{file} cannot be read ({_reason(error)}): it is truncated, for example by a job that was killed while "
            "saving, or not a checkpoint of DomainBed. Rerun the job."
        ) from error
    tensors = checkpoint.get("model_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict):
        raise JobError(f"{file} contains no 'model_dict', so it is not a checkpoint of DomainBed. Rerun the job.")
    return tensors


def _reason(error: Exception) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return reason.splitlines()[0][:300]


def _peft_adapters(file: pathlib.Path) -> dict[str, torch.Tensor]:
    """Return PEFT's saved tensors by their names in the model, which include the adapter's name."""
    try:
        tensors = peft_tensors(file)
    except ModelError as error:
        raise JobError(f"{error}. Export the job again.") from error
    if problem := version_problem(file):
        raise JobError(problem)
    return tensors
