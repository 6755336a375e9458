"""The method's costs at InternVL3's size on one GPU: random weights, real shapes, the paper's token counts.

    python gpu.py [--models 2B 8B] [--output rows.json]    # a few minutes; needs torch, transformers and peft alone
    python gpu.py --tiny                                   # the same code on the CPU, to see that it runs

Printed and written, a row each: training images a second with the share of the GPU's peak that useful operations reach,
self-labeling tokens a second, images scored by class names a second, and the peak memory of each. Useful are: all
linear layers at 4 operations a weight and token (LoRA: forward, and the gradient of the input; frozen weights get
none), attention over pairs that see each other three times its forward, the adapters' own, and the output head at
supervised positions. An image is 256 tokens; q_cls 35 and 3 a class name; q_reason 85 more; chains 250, names 3.

Three ways of running float32 adapters beside bfloat16 weights are compared: as PEFT does (inputs cast to float32),
under autocast without those casts, and adapters in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMAGE, INSTRUCTION, NAME, CHAIN = 256, 85, 3, 250
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # bfloat16, dense
IMAGE_TOKEN = 151_667
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
TEXT: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151_674, "num_hidden_layers": 28}
SHAPES: dict[str, dict[str, Any]] = {
    "2B": {
        **TEXT,
        "hidden_size": 1536,
        "intermediate_size": 8_960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "8B": {
        **TEXT,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "tiny": {**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SHAPES["tiny"] |= {"num_hidden_layers": 2, "vocab_size": 151_674}


def keeping(core: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that read ``cache`` and add to it: transformers 5.24 gave the first another name."""
    name = "cache" if "cache" in inspect.signature(core.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def branch_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, branches: Any = None, **more: Any
) -> Any:
    """Attend in rows of prefix, trunk and twig: a causal sequence and a few queries beside it."""
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    prefix, trunk, _ = branches
    end = prefix + trunk
    straight, _ = sdpa_attention_forward(
        module, query[:, :, :end], key[:, :, :end], value[:, :, :end], None, **{**more, "is_causal": True}
    )
    seen = [torch.cat([part[:, :, :prefix], part[:, :, end:]], dim=2) for part in (key, value)]
    aside, _ = sdpa_attention_forward(module, query[:, :, end:], *seen, attention_mask, **more)
    return torch.cat([straight, aside], dim=1), None


