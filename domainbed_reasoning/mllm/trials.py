"""Probe a model: compare what its processor and forward pass do with a plain computation, one row at a time.

An architecture without an entry in `families` is rejected unless every check that affects results passes. Which
optimizations it supports is probed as well. Findings are cached under a digest of the model's small files and the
library versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from domainbed_reasoning.mllm import general, likelihood
from domainbed_reasoning.mllm.devices import kept_random_state
from domainbed_reasoning.mllm.families import Family, ModelError
from domainbed_reasoning.mllm.findings import Findings, recall, remember
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.towers import parts_of
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_QUESTIONS = ("What is in this photo? Choose from: dog, axe.", "What is in this photo? Describe it step by step.")
_ANSWERS = ("a dog house", "an axe; it has a long handle, a blade and four legs")
_NAMES = ("dog", "dog house", "an alarm clock", "axe")
_NEW_TOKENS = 6
_CAUTIOUS = Findings("", batch=False, padding=False, reuse=False, cache=False, image_tokens=0, worst=0.0, seconds=0.0)
_FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError, AssertionError)

Make = Callable[[Family], LanguageModel]  # builds the model with other settings around the same weights


def digest_of(small_files: str, *more: object) -> str:
    """Return the cache key of findings: a digest of the model's small files, library versions, and settings."""
    import transformers

    identity = repr((1, small_files, transformers.__version__, torch.__version__, *map(str, more)))
    return hashlib.sha256(identity.encode()).hexdigest()


def known(make: Make, family: Family, digest: str, candidates: Sequence[str] | None = None) -> Family:
    """Return an architecture's settings with the model's findings, cached or probed now.

    Args:
        make: returns the model with another `Family`.
        family: settings of its images.
        digest: cache key of the findings, see `digest_of`.
        candidates: see `try_out`.

    Raises:
        ModelError: as `try_out`.
    """
    found = recall(digest)
    if found is None:
        found = try_out(make, family, candidates)
        remember(digest, found)
    if found.costs:
        _log.warning("%s: computed by the general path: %s.", family.name, "; ".join(found.costs))
    return dataclasses.replace(family, tree=found.tree, findings=found)


@torch.no_grad()
def try_out(make: Make, family: Family, candidates: Sequence[str] | None = None) -> Findings:
    """Return what a model supports, probed by about twenty short forward passes; random states are preserved.

    Args:
        make: returns the model with another `Family`.
        family: settings of its images.
        candidates: kinds of shared-prefix rows to try, see `Family.tree`; None tries those that its config allows.

    Raises:
        ModelError: if the model cannot be used, with what was tried, what was found, and what to do.
    """
    start = time.monotonic()
    slow = make(dataclasses.replace(family, tree="", findings=_CAUTIOUS))
    with kept_random_state(slow.device):
        trial = _Trial(make, family, slow)
        found = trial.required()
        for tree in _possible_trees(slow.base) if candidates is None else candidates:
            if trial.shares_prefixes(tree):
                found = dataclasses.replace(found, tree=tree)
                break
    return dataclasses.replace(found, worst=trial.worst, seconds=time.monotonic() - start)


