"""`domainbed-reasoning plan`: estimated memory and hours of a job and of a sweep."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from domainbed_reasoning import registry
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.bridge.hparam_names import check_names
from domainbed_reasoning.commands.arguments import Parser, add_json, json_object, positive, print_json
from domainbed_reasoning.hparam_checks import check_values
from domainbed_reasoning.images import catalog
from domainbed_reasoning.images import user_datasets as custom
from domainbed_reasoning.results import published

if TYPE_CHECKING:
    from domainbed_reasoning.sweeps.costs import MemoryEstimate
    from domainbed_reasoning.sweeps.hours import Hours
    from domainbed_reasoning.sweeps.rates import Rate

GIB = 2**30

EXAMPLES = """\
  domainbed-reasoning plan --dataset OfficeHome --model OpenGVLab/InternVL3-8B-hf --gpu H200
  domainbed-reasoning plan --dataset PACS --gpu RTX4090 --hparams '{"quantize": "nf4", "sarr_rounds": 1}'
  domainbed-reasoning plan --dataset TerraIncognita --gpu A100-80 --gpus 4 --n-hparams 1 --n-trials 3

Operations and memory are computed from the model's config; the achieved share of the GPU's peak is assumed, and hours
are marked "counted", unless `python -m benchmarks.gpu --output FILE`, in a checkout, has measured it on that GPU:
--rates FILE.
"""

# Changes that make a job cheaper, and their drawbacks.
_CHEAPER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"answer": "label"}, "answers by class-name likelihood instead of chains"),
    ({"gradient_checkpointing": False}, "activations fit in memory"),
    ({"first_evaluation": 2}, "skips the evaluation after the first update"),
    ({"max_new_tokens": 300}, "longer chains are cut off and name no class"),
    ({"sarr_rounds": 1}, "one round instead of three: 70.06 instead of 70.65 on TerraIncognita in the paper"),
    ({"both_answers": False}, "does not record the other answer at the end"),
)
_AT_MOST = "at most: if the rounds keep every chain, a share known only in training"
_MICRO_BATCHES = (8, 12, 16, 24, 32, 48, 64)  # of which the largest that fits is offered


def add_arguments(parser: Parser) -> None:
    """Add the job, the GPUs and the size of the sweep."""
    parser.add_argument("--dataset", required=True, help="PACS or PACSReasoning, …, or your own")
    parser.add_argument("--data-dir", help="count the images in this folder; required for your own dataset")
    parser.add_argument("--algorithm", default="RDMLDG", help="default: %(default)s")
    parser.add_argument("--model", help="folder or hub id (default: the algorithm's)")
    parser.add_argument("--gpu", default="H200", help="default: %(default)s")
    parser.add_argument("--gpus", type=positive(int), default=1, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--hparams", type=json_object, default="{}", help="JSON, as for DomainBed")
    parser.add_argument("--steps", type=positive(int), help="DomainBed's --steps")
    parser.add_argument("--n-hparams", type=positive(int), default=20, help="of the sweep (default: 20, as DomainBed)")
    parser.add_argument("--n-trials", type=positive(int), default=3, help="of the sweep (default: 3, as DomainBed)")
    parser.add_argument(
        "--rates", help="measured on this GPU: a result file of `python -m benchmarks.gpu` (in a checkout)"
    )
    add_json(parser)
    parser.add_argument("--chain-tokens", type=positive(int), default=250, help="mean chain length (default: 250)")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    text, numbers = plan_and_numbers(args)
    if args.json:
        print_json(numbers)
    else:
        print(text)
    return 0


def plan(args: argparse.Namespace) -> str:
    """Return the plan as text, see `plan_and_numbers`."""
    return plan_and_numbers(args)[0]


def plan_and_numbers(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the plan as text, and its numbers (GiB and hours) for --json.

    Raises:
        ValueError: unknown name, or no --data-dir for a dataset without published counts.
        FileNotFoundError: the dataset's folder does not exist.
        ImportError: DomainBed, which the algorithms subclass, is not found.
    """
    from domainbed_reasoning.mllm.adapters import experts_note
    from domainbed_reasoning.mllm.decoding import FEWEST
    from domainbed_reasoning.sweeps import costs
    from domainbed_reasoning.sweeps import rates as gpu_rates
    from domainbed_reasoning.sweeps.hours import hours_of

    dataset, data, sizes = _dataset(args.dataset, args.data_dir)
    algorithm = _algorithm(args.algorithm)
    own = {**args.hparams, **({"model": args.model} if args.model else {})}
    hparams = _hparams(algorithm, args, own)
    gpu = published.find_gpu(args.gpu)
    rates = gpu_rates.rates_for(args.gpu, args.rates)
    asked = ("model", "max_tiles", "revision", "trust_remote_code", "tiling")
    shape = costs.shape_of(*(hparams[name] for name in asked))
    lengths = costs.lengths_for(data.classes, args.chain_tokens)

    def fitting(changes: dict[str, Any]) -> dict[str, Any]:
        """Return hparams with as many answers at a time as fit, as in jobs; see `decoding.slots_that_fit`."""
        values = {**hparams, **changes}
        while values["eval_batch"] > FEWEST and _while_generating(costs.memory_of(shape, lengths, values)) > gpu.gib:
            values["eval_batch"] //= 2
        return values

    def hours(changes: dict[str, Any], evaluations: int | None = None) -> Hours:
        values = fitting(changes)
        schedule = schedule_of(algorithm, values, data, args.steps)
        paths = (algorithm.LABEL_PATH, algorithm.CHAIN_PATH)
        return hours_of(shape, lengths, data, gpu, values, schedule, paths, evaluations, rates)

    def needed(changes: dict[str, Any]) -> float:
        return _without_copy(costs.memory_of(shape, lengths, fitting(changes)))

    def fits(changes: dict[str, Any]) -> bool:
        """Return whether the changes leave room for all that fits without them, a merged copy included."""
        whole, others = (costs.memory_of(shape, lengths, fitting(each)).peak / GIB for each in ({}, changes))
        return others <= gpu.gib if whole <= gpu.gib else needed(changes) <= gpu.gib

    planned = fitting({})
    memory = costs.memory_of(shape, lengths, planned)
    schedule = schedule_of(algorithm, hparams, data, args.steps)
    experts = experts_note(shape.fused, shape.weights)
    too_large = _without_copy(memory) > gpu.gib
    fixes = _fixes(needed, gpu.gib, hparams) if too_large else {}
    head = [
        f"{args.algorithm} on {dataset} ({data.images:,} images, {data.domains} domains, {data.classes} classes)",
        f"with {hparams['model']} ({shape.weights / 1e9:.2f} billion weights) on {args.gpus} x {args.gpu}",
        "",
        *_memory_lines(memory, gpu.gib, planned),
    ]
    numbers: dict[str, Any] = {
        **{"algorithm": args.algorithm, "dataset": dataset, "images": data.images, "domains": data.domains},
        **{"classes": data.classes, "weights": shape.weights, "gpu": args.gpu, "gpus": args.gpus},
        "memory_gib": {name: size / GIB for name, size in vars(memory).items()} | {"gpu": gpu.gib},
        "fits": not too_large,
        "fixes": fixes,
        "hparams": planned,
        "rates": {name: vars(rate) for name, rate in rates.items()},
    }
    if fixes is None:
        text = "\n".join([*head, "  TOO LARGE for this GPU with any hyper-parameters: use a smaller model."])
        return text, numbers
    if fixes:
        own |= fixes
        head.append(f"  TOO LARGE for this GPU. Fits with --hparams '{json.dumps(own)}'")
        head += ["", "with these hyper-parameters"]
        hparams = {**hparams, **fixes}
        numbers["hparams"] = fitting({})
    job = hours({})
    domains = data.domains
    pairs = math.comb(domains, 2)
    sweep = args.n_trials * args.n_hparams
    lines = [
        *head,
        "",
        *([f"experts     {experts} The hours below do not include them.", ""] if experts else []),
        *([f"stages      {shortfall}", ""] if (shortfall := schedule.shortfall()) else []),
        *_epoch_lines(sizes, hparams, algorithm.stages(hparams), args.steps),
        f"a job       {_time(job.total)}   {_basis(rates, hparams)}",
        f"  training    {_time(job.training)}{'   ' + _AT_MOST if _skips_steps(hparams) else ''}",
        f"  labeling    {_time(job.labeling)}   chains for SARR that the previous evaluation has not generated",
        f"  evaluation  {_time(job.evaluation)}   DomainBed evaluates all splits {job.evaluations} times",
        "",
        f"a table     {_time(job.total * domains / args.gpus)}   {domains} jobs, one per target domain",
        f"a sweep     {_time(job.total * domains * sweep / args.gpus)}   --single_test_envs: {domains * sweep} jobs, "
        f"{args.n_trials} trials x {args.n_hparams} hparams x {domains} targets",
        f"            {_time(job.total * (domains + pairs) * sweep / args.gpus)}   with pairs of targets: "
        f"{(domains + pairs) * sweep} jobs; pass --steps, see `study random_search`",
        "",
        "cheaper",
    ]
    options = [
        (change, drawback)
        for change, drawback in (*_larger_passes(hparams, fits), *_CHEAPER)
        if _applies(change, hparams)
        and needed(change) <= max(gpu.gib, needed({}))
        and hours(change).total < 0.99 * job.total
    ]
    for change, drawback in options:
        lines.append(f"  {_time(hours(change).total)}   --hparams '{json.dumps(own | change)}'   {drawback}")
    together = {name: value for change, _ in options for name, value in change.items() if "answer" not in name}
    if together:
        lines.append(f"  {_time(hours(together).total)}   --hparams '{json.dumps(own | together)}'   together")
    if job.evaluations > 2:
        drawback = "evaluates only at the start and the end, without model selection over steps"
        lines.append(f"  {_time(hours({}, 2).total)}   --checkpoint_freq 1000000   {drawback}")
    lines.append("  a sweep with --n_hparams 1: hyper-parameters fixed as in the paper, selection over steps only")
    lines += ["", f"error       {gpu_rates.ERROR_MEASURED if _is_measured(rates, hparams) else gpu_rates.ERROR}"]
    for label, measured in (("measured", True), ("assumed", False)):
        if found := {name: rate for name, rate in rates.items() if rate.measured is measured}:
            lines.append(f"{label:<12}" + _assumptions(found))
    numbers["basis"] = "measured" if _is_measured(rates, hparams) else "counted"
    numbers["hours"] = {
        **vars(job),
        "job": job.total,
        "table": job.total * domains / args.gpus,
        "sweep": job.total * domains * sweep / args.gpus,
        "sweep_with_pairs": job.total * (domains + pairs) * sweep / args.gpus,
    }
    numbers["jobs"] = {"table": domains, "sweep": domains * sweep, "sweep_with_pairs": (domains + pairs) * sweep}
    numbers["cheaper"] = [
        {"hparams": own | change, "hours": hours(change).total, "drawback": drawback} for change, drawback in options
    ]
    return "\n".join(lines), numbers


