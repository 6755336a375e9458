"""`domainbed-reasoning plan`: memory and hours of a job and of a sweep, before it starts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from domainbed_reasoning import registry
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.hparam_checks import check_values
from domainbed_reasoning.images import catalog
from domainbed_reasoning.images import user_datasets as custom
from domainbed_reasoning.results import published

if TYPE_CHECKING:
    from domainbed_reasoning.sweeps.costs import Hours, Memory

GIB = 2**30

_EXAMPLES = """examples:
  domainbed-reasoning plan --dataset OfficeHome --model OpenGVLab/InternVL3-8B-hf --gpu H200
  domainbed-reasoning plan --dataset PACS --gpu RTX4090 --hparams '{"quantize": "nf4", "sarr_rounds": 1}'
  domainbed-reasoning plan --dataset TerraIncognita --gpu A100-80 --gpus 4 --n_hparams 1 --n_trials 3

Operations and bytes are counted from the model's config; what a GPU reaches of its peak is assumed.
"""

# What may be changed to make a job affordable, and what it gives up.
_CHEAPER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"answer": "label"}, "answers by the class names' likelihood, not by chains"),
    ({"gradient_checkpointing": False}, "the activations fit"),
    ({"first_evaluation": 2}, "no answers after the first update, when the model is as it came"),
    ({"max_new_tokens": 300}, "chains longer than that name no class"),
    ({"sarr_rounds": 1}, "one round in place of three: 70.06 against 70.65 in the paper's TerraIncognita"),
    ({"both_answers": False}, "the other answer is not recorded at the end"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning plan",
        description="Memory, hours a job and hours of a sweep, from a cost model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="PACS or PACSReasoning, …, or one of your own")
    parser.add_argument("--data_dir", "--data-dir", help="count the images there, as for a dataset of your own")
    parser.add_argument("--algorithm", default="RDMLDG", help="default: %(default)s")
    parser.add_argument("--model", help="folder or hub id (default: the algorithm's)")
    parser.add_argument("--gpu", default="H200", help="default: %(default)s")
    parser.add_argument("--gpus", type=int, default=1, help="that work on the sweep side by side (default: 1)")
    parser.add_argument("--hparams", default="{}", help="JSON, as for DomainBed")
    parser.add_argument("--steps", type=int, help="DomainBed's --steps")
    parser.add_argument("--n_hparams", type=int, default=20, help="of the sweep (DomainBed's default: 20)")
    parser.add_argument("--n_trials", type=int, default=3, help="of the sweep (DomainBed's default: 3)")
    parser.add_argument("--chain_tokens", type=int, default=250, help="mean length of a chain (the paper's: about 250)")
    given = parser.parse_args(argv)
    try:
        print(plan(given))
    except (ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def plan(given: argparse.Namespace) -> str:
    """Return the plan as text.

    Raises:
        ValueError: for a name that is not known, or a dataset whose images are not counted.
        FileNotFoundError: the dataset is not in the folder that was given.
        ImportError: without DomainBed, whose subclasses hold the hyper-parameters.
    """
    from domainbed_reasoning.mllm.loading import said_of_experts
    from domainbed_reasoning.sweeps import costs

    dataset, data = _dataset(given.dataset, given.data_dir)
    algorithm = _algorithm(given.algorithm)
    hparams = _hparams(algorithm, given)
    gpu = published.find_gpu(given.gpu)
    shape = costs.shape_of(hparams["model"], hparams["max_tiles"])
    lengths = costs.lengths_for(data.classes, given.chain_tokens)

    def hours(changed: dict[str, Any], evaluations: int | None = None) -> Hours:
        now = {**hparams, **changed}
        schedule = schedule_of(algorithm, now, data, given.steps)
        paths = (algorithm.LABEL_PATH, algorithm.CHAIN_PATH)
        return costs.hours_of(shape, lengths, data, gpu, now, schedule, paths, evaluations)

    def needed(changed: dict[str, Any]) -> float:
        return _without_copy(costs.memory_of(shape, lengths, {**hparams, **changed}))

    memory = costs.memory_of(shape, lengths, hparams)
    schedule = schedule_of(algorithm, hparams, data, given.steps)
    experts = said_of_experts(shape.fused, shape.weights)
    too_large = _without_copy(memory) > gpu.gib
    cures = _cures(needed, gpu.gib, hparams) if too_large else {}
    head = [
        f"{given.algorithm} on {dataset} ({data.images:,} images, {data.domains} domains, {data.classes} classes)",
        f"with {hparams['model']} ({shape.weights / 1e9:.2f} billion weights) on {given.gpus} x {given.gpu}",
        "",
        *_memory_lines(memory, gpu.gib, hparams),
    ]
    if cures is None:
        return "\n".join([*head, "  TOO LARGE for this GPU, whatever the hyper-parameters: take a smaller model."])
    if cures:
        head.append(f"  TOO LARGE for this GPU. It fits with --hparams '{json.dumps(cures)}'")
        head += ["", "with these hyper-parameters"]
        hparams = {**hparams, **cures}
    job = hours({})
    domains = data.domains
    pairs = math.comb(domains, 2)
    sweep = given.n_trials * given.n_hparams
    lines = [
        *head,
        "",
        *([f"experts     {experts} The hours below leave them out.", ""] if experts else []),
        *([f"stages      {shortfall}", ""] if (shortfall := schedule.shortfall()) else []),
        f"a job       {_time(job.total)}",
        f"  training    {_time(job.training)}",
        f"  labelling   {_time(job.labelling)}   SARR's own chains, where the evaluation before has not written them",
        f"  evaluation  {_time(job.evaluation)}   DomainBed answers every image of every split {job.evaluations} times",
        "",
        f"a table     {_time(job.total * domains / given.gpus)}   {domains} jobs: each domain once the target",
        f"a sweep     {_time(job.total * domains * sweep / given.gpus)}   --single_test_envs: {domains * sweep} jobs, "
        f"{given.n_trials} trials x {given.n_hparams} hparams x {domains} targets",
        f"            {_time(job.total * (domains + pairs) * sweep / given.gpus)}   with pairs of targets as well: "
        f"{(domains + pairs) * sweep} jobs",
        "",
        "cheaper",
    ]
    options = [
        (change, said)
        for change, said in _CHEAPER
        if _applies(change, hparams) and needed(change) <= max(gpu.gib, needed({}))
    ]
    for change, said in options:
        lines.append(f"  {_time(hours(change).total)}   --hparams '{json.dumps(cures | change)}'   {said}")
    together = {name: value for change, _ in options for name, value in change.items() if "answer" not in name}
    if together:
        lines.append(f"  {_time(hours(together).total)}   --hparams '{json.dumps(cures | together)}'   together")
    if job.evaluations > 2:
        said = "evaluate at the start and the end alone: nothing is left to select a step from"
        lines.append(f"  {_time(hours({}, 2).total)}   --checkpoint_freq 1000000   {said}")
    lines.append("  a sweep with --n_hparams 1: the paper's settings are fixed, selection then chooses the step alone")
    lines += ["", f"error       {costs.ERROR}", "assumed     " + _assumptions(costs.ASSUMED)]
    return "\n".join(lines)


def _dataset(name: str, data_dir: str | None) -> tuple[str, published.Data]:
    """Return a dataset's name without ``Reasoning``, and its counts: on disk or, without a folder, as published."""
    plain = registry.TWINS.get(name, name)
    if plain in published.DATA and not data_dir:
        return plain, published.DATA[plain]
    dataset = custom.find(name)
    if not data_dir:
        raise ValueError(
            f"{dataset.name}: nobody has published how many images it has. Give --data_dir, the folder that holds "
            f"{dataset.folder}/, where they are counted."
        )
    on_disk = catalog.scan(dataset, data_dir)
    return dataset.name, published.Data(len(on_disk.pictures), len(on_disk.domains), len(on_disk.classes))


