"""A step of MTCT against two plain sequences an image, and against TRL's SFTTrainer, on the same samples and weights.

Ours is `update`, as DomainBed calls it. The plain peer is what one writes with transformers and peft: a sequence for
the class name and one for the chain, the image encoded for each, logits at all positions, equation 1 on them; its text
is tokenized beforehand. TRL's trainer runs its own loop, and between its steps ours takes its own; its time is that of
its step alone, without its collator, which tokenizes. It weighs tokens alike, so its loss is compared with that mean of
our log-likelihoods. The limits count operations; the softmax over all positions that ours leaves out comes on top.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import small_internvl
from benchmarks.counts import Step, training_step
from benchmarks.measure import REPEATS, BenchmarkRow, interleaved, medians, ratio_of, use_domainbed
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import attach_task, with_ids
from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.mllm.adapters import lora_targets
from domainbed_reasoning.sweeps.costs import shape_of

NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
LENGTHS = (235, 250, 265)  # tokens of the chains


class BenchmarkSamples:
    """Pictures, classes and chains, and the algorithm that trains on them.

    Args:
        folder: of the model.
        name: of the algorithm.
        lengths: tokens of each sample's chain.
        edge: of the pictures in pixels.
        changes: to the hyper-parameters.
    """

    def __init__(
        self,
        folder: str,
        name: str = "MTCT",
        lengths: Sequence[int] = LENGTHS,
        edge: int = small_internvl.EDGE,
        **changes: Any,
    ):
        use_domainbed()
        self.folder = folder
        cls = registry.load(registry.ALGORITHMS[name])
        hparams = {key: hparam.default for key, hparam in cls.HPARAMS.items()}
        hparams |= {"model": folder, "lora_dropout": 0.0, "lr": 1e-6, "warmup": 0.0, "micro_batch": len(lengths)}
        hparams |= changes
        schedule = Schedule((Stage(0, 0, 999),), 1000, 1000)
        pixels = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (len(lengths), 3, edge, edge), dtype=torch.uint8, generator=pixels)
        self.labels = [index % len(NAMES) for index in range(len(lengths))]
        chains: dict[tuple[int, int], str] = {}
        files = tuple(f"{index}.png" for index in range(len(lengths)))
        task = Task(
            dataset="PACSReasoning",
            class_names=NAMES,
            environments=("photo", "sketch"),
            test_envs=(1,),
            labels=(tuple(self.labels),) * 2,
            images=(files,) * 2,
            chains=chains,
            schedule=schedule,
        )
        attach_task(hparams, task)
        torch.manual_seed(0)
        self.algorithm = cls((3, edge, edge), len(NAMES), 1, hparams)
        self.mllm = self.algorithm.mllm
        tokenizer = self.mllm.tokenizer
        self.names = [NAMES[label] for label in self.labels]
        self.chains = [small_internvl.chain(tokenizer, n, name) for n, name in zip(lengths, self.names, strict=True)]
        chains.update({(0, index): text for index, text in enumerate(self.chains)})
        with torch.no_grad():  # fresh adapters have no gradient but in B
            for weight in self.mllm.adapters().values():
                weight.normal_(std=0.02)
        ids = torch.tensor([[0, index] for index in range(len(lengths))])
        self.minibatch = (with_ids(self.images, ids), torch.tensor(self.labels))

    def update(self, rows: str | None = None) -> dict[str, float]:
        """Take DomainBed's step, with the product's rows or others."""
        both = self.mllm.two_path_log_likelihoods
        self.mllm.two_path_log_likelihoods = functools.partial(both, rows=rows)
        try:
            return self.algorithm.update([self.minibatch])
        finally:
            del self.mllm.two_path_log_likelihoods

    def conversations(self) -> list[tuple[int, str, str]]:
        """Return index of the image, question and answer of every sequence."""
        asked = ((self.algorithm.q_cls, self.names), (self.algorithm.q_reason, self.chains))
        return [(i, question, answer) for question, answers in asked for i, answer in enumerate(answers)]


class PlainStep:
    """What one writes with transformers and peft alone."""

    def __init__(
        self,
        folder: str,
        samples: BenchmarkSamples,
        paths: tuple[str, ...] = ("label", "chain"),
        together: bool = False,
    ):
        import peft
        import transformers

        network = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        targets = lora_targets(network, "both", False)
        self.model = peft.get_peft_model(network, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        adapters = samples.mllm.adapters()
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(adapters[name])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-6, weight_decay=0.01)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.images = samples.images
        count = len(samples.images)
        conversations = samples.conversations()
        self.rows = {"label": self._rows(conversations[:count]), "chain": self._rows(conversations[count:])}
        self.paths = paths
        self.together = together  # both paths in one backward pass

    def _rows(self, conversations: list[tuple[int, str, str]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        prompts, whole = [], []
        for _, question, answer in conversations:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            turn = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            context = "<img>" + "<IMG_CONTEXT>" * 256 + "</img>"
            text = text.replace("<IMG_CONTEXT>", context)
            prompts.append(text)
            whole.append(text + answer + "<|im_end|>")
        rows = tokenizer(whole, padding=True, return_tensors="pt")
        start = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
        at = torch.arange(rows["input_ids"].shape[1])
        supervised = (at >= start[:, None]) & rows["attention_mask"].bool()
        return {**rows, "labels": rows["input_ids"].masked_fill(~supervised, -100)}

    def image_pixels(self) -> torch.Tensor:
        """Return what the image processor makes of the pictures."""
        settings = {"crop_to_patches": False, "return_tensors": "pt"}
        return self.processor.image_processor(images=list(self.images), **settings)["pixel_values"]

    def losses(self) -> torch.Tensor:
        """Return equation 1, with both paths' gradients accumulated."""
        losses = []
        for path in self.paths:
            rows = self.rows[path]
            inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
            out = self.model(**inputs, pixel_values=self.image_pixels(), use_cache=False)
            target = rows["labels"][:, 1:]
            nll = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100
            ).view_as(target)
            each = nll.sum(1) if path == "label" else nll.sum(1) / (target != -100).sum(1)
            losses.append(each.mean())
            if not self.together:
                losses[-1].backward()
                losses[-1] = losses[-1].detach()
        if self.together:
            sum(losses).backward()
        return sum(losses).detach()

    def __call__(self) -> float:
        """Take a step; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.losses()
        self.optimizer.step()
        return float(loss)


def compare(samples: BenchmarkSamples, plain: PlainStep) -> str:
    """Return how far loss and gradients of one step are apart, relatively."""
    ours = samples.update()["loss"]
    theirs = plain()
    worst = 0.0
    gradients = {name: weight.grad for name, weight in samples.mllm.adapters().items()}
    for name, weight in plain.trained.items():
        worst = max(worst, float((gradients[name] - weight.grad).norm() / weight.grad.norm()))
    gap = abs(ours - theirs) / abs(theirs)
    assert gap < 1e-5 and worst < 1e-4, f"loss {gap:.1e}, gradients {worst:.1e} apart"
    return f"loss to {gap:.0e}, gradients to {worst:.0e}"


def compare_rows(samples: BenchmarkSamples, rows: str) -> str:
    """Return how far the objective is apart with the product's rows and with others, relatively."""
    found = []
    for each in (None, rows):
        with torch.no_grad():
            label, chain = samples.mllm.two_path_log_likelihoods(
                samples.images,
                (samples.algorithm.q_cls, samples.algorithm.q_reason),
                (samples.names, samples.chains),
                each,
            )
        found.append(float((label_nll(*label) + chain_nll(*chain)).mean()))
    gap = abs(found[0] - found[1]) / abs(found[0])
    assert gap < 1e-5, found
    return f"loss to {gap:.0e}"


