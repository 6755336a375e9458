"""Build and pretrain the embedded model: ``python -m domainbed_reasoning.sweeps.miniature.tiny_model --output FOLDER``.

A real ``InternVLForConditionalGeneration`` with processor and tokenizer, small enough to ship with the package, and
loaded like InternVL3 from the hub. First the vision tower and the projector learn to recognize the parts of creatures
(as InternVL's are pretrained), then the whole model learns to answer. The training data are in ``tiny_corpus``, or in
``creature_corpus`` with ``--corpus creatures``, for the model of the two regimes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

from domainbed_reasoning.chains.chain import STAGE_TAGS, conclusion_of, match_class
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.sweeps.miniature import creature_corpus, tiny_corpus

VOCABULARY = 2048
IMAGE_TOKENS = 9  # 48 / 8 = 6 patches per side, 36 patches, a quarter of them after the pixel shuffle
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")

# InternVL3's chat template: ChatML, with the image before the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(corpus: ModuleType = tiny_corpus) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text round-trips without unknown tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = [*STAGE_TAGS, *tiny_corpus.prompt_phrases()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.tokenizer_texts(), trainer)
    # Ordinary tokens: `skip_special_tokens` must not remove a stage's tags from a chain.
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """Return InternVL's processor for one tile of 48 x 48."""
    size = {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE}
    mean_and_deviation: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False, **mean_and_deviation),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size, **mean_and_deviation),
        image_seq_length=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """Return the untrained model: ViT 96 x 4, Qwen2 128 x 3, tied embeddings."""
    image, end, pad = (int(tokenizer.vocab[token]) for token in ("<IMG_CONTEXT>", "<|im_end|>", "<|endoftext|>"))
    text_config = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision_config = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [shapes.IMAGE_SIZE] * 2,
        "patch_size": [8, 8],
        "attention_bias": True,
        "layer_scale_init_value": 1.0,  # not needed for four layers
    }
    config = InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    return model


def pixel_values(processor: InternVLProcessor, images: Sequence[Any]) -> Tensor:
    """Return the images as the processor prepares them, (batch, 3, 48, 48)."""
    values: Tensor = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    return values


def optimize(
    parameters: Sequence[nn.Parameter], losses: Iterator[Tensor], steps: int, peak: float, stage: str, until: float
) -> int:
    """Take up to ``steps`` AdamW steps with warm-up and cosine decay; stop early at the clock time ``until``.

    Returns:
        The number of steps taken.
    """
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps + 1, pct_start=0.1)
    running = None
    for step, loss in enumerate(losses):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0 or step + 1 == steps:
            print(f"{stage} step {step}/{steps} loss {running:.3f}", flush=True)
        if step + 1 == steps or time.time() > until:
            return step + 1
    raise AssertionError("the lessons ended before the steps did")


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield shuffled positions in [0, count) endlessly, ``size`` at a time."""
    generator = np.random.RandomState(seed)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def see_parts(
    model: InternVLForConditionalGeneration, pixels: Tensor, kinds: Tensor, size: int, seed: int
) -> tuple[nn.Linear, Iterator[Tensor]]:
    """Return a temporary head on the projector's mean token, and its losses for classifying the four kinds."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 12)

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(pixels), size, seed):
            features = image_features(model, pixels[rows])  # (batch, 9, hidden)
            scores = head(features.mean(1)).view(-1, 3)
            yield functional.cross_entropy(scores, kinds[rows].view(-1))

    return head, losses()