def _algorithm(name: str) -> Any:
    if name not in registry.ALGORITHMS:
        raise registry.unknown("algorithm", name, registry.ALGORITHMS)
    try:
        algorithm = registry.load(registry.ALGORITHMS[name])
    except ModuleNotFoundError as error:
        if error.name == "domainbed":
            raise ImportError(upstream.MISSING) from error
        raise ImportError(f"{error}: `domainbed-reasoning doctor` says what is missing.") from error
    if "model" not in algorithm.HPARAMS:
        raise ValueError(f"{name} is no MLLM algorithm, whose cost is what this counts; CLIP's towers fit any GPU.")
    return algorithm


def _hparams(algorithm: Any, given: argparse.Namespace) -> dict[str, Any]:
    try:
        changed = json.loads(given.hparams)
    except json.JSONDecodeError as error:
        raise ValueError(f'--hparams is no JSON ({error}): write \'{{"quantize": "nf4"}}\'.') from error
    hparams = {name: hparam.default for name, hparam in algorithm.HPARAMS.items()}
    for name in changed:
        if name not in hparams:
            raise registry.unknown(f"hparam of {given.algorithm}", name, hparams)
    hparams |= {**changed, **({"model": given.model} if given.model else {})}
    check_values(hparams, algorithm.HPARAMS)
    return hparams


