"""What a GPU does with this package's own code: correctness, training, answers, quantized training; results as JSON.

    python -m benchmarks.gpu [--model 8B] [--parts works training answers quantized] [--output gpu.json]
    python -m benchmarks.gpu --tiny                       # the same code on a tiny model, on the CPU too

Runs algorithms as DomainBed does, on random weights of InternVL3's shapes: about 25 minutes for 8B on an H100. Each
part can be run alone; its results are written when it ends. The rates of a full run replace the assumed ones in
`domainbed-reasoning plan --rates gpu.json`; a file in `sweeps/measured_rates/` is used without being named.

`works` compares the embedded model on the GPU with the CPU and names the attention kernels; `training` takes MTCT steps
of 129 images; `answers` generates chains and scores class names; `quantized` trains in nf4 and int8.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_models, measure
from benchmarks.gpu_checks import Row, counted_syncs, images_encoded, kernels_of
from benchmarks.mtct_step import LENGTHS, BenchmarkSamples
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.mllm import ModelError
from domainbed_reasoning.results.published import GPUS, Gpu
from domainbed_reasoning.sweeps import costs
from domainbed_reasoning.sweeps.hours import bytes_of_a_token, prefill_flops
from domainbed_reasoning.sweeps.rates import name_of_gpu

UNKNOWN = Gpu(float("nan"), float("nan"), float("nan"))


class Bench:
    """The model, its sizes, and the results so far.

    Args:
        folder: of the model.
        tiny: whether it is the tiny one, in small batches.
        device: to run on.
        repeats: timed repetitions, of which the median counts.

    Attributes:
        rows: what was measured.
        rates: of the cost model, by their names in `sweeps.rates.ASSUMED`.
        step_seconds: of an unquantized update by micro-batch.
    """

    def __init__(self, folder: str, tiny: bool, device: torch.device, repeats: int):
        self.folder, self.tiny, self.device, self.repeats = folder, tiny, device, repeats
        self.cuda = device.type == "cuda"
        self.samples_a_step = 6 if tiny else 129
        self.micro_batches = (2, 3) if tiny else (4, 8, 12)
        self.answer_batches = (2, 4) if tiny else (64, 256)
        self.new_tokens = 8 if tiny else 250
        self.edge = gpu_models.TINY_EDGE if tiny else 448
        self.kind = torch.cuda.get_device_name() if self.cuda else "CPU"
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if self.cuda else 0.0
        self.gpu = name_of_gpu(self.kind, gib)
        self.sheet = GPUS[self.gpu] if self.gpu else UNKNOWN
        self.shape = costs.shape_of(folder)
        self.rows: list[Row] = []
        self.rates: dict[str, float] = {}
        self.step_seconds: dict[int, float] = {}

    def samples(self, **changes: Any) -> BenchmarkSamples:
        """Return an algorithm with fresh adapters and its batch; memory of earlier ones is freed before."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        lengths = (20, 25, 30) if self.tiny else LENGTHS
        lengths = tuple(lengths[index % 3] for index in range(self.samples_a_step))
        samples = BenchmarkSamples(self.folder, "MTCT", lengths, self.edge, **{"micro_batch": 2, **changes})
        samples.minibatch = tuple(part.to(self.device) for part in samples.minibatch)  # as DomainBed's script does
        return samples

    def lengths(self, samples: BenchmarkSamples) -> costs.Lengths:
        """Return the texts' lengths as the cost model counts them."""
        mllm, asked = samples.mllm, (samples.algorithm.q_cls, samples.algorithm.q_reason)
        question, reason = (mllm.prompt(text)["input_ids"].shape[1] for text in asked)
        name, chain = (
            statistics.mean(len(mllm.target(text)) for text in texts) for texts in (samples.names, samples.chains)
        )
        return costs.Lengths(question - self.shape.image_tokens, reason - question, name, chain)

    def time(self, call: Callable[[], object], repeats: int | None = None) -> tuple[float, float]:
        """Return the median seconds of a call after one that warms up, and the peak memory in GiB (0 on the CPU)."""
        call()
        seconds = []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats or self.repeats):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def add(self, what: str, value: Any, unit: str = "", passed: bool | None = None, **more: Any) -> None:
        """Record and print one measurement, or a check with whether it passed."""
        self.rows.append({"what": what, "value": value, "unit": unit, "passed": passed, **more})
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        verdict = "" if passed is None else "pass" if passed else "FAILED"
        details = ", ".join(f"{key} {v:.3g}" if isinstance(v, float) else f"{key} {v}" for key, v in more.items())
        print(f"{what:46} {shown:>10} {unit:9} {verdict} {details:.200}".rstrip(), flush=True)

    def tried(self, what: str, call: Callable[[], None]) -> None:
        """Run one measurement; what does not fit in memory, or needs a missing package, is recorded as such."""
        try:
            call()
        except torch.OutOfMemoryError:
            self.add(what, "out of memory")
        except ModelError as error:
            self.add(what, f"refused: {error}")