def _dataset(name: str, data_dir: str | None) -> tuple[str, published.Data, dict[str, int]]:
    """Return a dataset's name without ``Reasoning``, its counts and its domains' counts, from the folder or published.

    The domains' counts are empty if not published.
    """
    plain, halved = registry.TWINS.get(name, name), name.endswith(registry.BASE_TO_NEW)
    known = published.data_of(name)
    if known is not None and not data_dir:
        sizes = {} if halved else catalog.STOCK[plain].domains
        return name if halved else plain, known, {domain: size for domain, size in sizes.items() if size is not None}
    if name in registry.DATASETS and name not in {*registry.EMBEDDED_DATASETS, *registry.TWINS}:
        cls = registry.load(registry.DATASETS[name])
        if not hasattr(cls, "FOLDER"):  # a plug-in dataset that is not an image folder
            built = cls(data_dir, [], {"data_augmentation": False, "batch_size": 1})
            counts = dict(zip(built.ENVIRONMENTS, map(len, built.datasets), strict=True))
            return name, published.Data(sum(counts.values()), len(counts), built.num_classes), counts
    dataset = custom.find(name)
    if not data_dir:
        raise ValueError(
            f"{dataset.name} has no published image counts. Pass --data-dir, the folder that contains "
            f"{dataset.folder}/, to count them."
        )
    on_disk = catalog.scan(dataset, data_dir)
    data = published.Data(len(on_disk.pictures), len(on_disk.domains), len(on_disk.classes))
    if halved:
        data = published.by_classes(data)
        base = sum(label < data.classes for label in on_disk.labels().values())
        return name, data, {"base": base, "new": data.images - base}
    return dataset.name, data, dict(on_disk.per_domain())


