"""What DomainBed asks of an algorithm, done so that a job that was killed goes on when it is started again.

The only subclass of DomainBed's `Algorithm`. It records what every step returned and every evaluation answered; a
restart hands the recorded values out until what was recorded ends, restores the saved state, and computes from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from domainbed.algorithms import Algorithm

from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.bridge.samples import ids_of, task_of
from domainbed_reasoning.bridge.stock_dataset import schedule_of_stock_dataset, task_without_names
from domainbed_reasoning.bridge.train_args import job_arguments
from domainbed_reasoning.bridge.whose_task import check_batch, check_task, say_without_job
from domainbed_reasoning.hparam_checks import check_votes
from domainbed_reasoning.jobs.answers import AnswerRecords, records_for
from domainbed_reasoning.jobs.history import Past, past_of
from domainbed_reasoning.jobs.progress import Heartbeat
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.registry import Hparam

Minibatches = list[tuple[torch.Tensor, torch.Tensor]]


class ResumableAlgorithm(Algorithm):  # type: ignore[misc]
    """An algorithm of which a subclass gives the step, the answers and the state.

    A subclass calls `_begin` at the end of its constructor.

    Class attributes:
        HPARAMS: its hyper-parameters, with defaults, samplers and sources.

    Attributes:
        task: what is asked of every image.
        schedule: the stages of training.
        steps_taken: so far, those of an earlier process among them.
        records: of both answers at the last evaluation; None outside of a job.
        past: of the job; None outside of one, or where nothing is kept.

    Raises:
        ValueError: for hyper-parameters that cannot be used, before anything is trained.
        JobIsRunning: where another process runs the same job.
    """

    HPARAMS: ClassVar[dict[str, Hparam]]

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_hparams(hparams, type(self).__name__)
        check_votes(hparams)
        task = task_of(hparams, num_domains)
        check_task(task, hparams, type(self))
        self.task = task or task_without_names(num_classes)
        if hparams.get("model") == "tiny" and self.task.dataset != "ShapesReasoning":
            print(
                "The model tiny has never seen a photograph, only ShapesReasoning: it shows that a job runs, no more."
            )
        self.schedule = self.task.schedule or schedule_of_stock_dataset(self.stage_epochs(hparams))
        self.seed = torch.initial_seed()
        self.steps_taken = 0
        self.records: AnswerRecords | None = None
        self.past: Past | None = None
        say_without_job(self)
        self._training = Heartbeat(f"{type(self).__name__}'s updates", self.schedule.n_steps, "update")
        self._answering: tuple[int, Heartbeat] | None = None  # after which step

    @classmethod
    def stage_epochs(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the epochs of every stage of this algorithm; [] without training."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Open what is written beside results.jsonl, and find what an earlier process of this job did."""
        args = job_arguments()
        hparams = self.hparams
        exact = hparams.get("answer_matching") == "exact"
        self.records = records_for(self.task, args, hparams.get("answer") == "chain", exact)
        if args is not None:
            self.past = past_of(self.task, self.hparams, args)

    # -- what a subclass gives ------------------------------------------------------------------------------------

    def _take_step(self, minibatches: Minibatches) -> dict[str, float]:
        """Take one step and return its values, plain floats, ``stage`` among them."""
        raise NotImplementedError

    def _answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores of the images ``x``, ``(n, num_classes)``, and what is recorded of them."""
        raise NotImplementedError

    def _adapters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name."""
        raise NotImplementedError

    def _load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load trained tensors.

        Raises:
            ValueError: for tensors that do not fit, naming the first.
        """
        raise NotImplementedError

    def _training_state(self) -> dict[str, Any]:
        """Return what, with the recorded steps, decides everything that follows: tensors and plain values."""
        raise NotImplementedError

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `_training_state` returned after `steps_taken` steps."""
        raise NotImplementedError

    def _recall(self, x: torch.Tensor, answers: Answers) -> None:
        """Remember what an earlier process answered about the images ``x``, if this algorithm makes use of it."""

    def _newly_labelled(self) -> list[tuple[int, int, str, bool]]:
        """Return what the last step self-labelled: environment, index, chain, whether it was kept."""
        return []

    # -- what DomainBed calls -------------------------------------------------------------------------------------

    def update(self, minibatches: Minibatches, unlabeled: list[torch.Tensor] | None = None) -> dict[str, float]:
        """Take one step, or return what it gave in an earlier process; see DomainBed's `Algorithm.update`.

        Returns:
            plain floats; an algorithm's `_take_step` says which.

        Raises:
            FloatingPointError: the loss is no number any more; the step is not recorded.
            ValueError: the images are another dataset's than the task's.
        """
        check_batch(self.task, [x for x, _ in minibatches])
        if self.records is not None:
            self.records.report(f"step {self.steps_taken}")
        if self.past is not None and self.past.replays:
            values = self.past.progress.next_step()
            self.steps_taken += 1
            return values
        self._go_on()
        started = time.monotonic()
        with seeded(self.seed, "step", self.steps_taken):
            values = self._take_step(minibatches)
        self._check_finite(values)
        self.steps_taken += 1
        self._training.add(1, time.monotonic() - started)
        if self.past is not None:
            self.past.progress.record_step(values, self._newly_labelled())
            self.past.save(self.steps_taken, self._training_state)
        return values

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores, ``(n, num_classes)``; in a replay, 1 for the class that was answered.

        Args:
            x: ``(n, c, H, W)``, bytes or DomainBed's floats.
        """
        ids = ids_of(x)
        if self.past is not None and self.past.replays:
            answers = self.past.progress.next_answers(len(x))
            one_hot = torch.nn.functional.one_hot(torch.tensor(answers.classes), len(self.task.class_names))
            scores = one_hot.to(x.device, torch.float32)
            self._recall(x, answers)
        else:
            self._go_on()
            if self.past is not None:
                self.past.save(self.steps_taken, self._training_state, now=True)
            started = time.monotonic()
            with seeded(self.seed, "answers", self.steps_taken, None if ids is None else ids[0].tolist()):
                scores, answers = self._answer(x, ids)
            self._count_answers(len(x), time.monotonic() - started)
            if self.past is not None:
                self.past.progress.record_answers(answers)
        if self.records is not None and ids is not None:
            self.records.add(ids, answers.chains, answers.labels, self._is_last_evaluation())
        return scores

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the adapters alone: the base model is on disk already."""
        if self.past is not None and not self.past.replays:
            self._go_on()
        state = {name: weight.detach().clone() for name, weight in self._adapters().items()}
        if self.past is not None and self.past.keeps_every_model:
            return self.past.progress.kept(f"adapters-{self.steps_taken}.pt", state, self.past.replays)
        return state

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load adapters.

        Raises:
            ValueError: for tensors that do not fit this model's adapters, naming the first.
        """
        self._load_adapters(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _go_on(self) -> None:
        """Restore what an earlier process left, when all that it recorded has been replayed."""
        state = self.past.end_of_replay() if self.past is not None else None
        if state is not None:
            self._restore(state)
            print(f"Goes on after step {self.steps_taken - 1}.", flush=True)

    def _check_finite(self, values: Mapping[str, float]) -> None:
        wrong = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if wrong:
            clip = self.hparams.get("grad_clip")
            cure = f", or bound the gradient: grad_clip 1 (now {clip:g})" if clip is not None else ""
            raise FloatingPointError(
                f"Step {self.steps_taken}: {wrong[0]} is {values[wrong[0]]}. Training has diverged, and what follows "
                f"would be worth nothing. Take a smaller lr (now {self.hparams['lr']:g}){cure}."
            )

    def _count_answers(self, count: int, seconds: float) -> None:
        """Count answered images of an evaluation, in which DomainBed asks about all of them."""
        if self.records is None:
            return
        if self._answering is None or self._answering[0] != self.steps_taken:
            what = f"Evaluation after {self.steps_taken} of {self.schedule.n_steps} updates"
            self._answering = self.steps_taken, Heartbeat(what, len(self.records.splits), "image")
        self._answering[1].add(count, seconds)

    def _is_last_evaluation(self) -> bool:
        return self.steps_taken >= self.schedule.n_steps
