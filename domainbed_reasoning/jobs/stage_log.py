"""Logs the stages of training: where they begin, what their rounds kept, and steps without (good) training data."""

from __future__ import annotations

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.self_labeling import SelfLabels
from domainbed_reasoning.method.stage_run import StageRun

_ADVICE = (
    "Truncated chains need a larger max_new_tokens, others a longer supervised stage (mtct_epochs) or better teacher "
    "chains."
)
_MOSTLY, _ENOUGH = 0.9, 10  # share of the kept chains, of so many or more, below which they are no longer well formed


class StageLog:
    """Prints the stages of one algorithm.

    Args:
        name: of the algorithm.
        schedule: its stages.
    """

    def __init__(self, name: str, schedule: Schedule):
        self.name = name
        self.schedule = schedule
        self._reported: dict[str, Stage] = {}  # what has been reported, and the last stage of which

    def begin(self, stage: Stage) -> None:
        """Report that a stage begins, or is resumed."""
        print(f"{self.name}: {stage} of {self.schedule.n_steps} steps", flush=True)

    def step(self, run: StageRun, step: int, samples: int) -> None:
        """Report, once per stage, what the records do not show, and at a round's end the share of chains it kept.

        A step without samples has loss 0.0 and changes no weights. A model trained on chains that are not well formed
        writes more of them. From the first surplus step on nothing changes.

        Args:
            run: the stage, after the step.
            step: its number.
            samples: that the step trained on.
        """
        stage, labels = run.stage, run.own_chains
        if not samples and (labels is None or not labels.accepted_share):
            self._once("idle", stage, f"WARNING: {stage}, step {step}: {_idle(labels)}")
        if labels is None:
            return
        if labels.accepted >= _ENOUGH and labels.well_formed_share < _MOSTLY:
            self._once("broken", stage, f"WARNING: {stage}, step {step}: {_broken(labels)}")
        if run.is_surplus and step < stage.last:
            self._once("surplus", stage, f"{stage}, step {step}: {_surplus(run, labels)}")
        if step == stage.last:
            print(_round(run, labels), flush=True)

    def _once(self, kind: str, stage: Stage, message: str) -> None:
        if self._reported.get(kind) is not stage:
            self._reported[kind] = stage
            print(message, flush=True)


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
        "stages in order, each closed. The filter reads the conclusion alone, and the next round learns from these "
        "chains: consider the hparam sarr_filter 'well_formed'."
    )


def _surplus(run: StageRun, labels: SelfLabels) -> str:
    return (
        f"{run.updates} updates are its epochs over the {labels.accepted_share:.1%} that it has kept so far. Surplus "
        "steps label images and change no weight."
    )


def _round(run: StageRun, labels: SelfLabels) -> str:
    kept = f"{run.stage}: kept {labels.accepted_share:.1%} of {labels.labeled} self-labeled chains"
    if not labels.accepted_share:
        return f"WARNING: {kept}: the round had no training data and did not change the model. {_ADVICE}"
    updates = f"; {run.updates} of its {run.stage.steps} steps were updates" if run.over_kept else ""
    return f"{kept}, {labels.well_formed_share:.1%} of these well formed{updates}"