def _algorithm(name: str) -> Any:
    if name not in registry.ALGORITHMS:
        raise registry.unknown("algorithm", name, registry.ALGORITHMS)
    try:
        algorithm = registry.load(registry.ALGORITHMS[name])
    except ModuleNotFoundError as error:
        if error.name == "domainbed":
            raise ImportError(upstream.MISSING) from error
        raise
    if "model" not in algorithm.HPARAMS:
        raise ValueError(f"{name} is not an MLLM algorithm. The cost model covers only those; CLIP fits on any GPU.")
    return algorithm


def _hparams(algorithm: Any, args: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, Any]:
    hparams = {name: hparam.default for name, hparam in algorithm.HPARAMS.items()}
    check_names(args.hparams, args.algorithm)  # the dataset's are known too
    hparams |= own
    check_values(hparams, algorithm.HPARAMS)
    return hparams


def _skips_steps(hparams: dict[str, Any]) -> bool:
    """Return whether the rounds take fewer updates than planned, a number known only in training."""
    return hparams.get("sarr_epoch_over") == "kept" and hparams.get("sarr_rounds", 0) > 0


def schedule_of(algorithm: Any, hparams: dict[str, Any], data: Any, steps: int | None) -> Any:
    """Return the stages of training; an epoch draws as many samples as the training splits contain."""
    from domainbed_reasoning.method.schedule import plan_stages

    sources = data.domains - 1
    training = 0.8 * data.images * sources / data.domains
    epoch = math.ceil(training / (hparams["batch_size"] * sources))
    return plan_stages(algorithm.stages(hparams), epoch, steps, every_epoch=bool(hparams.get("average_adapters")))


