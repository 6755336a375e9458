"""Teach the language model to read the vision tower: projector and adapters, on named pictures alone.

1. *regress*: the projector alone. Each image token towards the mean of its picture's name's word embeddings, and nearer
   to it than to other names'. The language model does not run, so this takes a minute.
2. *names*: projector and LoRA in the language model, on captions and class questions.
3. *chains*: the same, with five-stage chains among the answers.

Rates are small from the second stage on: at 1e-3 a projector that is trained through the language model forgets the
image. Every step draws its pictures and questions from seed, stage and step alone, so a
resumed run equals an undisturbed one.
"""

from __future__ import annotations

import pathlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from domainbed_reasoning.files.atomic import replacing
from examples.real_small.pictures import VIEWS, Picture
from examples.real_small.questions import CAPTION_QUESTION, CHAIN_QUESTION, CLASS_QUESTION, ask

HELD_OUT = 17  # every so many-th picture is not trained on
LONGEST_NAME = 3  # words, of names that are asked for
SAVE_EVERY = 20  # steps
REGRESSED_TOKENS = 12  # image tokens of a picture in a step of the first stage
WARM_UP = 15  # steps


@dataclass(frozen=True)
class Stage:
    """A part of the alignment.

    Attributes:
        name: of the stage.
        steps: updates.
        pictures: an update's.
        projector_rate: peak learning rate of the projector.
        lora_rate: of the adapters.
        kinds: weights of the kinds of questions; empty for the regression.
    """

    name: str
    steps: int
    pictures: int
    projector_rate: float
    lora_rate: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)


def stages(regress: int, names: int, chains: int) -> tuple[Stage, ...]:
    """Return the three stages with so many steps each."""
    return (
        Stage("regress", regress, 256, 1e-3),
        Stage("names", names, 16, 2e-4, 3e-4, {CAPTION_QUESTION: 0.25, CLASS_QUESTION: 0.75}),
        Stage(
            "chains", chains, 8, 1e-4, 2e-4, {CAPTION_QUESTION: 0.1, CLASS_QUESTION: 0.4, CHAIN_QUESTION: 0.5}
        ),
    )  # fmt: skip


def split(pictures: Sequence[Picture]) -> tuple[list[int], list[int]]:
    """Return the indices of the pictures that are trained on, and of those held out.

    The held-out pictures' names occur in training, drawn by other vendors.
    """
    held_out = list(range(0, len(pictures), HELD_OUT))
    return sorted(set(range(len(pictures))) - set(held_out)), held_out


def short_names(pictures: Sequence[Picture]) -> list[str]:
    """Return the names and kinds that are asked for, sorted."""
    names = {picture.name for picture in pictures} | {picture.kind for picture in pictures if picture.kind}
    return sorted(name for name in names if len(name.split()) <= LONGEST_NAME)


