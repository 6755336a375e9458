"""A training job from the algorithm's side: task, replay after a restart, seeds, records and progress.

DomainBed starts every job at step 0. In a job, a session records the values of every step and the answers of every
evaluation. After a restart, it returns the recorded values until the log ends, has the algorithm restore the saved
state, and continues from there. Outside of a job (in a test or a notebook), it only computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.bridge.samples import ids_of, images_of, task_of
from domainbed_reasoning.bridge.steps import lay_out_steps, task_without_names
from domainbed_reasoning.bridge.torchrun import ranks
from domainbed_reasoning.bridge.train_args import job_arguments
from domainbed_reasoning.bridge.whose_task import check_batch, check_task, warn_outside_job
from domainbed_reasoning.hparam_checks import check_votes
from domainbed_reasoning.jobs.answers import AnswerRecords, records_for, write_task
from domainbed_reasoning.jobs.history import History, history_of
from domainbed_reasoning.jobs.progress import ProgressLog
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.results_file import add_to_record
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.jobs.stage_file import SelfLabel, StageFile
from domainbed_reasoning.registry import EMBEDDED_MODELS
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

Minibatches = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Resumable(Protocol):
    """The interface that a session requires of its algorithm."""

    def step(self, minibatches: Minibatches) -> dict[str, float]:
        """Take one step and return its values as plain floats, including ``stage``."""

    def after_step(self) -> None:
        """Forget what depends on the weights before a step, whichever way `step` changed them."""

    def answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores of the images ``x``, ``(n, num_classes)``, and the answers to be recorded."""

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name."""

    def before_answers(self) -> None:
        """Prepare an evaluation: called for each batch of its images, before the state is saved."""

    def training_state(self) -> dict[str, Any]:
        """Return the state from which training resumes, given the recorded steps: tensors and plain values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `training_state` returned after `Session.steps_taken` steps."""

    def recall(self, x: torch.Tensor, answers: Answers) -> None:
        """Cache an earlier process's answers for the images ``x``, if this algorithm can reuse them."""

    def new_self_labels(self) -> list[tuple[int, int, str, bool]]:
        """Return the chains self-labeled in the last step: environment, index, chain, whether it was kept."""