def counted(samples: BenchmarkSamples) -> dict[str, Step]:
    """Return the operations of ours, of our shared-vision rows, of the plain peer, and of TRL's padded batch."""
    mllm, shape = samples.mllm, shape_of(samples.algorithm.hparams["model"])
    prompts = [mllm.prompt(q)["input_ids"][0].tolist() for q in (samples.algorithm.q_cls, samples.algorithm.q_reason)]
    shared = next(i for i, pair in enumerate(zip(*prompts, strict=False)) if pair[0] != pair[1])
    name = max(len(mllm.target(text)) for text in samples.names)
    chain = max(len(mllm.target(text)) for text in samples.chains)
    n = len(samples.images)
    branches = [(shared, len(prompt) - shared + target) for prompt, target in zip(prompts, (name, chain), strict=True)]
    tree = training_step(shape, n, images=1, rows=[(0, shared), *branches], supervised=name + chain)
    lengths = [len(prompt) + target for prompt, target in zip(prompts, (name, chain), strict=True)]
    rows = [(0, length) for length in lengths]
    longest = [(0, max(lengths))] * 2
    return {
        "ours": tree,
        "vision": training_step(shape, n, images=1, rows=rows, supervised=name + chain),
        "plain": training_step(shape, n, images=2, rows=rows, supervised=sum(lengths)),
        "trl": training_step(shape, n, images=2, rows=longest, supervised=2 * max(lengths)),
    }