def _epoch_lines(sizes: dict[str, int], hparams: dict[str, Any], epochs: list[int], steps: int | None) -> Iterator[str]:
    """Yield the size of an epoch, and the average draws per image of each domain as a source, over all targets."""
    if not any(epochs) or len(sizes) < 2:
        return
    from domainbed_reasoning.method.schedule import Epoch, plan_stages

    passes: dict[str, list[float]] = {domain: [] for domain in sizes}
    missed: dict[str, list[float]] = {domain: [] for domain in sizes}
    for target in sizes:
        sources = {domain: size - int(size * 0.2) for domain, size in sizes.items() if domain != target}
        epoch = Epoch(sources, hparams["batch_size"])
        first = plan_stages(epochs, epoch.steps, steps).stages[0]
        for domain in sources:
            passes[domain].append(epoch.passes(domain, first.steps))
            missed[domain].append(epoch.missed(domain, first.steps))
    what, *batch = epoch.about()
    yield f"epoch       with target {target}, {what}"
    yield from (f"batch       {line}" for line in batch)
    length = f"--steps {steps}" if steps else f"{next(filter(None, epochs))} epochs"
    yield f"passes      in the first stage ({length}), over all targets; in parentheses the share of images never drawn"
    for domain, size in sizes.items():
        least, most = min(passes[domain]), max(passes[domain])
        low, high = min(missed[domain]), max(missed[domain])
        yield f"  {domain:<16}{size:>9,} images   {least:.1f} to {most:.1f} ({low:.0%} to {high:.0%})"
    yield ""