class Session:
    """The job that an algorithm trains in.

    Args:
        algorithm: class of the algorithm.
        num_classes: number of classes.
        num_domains: number of training domains.
        hparams: DomainBed's dictionary.
        epochs: of each stage, see `schedule.plan_stages`.

    Attributes:
        task: classes, images and chains.
        schedule: the training stages, which determine DomainBed's steps and evaluations.
        ranks: the processes that share the job.
        steps_taken: number of steps so far, including those of an earlier process.
        records: both answers at the last evaluation; None outside of a job.
        history: progress of the job; None outside of a job, or if it is not saved.

    Raises:
        ValueError: if hyper-parameters are invalid; raised before training.
    """

    def __init__(
        self, algorithm: type, num_classes: int, num_domains: int, hparams: dict[str, Any], epochs: Sequence[int]
    ):
        self.name, self.hparams = algorithm.__name__, hparams
        check_hparams(hparams, self.name)
        check_votes(hparams)
        task = task_of(hparams, num_domains)
        check_task(task, hparams, algorithm)
        self.task = task or task_without_names(num_classes)
        if (model := hparams.get("model")) in set(EMBEDDED_MODELS.values()) - {EMBEDDED_MODELS.get(self.task.dataset)}:
            _log.info(f"The model {model} was never trained on photographs: use it only to test that a job runs.")
        self.schedule = lay_out_steps(self.task, epochs, hparams)
        self.seed = torch.initial_seed()
        self.ranks = ranks()
        self.steps_taken = 0
        self.records: AnswerRecords | None = None
        self.history: History | None = None
        self._training = ProgressLog(f"{self.name}'s updates", self.schedule.n_steps, "update")
        self._answering: ProgressLog | None = None  # of the current evaluation
        self._replayed = -1  # step of the last evaluation that was replayed
        self._looked_ahead = -1  # step of the evaluation whose chains were generated ahead
        self._args: dict[str, Any] = {}  # DomainBed's arguments of a job
        self._records_every: int | None = None  # steps, in a job on one of our datasets
        self._stages: StageFile | None = None  # of a tracked job
        self._own_chains: list[SelfLabel] = []  # that this process has self-labeled in the stage
        if job_arguments() is None:
            warn_outside_job(self.name, self.task, hparams, self.schedule)
        if self.schedule.left_out:
            _log.warning(f"WARNING: {self.name}: {self.schedule.shortfall()}")

    def start(self) -> None:
        """Open the files beside results.jsonl, and look for the saved progress of an earlier process of this job.

        Raises:
            JobIsRunning: another process is running the same job.
        """
        args, hparams = job_arguments(), self.hparams
        if args is not None:
            self._args = vars(args)
            if self.ranks.world > 1:
                _log.info(f"{self.name}: {self.ranks.world} ranks share the updates, chains and answers of this job.")
            write_task(self.task, hparams, args)
            self.records = records_for(self.task, args, hparams)
            self.history = history_of(self.task, self.schedule, hparams, args, self.ranks)
            if self.task.labels and hparams.get("track", "none") != "none":
                self._stages = StageFile(self.task, self.schedule, Path(args.output_dir))
            if self.task.labels:
                self._records_every = getattr(args, "checkpoint_freq", None) or self.schedule.checkpoint_freq

    @property
    def is_last_evaluation(self) -> bool:
        """Whether DomainBed evaluates after the last step."""
        return self.steps_taken >= self.schedule.n_steps

    @property
    def is_recorded(self) -> bool:
        """Whether DomainBed writes a record after the current step, or the stage ends with it.

        A record contains the means of the steps' values since the last record. Values that must not be averaged are
        therefore only returned by the recorded step. True if these steps are unknown, e.g. outside of a job.
        """
        step, every = self.steps_taken, self._records_every
        return every is None or step % every == 0 or step == self.schedule.at(step).last

    def update(self, algorithm: Resumable, minibatches: Minibatches) -> dict[str, float]:
        """Take a step, or return the values that an earlier process recorded for it.

        Raises:
            FloatingPointError: the loss is not finite; the step is not recorded.
            ValueError: the images are not from the task's dataset.
        """
        check_batch(self.task, [x for x, _ in minibatches])
        self._complete_record()
        if self.records is not None:
            self.records.report(f"step {self.steps_taken}")
        if self.history is not None and self.history.replays:
            values = self.history.progress.next_step()
            self.steps_taken += 1
            self._describe_stage(values, [])
            return values
        self._resume(algorithm)
        started = time.monotonic()
        with seeded(self.seed, "step", self.steps_taken, *self.ranks.stream):
            values = algorithm.step(minibatches)
        algorithm.after_step()
        self._check_finite(values)
        self.steps_taken += 1
        self._training.add(1, time.monotonic() - started)
        new = algorithm.new_self_labels() if self.history is not None or self._stages is not None else []
        if self.history is not None:
            self.history.progress.record_step(values, new)
            self.history.save(self.steps_taken, algorithm.training_state)
        self._describe_stage(values, new)
        return values

    def predict(self, algorithm: Resumable, x: torch.Tensor) -> torch.Tensor:
        """Return class scores, ``(n, num_classes)``; during a replay, 1 for the recorded class.

        A further column is "no class", see `answering.strict_scores`.

        Args:
            algorithm: the algorithm.
            x: ``(n, c, H, W)``, bytes or DomainBed's floats.
        """
        ids = ids_of(x)
        if self.history is not None and self.history.replays:
            answers = self.history.progress.next_answers(len(x))
            columns = max(len(self.task.class_names), max(answers.classes) + 1)  # the last may be "no class"
            one_hot = torch.nn.functional.one_hot(torch.tensor(answers.classes), columns)
            scores = one_hot.to(x.device, torch.float32)
            algorithm.recall(x, answers)
            self._replayed = self.steps_taken
        else:
            self._resume(algorithm)
            algorithm.before_answers()
            if self.history is not None:
                self.history.save(self.steps_taken, algorithm.training_state, now=True)
            started = time.monotonic()
            first = None if ids is None else ids[0].tolist()
            with seeded(self.seed, "answers", self.steps_taken, first, *self.ranks.stream):
                scores, answers = algorithm.answer(x, ids)
            self._count_answers(len(x), time.monotonic() - started)
            if self.history is not None:
                self.history.progress.record_answers(answers)
        if self.records is not None and ids is not None:
            self.records.add(ids, answers.chains, answers.labels, self.is_last_evaluation)
        return scores

    def look_ahead(self) -> Iterable[tuple[int | None, Iterable[torch.Tensor]]]:
        """Return this rank's images of the job's dataset once per evaluation, which covers all; see `images_of`.

        Returns:
            nothing later in an evaluation, outside of a job, and with data augmentation, whose images are random.
        """
        if self.records is None or self._looked_ahead == self.steps_taken or self.hparams["data_augmentation"]:
            return ()
        self._looked_ahead = self.steps_taken
        return images_of(self.task, self.ranks)

    def recorded_ahead(self, state: str) -> dict[str, str]:
        """Return the chains, by digest of the image, that an earlier process generated for an unfinished evaluation."""
        return self.history.progress.ahead.pop(state, {}) if self.history is not None else {}

    def record_ahead(self, state: str, digest: str, chain: str, seconds: float) -> None:
        """Record a chain that was generated before this evaluation requested it.

        Args:
            state: key of the model's weights.
            digest: digest of the image.
            chain: the chain.
            seconds: time since the previous one.
        """
        if self.history is not None:
            self.history.progress.record_ahead(state, digest, chain)
        self._count_answers(1, seconds, "Chains of the evaluation")

    def state_dict(self, algorithm: Resumable) -> dict[str, torch.Tensor]:
        """Return only the adapters, as the base model is on disk already. DomainBed calls this after every record."""
        self._complete_record()
        history = self.history
        if history is not None and not history.replays:
            self._resume(algorithm)
        state = {name: weight.detach().clone() for name, weight in algorithm.adapters().items()}
        if history is not None and history.keeps_every_model:
            return history.progress.kept(f"adapters-{self.steps_taken}.pt", state, history.replays)
        return state

    def labeled(self, round: int) -> list[tuple[int, int, str, bool]]:
        """Return an earlier process's self-labels of a round, from `Resumable.new_self_labels`."""
        return self.history.progress.labeled(round) if self.history is not None else []

    def _resume(self, algorithm: Resumable) -> None:
        """Restore the saved state once all recorded events have been replayed."""
        state = self.history.end_of_replay() if self.history is not None else None
        if state is not None:
            algorithm.restore(state)
            if self._replayed == self.steps_taken:  # the state may be from before this evaluation
                algorithm.before_answers()
            _log.info(f"Resumed after step {self.steps_taken - 1}.")

    def _complete_record(self) -> None:
        """Add the last evaluation's further values to DomainBed's record of it, if not present yet."""
        if self.records is not None and self.records.evaluated:
            record = (self.records.folder, self._args, self.steps_taken - 1)
            try:
                added = add_to_record(*record, self.records.evaluated)
            except OSError as error:  # the record itself is complete
                _log.warning(f"Cannot add {', '.join(self.records.evaluated)} to the record of this step: {error}")
                added = True
            if added:
                self.records.evaluated = {}

    def _describe_stage(self, values: Mapping[str, float], new: Sequence[SelfLabel]) -> None:
        """Add the step that was taken to the description of its stage, if the job is tracked."""
        if self._stages is None:
            return
        step = self.steps_taken - 1
        stage = self.schedule.at(step)
        self._own_chains = [*self._own_chains, *new]
        own = [*self.labeled(stage.round), *self._own_chains] if step == stage.last else []
        try:
            self._stages.add(step, values, own)
        except OSError as error:
            _log.warning(f"WARNING: cannot write {self._stages.path} ({error}): stages are not tracked.")
            self._stages = None
        if step == stage.last:
            self._own_chains = []

    def _check_finite(self, values: Mapping[str, float]) -> None:
        wrong = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if wrong:
            clip = self.hparams.get("grad_clip")
            also = f", or clip gradients: grad_clip 1 (now {clip:g})" if clip is not None else ""
            raise FloatingPointError(
                f"Step {self.steps_taken}: {wrong[0]} is {values[wrong[0]]}: training has diverged. Use a smaller lr "
                f"(now {self.hparams['lr']:g}){also}."
            )

    def _count_answers(self, count: int, seconds: float, what: str = "Evaluation") -> None:
        """Count the images that a part of an evaluation has finished; it covers all images."""
        if self.records is None:
            return
        what = f"{what} after {self.steps_taken} of {self.schedule.n_steps} updates"
        if self._answering is None or self._answering.what != what:
            self._answering = ProgressLog(what, len(self.records.splits), "image")
        self._answering.add(count, seconds)
