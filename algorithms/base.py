"""What RD-MLDG and its ablations share: algorithm 1 of arXiv 2602.23777, the update and the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from domainbed_reasoning.algorithms.trained_mllm import TrainedMLLM
from domainbed_reasoning.bridge.samples import Batch
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.session import Minibatches
from domainbed_reasoning.method.answering import answer_images
from domainbed_reasoning.method.objective import Objective, Terms, chain_nll, label_nll
from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.self_labeling import SelfLabels, labels_of_round
from domainbed_reasoning.method.stage_run import StageRun
from domainbed_reasoning.mllm.generation_cache import write_ahead
from domainbed_reasoning.mllm.model import MLLM


class MLLMAlgorithm(TrainedMLLM):
    """An algorithm with one or both terms of the objective.

    L = 1/B Σ_i [ w_label · -log p(y_i | x_i, q_cls)  -  w_chain · 1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason) ]
    """

    def begin(self, stage: Stage) -> StageRun:
        """Begin a stage with a fresh optimizer and, in a SARR round, with the model as it is now as the labeler.

        The paper does not say whether the optimizer's state outlives a stage; stages are runs of their own here.
        """
        self.log.begin(stage)
        self.run = None  # the last round's labeler makes room
        return StageRun(stage, self.mllm.adapters(), self.hparams, self.labeler() if stage.round else None)

    def labeler(self) -> SelfLabels:
        """Return the chains that the model as it is now writes for a round, and which of them are kept."""
        return labels_of_round(self.snapshots.freeze(), self.questions, self.hparams)

    def chains_of(self, batch: Batch, run: StageRun) -> Sequence[str | None]:
        """Return each sample's chain: the teacher's, or in a SARR round the model's own where it was kept."""
        if not self.CHAIN_PATH:
            return [None] * len(batch.labels)
        if run.own_chains is not None:
            return run.own_chains.chains_for(batch.images, batch.labels, batch.ids)
        return [self.task.chains.get(sample) for sample in batch.ids or [(-1, -1)] * len(batch.labels)]

    def terms(self, images: torch.Tensor, names: list[str] | None, chains: list[str] | None) -> Terms:
        """Return both terms of each image, ``(n,)`` in nats, None for one that it does not have; it is encoded once."""
        by_label, by_chain = self.mllm.path_log_likelihoods(images, self.questions.both, (names, chains))
        label = label_nll(*by_label) if by_label is not None else None
        chain = chain_nll(*by_chain) if by_chain is not None else None
        return label, chain

    def step(self, minibatches: Minibatches) -> dict[str, float]:
        """Take one update: find the batch its chains, and descend the objective over the samples that it is over.

        Returns:
            ``loss``, ``label_loss`` and ``chain_loss`` in nats (means over the samples that have the term), ``stage``
            (0 is MTCT, k is SARR's round k), ``chain_share`` (samples with a chain, in [0, 1]) and, where DomainBed
            writes a record, of every round so far `SelfLabels.shares`. With ``sarr_epoch_over`` at ``kept`` a round's
            steps have ``updated``, 1 or, in surplus steps, which have no loss, 0.
        """
        self.snapshots.weights_change()
        stage = self.schedule.at(self.session.steps_taken)
        if self.run is None or self.run.stage is not stage:
            self.run = self.begin(stage)
        run, batch = self.run, Batch.gather(minibatches, self.pixels, self.task.labels)
        chains = self.chains_of(batch, run)
        # Eq. 1 is over the B samples that have a term, eq. 2 over the B' whose own chain was kept.
        used = [i for i, chain in enumerate(chains) if chain is not None or (self.LABEL_PATH and not stage.round)]
        updates = not run.is_surplus
        values = self.descend(run, batch, chains, used) if updates else {}
        self.log.step(run, self.session.steps_taken, len(used) if updates else 0)
        values |= {"stage": float(stage.round)} | ({"updated": float(updates)} if run.over_kept else {})
        self.shares |= run.own_chains.shares(stage.round) if run.own_chains is not None else {}
        values |= self.shares if self.session.is_recorded else {}
        with_chain = sum(chain is not None for chain in chains) / len(chains)
        return values | ({"chain_share": with_chain} if self.CHAIN_PATH else {})

    def descend(self, run: StageRun, batch: Batch, chains: Sequence[str | None], used: list[int]) -> dict[str, float]:
        """Take one step down the gradient of the objective over the ``used`` rows of the batch; return its losses."""
        names = [self.task.class_names[label] for label in batch.labels] if self.LABEL_PATH else None
        objective = Objective.of(self.hparams, self.LABEL_PATH, self.CHAIN_PATH)
        run.optimizer.zero_grad(set_to_none=True)
        values = objective.backward(self.terms, batch.images, names, chains, used, list(self.mllm.adapters().values()))
        run.advance()
        self.snapshots.update_done()
        return values

    def write_ahead(self, mllm: MLLM) -> None:
        """Write the chains of all splits when an evaluation begins: DomainBed asks about 64 images of one at a time."""
        images = self.session.look_ahead()
        if images is None or mllm.frozen_state is None:
            return
        asked, state, started = self.questions, mllm.frozen_state.hex(), time.monotonic()
        known = {bytes.fromhex(digest): chain for digest, chain in self.session.recorded_ahead(state).items()}
        settings = (asked.q_reason, asked.max_new_tokens, asked.batch, known)
        for digest, chain in write_ahead(mllm, images, *settings):
            now = time.monotonic()
            self.session.record_ahead(state, digest.hex(), chain, now - started)
            started = now

    def answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores by the hparam ``answer`` (see `answer_images`); at the last evaluation both are recorded.

        Args:
            x: images, ``(n, c, H, W)``.
            ids: their sample ids, ``(n, 2)``.
        """
        hparams, last = self.hparams, self.session.is_last_evaluation
        if self.session.steps_taken < hparams["first_evaluation"] and not last:
            return torch.zeros(len(x), len(self.task.class_names), device=x.device), Answers([0] * len(x), None, None)
        both = self.session.records is not None and ids is not None and last and hparams["both_answers"]
        mllm = self.snapshots.current()
        if (both or hparams["answer"] == "chain") and hparams["votes"] == 1:
            self.write_ahead(mllm)
        scores, chains, labels = answer_images(mllm, self.pixels(x), self.questions, hparams, both)
        state = mllm.frozen_state.hex() if mllm.frozen_state is not None and hparams["votes"] == 1 else ""
        return scores, Answers(scores.argmax(1).tolist(), chains, labels, state)