def works(bench: Bench) -> None:
    """Compare the embedded model on the device with the CPU, and name its attention kernels."""
    for row in gpu_checks.checks(bench.device):
        bench.add(**row)


def training(bench: Bench) -> None:
    """Take updates at several micro-batches, profile one, and take some with dropout and recomputed activations."""
    _plain_updates(bench)
    micro = bench.micro_batches[1]
    for name, changes in (
        ("dropout 0.05", {"lora_dropout": 0.05}),
        ("gradient checkpointing", {"gradient_checkpointing": True}),
    ):
        bench.tried(f"update, {name}", lambda name=name, changes=changes: _variant(bench, name, micro, changes))


def _plain_updates(bench: Bench) -> None:
    samples = bench.samples()
    lengths = bench.lengths(samples)
    for micro in bench.micro_batches:
        bench.tried(f"update, micro-batch {micro}", lambda micro=micro: _updates(bench, samples, lengths, micro))
    bench.tried("micro-batches of one image", lambda: _launches(bench, samples))
    _set_micro_batch(samples, bench.micro_batches[1])
    samples.minibatch = tuple(part[: bench.micro_batches[1]] for part in samples.minibatch)
    bench.tried("profiled micro-batch", lambda: _profile(bench, samples))


def _set_micro_batch(samples: BenchmarkSamples, micro: int) -> None:
    samples.algorithm.hparams["micro_batch"] = micro
    samples.algorithm.run = None  # begins the stage again, with that micro-batch


def _updates(bench: Bench, samples: BenchmarkSamples, lengths: costs.Lengths, micro: int) -> None:
    _set_micro_batch(samples, micro)
    seconds, memory = bench.time(samples.update)
    bench.step_seconds[micro] = seconds
    flops = bench.samples_a_step * costs.training_flops(bench.shape, lengths, True, True)
    mfu = flops / seconds / (bench.sheet.tflops * 1e12)
    bench.rates["training_mfu"] = max(mfu, bench.rates.get("training_mfu", 0.0))
    planned = costs.memory_of(bench.shape, lengths, samples.algorithm.hparams)
    bench.add(
        f"update, micro-batch {micro}",
        bench.samples_a_step / seconds,
        "images/s",
        seconds=seconds,
        mfu=mfu,
        gib=memory,
        planned_gib=1.1 * (planned.weights + planned.adapters + planned.activations) / 2**30,
        syncs=counted_syncs(samples.update) if bench.cuda else None,
    )


def _launches(bench: Bench, samples: BenchmarkSamples) -> None:
    """Time micro-batches so small that the GPU waits for the host: what launching their kernels takes."""
    whole, count = samples.minibatch, bench.micro_batches[1]
    samples.minibatch = tuple(part[:count] for part in whole)
    _set_micro_batch(samples, 1)
    seconds, _ = bench.time(samples.update)
    samples.minibatch = whole
    bench.rates["layer_overhead"] = seconds / count / (bench.shape.vision.layers + bench.shape.language.layers)
    bench.add("micro-batches of one image", count / seconds, "images/s", seconds=seconds)