def schedule_of(algorithm: Any, hparams: dict[str, Any], data: Any, steps: int | None) -> Any:
    """Lay the stages out as the dataset will: an epoch draws as many samples as the training splits hold."""
    from domainbed_reasoning.method.schedule import plan_stages

    sources = data.domains - 1
    training = 0.8 * data.images * sources / data.domains
    return plan_stages(algorithm.stage_epochs(hparams), math.ceil(training / (hparams["batch_size"] * sources)), steps)


def _memory_lines(memory: Memory, gib: float, hparams: dict[str, Any]) -> list[str]:
    parts = {
        "weights": memory.weights,
        "adapters, gradients, AdamW": memory.adapters,
        f"activations of {hparams.get('micro_batch', 0)} samples": memory.activations,
        f"keys and values of {hparams['eval_batch']} answers": memory.generation,
    }
    bare, whole = _without_copy(memory), memory.peak / GIB
    peak = whole if whole <= gib else bare
    lines = [f"memory      {peak:.1f} GiB of {gib:g} GiB at the peak, 10% for fragments included"]
    lines += [f"  {size / GIB:7.1f} GiB  {name}" for name, size in parts.items() if size]
    if memory.copy:
        fits = "fits" if whole <= gib else "does not fit: adapters then stay apart, which is slower"
        lines.append(f"  {memory.copy / GIB:7.1f} GiB  merged copy that writes chains and answers: {fits}")
    return lines


def _cures(needed: Callable[[dict[str, Any]], float], gib: float, hparams: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first changes that fit, those that cost least time first; None where none do."""
    changes: dict[str, Any] = {}
    for name, value in (("micro_batch", 1), ("eval_batch", 16), ("gradient_checkpointing", True), ("quantize", "nf4")):
        if name in hparams and hparams[name] != value:
            changes[name] = value
            if needed(changes) <= gib:
                return changes
    return None


def _without_copy(memory: Memory) -> float:
    """Return the GiB that cannot be done without."""
    return (memory.peak - 1.1 * memory.copy) / GIB


def _applies(change: dict[str, Any], hparams: dict[str, Any]) -> bool:
    return all(name in hparams and hparams[name] != value for name, value in change.items())


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:7.1f} days "
    return f"{hours:7.1f} hours" if hours >= 0.1 else f"{hours * 60:7.1f} min  "


def _assumptions(assumed: Any) -> str:
    return "\n            ".join(f"{name} {value.value:.3g}: {value.source}" for name, value in assumed.items())
