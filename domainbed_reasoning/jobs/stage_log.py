"""Logs the training stages: their starts, the chains kept by rounds, and steps without (good) training data."""

from __future__ import annotations

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.self_labeling import SelfLabels
from domainbed_reasoning.method.stage_run import StageRun
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_ADVICE = (
    "Truncated chains need a larger max_new_tokens, others a longer supervised stage (mtct_epochs) or better teacher "
    "chains."
)
MOSTLY_WELL_FORMED = 0.9  # share among the kept chains below which a round is reported
_ENOUGH = 10  # kept chains, before which it is not reported


class StageLog:
    """Prints the stages of one algorithm.

    Args:
        name: of the algorithm.
        schedule: its stages.
    """

    def __init__(self, name: str, schedule: Schedule):
        self.name = name
        self.schedule = schedule
        self._reported: dict[str, Stage] = {}  # kind of report -> last stage it was made for

    def begin(self, stage: Stage) -> None:
        """Report the start of a stage, also after a restart."""
        _log.info(f"{self.name}: {stage} of {self.schedule.n_steps} steps")

    def step(self, run: StageRun, step: int, samples: int) -> None:
        """Report, once per stage, problems that records do not show and, at a round's end, the share of kept chains.

        A step without samples has loss 0.0 and changes no weights. A model trained on malformed chains generates more
        of them. Surplus steps change nothing.

        Args:
            run: the stage, after the step.
            step: its number.
            samples: number of samples that the step trained on.
        """
        stage, labels = run.stage, run.own_chains
        if not samples and (labels is None or not labels.accepted_share):
            self._once("idle", stage, f"WARNING: {stage}, step {step}: {_idle(labels)}")
        if labels is None:
            return
        if labels.accepted >= _ENOUGH and labels.well_formed_share < MOSTLY_WELL_FORMED:
            self._once("broken", stage, f"WARNING: {stage}, step {step}: {_broken(labels)}")
        if run.is_surplus and step < stage.last:
            self._once("surplus", stage, f"{stage}, step {step}: {_surplus(run, labels)}")
        if step == stage.last:
            _log.info(_round(run, labels))

    def _once(self, kind: str, stage: Stage, message: str) -> None:
        if self._reported.get(kind) is not stage:
            self._reported[kind] = stage
            _log.info(message)


def _idle(labels: SelfLabels | None) -> str:
    if labels is None:
        return (
            "no image in the batch has a chain, so the weights do not change. Add chains with "
            "`domainbed-reasoning annotate`."
        )
    return (
        f"none of {labels.labeled} self-labeled chains has been kept so far, so the weights do not change. Training "
        f"continues. {_ADVICE}"
    )


def _broken(labels: SelfLabels) -> str:
    return (
        f"only {labels.well_formed_share:.1%} of its {labels.accepted} kept chains so far are well formed, with five "
        "stages in order, each closed. The filter only checks conclusions, so the model trains on malformed chains: "
        "consider the hparam sarr_filter 'well_formed'."
    )


def _surplus(run: StageRun, labels: SelfLabels) -> str:
    return (
        f"{run.updates} updates complete its epochs over the {labels.accepted_share:.1%} of chains kept so far. "
        "Surplus steps label images without updating weights."
    )


def _round(run: StageRun, labels: SelfLabels) -> str:
    kept = f"{run.stage}: kept {labels.accepted_share:.1%} of {labels.labeled} self-labeled chains"
    if not labels.accepted_share:
        return f"WARNING: {kept}: the round had no training data and did not change the model. {_ADVICE}"
    updates = f"; {run.updates} of its {run.stage.steps} steps were updates" if run.over_kept else ""
    return f"{kept}, {labels.well_formed_share:.1%} of these well formed{updates}"