def run_trl(
    folder: str, samples: BenchmarkSamples, work: pathlib.Path, repeats: int
) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of TRL's and our steps, interleaved, and how far its loss is from ours."""
    import datasets
    import peft
    import transformers
    import trl
    from PIL import Image

    network = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    targets = lora_targets(network, "both", False)
    model = peft.get_peft_model(network, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    adapters = samples.mllm.adapters()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(adapters[name])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in samples.images]
    rows = [
        {
            "images": [pictures[index]],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for index, question, answer in samples.conversations()
    ]
    settings = trl.SFTConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=len(rows),
        max_steps=repeats + 1,
        max_length=None,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    seconds: dict[str, list[float]] = {"trl": [], "ours": []}
    began = [0.0]

    class Interleave(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds["trl"].append(time.perf_counter() - began[0])
            start = time.perf_counter()
            samples.update()
            seconds["ours"].append(time.perf_counter() - start)

    questions = (samples.algorithm.q_cls, samples.algorithm.q_reason)
    with torch.no_grad():
        pairs = samples.mllm.two_path_log_likelihoods(samples.images, questions, (samples.names, samples.chains))
    nll = -sum((values * mask).sum() for values, mask in pairs)
    count = sum(mask.sum() for _, mask in pairs)
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoProcessor.from_pretrained(folder),
        callbacks=[Interleave()],
    )
    trainer.train()
    theirs = next(record["loss"] for record in trainer.state.log_history if "loss" in record)
    return {
        name: values[1:] for name, values in seconds.items()
    }, f"token mean {float(nll / count):.3f}, TRL's {theirs:.3f}"


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of MTCT's step."""
    folder = small_internvl.build(work / "training", small_internvl.TRAINING)
    samples = BenchmarkSamples(folder)
    plain = PlainStep(folder, samples)
    equal = compare(samples, plain)
    flops = {name: step.total for name, step in counted(samples).items()}
    contenders = {"ours": samples.update, "vision": lambda: samples.update("vision"), "plain": plain}
    seconds = interleaved(contenders, repeats)
    middle = medians(seconds)
    rows = []
    for peer, what, note in (
        ("plain", "two sequences an image, image encoded twice, all logits", equal),
        ("vision", "our own rows with shared vision only", compare_rows(samples, "vision")),
    ):
        limit, ratio = flops[peer] / flops["ours"], ratio_of(seconds, peer, "ours")
        bar, passed = f"85% of the limit: {0.85 * limit:.2f}", ratio >= 0.85 * limit
        rows.append(BenchmarkRow("MTCT step", what, middle["ours"], middle[peer], "s", limit, bar, passed, note))
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed (pip install 'domainbed-reasoning[bench]'): its row is left out", file=sys.stderr)
        return rows
    seconds, note = run_trl(folder, samples, work, repeats)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "trl"))
    limit = flops["trl"] / flops["ours"]
    rows.append(BenchmarkRow("MTCT step", "TRL's SFTTrainer", ours, theirs, "s", limit, "above 1", theirs > ours, note))
    return rows
