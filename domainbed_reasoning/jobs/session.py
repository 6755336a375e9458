"""One training job from its algorithm's side: its task, its replay after a restart, seeds, records and progress.

DomainBed starts every job at step 0. In a job, a session records what every step returned and every evaluation
answered; after a restart it returns the recorded values until the record ends, has the algorithm restore the state that
was saved, and computes from there. Outside of a job (a test, a notebook) it computes, and does nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.bridge.samples import ids_of, task_of
from domainbed_reasoning.bridge.steps import lay_out_steps, task_without_names
from domainbed_reasoning.bridge.train_args import job_arguments
from domainbed_reasoning.bridge.whose_task import check_batch, check_task, warn_outside_job
from domainbed_reasoning.hparam_checks import check_votes
from domainbed_reasoning.jobs.answers import AnswerRecords, records_for, write_task
from domainbed_reasoning.jobs.history import History, history_of
from domainbed_reasoning.jobs.progress import ProgressLog
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.results_file import add_to_record
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.registry import EMBEDDED_MODELS

Minibatches = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Resumable(Protocol):
    """What a session asks of its algorithm."""

    def step(self, minibatches: Minibatches) -> dict[str, float]:
        """Take one step and return its values, plain floats, ``stage`` among them."""

    def answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores of the images ``x``, ``(n, num_classes)``, and what is recorded of them."""

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name."""

    def training_state(self) -> dict[str, Any]:
        """Return what, with the recorded steps, decides everything that follows: tensors and plain values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `training_state` returned after `Session.steps_taken` steps."""

    def recall(self, x: torch.Tensor, answers: Answers) -> None:
        """Remember what an earlier process answered about the images ``x``, if this algorithm can use it."""

    def new_self_labels(self) -> list[tuple[int, int, str, bool]]:
        """Return what the last step self-labeled: environment, index, chain, whether it was kept."""


class Session:
    """The job that an algorithm trains in.

    Args:
        algorithm: its class.
        num_classes: of the dataset.
        num_domains: that it trains on.
        hparams: DomainBed's dictionary.
        epochs: of each stage, see `schedule.plan_stages`.

    Attributes:
        task: what is asked of every image.
        schedule: the stages of training, which DomainBed's steps and evaluations follow.
        steps_taken: so far, those of an earlier process among them.
        records: of both answers at the last evaluation; None outside of a job.
        history: of the job; None outside of one, or where nothing is kept.

    Raises:
        ValueError: for hyper-parameters that cannot be used, before anything is trained.
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
            print(f"The model {model} was never trained on photographs: use it only to test that a job runs.")
        self.schedule = lay_out_steps(self.task, epochs, hparams)
        self.seed = torch.initial_seed()
        self.steps_taken = 0
        self.records: AnswerRecords | None = None
        self.history: History | None = None
        self._training = ProgressLog(f"{self.name}'s updates", self.schedule.n_steps, "update")
        self._answering: tuple[int, ProgressLog] | None = None  # after which step
        self._args: dict[str, Any] = {}  # DomainBed's, of a job
        self._records_every: int | None = None  # steps, in a job on a dataset of ours
        if job_arguments() is None:
            warn_outside_job(self.name, self.task, hparams, self.schedule)
        if self.schedule.left_out:
            print(f"WARNING: {self.name}: {self.schedule.shortfall()}", flush=True)

    def start(self) -> None:
        """Open the files beside results.jsonl, and look for the saved progress of an earlier process of this job.

        Raises:
            JobIsRunning: another process is running the same job.
        """
        args, hparams = job_arguments(), self.hparams
        if args is not None:
            self._args = vars(args)
            write_task(self.task, hparams, args)
            self.records = records_for(self.task, args, hparams)
            self.history = history_of(self.task, self.schedule, hparams, args)
            if self.task.labels:
                self._records_every = getattr(args, "checkpoint_freq", None) or self.schedule.checkpoint_freq

    @property
    def is_last_evaluation(self) -> bool:
        """Whether DomainBed evaluates after the last step."""
        return self.steps_taken >= self.schedule.n_steps

    @property
    def is_recorded(self) -> bool:
        """Whether DomainBed writes a record after the step that is being taken, or its stage ends.

        A record holds the means of what the steps since the last one returned. What it is to hold as it stands at its
        own step is returned by that step alone. True where the steps of records are not known, as outside of a job.
        """
        step, every = self.steps_taken, self._records_every
        return every is None or step % every == 0 or step == self.schedule.at(step).last

    def update(self, algorithm: Resumable, minibatches: Minibatches) -> dict[str, float]:
        """Take a step, or return the values that an earlier process recorded for it.

        Raises:
            FloatingPointError: the loss is not finite; the step is not recorded.
            ValueError: the images are another dataset's than the task's.
        """
        check_batch(self.task, [x for x, _ in minibatches])
        self._complete_record()
        if self.records is not None:
            self.records.report(f"step {self.steps_taken}")
        if self.history is not None and self.history.replays:
            values = self.history.progress.next_step()
            self.steps_taken += 1
            return values
        self._resume(algorithm)
        started = time.monotonic()
        with seeded(self.seed, "step", self.steps_taken):
            values = algorithm.step(minibatches)
        self._check_finite(values)
        self.steps_taken += 1
        self._training.add(1, time.monotonic() - started)
        if self.history is not None:
            self.history.progress.record_step(values, algorithm.new_self_labels())
            self.history.save(self.steps_taken, algorithm.training_state)
        return values

    def predict(self, algorithm: Resumable, x: torch.Tensor) -> torch.Tensor:
        """Return class scores, ``(n, num_classes)``; in a replay, 1 for the recorded class.

        A further column is "no class", see `answering.strict_scores`.

        Args:
            algorithm: that answers.
            x: ``(n, c, H, W)``, bytes or DomainBed's floats.
        """
        ids = ids_of(x)
        if self.history is not None and self.history.replays:
            answers = self.history.progress.next_answers(len(x))
            columns = max(len(self.task.class_names), max(answers.classes) + 1)  # the last may be "no class"
            one_hot = torch.nn.functional.one_hot(torch.tensor(answers.classes), columns)
            scores = one_hot.to(x.device, torch.float32)
            algorithm.recall(x, answers)
        else:
            self._resume(algorithm)
            if self.history is not None:
                self.history.save(self.steps_taken, algorithm.training_state, now=True)
            started = time.monotonic()
            with seeded(self.seed, "answers", self.steps_taken, None if ids is None else ids[0].tolist()):
                scores, answers = algorithm.answer(x, ids)
            self._count_answers(len(x), time.monotonic() - started)
            if self.history is not None:
                self.history.progress.record_answers(answers)
        if self.records is not None and ids is not None:
            self.records.add(ids, answers.chains, answers.labels, self.is_last_evaluation)
        return scores

    def state_dict(self, algorithm: Resumable) -> dict[str, torch.Tensor]:
        """Return the adapters alone: the base model is on disk already. DomainBed asks after every record."""
        self._complete_record()
        history = self.history
        if history is not None and not history.replays:
            self._resume(algorithm)
        state = {name: weight.detach().clone() for name, weight in algorithm.adapters().items()}
        if history is not None and history.keeps_every_model:
            return history.progress.kept(f"adapters-{self.steps_taken}.pt", state, history.replays)
        return state

    def labeled(self, round: int) -> list[tuple[int, int, str, bool]]:
        """Return the self-labels of a round from an earlier process, as `Resumable.new_self_labels` returned them."""
        return self.history.progress.labeled(round) if self.history is not None else []

    def _resume(self, algorithm: Resumable) -> None:
        """Restore the saved state once all recorded events have been replayed."""
        state = self.history.end_of_replay() if self.history is not None else None
        if state is not None:
            algorithm.restore(state)
            print(f"Resumed after step {self.steps_taken - 1}.", flush=True)

    def _complete_record(self) -> None:
        """Add to DomainBed's newest record what the evaluation that it is of has shown, if that is not there yet."""
        if self.records is not None and self.records.evaluated:
            record = (self.records.folder, self._args, self.steps_taken - 1)
            try:
                added = add_to_record(*record, self.records.evaluated)
            except OSError as error:  # the record itself is there
                print(f"Cannot add {', '.join(self.records.evaluated)} to the record of this step: {error}", flush=True)
                added = True
            if added:
                self.records.evaluated = {}

    def _check_finite(self, values: Mapping[str, float]) -> None:
        wrong = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if wrong:
            clip = self.hparams.get("grad_clip")
            also = f", or clip gradients: grad_clip 1 (now {clip:g})" if clip is not None else ""
            raise FloatingPointError(
                f"Step {self.steps_taken}: {wrong[0]} is {values[wrong[0]]}: training has diverged. Use a smaller lr "
                f"(now {self.hparams['lr']:g}){also}."
            )

    def _count_answers(self, count: int, seconds: float) -> None:
        """Count answered images of an evaluation, in which DomainBed asks about all of them."""
        if self.records is None:
            return
        if self._answering is None or self._answering[0] != self.steps_taken:
            what = f"Evaluation after {self.steps_taken} of {self.schedule.n_steps} updates"
            self._answering = self.steps_taken, ProgressLog(what, len(self.records.splits), "image")
        self._answering[1].add(count, seconds)
