"""A multimodal LLM in a job's session: loading, frozen copies, and the state that a restart restores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.in_session import SessionAlgorithm
from domainbed_reasoning.bridge.samples import environment_of, ids_of
from domainbed_reasoning.jobs.origin import check_origin
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.stage_log import StageLog
from domainbed_reasoning.method.answering import Questions
from domainbed_reasoning.method.average import AdapterAverage
from domainbed_reasoning.method.objective import check_shares
from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.stage_run import StageRun
from domainbed_reasoning.mllm.adapters import LoraSettings
from domainbed_reasoning.mllm.decoding import FEWEST
from domainbed_reasoning.mllm.devices import job_device
from domainbed_reasoning.mllm.load import load_mllm
from domainbed_reasoning.mllm.snapshots import Snapshots


class TrainedMLLM(SessionAlgorithm):
    """The state of an MLLM algorithm; subclasses implement the method.

    Class attributes:
        LABEL_PATH: whether the objective includes the classification path.
        CHAIN_PATH: whether the objective includes the reasoning path.

    Attributes:
        mllm: the model, with fresh adapters if it is trained.
        questions: q_cls, q_reason, and how chains are generated and parsed, in training; see `questions_about`.
        snapshots: frozen copies of the model.
        average: of the adapters over a stage's evaluations; None without ``average_adapters``.
        run: the current training stage; None before the first step.
        shares: `SelfLabels.shares` of every SARR round so far.

    Raises:
        ValueError: if hyper-parameters or model cannot be used; raised before training.
    """

    SHARES_WORK: ClassVar[bool] = True
    LABEL_PATH: ClassVar[bool] = False
    CHAIN_PATH: ClassVar[bool] = False

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        trains = self.LABEL_PATH or self.CHAIN_PATH
        if hparams["dtype"] == "float16" and trains:
            raise ValueError(
                "hparam dtype: float16 is for evaluation only. Gradients underflow without loss scaling, which is not "
                "implemented: use bfloat16 or float32, or quantize nf4 with bfloat16."
            )
        if trains and not any(self.stages(hparams)):
            raise ValueError(
                f"hparam mtct_epochs: 0 leaves {type(self).__name__} nothing to train on. Use MLLMZeroShot for the "
                "model as it is, or set sarr_rounds if the algorithm has them."
            )
        if trains:
            self._check_rounds()
            check_shares(hparams["batch_size"] * num_domains, hparams["micro_batch"], self.session.ranks.world)
        for name in ("init_adapter", "model"):
            if hparams.get(name) is not None:
                check_origin(name, hparams[name], self.task)
        self.mllm = load_mllm(
            hparams["model"],
            lora=LoraSettings.of(hparams) if trains else None,
            dtype=hparams["dtype"],
            quantize=hparams["quantize"],
            gradient_checkpointing=trains and hparams["gradient_checkpointing"],
            max_tiles=hparams["max_tiles"],
            tiling=hparams["tiling"],
            device=job_device(),
            revision=hparams["revision"],
            trust_remote_code=hparams["trust_remote_code"],
            attn_implementation=hparams["attn_implementation"],
        )
        self.questions = Questions.of(self.task, hparams)
        asked = self.questions
        if hparams.get("average_adapters") and hparams["lora_variant"] == "dora":
            raise ValueError(
                "hparam average_adapters: the average of DoRA's weights is no adapter. Use lora_variant 'lora' or "
                "'rslora', or set average_adapters to false."
            )
        self.average = AdapterAverage() if trains and hparams.get("average_adapters") else None
        rows = min(asked.batch, FEWEST)
        self.snapshots = Snapshots(self.mllm, self.mllm.generation_bytes(rows, asked.q_reason, asked.max_new_tokens))
        self.log = StageLog(type(self).__name__, self.schedule)
        self.run: StageRun | None = None
        self.shares: dict[str, float] = {}
        self.train()  # libraries load models in eval mode
        self.session.start()

    def _check_rounds(self) -> None:
        """Reject stages after the first without what rounds of self-labeling need.

        Raises:
            ValueError: naming it.
        """
        if any(self.stages(self.hparams)[1:]) and not (self.CHAIN_PATH and SARR_HPARAMS.keys() <= self.hparams.keys()):
            raise ValueError(
                f"{type(self).__name__}.stages returns more than one stage. Those after the first are SARR's rounds on "
                "the model's own chains: they need CHAIN_PATH and the hyper-parameters in `SARR_HPARAMS`."
            )

    def questions_about(self, env: int | None) -> Questions:
        """Return the questions about an environment's images; those of training if all environments have the same."""
        return self.questions if env is None else Questions.of(self.task, self.hparams, env)

    @property
    def q_cls(self) -> str:
        """The question of the classification path."""
        return self.questions.q_cls

    @property
    def q_reason(self) -> str:
        """The question of the reasoning path."""
        return self.questions.q_reason

    def begin(self, stage: Stage) -> StageRun:
        """Begin a stage with the current model."""
        raise NotImplementedError

    def pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Return images as the model sees them: bytes ``(n, 3, H, W)``; see `MLLM.pictures`."""
        return self.mllm.pictures(x)

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the tensors that answer, by name: the trained ones, or with ``average_adapters`` their average."""
        return (self.average.adapters() if self.average is not None else None) or self.mllm.adapters()

    def load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load trained tensors by name."""
        self.mllm.load_adapters(values, several=self.average is not None)
        self.snapshots.weights_change()

    def after_step(self) -> None:
        """Drop the copy that answers with the weights before this step: `step` may be a subclass's own."""
        self.snapshots.weights_change()

    def before_answers(self) -> None:
        """Take the weights of this evaluation into the average; the first evaluation comes after a single update."""
        step = self.session.steps_taken
        if self.average is not None and step > 1 and step >= self.hparams["first_evaluation"]:
            if self.average.add(self.schedule.at(step - 1).round, step, self.mllm.adapters()):
                self.snapshots.weights_change()

    def training_state(self) -> dict[str, Any]:
        """Return adapters, optimizer, schedule and, in a SARR round, its labeler and filter."""
        state = {
            "adapters": {name: weight.detach().cpu() for name, weight in self.mllm.adapters().items()},
            "shares": self.shares,
            "labels_by_copy": self.snapshots.labels_by_copy,
            "training_peak": self.snapshots.training_peak,
        }
        state |= {} if self.average is None else {"average": self.average.state_dict()}
        return state if self.run is None else state | self.run.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `training_state` returned; a round's labeler is the model at the start of its stage."""
        if "optimizer" in state:
            stage = self.schedule.at(self.session.steps_taken - 1)
            self.snapshots.labels_by_copy = state["labels_by_copy"]
            self.snapshots.training_peak = state["training_peak"]
            self.load_adapters(state["stage_start"] if stage.round else state["adapters"])
            self.run = self.begin(stage)
            self.run.load_state_dict(state, self.session.labeled(stage.round))
        self.load_adapters(state["adapters"])
        self.shares = state["shares"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def recall(self, x: torch.Tensor, answers: Answers) -> None:
        """Cache the chains that a copy of these weights generated in an earlier process."""
        if answers.state and answers.chains is not None:
            asked = self.questions_about(environment_of(self.task, ids_of(x)))
            where = (self.pixels(x), asked.q_reason, asked.max_new_tokens)
            self.mllm.remember(bytes.fromhex(answers.state), *where, answers.chains)

    def new_self_labels(self) -> list[tuple[int, int, str, bool]]:
        """Return the chains self-labeled in the last step: environment, index, chain, whether it was kept."""
        own = self.run.own_chains if self.run is not None else None
        return own.newly_written() if own is not None else []
