"""Hours of a job, from the counts of `costs` and what a GPU achieves of its peak.

That is assumed, and the hours counted, until `benchmarks.gpu` has measured it on that GPU: see `rates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.method.schedule import Schedule
from domainbed_reasoning.results.published import Data, Gpu
from domainbed_reasoning.sweeps.costs import BYTES_PER_WEIGHT, Lengths, Shape, training_flops
from domainbed_reasoning.sweeps.rates import ASSUMED, Rate

STOCK_BATCH = 64  # batch size of DomainBed's evaluation, where chains are not generated ahead of it


@dataclass(frozen=True)
class Hours:
    """Hours of one job.

    Attributes:
        training: optimizer steps.
        labeling: generating SARR's chains that the previous evaluation has not generated.
        evaluation: DomainBed's evaluations of all splits.
        evaluations: number of evaluations.
    """

    training: float
    labeling: float
    evaluation: float
    evaluations: int

    @property
    def total(self) -> float:
        """Total hours."""
        return self.training + self.labeling + self.evaluation


def hours_of(
    shape: Shape,
    lengths: Lengths,
    data: Data,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    schedule: Schedule,
    paths: tuple[bool, bool],
    evaluations: int | None = None,
    rates: Mapping[str, Rate] = ASSUMED,
) -> Hours:
    """Return the hours of one leave-one-domain-out job, assuming domains of equal size.

    Args:
        shape: of the model.
        lengths: of the texts.
        data: the dataset.
        gpu: of the job.
        hparams: of the algorithm.
        schedule: its stages; the evaluations follow DomainBed's rule.
        paths: whether the objective has a label term, and a chain term.
        evaluations: number of evaluations, if ``--checkpoint_freq`` overrides the schedule.
        rates: what the GPU achieves.
    """
    sources = data.domains - 1
    peak = gpu.tflops * 1e12
    training = schedule.n_steps * _seconds_of_update(shape, lengths, peak, hparams, sources, paths, rates)
    a_chain = seconds_to_write(shape, lengths, gpu, hparams, rates, labels_greedily(hparams))
    batch = hparams["eval_batch"] if _looks_ahead(hparams) else min(STOCK_BATCH, hparams["eval_batch"])
    at_a_time, votes = {**hparams, "eval_batch": batch}, hparams.get("votes", 1)
    chain = seconds_to_write(shape, lengths, gpu, at_a_time, rates, votes == 1) * votes
    label = seconds_to_score(shape, lengths, data.classes, gpu, hparams, rates)
    rounds = sum(stage.round > 0 for stage in schedule.stages)
    if evaluations is None and _labels_are_answers(hparams):
        rounds = min(rounds, int(schedule.stages[0].round > 0))  # all later ones begin with an evaluation
    in_training = data.images * sources / data.domains * 0.8
    # Drawn with replacement: after e epochs, a share of 1 - exp(-e) has been drawn, and labeled once.
    met = in_training * (1 - math.exp(-hparams.get("sarr_epochs", 0)))
    first = min(hparams.get("first_evaluation", 0), schedule.n_steps)
    if evaluations is None:
        steps = {*range(0, schedule.n_steps, schedule.checkpoint_freq), schedule.n_steps - 1}
        evaluations = sum(step + 1 >= first for step in steps)
    elif first > 1:
        evaluations -= 1
    an_answer = chain if hparams["answer"] == "chain" else label
    evaluation = data.images * (evaluations * an_answer + (label + chain - an_answer) * hparams["both_answers"])
    labeling = rounds * met * a_chain * hparams.get("sarr_votes", 1)
    return Hours(training / 3600, labeling / 3600, evaluation / 3600, evaluations)


def _seconds_of_update(
    shape: Shape,
    lengths: Lengths,
    peak: float,
    hparams: Mapping[str, Any],
    sources: int,
    paths: tuple[bool, bool],
    rates: Mapping[str, Rate],
) -> float:
    """Return the seconds of an optimizer step: of its operations, or of launching its micro-batches if that is more."""
    if not any(paths):
        return 0.0
    samples = hparams["batch_size"] * sources
    computing = samples * training_flops(shape, lengths, *paths) / (peak * rates["training_mfu"].value)
    layers = shape.vision.layers + shape.language.layers
    launching = math.ceil(samples / hparams["micro_batch"]) * layers * rates["layer_overhead"].value
    seconds = float(max(computing, launching))
    if hparams["quantize"] != "none":
        seconds *= rates[f"{hparams['quantize']}_slowdown"].value
    return seconds * rates["checkpointing"].value if hparams["gradient_checkpointing"] else seconds


def _looks_ahead(hparams: Mapping[str, Any]) -> bool:
    """Return whether the chains of an evaluation are generated at its start, for all splits together."""
    return not hparams.get("data_augmentation", False) and hparams.get("votes", 1) == 1


def _labels_are_answers(hparams: Mapping[str, Any]) -> bool:
    """Return whether a round reuses the chains of the previous evaluation as its own."""
    return hparams["answer"] == "chain" and labels_greedily(hparams) and _looks_ahead(hparams)


def labels_greedily(hparams: Mapping[str, Any]) -> bool:
    """Return whether the chains of rounds are generated without sampling."""
    return bool(hparams.get("temperature", 0) == 0 and hparams.get("sarr_votes", 1) == 1)


def seconds_to_write(
    shape: Shape,
    lengths: Lengths,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    rates: Mapping[str, Rate] = ASSUMED,
    greedy: bool = True,
) -> float:
    """Return the seconds to generate one of many chains, prefill included, ``eval_batch`` at a time.

    Greedy chains are decoded in slots that are refilled (`mllm.decoding`), so that a step gives a token of each; the
    last chains of an evaluation, when slots run empty, are not counted. Sampled ones are decoded in batches until the
    longest ends, assumed to be 1.5 times the mean. A step reads all weights, and all keys and values.
    """
    batch, quantized = hparams["eval_batch"], hparams["quantize"] != "none"
    prompt = shape.tiles * shape.image_tokens + lengths.question + lengths.instruction
    steps = min((1.0 if greedy else 1.5) * lengths.chain, hparams["max_new_tokens"])
    least = rates["step_overhead" if has_graphs(quantized, greedy) else "launch_overhead"].value
    per_weight = BYTES_PER_WEIGHT[hparams["quantize"]]
    moved = bytes_of_a_token(shape, batch, prompt + steps / 2, per_weight)
    slow = 2.0 if quantized else 1.0  # unmerged adapters, dequantization
    a_step = slow * max(least, moved / (gpu.bandwidth * rates["bandwidth"].value))
    return float(_prefill(shape, prompt, gpu, rates) * slow + steps * a_step / batch)


def has_graphs(quantized: bool, greedy: bool) -> bool:
    """Return whether decoding steps are replayed as CUDA graphs, and not launched by Python."""
    return greedy and not quantized


def bytes_of_a_token(shape: Shape, batch: int, tokens: float, per_weight: float = 2.0) -> float:
    """Return the bytes that a decoding step reads: the weights, and the keys and values of ``tokens`` in each row."""
    return (shape.language.weights + shape.head) * per_weight + batch * tokens * shape.kv_bytes


def seconds_to_score(
    shape: Shape,
    lengths: Lengths,
    classes: int,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    rates: Mapping[str, Rate] = ASSUMED,
) -> float:
    """Return the seconds of scoring one image by every class name: the prompt, and the trie of names in one forward."""
    slow = 2.0 if hparams["quantize"] != "none" else 1.0
    tokens = shape.tiles * shape.image_tokens + lengths.question + lengths.name * classes
    return _prefill(shape, tokens, gpu, rates) * slow


def prefill_flops(shape: Shape, tokens: float) -> float:
    """Return the operations of reading one image and a row of ``tokens`` tokens."""
    return shape.tiles * shape.vision.forward(shape.patches) + shape.language.forward(tokens, causal=True)


def _prefill(shape: Shape, tokens: float, gpu: Gpu, rates: Mapping[str, Rate]) -> float:
    return prefill_flops(shape, tokens) / (gpu.tflops * 1e12 * rates["prefill_mfu"].value)