def _memory_lines(memory: MemoryEstimate, gib: float, hparams: dict[str, Any]) -> list[str]:
    parts = {
        "weights": memory.weights,
        "adapters, gradients, AdamW": memory.adapters,
        f"activations of {hparams.get('micro_batch', 0)} samples": memory.activations,
        f"keys and values of {hparams['eval_batch']} answers, and reading their prompts": memory.generation,
    }
    bare, whole = _without_copy(memory), memory.peak / GIB
    peak = whole if whole <= gib else bare
    lines = [f"memory      {peak:.1f} GiB of {gib:g} GiB at the peak, including 10% for fragmentation"]
    lines += [f"  {size / GIB:7.1f} GiB  {name}" for name, size in parts.items() if size]
    if memory.copy:
        fits = "fits" if whole <= gib else "does not fit: adapters stay unmerged, which is slower"
        lines.append(f"  {memory.copy / GIB:7.1f} GiB  merged copy for generating chains and answers: {fits}")
    return lines


def _fixes(needed: Callable[[dict[str, Any]], float], gib: float, hparams: dict[str, Any]) -> dict[str, Any] | None:
    """Return the changes, least costly first, after which the job fits, or None."""
    changes: dict[str, Any] = {}
    for name, value in (("micro_batch", 1), ("eval_batch", 16), ("gradient_checkpointing", True), ("quantize", "nf4")):
        if name in hparams and hparams[name] != value:
            changes[name] = value
            if needed(changes) <= gib:
                return changes
    return None


def _larger_passes(
    hparams: dict[str, Any], fits: Callable[[dict[str, Any]], bool]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the largest micro-batch that fits, if it is larger than the one that is set."""
    sizes = [size for size in _MICRO_BATCHES if size > hparams.get("micro_batch", size) and fits({"micro_batch": size})]
    if sizes:
        yield {"micro_batch": sizes[-1]}, "the same updates in fewer passes"


def _without_copy(memory: MemoryEstimate) -> float:
    """Return the peak in GiB without the optional merged copy."""
    return float(memory.peak - 1.1 * memory.copy) / GIB


def _while_generating(memory: MemoryEstimate) -> float:
    """Return the peak in GiB while chains are generated, without the optional merged copy."""
    return 1.1 * (memory.weights + memory.adapters + memory.generation) / GIB


def _applies(change: dict[str, Any], hparams: dict[str, Any]) -> bool:
    return all(name in hparams and hparams[name] != value for name, value in change.items())


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:7.1f} days "
    return f"{hours:7.1f} hours" if hours >= 0.1 else f"{hours * 60:7.1f} min  "


def _is_measured(rates: Mapping[str, Rate], hparams: dict[str, Any]) -> bool:
    """Return whether every rate that the hours of these hyper-parameters rest on was measured."""
    from domainbed_reasoning.sweeps.hours import has_graphs, labels_greedily

    used, quantized = ["training_mfu", "layer_overhead", "prefill_mfu", "bandwidth"], hparams["quantize"] != "none"
    for greedy in (hparams.get("votes", 1) == 1, labels_greedily(hparams)):  # of answers, of self-labels
        used.append("step_overhead" if has_graphs(quantized, greedy) else "launch_overhead")
    if quantized:
        used.append(f"{hparams['quantize']}_slowdown")
    if hparams.get("gradient_checkpointing"):
        used.append("checkpointing")
    return all(rates[name].measured for name in used)


def _basis(rates: Mapping[str, Rate], hparams: dict[str, Any]) -> str:
    return "from rates measured on this GPU" if _is_measured(rates, hparams) else "counted, not measured"


def _assumptions(assumed: Any) -> str:
    return "\n            ".join(f"{name} {value.value:.3g}: {value.source}" for name, value in assumed.items())
