"""Classify images with a trained model: class, scores, chain, and the loss of a sample."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from PIL.Image import Image

from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.images.decode import read_rgb, reject_truncated_images
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.jobs.trained import TrainedJob, read_job
from domainbed_reasoning.method.answering import answering_chains, answers_from_chains, scores_of_chains
from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.mllm.generation_cache import digests_of
from domainbed_reasoning.registry import unknown

ANSWERS = ("chain", "label", "both")


@dataclass(frozen=True)
class Prediction:
    """The answer to one image.

    Attributes:
        image: the file, or an empty string.
        class_name: the class with the highest score.
        scores: of every class, in [0, 1]: for ``label``, the classification path's probabilities; for ``chain``, 1 for
            the concluded class, or the classification path's probabilities if the chain names none.
        label_class: the classification path's answer; None if not computed.
        chain_class: the class that the chain concludes with; None if it names none or was not generated.
        chain: the generated chain (with ``votes`` above 1, the majority's); None if not generated.
    """

    image: str
    class_name: str
    scores: dict[str, float]
    label_class: str | None = None
    chain_class: str | None = None
    chain: str | None = None


@dataclass(frozen=True)
class SampleLoss:
    """Both terms of the objective for one image, unweighted.

    Attributes:
        label: -log p(class name | image, q_cls), the sum over its tokens and the end token, in nats.
        chain: -log p(chain | image, q_reason), the mean over its tokens, in nats; None if no chain was passed.
    """

    label: float
    chain: float | None = None


class Predictor:
    """A trained model that answers as in its job; with ``votes`` above 1, by majority over sampled chains.

    Three things are otherwise than in the job: a chain that names no class always falls back on the class name,
    whatever ``on_parse_failure`` says; a method ``answer`` that an algorithm of the user's own overrides is not called;
    and after a job on base and new classes, all of them are offered unless ``class_names`` selects some.

    Args:
        job: folder of a DomainBed job, or a folder written by `export`.
        answer: ``chain``, ``label`` or ``both`` (the class is then the chain's); default: the job's.
        model: base model, if the job's path no longer exists.
        dtype: default: the job's.
        quantize: default: the job's.
        trust_remote_code: whether Python files of the base model run; what the job was trained with does not count.
        class_names: the classes that both questions offer, also ones that the model was not trained on; default: the
            job's.

    Raises:
        ValueError: if the folder, answer, model or class names are invalid.

    Example:
        >>> predictor = Predictor("runs/1a2b3c")                        # doctest: +SKIP
        >>> predictor.predict("cat.jpg").class_name                     # doctest: +SKIP
        'cat'
        >>> [found.class_name for found in predictor.predict(["cat.jpg", "dog.jpg"])]  # doctest: +SKIP
        ['cat', 'dog']
    """

    def __init__(
        self,
        job: str | pathlib.Path | TrainedJob,
        answer: str | None = None,
        model: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        trust_remote_code: bool = False,
        class_names: Sequence[str] | None = None,
    ):
        self.job = job if isinstance(job, TrainedJob) else read_job(job, trust_remote_code=trust_remote_code)
        if class_names is not None:
            self.job = replace(self.job, class_names=_checked(class_names))
        self.answer = answer or self.job.hparams["answer"]
        if self.answer not in ANSWERS:
            raise ValueError(f"answer must be one of {', '.join(ANSWERS)}; got {self.answer!r}.")
        mllm = self.job.load(model, dtype, quantize)
        # Merged weights are faster for inference. Merging into quantized weights would lose the adapters' precision.
        self.mllm = mllm if mllm.quantized else mllm.merge()
        self._to_bytes = self.mllm.from_picture

    @overload
    def predict(self, images: str | pathlib.Path | Image) -> Prediction: ...

    @overload
    def predict(self, images: Iterable[Any]) -> list[Prediction]: ...

    def predict(self, images: Any) -> Prediction | list[Prediction]:
        """Return the answer for an image, or a list of answers for several: files or PIL images.

        Raises:
            ValueError: a file is not a readable image.
        """
        if isinstance(images, (str, pathlib.Path, Image)):
            return next(self.answers([images]))
        return list(self.answers(list(images)))

    __call__ = predict

    @torch.no_grad()
    def loss(self, image: str | pathlib.Path | Image, class_name: str, chain: str | None = None) -> SampleLoss:
        """Return both terms of the objective (equation 1) for an image, its class and its chain.

        Args:
            image: a file or a PIL image.
            class_name: its class, one of those offered.
            chain: the five stages; None omits the chain term.

        Raises:
            ValueError: for an unknown class, or a file that is not a readable image.
        """
        if class_name not in self.job.class_names:
            raise unknown("class", class_name, self.job.class_names)
        pixels = self._to_bytes(_picture(image))[None]
        questions, answers = (self.job.q_cls, self.job.q_reason), ([class_name], None if chain is None else [chain])
        by_label, by_chain = self.mllm.path_log_likelihoods(pixels, questions, answers)
        assert by_label is not None
        return SampleLoss(float(label_nll(*by_label)), None if by_chain is None else float(chain_nll(*by_chain)))

    def answers(
        self, images: Sequence[Any], unreadable: Callable[[ValueError], None] | None = None
    ) -> Iterator[Prediction]:
        """Yield the answers in order, a batch at a time.

        Args:
            images: files or PIL images.
            unreadable: called with the error of each file that is not a readable image, which is then skipped.

        Raises:
            ValueError: a file is not a readable image, and ``unreadable`` is None.
        """
        size = self.job.hparams["eval_batch"]
        for start in range(0, len(images), size):
            names, pixels = [], []
            for image in images[start : start + size]:
                try:
                    pixels.append(self._to_bytes(_picture(image)))
                except ValueError as error:
                    if unreadable is None:
                        raise
                    unreadable(error)
                else:
                    names.append(str(image) if isinstance(image, (str, pathlib.Path)) else "")
            if names:
                yield from self._answer(names, torch.stack(pixels))

    def _answer(self, images: Sequence[str], pixels: torch.Tensor) -> list[Prediction]:
        job, names = self.job, self.job.class_names
        chains: Sequence[str | None] = [None] * len(images)
        concluded: Sequence[int | None] = [None] * len(images)
        by_label = None
        if self.answer != "chain":
            by_label = self.mllm.class_scores(pixels, job.q_cls, names)
        if self.answer == "label":
            assert by_label is not None
            scores = by_label.softmax(dim=1)
        else:
            # A job with votes samples its chains; the same images get the same answers.
            with seeded(0, "answers", digests_of(pixels)):
                written = answering_chains(self.mllm, pixels, job.q_reason, names, *job.chain_settings)
            chains, concluded = written, answers_from_chains(written, names, job.exact_answers)
            scores = scores_of_chains(self.mllm, pixels, job.q_cls, names, written, by_label, job.exact_answers)
        scores = scores.cpu()  # read one by one
        by_name = [None] * len(images) if by_label is None else [names[i] for i in by_label.argmax(1).tolist()]
        return [
            Prediction(
                image=images[row],
                class_name=names[int(scores[row].argmax())],
                scores={name: round(float(score), 6) for name, score in zip(names, scores[row], strict=True)},
                label_class=by_name[row],
                chain_class=None if answer is None else names[answer],
                chain=chains[row],
            )
            for row, answer in enumerate(concluded)
        ]


def load_job(
    folder: str | pathlib.Path,
    answer: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    class_names: Sequence[str] | None = None,
) -> Predictor:
    """Return the trained model of a job, ready to answer; arguments and errors are those of `Predictor`.

    Example:
        >>> job = load_job("sweep/1a2b3c", answer="both")               # doctest: +SKIP
        >>> job.predict("cat.jpg").chain_class                          # doctest: +SKIP
        'cat'
        >>> job.loss("cat.jpg", "cat").label < job.loss("cat.jpg", "dog").label  # doctest: +SKIP
        True
    """
    return Predictor(folder, answer, model, dtype, quantize, trust_remote_code, class_names)


def _checked(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return class names as a tuple.

    Raises:
        ValueError: a string instead of a list, fewer than two names, or names that answers could not distinguish.
    """
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ValueError(f"class_names must be a list of at least two names; got {class_names!r:.80}.")
    if problem := check_class_names(class_names):
        raise ValueError(f"class_names: {problem}.")
    return tuple(class_names)


def _picture(image: Any) -> Any:
    """Return an image as an RGB PIL image."""
    if not isinstance(image, (str, pathlib.Path)):
        return image.convert("RGB")
    try:
        with reject_truncated_images():
            return read_rgb(image)
    except OSError as error:
        raise ValueError(str(error)) from error
