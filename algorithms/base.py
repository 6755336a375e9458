"""What every MLLM algorithm shares: one model, two paths, stages, and answers that DomainBed can compare.

The objective is that of MTCT and SARR (arXiv 2602.23777, eq. 1 and 2); an algorithm says which of its two terms it has
and where its chains come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.bridge.train_args import job_arguments
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.jobs import idle
from domainbed_reasoning.jobs.answers import write_task
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.resumable import Minibatches, ResumableAlgorithm
from domainbed_reasoning.method.answering import answering_chains, elected_chains, scores_of_chains
from domainbed_reasoning.method.balance import LabelGradients
from domainbed_reasoning.method.consistency import Support
from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.method.optimizer import optimiser_of_stage
from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.self_labeling import SelfLabels
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.likelihood import LogLikelihoods
from domainbed_reasoning.mllm.loading import image_edge
from domainbed_reasoning.mllm.pixels import resize, to_uint8
from domainbed_reasoning.mllm.rows import micro_batches


@dataclass(frozen=True)
class Batch:
    """The minibatches of all domains, together.

    Attributes:
        images: ``(n, 3, H, W)`` bytes.
        labels: n classes.
        ids: n sample ids; None where the dataset carries none.
    """

    images: torch.Tensor
    labels: list[int]
    ids: list[SampleId] | None


class MLLMAlgorithm(ResumableAlgorithm):
    """An algorithm whose network is a multimodal LLM.

    Class attributes:
        LABEL_PATH: whether the objective has the term of the classification path.
        CHAIN_PATH: whether it has the term of the reasoning path.

    Raises:
        ValueError: for hyper-parameters or a model that cannot be used, before anything is trained.
    """

    LABEL_PATH: ClassVar[bool] = False
    CHAIN_PATH: ClassVar[bool] = False

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["dtype"] == "float16" and (self.LABEL_PATH or self.CHAIN_PATH):
            raise ValueError(
                "hparam dtype: float16 is for answering alone. Training in it loses gradients below its range unless "
                "the loss is scaled, which is not done: use bfloat16 or float32, or quantize nf4 with bfloat16."
            )
        if self.schedule.left_out:
            print(f"WARNING: {type(self).__name__}: {self.schedule.shortfall()}", flush=True)
        self.q_cls = q_cls(self.task.class_names, self.task.subject)
        self.q_reason = q_reason(self.task.class_names, self.task.subject)
        self.mllm = load_mllm(
            hparams["model"],
            lora=self._lora(),
            dtype=hparams["dtype"],
            quantize=hparams["quantize"],
            gradient_checkpointing=hparams.get("gradient_checkpointing", False),
            max_tiles=hparams["max_tiles"],
        )
        self._exact = hparams["answer_matching"] == "exact"  # how conclusions are read, see `reader.read_conclusion`
        self.stage: Stage | None = None
        self.self_labels: SelfLabels | None = None
        self.kept_by_round: dict[int, float] = {}
        self._idle_stage: Stage | None = None  # whose steps without samples the log has named
        self._labels_by_copy: bool | None = None  # None as long as it is not decided
        self._training_peak: int | None = 0 if self.mllm.device.type != "cuda" else None  # bytes; None: not known yet
        self._reader: tuple[int, Any] | None = None
        self._labelling_copies: list[Any] = []  # of this round's labeller; at most one
        self.train()  # libraries load models for answering
        self._begin()

    def _begin(self) -> None:
        args = job_arguments()
        if args is not None:
            write_task(self.task, self.hparams, args)
        super()._begin()

    @staticmethod
    def image_edge(hparams: dict[str, Any]) -> int:
        """Return the edge in pixels at which the model sees an image."""
        return image_edge(hparams["model"], hparams["max_tiles"])

    @classmethod
    def stage_epochs(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the epochs of every stage of this algorithm: MTCT's, then each SARR round's; [] without training."""
        epochs = [hparams["mtct_epochs"]] if "mtct_epochs" in cls.HPARAMS else []
        if "sarr_rounds" in cls.HPARAMS:
            epochs += [hparams["sarr_epochs"]] * hparams["sarr_rounds"]
        return epochs

    def _lora(self) -> LoraSettings | None:
        """Return the adapters to train; None for an algorithm that trains nothing."""
        if not (self.LABEL_PATH or self.CHAIN_PATH):
            return None
        hparams = self.hparams
        return LoraSettings(
            hparams["lora_rank"],
            hparams["lora_alpha"],
            hparams["lora_dropout"],
            hparams["lora_targets"],
            hparams["lora_projector"],
        )

    # -- training -------------------------------------------------------------------------------------------------

    def _take_step(self, minibatches: Minibatches) -> dict[str, float]:
        """Enter the step's stage if it is new, find the batch its chains, and descend.

        Returns:
            ``loss``, ``label_loss`` and ``chain_loss`` in nats (means over the samples that have the term), ``stage``
            (0 is MTCT, k is SARR's round k), ``chain_share`` (samples with a chain, in [0, 1]) and
            ``sarr{k}_accepted``, the share of round k's chains kept so far.
        """
        self._reader = None
        stage = self.schedule.at(self.steps_taken)
        if stage is not self.stage:
            self._enter(stage)
        batch = self._gather(minibatches)
        chains = self._chains_for(batch, stage)
        used = [i for i in range(len(chains)) if chains[i] is not None or (self.LABEL_PATH and stage.round == 0)]
        values = self._step(batch, chains, used) if used else self._step_of_nothing()
        values["stage"] = float(stage.round)
        if self.CHAIN_PATH:
            values["chain_share"] = sum(chain is not None for chain in chains) / len(chains)
        if self.self_labels is not None:
            self.kept_by_round[stage.round] = self.self_labels.accepted_share
        values.update({f"sarr{k}_accepted": share for k, share in self.kept_by_round.items()})
        if self.self_labels is not None and self.steps_taken == stage.last:
            print(idle.of_round(stage, self.self_labels), flush=True)
        return values

    def _enter(self, stage: Stage) -> None:
        """Begin a stage: a fresh optimiser, and for a SARR round the labeller that the model is now.

        The paper does not say whether the optimiser's state outlives a stage; stages are runs of their own here.
        """
        print(f"{type(self).__name__}: {stage} of {self.schedule.n_steps} steps", flush=True)
        self._prepare(stage)

    def _prepare(self, stage: Stage) -> None:
        """Make the stage's optimiser and labeller from the model as it is now."""
        self.stage = stage
        self.self_labels = None  # the last round's labeller makes room
        adapters = self.mllm.adapters() if stage.round else {}
        self._stage_start = {name: weight.detach().cpu().clone() for name, weight in adapters.items()}
        self.optimizer, self.lr_scheduler = optimiser_of_stage(self.mllm.adapters().values(), self.hparams, stage.steps)
        self.self_labels = self._labeller() if stage.round else None

    def _labeller(self) -> SelfLabels:
        """Freeze the model as it is now, as the round's labeller; all rounds do so as the first.

        Whether a merged copy fits beside training is known after an update. A first round that no update came before
        labels its first batch with the adapters alone.
        """
        hparams, names = self.hparams, self.task.class_names
        adapters = {name: weight.detach().clone() for name, weight in self.mllm.adapters().items()}
        copies = self._labelling_copies = []

        def as_now() -> contextlib.AbstractContextManager[Any]:
            if self._labels_by_copy is None and self._training_peak is not None:
                self._labels_by_copy = self.mllm.fits_a_copy(self._written_bytes(), self._training_peak)
            if not self._labels_by_copy:
                return self.mllm.with_adapters(adapters)
            if not copies:
                with self.mllm.with_adapters(adapters) as then:
                    copies.append(then.copy_for_inference())
            return contextlib.nullcontext(copies[0])

        def write(images: torch.Tensor) -> list[str]:
            with as_now() as mllm:
                sampling = (hparams["sarr_votes"], hparams["temperature"], hparams["top_p"])
                return elected_chains(mllm, images, *self._asked_for_chains(), *sampling, exact=self._exact)

        self._support = Support((self.q_cls, self.q_reason), names)

        def supports(images: torch.Tensor, chains: list[str], labels: list[int]) -> list[bool]:
            with as_now() as mllm:
                return self._support.judge(mllm, images, chains, labels)

        return SelfLabels(write, names, supports if hparams["sarr_filter"] == "consistent" else None, self._exact)

    def _gather(self, minibatches: Minibatches) -> Batch:
        """Return the domains' minibatches as one batch at the model's resolution."""
        images = torch.cat([self._pixels(x) for x, _ in minibatches])
        labels = [int(label) for _, y in minibatches for label in y.tolist()]
        ids = [ids_of(x) for x, _ in minibatches]
        if any(part is None for part in ids):
            return Batch(images, labels, None)
        return Batch(images, labels, [(int(env), int(index)) for part in ids for env, index in part])

    def _pixels(self, x: torch.Tensor) -> torch.Tensor:
        return resize(to_uint8(x.as_subclass(torch.Tensor)), self.mllm.image_size)

    def _chains_for(self, batch: Batch, stage: Stage) -> list[str | None]:
        """Return each sample's chain in this stage: the teacher's, or the model's own where it was kept."""
        if not self.CHAIN_PATH:
            return [None] * len(batch.labels)
        if stage.round:
            assert self.self_labels is not None
            return self.self_labels.chains_for(batch.images, batch.labels, batch.ids)
        return [self.task.chains.get(key) for key in batch.ids or [(-1, -1)] * len(batch.labels)]

    def _step(self, batch: Batch, chains: Sequence[str | None], used: list[int]) -> dict[str, float]:
        """Descend L = 1/B Σ_i [w_label · label_nll_i + w_chain · chain_nll_i] over the B ``used`` samples.

        Images are encoded once for both paths, which share a row where the model allows. Micro-batches add up to the
        gradient of the whole batch; they are formed of samples that have the same terms. With ``gradient_balance`` the
        label term enters by its scaled gradient alone, is not in ``loss``, and its factor is ``label_scale``.
        """
        label_weight = float(self.hparams["label_weight"]) if self.LABEL_PATH else 0.0
        chain_weight = float(self.hparams["chain_weight"]) if self.CHAIN_PATH else 0.0
        sums = {"loss": 0.0, "label_loss": 0.0, "chain_loss": 0.0}
        counts = {"label_loss": 0, "chain_loss": 0}
        balance = None
        if self.hparams.get("gradient_balance") == "norm":
            balance = LabelGradients(list(self.mllm.adapters().values()))
        self.optimizer.zero_grad(set_to_none=True)
        for rows in micro_batches(used, chains, self.hparams["micro_batch"]):
            names = [self.task.class_names[batch.labels[row]] for row in rows] if self.LABEL_PATH else None
            texts = [str(chains[row]) for row in rows] if chains[rows[0]] is not None else None
            by_label, by_chain = self._log_likelihoods(batch.images[rows], names, texts)
            loss = torch.zeros((), device=self.mllm.device)
            if by_label is not None:
                label = label_nll(*by_label).sum()
                if balance is None:
                    loss = loss + label_weight * label
                else:
                    balance.add(label / len(used))
                sums["label_loss"] += float(label.detach())
                counts["label_loss"] += len(rows)
            if by_chain is not None:
                chain = chain_nll(*by_chain).sum()
                loss = loss + chain_weight * chain
                sums["chain_loss"] += float(chain.detach())
                counts["chain_loss"] += len(rows)
            if loss.requires_grad:  # not where the label term is kept apart and there is no other
                (loss / len(used)).backward()
            sums["loss"] += float(loss.detach())
        scale = {} if balance is None else {"label_scale": balance.join(label_weight)}
        if self.hparams["grad_clip"] > 0:
            torch.nn.utils.clip_grad_norm_(self.mllm.adapters().values(), self.hparams["grad_clip"])
        self.optimizer.step()
        self.lr_scheduler.step()
        if self._training_peak is None:  # the first update: no evaluation has added a copy to it
            self._training_peak = int(1.1 * torch.cuda.max_memory_allocated(self.mllm.device))
        means = {name: sums[name] / count for name, count in counts.items() if count}
        return {"loss": sums["loss"] / len(used), **means, **scale}

    def _step_of_nothing(self) -> dict[str, float]:
        """Take a step none of whose samples may be used, as when none of its self-labelled chains was kept.

        No weight changes, and the learning rate moves on as after any other step: the schedule is laid over the
        stage's steps, so that the last ones get its end whatever was rejected. The paper publishes no schedule, nor
        what to do when a round keeps nothing: training continues, for later images may do better.
        """
        if self.stage is not None and self._idle_stage is not self.stage:
            if said := idle.of_step(self.stage, self.steps_taken, self.self_labels):
                self._idle_stage = self.stage
                print(said, flush=True)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.lr_scheduler.step()
        return {"loss": 0.0}

    def _log_likelihoods(
        self, images: torch.Tensor, names: list[str] | None, chains: list[str] | None
    ) -> tuple[LogLikelihoods | None, LogLikelihoods | None]:
        """Return the target tokens' log-likelihoods on either path, None for one that is not asked."""
        if names is not None and chains is not None:
            return self.mllm.two_path_log_likelihoods(images, (self.q_cls, self.q_reason), (names, chains))
        encoded = self.mllm.encode(images)
        by_label = self.mllm.log_likelihoods(encoded, self.q_cls, names) if names is not None else None
        by_chain = self.mllm.log_likelihoods(encoded, self.q_reason, chains) if chains is not None else None
        return by_label, by_chain

    # -- answers --------------------------------------------------------------------------------------------------

    def _answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores and what is recorded of them, `eval_batch` images at a time.

        ``answer="label"``: log p(name | x, q_cls) of each class. ``answer="chain"``: 1 for the class that the generated
        chain concludes with; where it names none, the classification path's probabilities.
        """
        hparams, names = self.hparams, self.task.class_names
        if self.steps_taken < hparams["first_evaluation"] and not self._is_last_evaluation():
            return torch.zeros(len(x), len(names), device=x.device), Answers([0] * len(x), None, None)
        mllm = self._current_reader()
        both = self.records is not None and ids is not None and self._is_last_evaluation() and hparams["both_answers"]
        asks_label, asks_chain = hparams["answer"] == "label" or both, hparams["answer"] == "chain" or both
        voting = (hparams["votes"], hparams["vote_temperature"], self._exact)
        scores, chains, labels = [], [], []
        for part in self._pixels(x).split(hparams["eval_batch"]):
            by_label = mllm.class_scores(part, self.q_cls, names) if asks_label else None
            by_chain = answering_chains(mllm, part, *self._asked_for_chains(), *voting) if asks_chain else None
            if by_chain is None or hparams["answer"] == "label":
                assert by_label is not None
                scores.append(by_label)
            else:
                scores.append(scores_of_chains(mllm, part, self.q_cls, names, by_chain, by_label, self._exact))
            chains += by_chain or []
            labels += by_label.argmax(1).tolist() if by_label is not None else []
        together = torch.cat(scores)
        classes = together.argmax(1).tolist()
        state = mllm.frozen_state.hex() if mllm.frozen_state is not None and hparams["votes"] == 1 else ""
        return together, Answers(classes, chains if asks_chain else None, labels if asks_label else None, state)

    def _recall(self, x: torch.Tensor, answers: Answers) -> None:
        if answers.state and answers.chains is not None:
            asked = (self.q_reason, self.hparams["max_new_tokens"])
            self.mllm.remember(bytes.fromhex(answers.state), self._pixels(x), *asked, answers.chains)

    def _asked_for_chains(self) -> tuple[str, tuple[str, ...], int, int]:
        """Return what every request for chains says: question, class names, most tokens, images at a time."""
        return self.q_reason, self.task.class_names, self.hparams["max_new_tokens"], self.hparams["eval_batch"]

    def _written_bytes(self) -> int:
        return int(self.mllm.cache_bytes(self.hparams["eval_batch"], self.q_reason, self.hparams["max_new_tokens"]))

    def _current_reader(self) -> Any:
        """Return the model that answers: a merged copy of the present weights where one fits, else the model itself."""
        if not self.mllm.adapters():
            return self.mllm
        if self._reader is None or self._reader[0] != self.steps_taken:
            self._reader = None
            self._labelling_copies.clear()  # makes room; made anew if the round goes on
            fits = self.mllm.fits_a_copy(self._written_bytes())
            self._reader = (self.steps_taken, self.mllm.copy_for_inference() if fits else self.mllm)
        return self._reader[1]

    # -- state ----------------------------------------------------------------------------------------------------

    def _adapters(self) -> dict[str, torch.Tensor]:
        return self.mllm.adapters()

    def _load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        self.mllm.load_adapters(values)
        self._reader = None

    def _newly_labelled(self) -> list[tuple[int, int, str, bool]]:
        return self.self_labels.newly_written() if self.self_labels is not None else []

    def _training_state(self) -> dict[str, Any]:
        state = {
            "adapters": {name: weight.detach().cpu() for name, weight in self.mllm.adapters().items()},
            "kept_by_round": self.kept_by_round,
        }
        if self.stage is None:
            return state
        labels = self.self_labels
        return state | {
            "stage_start": self._stage_start,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "labelled": labels.labelled if labels is not None else 0,
            "accepted_share": labels.accepted_share if labels is not None else 0.0,
            "labels_by_copy": self._labels_by_copy,
            "support": [self._support.sums, self._support.counts] if labels is not None else [],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if "optimizer" in state:
            stage = self.schedule.at(self.steps_taken - 1)
            print(f"{type(self).__name__}: {stage} of {self.schedule.n_steps} steps", flush=True)
            self._labels_by_copy = state.get("labels_by_copy")
            self._load_adapters(state["stage_start"] if stage.round else state["adapters"])
            self._prepare(stage)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if self.self_labels is not None:
                assert self.past is not None
                rows = self.past.progress.labelled(stage.round)
                self.self_labels.restore(rows, state["labelled"], state["accepted_share"])
                self._support.sums, self._support.counts = state["support"]
            self._load_adapters(state["adapters"])
        self.kept_by_round = state["kept_by_round"]