class _Trial:
    """The trials of one model; `slow` is the reference, which computes one row at a time and reuses nothing."""

    def __init__(self, make: Make, family: Family, slow: LanguageModel):
        self.make, self.family, self.slow = make, family, slow
        self.worst = 0.0
        self.images = _pictures(slow.image_size)
        weight = slow.base.get_input_embeddings().weight
        self.tolerance = 1e-3 if weight.dtype == torch.float32 else 0.15  # nats

    def required(self) -> Findings:
        """Return the findings of all required trials; shared prefixes are tried separately."""
        count = image_tokens(self.slow)
        self.expected = [self._must("a forward pass", self._read, self.slow, q) for q in _QUESTIONS]
        if any(not values.isfinite().all() for values in self.expected):
            self._refuse("a forward pass", "log-likelihoods that are not finite", "Try dtype float32.")
        require_sight(self.slow)
        self._require_causality()
        found = dataclasses.replace(_CAUTIOUS, image_tokens=count)
        if self._holds(batched := dataclasses.replace(found, batch=True)):
            found = batched
            if self._holds(padded := dataclasses.replace(found, padding=True)):
                found = padded
        reusing = dataclasses.replace(found, reuse=True)
        named = "mm_encoder_outputs" in general.accepted(self.slow.base)  # else it might be ignored silently
        if found.batch and found.padding and named and self._holds(reusing):
            found = reusing
        for settings in (dataclasses.replace(found, cache=True), found):
            written = self._attempt(self._write, self._general(settings))
            if written is not None and self._is_greedy(written):
                return settings
        self._refuse(
            "greedy generation", "other tokens than the forward pass finds most likely", "Use another checkpoint."
        )

    def shares_prefixes(self, tree: str) -> bool:
        """Return whether every computation with shared prefixes equals the plain one."""
        text = self.slow.base.config.get_text_config()
        before = text._attn_implementation
        model = self._attempt(self.make, dataclasses.replace(self.family, tree=tree, findings=None))
        if model is not None and self._attempt(self._is_equal, model):
            return True
        text._attn_implementation = before
        return False

    def _is_equal(self, model: LanguageModel) -> bool:
        encoded = model.encode(self.images)
        rows = [likelihood.log_likelihoods(model, encoded, question, _ANSWERS)[0] for question in _QUESTIONS]
        pairs = likelihood.tree_log_likelihoods(model, encoded, (_QUESTIONS[0], _QUESTIONS[1]), (_ANSWERS, _ANSWERS))
        scores = likelihood.class_scores(model, self.images, _QUESTIONS[0], _NAMES)
        plain = general.class_scores(self.slow, self.images, _QUESTIONS[0], _NAMES)
        return (
            all(self._equal(*pair) for pair in zip(rows, self.expected, strict=True))
            and all(self._equal(pair[0], want) for pair, want in zip(pairs, self.expected, strict=True))
            and self._equal(scores, plain)
            and self._is_greedy(TextGenerator(model).write(self.images, _QUESTIONS[0], _NEW_TOKENS, do_sample=False))
        )

    def _general(self, findings: Findings) -> LanguageModel:
        return self.make(dataclasses.replace(self.family, tree="", findings=findings))

    def _holds(self, findings: Findings) -> bool:
        """Return whether both questions' log-likelihoods are the reference's with these findings."""
        model = self._general(findings)
        answers = _ANSWERS if findings.padding else (_ANSWERS[0], _ANSWERS[0])
        for question, want in zip(_QUESTIONS, self.expected, strict=True):
            values = self._attempt(self._read, model, question, answers)
            if values is None:
                return False
            if not findings.padding:
                want = self._read(self.slow, question, answers)
            if not self._equal(values, want):
                return False
        return True

    def _read(self, model: LanguageModel, question: str, answers: Sequence[str] = _ANSWERS) -> torch.Tensor:
        return general.log_likelihoods(model, general.encode(model, self.images), question, answers)[0]

    def _write(self, model: LanguageModel) -> list[list[int]]:
        generator = general.GeneralGenerator(model)
        return generator.write(self.images, _QUESTIONS[0], _NEW_TOKENS, do_sample=False)

    def _is_greedy(self, written: list[list[int]]) -> bool:
        """Return whether each token is the most likely continuation, by one plain row per image."""
        never = general.GeneralGenerator(self.slow).suppressed_tokens
        for row, tokens in enumerate(written):
            if not tokens:
                return False
            inputs = general.conversations(self.slow, self.images[row : row + 1], _QUESTIONS[0])
            if tokens[:-1]:
                inputs = general.continued(inputs, [tokens[:-1]], 0)
            logits = general.forward(self.slow, inputs, {}, len(tokens))[0].float()
            logits[:, never] = -torch.inf
            short = logits.amax(-1) - logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            if float(short.max()) > self.tolerance:
                return False
        return True

    def _require_causality(self) -> None:
        """Reject a model in which later tokens change the predictions at earlier ones."""
        inputs = general.conversations(self.slow, self.images[:1], _QUESTIONS[0])
        first = []
        for answer in ("dog axe", "axe dog"):
            tokens = self.slow.target(answer)[:2]
            first.append(general.forward(self.slow, general.continued(inputs, [tokens], 0), {}, 3)[0, 0].float())
        if not torch.allclose(first[0], first[1], rtol=0, atol=20 * self.tolerance):
            self._refuse(
                "whether the tokens of an answer attend to earlier tokens only",
                "that they attend to later ones",
                "Its likelihood cannot be computed in one pass: use an autoregressive model.",
            )

    def _equal(self, values: torch.Tensor, wanted: torch.Tensor) -> bool:
        if values.shape != wanted.shape:
            return False
        deviation = float((values - wanted).abs().max())
        if deviation <= self.tolerance:
            self.worst = max(self.worst, deviation)
            return True
        return False

    def _attempt(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return the result of an optional computation; None if the model does not support it."""
        try:
            return call(*args)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            _log.debug("%s: %s", self.family.name, error)
            return None

    def _must(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except _FAILURES as error:
            message = " ".join(str(error).split())
            self._refuse(what, f"{type(error).__name__}: {message:.300}", "Use another checkpoint or release of it.")

    def _refuse(self, tried: str, found: str, fix: str) -> NoReturn:
        raise refusal(self.family, tried, found, fix)


def refusal(family: Family, tried: str, found: str, fix: str) -> ModelError:
    """Return the error of a failed trial."""
    return ModelError(f"{family.name} cannot be used: tried {tried}, found {found}. {fix}")


def image_tokens(mllm: LanguageModel) -> int:
    """Return the number of image tokens in a prompt.

    Raises:
        ModelError: if the chat template takes no image, or the tokenizer lacks the image token.
    """
    processor, tokenizer, family = mllm.chat_format.processor, mllm.tokenizer, mllm.family
    token = getattr(processor, "image_token", None)
    if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
        raise refusal(family, "the image token", f"no {token!r} in the tokenizer", "Download the model again.")
    turn: list[dict[str, Any]] = [{"type": "text", "text": "?"}]
    try:
        texts = [
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in (turn, [{"type": "image"}, *turn])
        ]
        if texts[0] == texts[1]:
            raise refusal(
                family,
                "its chat template with and without an image",
                "the same text",
                "Use the chat template that the model was published with.",
            )
        ids = mllm.prompt("?")["input_ids"][0].tolist()
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # templates raise errors of their own, of jinja, and of the processor
        message = " ".join(str(error).split())
        raise refusal(
            family,
            "its chat template with an image and a question",
            f"{type(error).__name__}: {message:.300}",
            "Use a checkpoint whose chat template accepts images.",
        ) from error
    config = mllm.base.config
    wanted = [getattr(owner, name, None) for owner in (config, processor) for name in _IMAGE_TOKENS]
    counts = [ids.count(token) for token in wanted if isinstance(token, int)]
    if not counts:
        return len(ids) - len(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    if not max(counts):
        raise refusal(family, "the image tokens of a prompt", "none", "Download the model again.")
    return max(counts)


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")


@torch.no_grad()
def require_sight(mllm: LanguageModel) -> None:
    """Reject a model on the general path that ignores its images."""
    read = [
        general.log_likelihoods(mllm, general.encode(mllm, image[None]), _QUESTIONS[0], _ANSWERS[:1])[0]
        for image in _pictures(mllm.image_size)
    ]
    if torch.equal(*read):
        raise refusal(
            mllm.family,
            "two different images",
            "the same log-likelihoods",
            "Its vision encoder may be empty, or this release of transformers ignores the images.",
        )


def require_gradients(mllm: Any) -> None:
    """Reject adapters of a tower that gets no gradient; warns about single layers that get none.

    Args:
        mllm: the model with fresh adapters, whose B matrices are 0 and get a gradient nevertheless.

    Raises:
        ModelError: for a tower without gradient.
    """
    image = _pictures(mllm.image_size)[1:]
    with kept_random_state(mllm.device), torch.enable_grad():
        a, b = mllm.path_log_likelihoods(image, _QUESTIONS, (_ANSWERS[:1], _ANSWERS[1:]))
        (a[0].sum() + b[0].sum()).backward()
    part, reached = parts_of(mllm.base), {}
    for name, weight in mllm.adapters().items():
        if "lora_B" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_B")[0]
            reached[layer] = weight.grad is not None and bool(weight.grad.any())
    mllm.zero_grad()
    towers = {part(name) for name in reached}
    for tower in sorted(towers - {part(name) for name, found in reached.items() if found}):
        other = "language" if tower == "vision" else "vision"
        raise refusal(
            mllm.family,
            f"the gradient of the {tower} adapters",
            "none",
            f'Train with --hparams \'{{"lora_targets": "{other}"}}\'.',
        )
    if still := [name for name, found in reached.items() if not found]:
        _log.warning(
            "WARNING: %s: %d of %d adapters get no gradient and stay at zero, such as %s.",
            mllm.family.name,
            len(still),
            len(reached),
            still[0],
        )


def _pictures(edge: int) -> torch.Tensor:
    """Return a black and a patterned image, uint8, ``(2, 3, edge, edge)``."""
    pattern = (torch.arange(3 * edge * edge) * 7 % 256).to(torch.uint8).view(3, edge, edge)
    return torch.stack([torch.zeros_like(pattern), pattern])


def _possible_trees(network: Any) -> tuple[str, ...]:
    """Return the kinds of shared-prefix rows to try: only models with full attention in every layer allow any."""
    text = network.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ("full_attention",)
    chunks = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    core = getattr(network, "model", None)
    if set(kinds) != {"full_attention"} or any(chunks) or core is None:
        return ()
    if not {"input_ids", "position_ids", "mm_encoder_outputs"} <= set(inspect.signature(core.forward).parameters):
        return ()
    return ("rope",) if hasattr(core, "get_rope_index") else ("plain",)