def name_embeddings(mllm: Any, pictures: Sequence[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean word embedding of every distinct name, ``(N, d)``, and each picture's index into them, ``(P,)``.

    A picture with a kind counts as both: ``beagle dog``.
    """
    names = [f"{picture.name} {picture.kind}".strip() for picture in pictures]
    distinct = sorted(set(names))
    words = mllm.base.get_input_embeddings().weight.detach().float()
    tokens = [mllm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in distinct]
    at = {name: index for index, name in enumerate(distinct)}
    return torch.stack([words[ids].mean(0) for ids in tokens]), torch.tensor([at[name] for name in names])


class Alignment:
    """Projector and adapters in training.

    They compute in the model's own precision; the optimizer keeps float32 copies.

    Args:
        mllm: a composed model with adapters in its language model.
        pictures: P pictures.
        features: what the tower sees of them, ``(P, VIEWS, tokens, C)``.
        seed: of everything random.
    """

    def __init__(self, mllm: Any, pictures: Sequence[Picture], features: torch.Tensor, seed: int):
        self.mllm, self.pictures, self.features, self.seed = mllm, pictures, features, seed
        self.train_set, self.held_out = split(pictures)
        self.names = short_names(pictures)
        self.asked = [i for i in self.train_set if len(pictures[i].name.split()) <= LONGEST_NAME]
        self.targets, self.target_of = name_embeddings(mllm, pictures)
        self.projector = mllm.base.model.multi_modal_projector
        self.trained = {
            **{f"projector.{name}": weight for name, weight in self.projector.named_parameters()},
            **{name: weight for name, weight in mllm.adapters().items() if "multi_modal_projector" not in name},
        }
        self.values = {name: weight.detach().float().clone() for name, weight in self.trained.items()}
        for weight in self.trained.values():
            weight.data = weight.data.to(mllm.base.dtype)
            weight.requires_grad_(True)

    def warm_start(self, folder: pathlib.Path) -> None:
        """Take over a projector and adapters that were trained before.

        Args:
            folder: with files ``projector*.safetensors`` and ``lora*.safetensors``, the latter as PEFT saves adapters
                of the language model alone.
        """
        from safetensors.torch import load_file

        projector, adapters = (load_file(next(folder.glob(f"{part}*.safetensors"))) for part in ("projector", "lora"))
        values = {f"projector.{name}": value for name, value in projector.items()}
        inside = "base_model.model.model.language_model."
        for name, value in adapters.items():
            name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            values[inside + name] = value
        if values.keys() != self.values.keys():
            odd = sorted(values.keys() ^ self.values.keys())[0]
            raise ValueError(f"{folder} does not fit this model: only one of them has {odd}.")
        self._set(values)

    def run(self, plan: Sequence[Stage], checkpoint: pathlib.Path) -> list[dict[str, Any]]:
        """Train all stages, resuming at ``checkpoint``, and return a record of each: steps and mean losses.

        Args:
            plan: the stages in order.
            checkpoint: a file that is replaced every `SAVE_EVERY` steps.

        Raises:
            ValueError: the checkpoint belongs to another plan.
        """
        saved: dict[str, Any] = {"stage": 0, "step": 0, "losses": [], "wall": 0.0, "cpu": 0.0, "plan": repr(plan)}
        if checkpoint.is_file():
            saved = torch.load(checkpoint)
        if saved["plan"] != repr(plan):
            raise ValueError(f"{checkpoint} belongs to a run with other steps. Delete it to start over.")
        self.plan = repr(plan)
        self._began = time.time() - saved["wall"], time.process_time() - saved["cpu"]
        if "values" in saved:
            self._set(saved["values"])
        losses: list[list[float]] = saved["losses"]
        for number in range(saved["stage"], len(plan)):
            stage = plan[number]
            optimizer = self._optimizer(stage)
            first = saved["step"] if number == saved["stage"] else 0
            if first:
                optimizer.load_state_dict(saved["optimizer"])
            else:
                losses.append([])
            bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, unit="step")
            for step in bar:
                losses[-1].append(self._step(stage, step, optimizer))
                bar.set_postfix(loss=f"{sum(losses[-1][-10:]) / len(losses[-1][-10:]):.3f}")
                if (step + 1) % SAVE_EVERY == 0 and stage.kinds:
                    self._save(checkpoint, number, step + 1, losses, optimizer)
            self._save(checkpoint, number + 1, 0, losses, None)
        return [
            {"stage": stage.name, "steps": stage.steps, "pictures": stage.pictures, "losses": tenths(curve)}
            for stage, curve in zip(plan, losses, strict=True)
        ]

    @torch.no_grad()
    def nearest_name(self, indices: Sequence[int]) -> float:
        """Return the share of pictures whose projected tokens lie nearest to their own name, among all names."""
        chosen = torch.tensor(list(indices))
        means = self.projector(self.features[chosen, 0].to(self.mllm.base.dtype)).float().mean(1)
        nearest = torch.cdist(means, self.targets).argmin(1)
        return float((nearest == self.target_of[chosen]).float().mean())

    def seconds(self) -> tuple[float, float]:
        """Return wall and processor seconds of the alignment so far, those before a restart included."""
        return time.time() - self._began[0], time.process_time() - self._began[1]

    def _save(self, checkpoint: pathlib.Path, stage: int, step: int, losses: Any, optimizer: Any) -> None:
        wall, cpu = self.seconds()
        state = {"stage": stage, "step": step, "losses": losses, "values": self.values, "plan": self.plan}
        state |= {"wall": wall, "cpu": cpu}
        with replacing(checkpoint) as file:
            torch.save({**state, "optimizer": optimizer and optimizer.state_dict()}, file)

    def _set(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.values[name].copy_(value)
                self.trained[name].copy_(value)

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        groups = []
        for rate, of_projector in ((stage.projector_rate, True), (stage.lora_rate, False)):
            values = [value for name, value in self.values.items() if name.startswith("projector.") == of_projector]
            groups.append({"params": values, "lr": rate, "peak": rate})
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _step(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> float:
        rng = random.Random(f"{self.seed} {stage.name} {step}")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / WARM_UP) * max(0.05, 1 - step / stage.steps)
        loss = self._question_loss(stage, rng) if stage.kinds else self._regression_loss(stage, rng)
        loss.backward()
        with torch.no_grad():
            for name, weight in self.trained.items():
                self.values[name].grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(self.values.values(), 1.0)
            optimizer.step()
            self._set(self.values)
        return float(loss.detach())

    def _regression_loss(self, stage: Stage, rng: random.Random) -> torch.Tensor:
        """Return the share of the names' variance that is missed, plus the nats of telling the names apart."""
        indices = torch.tensor(rng.choices(self.train_set, k=stage.pictures))
        views = torch.tensor(rng.choices(range(VIEWS), k=stage.pictures))
        tokens = torch.tensor(rng.sample(range(self.features.shape[2]), min(REGRESSED_TOKENS, self.features.shape[2])))
        projected = self.projector(self.features[indices[:, None], views[:, None], tokens].to(self.mllm.base.dtype))
        means = projected.float().mean(1)  # (B, d)
        variance = self.targets.var(0).sum()
        distances = torch.cdist(means, self.targets).square() / variance  # (B, N)
        right = self.target_of[indices]
        missed = distances.gather(1, right[:, None]).mean()
        return missed + cross_entropy(-4.0 * distances, right)

    def _question_loss(self, stage: Stage, rng: random.Random) -> torch.Tensor:
        """Return the mean negative log-likelihood of the answers' tokens, in nats."""
        indices = rng.choices(self.asked, k=stage.pictures)
        views = rng.choices(range(VIEWS), k=stage.pictures)
        end, rows, starts = self.mllm.end_token, [], []
        for index in indices:
            question, answer = ask(self.pictures[index], stage.kinds, self.names, rng)
            prompt = self.mllm.prompt(question)["input_ids"][0].tolist()
            rows.append([*prompt, *self.mllm.target(answer)])
            starts.append(len(prompt))
        length = max(map(len, rows))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])  # causal: no token sees its padding
        at = torch.arange(length)
        answers = (at >= torch.tensor(starts)[:, None]) & (at < torch.tensor([len(row) for row in rows])[:, None])
        base = self.mllm.base
        embedding = base.get_input_embeddings()
        projected = self.projector(self.features[indices, views].to(base.dtype))
        inputs = embedding(ids).masked_scatter((ids == base.config.image_token_id)[..., None], projected)
        hidden = base.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = hidden[:, :-1][answers[:, 1:]] @ embedding.weight.T
        return cross_entropy(logits.float(), ids[:, 1:][answers[:, 1:]])


def tenths(curve: Sequence[float]) -> list[float]:
    """Return the mean loss of each tenth of the steps."""
    size = max(1, len(curve) // 10)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [round(sum(part) / len(part), 3) for part in parts]