def _profile(bench: Bench, samples: BenchmarkSamples) -> None:
    samples.update()
    bench._wait()
    began = time.perf_counter()
    samples.update()
    bench._wait()
    wall = time.perf_counter() - began
    kernels = kernels_of(samples.update, bench.device)
    busy = sum(seconds for _, seconds, _ in kernels)
    idle = max(0.0, 1 - busy / wall) if bench.cuda else None
    top = [{"kernel": name[:100], "seconds": seconds, "calls": calls} for name, seconds, calls in kernels[:25]]
    bench.add("profiled micro-batch", len(kernels), "kernels", idle=idle, longest=top)


def _variant(bench: Bench, name: str, micro: int, changes: dict[str, Any]) -> None:
    samples = bench.samples(micro_batch=micro, **changes)
    seconds, memory = bench.time(samples.update, max(1, bench.repeats // 2))
    plain = bench.step_seconds.get(micro)
    slower = seconds / plain if plain else None
    bench.add(f"update, {name}", bench.samples_a_step / seconds, "images/s", seconds=seconds, gib=memory, slower=slower)
    if slower and "gradient_checkpointing" in changes:
        bench.rates["checkpointing"] = slower
    if slower and "quantize" in changes:
        bench.rates[f"{changes['quantize']}_slowdown"] = slower


def answers(bench: Bench) -> None:
    """Generate chains with merged and unmerged adapters, score class names, and count what a round rewrites."""
    samples = bench.samples()
    samples.algorithm.eval()
    _answers_and_scores(bench, samples)
    bench.tried("rows rewritten at a round's start", lambda: _round(bench, samples))


def _answers_and_scores(bench: Bench, samples: BenchmarkSamples) -> None:
    mllm = samples.mllm
    frozen = mllm.copy_for_inference()
    frozen.frozen_state = None  # so that nothing is looked up
    for batch in bench.answer_batches:
        for how, model in (("merged", frozen), ("unmerged", mllm)):
            what = f"chains, {how}, batch {batch}"
            bench.tried(what, lambda model=model, what=what, batch=batch: _chains(bench, what, model, batch))
    batch = bench.answer_batches[0]
    bench.tried("chains, sampled", lambda: _chains(bench, "chains, sampled", frozen, batch, temperature=1.0))
    for classes in (7, 65):
        bench.tried(f"scored by {classes} names", lambda classes=classes: _scores(bench, frozen, classes))


def _pictures(bench: Bench, count: int) -> torch.Tensor:
    pixels = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, bench.edge, bench.edge), dtype=torch.uint8, generator=pixels)


