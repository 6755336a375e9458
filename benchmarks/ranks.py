"""One job on several GPUs against one, counted: a rank's work, the bytes that ranks exchange, and the serial rest.

    python -m benchmarks.ranks              # RD-MLDG on PACS, InternVL3-8B, four H100: the last line is the ratio
    python -m benchmarks.ranks --ranks 8

Training: the micro-batches that `Objective.backward` gives the busiest rank, each at the roofline or the launch floor
of `benchmarks.roofline`, whichever is longer. Answers: `plan`'s cost model for a rank's share of the images; the slots
of a rank are refilled until its images are used up, and its longest chain then ends alone. All assumptions that are not
the cost model's are constants of this file. Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks import roofline
from domainbed_reasoning.algorithms.rd_mldg import RDMLDG
from domainbed_reasoning.commands.plan import schedule_of
from domainbed_reasoning.method.objective import micro_batches
from domainbed_reasoning.method.ranks import Ranks
from domainbed_reasoning.results.published import DATA
from domainbed_reasoning.sweeps import costs
from domainbed_reasoning.sweeps.hours import bytes_of_a_token, hours_of, prefill_flops, seconds_to_score
from domainbed_reasoning.sweeps.rates import ASSUMED

BAR = 3.2
DATASET, CHAIN, NAME = "PACS", 250, 3  # tokens of a chain and of a class name
NVLINK = 150e9  # bytes a second that an all-reduce moves per GPU: a third of an H100's link in one direction
GATHER = 2e-3  # seconds to gather a batch's answers on one node
LOADING = 0.91e-3  # seconds of one core to load an image: `make bench`, row "loading 112 images for evaluation"
START = 60.0  # seconds of imports, data and weights
BATCH = 64  # images of a call of `predict`


@dataclass(frozen=True)
class Seconds:
    """A job's seconds on its busiest rank.

    Attributes:
        training: forward and backward passes.
        chains: of all evaluations.
        scores: class scores of the last evaluation.
        exchange: gradients and answers.
        optimizer: steps, which every rank takes.
        loading: of images for DomainBed's evaluations, which every rank reads, and for chains.
        copies: of the weights, with merged adapters, before each evaluation.
        start: until the first update.
    """

    training: float
    chains: float
    scores: float
    exchange: float
    optimizer: float
    loading: float
    copies: float
    start: float

    @property
    def total(self) -> float:
        """All of them, as if nothing overlapped."""
        return sum(getattr(self, part.name) for part in fields(self))


def rows_of_ranks(batch: int, micro_batch: int, world: int) -> list[list[int]]:
    """Return, for each rank, the sizes of its micro-batches of an update on ``batch`` images with a chain."""
    groups = micro_batches(list(range(batch)), ["chain"] * batch, micro_batch, world)
    return [[len(rows) for rows in Ranks(rank, world).share(groups)] for rank in range(world)]


def seconds_of(
    world: int, micro: Mapping[int, float], adapters: int, shape: costs.Shape, hparams: Mapping[str, Any], token: float
) -> Seconds:
    """Return a job's seconds.

    Args:
        world: number of ranks.
        micro: seconds of forward and backward pass, by images in a micro-batch.
        adapters: trained weights.
        shape: of the model.
        hparams: of the job.
        token: minimum seconds of a decoding step.
    """
    data, gpu = DATA[DATASET], roofline.GPU
    batch = hparams["batch_size"] * (data.domains - 1)
    schedule = schedule_of(RDMLDG, dict(hparams), data, None)
    lengths = costs.lengths_for(data.classes, CHAIN)
    evaluations = hours_of(shape, lengths, data, gpu, hparams, schedule, (True, True)).evaluations
    update = max(sum(micro[rows] for rows in own) for own in rows_of_ranks(batch, hparams["micro_batch"], world))
    images = math.ceil(data.images / world)
    # Slots are refilled, so that every step decodes `eval_batch` rows but for the end, when the longest chain is left.
    prompt = shape.tiles * shape.image_tokens + lengths.question + lengths.instruction
    moved = bytes_of_a_token(shape, hparams["eval_batch"], prompt + CHAIN / 2)
    step = max(token, moved / (gpu.bandwidth * ASSUMED["bandwidth"].value))
    steps = images * CHAIN / hparams["eval_batch"] + min(1.5 * CHAIN, hparams["max_new_tokens"])
    peak = gpu.tflops * 1e12 * ASSUMED["prefill_mfu"].value
    chains = images * prefill_flops(shape, prompt) / peak + steps * step
    scores = images * seconds_to_score(shape, lengths, data.classes, gpu, hparams)
    reduced = bytes_reduced(adapters, world) / NVLINK
    packing = 4 * 4 * adapters / gpu.bandwidth * (world > 1)  # gradients are copied into one tensor and back
    gathered = math.ceil(data.images / BATCH) * GATHER * (world > 1)
    weights = 2 * shape.weights
    return Seconds(
        training=schedule.n_steps * update,
        chains=evaluations * chains,
        scores=scores,
        exchange=schedule.n_steps * (reduced + packing) + evaluations * gathered,
        optimizer=schedule.n_steps * 7 * 4 * adapters / gpu.bandwidth,
        loading=evaluations * (data.images + images) * LOADING / hparams["workers"],
        copies=evaluations * 4 * weights / gpu.bandwidth,
        start=START,
    )


def bytes_reduced(adapters: int, world: int) -> float:
    """Return the bytes that a rank sends in an update: float32 gradients, around a ring."""
    return 2 * (world - 1) / world * 4 * adapters


def describe_update(world: int, batch: int, micro_batch: int, adapters: int) -> str:
    """Return what the ranks of an update do and exchange."""
    one, several = (max(rows_of_ranks(batch, micro_batch, count), key=sum) for count in (1, world))
    return (
        f"an update: {batch} images; {len(one)} micro-batches on one GPU, {len(several)} with {sum(several)} images on "
        f"the busiest of {world}; {bytes_reduced(adapters, world) / 1e6:.0f} MB sent per rank, in one all-reduce"
    )


def describe(one: Seconds, several: Seconds, world: int) -> str:
    """Return the hours of each part, and the share of those that ranks do not divide."""
    lines = [f"{'hours':12} {'1 GPU':>8} {f'{world} GPUs':>8} {'ratio':>6}"]
    for part in [*(field.name for field in fields(one)), "total"]:
        before, after = getattr(one, part) / 3600, getattr(several, part) / 3600
        ratio = f"{before / after:6.2f}" if before and after else f"{'-':>6}"
        lines.append(f"{part:12} {before:8.3f} {after:8.3f} {ratio}")
    alone = sum(getattr(several, part) for part in ("optimizer", "loading", "copies", "start"))
    return "\n".join([*lines, f"serial rest: {alone / several.total:.1%} of the {world} GPUs' time"])


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="GPUs of the job (default: %(default)s)")
    world = parser.parse_args(argv).ranks
    hparams = {name: row.default for name, row in RDMLDG.HPARAMS.items()} | {"workers": 2}
    batch = hparams["batch_size"] * (DATA[DATASET].domains - 1)
    sizes = {
        rows for count in (1, world) for own in rows_of_ranks(batch, hparams["micro_batch"], count) for rows in own
    }
    micro = {}
    for rows in sorted(sizes):
        counting, _ = roofline.count("float32", rows, hparams["lora_dropout"], DATA[DATASET].classes, CHAIN, NAME)
        micro[rows] = max(sum(counting.seconds.values()), sum(counting.kernels.values()) * roofline.LAUNCH)
    network = roofline.build("float32", hparams["lora_dropout"])
    adapters = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    shape = costs.shape_of(roofline.MODEL)
    ratios = []
    print(f"RD-MLDG on {DATASET}, {roofline.MODEL}, {world} GPUs against one, counted")
    print(describe_update(world, batch, hparams["micro_batch"], adapters))
    for how, rate in (("launched from Python", "launch_overhead"), ("in CUDA graphs", "step_overhead")):
        token = ASSUMED[rate].value
        one, several = (seconds_of(count, micro, adapters, shape, hparams, token) for count in (1, world))
        print(f"\ndecoding steps {how}\n{describe(one, several, world)}")
        ratios.append(one.total / several.total)
    print(f"\nratio: {min(ratios):.2f} (bar: {BAR})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
