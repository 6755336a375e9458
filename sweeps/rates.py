"""What a GPU achieves of its peak: assumed, or measured by `benchmarks.gpu`.

`python -m benchmarks.gpu --output FILE` measures the rates of one GPU. `plan --rates FILE` uses them; those of files in
`sweeps/measured_rates/` are used whenever that GPU is planned for. Hours that rest on an assumed rate are marked
"counted".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning.results.published import GPUS, find_gpu

COMMITTED = Path(__file__).parent / "measured_rates"


@dataclass(frozen=True)
class Rate:
    """A constant of the cost model.

    Attributes:
        value: the constant.
        source: where it is from.
        measured: whether it was measured on the GPU in question.
    """

    value: float
    source: str
    measured: bool = False


ASSUMED: Mapping[str, Rate] = {
    "training_mfu": Rate(0.34, "share of peak FLOPS in an update; as on an H100 (results/gpu)"),
    "layer_overhead": Rate(
        0.006, "seconds in which the host launches a block's kernels, per micro-batch; as beside an H100 (results/gpu)"
    ),
    "prefill_mfu": Rate(0.47, "share of peak FLOPS during prefill; as on an H100 (results/gpu)"),
    "bandwidth": Rate(0.39, "share of peak memory bandwidth during decoding; as on an H100 (results/gpu)"),
    "step_overhead": Rate(0.011, "minimum seconds per token, replayed by CUDA graphs; as on an H100 (results/gpu)"),
    "launch_overhead": Rate(
        0.025, "the same where Python launches it: sampled chains, quantized models; as on an H100 (results/gpu)"
    ),
    "nf4_slowdown": Rate(1.3, "training time against bfloat16; measured on the CPU"),
    "int8_slowdown": Rate(2.1, "training time against bfloat16; measured on the CPU"),
    "checkpointing": Rate(4 / 3, "training time with gradient checkpointing: four forward passes instead of three"),
}
ERROR = "hours: counted, within a factor of 2 until `benchmarks.gpu` has measured this GPU; memory: within 30%"
ERROR_MEASURED = "hours: from rates measured on this GPU, dataset and chain lengths as above; memory: within 30%"


def name_of_gpu(device_name: str, gib: float) -> str | None:
    """Return the name in `GPUS` of a device, None for one that is not listed.

    Args:
        device_name: as PyTorch reports it, such as ``NVIDIA A100-SXM4-80GB``.
        gib: its memory.
    """
    plain = device_name.replace(" ", "")
    known = [name for name in GPUS if name.partition("-")[0] in plain]
    longest = max((len(name.partition("-")[0]) for name in known), default=0)  # L40S, not L4
    known = [name for name in known if len(name.partition("-")[0]) == longest]
    return min(known, key=lambda name: abs(GPUS[name].gib - gib), default=None)


def rates_for(gpu: str, file: str | Path | None = None, committed: Path = COMMITTED) -> dict[str, Rate]:
    """Return the rates of a GPU: measured where a result of `benchmarks.gpu` has them, else assumed.

    Args:
        gpu: a name of `GPUS`, in any spelling that `find_gpu` takes.
        file: a result of `benchmarks.gpu`; None for those of ``committed``.
        committed: folder of results.

    Raises:
        OSError: ``file`` cannot be read.
        ValueError: ``file`` is no such result, or was measured on another GPU.
    """
    rates = dict(ASSUMED)
    wanted = find_gpu(gpu)
    for path in [Path(file)] if file is not None else sorted(committed.glob("*.json")):
        name, found = read_rates(path)
        if name is not None and GPUS[name] == wanted:
            rates |= found
        elif file is not None:
            if name is None:
                raise ValueError(f"{path} was not measured on a listed GPU, so it has no rates. Omit --rates.")
            raise ValueError(f"{path} was measured on {name}, not on {gpu}. Pass --gpu {name}, or omit --rates.")
    return rates


def read_rates(path: Path) -> tuple[str | None, dict[str, Rate]]:
    """Return the GPU and the rates of a result of `benchmarks.gpu`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such result, naming the file and what is wrong.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, values = record["gpu"], record["rates"]
        source = f"measured on {record['device']}, {record['date']}, torch {record['versions']['torch']}"
        items = list(values.items())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of `python -m benchmarks.gpu --output FILE`: {error!r}.") from error
    if name is not None and name not in GPUS:
        raise ValueError(f"{path}: unknown GPU {name!r:.80}. Known: {', '.join(GPUS)}.")
    for rate, value in items:
        known = rate in ASSUMED and isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or value <= 0:
            raise ValueError(
                f"{path}: rate {rate!r:.80} must be one of {', '.join(ASSUMED)}, above 0; got {value!r:.80}."
            )
    return name, {rate: Rate(float(value), source, measured=True) for rate, value in items}