def _chains(bench: Bench, what: str, mllm: Any, batch: int, temperature: float = 0.0) -> None:
    """Time prompts with one token and with all: the difference is decoding."""
    pictures, question, repeats = _pictures(bench, batch), "What is this? " * 8, max(1, bench.repeats // 3)
    prefill, _ = bench.time(lambda: mllm.generate(pictures, question, 1, temperature), repeats)
    whole, memory = bench.time(lambda: mllm.generate(pictures, question, bench.new_tokens, temperature), repeats)
    a_token = (whole - prefill) / (bench.new_tokens - 1)
    prompt = mllm.prompt(question)["input_ids"].shape[1]
    if temperature > 0:
        bench.rates["launch_overhead"] = a_token
    elif what.startswith("chains, merged"):
        flops = batch * prefill_flops(bench.shape, prompt)
        bench.rates["prefill_mfu"] = flops / prefill / (bench.sheet.tflops * 1e12)
        moved = bytes_of_a_token(bench.shape, batch, prompt + bench.new_tokens / 2)
        bench.rates["bandwidth"] = moved / a_token / bench.sheet.bandwidth
        bench.rates["step_overhead"] = min(a_token, bench.rates.get("step_overhead", a_token))
    speed = batch * bench.new_tokens / whole
    bench.add(what, speed, "tokens/s", prefill_s=prefill, ms_a_token=1e3 * a_token, gib=memory)


def _scores(bench: Bench, mllm: Any, classes: int) -> None:
    pictures = _pictures(bench, bench.answer_batches[0])
    names = [f"thing {index}" for index in range(classes)]
    seconds, memory = bench.time(lambda: mllm.class_scores(pictures, q_cls(names), names))
    bench.add(f"scored by {classes} names", len(pictures) / seconds, "images/s", gib=memory)


def _round(bench: Bench, samples: BenchmarkSamples) -> None:
    """Count the images that a round's labeler encodes after an evaluation of the same weights."""
    samples.update()
    snapshots, question = samples.algorithm.snapshots, samples.algorithm.q_reason
    pictures = _pictures(bench, bench.answer_batches[0])
    snapshots.current().generate(pictures, question, bench.new_tokens)
    frozen = snapshots.freeze()
    with images_encoded() as encoded, frozen() as labeler:
        labeler.generate(pictures, question, bench.new_tokens)
    bench.add("rows rewritten at a round's start", sum(encoded), passed=not encoded, copy=snapshots.labels_by_copy)


def quantized(bench: Bench) -> None:
    """Train and answer with nf4 and int8 weights."""
    micro = bench.micro_batches[1]
    if micro not in bench.step_seconds:  # the part runs alone
        bench.step_seconds[micro], _ = bench.time(bench.samples(micro_batch=micro).update)
    for how in ("nf4", "int8"):
        bench.tried(f"update, {how}", lambda how=how: _variant(bench, how, micro, {"quantize": how}))
    bench.tried("chains, nf4", lambda: _quantized_chains(bench))


def _quantized_chains(bench: Bench) -> None:
    samples, batch = bench.samples(quantize="nf4"), bench.answer_batches[0]
    samples.algorithm.eval()
    _chains(bench, f"chains, nf4, batch {batch}", samples.mllm, batch)


PARTS: dict[str, Callable[[Bench], None]] = {
    "works": works,
    "training": training,
    "answers": answers,
    "quantized": quantized,
}


def result(bench: Bench, model: str, parts: Sequence[str], command: str) -> dict[str, Any]:
    """Return everything measured so far, and what it takes to measure it again.

    Rates are left out where they mean nothing: for the tiny model, and on a GPU whose peak is not listed.
    """
    return {
        "gpu": bench.gpu,
        "device": bench.kind,
        "model": model,
        "parts": list(parts),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measure.commit(),
        "command": command,
        "versions": measure.versions(),
        "rates": bench.rates if bench.gpu and not bench.tiny else {},
        "rows": _without_nan(bench.rows),
    }


def _without_nan(value: Any) -> Any:
    """Return a copy that JSON can hold: NaN, of what has no peak, is None."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(gpu_models.MODELS), default="8B", help="shapes (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions (default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the random model here, and use it if it exists")
    parser.add_argument("--output", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small batches, on the CPU too")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no CUDA device found. --tiny runs all parts on the CPU with a tiny model.")
    measure.use_domainbed()
    import transformers

    transformers.logging.set_verbosity_error()
    model = "tiny" if args.tiny else args.model
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or pathlib.Path(temporary)) / model
        if not (folder / "tokenizer.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            gpu_models.build(folder, model, device)
        bench = Bench(str(folder), args.tiny, device, args.repeats)
        for count, part in enumerate(args.parts, start=1):
            print(f"-- {part}", flush=True)
            PARTS[part](bench)
            if args.output:
                command = " ".join(["python -m benchmarks.gpu", *(argv if argv is not None else sys.argv[1:])])
                record = result(bench, model, args.parts[:count], command)
                replace_text(args.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return int(any(row["passed"] is False for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
