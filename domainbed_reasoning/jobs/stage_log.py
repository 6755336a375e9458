"""Logs the stages of training: where they begin, what their rounds kept, and steps without training data."""

from __future__ import annotations

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.self_labeling import SelfLabels

_ADVICE = (
    "Truncated chains need a larger max_new_tokens, others a longer supervised stage (mtct_epochs) or better teacher "
    "chains."
)


class StageLog:
    """Prints the stages of one algorithm.

    Args:
        name: of the algorithm.
        schedule: its stages.
    """

    def __init__(self, name: str, schedule: Schedule):
        self.name = name
        self.schedule = schedule
        self._idle: Stage | None = None  # the stage whose steps without samples have been reported

    def begin(self, stage: Stage) -> None:
        """Report that a stage begins, or is resumed."""
        print(f"{self.name}: {stage} of {self.schedule.n_steps} steps", flush=True)

    def step(self, stage: Stage, step: int, labels: SelfLabels | None, samples: int) -> None:
        """Report the first step of a stage without samples, and at a round's end the share of chains it kept.

        A step without samples has loss 0.0 and changes no weights, and the records do not show why.

        Args:
            stage: of the step.
            step: its number.
            labels: of a SARR round; None in the supervised stage.
            samples: that the step trained on.
        """
        if not samples and self._idle is not stage and (labels is None or not labels.accepted_share):
            self._idle = stage
            print(f"WARNING: {stage}, step {step}: {_idle(labels)}", flush=True)
        if labels is not None and step == stage.last:
            print(_round(stage, labels), flush=True)


def _idle(labels: SelfLabels | None) -> str:
    if labels is None:
        return (
            "no image in the batch has a chain, so the weights do not change. Add chains with "
            "`domainbed-reasoning annotate`."
        )
    return (
        f"none of {labels.labelled} self-labeled chains has been kept so far, so the weights do not change. Training "
        f"continues. {_ADVICE}"
    )


def _round(stage: Stage, labels: SelfLabels) -> str:
    kept = f"{stage}: kept {labels.accepted_share:.1%} of {labels.labelled} self-labeled chains"
    if labels.accepted_share:
        return kept
    return f"WARNING: {kept}: the round had no training data and did not change the model. {_ADVICE}"