def image_features(model: InternVLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the projected image tokens, (batch, 9, hidden)."""
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    return torch.stack(list(features)) if not isinstance(features, Tensor) else features


class LessonTokens:
    """The lessons' turns as token ids, each encoded once."""

    def __init__(self, processor: InternVLProcessor):
        self.tokenizer = processor.tokenizer
        self.processor = processor
        self.prompts: dict[str, list[int]] = {}

    def prompt(self, question: str) -> list[int]:
        """Return the ids of the conversation up to the assistant's turn, image placeholders included."""
        if question not in self.prompts:
            content: Any = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            image = f"<img>{'<IMG_CONTEXT>' * IMAGE_TOKENS}</img>"
            self.prompts[question] = self.tokenizer(text.replace("<IMG_CONTEXT>", image))["input_ids"]
        return self.prompts[question]

    def batch(self, turns: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Return ids and labels, both (rows, length); labels are -100 outside of the answers."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [(self.prompt(question), [*self.tokenizer(answer)["input_ids"], end]) for question, answer in turns]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), -100)
        for row, (prompt, answer) in enumerate(rows):
            stop = len(prompt) + len(answer)
            ids[row, :stop] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : stop] = torch.tensor(answer)
        return ids, labels


def answer_losses(
    model: InternVLForConditionalGeneration,
    rows: LessonTokens,
    lessons: Sequence[Any],
    pixels: Tensor,
    size: int,
    seed: int,
    weights: Mapping[str, float],
) -> Iterator[Tensor]:
    """Yield losses for two questions per image, encoded once: mean nats per answer token."""
    generator = random.Random(seed)
    for positions in batches(len(lessons), size, seed):
        turns: list[tuple[str, str]] = []
        for position in positions:
            asked = lessons[position].turns()
            known = [task for task in weights if task in asked]
            turns += [asked[task] for task in generator.choices(known, [weights[task] for task in known], k=2)]
        ids, labels = rows.batch(turns)
        features = image_features(model, pixels[positions]).repeat_interleave(2, dim=0)
        embeddings = model.get_input_embeddings()(ids)
        at_image = (ids == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(at_image, features.to(embeddings.dtype))
        hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, :-1]
        supervised = labels[:, 1:] != -100
        yield functional.cross_entropy(model.lm_head(hidden[supervised]), labels[:, 1:][supervised])


def pretrain(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    vision_steps: int,
    steps: int,
    minutes: float,
    lessons: Sequence[Any],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """Train the model on ``lessons`` and return a record of the training."""
    start = time.time()
    count = len(lessons)
    pixels = torch.cat(
        [pixel_values(processor, [one.image for one in lessons[i : i + 512]]) for i in range(0, count, 512)]
    )
    kinds = torch.tensor([one.kinds for one in lessons])
    print(f"{count} images rendered in {time.time() - start:.0f} s", flush=True)
    until = start + 60 * minutes
    head, losses = see_parts(model, pixels, kinds, size=64, seed=2)
    vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    seen = optimize([*vision, *head.parameters()], losses, vision_steps, 1e-3, "vision", start + 30 * minutes)
    losses = answer_losses(model, LessonTokens(processor), lessons, pixels, size=32, seed=3, weights=weights)
    taken = optimize(list(model.parameters()), losses, steps, 2e-3, "language", until)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "lessons": count,
        "vision_steps": seen,
        "steps": taken,
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
        "styles": sorted(tiny_corpus.STYLES),
    }


@torch.no_grad()
def zero_shot(
    model: InternVLForConditionalGeneration, processor: InternVLProcessor, count: int = shapes.SIZE_OF_DOMAIN
) -> dict[str, dict[str, float]]:
    """Return the accuracy of both paths on ``count`` images of every study domain, its cue misleading, in [0, 1].

    Measured after training. The model is not trained on images of these domains; the share of lessons that pair the
    study's names with their own creatures (``tiny_corpus.STUDY_NAME_NOISE``) was chosen to leave headroom.
    """
    rows = LessonTokens(processor)
    accuracy: dict[str, dict[str, float]] = {"label": {}, "chain": {}, "parsed": {}}
    for domain, name in enumerate(shapes.DOMAINS):
        pixels = pixel_values(processor, [shapes.render(domain, index, misleading=True) for index in range(count)])
        expected = [shapes.label(domain, index) for index in range(count)]
        for path, question in (("label", q_cls), ("chain", q_reason)):
            ids = torch.tensor([rows.prompt(question(shapes.CLASS_NAMES, "creature"))] * count)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                max_new_tokens=48,
                do_sample=False,
            )
            texts = processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            names = texts if path == "label" else [conclusion_of(text) for text in texts]
            answers = [match_class(answer, shapes.CLASS_NAMES) for answer in names]
            right = [answer == label for answer, label in zip(answers, expected, strict=True)]
            accuracy[path][name] = round(sum(right) / count, 3)
            accuracy["parsed"][name] = round(sum(answer is not None for answer in answers) / count, 3)
    return accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Build, pretrain and save the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--lessons", type=int, default=20000)
    parser.add_argument("--vision-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--minutes", type=float, default=18, help="stop after this time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study-name-noise", type=float, default=tiny_corpus.STUDY_NAME_NOISE)
    parser.add_argument("--corpus", choices=("shapes", "creatures"), default="shapes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    of_shapes = arguments.corpus == "shapes"
    tokenizer = build_tokenizer(tiny_corpus if of_shapes else creature_corpus)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    words = [arguments.output.name if word == str(arguments.output) else word for word in argv or sys.argv[1:]]
    record: dict[str, Any] = {
        "command": " ".join(["python -m domainbed_reasoning.sweeps.miniature.tiny_model", *words])
    }
    if of_shapes:
        lessons: list[Any] = list(tiny_corpus.lessons(arguments.lessons, seed=1, noise=arguments.study_name_noise))
        weights, settings = tiny_corpus.WEIGHTS, tiny_corpus.settings(arguments.study_name_noise)
    else:
        lessons = list(creature_corpus.lessons(arguments.lessons, seed=1))
        weights, settings = creature_corpus.WEIGHTS, creature_corpus.settings()
    record |= pretrain(
        model, processor, arguments.vision_steps, arguments.steps, arguments.minutes, lessons, weights
    )  # fmt: skip
    record |= settings
    model.eval()
    if of_shapes:
        record["zero_shot"] = zero_shot(model, processor)
    model.half().save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    (arguments.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