def build(name: str, device: torch.device) -> torch.nn.Module:
    """Return a random model of that shape."""
    AttentionInterface.register("branches", branch_attention)
    AttentionMaskInterface.register("branches", sdpa_mask)
    vision = VISION | ({"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1} if name == "tiny" else {})
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=SHAPES[name],
        image_token_id=IMAGE_TOKEN,
        image_seq_length=IMAGE,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.get_text_config()._attn_implementation = "branches"
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Costs:
    """Operations of a model.

    Attributes:
        vision: weights of the image encoder's blocks.
        language: weights of the decoder's blocks.
        head: of the output head.
        adapters: of LoRA, vision and language.
        attention: 4 x layers x width of vision and language: operations of a pair of tokens.
    """

    vision: int
    language: int
    head: int
    adapters: tuple[int, int]
    attention: tuple[int, int]


def costs_of(model: torch.nn.Module, rank: int = 8) -> Costs:
    """Count a model's weights by part."""
    weights, adapters = {"vision": 0, "language": 0}, {"vision": 0, "language": 0}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "projector" not in name:
            part = "vision" if "vision" in name else "language"
            weights[part] += module.weight.numel()
            adapters[part] += rank * sum(module.weight.shape)
    text, vision = model.config.get_text_config(), model.config.vision_config
    attention = (4 * vision.num_hidden_layers * vision.hidden_size, 4 * text.num_hidden_layers * text.hidden_size)
    head = model.get_output_embeddings().weight.numel()
    return Costs(weights["vision"], weights["language"], head, (adapters["vision"], adapters["language"]), attention)


def training_flops(costs: Costs, images: int, stretches: list[tuple[int, int]], supervised: int) -> float:
    """Return the useful operations of one sample's step; stretches are (tokens seen before, tokens)."""
    patches, tokens = 1025, sum(length for _, length in stretches)
    pairs = sum(before * length + length**2 / 2 for before, length in stretches)
    vision = images * (4 * costs.vision * patches + 3 * costs.attention[0] * patches**2)
    adapters = 6 * (images * costs.adapters[0] * patches + costs.adapters[1] * tokens)
    return (
        vision + 4 * costs.language * tokens + 3 * costs.attention[1] * pairs + 4 * costs.head * supervised + adapters
    )


class Clock:
    """Seconds and peak memory of a call, on the GPU or not."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], object], repeats: int) -> tuple[float, float]:
        """Return the median seconds of ``call`` and the peak memory in GiB."""
        call()
        seconds = []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - began)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return sorted(seconds)[len(seconds) // 2], memory

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@contextlib.contextmanager
def adapters_as(how: str, model: Any, device: torch.device) -> Iterator[None]:
    """Compute with adapters the way ``how`` says."""
    if how != "autocast":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), peft.helpers.disable_input_dtype_casting(model):
        yield


class Bench:
    """One model and the prompts of the paper's lengths."""

    def __init__(self, name: str, device: torch.device, repeats: int):
        self.name, self.device, self.repeats = name, device, repeats
        self.model = build(name, device)
        self.costs = costs_of(self.model)
        self.clock = Clock(device)
        kind = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.peak = next((flops for known, flops in PEAK.items() if known in kind), float("nan"))
        self.kind = kind

    def pixels(self, n: int) -> torch.Tensor:
        return torch.randn(n, 3, 448, 448, dtype=torch.bfloat16, device=self.device)

    def prompt(self, n: int, length: int) -> torch.Tensor:
        ids = torch.randint(0, 150_000, (n, length), device=self.device)
        ids[:, 4 : 4 + IMAGE] = IMAGE_TOKEN
        return ids

    def row(self, what: str, value: float, unit: str, memory: float, **more: Any) -> dict[str, Any]:
        record = {
            "gpu": self.kind,
            "model": self.name,
            "what": what,
            "value": value,
            "unit": unit,
            "GiB": memory,
            **more,
        }
        details = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items()
        )
        print(f"{self.name:5} {what:42} {value:9.1f} {unit:10} {memory:6.1f} GiB  {details}", flush=True)
        return record

    def train(self, batch: int, rows: str, how: str, classes: int = 7) -> dict[str, Any]:
        """A step of MTCT on LoRA rank 8 in both towers: ``tree`` rows, or ``plain``: two sequences, all logits."""
        targets = [
            name for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "projector" not in name
        ]  # fmt: skip
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        network = peft.get_peft_model(self.model, config, autocast_adapter_dtype=how != "bfloat16")
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.device.type == "cuda")
        prefix, core, head = IMAGE + 32 + 3 * classes, self.model.model, self.model.get_output_embeddings()
        lengths = (prefix, 3 + INSTRUCTION + CHAIN, 3 + NAME)
        pixels = self.pixels(batch)

        def nll(hidden: torch.Tensor, count: int) -> torch.Tensor:
            logits = head(hidden[:, -count - 1 : -1])
            targets = torch.zeros(logits.shape[:2], dtype=torch.long, device=self.device)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        def tree() -> None:
            ids = self.prompt(batch, sum(lengths))
            positions = [torch.arange(prefix + lengths[1]), prefix + torch.arange(lengths[2])]
            mask = torch.ones(lengths[2], prefix + lengths[2], dtype=torch.bool, device=self.device).tril(prefix)
            hidden = core(
                input_ids=ids,
                pixel_values=pixels,
                position_ids=torch.cat(positions).to(self.device).expand(batch, -1),
                attention_mask=mask[None, None],
                branches=lengths,
                use_cache=False,
            )[0]
            (nll(hidden[:, : prefix + lengths[1]], CHAIN) + NAME * nll(hidden, NAME)).backward()

        def plain() -> None:
            for length, count in ((prefix + lengths[1], CHAIN), (prefix + lengths[2], NAME)):
                logits = self.model(input_ids=self.prompt(batch, length), pixel_values=pixels, use_cache=False).logits
                targets = torch.full(logits.shape[:2], -100, device=self.device)
                targets[:, -count - 1 : -1] = 0
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()

        def step() -> None:
            with adapters_as(how, network, self.device):
                (tree if rows == "tree" else plain)()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        network.train()
        try:
            seconds, memory = self.clock(step, self.repeats)
        finally:
            self.model = network.unload()
        branches = [(0, prefix), (prefix, lengths[1]), (prefix, lengths[2])]
        flops = batch * training_flops(self.costs, 1, branches, CHAIN + NAME)  # of the tree, whatever the rows
        mfu = flops / seconds / self.peak
        what = f"MTCT step, {rows} rows, micro-batch {batch}"
        return self.row(what, batch / seconds, "images/s", memory, adapters=how, useful_mfu=mfu, step_s=seconds)

    @torch.no_grad()
    def write(self, batch: int, tokens: int = CHAIN, classes: int = 7) -> dict[str, Any]:
        """Greedy chains with merged weights: prompts read, then a token of every row at a time."""
        length = IMAGE + 35 + 3 * classes + INSTRUCTION
        pixels, ids = self.pixels(batch), self.prompt(batch, length)
        self.model.eval()

        def write() -> None:
            cache = transformers.DynamicCache(config=self.model.config.get_text_config())
            kept = keeping(self.model, cache)
            out = self.model(input_ids=ids, pixel_values=pixels, logits_to_keep=1, **kept)
            for position in range(length, length + tokens - 1):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                at = torch.full((batch, 1), position, device=self.device)
                out = self.model(input_ids=token, position_ids=at, **kept)

        seconds, memory = self.clock(write, max(1, self.repeats // 3))
        what = f"self-labeling, {tokens} tokens, batch {batch}"
        return self.row(what, batch * tokens / seconds, "tokens/s", memory, images_per_s=batch / seconds)

    @torch.no_grad()
    def score(self, batch: int, classes: int) -> dict[str, Any]:
        """Log-likelihoods of all class names: prompts read once, two tokens a name in one masked forward."""
        length, nodes = IMAGE + 35 + 3 * classes, 2 * classes
        pixels, ids = self.pixels(batch), self.prompt(batch, length)
        mask = torch.ones(1, 1, nodes, length + nodes, dtype=torch.bool, device=self.device)
        own = torch.eye(classes, dtype=torch.bool, device=self.device)
        mask[..., length:] = torch.cat([torch.cat([own, own & False], 1), torch.cat([own, own], 1)])
        positions = length + torch.arange(nodes, device=self.device) // classes
        core, head = self.model.model.eval(), self.model.get_output_embeddings()

        def score() -> torch.Tensor:
            cache = transformers.DynamicCache(config=self.model.config.get_text_config())
            kept = keeping(core, cache)
            out = core(input_ids=ids, pixel_values=pixels, **kept)
            first = head(out[0][:, -1]).float().log_softmax(-1)
            tokens = torch.randint(0, 150_000, (nodes,), device=self.device)
            more = core(
                input_ids=tokens.expand(batch, -1),
                attention_mask=mask,
                position_ids=positions.expand(batch, -1),
                **kept,
            )[0]
            scores = [first[:, tokens[:classes]]]
            for part in more.split(max(1, 2**27 // (nodes * head.weight.shape[0]))):
                logits = head(part).float()
                found = logits[:, torch.arange(nodes), tokens] - logits.logsumexp(-1)
                scores.append(found.view(len(part), 2, classes).sum(1))
            return scores[0] + torch.cat(scores[1:])

        seconds, memory = self.clock(score, self.repeats)
        return self.row(f"scored by {classes} names, batch {batch}", batch / seconds, "images/s", memory)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("2B", "8B"), default=["2B", "8B"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="write the rows to this file as JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small batches, on the CPU too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU here: --tiny tries the code out on the CPU.")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in ["tiny"] if args.tiny else args.models:
        bench = Bench(name, device, args.repeats)
        steps = [(2, "tree"), (2, "plain")] if args.tiny else [(4, "tree"), (8, "tree"), (16, "tree"), (4, "plain")]
        tries: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = []
        tries += [(bench.train, (batch, kind, "autocast")) for batch, kind in steps]
        tries += [(bench.train, (*steps[1], how)) for how in ("float32", "bfloat16")]
        tries += [(bench.score, (2 if args.tiny else 64, classes)) for classes in (7, 10, 65)]
        tries += [(bench.write, (batch, 8 if args.tiny else CHAIN)) for batch in ((2,) if args.tiny else (64, 256))]
        for measure, arguments in tries:
            try:
                rows.append(measure(*arguments))
            except torch.OutOfMemoryError:
                print(f"{name:5} {measure.__name__} {arguments}: out of memory", flush=True)
                torch.cuda.empty_cache()
        del bench, tries
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
